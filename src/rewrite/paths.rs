//! Where in the source module tree a node comes from, out of what the exporters leave behind.
//!
//! Most to least reliable: torch.onnx's node metadata, the weight's name, the node's name, the bias's
//! name. Forms of all of them, exporter by exporter, are in the tests below.

use std::{collections::HashMap, sync::LazyLock};

use regex::Regex;

use super::{
    roles,
    sites::{PathSource, Role},
};
use crate::onnx::proto::StringStringEntry;

/// Graph metadata key under which torch.onnx lists which graph input was which parameter.
pub const SIGNATURE_KEY: &str = "pkg.torch.export.ExportedProgram.graph_signature";
const SCOPES_KEY: &str = "pkg.torch.onnx.name_scopes";
const NAMESPACE_KEY: &str = "namespace";
const FX_NODE_KEY: &str = "pkg.torch.onnx.fx_node";

/// Parameter placeholders (`p_model_layers_0_mlp_up_proj_weight`) and the parameters they stand for.
pub type Signature = HashMap<String, String>;

/// What is known about a node that may be a Linear.
#[derive(Clone, Copy, Debug, Default)]
pub struct Evidence<'a> {
    /// The node's metadata.
    pub metadata: &'a [StringStringEntry],
    /// The node's name.
    pub node: &'a str,
    /// The node's operator.
    pub op: &'a str,
    /// The weight's name.
    pub initializer: &'a str,
    /// The weight belongs to an embedding, whose name is not this layer's.
    pub tied: bool,
    /// Several Linear layers read the weight, so its name is at most one of theirs.
    pub shared: bool,
    /// The bias's name.
    pub bias: Option<&'a str>,
}

/// The module path of a node and where it was found.
pub fn module_path(evidence: &Evidence<'_>, signature: &Signature) -> (Option<String>, PathSource) {
    let from_node = || from_node_name(evidence.node, evidence.op);
    let from_weight = || match evidence.tied {
        true => None,
        false => from_tensor_name(evidence.initializer),
    };
    if let Some(path) = from_metadata(evidence, signature) {
        return (Some(path), PathSource::Metadata);
    }
    if evidence.shared
        && let Some(path) = from_node()
    {
        return (Some(path), PathSource::Node);
    }
    if let Some(path) = from_weight() {
        return (Some(path), PathSource::Initializer);
    }
    if let Some(path) = from_node() {
        return (Some(path), PathSource::Node);
    }
    match evidence.bias.and_then(from_bias_name) {
        Some(path) => (Some(path), PathSource::Bias),
        None => (None, PathSource::None),
    }
}

/// Reads torch.onnx's `graph_signature`: lines `placeholder: PARAMETER target='a.b.weight'`.
pub fn parse_signature(text: &str) -> Signature {
    static LINE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r#"(?m)^\s*(\w+):\s*(?:PARAMETER|BUFFER)\s+target=['"]([^'"]+)['"]"#).unwrap()
    });
    LINE.captures_iter(text).map(|line| (line[1].to_owned(), line[2].to_owned())).collect()
}

/// The second-last scope (the last one is the operation's own name), refined by the parameter that
/// the operation read when that lies below the scope (`F.linear(x, self.w1)`).
fn from_metadata(evidence: &Evidence<'_>, signature: &Signature) -> Option<String> {
    let get = |key: &str| {
        evidence.metadata.iter().find(|e| e.key.as_deref() == Some(key))?.value.as_deref()
    };
    let scopes = get(SCOPES_KEY).map(parse_list).filter(|scopes| !scopes.is_empty());
    let scopes = scopes.or_else(|| get(NAMESPACE_KEY).map(parse_namespace))?;
    let scope = scopes.len().checked_sub(2).map_or("", |index| scopes[index].trim_matches('.'));
    let parameter = get(FX_NODE_KEY)
        .and_then(|fx| fx_weight(fx, signature))
        .or_else(|| (!evidence.tied).then(|| from_tensor_name(evidence.initializer)).flatten());
    let below = |parameter: &String| {
        parameter.strip_prefix(scope).is_some_and(|rest| scope.is_empty() || rest.starts_with('.'))
    };
    match parameter.filter(below) {
        Some(parameter) if !scope.is_empty() || !evidence.tied => Some(parameter),
        _ => (!scope.is_empty()).then(|| scope.to_owned()),
    }
}

/// The module of the one weight among the parameters that an fx node names.
fn fx_weight(fx_node: &str, signature: &Signature) -> Option<String> {
    static PLACEHOLDER: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"%(\w+)").unwrap());
    let mut found: Vec<&str> = PLACEHOLDER
        .captures_iter(fx_node)
        .filter_map(|name| signature.get(&name[1]))
        .filter(|target| !target.ends_with("bias"))
        .map(|target| target.strip_suffix(".weight").unwrap_or(target))
        .collect();
    found.dedup();
    match found[..] {
        [one] => Some(one.to_owned()),
        _ => None,
    }
}

