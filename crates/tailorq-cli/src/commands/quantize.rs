//! `tailorq quantize`: checkpoint and calibration text in, artifact out.

use super::score::ScoreArgs;
use super::{MIB, quantized_source, set, utf8_path, wrong_settings};
use crate::console::Console;
use crate::observer::ConsoleObserver;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tailorq::{
    AllocationSettings, AllocationSignal, CalibrationReport, CalibrationRequest, Estimate, Method, Outcome, OutputMode,
    PRESETS, Preset, QuantizeRequest, QuantizeSettings, Recipe, Report, RetainRequest, Rule, RuleSettings,
    ScoreSettings, TransformSettings,
};

/// Quantize a model to 2, 3, 4 or 8 bits a weight
///
/// Reads a Hugging Face directory, a hub id or a GGUF file and writes a directory that `run`, `chat`, `eval` and
/// `inspect` open, and whose tensors any safetensors reader can read. Works block by block: memory holds one block, its
/// Hessian and the calibration activations. Every finished block is kept, so a stopped run goes on with --resume.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tailorq quantize Qwen/Qwen2.5-0.5B-Instruct --bits 3 --calibration task.jsonl --output qwen-3bit
  tailorq quantize model.gguf --method rtn --bits 4 --group 64 --output model-4bit
  tailorq quantize model.gguf --method tacq --bits 2 --keep 0.35% --task-data task.jsonl --output model-2bit
  tailorq quantize model.gguf --method taqo --bits-per-weight 2.5 --task-data task.jsonl --output model-2.5bit
  tailorq quantize model.gguf --bits 3 --task-data task.jsonl --min-retain 0.95 --output model-3bit
  tailorq quantize model/ --bits 2 --calibration task.jsonl --output out --dry-run
  tailorq quantize --recipe qwen-3bit/recipe.toml --output again

Calibration: a text file (cut into windows of --sequence-length), or JSONL with one object a line:
  {\"prompt\": \"...\", \"completion\": \"...\"}   rendered with the model's chat template
  {\"messages\": [{\"role\": ..., \"content\": ...}]}   likewise
  {\"prompt\": \"...\"}                          likewise, without an answer
  {\"text\": \"...\"}                            as it stands")]
pub struct QuantizeArgs {
    /// Directory, GGUF file or hub id (org/name[@revision]); with --recipe, overrides the recipe's checkpoint
    #[arg(required_unless_present = "recipe")]
    model: Option<String>,
    /// Where the artifact goes
    #[arg(short, long, value_name = "DIR", value_parser = utf8_path)]
    output: PathBuf,
    /// What becomes of the linears: a quantizer, or a preset that fixes more
    #[arg(long, value_name = "NAME", default_value = "gptq", value_parser = preset_names())]
    method: String,
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    tiles: TileArgs,
    #[command(flatten)]
    circuit: CircuitArgs,
    #[command(flatten)]
    allocation: AllocationArgs,
    #[command(flatten)]
    retain: RetainArgs,
    /// Repeat the run of this recipe.toml, byte for byte; refuses inputs that are not the recipe's
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "GridArgs", "samples", "sequence_length", "seed", "drop_calculator_marks", "general_data", "mix", "TileArgs", "CircuitArgs", "AllocationArgs", "ScoreArgs"])]
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

