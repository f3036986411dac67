//! A survey in a file: what the task's data and its gradients say of every weight, gathered once and read by many plans.
//!
//! Statistics are stored as bfloat16 (their size matters, not their last digits) under `KIND.NAME`, and the header names
//! the inputs they were made from, so that nobody plans with the survey of another model or task.

use crate::blocks::layer_settings;
use crate::error::PipelineError;
use crate::inputs::{CalibrationRequest, QuantizeRequest, announce, resolve};
use crate::observer::Observer;
use crate::recipe::{LossKind, QuantizeSettings, Recipe};
use crate::samples::Samples;
use crate::spill::SpillFile;
use crate::task::circuit::CircuitSettings;
use crate::task::continuations::continue_prompts;
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::Path;
use tailorq_format::{AtomicFile, SafetensorsFile, SafetensorsWriter, TensorSpec};
use tailorq_kernels::Device;
use tailorq_model::{Model, OpenedModel, next_token_targets};
use tailorq_quant::quantize::Rtn;
use tailorq_quant::survey::{BlockStats, Loss, Needs, Survey, SurveySample};
use tailorq_quant::{LayerPlan, LayerSettings, LayerStats, QuantError, Quantizer};
use tailorq_tensor::{DType, DenseRows, InputGroup, LayerId, Matrix, ReadRows, Slot};

/// Schema of survey files.
const SURVEY_SCHEMA: &str = "1";

/// Tokens of the model's own answer to an item without a completion, for [`LossKind::Kl`].
const ANSWER_TOKENS: usize = 64;

/// Block inputs and gradients held in memory; what is beyond goes to a file beside the survey.
pub(crate) const TAPE_BYTES: usize = 1 << 30;

/// [`TAPE_BYTES`], or of what a device with a memory of its own has room for as much as leaves the rest to weights.
pub(crate) fn tape_bytes(device: &dyn Device) -> usize {
    device.resident().map_or(TAPE_BYTES, |resident| resident.room() / 3 * 2)
}

/// The sum over samples of `|dL/dW|` (TACQ).
pub(crate) const ABSOLUTE: &str = "absolute";
/// The sum over samples of `(dL/dW)^2`.
pub(crate) const SQUARE: &str = "square";
/// The energy of each token's output gradient, f32.
const TOKEN_ENERGY: &str = "token_energy";
/// The energy of each input, f32, one tensor for the inputs that linears share, named after the first of them.
const INPUT_ENERGY: &str = "input_energy";
/// One number: the mean loss in nats a token.
const LOSS: &str = "loss";

/// A survey to be made on its own.
#[derive(Clone, Debug)]
pub struct SurveyRequest {
    /// Path or hub id of the checkpoint.
    pub model: String,
    /// The task's data.
    pub calibration: CalibrationRequest,
    /// What is differentiated: the loss and, for [`LossKind::Kl`], the grid of the rounded model. All else is ignored.
    pub settings: QuantizeSettings,
    /// What to gather.
    pub needs: Needs,
}

impl SurveyRequest {
    /// The survey that a run of `request` would make. Panics when it has no calibration.
    pub fn of(request: &QuantizeRequest) -> Self {
        let needs = request.circuit.as_ref().map_or_else(Needs::default, CircuitSettings::needs);
        SurveyRequest {
            model: request.model.clone(),
            calibration: request.calibration.clone().expect("a survey needs data"),
            settings: request.settings.clone(),
            needs: needs.union(&request.settings.survey_needs()),
        }
    }
}

/// Makes a survey and writes it to `path`, for `QuantizeRequest::survey` of any run over the same inputs. Returns the mean
/// loss of the data in nats a token, where gradients were needed.
pub fn survey(
    device: &dyn Device,
    request: &SurveyRequest,
    path: &Path,
    observer: &dyn Observer,
) -> Result<Option<f64>, PipelineError> {
    let opened = tailorq_model::open(&request.model)?;
    // The method and what is its own do not matter, but it must be one that reads data.
    let settings = QuantizeSettings { method: "gptq".into(), aligned: None, ..request.settings.clone() };
    let calibration = Some(request.calibration.clone());
    let inputs = QuantizeRequest { settings, calibration, ..QuantizeRequest::new(&request.model, path) };
    inputs.check()?;
    let (recipe, samples) = resolve(&opened, &inputs, observer)?;
    let samples = samples.expect("GPTQ's defaults read calibration");
    announce(&samples, observer);
    write_survey(device, &opened, (&recipe, &samples), &request.needs, path, observer)
}

