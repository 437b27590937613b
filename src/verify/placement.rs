//! Which node ran where, and whether every MX node ran as one.

use std::collections::{BTreeMap, HashMap, HashSet};

use mx_custom_ops::{contract::DOMAIN, ran::Ran};
use serde::Serialize;

use super::{bodies::Bodies, plan::Plan, profile::Executed};
use crate::{
    eval::devices::Device,
    onnx::{self, Model, proto::Node},
    rewrite::MODULE_PATH_KEY,
};

/// Nodes of one operator on one execution provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OpCount {
    /// Execution provider.
    pub provider: String,
    /// Operator, after ONNX Runtime's optimiser.
    pub op: String,
    /// Nodes.
    pub nodes: u64,
    /// Their runs.
    pub runs: u64,
}

/// A node of domain `mx` in the model, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MxNode {
    /// Its name, made unique where the model's is not.
    pub node: String,
    /// Its name in the model; empty where it has none.
    #[serde(skip)]
    own: String,
    /// Operator.
    pub op: String,
    /// Module path, where the model says one.
    pub module_path: Option<String>,
    /// The body that it stands in; `None` = the main graph.
    pub body: Option<String>,
    /// Element format of the weight, as the node says; of the first operand where both are activations.
    pub weight_format: Option<String>,
    /// Element format of the activation; of the second operand where both are.
    pub activation_format: Option<String>,
    /// Execution provider that ran it; `None` = it did not run.
    pub provider: Option<String>,
    /// Kernels that computed it: `avx512`, `avx2`, `scalar` on the CPU; `fused`, `wide`, `dense`,
    /// `fp8 cublaslt` ... on a GPU. Empty when every run had no rows to compute.
    pub kernels: Vec<String>,
    /// How often it ran.
    pub runs: u64,
}

/// Which node ran where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// Nodes by provider and operator.
    pub ops: Vec<OpCount>,
    /// Every MX node of the model.
    pub mx_nodes: Vec<MxNode>,
    /// MX nodes that did not run as such, planned ones that are not there.
    #[serde(skip)]
    pub failures: Vec<String>,
    /// What did not run for a reason.
    #[serde(skip)]
    pub notes: Vec<String>,
}

/// Names of a model's nodes of domain `mx`, in the bodies of If, Loop and Scan, too.
///
/// # Errors
/// A body that cannot be read.
pub fn mx_node_names(model: &Model) -> onnx::Result<Vec<String>> {
    let bodies = Bodies::new(model)?;
    let nodes = (0..bodies.branches.len()).flat_map(|at| bodies.graph(at).nodes());
    let ours = nodes.filter(|(_, node)| node.domain.as_deref() == Some(DOMAIN));
    Ok(ours.map(|(_, node)| node.name.clone().unwrap_or_default()).collect())
}

/// A copy of the model in which every MX node has a name of its own, and the list of these nodes.
pub(super) fn name_mx_nodes(model: &Model) -> onnx::Result<(Model, Vec<MxNode>)> {
    let mut bodies = Bodies::new(model)?;
    let mut taken: HashSet<String> = HashSet::new();
    let every = |bodies: &Bodies| -> Vec<_> {
        let nodes = |at: usize| {
            let of = |(id, node): (_, &Node)| (at, id, node.clone());
            bodies.graph(at).nodes().map(of).collect::<Vec<_>>()
        };
        (0..bodies.branches.len()).flat_map(nodes).collect()
    };
    let nodes = every(&bodies);
    let mut uses: HashMap<&str, u32> = HashMap::new();
    for (_, _, node) in &nodes {
        *uses.entry(node.name.as_deref().unwrap_or("")).or_default() += 1;
    }
    let (mut found, mut renamed) = (Vec::new(), false);
    for (at, id, node) in &nodes {
        if node.domain.as_deref() != Some(DOMAIN) {
            continue;
        }
        let own = node.name.as_deref().unwrap_or("");
        let mut name = own.to_owned();
        if own.is_empty() || uses[own] > 1 {
            let mut count = 0;
            while name.is_empty() || uses.contains_key(name.as_str()) || taken.contains(&name) {
                name = format!("{own}#{count}");
                count += 1;
            }
            bodies
                .graph_mut(*at)
                .replace_node(*id, Node { name: Some(name.clone()), ..node.clone() });
            renamed = true;
        }
        taken.insert(name.clone());
        found.push(describe(name, node, &bodies.branches[*at].title));
    }
    let model = if renamed { bodies.finish()? } else { model.clone() };
    Ok((model, found))
}

