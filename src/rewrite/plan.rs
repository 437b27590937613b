//! The plan of a rewrite: which node becomes what. Pure and serialisable; making one changes nothing.

use mx_kernels::{QuantSpec, ScaleKind};
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{
    checkpoint::{CheckpointUse, PackedWeight},
    lowering::Lowering,
    products::PlannedProduct,
    recipe::{Recipe, SiteFormat},
    sites::{Site, SiteScan, Skipped},
};

/// A site and what it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedSite {
    /// The layer.
    pub site: Site,
    /// Its format.
    pub format: SiteFormat,
    /// Bytes of the weight as stored now.
    pub bytes_before: u64,
    /// Bytes of the weight (codes and scales) as stored afterwards.
    pub bytes_after: u64,
    /// Expected signal-to-quantisation-noise ratio of the weight in decibels, when it was measured
    /// ([`measure_plan`](super::measure_plan)).
    pub expected_sqnr: Option<f64>,
    /// Where codes and scales come from, when there is a checkpoint.
    pub weight_source: Option<WeightSource>,
    /// What else there is to know.
    pub note: Option<String>,
}

/// Where the codes and scales of a weight come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightSource {
    /// They are the checkpoint's, byte by byte.
    Checkpoint,
    /// They are made of the weight's values.
    Quantised,
}

impl PlannedSite {
    /// The codes and scales that are taken as they are.
    pub(crate) fn imported(&self) -> Option<&PackedWeight> {
        let imported = self.weight_source == Some(WeightSource::Checkpoint);
        self.site.packed.as_ref().filter(|_| imported)
    }
}

/// What a rewrite does to a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RewritePlan {
    /// Layers to replace, in node order.
    pub sites: Vec<PlannedSite>,
    /// Products of activations to replace, in node order.
    pub products: Vec<PlannedProduct>,
    /// Candidates left alone.
    pub skipped: Vec<Skipped>,
    /// The recipe that decided.
    pub recipe: Recipe,
    /// How much of the graph is in the checkpoint, when there is one.
    pub checkpoint: Option<CheckpointUse>,
}

impl RewritePlan {
    /// Gives every site of `scan` the format of the recipe's rule that took it. The scan has to come
    /// from the same recipe's filter.
    pub fn new(scan: SiteScan, mut recipe: Recipe) -> Self {
        // A checkpoint without packed weights makes no weight another than its rule says.
        recipe.packed &= scan.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.packed > 0);
        let mut skipped = scan.skipped;
        let sites = scan
            .sites
            .into_iter()
            .filter_map(|site| {
                let chosen = recipe.rules.get(site.rule)?.format?;
                let (format, weight_source, refused) = match scan.checkpoint {
                    Some(_) => import(&site, chosen, recipe.packed),
                    None => (chosen, None, None),
                };
                if let Some(reason) = no_form(&site, &format, recipe.lowering) {
                    let Site { node_name: node, op, module_path, .. } = site;
                    skipped.push(Skipped { node, op, reason, module_path });
                    return None;
                }
                let notes: Vec<String> = site.note.clone().into_iter().chain(refused).collect();
                let bytes_before = weight_bytes(&site);
                let bytes_after = planned_bytes(&site, &format, recipe.lowering);
                Some(PlannedSite {
                    site,
                    format,
                    bytes_before,
                    bytes_after,
                    expected_sqnr: None,
                    weight_source,
                    note: (!notes.is_empty()).then(|| notes.join("; ")),
                })
            })
            .collect();
        let products = scan.products.into_iter().filter_map(|product| {
            let format = recipe.rules.get(product.rule)?.format?;
            Some(PlannedProduct { product, format })
        });
        let products = products.collect();
        let checkpoint = scan.checkpoint;
        Self { sites, products, skipped, recipe, checkpoint }
    }

    /// True when nothing is to be replaced.
    pub fn is_empty(&self) -> bool {
        self.sites.is_empty() && self.products.is_empty()
    }

    /// Sums of `bytes_before` and `bytes_after` over all sites.
    pub fn bytes(&self) -> (u64, u64) {
        self.sites.iter().fold((0, 0), |(before, after), planned| {
            (before.saturating_add(planned.bytes_before), after.saturating_add(planned.bytes_after))
        })
    }
}

/// Why a layer cannot take a format: experts chosen at run time have an operator for block scales and
/// for none.
fn no_form(site: &Site, format: &SiteFormat, lowering: Lowering) -> Option<String> {
    let experts = site.experts.as_ref()?;
    let reason = match (lowering, format) {
        // The whole graph is rounded.
        (Lowering::Bf16 | Lowering::Fp16, _) => return None,
        (
            Lowering::Mx | Lowering::Bfp16 | Lowering::NvFp8EmuE4m3 | Lowering::NvFp8EmuE5m2,
            SiteFormat::Mx { weight, .. },
        ) if weight.scale != ScaleKind::Tensor => return None,
        (Lowering::Mx, _) => "its format has a scale a tensor".to_owned(),
        (lowering, _) => format!("--lower {lowering} has no form for that"),
    };
    Some(format!(
        "its weight is one of the {} experts in '{}', chosen at run time: {reason}",
        experts.count, site.weight.initializer
    ))
}

