//! Tensors below the main graph's initialisers (in node attributes, sub-graphs and functions) whose
//! external data moves to another file. Only the messages on the way to such a tensor are written
//! anew; every other field keeps its bytes.

use super::encode::external_tensor;
use super::error::{Error, Result};
use super::graph::MAX_DEPTH;
use super::tensor::{ExternalRef, TensorInfo};
use super::wire;
use bytes::Bytes;

/// Gives the new place of an external tensor.
pub(crate) type Mover<'a> = dyn FnMut(&TensorInfo) -> Result<ExternalRef> + 'a;

/// What a message is, as far as tensors can lie in it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Function,
    Graph,
    Node,
    Attribute,
    Tensor,
}

impl Kind {
    /// The kind of field `number`, if tensors can lie in it.
    fn child(self, number: u32) -> Option<Self> {
        match (self, number) {
            (Self::Function, 7) | (Self::Graph, 1) => Some(Self::Node),
            (Self::Function, 11) => Some(Self::Attribute),
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) => Some(Self::Tensor),
            (Self::Node, 5) => Some(Self::Attribute),
            (Self::Attribute, 6 | 11) => Some(Self::Graph),
            _ => None,
        }
    }
}

/// The message with its external tensors moved; `None` when it holds none.
pub(crate) fn relocate(
    kind: Kind,
    message: &Bytes,
    mover: &mut Mover<'_>,
    depth: u32,
) -> Result<Option<Vec<u8>>> {
    // A graph is three messages below the graph around it.
    if depth > 3 * MAX_DEPTH + 3 {
        return Err(Error::malformed("sub-graphs nest too deeply", 0));
    }
    if kind == Kind::Tensor {
        let info = TensorInfo::parse(message.clone(), 0)?;
        return Ok(match info.is_external() {
            true => Some(external_tensor(&info, &mover(&info)?)),
            false => None,
        });
    }
    let mut out: Option<Vec<u8>> = None;
    for field in wire::fields(message, 0) {
        let field = field?;
        let moved = match (kind.child(field.number), field.value) {
            (Some(child), wire::Value::Len(_)) => {
                relocate(child, &message.slice(field.payload.clone()), mover, depth + 1)?
            }
            _ => None,
        };
        if let Some(payload) = moved {
            let out = out.get_or_insert_with(|| message[..field.whole.start].to_vec());
            wire::put_header(out, field.number, payload.len() as u64);
            out.extend_from_slice(&payload);
        } else if let Some(out) = &mut out {
            out.extend_from_slice(&message[field.whole]);
        }
    }
    Ok(out)
}
