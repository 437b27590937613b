//! Copies of values in other types.

use super::{
    constants,
    walk::{Value, Walk},
};
use crate::{
    onnx::{DataType, NodeId},
    rewrite::lower::{float, int, node},
};

impl Walk<'_, '_, '_> {
    /// The name under which `value` is read in type `want`.
    pub(super) fn typed(&mut self, id: NodeId, value: &Value, want: DataType) -> String {
        if let Some((root, _)) = &value.constant
            && value.original == Some(self.types.own)
        {
            self.mark(&root.clone(), want == self.types.to && want != self.types.own);
        }
        if value.now == Some(want) || value.now.is_none() {
            return value.name.clone();
        }
        let key = (value.name.clone(), want);
        if let Some(copy) = self.scope.copies.get(&key) {
            return copy.clone();
        }
        let from = match value.content.wide && want != DataType::Float {
            true => self.limited(id, value, want),
            false => value.name.clone(),
        };
        let copy = self.insert_cast(id, &from, &value.name, want);
        self.scope.copies.insert(key, copy.clone());
        copy
    }

    pub(super) fn insert_cast(
        &mut self,
        at: NodeId,
        from: &str,
        base: &str,
        want: DataType,
    ) -> String {
        let copy = self.conversion.fresh(&format!("{base}.{}", type_label(Some(want))));
        let name = self.conversion.fresh(&format!("{copy}_cast"));
        let mut cast = node("Cast", &name, &[from], &[&copy]);
        cast.attribute.push(int("to", want as i64));
        self.graph.insert_before(at, cast);
        copy
    }

    /// The value limited to the range of `want`, in float32.
    pub(super) fn limited(&mut self, at: NodeId, value: &Value, want: DataType) -> String {
        let mut from = value.name.clone();
        if value.now != Some(DataType::Float) {
            from = self.insert_cast(at, &from, &value.name, DataType::Float);
        }
        let largest = constants::largest(want);
        let mut bound = |which: &str, number: f32| {
            let out = self.conversion.fresh(&format!("{}.{which}", value.name));
            let name = self.conversion.fresh(&format!("{out}_constant"));
            let mut constant = node("Constant", &name, &[], &[&out]);
            constant.attribute.push(float("value_float", number));
            self.graph.insert_before(at, constant);
            out
        };
        let (lower, upper) = (bound("lowest", -largest), bound("largest", largest));
        let out = self.conversion.fresh(&format!("{}.in_range", value.name));
        let name = self.conversion.fresh(&format!("{out}_clip"));
        self.graph.insert_before(at, node("Clip", &name, &[&from, &lower, &upper], &[&out]));
        out
    }
}

pub(super) fn type_label(data_type: Option<DataType>) -> &'static str {
    match data_type {
        Some(DataType::Bfloat16) => "bf16",
        Some(DataType::Float16) => "fp16",
        _ => "fp32",
    }
}
