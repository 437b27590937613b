//! `genai_config.json`: which models a folder has, and the session options that load the operator library.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use super::GenaiError;

/// Name of the configuration.
pub const CONFIG: &str = "genai_config.json";

/// Session option of ONNX Runtime GenAI with the path of a custom-op library. A relative one is looked for in the
/// model folder; an absolute one must lie there, beside an execution provider's library or below the current folder.
const LIBRARY_OPTION: &str = "custom_ops_library";

/// A model of the decoder: the only one, or a stage of its pipeline.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stage {
    /// The `filename` field, with dots.
    pub field: String,
    /// The model, relative to the folder.
    pub file: String,
    /// Place of the object with `session_options` of its own that the stage uses.
    options: String,
}

/// A configuration as it was read; fields and their order stay.
#[derive(Clone, Debug)]
pub(super) struct Config {
    path: PathBuf,
    value: Value,
}

impl Config {
    /// Reads the configuration of `folder`.
    pub fn open(folder: &Path) -> Result<Self, GenaiError> {
        let path = folder.join(CONFIG);
        let bytes = fs::read(&path).map_err(GenaiError::io("read", &path))?;
        // Editors on Windows begin a file with a byte order mark, which GenAI skips too.
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        match serde_json::from_slice(text) {
            Ok(value) => Ok(Self { path, value }),
            Err(source) => Err(GenaiError::Json { path, source }),
        }
    }

    /// The decoder's models, each file once.
    pub fn stages(&self) -> Result<Vec<Stage>, GenaiError> {
        const DECODER: &str = "model.decoder";
        let decoder = &self.value["model"]["decoder"];
        if !decoder.is_object() {
            return Err(
                self.wrong(DECODER, "is missing: only folders with a decoder are rewritten")
            );
        }
        if decoder["shared_initializers"].as_array().is_some_and(|shared| !shared.is_empty()) {
            let what = "weights shared between sessions cannot be replaced; export without them";
            return Err(self.wrong("model.decoder.shared_initializers", what));
        }
        let top = || "/model/decoder".to_owned();
        // A pipeline is an array of objects with one named stage each, or one object of them.
        let pipeline: Vec<(String, String, &Value)> = match &decoder["pipeline"] {
            Value::Array(items) => (0..)
                .zip(items)
                .flat_map(|(i, item)| item.as_object().into_iter().flatten().map(move |n| (i, n)))
                .map(|(i, (name, stage))| {
                    let field = format!("{DECODER}.pipeline[{i}].{name}");
                    (field, format!("/model/decoder/pipeline/{i}/{}", escaped(name)), stage)
                })
                .collect(),
            Value::Object(items) => items
                .iter()
                .map(|(name, stage)| {
                    let field = format!("{DECODER}.pipeline.{name}");
                    (field, format!("/model/decoder/pipeline/{}", escaped(name)), stage)
                })
                .collect(),
            _ => Vec::new(),
        };
        let mut stages: Vec<Stage> = Vec::new();
        if pipeline.is_empty() {
            let field = format!("{DECODER}.filename");
            let file = self.file(&field, &decoder["filename"])?;
            stages.push(Stage { field, file, options: top() });
        }
        for (name, pointer, stage) in pipeline {
            let field = format!("{name}.filename");
            let file = self.file(&field, &stage["filename"])?;
            // Inherited options are the decoder's with the stage's on top; a library is registered once.
            let own =
                stage["session_options"].is_object() && stage["inherit_session_options"] != true;
            stages.push(Stage { field, file, options: if own { pointer } else { top() } });
        }
        Ok(stages)
    }

    /// A model file that stays in the folder.
    fn file(&self, field: &str, value: &Value) -> Result<String, GenaiError> {
        let name = match value.as_str() {
            Some("") | None => return Err(self.wrong(field, "the name of a model file is missing")),
            Some(name) => name,
        };
        let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || name.contains(['\\', '\0']) {
            let what = format!("'{name}' is no path within the folder");
            return Err(self.wrong(field, &what));
        }
        Ok(name.to_owned())
    }

    /// Whether any session loads an operator library of this name.
    pub fn loads(&self, library: &str) -> bool {
        fn within(value: &Value, library: &str) -> bool {
            match value {
                Value::Object(fields) => fields.iter().any(|(key, value)| {
                    (key == LIBRARY_OPTION && value == library) || within(value, library)
                }),
                Value::Array(items) => items.iter().any(|item| within(item, library)),
                _ => false,
            }
        }
        within(&self.value["model"], library)
    }

    /// Other model files that the configuration names (embedding, vision, speech, ...), in its order.
    pub fn other_models(&self, stages: &[Stage]) -> Vec<String> {
        let mut found = Vec::new();
        collect_files(&self.value["model"], &mut found);
        found.retain(|file| stages.iter().all(|stage| stage.file != *file));
        found
    }

