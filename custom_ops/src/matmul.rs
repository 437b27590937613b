//! `MxMatMul`: a packed constant weight times X.

mod cpu;
mod cuda;

use mx_kernels::{LinearProblem, PreparedWeight};
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
    host::{self, ElementType, Node, TensorView, TypeShape},
    live::{self, Live},
    provider::{Device, Provider},
    types::XType,
};

/// The operator for one provider, one type of X and one of scales.
pub(crate) struct MxMatMul {
    pub provider: Provider,
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

    fn execution_provider_type(&self) -> Option<&str> {
        self.provider.name()
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
        protect(op::MX_MATMUL, &name, || {
            let (attrs, has_bias) = check_node(&node, self.x)?;
            let problem = LinearProblem {
                n: attrs.n(),
                k: attrs.k(),
                weight: *attrs.weight(),
                activation: attrs.activation().copied(),
                alpha: attrs.alpha(),
                beta: attrs.beta(),
            };
            let device = self.provider.device(&node)?;
            let (prepared, kernel) = match &device {
                Device::Cpu => {
                    let prepared = cpu::prepare(&node, &attrs, &problem)?;
                    let kernel = live::cpu_kernel(prepared.as_ref(), &problem);
                    (prepared, kernel)
                }
                Device::Gpu(device) => {
                    (None, cuda::prepare(device.gpu, &problem, self.x, has_bias)?.to_owned())
                }
            };
            let product = live::Product::of(&attrs);
            let live = live::register(&node, op::MX_MATMUL, &device, kernel, product);
            let (name, x) = (name.clone(), self.x);
            Ok(MatMulKernel { name, attrs, problem, has_bias, x, device, prepared, _live: live })
        })
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
    attrs: MxMatMulAttrs,
    problem: LinearProblem,
    has_bias: bool,
    x: XType,
    device: Device,
    /// The weight as the CPU's kernels read it, where it is a constant and they have a use for it.
    prepared: Option<PreparedWeight>,
    _live: Live,
}

/// Reads the attributes and holds everything that the model declares against them; also whether there
/// is a bias. Only types and shapes are looked at: the data of a constant may lie on the device.
fn check_node(node: &Node<'_, '_>, x: XType) -> Result<(MxMatMulAttrs, bool), OpError> {
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
    Ok((attrs, has_bias))
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
        protect(op::MX_MATMUL, &this.name, || match &this.device {
            Device::Cpu => cpu::run(this, ctx),
            Device::Gpu(device) => cuda::run(this, device, ctx),
        })
    }
}

/// The shape of Y for that of X.
fn output_dims(attrs: &MxMatMulAttrs, x: &[i64]) -> Vec<i64> {
    let mut dims = x.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = attrs.n() as i64;
    }
    dims
}

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
    check_input(&kernel.attrs, index, kernel.x, view.element(), view.dims())?;
    Ok(view)
}