fn describe(name: String, node: &Node, body: &str) -> MxNode {
    let text = |wanted: &str| {
        let found = node.attribute.iter().find(|a| a.name.as_deref() == Some(wanted))?;
        String::from_utf8(found.s.as_ref()?.to_vec()).ok()
    };
    let path = node.metadata_props.iter().find(|e| e.key.as_deref() == Some(MODULE_PATH_KEY));
    MxNode {
        node: name,
        own: node.name.clone().unwrap_or_default(),
        op: node.op_type.clone().unwrap_or_default(),
        module_path: path.and_then(|entry| entry.value.clone()),
        body: (!body.is_empty()).then(|| body.to_owned()),
        weight_format: text("weight_format").or_else(|| text("a_format")),
        activation_format: text("activation_format").or_else(|| text("b_format")),
        provider: None,
        kernels: Vec::new(),
        runs: 0,
    }
}

impl Placement {
    /// Puts together what the model holds (`mx_nodes`, `plan`), what ONNX Runtime says it ran and what
    /// the kernels say themselves.
    pub(super) fn new(
        mx_nodes: Vec<MxNode>,
        plan: Option<&Plan>,
        executed: &[Executed],
        ran: &[Ran],
        device: Device,
    ) -> Self {
        let mut placement = Self { ops: count(executed), mx_nodes, ..Self::default() };
        placement.require_planned(plan);
        let mut mx_nodes = std::mem::take(&mut placement.mx_nodes);
        for node in &mut mx_nodes {
            placement.place(node, executed, ran, device);
        }
        placement.mx_nodes = mx_nodes;
        placement
    }

    /// Every planned layer and product has to have its node, of its operator.
    fn require_planned(&mut self, plan: Option<&Plan>) {
        let Some(plan) = plan else { return };
        let mut left: Vec<&MxNode> = self.mx_nodes.iter().collect();
        for due in plan.due() {
            // A node without a name is `#index` in a plan.
            let nameless = due.node.strip_prefix('#').is_some_and(|n| n.parse::<usize>().is_ok());
            let of = |name: &str| {
                left.iter().position(|node| node.own == name && due.ops.contains(&&*node.op))
            };
            match of(due.node).or_else(|| nameless.then(|| of("")).flatten()) {
                Some(found) => drop(left.swap_remove(found)),
                None => self.failures.push(format!(
                    "{} is planned as {}, but the model has no MX node of this name that is one",
                    shown(due.node, due.module_path),
                    due.ops.join(" or ")
                )),
            }
        }
    }

    fn place(&mut self, node: &mut MxNode, executed: &[Executed], ran: &[Ran], device: Device) {
        let name = shown(&node.node, node.module_path.as_deref());
        let events: Vec<&Executed> = executed.iter().filter(|e| e.node == node.node).collect();
        let (own, other): (Vec<_>, Vec<_>) = events.into_iter().partition(|e| e.op == node.op);
        let kernels: Vec<&Ran> = ran.iter().filter(|r| r.node == node.node).collect();
        node.kernels = kernels.iter().map(|ran| ran.kernel.to_owned()).collect();
        node.runs = own.iter().map(|event| event.runs).sum();
        node.provider = own.first().map(|event| event.provider.clone());
        if let Some(other) = other.first() {
            self.failures.push(format!("{name} ran as {}, not as {}", other.op, node.op));
        }
        if node.provider.is_none() {
            // The profile goes by names, which an optimiser may change; a kernel knows its node's.
            node.provider = kernels.first().map(|ran| provider(ran.provider).to_owned());
            node.runs = kernels.iter().map(|ran| ran.runs).sum();
        }
        let on_cpu = own.iter().any(|event| event.provider == provider("cpu"))
            || kernels.iter().any(|ran| ran.provider == "cpu");
        match (&node.provider, &node.body) {
            (None, None) => self.failures.push(format!("{name} was not run")),
            (None, Some(body)) => {
                self.notes
                    .push(format!("{name} was not run with these inputs: it is in the {body}"));
            }
            (Some(_), _) if device != Device::Cpu && on_cpu => {
                self.failures.push(format!("{name} ran on the CPU, not on {device}"));
            }
            _ => {}
        }
    }
}

/// ONNX Runtime's name of the provider whose kernels say `short`.
fn provider(short: &str) -> &'static str {
    match short {
        "cuda" => "CUDAExecutionProvider",
        _ => "CPUExecutionProvider",
    }
}

fn shown(node: &str, path: Option<&str>) -> String {
    match path {
        Some(path) => format!("node '{node}' ({path})"),
        None => format!("node '{node}'"),
    }
}

