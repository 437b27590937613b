//! `MxExpertMatMul`: X times weights that an index chooses from a packed stack.

mod cpu;
mod cuda;

use mx_kernels::{LinearProblem, PreparedWeight};
use ort::{
    memory::MemoryType,
    operator::{
        ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
        ShapeInferenceContext,
    },
    value::TensorElementType,
};

use crate::{
    act_matmul::product_names,
    contract::{
        ContractError, DOMAIN_VERSION, MxExpertMatMulAttrs, attr, expert, op, product_dims,
    },
    guard::{OpError, protect},
    host::{self, ElementType, Node, TensorView, TypeShape},
    live::{self, Live},
    provider::{Device, Provider},
    types::XType,
};

/// The operator for one provider, one type of X and one of the index.
pub(crate) struct MxExpertMatMul {
    pub provider: Provider,
    pub x: XType,
    pub index: TensorElementType,
}

impl Operator for MxExpertMatMul {
    type Kernel<'attr> = ExpertKernel;

    fn name(&self) -> &str {
        op::MX_EXPERT_MATMUL
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
            // Which kernels to launch depends on it, so it comes to the host also on a GPU.
            OperatorInput::required(self.index).memory_type(MemoryType::CPUInput),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Uint8),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(self.x.ort())]
    }

    fn create_kernel<'attr>(&self, kctx: &KernelContext<'attr>) -> ort::Result<ExpertKernel> {
        let node = Node(kctx);
        let name = node.name();
        protect(op::MX_EXPERT_MATMUL, &name, || {
            let attrs = check_node(&node, self.x)?;
            let linear = attrs.linear();
            let problem = LinearProblem {
                n: linear.n(),
                k: linear.k(),
                weight: *linear.weight(),
                activation: linear.activation().copied(),
                alpha: linear.alpha(),
                beta: 1.0,
            };
            let device = self.provider.device(&node)?;
            let (prepared, kernel) = match &device {
                Device::Cpu => {
                    let prepared = cpu::prepare(&node, &attrs, &problem)?;
                    let kernel = live::cpu_kernel(prepared.iter().flatten().next(), &problem);
                    (prepared, kernel)
                }
                Device::Gpu(device) => {
                    let path = cuda::prepare(device.gpu, &attrs, &problem, self.x)?;
                    (Vec::new(), path.to_owned())
                }
            };
            let product = live::Product::of(linear);
            let live = live::register(&node, op::MX_EXPERT_MATMUL, &device, kernel, product);
            let (name, x) = (name.clone(), self.x);
            Ok(ExpertKernel { name, attrs, problem, x, device, prepared, _live: live })
        })
    }

    /// As for `MxMatMul`: what cannot be inferred is left open and checked in creation.
    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        let _ = protect(op::MX_EXPERT_MATMUL, "", || infer(ctx));
        Ok(())
    }
}

fn infer(ctx: &mut ShapeInferenceContext) -> Result<(), OpError> {
    let Some((x, x_names)) = host::inferred_input(ctx, expert::X)? else { return Ok(()) };
    let Some(x_type) = XType::of(x.element) else { return Ok(()) };
    let (Ok(n), Ok(k)) = (ctx.attr::<i64>(attr::N), ctx.attr::<i64>(attr::K)) else {
        return Ok(());
    };
    let (mut chosen, mut names) = match host::inferred_input(ctx, expert::INDEX)? {
        Some((index, names)) => (index.dims, names),
        None if matches!(ctx.attr::<i64>(attr::INDEX_RANK), Ok(0)) => Default::default(),
        None => return Ok(()),
    };
    if n <= 0 || k <= 0 {
        return Ok(());
    }
    chosen.extend([n, k]);
    names.resize(chosen.len(), String::new());
    let dims = product_dims(&x.dims, &chosen, true)?;
    let names = product_names((&x.dims, &x_names), (&chosen, &names), true, &dims);
    host::set_inferred(ctx, 0, x_type.ort(), &dims, &names)
}

/// A checked node; never written after creation.
pub(crate) struct ExpertKernel {
    name: String,
    attrs: MxExpertMatMulAttrs,
    problem: LinearProblem,
    x: XType,
    device: Device,
    /// The experts as the CPU's kernels read them, where they are repacked; may be empty.
    prepared: Vec<Option<PreparedWeight>>,
    _live: Live,
}

