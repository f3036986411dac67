//! `tailorq quantize`: checkpoint and calibration text in, artifact out.

use super::{MIB, quantized_source, utf8_path};
use crate::console::Console;
use crate::observer::ConsoleObserver;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tailorq::{CalibrationRequest, Estimate, Outcome, OutputMode, QuantizeRequest, QuantizeSettings, Recipe, Report};

/// Quantize a model to 2, 3, 4 or 8 bits a weight
///
/// Reads a Hugging Face directory, a hub id or a GGUF file and writes a directory that `run`, `chat`, `eval` and
/// `inspect` open, and whose tensors any safetensors reader can read. Works block by block: memory holds one block, its
/// Hessian and the calibration activations. Every finished block is kept, so a stopped run goes on with --resume.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq quantize Qwen/Qwen2.5-0.5B-Instruct --bits 3 --calibration task.jsonl --output qwen-3bit
  tailorq quantize model.gguf --method rtn --bits 4 --group 64 --output model-4bit
  tailorq quantize model/ --bits 2 --calibration task.jsonl --output out --dry-run
  tailorq quantize --recipe qwen-3bit/recipe.toml --output again

Calibration: a text file (cut into windows of --sequence-length), or JSONL with one object a line:
  {\"prompt\": \"...\", \"completion\": \"...\"}   rendered with the model's chat template
  {\"messages\": [{\"role\": ..., \"content\": ...}]}   likewise
  {\"text\": \"...\"}                            as it stands")]
pub struct QuantizeArgs {
    /// Directory, GGUF file or hub id (org/name[@revision]); with --recipe, overrides the recipe's checkpoint
    #[arg(required_unless_present = "recipe")]
    model: Option<String>,
    /// Where the artifact goes
    #[arg(short, long, value_name = "DIR", value_parser = utf8_path)]
    output: PathBuf,
    /// How weights become codes
    #[arg(long, value_name = "rtn|gptq", default_value = "gptq")]
    method: String,
    /// Bits a code: 2, 3, 4 or 8
    #[arg(short, long, default_value = "3", value_parser = parse_bits)]
    bits: tailorq::Bits,
    /// Inputs that share a scale: 32, 64, 128 or row
    #[arg(short, long, default_value = "128", visible_alias = "group-size")]
    group: tailorq::Group,
    /// Calibration text (required by gptq)
    #[arg(short, long, value_name = "FILE", visible_alias = "task-data", value_parser = utf8_path)]
    calibration: Option<PathBuf>,
    /// Calibration items (or windows of a text file)
    #[arg(long, default_value_t = 128, visible_alias = "nsamples")]
    samples: usize,
    /// Longest calibration item in tokens [default: 2048, or the model's context if shorter]
    #[arg(long, value_name = "TOKENS", visible_alias = "seqlen")]
    sequence_length: Option<usize>,
    /// Chooses the calibration items
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Symmetric grid: no zero points are stored
    #[arg(long)]
    sym: bool,
    /// How each group's range is found: as it is (none), by the least error of its weights (magnitude), or by the least
    /// error of the layer's output (hessian; rtn has no Hessian and searches by magnitude)
    #[arg(long, value_name = "none|magnitude|hessian", default_value = "magnitude")]
    clip: tailorq::Clip,
    /// The same as --clip none
    #[arg(long, conflicts_with = "clip")]
    no_clip: bool,
    /// Added to the Hessian's diagonal, as a share of its mean
    #[arg(long, value_name = "SHARE", default_value_t = 0.01, visible_alias = "damp-percent")]
    damp: f64,
    /// How much each calibration token counts: all alike (uniform), or as if all inputs were of one length (inverse-norm),
    /// so that the few tokens with massive activations do not decide everything
    #[arg(long, value_name = "uniform|inverse-norm", default_value = "uniform")]
    token_weight: tailorq::TokenWeight,
    /// Quantize columns in the order of falling activation energy (groups stay where they are; nothing extra is stored)
    #[arg(long, visible_alias = "desc-act")]
    act_order: bool,
    /// Bits of the embedding: 4, 8 or 16
    #[arg(long, value_name = "N", default_value_t = 8)]
    embedding_bits: u32,
    /// Bits of the head, where it has weights of its own: 4, 8 or 16
    #[arg(long, value_name = "N", default_value_t = 8)]
    head_bits: u32,
    /// Repeat the run of this recipe.toml, byte for byte; refuses inputs that are not the recipe's
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "bits", "group", "samples", "sequence_length", "seed", "sym", "clip", "no_clip", "damp", "token_weight", "act_order", "embedding_bits", "head_bits"])]
    recipe: Option<PathBuf>,
    /// Go on with a stopped run (an empty directory starts afresh, a finished run is left alone)
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace the artifact in the output directory
    #[arg(long)]
    overwrite: bool,
    /// Print the predicted size, memory and time, and write nothing
    #[arg(long)]
    dry_run: bool,
}