/// How weights become codes; what is not given is as the method has it.
#[derive(Args, Debug)]
pub(super) struct GridArgs {
    /// Bits a code: 2, 3, 4 or 8 [default: 3]
    #[arg(short, long, value_parser = parse_bits)]
    pub(super) bits: Option<tailorq::Bits>,
    /// Inputs that share a scale: 32, 64, 128 or row [default: 128; tacq-paper: row]
    #[arg(short, long, visible_alias = "group-size")]
    group: Option<tailorq::Group>,
    /// Bits of a stored scale, 8 or 16, in linears and tables of 4 bits: 8 save 0.125 bits a weight with groups of 64 (rtn, gptq, best,
    /// tacq and the methods that begin with aligned) [default: 16]
    #[arg(long, value_name = "8|16")]
    scale_bits: Option<tailorq::ScaleBits>,
    /// Symmetric grid: no zero points are stored
    #[arg(long)]
    sym: bool,
    /// What codes stand for: multiples of the scale (affine), or places in a codebook of each matrix (2, 3 or 4 bits; rtn,
    /// gptq, best, tacq) [default: affine; gptq-codebook: codebook]
    #[arg(long, value_name = "affine|codebook")]
    grid: Option<tailorq::GridKind>,
    /// Rotate the inputs of linears before they meet their codes: by a random Hadamard matrix, or not at all
    /// (rtn, gptq, best, tacq) [default: none; tacq, gptq-hadamard and tacq-hadamard: hadamard]
    #[arg(long, value_name = "none|hadamard", value_parser = parse_transform)]
    transform: Option<Transform>,
    /// Chooses the rotation's signs [default: 0]
    #[arg(long, value_name = "N", requires = "transform")]
    transform_seed: Option<u64>,
    /// How each group's range is found: as it is (none), by the least error of its weights (magnitude), or by the least
    /// error of the layer's output (hessian; rtn has no Hessian and searches by magnitude) [default: magnitude]
    #[arg(long, value_name = "none|magnitude|hessian")]
    clip: Option<tailorq::Clip>,
    /// The same as --clip none
    #[arg(long, conflicts_with = "clip")]
    no_clip: bool,
    /// Added to the Hessian's diagonal, as a share of its mean [default: 0.01]
    #[arg(long, value_name = "SHARE", visible_alias = "damp-percent")]
    damp: Option<f64>,
    /// How much each calibration token counts in the Hessian: all alike (uniform), all but the first of each sequence, the
    /// attention sink (without-first), as if all inputs were of one length (inverse-norm), by the gradient of the task's loss at the layer's output (gradient), or both together
    /// [default: uniform]
    #[arg(long, value_name = "uniform|without-first|inverse-norm|gradient|gradient-inverse-norm")]
    token_weight: Option<tailorq::TokenWeight>,
    /// Quantize columns in the order of falling activation energy (groups stay where they are; nothing extra is stored)
    #[arg(long, visible_alias = "desc-act")]
    act_order: bool,
    /// How much weights make up for what quantized predecessors did to their inputs, and to the residual stream they
    /// write to: two shares from 0 to 1 [default: 0,0]
    #[arg(long, value_name = "INPUTS,RESIDUAL", value_parser = parse_drift)]
    drift: Option<(f64, f64)>,
    /// How much of the correlations between inputs GPTQ disbelieves, 0 to 1: more for small calibration sets, and for
    /// models that shall also do what the set does not show [default: 0]
    #[arg(long, value_name = "SHARE")]
    shrink: Option<f64>,
    /// Bits of the embedding: 4, 6, 8 or 16 [default: 8; tacq-paper and those of TAQ: 16]
    #[arg(long, value_name = "N")]
    embedding_bits: Option<u32>,
    /// Inputs that share a scale in the embedding: 32, 64, 128 or row [default: 32 at 4 bits, 64 at 6, 128 at 8]
    #[arg(long, value_name = "N")]
    embedding_group: Option<tailorq::Group>,
    /// Bits of the head, where it has weights of its own: 4, 6, 8 or 16 [default: 8]
    #[arg(long, value_name = "N")]
    head_bits: Option<u32>,
    /// Inputs that share a scale in such a head [default: as for the embedding]
    #[arg(long, value_name = "N")]
    head_group: Option<tailorq::Group>,
}

impl GridArgs {
    /// Puts what was given over the method's settings.
    pub(super) fn apply(&self, settings: &mut QuantizeSettings) {
        set(&mut settings.bits, self.bits.as_ref());
        set(&mut settings.group, self.group.as_ref());
        set(&mut settings.clip, if self.no_clip { Some(&tailorq::Clip::None) } else { self.clip.as_ref() });
        set(&mut settings.damping, self.damp.as_ref());
        set(&mut settings.shrink, self.shrink.as_ref());
        set(&mut settings.token_weight, self.token_weight.as_ref());
        set(&mut settings.embedding_bits, self.embedding_bits.as_ref());
        set(&mut settings.head_bits, self.head_bits.as_ref());
        set(&mut settings.grid, self.grid.as_ref());
        set(&mut settings.scale_bits, self.scale_bits.as_ref());
        settings.embedding_group = self.embedding_group.or(settings.embedding_group);
        settings.head_group = self.head_group.or(settings.head_group);
        if let Some(Transform(transform)) = self.transform {
            settings.transform =
                transform.map(|t| TransformSettings { seed: self.transform_seed.unwrap_or(t.seed), ..t });
        }
        if let Some((inputs, residual)) = self.drift {
            (settings.drift_inputs, settings.drift_residual) = (inputs, residual);
        }
        settings.symmetric |= self.sym;
        settings.act_order |= self.act_order;
    }
}

