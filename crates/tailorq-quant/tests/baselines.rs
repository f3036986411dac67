//! Published methods that are simulated: against direct calculations, against rounding to nearest, and on awkward input.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod direct;

use direct::{cpu, hessian, normal};
use tailorq_kernels::Device;
use tailorq_quant::quantize::{Awq, BiLlm, Gptq, PbLlm, Rtn, SlimLlm, SpQr, SqueezeLlm};
use tailorq_quant::{Clip, ElementMask, LayerPlan, LayerSettings, LayerStats, Note, QuantError, Quantized, Quantizer};
use tailorq_tensor::{Bits, Group, Matrix, Slot};

const SIMULATED: [&dyn Quantizer; 6] = [&SlimLlm, &SpQr, &SqueezeLlm, &Awq, &BiLlm, &PbLlm];

const N_TOKENS: usize = 700;

fn squares(rows: usize, cols: usize, seed: u64) -> Matrix {
    let gradients = normal(rows, cols, seed);
    Matrix::from_vec(rows, cols, gradients.data().iter().map(|g| g * g * g * g).collect())
}

fn settings(bits: Bits) -> LayerSettings {
    LayerSettings::new(bits, Group::Inputs(128))
}

fn run(q: &dyn Quantizer, w: &Matrix, h: &Matrix, s: &LayerSettings) -> Quantized {
    let square = squares(w.rows(), w.cols(), 99);
    let stats = LayerStats { hessian: Some(h), n_tokens: N_TOKENS, square: Some(&square), ..LayerStats::default() };
    q.quantize(cpu().as_ref(), w, &stats, &(*s).into()).unwrap()
}

/// Bits a weight that the method's own format takes.
fn counted(q: &Quantized) -> f64 {
    let reader = q.weight.reader();
    q.counted_bits.unwrap() as f64 / (reader.rows() * reader.cols()) as f64
}

#[test]
fn values_lie_at_sixteen_bits_and_losses_are_theirs() {
    let (w, h) = (normal(70, 300, 1), hessian(300, N_TOKENS, 2));
    for q in SIMULATED {
        assert!(q.stores_half());
        let done = run(q, &w, &h, &settings(Bits::Two));
        let predicted = q.counted_bits((70, 300), &settings(Bits::Two)).unwrap() as f64;
        // Of the others the data decides some: noise has far more outliers than weights have.
        let of_data = [("spqr", 0.5), ("slim-llm", 0.15)].into_iter().find(|(name, _)| *name == q.name());
        let off = (predicted / done.counted_bits.unwrap() as f64 - 1.0).abs();
        assert!(off <= of_data.map_or(0.0, |(_, most)| most), "{}: {off}", q.name());
        assert!(done.weight.packed().is_none() && done.weight.reader().bytes() == 2 * 70 * 300, "{}", q.name());
        let values = done.weight.to_matrix();
        let (mut error, mut energy, mut loss) = (0.0, 0.0, 0.0);
        for r in 0..70 {
            let e: Vec<f64> = w.row(r).iter().zip(values.row(r)).map(|(w, v)| f64::from(w - v)).collect();
            error += e.iter().map(|e| e * e).sum::<f64>();
            energy += w.row(r).iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
            let at = |i: usize, j: usize| f64::from(h.row(i.max(j))[i.min(j)]);
            for i in 0..300 {
                loss += e[i] * (0..300).map(|j| at(i, j) * e[j]).sum::<f64>();
            }
        }
        loss /= N_TOKENS as f64;
        assert!((done.relative_error / (error / energy).sqrt() - 1.0).abs() < 1e-5, "{}", q.name());
        assert!((done.proxy_loss.unwrap() / loss - 1.0).abs() < 1e-3, "{}", q.name());
    }
}