/// Everything that decides the numbers of a survey, as one line for its header.
#[derive(Serialize)]
struct Origin<'a> {
    model: &'a str,
    calibration: &'a str,
    samples: usize,
    sequence_length: usize,
    seed: u64,
    drop_calculator_marks: bool,
    general: Option<(&'a str, f64)>,
    loss: LossKind,
    /// Where a divergence is measured: the grid of the rounded model, and the tokens of its own answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    rounded: Option<(LayerSettings, usize)>,
    /// Whether these answers stand for all completions.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    own_answers: bool,
}

/// The grid of a recipe for rounding to nearest, which reads nothing of a method's own.
pub(crate) fn rounding(settings: &QuantizeSettings) -> LayerSettings {
    let plain = layer_settings(&QuantizeSettings::default());
    LayerSettings { damping: plain.damping, act_order: false, half: false, aligned: None, ..layer_settings(settings) }
}

fn origin(recipe: &Recipe) -> Result<String, PipelineError> {
    let Some(calibration) = &recipe.calibration else {
        return Err(PipelineError::Settings("a survey needs the task's data: give --calibration FILE".into()));
    };
    let origin = Origin {
        model: &recipe.model.sha256,
        calibration: &calibration.sha256,
        samples: calibration.samples,
        sequence_length: calibration.sequence_length,
        seed: calibration.seed,
        drop_calculator_marks: calibration.drop_calculator_marks,
        general: calibration.general.as_ref().map(|g| (g.sha256.as_str(), g.mix)),
        loss: recipe.quantize.loss,
        rounded: (recipe.quantize.loss == LossKind::Kl).then(|| (rounding(&recipe.quantize), ANSWER_TOKENS)),
        own_answers: recipe.quantize.own_answers,
    };
    Ok(serde_json::to_string(&origin).expect("plain data"))
}

/// The tensors that a survey of these needs holds, in the order in which blocks are finished: from the last to the first
/// by a backward pass, and the other way round without one.
fn specs(model: &Model, needs: &Needs, n_tokens: usize) -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    let n_blocks = model.blocks.len();
    for i in 0..n_blocks {
        let block_idx = if needs.gradients() { n_blocks - 1 - i } else { i };
        for slot in Slot::ALL {
            let linear = model.blocks[block_idx].linear(slot);
            let shape = [linear.weight.rows(), linear.weight.cols()];
            for (kind, wanted) in [(ABSOLUTE, needs.absolute), (SQUARE, needs.square)] {
                if wanted {
                    specs.push(TensorSpec::new(format!("{kind}.{}", linear.name), DType::BF16, &shape));
                }
            }
            if needs.token_energies {
                specs.push(TensorSpec::new(format!("{TOKEN_ENERGY}.{}", linear.name), DType::F32, &[n_tokens]));
            }
        }
        for group in InputGroup::ALL.into_iter().filter(|_| needs.input_energies) {
            let name = &model.blocks[block_idx].linear(group.slots()[0]).name;
            let width = model.input_width(group);
            specs.push(TensorSpec::new(format!("{INPUT_ENERGY}.{name}"), DType::F32, &[width]));
        }
    }
    if needs.gradients() {
        specs.push(TensorSpec::new(LOSS, DType::F32, &[1]));
    }
    specs
}