/// A list of strings as Python or JSON prints it. Tolerant: what is no quoted string is skipped.
fn parse_list(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut chars = text.chars();
    while let Some(quote) = chars.by_ref().find(|c| matches!(c, '\'' | '"')) {
        let mut item = String::new();
        while let Some(c) = chars.next() {
            match c {
                '\\' => item.extend(chars.next()),
                c if c == quote => break,
                c => item.push(c),
            }
        }
        items.push(item);
    }
    items
}

/// `: ModelClass/model: Class/model.layers.0: Class/linear: aten.linear.default`.
fn parse_namespace(text: &str) -> Vec<String> {
    text.split('/').map(|s| s.split(':').next().unwrap_or_default().trim().to_owned()).collect()
}

/// The module that a parameter's name says, or `None` for a name that an exporter made up.
fn from_tensor_name(name: &str) -> Option<String> {
    static MADE_UP: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(concat!(
            r"(?i)^(?:(?:val|value|const|constant|tensor|transpose|matmul|gemm|linear|param|arg|input|",
            r"initializer|weight|weights|node|output)[_.]?)?(?:\d+[_.]?)*$"
        ))
        .unwrap()
    });
    if name.contains("::") {
        return None;
    }
    let name = name.trim_matches('/').replace('/', ".");
    let mut stem = name.as_str();
    while let Some(shorter) = strip_tensor_suffix(stem) {
        stem = shorter;
    }
    // A bare word may be anything; it says a module only when a tier's list or a head has it.
    let telling = name.contains('.') || roles::role(Some(stem), false) != Role::Other;
    (telling && !MADE_UP.is_match(stem)).then(|| stem.to_owned())
}

/// Takes one ending off that says what the tensor is rather than whose.
fn strip_tensor_suffix(name: &str) -> Option<&str> {
    const ENDINGS: &[&str] = &[
        ".weight",
        "_weight",
        ".kernel",
        ".MatMul",
        ".Gemm",
        ".qweight",
        "_transposed",
        "_fp16",
        "_bf16",
        ".default",
    ];
    if let Some(at) = name.rfind("_merged_")
        && name[at + 8..].chars().all(|c| c.is_ascii_digit())
    {
        return Some(&name[..at]);
    }
    ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)).filter(|rest| !rest.is_empty())
}

/// `/model/layers.0/self_attn/q_proj/MatMul` is `model.layers.0.self_attn.q_proj`. A name without
/// separators says something only when it is itself on a tier's list.
fn from_node_name(name: &str, op: &str) -> Option<String> {
    let op = op.rsplit('.').next().unwrap_or(op);
    let separator = match (name.contains('/'), name.contains('.')) {
        (true, _) => '/',
        (_, true) => '.',
        _ => return (roles::role(Some(name), false) != Role::Other).then(|| name.to_owned()),
    };
    let mut parts: Vec<&str> = name.split(separator).filter(|part| !part.is_empty()).collect();
    while let Some(last) = parts.last()
        && is_operator(last, op)
    {
        parts.pop();
    }
    let path = parts.join(".");
    (!path.is_empty() && path.chars().any(|c| c.is_ascii_alphabetic())).then_some(path)
}

/// `MatMul`, `MatMul_3`, `MatMul_Add`, `Gemm_MatMulAddFusion`: an operator, not a module.
fn is_operator(part: &str, op: &str) -> bool {
    [op, "MatMul", "Gemm", "FusedMatMul", "Add", "Conv1D"].iter().any(|&operator| {
        part.strip_prefix(operator)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', '-', '.']))
    })
}

