//! What the search for Linear layers returns: [`Site`]s to replace and [`Skipped`] candidates.

use std::fmt;

use serde::Serialize;

use super::checkpoint::{CheckpointUse, PackedWeight};
use super::products::Product;
use crate::onnx::proto::DataType;

/// One Linear layer of the main graph or of a body in it, whichever way the exporter spelled it:
/// `Y[.., n] = alpha * X[.., k] * W^T (+ beta * bias)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Which graph of the model's [tree](crate::graph::tree) it is in; 0 is the main graph.
    pub graph: usize,
    /// The MatMul-like node, as the number in its [`NodeId`](crate::onnx::NodeId).
    pub node: usize,
    /// Name of that node; the replacement keeps it. `#<index>` when the node has none.
    pub node_name: String,
    /// Its operator: `MatMul`, `Gemm` or `com.microsoft.FusedMatMul`.
    pub op: String,
    /// Every node of its graph that the replacement stands for, ascending: [`Self::node`] and,
    /// when its bias is folded in, the Add behind it. The replacement takes the place of the last one.
    pub replaces: Vec<usize>,
    /// The Linear's module path (`model.layers.0.mlp.up_proj`), when the model says one.
    pub module_path: Option<String>,
    /// Where the path was found.
    pub path_source: PathSource,
    /// What the layer is for.
    pub role: Role,
    /// Name of the value X.
    pub x: String,
    /// X is [k, m] (a Gemm with transA=1) and goes through a Transpose first.
    pub transpose_x: bool,
    /// Name of the value Y: the MatMul's output or, with a folded bias, the Add's.
    pub y: String,
    /// The constant weight.
    pub weight: Weight,
    /// Output features.
    pub n: usize,
    /// Input features: the contraction axis.
    pub k: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// The bias that the operator itself adds.
    pub bias: Option<Bias>,
    /// A Gemm's C in a shape that the operator cannot take: an Add of this value has to follow.
    pub residual: Option<String>,
    /// Index of the [`Filter`](super::Filter) rule that chose the site.
    pub rule: usize,
    /// The weight is one of a stack, chosen by an index at run time; [`Self::n`] and [`Self::k`] are
    /// then those of one expert, and [`Self::weight`]'s region is the first one's.
    pub experts: Option<Experts>,
    /// What a checkpoint says of the weight beyond its path.
    pub note: Option<String>,
    /// The weight's codes and scales in a checkpoint that holds such.
    pub packed: Option<PackedWeight>,
}

/// A stack of weights `[count, ., .]`, one expert behind the other, and what chooses from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// Weights in the stack.
    pub count: usize,
    /// Name of the value that chooses: integers, negative ones counted from the end.
    pub index: String,
    /// Its rank, without the axis that [`Self::points`] is about.
    pub index_rank: usize,
    /// The index has a last axis of one (GatherND's), which goes first.
    pub points: bool,
    /// The weight is the product's left operand, `Y [.., n, m] = W [.., n, k] * X [.., k, m]`: ranks of X
    /// and Y, whose last two axes change places. `None` for `X * W^T`.
    pub turned: Option<[usize; 2]>,
}

impl Site {
    /// Rows of k numbers that are quantised: n, of every expert.
    pub fn rows(&self) -> usize {
        self.n.saturating_mul(self.experts.as_ref().map_or(1, |experts| experts.count))
    }
}

/// A constant rank-2 weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Name of the initialiser, or of the output of the `Constant` node, that holds the numbers.
    pub initializer: String,
    /// How the stored numbers run, whatever transposes lie between them and the node.
    pub layout: Layout,
    /// Which of the stored numbers are this layer's.
    pub region: Region,
    /// The stored element type: float32, float16 or bfloat16.
    pub dtype: DataType,
    /// The element type at the node, which is X's. Differs from [`Self::dtype`] only when an exact
    /// widening Cast lies between.
    pub operand_dtype: DataType,
    /// Name of the value that the node reads: the initialiser itself or what Identity, Cast,
    /// Transpose, Reshape ... make of it.
    pub operand: String,
    /// The weight's initialiser is also read by a Gather: it is the embedding's and stays.
    pub tied: bool,
}

/// Storage order of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Layout {
    /// Row-major [n, k]: the order in which the operator's rows run.
    NK,
    /// Row-major [k, n]: the transpose has to be taken when packing.
    KN,
}

