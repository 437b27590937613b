//! What becomes of a node: computed in the new type, kept as it is, cast, or walked into.

use super::{
    constants::{self, Content},
    kernels::{self, Kernel},
    walk::{Types, Value, Walk},
};
use crate::{
    graph::domain,
    onnx::{DataType, NodeId, proto::Node},
    rewrite::{
        execute::ExecuteError,
        lower::{
            bf16::{classify::moves_constant, islands::ConstantShape, types},
            int, node,
        },
    },
};

impl Walk<'_, '_, '_> {
    /// A node that keeps all its types; with `exact`, its inputs are given as they were.
    pub(super) fn keep_types(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
        exact: bool,
        model: bool,
    ) {
        let mut changed = original.clone();
        let moved = self.moved(original, inputs);
        for (slot, value) in inputs.iter().enumerate().filter(|(_, v)| !v.name.is_empty()) {
            changed.input[slot] = match value.original.filter(|&t| exact && types::is_float(t)) {
                // Who reads the moved constant decides.
                Some(_) if moved.is_some() && slot == 0 => value.name.clone(),
                Some(data_type) => self.typed(id, value, data_type),
                None => value.name.clone(),
            };
        }
        let mut content = Content {
            wide: inputs.iter().any(|value| value.content.wide),
            inexact: moved.is_some() && inputs[0].content.inexact,
        };
        if original.op_type.as_deref() == Some("ConstantOfShape") {
            let looked = constants::look_node(self.conversion.model, original, self.types.to);
            content.wide |= looked.is_ok_and(|looked| looked.wide);
        }
        for (index, name) in original.output.iter().enumerate() {
            let data_type = self.output_type(original, index, inputs);
            let float = data_type.is_some_and(types::is_float);
            let value = Value {
                name: name.clone(),
                original: data_type,
                now: data_type,
                model: model && float,
                constant: moved.clone(),
                content,
                kept: self.keep.contains(name) && model,
            };
            self.scope.values.insert(name.clone(), value);
        }
        self.put(id, changed);
    }

    /// The constant whose elements, in their own type, are the node's result.
    pub(super) fn moved(&self, node: &Node, inputs: &[Value]) -> Option<(String, ConstantShape)> {
        let first =
            inputs.first().filter(|_| moves_constant(node.op_type.as_deref().unwrap_or("")))?;
        let same = first.original.is_some() && first.original == self.output_type(node, 0, inputs);
        first.constant.clone().filter(|_| same)
    }

    pub(super) fn put(&mut self, id: NodeId, changed: Node) {
        if changed != *self.graph.node(id) {
            self.graph.replace_node(id, changed);
        }
    }

    pub(super) fn output_type(
        &self,
        node: &Node,
        index: usize,
        inputs: &[Value],
    ) -> Option<DataType> {
        let types: Vec<_> = inputs.iter().map(|value| value.original).collect();
        let declared = self.declared.get(&node.output[index]).copied();
        declared.or_else(|| types::inferred(node, index, &types))
    }

    /// A node in the new type, or in float32 where it cannot be.
    pub(super) fn compute(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
        kernel: Option<Kernel>,
    ) -> Result<(), ExecuteError> {
        let Types { own, to, opset, label } = self.types;
        let Some(kernel) = kernel.or_else(|| self.fallback(original)) else {
            self.keep_types(id, original, inputs, true, true);
            return Ok(());
        };
        for (slot, value) in inputs.iter().enumerate() {
            if kernel.takes_input(slot) && value.original.is_none() && !value.name.is_empty() {
                let reason = format!(
                    "the type of value '{}', which node '{}' reads, is not known; run ONNX's shape \
                     inference on the model first",
                    value.name,
                    original.name.as_deref().unwrap_or("")
                );
                return Err(ExecuteError::Unsupported { lowering: label, reason });
            }
        }
        let group =
            |slot: usize, value: &Value| kernel.takes_input(slot) && value.original == Some(own);
        let kept = |name: &String| self.keep.contains(name);
        let widened = own == DataType::Float && scales(original);
        let exact_in = |value: &Value| !(value.content.inexact && widened);
        let fits = kernel.computes_in(to, opset)
            && !original.output.iter().any(kept)
            && inputs
                .iter()
                .enumerate()
                .all(|(slot, value)| !group(slot, value) || (!value.kept && exact_in(value)));
        let data_type = if fits { to } else { DataType::Float };
        let mut changed = original.clone();
        for (slot, value) in inputs.iter().enumerate().filter(|(_, v)| !v.name.is_empty()) {
            let float = value.original.filter(|&t| types::is_float(t));
            changed.input[slot] = match float {
                Some(_) if group(slot, value) => self.typed(id, value, data_type),
                Some(other) => self.typed(id, value, other),
                None => value.name.clone(),
            };
        }
        let moved = self.moved(original, inputs);
        for (index, name) in original.output.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
            let was = self.output_type(original, index, inputs);
            let grouped = kernel.takes_output(index) && was == Some(own);
            let now = if grouped { Some(data_type) } else { was };
            let kept = self.keep.contains(name) && now == Some(DataType::Float);
            let constant = moved.clone();
            let mut value = Value {
                original: was,
                now,
                model: constant.is_none(),
                kept,
                constant,
                ..Value::default()
            };
            value.name = self.output_name(name, now, was);
            changed.output[index].clone_from(&value.name);
            self.scope.values.insert(name.clone(), value);
        }
        self.put(id, changed);
        Ok(())
    }

    /// A standard operator without a kernel in 16 bits computes in float32; of others nothing is known.
    pub(super) fn fallback(&self, node: &Node) -> Option<Kernel> {
        let known = domain(node).is_empty() && !holds_type(node);
        (known && self.types.own != DataType::Float).then(kernels::float_only)
    }

    /// What a result is called: a graph output keeps its name for the value of its declared type.
    pub(super) fn output_name(
        &mut self,
        name: &str,
        now: Option<DataType>,
        was: Option<DataType>,
    ) -> String {
        if now == was {
            return name.to_owned();
        }
        if let Some(now) = now.filter(|_| self.caches.contains(name)) {
            self.graph.retype(name, now);
            return name.to_owned();
        }
        if !self.outputs.iter().any(|output| output == name) {
            self.stale.insert(name.to_owned());
            return name.to_owned();
        }
        let base = now.map_or_else(|| name.to_owned(), |now| super::cast_output_name(name, now));
        self.conversion.fresh(&base)
    }

    pub(super) fn cast(&mut self, id: NodeId, original: &Node, inputs: &[Value]) {
        let Types { own, to, .. } = self.types;
        let target = self.output_type(original, 0, inputs);
        let Some(value) = inputs.first() else { return };
        let float = value.original.is_some_and(types::is_float);
        // In a float32 model only what comes from activations changes; Casts from other types are
        // positions and masks.
        let moves = own != DataType::Float || (float && value.model);
        let constant = value.constant.clone().filter(|_| float && target == Some(own));
        let settled = constant.is_some() && own == DataType::Float;
        let ours = target == Some(own)
            && ((moves && constant.is_none()) || settled && value.now == Some(to));
        if !ours {
            self.keep_types(id, original, inputs, false, value.model);
            return;
        }
        let name = &original.output[0];
        let kept = self.keep.contains(name);
        let now = if kept { DataType::Float } else { to };
        let mut changed = node("Cast", original.name.as_deref().unwrap_or(""), &[&value.name], &[]);
        changed.attribute.push(int("to", now as i64));
        changed.metadata_props.clone_from(&original.metadata_props);
        changed.doc_string.clone_from(&original.doc_string);
        if value.content.wide && now != DataType::Float {
            changed.input[0] = self.limited(id, value, now);
        }
        let result = Value {
            name: self.output_name(name, Some(now), target),
            original: target,
            now: Some(now),
            model: constant.is_none(),
            kept,
            constant,
            content: Content::default(),
        };
        changed.output = vec![result.name.clone()];
        self.scope.values.insert(name.clone(), result);
        self.put(id, changed);
    }

    /// If, Loop, Scan: types stay at their borders.
    pub(super) fn control_flow(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
    ) -> Result<(), ExecuteError> {
        let mut bodies = self.source.subgraphs(id)?.into_iter();
        let mut bodied = original.clone();
        let mut model = inputs.iter().any(|value| value.model);
        for attribute in &mut bodied.attribute {
            for bytes in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                // Parsed from these very attributes, in this order.
                let Some((_, mut body)) = bodies.next() else { break };
                model |= self.conversion.graph(&mut body, &self.scope)?;
                *bytes = body.to_bytes()?;
            }
        }
        self.keep_types(id, &bodied, inputs, true, model);
        Ok(())
    }
}

/// Operators that multiply by, or add, a number of the formula.
fn scales(node: &Node) -> bool {
    matches!(node.op_type.as_deref(), Some("Mul" | "Div" | "Add" | "Sub" | "Pow"))
}

/// Operators whose attributes name the type of the result.
fn holds_type(node: &Node) -> bool {
    let names = ["dtype", "to", "value", "output_dtype"];
    node.attribute.iter().any(|a| a.name.as_deref().is_some_and(|name| names.contains(&name)))
}
