//! Factor, GPTQ and RTN of the linears of a 0.5B and a 7B model at 2 bits, groups of 128, on a CUDA device: seconds of each stage
//! beside the time that its arithmetic takes at the processors' rate: `cargo bench -p tailorq-cuda --bench rounding
//! [-- ROWSxCOLS ...]`.
#![allow(clippy::print_stdout, reason = "a benchmark is a program")]

use std::time::Instant;
use tailorq_cuda::CudaOptions;
use tailorq_kernels::{ClipCandidates, Device, ErrorFeedback, Rounded, RoundingJob};
use tailorq_quant::quantize::{Gptq, GridRule};
use tailorq_quant::{Clip, LayerPlan, LayerSettings, LayerStats, Quantizer};
use tailorq_tensor::{Bits, Group, Layout, Matrix, Rng};

/// Operations of f32 in a second: 132 processors with 128 lanes at 1.98 GHz; a product with its sum is two.
const FLOPS: f64 = 132.0 * 128.0 * 1.98e9 * 2.0;

/// Instructions for each weight and candidate of the clip search by squares: from scaling to the sum.
const SEARCH: f64 = 10.0;

const TURNS: usize = 5;

fn normal(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
}

/// The best of some turns, in milliseconds; each ends when the device is done.
fn best<T>(device: &dyn Device, mut work: impl FnMut() -> T) -> (f64, T) {
    let wait = Matrix::zeros(1, 1);
    let mut best: Option<(f64, T)> = None;
    for _ in 0..TURNS {
        device.pick(&wait, &[(0, 0)]);
        let start = Instant::now();
        let result = work();
        device.pick(&wait, &[(0, 0)]);
        let time = start.elapsed().as_secs_f64() * 1e3;
        if best.as_ref().is_none_or(|(t, _)| time < *t) {
            best = Some((time, result));
        }
    }
    best.expect("there is a turn")
}

fn report(what: &str, time: f64, floor: f64) {
    println!("  {what:<34} {time:9.3} ms, arithmetic {floor:8.3} ms, {:5.1} %", 100.0 * floor / time);
}

fn measure(device: &dyn Device, rows: usize, cols: usize) {
    println!("[{rows}, {cols}]");
    let (w, n) = (normal(rows, cols, 1), cols as f64);
    let mut h = Matrix::zeros(cols, cols);
    for seed in 0..2 {
        device.gram_matrix(&normal(cols, cols, 2 + seed), &mut h);
    }
    let on_diagonal: Vec<(usize, usize)> = (0..cols).map(|i| (i, i)).collect();
    device.add_at(&mut h, &on_diagonal, &vec![0.02 * cols as f32; cols]);
    let (time, upper) = best(device, || {
        let mut upper = h.clone();
        device.inverse_cholesky_upper(&mut upper).expect("the matrix is definite");
        upper
    });
    report("factor", time, 1e3 * 2.0 / 3.0 * n.powi(3) / FLOPS);

    let inverse_diagonal: Vec<f32> = device.pick(&upper, &on_diagonal).iter().map(|u| 1.0 / u).collect();
    let importance: Vec<f32> = inverse_diagonal.iter().map(|d| d * d / inverse_diagonal[0].powi(2)).collect();
    let dead = vec![false; cols];
    let layout = Layout::new(Bits::Two, Group::Inputs(128));
    let feedback = ErrorFeedback { upper: &upper, inverse_diagonal: &inverse_diagonal, dead: &dead, added: 0.02 * n };
    let round = |feedback: Option<ErrorFeedback<'_>>, clip: Clip| -> (f64, Rounded) {
        let rule = GridRule::new(layout, clip);
        let factors: Vec<f32> = rule.clip.iter().flat_map(|c| c.factors()).collect();
        let importance = (clip == Clip::Hessian).then_some(&importance[..]);
        let clip = rule.clip.map(|c| ClipCandidates { factors: &factors, norm: c.norm, importance });
        let job = RoundingJob { weights: &w, feedback, layout, clip, kept: None };
        best(device, || device.round_layer(&job).expect("all weights are in range"))
    };
    let size = (rows * cols) as f64;
    let product = 1e3 * size * n / FLOPS;
    let search = 1e3 * size * 80.0 * SEARCH / (FLOPS / 2.0);
    report("rtn, no clip search", round(None, Clip::None).0, 0.0);
    report("rtn, clip search by |e|^2.4", round(None, Clip::Magnitude).0, 2.6 * search);
    report("gptq, no clip search", round(Some(feedback), Clip::None).0, product);
    let (time, rounded) = round(Some(feedback), Clip::Hessian);
    report("gptq, clip search by the Hessian", time, product + search);
    println!("  relative error {:.4}", (rounded.error_energy / rounded.weight_energy).sqrt());

    let mut settings = LayerSettings::new(Bits::Two, Group::Inputs(128));
    settings.clip = Clip::Hessian;
    let (plan, stats) =
        (LayerPlan::from(settings), LayerStats { hessian: Some(&h), n_tokens: 2 * cols, ..LayerStats::default() });
    let start = Instant::now();
    let quantized = Gptq.quantize(device, &w, &stats, &plan).expect("the layer is sound");
    let time = start.elapsed().as_secs_f64() * 1e3;
    report("the quantizer, packing and all", time, product + search + 1e3 * 2.0 / 3.0 * n.powi(3) / FLOPS);
    println!("  proxy loss {:.4}", quantized.proxy_loss.unwrap_or_default());
}

fn main() {
    let device = match tailorq_cuda::open(0, CudaOptions::default()) {
        Ok(device) => device,
        Err(error) => return println!("skipped: {error}"),
    };
    println!("{}", device.name());
    let asked: Vec<(usize, usize)> = std::env::args()
        .filter_map(|a| a.split_once('x').and_then(|(r, c)| Some((r.parse().ok()?, c.parse().ok()?))))
        .collect();
    let all = vec![(4864, 896), (896, 4864), (11008, 4096), (4096, 11008)];
    for (rows, cols) in if asked.is_empty() { all } else { asked } {
        measure(device.as_ref(), rows, cols);
    }
}
