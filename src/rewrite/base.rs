//! What a graph whose base type was changed looks like to those who go on working with it.

use super::lower::cast_output_name;
use crate::onnx::{DataType, Graph};

/// The value that a conversion to another float type cast to make `output` keep its type, and that
/// value's type; `None` where no such Cast was added.
///
/// Scoring reads it in place of the output: the Cast of a whole vocabulary would cost memory.
pub fn uncast(graph: &Graph, output: &str) -> Option<(String, DataType)> {
    let types = [DataType::Float, DataType::Bfloat16, DataType::Float16];
    graph.nodes().find_map(|(_, node)| {
        let [before] = &node.input[..] else { return None };
        let is_cast = node.op_type.as_deref() == Some("Cast");
        if !is_cast || node.output.first().map(String::as_str) != Some(output) {
            return None;
        }
        let made = |data_type: &DataType| *before == cast_output_name(output, *data_type);
        types.into_iter().find(made).map(|data_type| (before.clone(), data_type))
    })
}