fn from_bias_name(name: &str) -> Option<String> {
    let stem = name.trim_matches('/').replace('/', ".");
    let stem = ["_bias", ".bias", ".Add"]
        .iter()
        .fold(stem.as_str(), |stem, ending| stem.strip_suffix(ending).unwrap_or(stem));
    let stem = stem.strip_suffix(".bias").unwrap_or(stem);
    (stem.len() < name.len()).then(|| from_tensor_name(stem)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str) -> StringStringEntry {
        StringStringEntry { key: Some(key.into()), value: Some(value.into()) }
    }

    fn path(evidence: Evidence<'_>) -> (Option<String>, PathSource) {
        let signature = parse_signature(
            "\n# inputs\np_m_up_weight: PARAMETER target='m.up.weight'\n\
             p_m_up_bias: PARAMETER target='m.up.bias'\np_m_w1: PARAMETER target='m.w1'\n\
             p_emb_weight: PARAMETER target='emb.weight'\ninput_ids: USER_INPUT\n",
        );
        module_path(&evidence, &signature)
    }

    #[test]
    fn metadata_comes_first() {
        let metadata = [
            entry(SCOPES_KEY, "['', 'm', 'm.up', 'linear_3']"),
            entry(FX_NODE_KEY, "%linear_3 : call(args = (%x, %p_m_up_weight, %p_m_up_bias))"),
        ];
        let evidence =
            Evidence { metadata: &metadata, initializer: "other.weight", ..Default::default() };
        assert_eq!(path(evidence), (Some("m.up".into()), PathSource::Metadata));
    }

    #[test]
    fn a_functional_linear_is_refined_and_a_tied_head_is_not() {
        let metadata = [
            entry(SCOPES_KEY, "[\"\", \"m\", \"linear\"]"),
            entry(FX_NODE_KEY, "%linear : call(args = (%x, %p_m_w1))"),
        ];
        let evidence = Evidence { metadata: &metadata, ..Default::default() };
        assert_eq!(path(evidence).0.as_deref(), Some("m.w1"));
        let metadata = [
            entry(SCOPES_KEY, "['', 'lm_head', 'linear_9']"),
            entry(FX_NODE_KEY, "%linear_9 : call(args = (%x, %p_emb_weight))"),
        ];
        let evidence = Evidence { metadata: &metadata, tied: true, ..Default::default() };
        assert_eq!(path(evidence).0.as_deref(), Some("lm_head"));
    }

    #[test]
    fn namespace_stands_in_for_missing_scopes() {
        let metadata =
            [entry(NAMESPACE_KEY, ": a.B/m: a.C/m.up: torch.Linear/linear: aten.linear")];
        let evidence = Evidence { metadata: &metadata, ..Default::default() };
        assert_eq!(path(evidence).0.as_deref(), Some("m.up"));
    }

    #[test]
    fn tensor_names() {
        for (name, expected) in [
            ("model.layers.0.mlp.up_proj.weight", Some("model.layers.0.mlp.up_proj")),
            ("model.layers.0.attn.qkv_proj.MatMul.weight", Some("model.layers.0.attn.qkv_proj")),
            ("/model/fc1/weight", Some("model.fc1")),
            ("fc1_weight", Some("fc1")),
            ("fc1.weight_merged_0", Some("fc1")),
            ("onnx::MatMul_719_merged_0", None),
            ("onnx::MatMul_719", None),
            ("val_12", None),
            ("1234", None),
            ("W", None),
            ("W_0", None),
            ("weight", None),
            ("packed_matmul_3", None),
            ("transpose_5", None),
            ("up", None),
            ("proj.weight", Some("proj")),
            ("lm_head_weight", Some("lm_head")),
        ] {
            assert_eq!(from_tensor_name(name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn node_names() {
        for (name, expected) in [
            ("/model/layers.0/self_attn/q_proj/MatMul", Some("model.layers.0.self_attn.q_proj")),
            ("/model/layers.0/mlp/experts.0/w1/MatMul_1", Some("model.layers.0.mlp.experts.0.w1")),
            ("/lm_head/MatMul", Some("lm_head")),
            ("/MatMul_3", None),
            ("MatMul_3", None),
            ("node_linear_3", None),
            ("up_proj", Some("up_proj")),
            ("model.fc2.MatMul", Some("model.fc2")),
            ("", None),
        ] {
            assert_eq!(from_node_name(name, "MatMul").as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn later_sources_follow_in_order() {
        let node = "/m/q_proj/MatMul";
        let weights = |initializer, tied, shared, bias| {
            path(Evidence {
                node,
                op: "MatMul",
                initializer,
                tied,
                shared,
                bias,
                ..Default::default()
            })
        };
        assert_eq!(weights("m.k_proj.weight", false, false, None).1, PathSource::Initializer);
        assert_eq!(weights("m.k_proj.weight", true, false, None).1, PathSource::Node);
        assert_eq!(weights("m.k_proj.weight", false, true, None).1, PathSource::Node);
        assert_eq!(
            weights("val_3", false, false, None),
            (Some("m.q_proj".into()), PathSource::Node)
        );
        let nameless = |bias| {
            path(Evidence {
                node: "n",
                op: "MatMul",
                initializer: "val_3",
                bias,
                ..Default::default()
            })
        };
        assert_eq!(nameless(Some("m.q_proj.bias")), (Some("m.q_proj".into()), PathSource::Bias));
        assert_eq!(nameless(Some("val_4")), (None, PathSource::None));
        assert_eq!(nameless(Some("bias")), (None, PathSource::None));
    }

    #[test]
    fn broken_metadata_is_no_panic() {
        for text in ["", "[", "['", "['a", "[]", "['a']", "'\\", "/:/", "x"] {
            for key in [SCOPES_KEY, NAMESPACE_KEY] {
                let metadata = [entry(key, text), entry(FX_NODE_KEY, "%")];
                path(Evidence { metadata: &metadata, ..Default::default() });
            }
        }
    }
}
