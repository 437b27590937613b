//! What run.json says, for a report.

use super::number::clean;
use serde_json::{Map, Value};

/// Parts that a report shows elsewhere or not at all.
const ELSEWHERE: [&str; 4] = ["keys", "stages", "definition", "command"];

/// run.json, flattened to one line a fact.
pub(super) fn facts(run: &Map<String, Value>) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (name, value) in run.iter().filter(|(name, _)| !ELSEWHERE.contains(&name.as_str())) {
        flatten(name, value, &mut out);
    }
    out
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, String)>) {
    let below = |name: &str| format!("{prefix}.{name}");
    match value {
        Value::Object(map) => map.iter().for_each(|(name, v)| flatten(&below(name), v, out)),
        Value::Array(list) if list.iter().any(Value::is_object) => list
            .iter()
            .enumerate()
            .for_each(|(index, v)| flatten(&below(&index.to_string()), v, out)),
        Value::Array(list) => {
            let words: Vec<_> = list.iter().map(scalar).collect();
            out.push((clean(prefix), words.join(" ")));
        }
        Value::Null => {}
        other => out.push((clean(prefix), scalar(other))),
    }
}

fn scalar(value: &Value) -> String {
    clean(&value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// The command line, quoted for a shell.
pub(super) fn command(run: &Map<String, Value>) -> Option<String> {
    let words: Vec<&str> =
        run.get("command")?.as_array()?.iter().filter_map(Value::as_str).collect();
    // Only a NUL cannot be quoted, and no argument holds one.
    shlex::try_join(words).ok().filter(|command| !command.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_command_can_be_pasted_into_a_shell() {
        let words = ["mxeval", "--exclude", r"layers\.0\.", "it's $HOME `x`\n", "", "é.onnx"];
        let run = json!({"command": words});
        let command = command(run.as_object().unwrap()).unwrap();
        let script = format!("printf '%s\\0' {command}");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let expected: String = words.iter().map(|word| format!("{word}\0")).collect();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        assert_eq!(super::command(json!({"command": []}).as_object().unwrap()), None);
    }

    #[test]
    fn facts_are_flat_and_leave_keys_out() {
        let run = json!({"keys": {"x": "secret"}, "data": {"sha256": "abc", "none": null},
            "gpus": [{"name": "a"}], "list": [1, "b"], "command": ["x"]});
        let facts = facts(run.as_object().unwrap());
        let lines: Vec<_> = facts.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(lines, ["data.sha256=abc", "gpus.0.name=a", "list=1 b"]);
    }
}
