//! `MxActMatMul`: the product of two activations, both quantised on the fly.

mod cpu;
mod cuda;

use mx_kernels::ActMatMulProblem;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};

use crate::{
    contract::{
        ContractError, DOMAIN_VERSION, MxActMatMulAttrs, Product, attr, op, operand, product,
        product_dims,
    },
    guard::{OpError, protect},
    host::{self, ElementType, Node, TensorView, TypeShape},
    live::{self, Live},
    provider::{Device, Provider},
    types::XType,
};

/// The operator for one provider and one type of A, B and Y.
pub(crate) struct MxActMatMul {
    pub provider: Provider,
    pub x: XType,
}

impl Operator for MxActMatMul {
    type Kernel<'attr> = ActMatMulKernel;

    fn name(&self) -> &str {
        op::MX_ACT_MATMUL
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        DOMAIN_VERSION as u32..=u32::MAX
    }

    fn execution_provider_type(&self) -> Option<&str> {
        self.provider.name()
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(self.x.ort()), OperatorInput::required(self.x.ort())]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(self.x.ort())]
    }

    fn create_kernel<'attr>(&self, kctx: &KernelContext<'attr>) -> ort::Result<ActMatMulKernel> {
        let node = Node(kctx);
        let name = node.name();
        protect(op::MX_ACT_MATMUL, &name, || {
            let attrs = check_node(&node, self.x)?;
            let device = self.provider.device(&node)?;
            if let Device::Gpu(device) = &device {
                cuda::prepare(device.gpu, &attrs, self.x)?;
            }
            let kernel = match &device {
                Device::Cpu => mx_kernels::cpu::variant(),
                Device::Gpu(_) => "act_matmul",
            };
            let product = live::Product::of_activations(&attrs);
            let live = live::register(&node, op::MX_ACT_MATMUL, &device, kernel.into(), product);
            Ok(ActMatMulKernel { name: name.clone(), attrs, x: self.x, device, _live: live })
        })
    }

    /// As for `MxMatMul`: what cannot be inferred is left open and checked in creation.
    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        let _ = protect(op::MX_ACT_MATMUL, "", || infer(ctx));
        Ok(())
    }
}

fn infer(ctx: &mut ShapeInferenceContext) -> Result<(), OpError> {
    let Some((a, a_names)) = host::inferred_input(ctx, operand::A)? else { return Ok(()) };
    let Some((b, b_names)) = host::inferred_input(ctx, operand::B)? else { return Ok(()) };
    let Some(x) = XType::of(a.element) else { return Ok(()) };
    let transpose_b = ctx.attr::<i64>(attr::TRANSPOSE_B).unwrap_or(0) == 1;
    let dims = product_dims(&a.dims, &b.dims, transpose_b)?;
    let names = product_names((&a.dims, &a_names), (&b.dims, &b_names), transpose_b, &dims);
    host::set_inferred(ctx, 0, x.ort(), &dims, &names)
}

/// Names of the dimensions `dims` of a product, from those of its operands.
pub(crate) fn product_names(
    (a, a_names): (&[i64], &[String]),
    (b, b_names): (&[i64], &[String]),
    transpose_b: bool,
    dims: &[i64],
) -> Vec<String> {
    // Where each dimension of Y may have its name from, last first: columns, rows, leading ones.
    let rows = a.len().checked_sub(2);
    let columns = match b.len() {
        0 | 1 => None,
        rank if transpose_b => Some(rank - 2),
        rank => Some(rank - 1),
    };
    let matrix = usize::from(rows.is_some()) + usize::from(columns.is_some());
    let rank = dims.len() - matrix;
    let named = |names: &[String], own: &[i64], at: Option<usize>, dim: i64| match at {
        Some(at) if dim < 0 && own[at] == dim => names[at].clone(),
        _ => String::new(),
    };
    let mut names = Vec::with_capacity(dims.len());
    for (i, &dim) in dims[..rank].iter().enumerate() {
        let a_at = (i + rows.unwrap_or(0)).checked_sub(rank);
        let b_at = (i + b.len().saturating_sub(2)).checked_sub(rank);
        let (from_a, from_b) = (named(a_names, a, a_at, dim), named(b_names, b, b_at, dim));
        // Two names for one dimension say no more than none.
        let both = a_at.is_some_and(|at| a[at] < 0) && b_at.is_some_and(|at| b[at] < 0);
        names.push(match () {
            () if both && from_a != from_b => String::new(),
            () if from_a.is_empty() => from_b,
            () => from_a,
        });
    }
    if rows.is_some() {
        names.push(named(a_names, a, rows, dims[rank]));
    }
    if columns.is_some() {
        names.push(named(b_names, b, columns, dims[dims.len() - 1]));
    }
    names
}