/// Runs the survey that `needs` names over the recipe's calibration data and writes it to `path`; returns the mean loss
/// of the data in nats a token, where gradients were needed. The file appears when it is whole.
pub(crate) fn write_survey(
    device: &dyn Device,
    opened: &OpenedModel,
    (recipe, samples): (&Recipe, &Samples),
    needs: &Needs,
    path: &Path,
    observer: &dyn Observer,
) -> Result<Option<f64>, PipelineError> {
    let original = &opened.model;
    let is_divergence = recipe.quantize.loss == LossKind::Kl && needs.gradients();
    let has_own_answers = recipe.quantize.own_answers || samples.completions.iter().any(Option::is_none);
    if is_divergence && needs.token_energies && has_own_answers {
        let problem = "with --loss kl, items without a completion (all, with --own-answers) are answered by the model itself, and \
                       weights of their tokens would be those of other sequences than the calibration's: give items with \
                       completions, or use --token-weight uniform";
        return Err(PipelineError::Settings(problem.into()));
    }
    let rounded;
    let (model, loss) = if is_divergence {
        rounded = rounded_model(device, original, rounding(&recipe.quantize), observer)?;
        (&rounded, Loss::Divergence(original))
    } else {
        (original, Loss::CrossEntropy)
    };
    let survey_samples = survey_samples((device, opened), samples, &recipe.quantize, observer)?;
    if needs.token_energies {
        check_targets(&survey_samples)?;
    }
    let n_blocks = model.blocks.len();
    let specs = specs(model, needs, samples.tokens());
    let bytes: usize = specs.iter().filter_map(TensorSpec::bytes).sum();
    observer.note(&format!("the survey will have {:.1} MiB: {}", bytes as f64 / f64::from(1 << 20), path.display()));
    observer.stage("surveying the task", n_blocks as u64);
    let metadata = [("tailorq_survey", SURVEY_SCHEMA), ("tailorq", &recipe.tailorq), ("origin", &origin(recipe)?)];
    let file = SafetensorsWriter::create(path, &specs, &metadata)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut spill = SpillFile::create(dir).map_err(|e| crate::error::output_error(dir, &e))?;
    let survey = Survey { device, model, loss, needs, tape_bytes: tape_bytes(device) };
    let mut n_done = 0;
    let (mut file, summary) = while_writing(file, |hand_over| {
        survey.run(&survey_samples, Some(&mut spill), &mut |stats| {
            let goes_on = hand_over(tensors_of_block(device, model, &stats));
            n_done += 1;
            observer.progress(n_done, &format!("block {}", stats.block_idx));
            let stop = !goes_on || observer.cancelled();
            Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
    })?;
    let summary = match summary {
        Err(QuantError::Interrupted) => return Err(PipelineError::Cancelled),
        other => other?,
    };
    if let Some(loss) = summary.mean_loss {
        file.write(LOSS, &DType::F32.encode(&[loss as f32]))?;
    }
    file.commit()?;
    Ok(summary.mean_loss)
}

/// Energies of tokens are those of all calibration tokens: each item must have a token that the loss counts, or it is passed over.
fn check_targets(samples: &[SurveySample]) -> Result<(), PipelineError> {
    let has_none = |s: &&SurveySample| next_token_targets(&s.ids, s.scored.as_deref(), 0).is_empty();
    match samples.iter().filter(has_none).count() {
        0 => Ok(()),
        n => Err(PipelineError::Settings(format!(
            "{n} calibration items have no completion within the sequence length: raise --sequence-length, or use --loss full"
        ))),
    }
}

/// The samples with the flags of the tokens that the loss counts; for a divergence those without a completion, or all of them,
/// get the original's own answer.
fn survey_samples(
    model: (&dyn Device, &OpenedModel),
    samples: &Samples,
    settings: &QuantizeSettings,
    observer: &dyn Observer,
) -> Result<Vec<SurveySample>, PipelineError> {
    let scored = |flags: &Option<Vec<bool>>| flags.clone().filter(|_| settings.loss != LossKind::Full);
    let pairs = samples.sequences.iter().zip(&samples.completions);
    let mut found: Vec<SurveySample> =
        pairs.map(|(ids, flags)| SurveySample { ids: ids.clone(), scored: scored(flags) }).collect();
    let is_open = |sample: &SurveySample| settings.own_answers || sample.scored.is_none();
    let open: Vec<usize> = match settings.loss {
        LossKind::Kl => (0..found.len()).filter(|&i| is_open(&found[i])).collect(),
        LossKind::Completion | LossKind::Full => Vec::new(),
    };
    if !open.is_empty() {
        observer.note(&format!("{} items get the original's own answers", open.len()));
        let prompts: Vec<Vec<u32>> = open.iter().map(|&i| prompt_of(&found[i])).collect();
        let answered = continue_prompts(model, &prompts, ANSWER_TOKENS, observer)?;
        open.into_iter().zip(answered).for_each(|(i, sample)| found[i] = sample);
    }
    Ok(found)
}

/// What stands before a completion, a token at least; the whole item without one.
fn prompt_of(sample: &SurveySample) -> Vec<u32> {
    let n = sample.scored.as_ref().and_then(|flags| flags.iter().position(|&f| f)).unwrap_or(sample.ids.len());
    sample.ids[..n.max(1)].to_vec()
}

/// The model with all linears rounded to nearest.
fn rounded_model(
    device: &dyn Device,
    original: &Model,
    settings: LayerSettings,
    observer: &dyn Observer,
) -> Result<Model, PipelineError> {
    let plan = LayerPlan::from(settings);
    let mut model = original.clone();
    observer.stage("rounding the model to diverge from", model.blocks.len() as u64);
    for (block_idx, block) in model.blocks.iter_mut().enumerate() {
        if observer.cancelled() {
            return Err(PipelineError::Cancelled);
        }
        for slot in Slot::ALL {
            let linear = block.linear_mut(slot);
            let found = Rtn.quantize(device, &linear.weight.to_matrix(), &LayerStats::default(), &plan);
            let named = |source: QuantError| QuantError::Layer {
                layer: LayerId { block_idx, slot },
                tensor: format!("{}.weight", linear.name),
                source: Box::new(source),
            };
            linear.weight = found.map_err(named)?.weight.into();
        }
        observer.progress(block_idx as u64 + 1, "");
    }
    Ok(model)
}

/// Names and bytes of tensors, in the order of the file.
type Tensors = Vec<(String, Vec<u8>)>;

/// Writes to `file` on a thread of its own what `work` hands over, which waits when it is more than one block ahead. Handing over
/// says `false` once writing has failed; that error is the result.
fn while_writing<T>(
    mut file: SafetensorsWriter<AtomicFile>,
    work: impl FnOnce(&mut dyn FnMut(Tensors) -> bool) -> T,
) -> Result<(SafetensorsWriter<AtomicFile>, T), PipelineError> {
    let (sender, receiver) = std::sync::mpsc::sync_channel::<Tensors>(1);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for (name, bytes) in receiver.into_iter().flatten() {
                file.write(&name, &bytes)?;
                file.sync()?;
            }
            Ok::<_, PipelineError>(file)
        });
        let done = work(&mut |tensors| sender.send(tensors).is_ok());
        drop(sender);
        let file = writer.join().expect("writing returns its errors")?;
        Ok((file, done))
    })
}

