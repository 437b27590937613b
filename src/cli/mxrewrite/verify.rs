//! `mxrewrite verify` and `--check`.

use std::path::{Path, PathBuf};

use crate::{
    eval::devices::Request,
    verify::{Size, Source, VerifyOptions, VerifyReport, verify},
};
use clap::Args;

/// Run two models side by side and compare what they compute
///
/// Both are fed the same in ONNX Runtime. Every output is compared and, with --layers, every replaced layer.
/// ONNX Runtime's profile and the kernels themselves say which node ran where: a planned layer without its
/// MX node, an MX node that did not run as one, or one on the CPU although a GPU was asked for, fails.
#[derive(Args, Debug)]
#[command(after_help = VERIFY_EXAMPLES)]
pub struct VerifyArgs {
    /// The original
    #[arg(value_name = "A.onnx")]
    a: PathBuf,
    /// What is held against it
    #[arg(value_name = "B.onnx")]
    b: PathBuf,
    /// Inputs: text (.parquet, .jsonl[.zst], .txt), which needs --tokenizer, or .safetensors with one
    /// tensor an input [default: random tokens; random numbers for graphs without input_ids]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// The model's tokenizer.json, for text
    #[arg(long, value_name = "FILE", requires = "data")]
    tokenizer: Option<PathBuf>,
    /// Where the random numbers start
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "data")]
    seed: u64,
    /// Samples; with a cache, each is followed by a decode step [default: 2]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// Tokens of a sample [default: 64]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    seq_len: Option<u32>,
    /// Where both run: cpu, cuda, cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = one_device)]
    device: Request,
    /// Compare every replaced layer, too: in the model, and alone on what A's layer is fed
    #[arg(long)]
    layers: bool,
    /// Fail when an output is off by more than this
    #[arg(long, value_name = "X", value_parser = bound, allow_negative_numbers = true)]
    max_error: Option<f64>,
    /// Fail when a float output, or with --layers a layer alone, has a lower signal-to-noise ratio, or
    /// when a layer cannot be compared
    #[arg(long, value_name = "DB", value_parser = decibels, allow_negative_numbers = true)]
    min_sqnr: Option<f64>,
    /// libonnxruntime [default: ORT_DYLIB_PATH, beside mxrewrite, the onnxruntime Python package]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  mxrewrite verify model.onnx model.full-fp8_e4m3.onnx --layers
  mxrewrite verify model.onnx out.onnx --data text.jsonl --tokenizer tokenizer.json --min-sqnr 20

Exit codes: 0 nothing wrong, 1 something is (the list ends the report), 2 usage.";

fn bound(text: &str) -> Result<f64, String> {
    let bound = text.parse::<f64>().ok().filter(|bound| bound.is_finite() && *bound >= 0.0);
    bound.ok_or_else(|| "an error is a number from 0 on".to_owned())
}

fn decibels(text: &str) -> Result<f64, String> {
    let bound = text.parse::<f64>().ok().filter(|bound| bound.is_finite());
    bound.ok_or_else(|| "a signal-to-noise ratio is a number of decibels".to_owned())
}

fn one_device(text: &str) -> Result<Request, String> {
    match text.parse()? {
        Request::Auto => Err("name one device: cpu, cuda, cuda:N".to_owned()),
        Request::Cuda(ordinals) if ordinals.len() > 1 => {
            Err("two models are compared on one device: cuda:N".to_owned())
        }
        request => Ok(request),
    }
}

impl VerifyArgs {
    /// Why the arguments contradict each other.
    pub fn conflict(&self) -> Option<&'static str> {
        let tensors = self.data.as_deref().is_some_and(is_tensors);
        match (&self.data, &self.tokenizer) {
            (Some(_), None) if !tensors => {
                Some("--data with text needs --tokenizer tokenizer.json")
            }
            (Some(_), Some(_)) if tensors => Some("--tokenizer is of no use for .safetensors"),
            _ if tensors && (self.samples.is_some() || self.seq_len.is_some()) => {
                Some("--samples and --seq-len are of no use for .safetensors: it is one run")
            }
            _ => None,
        }
    }

    /// Compares.
    pub fn run(&self) -> anyhow::Result<VerifyReport> {
        let source = match (&self.data, &self.tokenizer) {
            (Some(data), Some(tokenizer)) => {
                Source::Text { data: data.clone(), tokenizer: tokenizer.clone() }
            }
            (Some(data), None) => Source::Tensors(data.clone()),
            (None, _) => Source::Random { seed: self.seed },
        };
        let size = Size {
            samples: self.samples.unwrap_or(2) as usize,
            seq_len: self.seq_len.unwrap_or(64) as usize,
        };
        let options = VerifyOptions {
            source,
            size,
            device: self.device.clone(),
            layers: self.layers,
            max_error: self.max_error,
            min_sqnr: self.min_sqnr,
            ort_lib: self.ort_lib.clone(),
        };
        Ok(verify(&self.a, &self.b, &options)?)
    }
}

fn is_tensors(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors"))
}