/// The task's data.
#[derive(Args, Debug)]
pub(super) struct DataArgs {
    /// Calibration text: items of the task (required by all methods but rtn)
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
    /// Take marks like <<48/2=24>>, which GSM8K's training items carry, out of the completions
    #[arg(long)]
    drop_calculator_marks: bool,
    /// Text of other kinds to blend into the calibration, so that the rest of the model is not forgotten
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    general_data: Option<PathBuf>,
    /// Share of the calibration items that are general text
    #[arg(long, value_name = "SHARE", default_value = "0.25", value_parser = parse_share, requires = "general_data")]
    mix: f64,
}

impl DataArgs {
    pub(super) fn request(&self) -> Option<CalibrationRequest> {
        Some(CalibrationRequest {
            file: self.calibration.clone()?,
            samples: self.samples,
            sequence_length: self.sequence_length,
            seed: self.seed,
            drop_calculator_marks: self.drop_calculator_marks,
            general: self.general_data.clone().map(|file| (file, self.mix)),
        })
    }
}

/// How good the result must be.
#[derive(Args, Debug)]
struct RetainArgs {
    /// Fail unless the quantized model keeps this share of the original's held-out score, as 0.95 or 95%. The score is the
    /// probability of a token of a completion (of any token in items without completions), in the geometric mean over up to
    /// 64 items that were not drawn for calibration; the share is the inverse ratio of perplexities. Below it no artifact
    /// is written, and --resume with a lower bar writes it without quantizing again
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    min_retain: Option<f64>,
    /// Items for --min-retain, instead of those of the calibration file that were not drawn; calibration items among them
    /// are passed over
    #[arg(long, value_name = "FILE", value_parser = utf8_path, requires = "min_retain")]
    retain_data: Option<PathBuf>,
}

/// Salient tiles, for methods that begin with aligned; what is not given is as the method has it.
#[derive(Args, Debug)]
struct TileArgs {
    /// Share of the tiles (16 inputs of one output) that are salient, as a number or in percent: 0.05 or 5%. The paper's K
    /// is K / 128; 0 leaves all to the base [aligned: 5%]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    tile_share: Option<f64>,
    /// Bits of a tile's corrections: 4 or 8 [default: 4]
    #[arg(long, value_name = "4|8", value_parser = parse_tile_bits)]
    tile_bits: Option<tailorq::TileBits>,
    /// Tiles that are ranked against each other: those of a block of 128 columns, or all of a matrix [default: block]
    #[arg(long, value_name = "block|matrix")]
    tile_scope: Option<tailorq::Scope>,
    /// What makes a tile salient: its weights' cost of removal (hessian), what its correction gains (gain), or chance (random,
    /// a control)
    #[arg(long, value_name = "hessian|gain|random")]
    tile_saliency: Option<tailorq::Saliency>,
    /// What a salient tile holds: the base and corrections, four means (mean4), or sixteen values at 8 bits (eight-bit)
    #[arg(long, value_name = "corrections|mean4|eight-bit")]
    salient: Option<tailorq::Salient>,
    /// What is salient as a whole: a tile, or a single weight (the paper's ablation without grouping) [default: tile]
    #[arg(long, value_name = "tile|weight")]
    salient_unit: Option<tailorq::Unit>,
    /// For --tile-saliency random
    #[arg(long, value_name = "N")]
    tile_seed: Option<u64>,
}

