//! ONNX Runtime's profile: which node ran, as what operator, on which execution provider.

use std::{collections::BTreeMap, fs::File, io::BufReader, path::Path};

use serde::{Deserialize, Serialize};

/// A node that ran. ONNX Runtime's optimiser has renamed and fused what it liked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Executed {
    /// Name of the node.
    pub node: String,
    /// Operator, without its domain.
    pub op: String,
    /// Execution provider, as ONNX Runtime calls it (`CPUExecutionProvider`).
    pub provider: String,
    /// How often.
    pub runs: u64,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: BTreeMap<String, serde_json::Value>,
}

/// What ONNX Runtime appends to a node's name for the time in its kernel.
const KERNEL: &str = "_kernel_time";

/// Reads a profile.
///
/// # Errors
/// A sentence: the file cannot be opened, or is no profile.
pub(super) fn read(path: &Path) -> Result<Vec<Executed>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let events: Vec<Event> = serde_json::from_reader(BufReader::new(file))
        .map_err(|error| format!("is no profile: {error}"))?;
    let mut nodes: BTreeMap<(String, String, String), u64> = BTreeMap::new();
    for event in &events {
        let Some(node) = event.name.strip_suffix(KERNEL).filter(|_| event.cat == "Node") else {
            continue;
        };
        let text = |key: &str| {
            let value = event.args.get(key).and_then(|value| value.as_str());
            value.unwrap_or_default().to_owned()
        };
        *nodes.entry((node.to_owned(), text("op_name"), text("provider"))).or_default() += 1;
    }
    let executed = |((node, op, provider), runs)| Executed { node, op, provider, runs };
    Ok(nodes.into_iter().map(executed).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_times_are_counted_by_node() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        let event = |name: &str, op: &str| {
            format!(
                r#"{{"cat":"Node","name":"{name}","ts":1,"dur":2,"ph":"X","args":{{"op_name":"{op}","provider":"CPUExecutionProvider","output_size":"4"}}}}"#
            )
        };
        let text = format!(
            r#"[{{"cat":"Session","name":"model_loading_array","args":{{}}}},{},{},{}]"#,
            event("a_kernel_time", "MxMatMul"),
            event("a_kernel_time", "MxMatMul"),
            event("b_fence_before", "Add"),
        );
        std::fs::write(&path, text).unwrap();
        let [node] = &read(&path).unwrap()[..] else { panic!() };
        assert_eq!((node.node.as_str(), node.op.as_str(), node.runs), ("a", "MxMatMul", 2));
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path).unwrap_err().contains("no profile"));
        assert!(read(&dir.path().join("none")).is_err());
    }
}
