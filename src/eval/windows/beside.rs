//! What files beside a tokenizer or a model state: the token that begins a text, the context.

use super::encode::Encoder;
use crate::eval::error::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const CONFIG: &str = "config.json";
const GENAI_CONFIG: &str = "genai_config.json";

/// Files beside `tokenizer.json` that [`find_bos`] reads, those that exist.
pub(super) fn bos_files(tokenizer: &Path) -> Vec<PathBuf> {
    let folder = folder(tokenizer);
    let paths = [TOKENIZER_CONFIG, CONFIG].map(|name| folder.join(name));
    paths.into_iter().filter(|path| path.is_file()).collect()
}

/// The token that begins a text, and where its id is from: `bos_token` of tokenizer_config.json,
/// `bos_token_id` of config.json beside the tokenizer, else what the tokenizer's post-processor puts
/// in front. With `or_eos`, as lm-eval has it, a tokenizer_config.json without BOS gives its
/// `eos_token`, and config.json its `eos_token_id`.
///
/// # Errors
/// None of them names one, or it is not in the vocabulary; a file is not JSON.
pub(super) fn find_bos(path: &Path, encoder: &Encoder, or_eos: bool) -> Result<(u32, String)> {
    let folder = folder(path);
    let config = read(&folder.join(CONFIG))?;
    let tokenizer_config = read(&folder.join(TOKENIZER_CONFIG))?;
    let names: &[&str] = if or_eos { &["bos", "eos"] } else { &["bos"] };
    let error = |reason: String| Error::Tokenizer { path: path.into(), reason };
    for name in names {
        let key = format!("{name}_token");
        if let Some(token) = tokenizer_config.as_ref().and_then(|config| content(&config[&key])) {
            let id = encoder.id(token).ok_or_else(|| {
                let text = "does not know the token";
                error(format!("{text} `{token}` that {TOKENIZER_CONFIG} names as {key}"))
            })?;
            return Ok((id, described(encoder, id, &format!("{key} of {TOKENIZER_CONFIG}"))));
        }
    }
    for name in names {
        let key = format!("{name}_token_id");
        if let Some(id) = config.as_ref().and_then(|config| first_id(&config[&key])) {
            return Ok((id, described(encoder, id, &format!("{key} of {CONFIG}"))));
        }
    }
    if let Some(&id) = encoder.around().before.first() {
        return Ok((id, described(encoder, id, "the tokenizer's post-processor")));
    }
    let looked_at = |name: &str, value: &Option<Value>, keys: &str| {
        let path = folder.join(name);
        let why = if value.is_some() { format!("names no {keys}") } else { "is missing".into() };
        format!("{} {why}", path.display())
    };
    let (token, id) = match or_eos {
        true => ("bos_token or eos_token", "bos_token_id or eos_token_id"),
        false => ("bos_token", "bos_token_id"),
    };
    Err(error(format!(
        "no token to begin a text with: {}, {}, and the post-processor adds none in front; put one \
         of these files of the model beside the tokenizer, or pass --bos none",
        looked_at(TOKENIZER_CONFIG, &tokenizer_config, token),
        looked_at(CONFIG, &config, id),
    )))
}

/// `<|im_start|> (id 1, bos_token of tokenizer_config.json)`.
pub(super) fn described(encoder: &Encoder, id: u32, from: &str) -> String {
    let token = encoder.token(id).unwrap_or_else(|| "a token without a name".into());
    format!("{token} (id {id}, {from})")
}

/// Tokens of context that the files beside a model state, if any does: config.json of Hugging Face
/// (`max_position_embeddings`, `n_positions` or `n_ctx`, of the text model where there are several),
/// genai_config.json of ONNX Runtime GenAI (`model.context_length`).
pub fn stated_context(folder: &Path) -> Option<usize> {
    let load = |name: &str| read(&folder.join(name)).ok().flatten().unwrap_or_default();
    let size = |value: &Value| value.as_u64().filter(|&size| size > 0);
    let (config, genai) = (load(CONFIG), load(GENAI_CONFIG));
    let stated = [&config["text_config"], &config].into_iter().find_map(|config| {
        let keys = ["max_position_embeddings", "n_positions", "n_ctx"];
        keys.iter().find_map(|&key| size(&config[key]))
    });
    let stated = stated.or_else(|| size(&genai["model"]["context_length"]));
    stated.and_then(|size| usize::try_from(size).ok())
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file's JSON; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::Tokenizer { path: path.into(), reason: format!("not JSON: {e}") }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// A token as text, or as an object with its `content`.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// An id, or the first of several.
fn first_id(value: &Value) -> Option<u32> {
    let value = value.as_array().and_then(|ids| ids.first()).unwrap_or(value);
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
