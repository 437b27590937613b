//! `MxMatMul`: a packed constant weight times X.

use std::borrow::Cow;

use half::{bf16, f16};
use mx_kernels::{Float, FloatMut, LinearProblem, PackedWeight};
use ort::{
    operator::{
        ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
        ShapeInferenceContext,
    },
    value::TensorElementType,
};

use crate::{
    contract::{
        ContractError, DOMAIN_VERSION, MxMatMulAttrs, ScalesShape, attr, check_shape,
        check_x_shape, input, op,
    },
    guard::{OpError, protect},
    host::{self, Element, ElementType, Node, TensorView, TypeShape},
    pool::OrtPool,
};

/// The float types that X and Y may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum XType {
    F32,
    F16,
    Bf16,
}

impl XType {
    pub(crate) const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    pub(crate) fn ort(self) -> TensorElementType {
        match self {
            Self::F32 => TensorElementType::Float32,
            Self::F16 => TensorElementType::Float16,
            Self::Bf16 => TensorElementType::Bfloat16,
        }
    }

    pub(crate) fn element(self) -> ElementType {
        match self {
            Self::F32 => ElementType::F32,
            Self::F16 => ElementType::F16,
            Self::Bf16 => ElementType::BF16,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn of(element: ElementType) -> Option<Self> {
        Self::ALL.into_iter().find(|x| x.element() == element)
    }
}

/// The operator for one type of X and one of scales.
pub(crate) struct MxMatMul {
    pub x: XType,
    pub scales: TensorElementType,
}

impl Operator for MxMatMul {
    type Kernel<'attr> = MatMulKernel;

    fn name(&self) -> &str {
        op::MX_MATMUL
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        DOMAIN_VERSION as u32..=u32::MAX
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(self.x.ort()),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::optional(self.scales),
            OperatorInput::optional(self.x.ort()),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(self.x.ort())]
    }

    fn create_kernel<'attr>(&self, kctx: &KernelContext<'attr>) -> ort::Result<MatMulKernel> {
        let node = Node(kctx);
        let name = node.name();
        let problem = protect(op::MX_MATMUL, &name, || check_node(&node, self.x))?;
        crate::census::cpu();
        Ok(MatMulKernel { name, problem, x: self.x })
    }

    /// ONNX Runtime asks the first operator of the name, whatever the node's types are, and ignores
    /// (and leaks) an error: what cannot be inferred is left open and checked in creation.
    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        let _ = protect(op::MX_MATMUL, "", || infer(ctx));
        Ok(())
    }
}

fn infer(ctx: &mut ShapeInferenceContext) -> Result<(), OpError> {
    let Some((mut shape, mut names)) = host::inferred_input(ctx, input::X)? else { return Ok(()) };
    let Some(x) = XType::of(shape.element) else { return Ok(()) };
    let Ok(n) = ctx.attr::<i64>(attr::N) else { return Ok(()) };
    if let (Some(dim), Some(name)) = (shape.dims.last_mut(), names.last_mut())
        && n > 0
    {
        *dim = n;
        name.clear();
        host::set_inferred(ctx, 0, x.ort(), &shape.dims, &names)?;
    }
    Ok(())
}

/// What a node is about, checked once when its session is created. Never written afterwards: ONNX
/// Runtime runs one kernel from several threads at once.
pub(crate) struct MatMulKernel {
    name: String,
    problem: Problem,
    x: XType,
}

struct Problem {
    attrs: MxMatMulAttrs,
    has_bias: bool,
}

/// Reads the attributes and holds everything that the model declares against them.
fn check_node(node: &Node<'_, '_>, x: XType) -> Result<Problem, OpError> {
    let attrs = MxMatMulAttrs::read(node)?;
    let has_scales = node.has_input(input::SCALES)?;
    let has_bias = node.has_input(input::BIAS)?;
    check_presence(&attrs, has_scales)?;
    for index in 0..input::COUNT {
        if !node.has_input(index)? {
            continue;
        }
        if let Some(constant) = node.constant(index)? {
            let dims = constant.dims();
            check_input(&attrs, index, x, constant.element(), dims)?;
        } else if let Some(TypeShape { element, dims }) = node.input_type(index)? {
            // No dimension may stand for an unknown rank; compute sees the true one.
            if !dims.is_empty() {
                check_input(&attrs, index, x, element, &dims)?;
            }
        }
    }
    Ok(Problem { attrs, has_bias })
}

fn check_presence(attrs: &MxMatMulAttrs, has_scales: bool) -> Result<(), ContractError> {
    let name = input::NAMES[input::SCALES];
    match (attrs.scales_shape(), has_scales) {
        (ScalesShape::Absent, true) => Err(ContractError::UnexpectedInput {
            input: name,
            reason: "attribute scale is \"none\"",
        }),
        (ScalesShape::Blocks(shape), false) => {
            Err(ContractError::MissingInput { input: name, expected: format!("uint8 {shape:?}") })
        }
        (ScalesShape::Tensor, false) => {
            Err(ContractError::MissingInput { input: name, expected: "float32 [1]".to_owned() })
        }
        _ => Ok(()),
    }
}

