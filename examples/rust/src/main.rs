//! Runs a rewritten model in a Rust program that has the MX operators built in: no libmx_custom_ops.so.
//!
//! ```sh
//! mxrewrite model.onnx --tier-a -o model.mx.onnx
//! cargo run --release -p mx-example -- model.mx.onnx --ids 1,15,27,3 --ort libonnxruntime.so
//! ```

use std::{
    env,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use mx_custom_ops::ran;
use ort::{
    environment::Environment,
    session::{Session, SessionInputValue},
    value::Tensor,
};

#[derive(Parser)]
#[command(about = "Runs a rewritten model and prints the most probable next tokens")]
struct Arguments {
    /// A language model, rewritten or not, whose inputs are `input_ids` and perhaps `attention_mask`.
    model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true)]
    ids: Vec<i64>,
    /// ONNX Runtime's library; the one of the `onnxruntime` Python package will do. Default: ORT_DYLIB_PATH.
    #[arg(long, value_name = "LIBONNXRUNTIME_SO")]
    ort: Option<PathBuf>,
    /// Runs on the first NVIDIA GPU; ONNX Runtime has to be a build with CUDA.
    #[arg(long)]
    cuda: bool,
    /// How many tokens to print.
    #[arg(long, default_value_t = 5)]
    top: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let library =
        arguments.ort.clone().or_else(|| env::var_os("ORT_DYLIB_PATH").map(PathBuf::from));
    let library =
        library.context("no ONNX Runtime: pass --ort libonnxruntime.so, or set ORT_DYLIB_PATH")?;
    // From the folder that the user is in; `ort` takes a relative path from the program's.
    let library = std::path::absolute(library)?;
    let builder = ort::init_from(&library)
        .with_context(|| format!("cannot load ONNX Runtime from {}", library.display()))?;
    // Makes ONNX Runtime 1.22 and 1.23 safe, before any other call of `ort`.
    mx_custom_ops::bind(&library).map_err(anyhow::Error::msg)?;
    let environment = builder.with_name("mx-example").build()?;
    let mut session = session(&environment, &arguments.model, arguments.cuda)
        .with_context(|| format!("cannot make a session of {}", arguments.model.display()))?;

    ran::start();
    let logits = last_logits(&mut session, &arguments.ids)?;
    let kernels = ran::take();

    let mut out = std::io::stdout().lock();
    writeln!(out, "token logit")?;
    for (token, logit) in top(&logits, arguments.top) {
        writeln!(out, "{token} {logit}")?;
    }
    writeln!(out, "node op provider kernel runs")?;
    for run in &kernels {
        writeln!(out, "{} {} {} {} {}", run.node, run.op, run.provider, run.kernel, run.runs)?;
    }
    // A node that no GPU kernel takes goes to the CPU without a word.
    if let Some(run) = kernels.iter().find(|run| arguments.cuda && run.provider != "cuda") {
        bail!("node {} ran on the CPU, though --cuda was given", run.node);
    }
    Ok(())
}

/// A session with the MX operators.
fn session(environment: &Environment, model: &Path, cuda: bool) -> ort::Result<Session> {
    let operators = mx_custom_ops::operator_domain()?;
    let mut builder = Session::builder(environment)?.with_operators(operators)?;
    if cuda {
        let provider = ort::ep::CUDA::default().with_tf32(false).build();
        // Otherwise a provider that does not load leaves the whole model to the CPU.
        builder = builder.with_execution_providers([provider.error_on_failure()])?;
    }
    // From a file, so that external data is found beside it and mapped, not read.
    builder.commit_from_file(model)
}

/// The logits of the last position, `[vocabulary]`.
fn last_logits(session: &mut Session, ids: &[i64]) -> Result<Vec<f32>> {
    let shape = [1, ids.len()];
    let has_mask = session.inputs().iter().any(|input| input.name() == "attention_mask");
    let mut inputs: Vec<(&str, SessionInputValue<'_>)> =
        vec![("input_ids", Tensor::from_array((shape, ids.to_vec()))?.into())];
    if has_mask {
        let mask = Tensor::from_array((shape, vec![1_i64; ids.len()]))?;
        inputs.push(("attention_mask", mask.into()));
    }
    let outputs = session.run(inputs)?;
    let logits = outputs.get("logits").context("the model has no output `logits`")?;
    let (shape, values) = logits.try_extract_tensor::<f32>()?;
    let vocabulary = usize::try_from(*shape.last().context("`logits` is a scalar")?)?;
    ensure!(vocabulary > 0 && values.len() >= vocabulary, "`logits` has shape {shape}");
    Ok(values[values.len() - vocabulary..].to_vec())
}

/// The `count` largest logits, largest first; of equal ones the lower token.
fn top(logits: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut tokens: Vec<_> = logits.iter().copied().enumerate().collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    tokens.truncate(count);
    tokens
}
