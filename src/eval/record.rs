//! One line of results.jsonl.

use super::figures::Statistics;
use super::metrics::Metrics;
use serde::{Deserialize, Serialize};

/// How a stage ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It ran; the figures are there.
    Ok,
    /// It does not apply here; the reason says why.
    Skipped,
    /// It went wrong; the reason says how.
    Failed,
    /// It was interrupted; the figures are of the documents done until then, as the reason says.
    Partial,
}

impl Status {
    /// The name in records and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
            Self::Partial => "partial",
        }
    }
}

/// The result of one stage. Fields without a value are null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The model, as named on the command line.
    pub model: String,
    /// The stage.
    pub stage: String,
    /// Selection of layers; null where the whole graph is concerned.
    pub tier: Option<String>,
    /// Format of the replaced weights; null for the model's own.
    pub weight_format: Option<String>,
    /// Format of the activations that meet them; null for the model's own.
    pub activation_format: Option<String>,
    /// How it ended.
    pub status: Status,
    /// Why it did not run or failed; of a stage that is ok, what happened on the way.
    pub reason: Option<String>,
    /// Linear layers replaced.
    pub sites_replaced: Option<u64>,
    /// Documents that scored anything.
    pub docs: Option<u64>,
    /// Scored tokens.
    pub tokens: Option<u64>,
    /// UTF-8 bytes that the scored tokens cover.
    pub bytes: Option<u64>,
    /// Mean -ln p, nats a token.
    pub xent: Option<f64>,
    /// exp(xent).
    pub ppl: Option<f64>,
    /// Mean entropy of the predicted distribution, nats.
    pub entropy: Option<f64>,
    /// Bits a byte of text.
    pub bits_per_byte: Option<f64>,
    /// Seconds spent scoring, without rewriting and loading; on a GPU one batch is run before the
    /// clock starts.
    pub seconds: Option<f64>,
    /// Scored tokens a second.
    pub tokens_per_second: Option<f64>,
    /// Bytes of the graph's file and its external data.
    pub model_bytes: Option<u64>,
    /// Peak resident memory of the process during the stage; on GPUs the peak of device memory in
    /// use beyond what was in use before the run, sampled, all workers of the devices together.
    pub peak_memory_bytes: Option<u64>,
    /// Where it ran.
    pub device: String,
    /// Seconds to load the model: file to a session that can run.
    #[serde(default)]
    pub load_seconds: Option<f64>,
    /// Peak resident memory of the process during the stage; null where stages ran side by side.
    #[serde(default)]
    pub peak_resident_bytes: Option<u64>,
    /// Peak device memory in use beyond what was in use before, sampled.
    #[serde(default)]
    pub peak_device_bytes: Option<u64>,
    /// Mean bits of a weight of the replaced layers, scales included; of the baseline, in its type.
    #[serde(default)]
    pub bits_per_weight: Option<f64>,
    /// Tokens a second over the baseline's, both measured in turns on the same batches.
    #[serde(default)]
    pub speed_ratio: Option<f64>,
    /// How the figures are defined (`--mode` and its options), in short.
    #[serde(default)]
    pub definition: Option<String>,
    /// Intervals, subsets, comparison with the baseline.
    #[serde(default)]
    pub statistics: Option<Statistics>,
}

impl Record {
    /// A record without figures.
    pub fn new(model: &str, stage: &str, device: &str, status: Status) -> Self {
        Self {
            model: model.into(),
            stage: stage.into(),
            tier: None,
            weight_format: None,
            activation_format: None,
            status,
            reason: None,
            sites_replaced: None,
            docs: None,
            tokens: None,
            bytes: None,
            xent: None,
            ppl: None,
            entropy: None,
            bits_per_byte: None,
            seconds: None,
            tokens_per_second: None,
            model_bytes: None,
            peak_memory_bytes: None,
            device: device.into(),
            load_seconds: None,
            peak_resident_bytes: None,
            peak_device_bytes: None,
            bits_per_weight: None,
            speed_ratio: None,
            definition: None,
            statistics: None,
        }
    }

    /// Fills in the figures of a corpus.
    pub fn set_metrics(&mut self, metrics: &Metrics, seconds: f64) {
        self.docs = Some(metrics.docs);
        self.tokens = Some(metrics.tokens);
        self.bytes = Some(metrics.bytes);
        self.xent = Some(metrics.xent);
        self.ppl = finite(metrics.ppl);
        self.entropy = Some(metrics.entropy);
        self.bits_per_byte = finite(metrics.bits_per_byte);
        self.seconds = Some(seconds);
        self.tokens_per_second = finite(metrics.tokens as f64 / seconds);
    }
}

/// JSON has no infinity: a perplexity beyond float64 and bits over no byte are null.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_the_designs_in_its_order() {
        let design = "model, stage, tier, weight_format, activation_format, status, reason, \
                      sites_replaced, docs, tokens, bytes, xent, ppl, entropy, bits_per_byte, \
                      seconds, tokens_per_second, model_bytes, peak_memory_bytes, device";
        let record = Record::new("m.onnx", "nvfp8", "cpu", Status::Skipped);
        let line = serde_json::to_string(&record).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        let keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let further = "load_seconds, peak_resident_bytes, peak_device_bytes, bits_per_weight, \
                       speed_ratio, definition, statistics";
        assert_eq!(keys.join(", "), format!("{design}, {further}"));
        assert_eq!(value["status"], "skipped");
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record);
    }

    #[test]
    fn figures_beyond_json_are_null() {
        let mut record = Record::new("m", "s", "cpu", Status::Ok);
        let metrics = Metrics {
            docs: 1,
            tokens: 1,
            bytes: 0,
            xent: 1e4,
            ppl: f64::INFINITY,
            entropy: 0.0,
            bits_per_byte: f64::INFINITY,
        };
        record.set_metrics(&metrics, 0.5);
        assert_eq!(
            (record.ppl, record.bits_per_byte, record.tokens_per_second),
            (None, None, Some(2.0))
        );
    }
}
