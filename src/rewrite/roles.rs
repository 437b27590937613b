//! What a module path says about a Linear: which tier list it is on, and its [`Role`].
//!
//! Names are compared component by component and never as substrings, because wrappers add prefixes
//! (`m.model.layers.0...`) and because `gate` (a router) is not `gate_proj` (a projection).

use super::sites::Role;

/// Feed-forward projections. An entry of several components matches consecutive ones.
const MLP: &[&[&str]] = &[
    &["gate_proj"],
    &["up_proj"],
    &["down_proj"],
    &["gate_up_proj"],
    &["fc1"],
    &["fc2"],
    &["w1"],
    &["w2"],
    &["w3"],
    &["dense_h_to_4h"],
    &["dense_4h_to_h"],
    &["mlp1"],
    &["mlp2"],
    &["mlp", "c_fc"],
    &["mlp", "c_proj"],
];

/// Attention projections. `dense` is one only outside a feed-forward block.
const ATTENTION: &[&[&str]] = &[
    &["q_proj"],
    &["k_proj"],
    &["v_proj"],
    &["o_proj"],
    &["qkv_proj"],
    &["c_attn"],
    &["attn", "c_proj"],
    &["query"],
    &["key"],
    &["value"],
    &["dense"],
    &["query_key_value"],
    &["wqkv"],
    &["wq"],
    &["wk"],
    &["wv"],
    // T5's feed-forward block has a `wo` as well.
    &["attn", "wo"],
    &["out_proj"],
];

/// Modules whose own name is another spelling of `attn` or `mlp`.
const ATTENTION_BLOCKS: &[&str] =
    &["attn", "self_attn", "attention", "self_attention", "crossattention", "cross_attn"];
const MLP_BLOCKS: &[&str] =
    &["mlp", "ffn", "feed_forward", "feedforward", "block_sparse_moe", "moe"];

/// Last components of a head. It is also known by producing `logits`.
const HEADS: &[&str] = &["lm_head", "embed_out"];

/// Last components of a mixture-of-experts gate.
const ROUTERS: &[&str] = &["gate", "router", "shared_expert_gate"];

/// Which of the two tier lists a module path is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// The MLP list.
    Mlp,
    /// The attention list.
    Attention,
}

/// The tier list that `path` is on, if any. When both match, the deeper component decides.
pub fn family(path: &str) -> Option<Family> {
    let parts = components(path);
    // Stacked experts have no module of their own: the path ends with the stack.
    let stack = parts.last().is_some_and(|part| part == "experts").then(|| parts.len() - 1);
    let mlp = deepest(&parts, MLP).or(stack);
    let attention = deepest(&parts, ATTENTION).filter(|&end| {
        // `mlp.dense` is no attention projection, `attention.dense` and a bare `dense` are.
        parts[end] != "dense" || !parts[..end].iter().any(|part| part == "mlp")
    });
    match (mlp, attention) {
        (Some(mlp), Some(attention)) if attention > mlp => Some(Family::Attention),
        (Some(_), _) => Some(Family::Mlp),
        (None, Some(_)) => Some(Family::Attention),
        (None, None) => None,
    }
}

/// The role of the Linear at `path`; `produces_logits` comes from the graph's structure.
pub fn role(path: Option<&str>, produces_logits: bool) -> Role {
    let Some(path) = path else {
        return if produces_logits { Role::Head } else { Role::Other };
    };
    let parts = components(path);
    if is_router(&parts) {
        return Role::Router;
    }
    if produces_logits || parts.iter().any(|part| HEADS.contains(&part.as_str())) {
        return Role::Head;
    }
    match family(path) {
        Some(Family::Mlp) if parts.iter().any(|part| is_expert(part)) => Role::Expert,
        Some(Family::Mlp) => Role::Mlp,
        Some(Family::Attention) => Role::Attention,
        None => Role::Other,
    }
}

/// True below a feed-forward block (`mlp`, `moe` ...).
pub fn in_feed_forward(path: &str) -> bool {
    components(path).iter().any(|part| part == "mlp" || is_expert(part))
}