fn tensors_of_block(device: &dyn Device, model: &Model, stats: &BlockStats) -> Tensors {
    let block = &model.blocks[stats.block_idx];
    let mut tensors = Vec::new();
    for layer in &stats.layers {
        let name = &block.linear(layer.slot).name;
        for (kind, sums) in [(ABSOLUTE, &layer.absolute), (SQUARE, &layer.square)] {
            tensors.extend(sums.as_ref().map(|sums| (format!("{kind}.{name}"), device.encode_bf16(sums))));
        }
        if !layer.token_energies.is_empty() {
            tensors.push((format!("{TOKEN_ENERGY}.{name}"), DType::F32.encode(&layer.token_energies)));
        }
    }
    for group in stats.groups.iter().filter(|g| !g.input_energies.is_empty()) {
        let name = &block.linear(group.group.slots()[0]).name;
        let energies: Vec<f32> = group.input_energies.iter().map(|&e| e as f32).collect();
        tensors.push((format!("{INPUT_ENERGY}.{name}"), DType::F32.encode(&energies)));
    }
    tensors
}

/// A finished survey.
pub(crate) struct SurveyFile {
    file: SafetensorsFile,
}

impl SurveyFile {
    /// Opens a survey and checks that it was made from the recipe's inputs.
    pub(crate) fn open(path: &Path, recipe: &Recipe) -> Result<Self, PipelineError> {
        let file = SafetensorsFile::open(path)?;
        let fail = |problem: &str| Err(PipelineError::Output { path: path.to_path_buf(), problem: problem.into() });
        let found = |key: &str| file.metadata().get(key).map(String::as_str);
        if found("tailorq_survey") != Some(SURVEY_SCHEMA) {
            return fail("is no survey of this version of tailorq: make one with `tailorq survey`");
        }
        if found("origin") != Some(&origin(recipe)?) {
            return fail(
                "was made from another model, data, choice of items or loss (or, with --loss kl, for another grid): repeat those, or make a new survey",
            );
        }
        Ok(SurveyFile { file })
    }

