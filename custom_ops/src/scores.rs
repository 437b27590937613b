//! `TokenScores`: what a model thinks of the tokens that came, without its logits leaving the device.

use half::{bf16, f16};
use mx_kernels::{BaselineScores, TokenScores as Outputs};
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
    host::{self, Element, ElementType, Node, TensorView, TypeShape},
    pool::OrtPool,
    types::{XElement, XType},
};

/// The operator for one type of logits.
pub(crate) struct TokenScores {
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
        let has_baseline = protect(op::TOKEN_SCORES, &name, || check_node(&node, self.logits))?;
        crate::census::cpu();
        Ok(ScoresKernel { name, logits: self.logits, has_baseline })
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
        protect(op::TOKEN_SCORES, &this.name, || match this.logits {
            XType::F32 => run::<f32>(this, ctx),
            XType::F16 => run::<f16>(this, ctx),
            XType::Bf16 => run::<bf16>(this, ctx),
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

/// Output `index`, or room that nobody reads where the node leaves it out.
fn output_or<'a, T: Element + Default>(
    ctx: &'a ComputeContext,
    index: usize,
    dims: &[i64],
    spare: &'a mut Vec<T>,
    rows: usize,
) -> Result<&'a mut [T], OpError> {
    match host::output::<T>(ctx, index, dims)? {
        Some(values) => Ok(values),
        None => {
            spare.resize(rows, T::default());
            Ok(spare)
        }
    }
}

fn run<T: XElement>(kernel: &ScoresKernel, ctx: &ComputeContext) -> Result<(), OpError> {
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
            Some(view.values::<T>()?)
        }
        false => None,
    };
    let (logits, labels) = (logits.values::<T>()?, labels.values::<i64>()?);
    let (dims, rows) = ([b, s], labels.len());
    let (mut spare, mut spare_top1) = ([const { Vec::new() }; 4], Vec::new());
    let [spare_nll, spare_entropy, spare_kl, spare_base] = &mut spare;
    let nll = output_or(ctx, 0, &dims, spare_nll, rows)?;
    let entropy = output_or(ctx, 1, &dims, spare_entropy, rows)?;
    let top1 = output_or(ctx, 2, &dims, &mut spare_top1, rows)?;
    let against = match &baseline {
        Some(_) => Some(BaselineScores {
            kl: output_or(ctx, 3, &dims, spare_kl, rows)?,
            nll: output_or(ctx, 4, &dims, spare_base, rows)?,
        }),
        None => {
            reject_baseline_outputs(ctx, &dims)?;
            None
        }
    };
    if rows == 0 {
        return Ok(());
    }
    let pool = OrtPool::new(ctx);
    let outputs = Outputs { nll, entropy, top1, baseline: against };
    let baseline = baseline.as_deref().map(T::float);
    mx_kernels::token_scores(T::float(&logits), &labels, as_usize(v), baseline, outputs, &pool)?;
    pool.finish()
}

/// Outputs that compare with a baseline cannot be filled without one.
fn reject_baseline_outputs(ctx: &ComputeContext, dims: &[i64]) -> Result<(), OpError> {
    for index in 3..scores::OUTPUT_NAMES.len() {
        if host::output::<f32>(ctx, index, dims)?.is_some() {
            return Err(OpError::OutputWithout {
                output: scores::OUTPUT_NAMES[index],
                input: scores::INPUT_NAMES[scores::BASELINE],
            });
        }
    }
    Ok(())
}

fn shape_error(index: usize, expected: &str, found: &[i64]) -> ContractError {
    ContractError::Shape {
        input: scores::INPUT_NAMES[index],
        expected: expected.to_owned(),
        found: found.iter().copied().take(16).collect(),
    }
}
