//! The benchmark on a tiny model: what it counts is right, what it measures is there.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::ops::ControlFlow;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Model, open};
use tailorq_runtime::{BENCH_START, BenchOptions, BenchStage, KvType, RuntimeError, StepBytes, bench};

fn tiny(change: impl FnOnce(&mut TinyModel)) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new("qwen2", 3).unwrap();
    change(&mut tiny);
    tiny.write_directory(dir.path()).unwrap();
    open(dir.path().to_str().unwrap()).unwrap().model
}

const SMALL: BenchOptions =
    BenchOptions { prompt: 20, generate: 6, batch: 1, repeat: 3, seed: 1, kv: KvType::F16, memory_bytes: 1 << 20 };

#[test]
fn bytes_are_those_of_the_stored_weights() {
    let model = tiny(|_| {});
    // Hidden 64, feed-forward 96, 4 heads of 16 and 2 for keys and values, vocabulary 259, 2 blocks, all F32.
    let linears = 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96);
    let vectors = 4 * (2 * (2 * 64 + 64 + 2 * 32) + 64);
    let step = StepBytes { linears, head: 4 * 259 * 64, rest: vectors + 4 * 64, kv: 0 };
    assert_eq!(StepBytes::of(&model, 1), step);
    assert_eq!(StepBytes::of(&model, 5).total() - step.total(), 4 * 4 * 64);
}

#[test]
fn everything_is_measured_in_turn() {
    let model = tiny(|_| {});
    for batch in [1, 3] {
        let mut stages = Vec::new();
        let options = BenchOptions { batch, ..SMALL };
        let report = bench(&model, &*tailorq_kernels::cpu(), &options, &mut |stage, repeat| {
            stages.push((stage, repeat));
            ControlFlow::Continue(())
        })
        .unwrap();
        let of = |i| [(BenchStage::Prompt, i), (BenchStage::Generate, i), (BenchStage::Memory, i)];
        assert_eq!(stages, [&[(BenchStage::FirstToken, 0)][..], &of(0), &of(1), &of(2)].concat());
        let (prompt, generate, read) = (report.prompt.unwrap(), report.generate.unwrap(), report.read.unwrap());
        for spread in [prompt, generate, read, report.memory, report.share.unwrap()] {
            assert!(0.0 < spread.min && spread.min <= spread.median && spread.median <= spread.max, "{spread:?}");
        }
        assert!(report.first_token.as_nanos() > 0);
        let steps = generate.max / batch as f64;
        assert!((read.max / (steps * report.step.total() as f64) - 1.0).abs() < 1e-9);
        assert_eq!(cfg!(target_os = "linux"), report.peak_memory.is_some_and(|bytes| bytes > 1 << 20));
        // Keys and values of half the generation: 2 blocks, keys and values of 2 heads of 16, in 2 bytes each.
        assert_eq!(report.step.kv, batch * (BENCH_START + SMALL.generate / 2) * 2 * 2 * 2 * 16 * 2);
    }
}

#[test]
fn parts_can_be_left_out_and_what_does_not_fit_is_refused() {
    let model = tiny(|tiny| tiny.config.max_positions = 30);
    let device = tailorq_kernels::cpu();
    let mut go_on = |_: BenchStage, _: usize| ControlFlow::Continue(());
    let report = bench(&model, &*device, &BenchOptions { prompt: 0, repeat: 1, ..SMALL }, &mut go_on).unwrap();
    assert!(report.prompt.is_none() && report.generate.is_some());
    let report = bench(&model, &*device, &BenchOptions { generate: 0, repeat: 1, ..SMALL }, &mut go_on).unwrap();
    assert!(report.prompt.is_some() && report.generate.is_none() && report.share.is_none());
    for options in [BenchOptions { prompt: 31, ..SMALL }, BenchOptions { generate: 27, ..SMALL }] {
        let refused = bench(&model, &*device, &options, &mut go_on);
        assert!(matches!(refused, Err(RuntimeError::ContextFull { needed: 31, limit: 30 })), "{refused:?}");
    }
    let stopped = bench(&model, &*device, &SMALL, &mut |stage, _| match stage {
        BenchStage::Generate => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(RuntimeError::Interrupted)));
}