#[test]
fn they_lose_less_than_rounding_at_their_width() {
    let (w, h) = (normal(130, 384, 3), hessian(384, N_TOKENS, 4));
    for bits in [Bits::Two, Bits::Three] {
        let s = settings(bits);
        let rounded = run(&Rtn, &w, &h, &s).proxy_loss.unwrap();
        for (q, factor) in [(&SlimLlm as &dyn Quantizer, 0.75), (&SpQr, 0.5), (&Awq, 0.97)] {
            let loss = run(q, &w, &h, &s).proxy_loss.unwrap();
            assert!(loss < factor * rounded, "{} {bits:?}: {loss}, rounding {rounded}", q.name());
        }
        // As its authors run it.
        let s = LayerSettings { damping: 1.0, act_order: true, ..s };
        let loss = run(&SpQr, &w, &h, &s).proxy_loss.unwrap();
        assert!(loss < 0.75 * rounded, "spqr {bits:?}, act-order: {loss}, rounding {rounded}");
        // Tables are placed by the Fisher information, and by that they are judged.
        let fisher = squares(130, 384, 99);
        let weighted = |q: &Quantized| {
            let values = q.weight.to_matrix();
            let terms = w.data().iter().zip(values.data()).zip(fisher.data());
            terms.map(|((w, v), f)| f64::from(*f) * f64::from(w - v).powi(2)).sum::<f64>()
        };
        let [table, grid] = [&SqueezeLlm as &dyn Quantizer, &Rtn].map(|q| weighted(&run(q, &w, &h, &s)));
        assert!(table < 0.7 * grid, "{bits:?}: {table}, rounding {grid}");
    }
    // One bit for most weights, three in all: better than two signs a weight would be, worse than two bits with GPTQ.
    for q in [&BiLlm as &dyn Quantizer, &PbLlm] {
        let done = run(q, &w, &h, &settings(Bits::Two));
        assert!(done.relative_error < 0.75, "{}: {}", q.name(), done.relative_error);
    }
    let gptq = run(&Gptq, &w, &h, &settings(Bits::Three)).proxy_loss.unwrap();
    assert!(run(&BiLlm, &w, &h, &settings(Bits::Two)).proxy_loss.unwrap() > gptq);
}

#[test]
fn threads_do_not_matter() {
    let (w, h) = (normal(150, 200, 5), hessian(200, N_TOKENS, 6));
    for q in SIMULATED {
        let s = LayerSettings { act_order: true, ..settings(Bits::Two) };
        let results = [1, 3].map(|n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| run(q, &w, &h, &s))
        });
        assert_eq!(results[0].weight.to_matrix(), results[1].weight.to_matrix(), "{}", q.name());
        assert_eq!(results[0].proxy_loss, results[1].proxy_loss);
        assert_eq!(results[0].counted_bits, results[1].counted_bits);
    }
}

/// Inputs that were never active, rows of one value, rows of zeros, one row, one column.
#[test]
fn awkward_matrices_stay_finite() {
    let dead = |cols: usize| {
        let mut h = hessian(cols, N_TOKENS, 7);
        for i in 0..cols {
            for j in 0..=i {
                if i % 5 == 2 || j % 5 == 2 {
                    h.row_mut(i)[j] = 0.0;
                }
            }
        }
        h
    };
    for (rows, cols) in [(1, 1), (1, 40), (17, 1), (3, 129), (66, 70)] {
        let mut w = normal(rows, cols, 8);
        (0..rows).filter(|r| r % 3 == 1).for_each(|r| w.row_mut(r).fill(0.02));
        (0..rows).filter(|r| r % 7 == 2).for_each(|r| w.row_mut(r).fill(0.0));
        let same = Matrix::from_vec(rows, cols, vec![-0.3; rows * cols]);
        let silent = Matrix::zeros(cols, cols);
        for q in SIMULATED {
            for h in [&dead(cols), &silent] {
                let done = run(q, &w, h, &settings(Bits::Two));
                let values = done.weight.to_matrix();
                assert!(values.data().iter().all(|v| v.is_finite()), "{} {rows}x{cols}", q.name());
                assert!(done.relative_error < 1.2, "{} {rows}x{cols}: {}", q.name(), done.relative_error);
                if cols == 70 && q.needs().hessian {
                    let is_told = |n: &Note| matches!(n, Note::DeadColumns { .. });
                    assert!(done.notes.iter().any(is_told), "{}", q.name());
                }
                let done = run(q, &same, h, &settings(Bits::Two));
                let error = done.relative_error;
                // Two formats miss even equal weights: mean +- mean magnitude (SliM-LLM's one bit), and a mean that counts
                // salient weights as zeros (PB-LLM's).
                let misses = (q.name() == "slim-llm" && cols > 128) || (q.name() == "pb-llm" && error < 0.5);
                assert!(error < 1e-2 || misses, "{} {rows}x{cols}: {error}", q.name());
            }
        }
    }
    for q in SIMULATED {
        let empty = run(q, &Matrix::zeros(0, 40), &hessian(40, N_TOKENS, 9), &settings(Bits::Two));
        assert_eq!((empty.weight.reader().rows(), empty.relative_error), (0, 0.0), "{}", q.name());
    }
}