impl TileArgs {
    fn apply(&self, settings: &mut QuantizeSettings) -> anyhow::Result<()> {
        let TileArgs { tile_share, tile_bits, tile_scope, tile_saliency, salient, salient_unit, tile_seed } = self;
        let is_given = tile_share.is_some()
            || tile_bits.is_some()
            || tile_scope.is_some()
            || tile_saliency.is_some()
            || salient.is_some()
            || salient_unit.is_some()
            || tile_seed.is_some();
        let Some(aligned) = &mut settings.aligned else {
            let problem =
                "the method has no salient tiles: leave --tile-share and the like out, or use --method aligned";
            return if is_given { Err(wrong_settings(problem)) } else { Ok(()) };
        };
        aligned.share = self.tile_share.unwrap_or(aligned.share);
        aligned.tile_bits = self.tile_bits.unwrap_or(aligned.tile_bits);
        aligned.scope = self.tile_scope.unwrap_or(aligned.scope);
        aligned.saliency = self.tile_saliency.unwrap_or(aligned.saliency);
        aligned.salient = self.salient.unwrap_or(aligned.salient);
        aligned.unit = self.salient_unit.unwrap_or(aligned.unit);
        aligned.seed = self.tile_seed.unwrap_or(aligned.seed);
        Ok(())
    }
}

/// The weights that stay at 16 bits; what is not given is as the method has it.
#[derive(Args, Debug)]
struct CircuitArgs {
    /// Share of the linears' weights that stay at 16 bits, as a number or in percent: 0.0035 or 0.35% [tacq: 0.35%]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    keep: Option<f64>,
    /// What makes a weight worth keeping: tacq, its factors (qal, msg, gradient, error, magnitude), fisher, or a control
    /// (magnitude-hessian, random)
    #[arg(long, value_name = "SIGNAL")]
    signal: Option<tailorq::CircuitSignal>,
    /// Quantized weights that signals compare with: rounded (rtn), or a whole run before this one (gptq)
    #[arg(long, value_name = "rtn|gptq", value_parser = parse_reference)]
    reference: Option<tailorq::Reference>,
    /// What gradients are of: the loss of the completions' tokens, of all tokens (full), or without labels the divergence of
    /// the rounded model from the original, on the original's own answers where items have none (kl) [default: completion]
    #[arg(long, value_name = "completion|full|kl")]
    loss: Option<tailorq::LossKind>,
    /// With --loss kl, take the original's own answers also for items that have completions
    #[arg(long)]
    own_answers: bool,
    /// For --signal random
    #[arg(long, value_name = "N")]
    circuit_seed: Option<u64>,
    /// A survey of the same model and data (see `tailorq survey`), instead of making one
    #[arg(long, value_name = "FILE")]
    survey: Option<PathBuf>,
}

impl CircuitArgs {
    fn apply(&self, method: &mut Method) -> anyhow::Result<()> {
        if let Some(loss) = self.loss {
            method.quantize.loss = loss;
        }
        method.quantize.own_answers |= self.own_answers;
        if self.keep.is_none() && self.signal.is_none() && self.reference.is_none() && method.circuit.is_none() {
            let problem = "no weights are kept: leave --circuit-seed out, or use --keep 0.35% --signal random";
            return if self.circuit_seed.is_some() { Err(wrong_settings(problem)) } else { Ok(()) };
        }
        let mut circuit = method.circuit.unwrap_or_default();
        circuit.keep = self.keep.unwrap_or(circuit.keep);
        circuit.signal = self.signal.unwrap_or(circuit.signal);
        circuit.reference = self.reference.unwrap_or(circuit.reference);
        circuit.seed = self.circuit_seed.unwrap_or(circuit.seed);
        method.circuit = Some(circuit);
        Ok(())
    }
}

/// How bits are spread over the linears; what is not given is as the method has it.
#[derive(Args, Debug)]
struct AllocationArgs {
    /// Bits a weight of the linears may take in the file, scales, zeros and kept weights included. Methods with widths for
    /// each block spread them; rtn, gptq and best get the widest codes and smallest groups that fit, tacq the widest codes
    /// and as many kept weights as fit beside them, aligned as many salient tiles [taq, taqo, ...: 3]
    #[arg(long, value_name = "X", conflicts_with = "bits")]
    bits_per_weight: Option<f64>,
    /// Spread bits by this signal: taq-is, taq-kl, taqo, damage, depth or random
    #[arg(long, value_name = "SIGNAL")]
    allocate: Option<AllocationSignal>,
    /// From scores to widths: knapsack, hull, hull-nested, ranked; without a budget top-share, ends-and-top
    #[arg(long, value_name = "RULE")]
    rule: Option<Rule>,
    /// For --rule top-share: share of the units that get the widest format [default: 25%]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    share: Option<f64>,
    #[command(flatten)]
    score: ScoreArgs,
    /// Scores of the same model, data and settings (see `tailorq score`), instead of making some
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// Widths of all linears, by `tailorq plan` from scores of this checkpoint
    #[arg(long, value_name = "FILE", value_parser = utf8_path, conflicts_with_all = ["bits_per_weight", "allocate", "rule", "share", "scores", "ScoreArgs"])]
    plan: Option<PathBuf>,
}

