//! `TokenScores`: what a model thinks of the tokens that came, without its logits leaving the device.

mod cpu;
mod cuda;

use ort::{
    operator::{
        ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
        ShapeInferenceContext,
    },
    value::TensorElementType,
};

use crate::{
    contract::{ContractError, DOMAIN_VERSION, check_shape, op, scores},
    guard::{OpError, protect},
    host::{self, ElementType, Node, TensorView, TypeShape},
    live::{self, Live},
    provider::{Device, Provider},
    types::XType,
};

/// The operator for one provider and one type of logits.
pub(crate) struct TokenScores {
    pub provider: Provider,
    pub logits: XType,
}

impl Operator for TokenScores {
    type Kernel<'attr> = ScoresKernel;

    fn name(&self) -> &str {
        op::TOKEN_SCORES
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        DOMAIN_VERSION as u32..=u32::MAX
    }

    fn execution_provider_type(&self) -> Option<&str> {
        self.provider.name()
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(self.logits.ort()),
            OperatorInput::required(TensorElementType::Int64),
            OperatorInput::optional(self.logits.ort()),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        let f32 = TensorElementType::Float32;
        [
            OperatorOutput::required(f32),
            OperatorOutput::required(f32),
            OperatorOutput::required(TensorElementType::Int64),
            OperatorOutput::optional(f32),
            OperatorOutput::optional(f32),
        ]
    }

    fn create_kernel<'attr>(&self, kctx: &KernelContext<'attr>) -> ort::Result<ScoresKernel> {
        let node = Node(kctx);
        let name = node.name();
        protect(op::TOKEN_SCORES, &name, || {
            let has_baseline = check_node(&node, self.logits)?;
            let device = self.provider.device(&node)?;
            if let Device::Gpu(device) = &device {
                cuda::prepare(device.gpu, self.logits, has_baseline)?;
            }
            let kernel = match &device {
                Device::Cpu => mx_kernels::cpu::variant(),
                Device::Gpu(_) => "token_scores",
            };
            let product = live::Product::default();
            let live = live::register(&node, op::TOKEN_SCORES, &device, kernel.into(), product);
            let (name, logits) = (name.clone(), self.logits);
            Ok(ScoresKernel { name, logits, has_baseline, device, _live: live })
        })
    }

    /// Only the required outputs: writing the shape of an output that a node does not list is out of
    /// bounds inside ONNX Runtime, and the C API does not tell how many it lists.
    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        let _ = protect(op::TOKEN_SCORES, "", || {
            let Some((logits, names)) = host::inferred_input(ctx, scores::LOGITS)? else {
                return Ok(());
            };
            if let ([b, s, _], [b_name, s_name, _]) = (&logits.dims[..], &names[..]) {
                let names = [b_name.clone(), s_name.clone()];
                for (index, element) in [
                    TensorElementType::Float32,
                    TensorElementType::Float32,
                    TensorElementType::Int64,
                ]
                .into_iter()
                .enumerate()
                {
                    host::set_inferred(ctx, index, element, &[*b, *s], &names)?;
                }
            }
            Ok(())
        });
        Ok(())
    }
}

/// A checked node; never written after creation.
pub(crate) struct ScoresKernel {
    name: String,
    logits: XType,
    has_baseline: bool,
    device: Device,
    _live: Live,
}

fn check_node(node: &Node<'_, '_>, logits: XType) -> Result<bool, OpError> {
    for (index, name) in scores::INPUT_NAMES.iter().enumerate() {
        if !node.has_input(index)? {
            continue;
        }
        if let Some(TypeShape { element, dims }) = node.input_type(index)? {
            let rank = if index == scores::LABELS { 2 } else { 3 };
            check_type(index, logits, element)?;
            if !dims.is_empty() && dims.len() != rank {
                let expected = if rank == 2 { "[b, s]" } else { "[b, s, v]" };
                let found = dims.into_iter().take(16).collect();
                let expected = expected.to_owned();
                return Err(ContractError::Shape { input: name, expected, found }.into());
            }
        }
    }
    node.has_input(scores::BASELINE)
}

fn check_type(index: usize, logits: XType, found: ElementType) -> Result<(), ContractError> {
    let (expected, text) = match index {
        scores::LABELS => (ElementType::I64, "int64"),
        _ => (logits.element(), logits.name()),
    };
    if found == expected {
        return Ok(());
    }
    let input = scores::INPUT_NAMES[index];
    Err(ContractError::ElementType { input, expected: text, found: found.name().into_owned() })
}

impl Kernel for ScoresKernel {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        // Several threads are here with the same kernel; from now on it is shared.
        let this: &Self = self;
        protect(op::TOKEN_SCORES, &this.name, || match &this.device {
            Device::Cpu => cpu::run(this, ctx),
            Device::Gpu(device) => cuda::run(this, device, ctx),
        })
    }
}

fn required<'a>(
    kernel: &ScoresKernel,
    ctx: &'a ComputeContext,
    index: usize,
) -> Result<TensorView<'a>, OpError> {
    let view = host::input(ctx, index)?.ok_or_else(|| ContractError::MissingInput {
        input: scores::INPUT_NAMES[index],
        expected: "a tensor".to_owned(),
    })?;
    check_type(index, kernel.logits, view.element())?;
    Ok(view)
}

/// The inputs of a call, held against the contract and against each other.
struct Inputs<'a> {
    logits: TensorView<'a>,
    labels: TensorView<'a>,
    baseline: Option<TensorView<'a>>,
    /// Shape of every output.
    dims: [i64; 2],
    vocab: usize,
}

impl Inputs<'_> {
    fn rows(&self) -> Result<usize, OpError> {
        host::elements(&self.dims)
    }
}

fn inputs<'a>(kernel: &ScoresKernel, ctx: &'a ComputeContext) -> Result<Inputs<'a>, OpError> {
    let logits = required(kernel, ctx, scores::LOGITS)?;
    let labels = required(kernel, ctx, scores::LABELS)?;
    let &[b, s, v] = logits.dims() else {
        return Err(shape_error(scores::LOGITS, "[b, s, v]", logits.dims()).into());
    };
    let as_usize = |dim: i64| usize::try_from(dim).unwrap_or(usize::MAX);
    check_shape(scores::INPUT_NAMES[scores::LABELS], &[as_usize(b), as_usize(s)], labels.dims())?;
    if v == 0 {
        return Err(shape_error(scores::LOGITS, "a vocabulary of at least 1", logits.dims()).into());
    }
    let baseline = match kernel.has_baseline {
        true => {
            let view = required(kernel, ctx, scores::BASELINE)?;
            let expected = [as_usize(b), as_usize(s), as_usize(v)];
            check_shape(scores::INPUT_NAMES[scores::BASELINE], &expected, view.dims())?;
            Some(view)
        }
        false => None,
    };
    Ok(Inputs { logits, labels, baseline, dims: [b, s], vocab: as_usize(v) })
}

/// What to say when a node lists an output that compares with a baseline, but has none.
fn without_baseline(index: usize) -> OpError {
    OpError::OutputWithout {
        output: scores::OUTPUT_NAMES[index],
        input: scores::INPUT_NAMES[scores::BASELINE],
    }
}

fn shape_error(index: usize, expected: &str, found: &[i64]) -> ContractError {
    ContractError::Shape {
        input: scores::INPUT_NAMES[index],
        expected: expected.to_owned(),
        found: found.iter().copied().take(16).collect(),
    }
}