/// A checked node; never written after creation.
pub(crate) struct ActMatMulKernel {
    name: String,
    attrs: MxActMatMulAttrs,
    x: XType,
    device: Device,
    _live: Live,
}

/// Reads the attributes and holds everything that the model declares against them.
fn check_node(node: &Node<'_, '_>, x: XType) -> Result<MxActMatMulAttrs, OpError> {
    let attrs = MxActMatMulAttrs::read(node)?;
    let mut declared = [const { Vec::new() }; 2];
    for (index, dims) in declared.iter_mut().enumerate() {
        if let Some(constant) = node.constant(index)? {
            check_type(index, x, constant.element())?;
            *dims = constant.dims().to_vec();
        } else if let Some(TypeShape { element, dims: found }) = node.input_type(index)? {
            check_type(index, x, element)?;
            *dims = found;
        }
    }
    // No dimension may stand for an unknown rank; compute sees the true one.
    if declared.iter().all(|dims| !dims.is_empty()) {
        product_dims(&declared[operand::A], &declared[operand::B], attrs.transpose_b())?;
    }
    Ok(attrs)
}

fn check_type(index: usize, x: XType, found: ElementType) -> Result<(), ContractError> {
    if found == x.element() {
        return Ok(());
    }
    let (input, expected) = (operand::NAMES[index], x.name());
    Err(ContractError::ElementType { input, expected, found: found.name().into_owned() })
}

impl Kernel for ActMatMulKernel {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        // Several threads are here with the same kernel; from now on it is shared.
        let this: &Self = self;
        protect(op::MX_ACT_MATMUL, &this.name, || match &this.device {
            Device::Cpu => cpu::run(this, ctx),
            Device::Gpu(device) => cuda::run(this, device, ctx),
        })
    }
}

/// A call's operands, held against each other.
struct Call<'a> {
    a: TensorView<'a>,
    b: TensorView<'a>,
    product: Product,
    y_dims: Vec<i64>,
}

/// What the kernels call the product of a node.
fn problem<'a>(attrs: &MxActMatMulAttrs, product: &'a Product) -> ActMatMulProblem<'a> {
    ActMatMulProblem {
        m: product.m,
        n: product.n,
        k: product.k,
        a_spec: *attrs.a(),
        b_spec: *attrs.b(),
        transpose_b: attrs.transpose_b(),
        alpha: attrs.alpha(),
        batches: &product.batches,
    }
}

fn call<'a>(kernel: &ActMatMulKernel, ctx: &'a ComputeContext) -> Result<Call<'a>, OpError> {
    let get = |index: usize| -> Result<TensorView<'a>, OpError> {
        let view = host::input(ctx, index)?.ok_or_else(|| ContractError::MissingInput {
            input: operand::NAMES[index],
            expected: "a tensor".to_owned(),
        })?;
        check_type(index, kernel.x, view.element())?;
        Ok(view)
    };
    let (a, b) = (get(operand::A)?, get(operand::B)?);
    let transpose_b = kernel.attrs.transpose_b();
    let y_dims = product_dims(a.dims(), b.dims(), transpose_b)?;
    let product = product(a.dims(), b.dims(), transpose_b)?;
    Ok(Call { a, b, product, y_dims })
}
