//! Scores of a model's units: which survey answers which signal, and what damages follow from scores that measure none.

use crate::error::{PipelineError, output_error};
use crate::observer::Observer;
use crate::recipe::Recipe;
use crate::report::rounded;
use crate::samples::Samples;
use crate::spill::SpillFile;
use crate::task::allocation::{AllocationSignal, HALF, MeasureKind, ScoreSettings, Span, UnitKind};
use crate::task::answers::AnswerMetric;
use crate::task::continuations::continue_prompts;
use crate::task::scores::{SCORES_SCHEMA, ScoredCandidate, ScoredUnit, Scores, at_width, units_of};
use crate::task::survey::tape_bytes;
use crate::task::uniform::linear_bytes;
use std::ops::ControlFlow;
use std::path::Path;
use tailorq_kernels::Device;
use tailorq_model::OpenedModel;
use tailorq_quant::allocate::UnitId;
use tailorq_quant::signals::{Sampling, information_stability};
use tailorq_quant::survey::{DamageSurvey, Judged, Measure, NoiseSurvey, StabilitySurvey, SurveySample};
use tailorq_quant::{LayerSettings, QuantError};
use tailorq_tensor::{Rng, Slot};

/// Tokens of the model's own continuation of a prompt.
const CONTINUATION_TOKENS: usize = 32;
/// Width of the grid whose steps set the size of TAQ-KL's noise, and at which a derived damage is the score itself.
const NOISE_BITS: u32 = 4;

/// What scoring has in hand.
#[derive(Clone, Copy)]
pub(crate) struct Scoring<'a> {
    pub(crate) device: &'a dyn Device,
    pub(crate) opened: &'a OpenedModel,
    pub(crate) recipe: &'a Recipe,
    pub(crate) samples: Option<&'a Samples>,
    pub(crate) settings: &'a ScoreSettings,
    /// How linears are quantized beside their width.
    pub(crate) base: LayerSettings,
    /// Where streams are spilled to.
    pub(crate) spill: &'a Path,
    pub(crate) observer: &'a dyn Observer,
}

/// A unit with its linears, its score, and its damages by width where they were measured.
struct Raw {
    id: UnitId,
    slots: Vec<Slot>,
    score: f64,
    damages: Option<Vec<f64>>,
}