/// Holds one input's type and shape against the contract.
fn check_input(
    attrs: &MxMatMulAttrs,
    index: usize,
    x: XType,
    element: ElementType,
    dims: &[i64],
) -> Result<(), ContractError> {
    let name = input::NAMES[index];
    let typed = |expected: ElementType, text: &'static str| {
        if element == expected {
            return Ok(());
        }
        let found = element.name().into_owned();
        Err(ContractError::ElementType { input: name, expected: text, found })
    };
    match index {
        input::X => {
            typed(x.element(), x.name())?;
            check_x_shape(attrs.k(), dims)
        }
        input::CODES => {
            typed(ElementType::U8, "uint8")?;
            check_shape(name, &attrs.codes_shape(), dims)
        }
        input::SCALES => match attrs.scales_shape() {
            ScalesShape::Blocks(shape) => {
                typed(ElementType::U8, "uint8 (attribute scale is \"e8m0\")")?;
                check_shape(name, &shape, dims)
            }
            _ => {
                typed(ElementType::F32, "float32 (attribute scale is \"tensor\")")?;
                check_shape(name, &[1], dims)
            }
        },
        _ => {
            typed(x.element(), x.name())?;
            check_shape(name, &[attrs.n()], dims)
        }
    }
}

impl Kernel for MatMulKernel {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        // Several threads are here with the same kernel; from now on it is shared.
        let this: &Self = self;
        protect(op::MX_MATMUL, &this.name, || match this.x {
            XType::F32 => run::<f32>(this, ctx),
            XType::F16 => run::<f16>(this, ctx),
            XType::Bf16 => run::<bf16>(this, ctx),
        })
    }
}

/// A float type of X, Y and bias.
pub(crate) trait XElement: Element {
    fn float(values: &[Self]) -> Float<'_>;
    fn float_mut(values: &mut [Self]) -> FloatMut<'_>;
}

macro_rules! x_elements {
    ($($rust:ty = $variant:ident),*) => {
        $(impl XElement for $rust {
            fn float(values: &[Self]) -> Float<'_> {
                Float::$variant(values)
            }
            fn float_mut(values: &mut [Self]) -> FloatMut<'_> {
                FloatMut::$variant(values)
            }
        })*
    };
}
x_elements!(f32 = F32, f16 = F16, bf16 = Bf16);

/// Input `index` with its type and shape held against the contract; the model's declarations may
/// have left them open.
fn checked<'a>(
    kernel: &MatMulKernel,
    ctx: &'a ComputeContext,
    index: usize,
) -> Result<TensorView<'a>, OpError> {
    let view = host::input(ctx, index)?.ok_or_else(|| ContractError::MissingInput {
        input: input::NAMES[index],
        expected: "a tensor".to_owned(),
    })?;
    check_input(&kernel.problem.attrs, index, kernel.x, view.element(), view.dims())?;
    Ok(view)
}

fn run<T: XElement>(kernel: &MatMulKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    let attrs = &kernel.problem.attrs;
    let x_view = checked(kernel, ctx, input::X)?;
    let codes = checked(kernel, ctx, input::CODES)?.values::<u8>()?;
    let scales: Cow<'_, [u8]> = match attrs.scales_shape() {
        ScalesShape::Absent => Cow::Borrowed(&[]),
        ScalesShape::Blocks(_) => checked(kernel, ctx, input::SCALES)?.values::<u8>()?,
        ScalesShape::Tensor => {
            let scale = checked(kernel, ctx, input::SCALES)?.values::<f32>()?;
            Cow::Owned(
                scale.iter().flat_map(|s| mx_kernels::pack::tensor_scale_to_bytes(*s)).collect(),
            )
        }
    };
    let bias = match kernel.problem.has_bias {
        true => Some(checked(kernel, ctx, input::BIAS)?.values::<T>()?),
        false => None,
    };
    let x = x_view.values::<T>()?;
    let mut dims = x_view.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = attrs.n() as i64;
    }
    let Some(y) = host::output::<T>(ctx, 0, &dims)? else { return Ok(()) };
    if y.is_empty() {
        return Ok(());
    }
    let weight = PackedWeight::new(*attrs.weight(), attrs.n(), attrs.k(), &codes, &scales)?;
    let problem = LinearProblem {
        n: attrs.n(),
        k: attrs.k(),
        weight: *attrs.weight(),
        activation: attrs.activation().copied(),
        alpha: attrs.alpha(),
        beta: attrs.beta(),
    };
    let pool = OrtPool::new(ctx);
    let bias = bias.as_deref().map(T::float);
    mx_kernels::linear(&problem, T::float(&x), &weight, bias, T::float_mut(y), &pool)?;
    pool.finish()
}