/// The format of a site for which a rule chose `chosen`, where its codes come from, and what is to be
/// noted: why they are not the checkpoint's although that has some, or what that changes else. `always`: they are, whatever the rule says.
fn import(
    site: &Site,
    chosen: SiteFormat,
    always: bool,
) -> (SiteFormat, Option<WeightSource>, Option<String>) {
    let quantised = |why| (chosen, Some(WeightSource::Quantised), why);
    let Some(packed) = &site.packed else { return quantised(None) };
    let SiteFormat::Mx { weight, activation } = chosen else { return quantised(None) };
    let stored = packed.spec(&weight);
    if always || weight == stored {
        // X is quantised in the weight's blocks, be they the rule's or the checkpoint's.
        let block_size = stored.block_size;
        let other = activation.filter(|spec| spec.block_size != block_size);
        let note = other.map(|spec| {
            format!(
                "blocks of {block_size}, as the checkpoint holds them, for the activation too, and not of {}",
                spec.block_size
            )
        });
        let activation = activation.map(|spec| QuantSpec { block_size, ..spec });
        let format = SiteFormat::Mx { weight: stored, activation };
        return (format, Some(WeightSource::Checkpoint), note);
    }
    let spelled = |spec: &QuantSpec| match spec.scale {
        ScaleKind::E8M0 => format!("{} in blocks of {}", spec.format, spec.block_size),
        scale => format!("{} with scale {}", spec.format, scale.name()),
    };
    quantised(Some(format!(
        "quantised again: the checkpoint holds {}, and {} is asked for",
        spelled(&stored),
        spelled(&weight)
    )))
}

fn weight_bytes(site: &Site) -> u64 {
    let element = crate::onnx::element_bits(site.weight.dtype).unwrap_or(32) / 8;
    (site.rows() as u64).saturating_mul(site.k as u64).saturating_mul(element)
}

fn planned_bytes(site: &Site, format: &SiteFormat, lowering: Lowering) -> u64 {
    match format {
        SiteFormat::Mx { weight, .. } => {
            let scales = match weight.scale {
                ScaleKind::E8M0 => weight.scales_len(site.rows(), site.k),
                ScaleKind::Tensor => 4,
                ScaleKind::None => 0,
            };
            let codes = match lowering {
                // Rows are not filled up to whole blocks.
                Lowering::Qdq => (site.rows() as u64)
                    .saturating_mul(site.k as u64)
                    .saturating_mul(weight.format.bits().into())
                    .div_ceil(8),
                _ => weight.codes_len(site.rows(), site.k) as u64,
            };
            codes.saturating_add(scales as u64)
        }
        // One scale of X's type an output channel.
        SiteFormat::Int8 => {
            let scale = crate::onnx::element_bits(site.weight.operand_dtype).unwrap_or(32) / 8;
            (site.rows() as u64).saturating_mul((site.k as u64).saturating_add(scale))
        }
        // Rounded in place.
        SiteFormat::Bf16 => weight_bytes(site),
        SiteFormat::Fp16 => (site.rows() as u64).saturating_mul(site.k as u64).saturating_mul(2),
    }
}

/// The JSON of one site; the keys are a contract with scripts.
#[derive(Serialize)]
struct SiteRecord<'a> {
    node: &'a str,
    op: &'a str,
    module_path: Option<&'a str>,
    path_source: super::PathSource,
    role: super::Role,
    initializer: &'a str,
    n: usize,
    k: usize,
    /// Of how many experts the weight is one, each n x k.
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<usize>,
    weight_format: &'a str,
    activation_format: &'a str,
    block_size: Option<usize>,
    path_confidence: &'a str,
    bytes_before: u64,
    bytes_after: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_sqnr_db: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_source: Option<WeightSource>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<&'a str>,
}

impl Serialize for PlannedSite {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Site { node_name, op, module_path, path_source, role, weight, n, k, .. } = &self.site;
        SiteRecord {
            node: node_name,
            op,
            module_path: module_path.as_deref(),
            path_source: *path_source,
            role: *role,
            initializer: &weight.initializer,
            n: *n,
            k: *k,
            experts: self.site.experts.as_ref().map(|experts| experts.count),
            weight_format: self.format.weight_name(),
            activation_format: self.format.activation_name(),
            block_size: self.format.block_size(),
            path_confidence: path_source.confidence(),
            bytes_before: self.bytes_before,
            bytes_after: self.bytes_after,
            expected_sqnr_db: self.expected_sqnr,
            weight_source: self.weight_source,
            note: self.note.as_deref(),
        }
        .serialize(serializer)
    }
}

impl Serialize for RewritePlan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("sites", &self.sites)?;
        if !self.products.is_empty() {
            map.serialize_entry("products", &self.products)?;
        }
        map.serialize_entry("skipped", &self.skipped)?;
        map.serialize_entry("recipe", &self.recipe)?;
        if let Some(checkpoint) = &self.checkpoint {
            map.serialize_entry("checkpoint", checkpoint)?;
        }
        map.end()
    }
}