#[test]
fn what_a_format_takes_is_counted_by_hand() {
    let (rows, cols) = (64, 256);
    let (w, h) = (normal(rows, cols, 10), hessian(cols, N_TOKENS, 11));
    let n = (rows * cols) as f64;
    let s = settings(Bits::Three);
    // Codes, two 16-bit counts and columns: 8 + 65 outliers; eight levels of 16 bits a row.
    let sparse = |n_outliers: f64| 16.0 * rows as f64 + 32.0 * n_outliers;
    let squeezed = run(&SqueezeLlm, &w, &h, &s);
    assert_eq!(counted(&squeezed) * n, 3.0 * n + 8.0 * 16.0 * rows as f64 + sparse(8.0 + 65.0));
    // Two 3-bit statistics for 16 weights, four 16-bit ones for 256, and whatever outliers it found.
    let spqr = run(&SpQr, &w, &h, &LayerSettings { damping: 1.0, ..s });
    let outliers = (counted(&spqr) * n - n * (3.0 + 6.0 / 16.0 + 64.0 / 256.0) - 16.0 * rows as f64) / 32.0;
    assert!(outliers.fract() == 0.0 && outliers > 0.0 && outliers < 0.05 * n, "{outliers}");
    let ordered = run(&SpQr, &w, &h, &LayerSettings { damping: 1.0, act_order: true, ..s });
    assert!(ordered.counted_bits.unwrap() % 32 == spqr.counted_bits.unwrap() % 32, "256 columns of 16 bits");
    // Two blocks, one up and one down: codes of 3 bits on average, a scale and a zero for each row and block.
    let slim = run(&SlimLlm, &w, &h, &s);
    assert_eq!(counted(&slim) * n, 3.0 * n + (2.0 * 16.0 + 2.0 + 4.0) * rows as f64 + 4.0);
    let two = run(&SlimLlm, &w, &h, &settings(Bits::Two));
    assert_eq!(counted(&two) * n, 2.0 * n + (32.0 + 16.0 + 3.0) * rows as f64 + 4.0);
    // Rounded to nearest in the packed layout, with a scale an input.
    let awq = run(&Awq, &w, &h, &s);
    let packed = run(&Rtn, &w, &h, &s).weight.reader().bytes();
    assert_eq!(awq.counted_bits.unwrap(), 8 * packed as u64 + 16 * cols as u64);
    // 2 bits of sign and part, 8 parameters for 128 weights, a bit a column.
    let billm = run(&BiLlm, &w, &h, &s);
    assert_eq!(counted(&billm) * n, 3.0 * n + cols as f64);
    // A bitmap and 0.9 + 0.8 bits; parameters of one group a row.
    let row = LayerSettings::new(Bits::Two, Group::Row);
    let salient = (0.1 * n).floor();
    let expected = n + 8.0 * salient + (n - salient) + (32.0 + 24.0) * rows as f64;
    assert_eq!(counted(&run(&PbLlm, &w, &h, &row)) * n, expected);
}