    /// Whether it holds all that `needs` asks for of this model's first linear.
    pub(crate) fn has(&self, model: &Model, needs: &Needs) -> bool {
        specs(model, needs, 0).iter().all(|spec| self.file.get(&spec.name).is_some())
    }

    /// The version of tailorq that made it, where it was told.
    pub(crate) fn made_by(&self) -> Option<&str> {
        self.file.metadata().get("tailorq").map(String::as_str)
    }

    fn require(&self, name: &str) -> Result<tailorq_format::TensorView<'_>, PipelineError> {
        self.file.get(name).ok_or_else(|| PipelineError::Output {
            path: self.file.path().to_path_buf(),
            problem: format!("has no tensor {name}: make a survey for these settings"),
        })
    }

    /// A statistic of one linear, [`ABSOLUTE`] or [`SQUARE`]: `[out, in]`.
    pub(crate) fn statistic(
        &self,
        kind: &str,
        name: &str,
        (rows, cols): (usize, usize),
    ) -> Result<Matrix, PipelineError> {
        let stored = self.stored_statistic(kind, name, (rows, cols))?;
        let mut values = Matrix::zeros(rows, cols);
        stored.read_rows(0, values.data_mut());
        Ok(values)
    }

    /// The same as it lies in the file.
    pub(crate) fn stored_statistic(
        &self,
        kind: &str,
        name: &str,
        (rows, cols): (usize, usize),
    ) -> Result<DenseRows, PipelineError> {
        let tensor = self.require(&format!("{kind}.{name}"))?;
        tensor.expect(DType::BF16.into(), &[rows, cols])?;
        Ok(DenseRows::new(rows, cols, DType::BF16, tensor.bytes).expect("a tensor of this shape has these bytes"))
    }

    /// The token energies of one linear, brought to a mean of 1.
    pub(crate) fn token_energies(&self, model: &Model, layer: LayerId) -> Result<Vec<f32>, PipelineError> {
        let name = &model.blocks[layer.block_idx].linear(layer.slot).name;
        let mut energies = self.require(&format!("{TOKEN_ENERGY}.{name}"))?.to_vector()?;
        let mean = energies.iter().map(|&e| f64::from(e)).sum::<f64>() / energies.len().max(1) as f64;
        if mean > 0.0 {
            energies.iter_mut().for_each(|e| *e = (f64::from(*e) / mean) as f32);
        }
        Ok(energies)
    }

    /// The energies of the inputs of one linear, `[in]`.
    pub(crate) fn input_energies(&self, model: &Model, layer: LayerId) -> Result<Vec<f32>, PipelineError> {
        let first = layer.slot.input_group().slots()[0];
        let name = &model.blocks[layer.block_idx].linear(first).name;
        Ok(self.require(&format!("{INPUT_ENERGY}.{name}"))?.to_vector()?)
    }
}