impl Scoring<'_> {
    /// Scores all units.
    pub(crate) fn run(&self) -> Result<Scores, PipelineError> {
        let units = units_of(&self.opened.model, self.settings.unit);
        self.notes();
        let raw = match self.settings.signal {
            AllocationSignal::Taqo | AllocationSignal::Damage => self.measured(units)?,
            AllocationSignal::TaqIs => of_blocks(units, &self.stability()?),
            AllocationSignal::TaqKl => of_blocks(units, &self.noise()?),
            AllocationSignal::Depth => of_blocks(units, &self.depth()),
            AllocationSignal::Random => {
                let mut rng = Rng::new(self.settings.seed);
                let raw = |(id, slots)| Raw { id, slots, score: rng.uniform(), damages: None };
                units.into_iter().map(raw).collect()
            }
        };
        let units = raw.into_iter().map(|raw| self.scored(raw)).collect();
        let shapes = self.opened.model.blocks.iter().flat_map(|b| &b.linears);
        Ok(Scores {
            tailorq_scores: SCORES_SCHEMA,
            tailorq: env!("CARGO_PKG_VERSION").into(),
            model: self.recipe.model.clone(),
            calibration: self.recipe.calibration.clone().filter(|_| self.settings.reads_data()),
            score: self.settings.clone(),
            base: at_width(self.base, self.settings.widths[0]),
            n_weights: shapes.map(|l| (l.weight.rows() * l.weight.cols()) as u64).sum(),
            units,
        })
    }

    /// What the settings do not say by themselves.
    fn notes(&self) {
        let ScoreSettings { signal, unit, prompts, .. } = self.settings;
        if matches!(signal, AllocationSignal::TaqIs | AllocationSignal::TaqKl) && *unit != UnitKind::Block {
            self.observer.note(&format!(
                "{} looks at blocks: every unit of a block gets the block's score (use --unit block, or the signals taqo or damage, \
                 which measure each unit)",
                signal.name()
            ));
        }
        let available = self.samples.map_or(*prompts, |s| s.sequences.len());
        if self.settings.reads_data() && available < *prompts {
            self.observer.note(&format!(
                "scores look at {available} items, not at {prompts}: the calibration has no more (raise --samples)"
            ));
        }
    }

    /// Bytes and damages of all widths. Numbers are rounded so that they come back from the file as what they were.
    fn scored(&self, raw: Raw) -> ScoredUnit {
        let block = &self.opened.model.blocks[raw.id.block_idx()];
        let shape = |slot: &Slot| (block.linear(*slot).weight.rows(), block.linear(*slot).weight.cols());
        let weights = |slots: &[Slot]| slots.iter().map(shape).map(|(r, c)| r * c).sum::<usize>() as f64;
        let share = weights(&raw.slots) / weights(&Slot::ALL);
        let candidate = |(i, &bits): (usize, &u32)| {
            let settings = at_width(self.base, bits);
            let bytes = raw.slots.iter().map(|slot| linear_bytes(&settings, shape(slot))).sum();
            let damage = match &raw.damages {
                _ if bits == HALF => 0.0,
                Some(measured) => measured[i],
                None => share * self.weight(raw.score) * step_energy(bits),
            };
            ScoredCandidate { bits, bytes, damage: rounded(damage) }
        };
        ScoredUnit {
            name: raw.id.to_string(),
            block_idx: raw.id.block_idx(),
            layers: raw.slots.iter().map(|&slot| block.linear(slot).name.clone()).collect(),
            score: rounded(raw.score),
            candidates: self.settings.widths.iter().enumerate().map(candidate).collect(),
            slots: raw.slots,
        }
    }

    /// What one block at [`NOISE_BITS`] is taken to cost, by a score that measures no cost. A divergence is one. TAQ's score
    /// counts standard deviations: each makes a block as much worse as a factor of e, which under rate and distortion is 0.7
    /// bits. Controls say nothing of size.
    fn weight(&self, score: f64) -> f64 {
        match self.settings.signal {
            AllocationSignal::TaqKl => score,
            AllocationSignal::TaqIs => score.exp(),
            _ => 1.0,
        }
    }

    fn stability(&self) -> Result<Vec<f64>, PipelineError> {
        let (model, settings) = (&self.opened.model, self.settings);
        let prompts: Vec<Vec<u32>> = self.prompts().into_iter().map(|p| p.ids).collect();
        self.observer.stage("information and stability of blocks", model.blocks.len() as u64);
        let sampling = Sampling { without_first: settings.without_sinks, seed: settings.seed, ..Sampling::default() };
        let survey = StabilitySurvey {
            device: self.device,
            model,
            sampling,
            normalize: settings.without_sinks,
            tape_bytes: tape_bytes(self.device),
        };
        let mut spill = self.spill_file()?;
        let found = interruptible(survey.run(&prompts, Some(&mut spill), &mut |b| self.watch(b + 1)))?;
        let (information, variances): (Vec<f64>, Vec<f64>) = found.iter().map(|b| (b.information, b.variance)).unzip();
        Ok(information_stability(&information, &variances))
    }

    fn noise(&self) -> Result<Vec<f64>, PipelineError> {
        let model = &self.opened.model;
        let (samples, judged) = self.judged_samples()?;
        self.observer.stage("noise on the outputs of blocks", model.blocks.len() as u64);
        let survey = NoiseSurvey {
            device: self.device,
            model,
            bits: NOISE_BITS,
            seed: self.settings.seed,
            judged,
            tape_bytes: tape_bytes(self.device),
        };
        let mut spill = self.spill_file()?;
        let found = interruptible(survey.run(&samples, Some(&mut spill), &mut |b| self.watch(b + 1)))?;
        Ok(found.iter().map(|b| b.divergence).collect())
    }

    /// How near to an end each block is.
    fn depth(&self) -> Vec<f64> {
        let n = self.opened.model.blocks.len();
        (0..n).map(|b| -(b.min(n - 1 - b) as f64)).collect()
    }

    /// Damages of all units at all widths; the score is that of the narrowest.
    fn measured(&self, units: Vec<(UnitId, Vec<Slot>)>) -> Result<Vec<Raw>, PipelineError> {
        let (device, settings) = (self.device, self.settings);
        let (samples, judged) = self.judged_samples()?;
        let ids: Vec<UnitId> = units.iter().map(|(id, _)| *id).collect();
        let tried = settings.widths.iter().filter(|&&w| w != HALF);
        let formats: Vec<LayerSettings> = tried.map(|&w| at_width(self.base, w)).collect();
        let metric = match settings.measure {
            MeasureKind::Answers => Some(AnswerMetric::new((device, self.opened), &samples, self.observer)?),
            _ => None,
        };
        let measure = match (settings.measure, &metric) {
            (_, Some(metric)) => Measure::Metric(metric),
            (MeasureKind::Likelihood, _) => Measure::Likelihood,
            _ => Measure::Divergence,
        };
        let quantizer = tailorq_quant::find(&settings.probe).expect("settings were checked");
        let (model, units_, tape_bytes) = (&self.opened.model, &ids[..], tape_bytes(device));
        let survey =
            DamageSurvey { device, model, quantizer, units: units_, formats: &formats, judged, measure, tape_bytes };
        let n = ids.len() * formats.len();
        let tokens: usize = samples.iter().map(|s| s.ids.len()).sum();
        let answers = if metric.is_some() { format!(" and {} rounds of answers", n + 1) } else { String::new() };
        self.observer.note(&format!(
            "measuring {} units at {} widths: {:.1} forward passes over {tokens} tokens{answers}",
            ids.len(),
            formats.len(),
            survey.n_passes()
        ));
        self.observer.stage("measuring damages", n as u64);
        let mut spill = self.spill_file()?;
        let damages = interruptible(survey.run(&samples, Some(&mut spill), &mut |done| self.watch(done)))?;
        let raw = |((id, slots), damages): (_, Vec<f64>)| Raw { id, slots, score: damages[0], damages: Some(damages) };
        Ok(units.into_iter().zip(damages).map(raw).collect())
    }

    fn watch(&self, done: usize) -> ControlFlow<()> {
        self.observer.progress(done as u64, "");
        if self.observer.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn spill_file(&self) -> Result<SpillFile, PipelineError> {
        SpillFile::create(self.spill).map_err(|e| output_error(self.spill, &e))
    }

    /// The items that are looked at, whole, with the flags of their completions.
    fn items(&self) -> Vec<SurveySample> {
        let samples = self.samples.expect("a signal that reads data has calibration");
        let (n, available) = (self.settings.prompts, samples.sequences.len());
        // Evenly over all of them: files are often sorted, and general text comes last.
        let chosen = (0..n.min(available)).map(|i| i * available / n.min(available));
        let item =
            |i: usize| SurveySample { ids: samples.sequences[i].clone(), scored: samples.completions[i].clone() };
        chosen.map(item).collect()
    }

    /// Their prompts: what stands before a completion, or the whole item.
    fn prompts(&self) -> Vec<SurveySample> {
        let prompt = |item: SurveySample| {
            let flags = item.scored.unwrap_or_default();
            let n = flags.iter().position(|&f| f).unwrap_or(item.ids.len());
            SurveySample { ids: item.ids[..n].to_vec(), scored: None }
        };
        self.items().into_iter().map(prompt).collect()
    }

    /// The samples whose predictions are compared, and at which tokens.
    fn judged_samples(&self) -> Result<(Vec<SurveySample>, Judged), PipelineError> {
        Ok(match self.settings.span {
            Span::Last => (self.prompts(), Judged::LastToken),
            Span::Prompt => (self.prompts(), Judged::Scored),
            Span::Completion => (self.items(), Judged::Scored),
            Span::Continuation => (self.continuations()?, Judged::Scored),
        })
    }

    /// The prompts with the model's own greedy continuations, which are what is scored.
    fn continuations(&self) -> Result<Vec<SurveySample>, PipelineError> {
        let prompts: Vec<Vec<u32>> = self.prompts().into_iter().map(|p| p.ids).filter(|ids| !ids.is_empty()).collect();
        continue_prompts((self.device, self.opened), &prompts, CONTINUATION_TOKENS, self.observer)
    }
}

/// Each unit with the score of its block.
fn of_blocks(units: Vec<(UnitId, Vec<Slot>)>, scores: &[f64]) -> Vec<Raw> {
    let raw = |(id, slots): (UnitId, _)| Raw { id, slots, score: scores[id.block_idx()], damages: None };
    units.into_iter().map(raw).collect()
}

/// The energy of rounding to a grid of this width over that of one of [`NOISE_BITS`]: steps shrink with the number of
/// points, and energy is their square.
fn step_energy(bits: u32) -> f64 {
    let steps = |bits: u32| 2f64.powi(bits as i32) - 1.0;
    (steps(NOISE_BITS) / steps(bits)).powi(2)
}

fn interruptible<T>(result: Result<T, QuantError>) -> Result<T, PipelineError> {
    match result {
        Err(QuantError::Interrupted) => Err(PipelineError::Cancelled),
        other => Ok(other?),
    }
}