#[test]
fn what_cannot_be_is_refused() {
    let (mut w, h) = (normal(20, 64, 12), hessian(64, N_TOKENS, 13));
    let square = squares(20, 64, 14);
    let all = LayerStats { hessian: Some(&h), n_tokens: 9, square: Some(&square), ..LayerStats::default() };
    let s = settings(Bits::Two);
    let error = |q: &dyn Quantizer, w: &Matrix, stats: &LayerStats<'_>, plan: &LayerPlan| {
        q.quantize(cpu().as_ref(), w, stats, plan).unwrap_err()
    };
    let mask = ElementMask::from_indices(20, 64, [5]).unwrap();
    let mut symmetric = s;
    symmetric.layout.symmetric = true;
    for q in SIMULATED {
        let missing = error(q, &w, &LayerStats::default(), &s.into());
        let is_square = matches!(missing, QuantError::SquareMissing { .. });
        assert_eq!(is_square, q.needs().square, "{missing}");
        assert_eq!(matches!(missing, QuantError::HessianMissing { .. }), q.needs().hessian, "{missing}");
        let plan = LayerPlan { kept: Some(std::sync::Arc::new(mask.clone())), ..LayerPlan::from(s) };
        for plan in [plan, symmetric.into(), LayerSettings { damping: -1.0, ..s }.into()] {
            assert!(matches!(error(q, &w, &all, &plan), QuantError::Settings(_)), "{}", q.name());
        }
    }
    assert!(matches!(error(&SlimLlm, &w, &all, &settings(Bits::Eight).into()), QuantError::Settings(_)));
    w.row_mut(7)[3] = f32::NAN;
    for q in SIMULATED {
        let placed = error(q, &w, &all, &s.into());
        assert!(matches!(placed, QuantError::NonFiniteWeight { row: 7, col: 3, .. }), "{}: {placed}", q.name());
    }
    let mut bad = square.clone();
    bad.row_mut(2)[9] = f32::INFINITY;
    let stats = LayerStats { square: Some(&bad), ..LayerStats::default() };
    assert!(error(&SqueezeLlm, &normal(20, 64, 15), &stats, &s.into()).to_string().contains("row 2, column 9"));
    // A Hessian beyond help: rounded, packed, and told.
    let mut hopeless = Matrix::zeros(64, 64);
    (0..64).for_each(|i| hopeless.row_mut(i)[i] = 1.0);
    hopeless.row_mut(1)[0] = 1e9;
    let stats = LayerStats { hessian: Some(&hopeless), n_tokens: 9, ..LayerStats::default() };
    for q in [&SlimLlm as &dyn Quantizer, &SpQr, &BiLlm, &PbLlm] {
        let done = q.quantize(cpu().as_ref(), &normal(20, 64, 16), &stats, &s.into()).unwrap();
        assert!(matches!(done.notes.last(), Some(Note::FellBackToRtn { .. })), "{}", q.name());
        assert!(done.weight.packed().is_some() && done.counted_bits.is_none());
    }
}

/// AWQ does not clip queries and keys, and without a clip search nothing else either.
#[test]
fn awq_leaves_queries_and_keys_unclipped() {
    let (w, h) = (normal(40, 128, 17), hessian(128, N_TOKENS, 18));
    let of = |slot, clip| {
        let s = LayerSettings { clip, ..settings(Bits::Two) };
        let stats = LayerStats { hessian: Some(&h), n_tokens: N_TOKENS, slot, ..LayerStats::default() };
        Awq.quantize(cpu().as_ref(), &w, &stats, &s.into()).unwrap()
    };
    let plain = of(None, Clip::None);
    for slot in [Slot::Q, Slot::K] {
        assert_eq!(of(Some(slot), Clip::Magnitude).weight.to_matrix(), plain.weight.to_matrix());
    }
    let clipped = of(Some(Slot::V), Clip::Magnitude);
    assert!(clipped.proxy_loss.unwrap() < plain.proxy_loss.unwrap());
}

