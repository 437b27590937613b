//! A `ModelProto`: the outermost shell.

use super::error::{Error, Result};
use super::external::ExternalFiles;
use super::graph::{self, Graph};
use super::proto::{Attribute, Node, OperatorSetId, StringStringEntry};
use super::tensor::{TensorInfo, TensorView};
use super::{mmap, read, wire};
use bytes::Bytes;
use mx_custom_ops::contract::{DOMAIN, check_domain_version};
use prost::Message as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Field numbers of `ModelProto`.
pub(crate) mod number {
    pub const IR_VERSION: u32 = 1;
    pub const PRODUCER_NAME: u32 = 2;
    pub const GRAPH: u32 = 7;
    pub const OPSET_IMPORT: u32 = 8;
    pub const METADATA: u32 = 14;
    pub const FUNCTIONS: u32 = 25;
}

/// A top-level field in file order.
#[derive(Clone, Debug)]
pub(crate) enum TopField {
    /// Carried as it is.
    Raw { number: u32, raw: Bytes },
    /// The graph; `head` is its original tag and length, `len` the length it announces.
    Graph { head: Bytes, len: u64 },
}

/// A model-local function (read-only: functions are carried as they are).
#[derive(Clone, Debug, Default)]
pub struct Function {
    /// Domain.
    pub domain: String,
    /// Name.
    pub name: String,
    /// Names of its arguments.
    pub inputs: Vec<String>,
    /// Names of its results.
    pub outputs: Vec<String>,
    /// Nodes of its body.
    pub nodes: Vec<Node>,
    /// Values of attributes that a call may leave out.
    pub defaults: Vec<Attribute>,
    /// Domains and versions of its operators.
    pub opsets: Vec<(String, i64)>,
    /// It shares its name with others.
    pub overloaded: bool,
}

/// An ONNX model whose untouched parts are written back byte for byte.
///
/// Cheap to clone: files stay mapped and shared, tensors are not copied.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) fields: Vec<TopField>,
    pub(crate) graph: Graph,
    pub(crate) opsets: Vec<OperatorSetId>,
    pub(crate) metadata: Vec<StringStringEntry>,
    pub(crate) files: Arc<ExternalFiles>,
    ir_version: i64,
    producer: String,
    pub(super) path: Option<PathBuf>,
}

impl Model {
    /// Opens a model file by mapping it; external data is looked for in its folder.
    ///
    /// # Errors
    /// A file that cannot be read, or is not an ONNX model (with the byte); both name the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = mmap::map(path)?;
        let mut model = Self::from_bytes(bytes, path.parent())
            .map_err(|source| Error::InFile { path: path.to_owned(), source: Box::new(source) })?;
        model.path = Some(path.to_owned());
        Ok(model)
    }

    /// Reads a model from memory. `dir` is where its external data lies, if it has any.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the byte; [`Error::Newer`] for operators of a later version of this project.
    pub fn from_bytes(bytes: Bytes, dir: Option<&Path>) -> Result<Self> {
        if bytes.is_empty() {
            return Err(Error::malformed("the file is empty", 0));
        }
        let mut model = Self {
            fields: Vec::new(),
            graph: Graph::default(),
            opsets: Vec::new(),
            metadata: Vec::new(),
            files: Arc::new(ExternalFiles::new(dir)),
            ir_version: 0,
            producer: String::new(),
            path: None,
        };
        let mut has_graph = false;
        for field in wire::fields(&bytes, 0) {
            let field = field?;
            if field.number == number::GRAPH {
                field.expect_len("graph", 0)?;
                if std::mem::replace(&mut has_graph, true) {
                    return Err(Error::malformed("a second graph", field.whole.start as u64));
                }
                let (head, body) = (field.whole.start..field.payload.start, field.payload.clone());
                model
                    .fields
                    .push(TopField::Graph { head: bytes.slice(head), len: body.len() as u64 });
                model.graph = Graph::parse(&bytes.slice(body.clone()), body.start as u64)?;
            } else {
                model.read_field(&bytes, &field)?;
                let raw = bytes.slice(field.whole);
                model.fields.push(TopField::Raw { number: field.number, raw });
            }
        }
        let end = bytes.len() as u64;
        if !has_graph {
            return Err(Error::malformed("no graph until the end of the file", end));
        }
        if model.ir_version <= 0 {
            return Err(Error::malformed("no ir_version until the end of the file", end));
        }
        if model.opsets.is_empty() && model.ir_version >= 3 {
            return Err(Error::malformed("no opset_import until the end of the file", end));
        }
        // ONNX Runtime would take the operators of the last version that it has.
        for opset in model.opsets.iter().filter(|set| set.domain.as_deref() == Some(DOMAIN)) {
            check_domain_version(opset.version.unwrap_or_default())?;
        }
        let mut files = ExternalFiles::new(dir);
        files.locations = model.external_locations();
        model.files = Arc::new(files);
        Ok(model)
    }

    fn read_field(&mut self, bytes: &Bytes, field: &wire::Field<'_>) -> Result<()> {
        match field.number {
            number::IR_VERSION => self.ir_version = field.expect_varint("ir_version", 0)? as i64,
            number::PRODUCER_NAME => {
                self.producer = field.expect_str("producer_name", 0)?.to_owned()
            }
            number::OPSET_IMPORT => {
                self.opsets.push(graph::decode("opset_import", bytes, field, 0)?)
            }
            number::METADATA => self.metadata.push(graph::decode("metadata", bytes, field, 0)?),
            _ => {}
        }
        Ok(())
    }

    /// The file it was opened from.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The folder of its external data.
    pub fn dir(&self) -> Option<&Path> {
        self.files.dir()
    }

    /// The external data files that the model as opened refers to, as it spells them: relative to [`Self::dir`].
    pub fn data_files(&self) -> impl Iterator<Item = &str> {
        self.files.locations.iter().map(String::as_str)
    }

    /// The main graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The main graph, to be edited.
    pub fn graph_mut(&mut self) -> &mut Graph {
        &mut self.graph
    }

    /// IR version.
    pub fn ir_version(&self) -> i64 {
        self.ir_version
    }

    pub(super) fn note_ir_version(&mut self, version: i64) {
        self.ir_version = version;
    }

    /// Name of the exporter.
    pub fn producer(&self) -> &str {
        &self.producer
    }

    /// Imported version of an operator domain; `""` and `ai.onnx` are the same.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let plain = |d: &str| if d == "ai.onnx" { String::new() } else { d.to_owned() };
        let wanted = plain(domain);
        let matching = |o: &&OperatorSetId| plain(o.domain.as_deref().unwrap_or("")) == wanted;
        self.opsets.iter().filter(matching).filter_map(|o| o.version).next_back()
    }

    /// All operator set imports.
    pub fn opset_imports(&self) -> &[OperatorSetId] {
        &self.opsets
    }

    /// Metadata of the model.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata
            .iter()
            .map(|e| (e.key.as_deref().unwrap_or(""), e.value.as_deref().unwrap_or("")))
    }

    /// The elements of a tensor of this model. Data is mapped, not copied, unless it stands in a
    /// varint-encoded field.
    ///
    /// # Errors
    /// A shape, type or length that does not fit; external data that is missing, too short or outside
    /// the model's folder.
    pub fn tensor(&self, info: &TensorInfo) -> Result<TensorView> {
        read::view(info, &self.files)
    }

    /// The model-local functions.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the byte within the function.
    pub fn functions(&self) -> Result<Vec<Function>> {
        let mut out = Vec::new();
        for field in &self.fields {
            if let TopField::Raw { number: number::FUNCTIONS, raw } = field {
                out.push(read_function(raw)?);
            }
        }
        Ok(out)
    }

    /// Removes the model-local functions, by domain and name, for which `gone` holds.
    pub fn remove_functions(&mut self, gone: impl Fn(&str, &str) -> bool) {
        self.fields.retain(|field| match field {
            TopField::Raw { number: number::FUNCTIONS, raw } => {
                // One that cannot be read is nothing that this program has replaced.
                read_function(raw).map_or(true, |f| !gone(&f.domain, &f.name))
            }
            _ => true,
        });
    }
}

