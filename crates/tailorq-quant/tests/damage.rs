//! Measured damage of single units, against whole runs of models with that unit replaced.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use tailorq_kernels::Device;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, Model};
use tailorq_quant::allocate::UnitId;
use tailorq_quant::signals::divergence;
use tailorq_quant::survey::{DamageSurvey, Judged, Measure, Metric, SurveySample};
use tailorq_quant::{LayerPlan, LayerSettings, LayerStats, QuantError};
use tailorq_tensor::{Bits, Group, InputGroup, LayerId, Rng, Slot, Weight};

fn model() -> Model {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new("qwen2", 6).unwrap();
    tiny.config.n_blocks = 3;
    tiny.write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap().model
}

/// The last third of each sample is scored.
fn samples() -> Vec<SurveySample> {
    let mut rng = Rng::new(8);
    let lengths = [40, 9, 21];
    let ids = lengths.map(|n| (0..n).map(|_| rng.below(256) as u32).collect::<Vec<_>>());
    ids.into_iter()
        .map(|ids| SurveySample { scored: Some((0..ids.len()).map(|t| 3 * t >= 2 * ids.len()).collect()), ids })
        .collect()
}

fn units() -> Vec<UnitId> {
    let layer = |block_idx, slot| UnitId::Layer(LayerId { block_idx, slot });
    vec![UnitId::Block(0), UnitId::Fused(1, InputGroup::Attention), layer(1, Slot::Down), UnitId::Block(2)]
}

fn formats() -> Vec<LayerSettings> {
    [Bits::Two, Bits::Four].map(|bits| LayerSettings::new(bits, Group::Inputs(32))).to_vec()
}

fn survey<'a>(device: &'a dyn Device, model: &'a Model, units: &'a [UnitId]) -> DamageSurvey<'a> {
    let quantizer = tailorq_quant::find("rtn").unwrap();
    let formats: &'static [LayerSettings] = formats().leak();
    let (judged, measure) = (Judged::Scored, Measure::Divergence);
    DamageSurvey { device, model, quantizer, units, formats, judged, measure, tape_bytes: 1 << 30 }
}

fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The model with a unit rounded.
fn rounded(device: &dyn Device, model: &Model, unit: UnitId, format: LayerSettings) -> Model {
    let (mut model, rtn) = (model.clone(), tailorq_quant::find("rtn").unwrap());
    for (block_idx, block) in model.blocks.iter_mut().enumerate() {
        for slot in Slot::ALL.into_iter().filter(|&slot| unit.contains(LayerId { block_idx, slot })) {
            let weights = block.linear(slot).weight.to_matrix();
            let done = rtn.quantize(device, &weights, &LayerStats::default(), &LayerPlan::from(format)).unwrap();
            block.linear_mut(slot).weight = Weight::from(done.weight);
        }
    }
    model
}

/// Mean over samples of the means over their scored tokens of divergence and rise of the loss, by whole passes.
fn direct(device: &dyn Device, model: &Model, other: &Model) -> [f64; 2] {
    let mut sums = [0.0; 2];
    for sample in samples() {
        let batch = Batch::new([&sample.ids[..]]);
        let logits = |m: &Model| m.logits(device, &m.hidden(device, &batch, None));
        let (clean, noisy) = (logits(model), logits(other));
        let scored = sample.scored.unwrap();
        let places: Vec<usize> = (1..sample.ids.len()).filter(|&t| scored[t]).collect();
        for &t in &places {
            let loss = |row: &[f32]| {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                sum.ln() - f64::from(row[sample.ids[t] as usize])
            };
            let (a, b) = (clean.row(t - 1), noisy.row(t - 1));
            sums[0] += divergence(a, b) / places.len() as f64 / 3.0;
            sums[1] += (loss(b) - loss(a)) / places.len() as f64 / 3.0;
        }
    }
    sums
}