fn is_router(parts: &[String]) -> bool {
    let Some((last, before)) = parts.split_last() else { return false };
    ROUTERS.contains(&last.as_str()) || before.iter().any(|part| part == "router")
        // DeepSpeed-style gates keep the Linear one level down.
        || (last == "wg" && before.last().is_some_and(|part| part == "gate"))
}

fn is_expert(part: &str) -> bool {
    let stem = part.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_');
    matches!(stem, "expert" | "experts" | "shared_expert" | "shared_experts")
}

/// Lower-case components, with the spellings of attention and feed-forward blocks made one.
pub(super) fn components(path: &str) -> Vec<String> {
    path.split('.')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let part = part.to_ascii_lowercase();
            if ATTENTION_BLOCKS.contains(&part.as_str()) {
                "attn".to_owned()
            } else if MLP_BLOCKS.contains(&part.as_str()) {
                "mlp".to_owned()
            } else {
                part
            }
        })
        .collect()
}

/// Index of the last component of the deepest match of any entry.
fn deepest(parts: &[String], entries: &[&[&str]]) -> Option<usize> {
    (0..parts.len()).rev().find(|&end| {
        entries.iter().any(|entry| {
            (end + 1)
                .checked_sub(entry.len())
                .is_some_and(|start| parts[start..=end].iter().zip(*entry).all(|(a, b)| a == b))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_of_the_known_architectures() {
        let mlp = [
            "transformer.h.0.mlp.c_fc",
            "transformer.h.0.mlp.c_proj",
            "model.layers.3.mlp.gate_proj",
            "m.model.layers.3.mlp.Gate_Up_Proj",
            "transformer.blocks.1.ffn.down_proj",
            "model.decoder.layers.0.fc2",
            "gpt_neox.layers.0.mlp.dense_4h_to_h",
            "model.layers.0.block_sparse_moe.experts.7.w3",
            "model.layers.0.mlp.up_proj.base_layer",
            "block.0.mlp.experts.3.mlp1",
            "layers.0.feed_forward.w1",
        ];
        let attention = [
            "transformer.h.0.attn.c_proj",
            "transformer.h.0.attn.c_attn",
            "transformer.h.0.attn.attention.out_proj",
            "model.layers.0.self_attn.dense",
            "gpt_neox.layers.0.attention.dense",
            "encoder.layer.0.attention.self.query",
            "transformer.blocks.0.attn.Wqkv",
            "layers.0.dense",
            "layers.0.attention.wq",
            "layers.0.attention.wo",
        ];
        for path in mlp {
            assert_eq!(family(path), Some(Family::Mlp), "{path}");
        }
        for path in attention {
            assert_eq!(family(path), Some(Family::Attention), "{path}");
        }
        for path in [
            "c_proj",
            "transformer.h.0.c_proj",
            "mlp.dense",
            "lm_head",
            "up_proj2",
            "gate",
            "DenseReluDense.wo",
        ] {
            assert_eq!(family(path), None, "{path}");
        }
    }

    #[test]
    fn roles() {
        assert_eq!(role(Some("model.layers.0.block_sparse_moe.gate"), false), Role::Router);
        assert_eq!(role(Some("model.layers.0.mlp.gate"), false), Role::Router);
        assert_eq!(role(Some("model.layers.0.mlp.router.layer"), false), Role::Router);
        assert_eq!(role(Some("model.layers.0.mlp.gate_proj"), false), Role::Mlp);
        assert_eq!(role(Some("model.layers.0.mlp.experts.3.w1"), false), Role::Expert);
        assert_eq!(role(Some("model.layers.0.mlp.experts"), false), Role::Expert);
        assert_eq!(role(Some("embed_out"), false), Role::Head);
        assert_eq!(role(Some("model.lm_head"), false), Role::Head);
        assert_eq!(role(None, true), Role::Head);
        assert_eq!(role(None, false), Role::Other);
        assert_eq!(role(Some("score"), false), Role::Other);
    }
}
