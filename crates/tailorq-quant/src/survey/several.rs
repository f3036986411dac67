//! One survey on several devices: each runs over samples of its own, and block by block their statistics are added up.
//!
//! Samples stay in their order: the first device takes the first of them. Sums are taken on the first device in the order of the
//! devices, so that the same devices give the same bits; another number of them adds in another order.

use super::run::{Sink, Summary, Survey, SurveySample};
use super::stats::BlockStats;
use crate::QuantError;
use crate::calibrate::shares;
use std::io;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;
use tailorq_model::Spill;

/// Between two looks at what another thread does.
const PAUSE: Duration = Duration::from_micros(200);

/// A device at work: its blocks, as they are finished, and what it has to say at the end.
struct Run<'scope> {
    blocks: Receiver<BlockStats>,
    thread: ScopedJoinHandle<'scope, Result<Summary, QuantError>>,
}

/// Runs over all samples, on a thread for each device.
pub(super) fn run(
    survey: &Survey<'_>,
    samples: &[&SurveySample],
    spill: Option<&mut dyn Spill>,
    sink: &mut Sink<'_>,
) -> Result<Summary, QuantError> {
    let devices = survey.device.group();
    let lengths: Vec<usize> = samples.iter().map(|s| s.ids.len()).collect();
    let shares = shares(&lengths, devices.len());
    let n = shares.len();
    let spill = spill.map(Mutex::new);
    thread::scope(|scope| {
        let start = |(idx, (share, device))| {
            // A device waits with a finished block until it is taken: none is far ahead of the others.
            let (sender, blocks) = sync_channel::<BlockStats>(0);
            let alone = Survey { device, ..*survey };
            let samples: &[&SurveySample] = &samples[std::ops::Range::<usize>::clone(share)];
            let mut own = spill.as_ref().map(|all| OwnPlaces { all, idx, n });
            let work = move || {
                let go_on = |sent: bool| if sent { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
                let mut hand_over = |stats| Ok(go_on(sender.send(stats).is_ok()));
                alone.run_alone(samples, own.as_mut().map(|own| own as &mut dyn Spill), &mut hand_over)
            };
            Run { blocks, thread: scope.spawn(work) }
        };
        let runs: Vec<Run<'_>> = shares.iter().zip(devices).enumerate().map(start).collect();
        let taken = take_blocks(survey, &runs, sink);
        // Without anybody to take them, blocks end the runs.
        let summaries: Vec<_> = runs.into_iter().map(|run| finished(run.blocks, run.thread)).collect();
        taken?;
        together(summaries)
    })
}

/// Takes every block from all devices and hands the sums on, until a device ends.
fn take_blocks(survey: &Survey<'_>, runs: &[Run<'_>], sink: &mut Sink<'_>) -> Result<(), QuantError> {
    loop {
        let mut sums: Option<BlockStats> = None;
        for run in runs {
            let Some(stats) = received(&run.blocks) else { return Ok(()) };
            match &mut sums {
                Some(sums) => sums.merge(survey.device, stats),
                None => sums = Some(stats),
            }
        }
        let Some(sums) = sums else { return Ok(()) };
        if sink(sums)?.is_break() {
            return Err(QuantError::Interrupted);
        }
    }
}

/// The next block; `None` when the device has ended. A thread of the pool goes on working for the others while it waits: the pool
/// may have no other.
fn received(blocks: &Receiver<BlockStats>) -> Option<BlockStats> {
    loop {
        match blocks.try_recv() {
            Ok(stats) => return Some(stats),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => pause(),
        }
    }
}

fn pause() {
    if rayon::yield_now() != Some(rayon::Yield::Executed) {
        thread::sleep(PAUSE);
    }
}

fn finished(
    blocks: Receiver<BlockStats>,
    thread: ScopedJoinHandle<'_, Result<Summary, QuantError>>,
) -> Result<Summary, QuantError> {
    drop(blocks);
    while !thread.is_finished() {
        pause();
    }
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What all devices say together, or the first device's error that is not about another's.
fn together(summaries: Vec<Result<Summary, QuantError>>) -> Result<Summary, QuantError> {
    let is_own = |r: &Result<Summary, QuantError>| matches!(r, Err(error) if !matches!(error, QuantError::Interrupted));
    let own = summaries.iter().position(is_own);
    let mut summaries = summaries;
    if let Some(i) = own {
        return summaries.swap_remove(i);
    }
    let summaries = summaries.into_iter().collect::<Result<Vec<_>, _>>()?;
    let sum = |of: fn(&Summary) -> usize| summaries.iter().map(of).sum::<usize>();
    let n_samples = sum(|s| s.n_samples);
    let losses = summaries.iter().map(|s| s.mean_loss.map(|loss| loss * s.n_samples as f64));
    let total = losses.sum::<Option<f64>>();
    let mean_loss = total.map(|total| total / n_samples as f64);
    Ok(Summary { n_samples, n_tokens: sum(|s| s.n_tokens), n_targets: sum(|s| s.n_targets), mean_loss })
}

/// The keys of one device among those of `n`, in the one place that all spill to.
struct OwnPlaces<'a, 's> {
    all: &'a Mutex<&'s mut dyn Spill>,
    idx: usize,
    n: usize,
}

impl OwnPlaces<'_, '_> {
    fn with<T>(&self, key: usize, work: impl FnOnce(&mut dyn Spill, usize) -> T) -> T {
        let mut all = self.all.lock().expect("no thread panics while it spills");
        work(&mut **all, key * self.n + self.idx)
    }
}

impl Spill for OwnPlaces<'_, '_> {
    fn put(&mut self, key: usize, values: &[f32]) -> io::Result<()> {
        self.with(key, |all, key| all.put(key, values))
    }

    fn get(&mut self, key: usize, values: &mut [f32]) -> io::Result<()> {
        self.with(key, |all, key| all.get(key, values))
    }
}