    /// Lets the sessions of `stages` load the operator library `name`, a file of the folder.
    pub fn load_library(&mut self, stages: &[&Stage], name: &str) -> Result<(), GenaiError> {
        for stage in stages {
            let field = format!("{}.session_options", dotted(&stage.options));
            let path = self.path.clone();
            let wrong = |field: String, what: String| GenaiError::Config { path, field, what };
            let Some(owner) = self.value.pointer_mut(&stage.options).and_then(Value::as_object_mut)
            else {
                return Err(wrong(field, "is no object".to_owned()));
            };
            let options =
                owner.entry("session_options").or_insert_with(|| Value::Object(Default::default()));
            let Some(options) = options.as_object_mut() else {
                return Err(wrong(field, "is no object".to_owned()));
            };
            if let Some(other) = options.get(LIBRARY_OPTION).filter(|other| *other != name) {
                let what = format!("is {other} already, and GenAI loads one library a session");
                return Err(wrong(format!("{field}.{LIBRARY_OPTION}"), what));
            }
            options.insert(LIBRARY_OPTION.to_owned(), name.into());
        }
        Ok(())
    }

    /// Writes the configuration into `folder`.
    pub fn write(&self, folder: &Path) -> Result<(), GenaiError> {
        let path = folder.join(CONFIG);
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut text = Vec::new();
        let mut writer = serde_json::Serializer::with_formatter(&mut text, formatter);
        serde::Serialize::serialize(&self.value, &mut writer)
            .map_err(|source| GenaiError::Json { path: path.clone(), source })?;
        text.push(b'\n');
        fs::write(&path, text).map_err(GenaiError::io("write", &path))
    }

    pub fn wrong(&self, field: &str, what: &str) -> GenaiError {
        GenaiError::Config {
            path: self.path.clone(),
            field: field.to_owned(),
            what: what.to_owned(),
        }
    }
}

/// The strings of all fields `filename` that end in `.onnx`.
fn collect_files(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value.as_str() {
                    Some(file) if key == "filename" && file.ends_with(".onnx") => {
                        found.push(file.to_owned());
                    }
                    _ => collect_files(value, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect_files(item, found)),
        _ => {}
    }
}

/// A key as a part of a JSON pointer.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// `/model/decoder` -> `model.decoder`.
fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(value: Value) -> Config {
        Config { path: "d/genai_config.json".into(), value }
    }

    fn refused(value: Value) -> String {
        config(value).stages().unwrap_err().to_string()
    }

    #[test]
    fn a_decoder_is_one_model() {
        let decoder = json!({"filename": "sub/m.onnx", "session_options": {"log_id": "x"}});
        let mut config = config(json!({"model": {"decoder": decoder}, "search": {}}));
        let stages = config.stages().unwrap();
        assert_eq!(stages[0].file, "sub/m.onnx");
        let all: Vec<&Stage> = stages.iter().collect();
        config.load_library(&all, "lib.so").unwrap();
        let want = json!({"log_id": "x", "custom_ops_library": "lib.so"});
        assert_eq!(config.value["model"]["decoder"]["session_options"], want);
        // The same again is no contradiction, another library is.
        config.load_library(&all, "lib.so").unwrap();
        let error = config.load_library(&all, "other.so").unwrap_err().to_string();
        assert!(error.contains("model.decoder.session_options.custom_ops_library"), "{error}");
    }

    #[test]
    fn stages_of_a_pipeline_use_their_own_options_unless_they_inherit() {
        let pipeline = json!([
            {"embed": {"filename": "e.onnx"}},
            {"own": {"filename": "o.onnx", "session_options": {}}},
            {"both": {"filename": "b.onnx", "session_options": {}, "inherit_session_options": true}},
        ]);
        let vision = json!({"filename": "v.onnx"});
        let value = json!({"model": {"decoder": {"pipeline": pipeline}, "vision": vision}});
        let mut config = config(value);
        let stages = config.stages().unwrap();
        let options: Vec<&str> = stages.iter().map(|stage| stage.options.as_str()).collect();
        assert_eq!(options, ["/model/decoder", "/model/decoder/pipeline/1/own", "/model/decoder"]);
        assert_eq!(stages[1].field, "model.decoder.pipeline[1].own.filename");
        assert_eq!(config.other_models(&stages), ["v.onnx"]);
        config.load_library(&stages.iter().collect::<Vec<_>>(), "l").unwrap();
        let decoder = &config.value["model"]["decoder"];
        assert_eq!(decoder["session_options"]["custom_ops_library"], "l");
        assert_eq!(decoder["pipeline"][1]["own"]["session_options"]["custom_ops_library"], "l");
        assert_eq!(decoder["pipeline"][2]["both"]["session_options"], json!({}));
    }

    #[test]
    fn what_cannot_be_followed_names_its_field() {
        assert!(refused(json!([])).contains("model.decoder: is missing"));
        assert!(refused(json!({"model": {"decoder": 3}})).contains("model.decoder"));
        for name in ["../m.onnx", "/m.onnx", "a/../../m.onnx", "", "./m.onnx", "a\\m.onnx"] {
            let error = refused(json!({"model": {"decoder": {"filename": name}}}));
            assert!(error.contains("d/genai_config.json': model.decoder.filename"), "{error}");
        }
        let error = refused(json!({"model": {"decoder": {"filename": 3}}}));
        assert!(error.contains("model.decoder.filename"), "{error}");
        let error = refused(json!({"model": {"decoder": {"pipeline": {"x": {}}}}}));
        assert!(error.contains("model.decoder.pipeline.x.filename"), "{error}");
        let shared = json!({"model": {"decoder": {"filename": "m", "shared_initializers": [{}]}}});
        assert!(refused(shared).contains("shared_initializers"));
    }
}