/// A matrix among the numbers of a tensor: the whole of it, or one expert of a stack, one layer of a
/// packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Its first number.
    pub start: usize,
    /// From the first number of one stored row to that of the next.
    pub pitch: usize,
}

/// A bias that becomes the operator's own input.
#[derive(Clone, Debug, PartialEq)]
pub struct Bias {
    /// Name of the value that the node reads. It has X's element type.
    pub value: String,
    /// The constant behind it (through Identity nodes), when there is one.
    pub constant: Option<String>,
    /// What has to happen to it to become `[n]`.
    pub shape: BiasShape,
    /// Its factor (a Gemm's beta).
    pub beta: f32,
}

/// Shape of a bias as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasShape {
    /// `[n]`: usable as it is.
    Vector,
    /// n elements in another shape (`[1, n]`); only for constants. Rewritten as `[n]`.
    Row,
    /// One element, broadcast; only for constants. Rewritten as `[n]`.
    Scalar,
}

/// What a Linear is for. Decides which tiers take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Feed-forward projection.
    Mlp,
    /// Projection of an attention layer.
    Attention,
    /// The language-model head: produces the logits. Taken only when named.
    Head,
    /// A mixture-of-experts gate. Taken only when named.
    Router,
    /// Feed-forward projection of one expert.
    Expert,
    /// Several layers in one product, of which nothing says what they are. Taken only when named.
    Packed,
    /// A product of two activations inside attention. Taken only by a rule for this role.
    Product,
    /// Anything else, or unknown.
    Other,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Mlp,
        Self::Attention,
        Self::Head,
        Self::Expert,
        Self::Router,
        Self::Packed,
        Self::Product,
        Self::Other,
    ];

    /// True for what is taken only by name or by its role: quantising it costs more than it saves, or
    /// nothing says what it is.
    pub fn only_when_named(self) -> bool {
        matches!(self, Self::Head | Self::Router | Self::Packed | Self::Product)
    }

    /// The name in plans and recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Attention => "attention",
            Self::Head => "head",
            Self::Router => "router",
            Self::Expert => "expert",
            Self::Packed => "packed",
            Self::Product => "product",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a module path was found, most to least reliable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PathSource {
    /// Node metadata that torch.onnx (dynamo) writes.
    Metadata,
    /// The weight initialiser's name.
    Initializer,
    /// The node's own name (`/model/layers.0/mlp/up_proj/MatMul`).
    Node,
    /// A checkpoint's parameter of the same values, every one compared.
    Checkpoint,
    /// The bias initialiser's name. Exporters merge equal biases, so it may be another layer's.
    Bias,
    /// The first of several parameters of a checkpoint that have the same values.
    #[serde(rename = "checkpoint")]
    CheckpointAmbiguous,
    /// The graph's structure: it produces `logits`, so it is the head.
    Structure,
    /// Nowhere.
    None,
}

impl PathSource {
    /// How far a path from this source can be relied on: `high` where the exporter wrote it for this
    /// very layer or a checkpoint has its values under one name, `medium` where it is derived (a node's scope, the head's place), `low` where it may
    /// be another layer's, `none` without a path.
    pub fn confidence(self) -> &'static str {
        match self {
            Self::Metadata | Self::Initializer | Self::Checkpoint => "high",
            Self::Node | Self::Structure => "medium",
            Self::Bias | Self::CheckpointAmbiguous => "low",
            Self::None => "none",
        }
    }
}

impl fmt::Display for PathSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Metadata => "metadata",
            Self::Initializer => "initializer",
            Self::Node => "node",
            Self::Checkpoint | Self::CheckpointAmbiguous => "checkpoint",
            Self::Bias => "bias",
            Self::Structure => "structure",
            Self::None => "none",
        })
    }
}

/// A candidate that is left alone, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Skipped {
    /// Node name.
    pub node: String,
    /// Operator.
    pub op: String,
    /// Why it is not replaced.
    pub reason: String,
    /// Its module path, when it is known. Not part of the JSON contract.
    #[serde(skip)]
    pub module_path: Option<String>,
}

/// Every candidate of a model, in one of two lists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteScan {
    /// To replace, in node order.
    pub sites: Vec<Site>,
    /// Products of activations to replace, in node order.
    pub products: Vec<Product>,
    /// To leave alone, in node order; those of sub-graphs and functions last.
    pub skipped: Vec<Skipped>,
    /// How much of the graph is in the checkpoint, when there is one.
    pub checkpoint: Option<CheckpointUse>,
}