/// Reads the attributes and holds everything that the model declares against them.
fn check_node(node: &Node<'_, '_>, x: XType) -> Result<MxExpertMatMulAttrs, OpError> {
    let attrs = MxExpertMatMulAttrs::read(node)?;
    if let (Some(shape), false) = (attrs.scales_shape(), node.has_input(expert::SCALES)?) {
        let (input, expected) = (expert::NAMES[expert::SCALES], format!("uint8 {shape:?}"));
        return Err(ContractError::MissingInput { input, expected }.into());
    }
    let mut declared = [const { Vec::new() }; 2];
    for input in 0..expert::COUNT {
        if !node.has_input(input)? {
            continue;
        }
        let (element, dims) = if let Some(constant) = node.constant(input)? {
            (constant.element(), constant.dims().to_vec())
        } else if let Some(TypeShape { element, dims }) = node.input_type(input)? {
            // No dimension may stand for an unknown rank; compute sees the true one.
            if dims.is_empty() {
                check_type(input, x, element)?;
                continue;
            }
            (element, dims)
        } else {
            continue;
        };
        check_type(input, x, element)?;
        attrs.check_input(input, &dims)?;
        if let Some(declared) = declared.get_mut(input) {
            *declared = dims;
        }
    }
    let [x_dims, index] = &declared;
    if !x_dims.is_empty() && !index.is_empty() {
        attrs.y_dims(x_dims, index)?;
    }
    Ok(attrs)
}

fn check_type(input: usize, x: XType, found: ElementType) -> Result<(), ContractError> {
    let (good, expected) = match input {
        expert::X => (found == x.element(), x.name()),
        expert::INDEX => (matches!(found, ElementType::I64 | ElementType::I32), "int64 or int32"),
        _ => (found == ElementType::U8, "uint8"),
    };
    if good {
        return Ok(());
    }
    let input = expert::NAMES[input];
    Err(ContractError::ElementType { input, expected, found: found.name().into_owned() })
}

impl Kernel for ExpertKernel {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        // Several threads are here with the same kernel; from now on it is shared.
        let this: &Self = self;
        protect(op::MX_EXPERT_MATMUL, &this.name, || match &this.device {
            Device::Cpu => cpu::run(this, ctx),
            Device::Gpu(device) => cuda::run(this, device, ctx),
        })
    }
}

/// A call's inputs, held against the contract.
struct Call<'a> {
    x: TensorView<'a>,
    codes: TensorView<'a>,
    scales: Option<TensorView<'a>>,
    /// Shape of the index.
    index: Vec<i64>,
    /// The expert of each place of the index.
    experts: Vec<usize>,
    y_dims: Vec<i64>,
}

fn call<'a>(kernel: &ExpertKernel, ctx: &'a ComputeContext) -> Result<Call<'a>, OpError> {
    let attrs = &kernel.attrs;
    let get = |input: usize| -> Result<TensorView<'a>, OpError> {
        let view = host::input(ctx, input)?.ok_or_else(|| ContractError::MissingInput {
            input: expert::NAMES[input],
            expected: "a tensor".to_owned(),
        })?;
        check_type(input, kernel.x, view.element())?;
        attrs.check_input(input, view.dims())?;
        Ok(view)
    };
    let (x, index, codes) = (get(expert::X)?, get(expert::INDEX)?, get(expert::CODES)?);
    let scales = attrs.scales_shape().map(|_| get(expert::SCALES)).transpose()?;
    let y_dims = attrs.y_dims(x.dims(), index.dims())?;
    let numbers: Vec<i64> = match index.element() {
        ElementType::I32 => index.values::<i32>()?.iter().map(|&i| i64::from(i)).collect(),
        _ => index.values::<i64>()?.into_owned(),
    };
    let chosen = numbers.iter().enumerate().map(|(place, &index)| attrs.expert(place, index));
    let experts = chosen.collect::<Result<_, _>>()?;
    Ok(Call { x, codes, scales, index: index.dims().to_vec(), experts, y_dims })
}