fn count(executed: &[Executed]) -> Vec<OpCount> {
    let mut counts: BTreeMap<(&str, &str), (u64, u64)> = BTreeMap::new();
    for event in executed {
        let count = counts.entry((&event.provider, &event.op)).or_default();
        *count = (count.0 + 1, count.1 + event.runs);
    }
    let row = |((provider, op), (nodes, runs)): ((&str, &str), _)| OpCount {
        provider: provider.to_owned(),
        op: op.to_owned(),
        nodes,
        runs,
    };
    counts.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, body: Option<&str>) -> MxNode {
        MxNode {
            node: name.to_owned(),
            own: name.to_owned(),
            op: "MxMatMul".to_owned(),
            module_path: None,
            body: body.map(str::to_owned),
            weight_format: None,
            activation_format: None,
            provider: None,
            kernels: Vec::new(),
            runs: 0,
        }
    }

    fn event(node: &str, op: &str, provider: &str) -> Executed {
        Executed {
            node: node.to_owned(),
            op: op.to_owned(),
            provider: format!("{provider}ExecutionProvider"),
            runs: 1,
        }
    }

    fn ran(node: &str, provider: &'static str, kernel: &'static str) -> Ran {
        Ran { node: node.to_owned(), op: "MxMatMul", provider, kernel, runs: 1 }
    }

    fn placed(executed: &[Executed], ran: &[Ran], device: Device) -> Placement {
        let nodes = vec![node("a", None), node("b", Some("then_branch of If c"))];
        Placement::new(nodes, None, executed, ran, device)
    }

    #[test]
    fn nodes_that_ran_as_they_should_are_no_failure() {
        let executed = [event("a", "MxMatMul", "CUDA"), event("b", "MxMatMul", "CUDA")];
        let kernels =
            [ran("a", "cuda", "fused"), ran("a", "cuda", "wide"), ran("b", "cuda", "wide")];
        let placement = placed(&executed, &kernels, Device::Cuda(0));
        assert!(placement.failures.is_empty() && placement.notes.is_empty(), "{placement:?}");
        assert_eq!(placement.mx_nodes[0].kernels, ["fused", "wide"]);
        let count = &placement.ops[0];
        assert_eq!((count.op.as_str(), count.nodes, count.runs), ("MxMatMul", 2, 2));
    }

    #[test]
    fn a_node_on_the_cpu_fails_where_a_gpu_was_asked_for() {
        let executed = [event("a", "MxMatMul", "CPU"), event("b", "MxMatMul", "CUDA")];
        let kernels = [ran("a", "cpu", "avx2"), ran("b", "cuda", "fused")];
        let [failure] = &placed(&executed, &kernels, Device::Cuda(1)).failures[..] else {
            panic!()
        };
        assert_eq!(failure, "node 'a' ran on the CPU, not on cuda:1");
        assert!(placed(&executed, &kernels, Device::Cpu).failures.is_empty());
    }

    #[test]
    fn what_did_not_run_fails_but_in_a_branch_that_was_not_taken() {
        let placement = placed(&[], &[], Device::Cpu);
        assert_eq!(placement.failures, ["node 'a' was not run"]);
        assert!(placement.notes[0].contains("then_branch of If c"), "{:?}", placement.notes);
        let other = placed(&[event("a", "MatMul", "CPU")], &[], Device::Cpu);
        assert_eq!(other.failures[0], "node 'a' ran as MatMul, not as MxMatMul");
        // The optimiser may have changed the name; the kernel knows its own.
        let renamed =
            placed(&[event("x", "MxMatMul", "CPU")], &[ran("a", "cpu", "avx2")], Device::Cpu);
        assert!(renamed.failures.is_empty());
        assert_eq!(renamed.mx_nodes[0].provider.as_deref(), Some("CPUExecutionProvider"));
    }
    #[test]
    fn every_planned_layer_and_product_has_to_be_there_as_its_operator() {
        let plan: Plan = serde_json::from_value(serde_json::json!({
            "sites": [{ "node": "foo#1" }, { "node": "#7" }, { "node": "twice" }, { "node": "twice" }],
            "products": [{ "node": "scores", "module_path": "layers.0.self_attn" }],
            "recipe": { "lowering": "mx" },
        }))
        .unwrap();
        let named = |own: &str, op: &str| MxNode {
            own: own.to_owned(),
            op: op.to_owned(),
            ..node(&format!("{own}#0"), None)
        };
        let failures = |nodes: Vec<MxNode>| {
            let mut placement = Placement { mx_nodes: nodes, ..Placement::default() };
            placement.require_planned(Some(&plan));
            placement.failures
        };
        let nodes = vec![
            named("twice", "MxMatMul"),
            named("scores", "MxActMatMul"),
            named("", "MxMatMul"),
            named("twice", "MxExpertMatMul"),
            named("foo#1", "MxMatMul"),
        ];
        assert_eq!(failures(nodes.clone()), [""; 0]);
        for index in 0..nodes.len() {
            let mut less = nodes.clone();
            less.remove(index);
            assert_eq!(failures(less).len(), 1, "without {:?}", nodes[index]);
        }
        // Another operator of the name, and another node of nearly the name, are not it.
        let mut other = nodes.clone();
        (other[1].op, other[4].own) = ("MxMatMul".to_owned(), "foo#2".to_owned());
        let [layer, product] = &failures(other)[..] else { panic!() };
        assert!(layer.contains("'foo#1' is planned as MxMatMul or MxExpertMatMul"), "{layer}");
        assert!(product.contains("'scores' (layers.0.self_attn)"), "{product}");
    }
}
