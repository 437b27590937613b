//! A decode step: one more token for every row, on top of a cache that an earlier run returned.

use super::{Feeds, Role, numbers};
use crate::onnx::proto::DataType;
use ort::value::DynValue;

/// Makes the tensor of a cache input, by its name, in the type that the graph asks for.
pub type Cache<'a> = dyn Fn(&str, DataType) -> ort::Result<DynValue> + 'a;

impl Feeds {
    /// Whether the graph takes a cache of any length, so that it can be stepped.
    pub fn steps(&self) -> bool {
        self.columns.is_none() && self.cache_inputs().next().is_some()
    }

    /// Names of the cache's inputs, in the graph's order.
    pub fn cache_inputs(&self) -> impl Iterator<Item = &str> {
        self.feeds.iter().filter(|feed| feed.role == Role::Past).map(|feed| feed.name.as_str())
    }

    /// The inputs of a step: `tokens` has one id a row, `past` tokens of every row are in the cache.
    ///
    /// # Errors
    /// ONNX Runtime refuses a tensor; an error of `cache`.
    pub fn step(
        &self,
        tokens: &[i64],
        past: usize,
        cache: &Cache<'_>,
    ) -> ort::Result<Vec<(String, DynValue)>> {
        let (rows, at) = (tokens.len(), past as i64);
        let mut tensors = Vec::with_capacity(self.feeds.len());
        for feed in &self.feeds {
            let value = match feed.role {
                // The scoring node's, which is not in a graph that is stepped.
                Role::Labels => continue,
                Role::Past => cache(&feed.name, feed.element)?,
                Role::Ids => numbers(feed.element, vec![rows, 1], tokens.to_vec())?,
                Role::Mask => {
                    numbers(feed.element, vec![rows, past + 1], vec![1; rows * (past + 1)])?
                }
                Role::Positions => numbers(feed.element, vec![rows, 1], vec![at; rows])?,
                Role::TokenTypes => numbers(feed.element, vec![rows, 1], vec![0; rows])?,
                Role::CachePositions => numbers(feed.element, vec![1], vec![at])?,
                Role::UseCache => numbers(feed.element, vec![1; feed.rank], vec![1])?,
                Role::LogitsToKeep => numbers(feed.element, vec![1; feed.rank], vec![0])?,
            };
            tensors.push((feed.name.clone(), value));
        }
        Ok(tensors)
    }
}
