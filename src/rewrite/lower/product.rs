//! Attention's products -> `mx::MxActMatMul`.

use mx_custom_ops::contract::{DOMAIN, DOMAIN_VERSION, MxActMatMulAttrs, op};

use super::mx::attributes;
use crate::{
    onnx::{NodeId, proto::Node},
    rewrite::{
        execute::ExecuteError,
        patch::{Patch, add_module_path},
        products::PlannedProduct,
        recipe::SiteFormat,
    },
};

/// Replaces the node of one product.
pub(crate) fn lower(patch: &mut Patch<'_>, planned: &PlannedProduct) -> Result<(), ExecuteError> {
    let product = &planned.product;
    let failed = |reason| ExecuteError::Site { node: product.node_name.clone(), reason };
    let SiteFormat::Mx { activation: Some(spec), .. } = &planned.format else {
        return Err(failed("a product of activations needs an activation format".to_owned()));
    };
    let attrs = MxActMatMulAttrs::new(*spec, spec.format)
        .and_then(|attrs| attrs.with(product.transpose_b, product.alpha))
        .map_err(|error| failed(error.to_string()))?;
    let id = NodeId(product.node);
    let original = patch.original(product.graph).node(id);
    let mut replacement = Node {
        op_type: Some(op::MX_ACT_MATMUL.to_owned()),
        domain: Some(DOMAIN.to_owned()),
        name: original.name.clone(),
        input: vec![product.a.clone(), product.b.clone()],
        output: vec![product.y.clone()],
        attribute: attributes(attrs.to_attributes()),
        doc_string: original.doc_string.clone(),
        metadata_props: original.metadata_props.clone(),
        ..Node::default()
    };
    add_module_path(&mut replacement, product.module_path.as_deref());
    patch.graph_mut(product.graph).replace_node(id, replacement);
    patch.out.import_opset(DOMAIN, DOMAIN_VERSION);
    Ok(())
}
