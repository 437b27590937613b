//! What other commands leave for a report: the sensitivity of sites, the front of a search.

use crate::eval::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What `mxeval sensitivity` writes; fields that a report does not use are ignored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sensitivity {
    /// The model that was measured.
    pub model: SensitivityModel,
    /// One entry a site.
    pub sites: Vec<SiteSensitivity>,
}

/// The model that sites were measured in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SensitivityModel {
    /// SHA-256 of the model and its external data.
    pub sha256: String,
}

/// One site.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SiteSensitivity {
    /// Its module path.
    pub site: String,
    /// Its layer; null for what belongs to none, such as the head.
    pub layer: Option<u64>,
    /// What it does in the layer, as the rewriter names it.
    pub role: String,
    /// By format, with every other site at baseline.
    pub formats: BTreeMap<String, FormatSensitivity>,
}

/// A site in one format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FormatSensitivity {
    /// Difference of xent to the baseline, nats a token.
    pub delta_xent: Option<f64>,
    /// Mean KL(baseline || variant), nats a token.
    pub kl: Option<f64>,
    /// Bits a weight, scales included.
    #[serde(alias = "bits_per_weight")]
    pub bits: Option<f64>,
}

/// A recipe of the search.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ParetoPoint {
    /// Mean bits of a replaced weight, scales included.
    pub bits_per_weight: Option<f64>,
    /// Bytes of the model.
    pub bytes: Option<u64>,
    /// Difference of xent to the baseline, nats a token.
    pub delta_xent: Option<f64>,
    /// What to call it.
    pub label: String,
}

impl Sensitivity {
    /// Reads the file; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        read(path, "a file of `mxeval sensitivity`")
    }
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path, what: &str) -> Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io(path))?,
    };
    let value = serde_json::from_slice(&bytes).map_err(|error| {
        Error::Output(format!("{}: not {what} ({error}); make it again", path.display()))
    })?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_fields_have_defaults_and_unknown_ones_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sensitivity.json");
        assert_eq!(Sensitivity::read(&path).unwrap(), None);
        let text = r#"{"seed": 1, "sites": [{"site": "a", "formats": {"fp4_e2m1": {"kl": 0.5}}}]}"#;
        std::fs::write(&path, text).unwrap();
        let read = Sensitivity::read(&path).unwrap().unwrap();
        assert_eq!((read.sites[0].layer, read.sites[0].role.as_str()), (None, ""));
        let of = read.sites[0].formats["fp4_e2m1"];
        assert_eq!((of.kl, of.delta_xent), (Some(0.5), None));
        std::fs::write(&path, "7").unwrap();
        let error = Sensitivity::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("sensitivity.json") && error.contains("mxeval sensitivity"),
            "{error}"
        );
    }
}