impl AllocationArgs {
    /// Puts what was given over the method's settings; returns the budget of a method without an allocation.
    fn apply(&self, bits: Option<tailorq::Bits>, method: &mut Method) -> anyhow::Result<Option<f64>> {
        let budget = self.bits_per_weight;
        let old = method.allocation.take();
        let allocation = match (self.allocate, old) {
            (Some(signal), Some(old)) => {
                Some(AllocationSettings { score: ScoreSettings { signal, ..old.score }, rule: old.rule })
            }
            (Some(signal), None) => Some(AllocationSettings::of(signal, budget)),
            (None, old) => old,
        };
        let Some(mut allocation) = allocation else {
            if self.rule.is_some() || self.share.is_some() || self.score.is_given() {
                let problem = "nothing is allocated: use --method taqo or another that allocates, or --allocate SIGNAL";
                return Err(wrong_settings(problem));
            }
            return Ok(budget);
        };
        if bits.is_some() {
            let problem = "an allocation chooses among widths: give --widths and --bits-per-weight instead of --bits";
            return Err(wrong_settings(problem));
        }
        let rule = &mut allocation.rule;
        match self.rule {
            Some(name) => {
                let kept = rule.bits_per_weight.filter(|_| name.is_budgeted());
                *rule = RuleSettings::of(name, budget.or(kept), self.share);
            }
            None => {
                rule.bits_per_weight = budget.or(rule.bits_per_weight);
                rule.share = self.share.or(rule.share);
            }
        }
        self.score.apply(&mut allocation.score);
        method.allocation = Some(allocation);
        Ok(None)
    }
}

fn preset_names() -> clap::builder::PossibleValuesParser {
    PRESETS.iter().map(|p| clap::builder::PossibleValue::new(p.name).help(p.about)).collect::<Vec<_>>().into()
}

fn parse_bits(s: &str) -> Result<tailorq::Bits, String> {
    let bits = s.parse::<u32>().map_err(|e| e.to_string())?.try_into()?;
    match bits {
        tailorq::Bits::Six => Err("linears have 2, 3, 4 or 8 bits; 6 are for --embedding-bits and --head-bits".into()),
        bits => Ok(bits),
    }
}

/// A transform as asked for: one, or none at all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transform(Option<TransformSettings>);

fn parse_transform(s: &str) -> Result<Transform, String> {
    match s {
        "none" => Ok(Transform(None)),
        "hadamard" => Ok(Transform(Some(TransformSettings::hadamard(0)))),
        _ => Err("use none or hadamard".into()),
    }
}

fn parse_tile_bits(s: &str) -> Result<tailorq::TileBits, String> {
    s.parse::<u32>().map_err(|e| e.to_string())?.try_into()
}

fn parse_reference(s: &str) -> Result<tailorq::Reference, String> {
    match s {
        "rtn" => Ok(tailorq::Reference::Rtn),
        "gptq" => Ok(tailorq::Reference::Gptq),
        _ => Err("use rtn or gptq".into()),
    }
}

/// `1,0.5`.
fn parse_drift(s: &str) -> Result<(f64, f64), String> {
    let number = |s: &str| s.trim().parse::<f64>().map_err(|e| format!("{e}: use two shares such as 1,0.5"));
    let (inputs, residual) = s.split_once(',').ok_or("use two shares such as 1,0.5")?;
    Ok((number(inputs)?, number(residual)?))
}

/// `0.0035` or `0.35%`.
pub(super) fn parse_share(s: &str) -> Result<f64, String> {
    let (number, unit) = s.strip_suffix('%').map_or((s, 1.0), |n| (n, 100.0));
    number.trim().parse::<f64>().map(|n| n / unit).map_err(|e| format!("{e}: use a share such as 0.0035 or 0.35%"))
}