#[test]
fn damages_are_those_of_whole_runs() {
    let (model, device, units) = (model(), tailorq_kernels::cpu(), units());
    let device = device.as_ref();
    let by_divergence = survey(device, &model, &units);
    let by_loss = DamageSurvey { measure: Measure::Likelihood, ..by_divergence };
    assert_eq!(by_divergence.n_passes(), 1.0 + 2.0 * (3.0 + 2.0 + 2.0 + 1.0) / 3.0);
    let found = [by_divergence, by_loss].map(|s| s.run(&samples(), None, &mut go_on).unwrap());
    for (u, &unit) in units.iter().enumerate() {
        for (f, &format) in formats().iter().enumerate() {
            let [kl, loss] = direct(device, &model, &rounded(device, &model, unit, format));
            assert!((found[0][u][f] / kl - 1.0).abs() < 1e-3, "{unit}: {} {kl}", found[0][u][f]);
            assert!((found[1][u][f] - loss.max(0.0)).abs() < 1e-4, "{unit}: {} {loss}", found[1][u][f]);
        }
        assert!(found[0][u][0] > 3.0 * found[0][u][1], "{unit}: 2 bits hurt more than 4");
    }
}

#[test]
fn threads_do_not_change_a_bit_and_a_hessian_changes_the_weights() {
    let (model, device, units) = (model(), tailorq_kernels::cpu(), units());
    let rtn = survey(device.as_ref(), &model, &units);
    let gptq = DamageSurvey { quantizer: tailorq_quant::find("gptq").unwrap(), ..rtn };
    let run = |survey: &DamageSurvey<'_>, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| survey.run(&samples(), None, &mut go_on).unwrap())
    };
    let found = [&rtn, &gptq].map(|s| run(s, 1));
    assert_eq!([&rtn, &gptq].map(|s| run(s, 3)), found);
    assert_ne!(found[0], found[1]);
}

/// The share of outputs that stayed what they were.
struct Same<'a> {
    device: &'a dyn Device,
    expected: Vec<f32>,
    calls: AtomicUsize,
}

impl Metric for Same<'_> {
    fn score(&self, model: &Model) -> Result<f64, QuantError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let hidden = model.hidden(self.device, &Batch::new([&[1u32, 2, 3][..]]), None);
        let same = hidden.data().iter().zip(&self.expected).filter(|(a, b)| (*a - *b).abs() < 0.01).count();
        Ok(same as f64 / self.expected.len() as f64)
    }
}

#[test]
fn a_metric_is_asked_once_a_unit_and_format() {
    let (model, device, units) = (model(), tailorq_kernels::cpu(), units());
    let device = device.as_ref();
    let expected = model.hidden(device, &Batch::new([&[1u32, 2, 3][..]]), None).data().to_vec();
    let metric = Same { device, expected, calls: AtomicUsize::new(0) };
    let survey = DamageSurvey { measure: Measure::Metric(&metric), ..survey(device, &model, &units) };
    let found = survey.run(&samples(), None, &mut go_on).unwrap();
    assert_eq!(metric.calls.load(Ordering::Relaxed), 1 + units.len() * 2);
    assert_eq!(survey.n_passes(), 1.0);
    let other = rounded(device, &model, units[0], formats()[0]);
    assert_eq!(found[0][0], 1.0 - metric.score(&other).unwrap());
    assert!(found.iter().flatten().all(|&d| (0.0..=1.0).contains(&d)) && found[0][0] > found[0][1]);
}

#[test]
fn bad_input_is_refused_and_the_caller_may_stop() {
    let (model, device, units) = (model(), tailorq_kernels::cpu(), units());
    let survey = survey(device.as_ref(), &model, &units);
    let stopped = survey.run(&samples(), None, &mut |n| if n == 3 { ControlFlow::Break(()) } else { go_on(n) });
    assert!(matches!(stopped, Err(QuantError::Interrupted)));
    assert!(matches!(survey.run(&[], None, &mut go_on), Err(QuantError::NoCalibration)));
    let last = DamageSurvey { judged: Judged::LastToken, measure: Measure::Likelihood, ..survey };
    assert!(matches!(last.run(&samples(), None, &mut go_on), Err(QuantError::Settings(_))));
}