fn parse_bits(s: &str) -> Result<tailorq::Bits, String> {
    s.parse::<u32>().map_err(|e| e.to_string())?.try_into()
}

impl QuantizeArgs {
    fn request(&self) -> anyhow::Result<QuantizeRequest> {
        let mode = match (self.resume, self.overwrite) {
            (true, _) => OutputMode::Resume,
            (_, true) => OutputMode::Overwrite,
            _ => OutputMode::Fresh,
        };
        let mut request = match &self.recipe {
            Some(path) => QuantizeRequest::repeat(Recipe::read(path)?, self.output.clone(), mode),
            None => QuantizeRequest {
                model: self.model.clone().context("a model is needed")?,
                settings: self.settings(),
                calibration: self.calibration.clone().map(|file| CalibrationRequest {
                    file,
                    samples: self.samples,
                    sequence_length: self.sequence_length,
                    seed: self.seed,
                }),
                expected: None,
                output: self.output.clone(),
                mode,
            },
        };
        if self.recipe.is_some() {
            if let Some(model) = &self.model {
                request.model.clone_from(model);
            }
            if let (Some(file), Some(calibration)) = (&self.calibration, &mut request.calibration) {
                calibration.file.clone_from(file);
            }
        }
        Ok(request)
    }

    fn settings(&self) -> QuantizeSettings {
        QuantizeSettings {
            method: self.method.clone(),
            bits: self.bits,
            group: self.group,
            symmetric: self.sym,
            clip: if self.no_clip { tailorq::Clip::None } else { self.clip },
            damping: self.damp,
            act_order: self.act_order,
            token_weight: self.token_weight,
            true_sequential: true,
            embedding_bits: self.embedding_bits,
            head_bits: self.head_bits,
        }
    }
}

/// Runs the command.
pub fn execute(args: &QuantizeArgs, console: &Console) -> anyhow::Result<()> {
    let request = args.request()?;
    let device = tailorq::cpu();
    let observer = ConsoleObserver::new(console);
    if args.dry_run {
        let (recipe, estimate) = tailorq::dry_run(device.as_ref(), &request, &observer)?;
        drop(observer);
        console.object(&json!({"dry_run": true, "recipe": recipe, "estimate": estimate}))?;
        return console.text(&dry_text(&estimate));
    }
    let start = Instant::now();
    let outcome = tailorq::quantize(device.as_ref(), &request, &observer)?;
    drop(observer);
    let seconds = start.elapsed().as_secs_f64();
    match outcome {
        Outcome::AlreadyFinished => {
            console.object(&json!({"output": request.output, "status": "already finished"}))?;
            console.text(&format!("{} is already finished\n", request.output.display()))
        }
        Outcome::Written(report) => {
            console.object(&json!({
                "output": request.output,
                "status": "written",
                "seconds": seconds,
                "size": report.size,
                "calibration": report.calibration,
                "mean_relative_error": report.mean_relative_error(),
                "notes": report.notes().collect::<Vec<_>>(),
            }))?;
            console.text(&summary(&request, &report, seconds))
        }
    }
}

fn dry_text(e: &Estimate) -> String {
    format!(
        "nothing was written. Predicted:\n  weight files  {:.1} MiB ({:.3} bits per weight in the linears)\n  \
         peak memory   {:.0} MiB beside memory-mapped file pages\n  time          {:.0} s for {} calibration tokens\n",
        e.artifact_bytes as f64 / MIB,
        e.linear_bits_per_weight,
        e.peak_memory_bytes as f64 / MIB,
        e.seconds,
        e.tokens
    )
}

fn summary(request: &QuantizeRequest, report: &Report, seconds: f64) -> String {
    let size = &report.size;
    let mut text = format!(
        "wrote {} in {seconds:.0} s: {:.1} MiB of weights (source {:.1} MiB, 16 bit {:.1} MiB)\n\
         {:.3} bits per weight in the linears, {:.3} in all; mean relative error of the weights {:.4}\n",
        request.output.display(),
        size.artifact_bytes as f64 / MIB,
        size.source_bytes as f64 / MIB,
        size.half_precision_bytes as f64 / MIB,
        size.linear_bits_per_weight,
        size.total_bits_per_weight,
        report.mean_relative_error()
    );
    if let Some(stored_as) = &size.source_encoding {
        text.push_str(&quantized_source(stored_as));
    }
    text
}