impl QuantizeArgs {
    fn request(&self) -> anyhow::Result<QuantizeRequest> {
        let mode = match (self.resume, self.overwrite) {
            (true, _) => OutputMode::Resume,
            (_, true) => OutputMode::Overwrite,
            _ => OutputMode::Fresh,
        };
        let mut request = match &self.recipe {
            Some(path) => self.repeated(path, mode)?,
            None => self.asked_for(mode)?,
        };
        request.retain = self.retain.min_retain.map(|min| RetainRequest { min, data: self.retain.retain_data.clone() });
        request.survey.clone_from(&self.circuit.survey);
        request.scores.clone_from(&self.allocation.scores);
        Ok(request)
    }

    /// A recipe's request, of inputs that may lie elsewhere.
    fn repeated(&self, recipe: &Path, mode: OutputMode) -> anyhow::Result<QuantizeRequest> {
        let mut request = QuantizeRequest::repeat(Recipe::read(recipe)?, self.output.clone(), mode);
        set(&mut request.model, self.model.as_ref());
        if let Some(calibration) = &mut request.calibration {
            set(&mut calibration.file, self.data.calibration.as_ref());
        }
        Ok(request)
    }

    fn asked_for(&self, mode: OutputMode) -> anyhow::Result<QuantizeRequest> {
        let (method, bits_per_weight) = self.method()?;
        Ok(QuantizeRequest {
            calibration: self.data.request(),
            settings: method.quantize,
            circuit: method.circuit,
            allocation: method.allocation,
            plan: self.allocation.plan.clone(),
            bits_per_weight,
            mode,
            ..QuantizeRequest::new(self.model.clone().context("a model is needed")?, &self.output)
        })
    }

    /// The method's settings with what was given put over them, and the budget of a method that does not allocate.
    fn method(&self) -> anyhow::Result<(Method, Option<f64>)> {
        let mut method = Preset::find(&self.method).expect("clap knows the names").method();
        self.grid.apply(&mut method.quantize);
        self.tiles.apply(&mut method.quantize)?;
        self.circuit.apply(&mut method)?;
        let budget = self.allocation.apply(self.grid.bits, &mut method)?;
        if self.allocation.plan.is_some() && self.grid.bits.is_some() {
            return Err(wrong_settings("a plan says the bits of every linear: leave --bits out"));
        }
        self.refuse_unread(&method)?;
        Ok((method, budget))
    }

    /// An option that nothing reads is a mistake of whoever gave it.
    fn refuse_unread(&self, method: &Method) -> anyhow::Result<()> {
        let CircuitArgs { loss, survey, .. } = &self.circuit;
        if (loss.is_some() || survey.is_some()) && !method.reads_gradients() {
            let problem = format!(
                "{} reads no gradients: leave --loss, --own-answers and --survey out, or use --method tacq or --keep",
                self.method
            );
            return Err(wrong_settings(&problem));
        }
        let GridArgs { damp, token_weight, act_order, drift, shrink, .. } = &self.grid;
        let of_hessian = damp.is_some() || token_weight.is_some() || *act_order || drift.is_some() || shrink.is_some();
        if of_hessian && self.allocation.plan.is_none() && !method.reads_hessian() {
            let problem = format!(
                "{} reads no Hessian: leave --damp, --token-weight, --act-order, --drift and --shrink out, or use --method gptq",
                self.method
            );
            return Err(wrong_settings(&problem));
        }
        Ok(())
    }
}

/// Runs the command.
pub fn execute(args: &QuantizeArgs, console: &Console) -> anyhow::Result<()> {
    let request = args.request()?;
    let device = crate::device::open(console)?;
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
            // Hashes of items are for the file.
            let calibration = report.calibration.clone().map(|c| CalibrationReport { fingerprints: Vec::new(), ..c });
            console.object(&json!({
                "output": request.output,
                "status": "written",
                "seconds": seconds,
                "size": report.size,
                "retention": report.retention,
                "calibration": calibration,
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
    if let Some(kept) = &report.retention {
        text.push_str(&format!(
            "keeps {:.4} (standard error {:.4}) of the original's held-out score on {} items: {:.4} and {:.4} nats a token\n",
            kept.share, kept.stderr, kept.items, kept.nll, kept.original_nll
        ));
    }
    if let Some(bits) = size.counted_bits_per_weight {
        text.push_str(&format!(
            "simulated: the file has the method's values in a larger format; its own format would take {bits:.3} bits per weight in \
             the linears\n"
        ));
    }
    if let Some(stored_as) = &size.source_encoding {
        text.push_str(&quantized_source(stored_as));
    }
    text
}