/// The encoded function with at least `version` of the standard domain, where it imports that.
pub(super) fn raise_function(raw: &Bytes, version: i64) -> Result<Bytes> {
    let Some(whole) = wire::fields(raw, 0).next().transpose()? else { return Ok(raw.clone()) };
    whole.expect_len("function", 0)?;
    let body = raw.slice(whole.payload);
    let mut out = Vec::with_capacity(body.len() + 2);
    let mut changed = false;
    for field in wire::fields(&body, 0) {
        let field = field?;
        if field.number == 9 {
            let mut import: OperatorSetId =
                graph::decode("function opset_import", &body, &field, 0)?;
            let standard = matches!(import.domain.as_deref(), None | Some("" | "ai.onnx"));
            if standard && import.version.is_some_and(|found| found < version) {
                import.version = Some(version);
                out.extend(wire::len_field(9, &import.encode_to_vec()));
                changed = true;
                continue;
            }
        }
        out.extend_from_slice(&body[field.whole]);
    }
    Ok(if changed { wire::len_field(number::FUNCTIONS, &out) } else { raw.clone() })
}

fn read_function(raw: &Bytes) -> Result<Function> {
    let mut function = Function::default();
    let whole = wire::fields(raw, 0).next().transpose()?;
    let Some(whole) = whole else { return Ok(function) };
    whole.expect_len("function", 0)?;
    let body = raw.slice(whole.payload);
    for field in wire::fields(&body, 0) {
        let field = field?;
        match field.number {
            1 => function.name = field.expect_str("function name", 0)?.to_owned(),
            4 => function.inputs.push(field.expect_str("function input", 0)?.to_owned()),
            5 => function.outputs.push(field.expect_str("function output", 0)?.to_owned()),
            7 => function.nodes.push(graph::decode("function node", &body, &field, 0)?),
            9 => {
                let import: OperatorSetId =
                    graph::decode("function opset_import", &body, &field, 0)?;
                let domain = import.domain.unwrap_or_default();
                function.opsets.push((domain, import.version.unwrap_or_default()));
            }
            11 => function.defaults.push(graph::decode("function default", &body, &field, 0)?),
            13 => function.overloaded |= !field.expect_str("function overload", 0)?.is_empty(),
            10 => function.domain = field.expect_str("function domain", 0)?.to_owned(),
            _ => {}
        }
    }
    Ok(function)
}