/// Values of the same matrix from a method and from a direct calculation: nearly all agree. One rounding that falls the other
/// way changes what follows in its row.
fn assert_agree(q: &dyn Quantizer, found: &Quantized, expected: &[f64], share: f64) {
    let found = found.weight.to_matrix();
    let close = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() < 2e-3 * (1.0 + b.abs());
    let same = found.data().iter().zip(expected).filter(|p| close(*p)).count();
    assert!(same as f64 >= share * expected.len() as f64, "{}: {same} of {} agree", q.name(), expected.len());
}

#[test]
fn they_agree_with_direct_calculations() {
    let (rows, cols) = (40, 160);
    let (w, h) = (normal(rows, cols, 19), hessian(cols, N_TOKENS, 20));
    let s = LayerSettings { damping: 1.0, ..LayerSettings::new(Bits::Three, Group::Row) };
    assert_agree(&SpQr, &run(&SpQr, &w, &h, &s), &direct::spqr(&w, &h, &s), 0.97);
    assert_agree(&PbLlm, &run(&PbLlm, &w, &h, &s), &direct::pb_llm(&w, &h, &s), 0.98);
    assert_agree(&BiLlm, &run(&BiLlm, &w, &h, &s), &direct::billm(&w, &h, &s), 0.98);
    let s = LayerSettings::new(Bits::Two, Group::Inputs(64));
    assert_agree(&Awq, &run(&Awq, &w, &h, &s), &direct::awq(&w, &h, &s, N_TOKENS), 0.98);
    let s = settings(Bits::Two);
    assert_agree(&SlimLlm, &run(&SlimLlm, &w, &h, &s), &direct::slim_llm(&w, &h, &s), 0.95);
}

/// Times, on demand: `cargo test -p tailorq-quant --test baselines -- --ignored --nocapture timing`.
#[test]
#[ignore = "a measurement"]
fn timing() {
    for (rows, cols) in [(896, 896), (4864, 896), (896, 4864)] {
        let (w, h) = (normal(rows, cols, 91), hessian(cols, N_TOKENS, 92));
        for q in SIMULATED.into_iter().chain([&Gptq as &dyn Quantizer]) {
            let start = std::time::Instant::now();
            let done = run(q, &w, &h, &settings(Bits::Two));
            let (seconds, loss) = (start.elapsed().as_secs_f64(), done.proxy_loss.unwrap());
            println!("{rows}x{cols} {}: {seconds:.2} s, loss {loss:.1}, error {:.3}", q.name(), done.relative_error);
            done.counted_bits.inspect(|_| println!("    {:.3} bits a weight counted", counted(&done)));
        }
    }
}

#[test]
fn the_device_is_asked_for_matrices_only() {
    // The scalar reference gives what the fast device gives, but for rounding.
    let (w, h) = (normal(20, 140, 21), hessian(140, N_TOKENS, 22));
    let reference = tailorq_kernels::reference();
    let stats = LayerStats { hessian: Some(&h), n_tokens: N_TOKENS, ..LayerStats::default() };
    for q in [&SlimLlm as &dyn Quantizer, &SpQr, &Awq, &BiLlm, &PbLlm] {
        let of = |device: &dyn Device| q.quantize(device, &w, &stats, &settings(Bits::Three).into()).unwrap();
        let [a, b] = [of(cpu().as_ref()), of(reference.as_ref())].map(|q| q.proxy_loss.unwrap());
        assert!((a / b - 1.0).abs() < 0.02, "{}: {a} and {b}", q.name());
    }
}
