//! The MX operators as one ONNX Runtime custom-op library.
//!
//! [`contract`] says what a node of domain `mx` looks like; the rewriter writes nodes through it.
//! Everybody else loads `libmx_custom_ops.so` with `register_custom_ops_library`; a Rust program
//! that links this crate adds [`operator_domain`] to its session instead.
//!
//! A model that breaks the contract gets an error that names the node, when the session is created
//! where the model's static shapes show it, else when it runs. No panic leaves this library.

mod abi;
mod act_matmul;
pub mod census;
pub mod contract;
mod expert_matmul;
mod guard;
mod host;
pub mod live;
mod matmul;
mod older;
mod pool;
mod provider;
pub mod ran;
mod repack;
mod scores;
mod types;

pub use abi::RegisterCustomOps;
use act_matmul::MxActMatMul;
use expert_matmul::MxExpertMatMul;
use matmul::MxMatMul;
pub use older::bind;
use ort::{operator::OperatorDomain, value::TensorElementType};
use provider::Provider;
use scores::TokenScores;
use types::XType;

/// The operators of domain `mx`, for `SessionBuilder::with_operators`.
///
/// # Errors
/// ONNX Runtime refusing the domain, or not loaded.
pub fn operator_domain() -> ort::Result<OperatorDomain> {
    let mut domain = OperatorDomain::new(contract::DOMAIN)?;
    // One operator for each provider and combination of types: ONNX Runtime picks by the session's
    // providers and the node's inputs.
    for provider in Provider::ALL {
        for x in XType::ALL {
            for scales in [TensorElementType::Uint8, TensorElementType::Float32] {
                domain = domain.add(MxMatMul { provider, x, scales })?;
            }
            domain = domain.add(MxActMatMul { provider, x })?;
            for index in [TensorElementType::Int64, TensorElementType::Int32] {
                domain = domain.add(MxExpertMatMul { provider, x, index })?;
            }
            domain = domain.add(TokenScores { provider, logits: x })?;
        }
    }
    Ok(domain)
}
