//! Salient tiles: against a textbook version in f64, at the ends of the range of shares, and byte by byte.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use half::f16;
use std::sync::Arc;
use tailorq_kernels::Device;
use tailorq_quant::quantize::{Aligned, Gptq, GridRule, Saliency, Salient, Scope, Unit, proxy_loss};
use tailorq_quant::{
    AlignedSettings, ElementMask, LayerPlan, LayerSettings, LayerStats, QuantError, Quantized, Quantizer,
};
use tailorq_tensor::{Bits, Group, Matrix, PackedMatrix, Rng, TILE, TileBits};

const BY_HESSIAN: Aligned = Aligned { by_task: false };
const BY_TASK: Aligned = Aligned { by_task: true };

fn cpu() -> Arc<dyn Device> {
    tailorq_kernels::cpu()
}

fn normal(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
}

/// The lower triangle of `sum x x^T` over correlated tokens with a few strong channels.
fn hessian(cols: usize, n_tokens: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    let mut x = Matrix::zeros(n_tokens, cols);
    for t in 0..n_tokens {
        let mut carried = 0.0;
        for (c, value) in x.row_mut(t).iter_mut().enumerate() {
            carried = 0.8 * carried + rng.normal();
            *value = carried * if c % 37 == 5 { 6.0 } else { 1.0 };
        }
    }
    let mut h = Matrix::zeros(cols, cols);
    cpu().gram(x.data(), &mut h);
    h
}

fn settings(group: Group, aligned: AlignedSettings) -> LayerSettings {
    LayerSettings { aligned: Some(aligned), ..LayerSettings::new(Bits::Two, group) }
}

fn try_run(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Result<Quantized, QuantError> {
    let stats = LayerStats { hessian: Some(h), n_tokens: 100, ..LayerStats::default() };
    BY_HESSIAN.quantize(cpu().as_ref(), w, &stats, &(*s).into())
}

fn run(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Quantized {
    try_run(w, h, s).unwrap()
}

fn packed(q: &Quantized) -> &PackedMatrix {
    q.weight.packed().unwrap()
}

fn gptq(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Quantized {
    let stats = LayerStats { hessian: Some(h), n_tokens: 100, ..LayerStats::default() };
    Gptq.quantize(cpu().as_ref(), w, &stats, &(*s).into()).unwrap()
}

fn values(m: &PackedMatrix) -> Vec<f32> {
    (0..m.rows()).flat_map(|r| (0..m.cols()).map(move |c| m.value(r, c))).collect()
}

fn salient_tiles(m: &PackedMatrix) -> Vec<(usize, usize)> {
    let map = m.tiles().map(|t| t.map()).or_else(|| m.mean4().map(|m| m.map()));
    map.map_or(Vec::new(), |map| (0..m.rows()).flat_map(|r| map.row(r).map(move |(tile, _)| (r, tile))).collect())
}

/// Straight from the definition: the whole matrix column by column in f64, every error spread at once.
mod textbook {
    use super::*;

    /// `U` with `(H + 0.01 mean(diag) I)^-1 = U^T U`: `U = R^-1` for the upper triangular `R` with `H = R R^T`.
    fn factor(h: &Matrix) -> Vec<Vec<f64>> {
        let n = h.cols();
        let mean = (0..n).map(|i| f64::from(h.row(i)[i])).sum::<f64>() / n as f64;
        let at = |i: usize, j: usize| f64::from(h.row(i.max(j))[i.min(j)]) + if i == j { 0.01 * mean } else { 0.0 };
        let mut root = vec![vec![0.0; n]; n];
        for j in (0..n).rev() {
            for i in (0..=j).rev() {
                let rest = at(i, j) - (j + 1..n).map(|k| root[i][k] * root[j][k]).sum::<f64>();
                root[i][j] = if i == j { rest.sqrt() } else { rest / root[j][j] };
            }
        }
        let mut upper = vec![vec![0.0; n]; n];
        for j in 0..n {
            upper[j][j] = 1.0 / root[j][j];
            for i in (0..j).rev() {
                let sum: f64 = (i + 1..=j).map(|k| root[i][k] * upper[k][j]).sum();
                upper[i][j] = -sum / root[i][i];
            }
        }
        upper
    }

    fn round(x: f64, low: f64, high: f64) -> f64 {
        x.round_ties_even().clamp(low, high)
    }

    fn scale(largest: f64, max: f64) -> f64 {
        f16::from_f32((largest / max) as f32).to_f64()
    }

    fn over(x: f64, scale: f64) -> f64 {
        if scale > 0.0 { x / scale } else { 0.0 }
    }

    /// One row in work.
    #[derive(Clone)]
    pub struct Row {
        w: Vec<f64>,
        /// What the weights were when their column came.
        came: Vec<f64>,
        pub q: Vec<f64>,
    }

    pub struct Run<'a> {
        s: &'a LayerSettings,
        a: AlignedSettings,
        u: Vec<Vec<f64>>,
        cols: usize,
    }

    impl Run<'_> {
        /// Quantizes the group at `start`, in which the tiles or weights that `salient` names are salient.
        fn group(&self, row: &mut Row, start: usize, salient: &dyn Fn(usize) -> bool) {
            let end = (start + self.s.layout.group.len(self.cols)).min(self.cols);
            let is_corrected = self.a.salient == Salient::Corrections && self.a.unit == Unit::Tile;
            let base_for_all = is_corrected && (start..end).all(salient);
            let rest: Vec<f32> =
                (start..end).filter(|&j| base_for_all || !salient(j)).map(|j| row.w[j] as f32).collect();
            let grid = GridRule::new(self.s.layout, self.s.clip).fit(&rest, None).unwrap();
            let (step, zero) = (grid.scale.to_f64(), f64::from(grid.zero));
            let base = |x: f64| round(over(x, step), -zero, 3.0 - zero) * step;
            let loud = (start..end).filter(|&j| salient(j)).map(|j| row.w[j].abs()).fold(0.0, f64::max);
            let byte = scale(loud * if self.a.salient == Salient::EightBit { 1.25 } else { 1.0 }, 127.0);
            for tile in (start..end).step_by(TILE) {
                let tile_end = (tile + TILE).min(end);
                let at_start: Vec<f64> = row.w[tile..tile_end].iter().map(|&x| base(x)).collect();
                let max = f64::from(self.a.tile_bits.max_code());
                let largest = (tile..tile_end).map(|j| (row.w[j] - at_start[j - tile]).abs()).fold(0.0, f64::max);
                let fine = scale(largest, max);
                for j in tile..tile_end {
                    let x = row.w[j];
                    row.came[j] = x;
                    row.q[j] = match (salient(j), self.a.unit, self.a.salient) {
                        (false, ..) => base(x),
                        (true, Unit::Tile, Salient::Corrections) => {
                            let b = at_start[j - tile];
                            b + round(over(x - b, fine), -max - 1.0, max) * fine
                        }
                        (true, Unit::Tile, Salient::Mean4) if (j - tile) % 4 > 0 => row.q[j - 1],
                        (true, Unit::Tile, Salient::Mean4) => {
                            let run = &row.w[j..(j + 4).min(tile_end)];
                            round(over(run.iter().sum::<f64>() / run.len() as f64, byte), -127.0, 127.0) * byte
                        }
                        (true, Unit::Weight, Salient::Corrections) => x,
                        (true, ..) => round(over(x, byte), -127.0, 127.0) * byte,
                    };
                    let error = (x - row.q[j]) / self.u[j][j];
                    for k in j + 1..self.cols {
                        row.w[k] -= error * self.u[j][k];
                    }
                }
            }
        }

        /// What makes the units of a row in a block salient; `row` is left as it is.
        fn scores(&self, row: &Row, block: usize, end: usize) -> Vec<f64> {
            let mut trial = row.clone();
            for start in (block..end).step_by(self.s.layout.group.len(self.cols)) {
                self.group(&mut trial, start, &|_| false);
            }
            let len = self.a.unit.weights();
            let unit = |start: usize| -> f64 {
                let unit = start..(start + len).min(end);
                let e = |j: usize| trial.came[j] - trial.q[j];
                let fine =
                    scale(unit.clone().map(|j| e(j).abs()).fold(0.0, f64::max), f64::from(self.a.tile_bits.max_code()));
                let of = |j: usize| match (self.a.saliency, self.a.salient) {
                    (Saliency::Hessian, _) => row.w[j].powi(2),
                    (_, Salient::Corrections) => e(j).powi(2) - (e(j) - (over(e(j), fine)).round() * fine).powi(2),
                    (_, Salient::Mean4) => {
                        let run = j - (j - start) % 4..(j - (j - start) % 4 + 4).min(end);
                        let mean = trial.came[run.clone()].iter().sum::<f64>() / run.len() as f64;
                        e(j).powi(2) - (trial.came[j] - mean).powi(2)
                    }
                    _ => panic!("not in these cases"),
                };
                unit.map(|j| of(j) / self.u[j][j].powi(2)).sum()
            };
            (block..end).step_by(len).map(unit).collect()
        }
    }

    /// Values `[rows, cols]`, and by row and unit what is salient.
    pub fn quantize(w: &Matrix, h: &Matrix, s: &LayerSettings) -> (Vec<Vec<f64>>, Vec<Vec<bool>>) {
        let (cols, a) = (w.cols(), s.aligned.unwrap());
        let run = Run { s, a, u: factor(h), cols };
        let new = |r: usize| {
            let w: Vec<f64> = w.row(r).iter().map(|v| f64::from(*v)).collect();
            Row { came: w.clone(), q: w.clone(), w }
        };
        let mut rows: Vec<Row> = (0..w.rows()).map(new).collect();
        let mut marks = vec![Vec::new(); w.rows()];
        for block in (0..cols).step_by(128) {
            let end = (block + 128).min(cols);
            let scores: Vec<Vec<f64>> = rows.iter().map(|row| run.scores(row, block, end)).collect();
            let mut order: Vec<(usize, usize)> =
                (0..rows.len()).flat_map(|r| (0..scores[r].len()).map(move |i| (r, i))).collect();
            order.sort_by(|x, y| scores[y.0][y.1].total_cmp(&scores[x.0][x.1]));
            let n = (a.share * order.len() as f64).round() as usize;
            let mut salient = vec![vec![false; scores[0].len()]; rows.len()];
            order[..n].iter().for_each(|&(r, i)| salient[r][i] = true);
            for (r, row) in rows.iter_mut().enumerate() {
                for start in (block..end).step_by(s.layout.group.len(cols)) {
                    run.group(row, start, &|j| salient[r][(j - block) / a.unit.weights()]);
                }
                marks[r].extend_from_slice(&salient[r]);
            }
        }
        (rows.into_iter().map(|row| row.q).collect(), marks)
    }
}

#[test]
fn agrees_with_the_textbook() {
    let cases = [
        (Salient::Corrections, Saliency::Hessian, Unit::Tile, 0.3),
        (Salient::Corrections, Saliency::Gain, Unit::Tile, 0.1),
        (Salient::Mean4, Saliency::Hessian, Unit::Tile, 0.25),
        (Salient::Mean4, Saliency::Gain, Unit::Tile, 0.25),
        (Salient::EightBit, Saliency::Hessian, Unit::Tile, 0.4),
        (Salient::EightBit, Saliency::Hessian, Unit::Weight, 0.3),
        (Salient::Corrections, Saliency::Hessian, Unit::Weight, 0.02),
    ];
    for (i, (cols, group)) in [(72, 64), (141, 32), (288, 128)].into_iter().enumerate() {
        for (salient, saliency, unit, share) in cases {
            let a = AlignedSettings { salient, saliency, unit, share, ..AlignedSettings::default() };
            let (w, h) = (normal(40, cols, i as u64), hessian(cols, 4 * cols, 7 + i as u64));
            let s = settings(Group::Inputs(group), a);
            let (expected, marks) = textbook::quantize(&w, &h, &s);
            let done = run(&w, &h, &s);
            let matrix = packed(&done);
            let (mut n_same, mut marked, mut n_marked) = (0, 0, 0);
            for (r, row) in expected.iter().enumerate() {
                for (c, &value) in row.iter().enumerate() {
                    n_same += usize::from((f64::from(matrix.value(r, c)) - value).abs() < 0.04);
                }
                for (u, &is_salient) in marks[r].iter().enumerate().filter(|m| *m.1) {
                    let found = match unit {
                        Unit::Tile => salient_tiles(matrix).contains(&(r, u)),
                        Unit::Weight => matrix.elements().unwrap().get(r, u).is_some(),
                    };
                    marked += usize::from(is_salient);
                    n_marked += usize::from(found);
                }
            }
            let total = 40 * cols;
            // A fine code may differ by one; a base code that falls the other way changes what follows in its row, and so does
            // a single weight at the edge of being salient.
            let least = if unit == Unit::Tile { 97 } else { 93 };
            assert!(n_same * 100 >= total * least, "{cols} {a:?}: {n_same} of {total}");
            assert!(n_marked * 100 >= marked * 99 && marked > 0, "{cols} {a:?}: {n_marked} of {marked} salient units");
            let claimed = done.proxy_loss.unwrap();
            let measured = proxy_loss(cpu().as_ref(), &w, matrix, &h, 100);
            assert!((claimed / measured - 1.0).abs() < 2e-3, "{a:?}: {claimed} against {measured}");
        }
    }
}

#[test]
fn none_salient_is_gptq_and_all_salient_are_all_there() {
    for (cols, group) in [(300, Group::Inputs(64)), (131, Group::Row)] {
        let (w, h) = (normal(70, cols, 3), hessian(cols, 900, 4));
        for salient in Salient::ALL.iter().copied() {
            for (unit, scope) in [(Unit::Tile, Scope::Block), (Unit::Tile, Scope::Matrix), (Unit::Weight, Scope::Block)]
            {
                let of = |share| {
                    let a = AlignedSettings { share, salient, unit, scope, ..AlignedSettings::default() };
                    run(&w, &h, &settings(group, a))
                };
                let plain = of(0.0);
                let reference = gptq(&w, &h, &LayerSettings::new(Bits::Two, group));
                assert_eq!(values(packed(&plain)), values(packed(&reference)), "{salient:?} {unit:?} {group}");
                assert_eq!(packed(&plain).bytes(), packed(&reference).bytes());
                let all = of(1.0);
                match unit {
                    Unit::Tile => assert_eq!(salient_tiles(packed(&all)).len(), 70 * cols.div_ceil(TILE)),
                    Unit::Weight => assert_eq!(packed(&all).elements().unwrap().len(), 70 * cols),
                }
                let ratio = all.proxy_loss.unwrap() / plain.proxy_loss.unwrap();
                match (salient, unit) {
                    (Salient::Mean4, Unit::Tile) => assert!(ratio > 2.0, "means of independent weights: {ratio}"),
                    _ => assert!(ratio < 0.02, "{salient:?} {unit:?} {group}: {ratio}"),
                }
            }
        }
    }
}

/// Any weight, by tile and place, is what a full unpack gives: the corrections of a real run, not made up ones.
#[test]
fn any_tile_is_found() {
    let (w, h) = (normal(65, 200, 21), hessian(200, 700, 22));
    let mask = ElementMask::from_indices(65, 200, (0..65 * 200).step_by(57)).unwrap();
    for salient in Salient::ALL.iter().copied() {
        for (scope, share) in [(Scope::Block, 0.2), (Scope::Matrix, 0.37)] {
            let a = AlignedSettings { share, salient, scope, ..AlignedSettings::default() };
            let kept = Some(Arc::new(mask.clone()));
            let plan = LayerPlan { settings: settings(Group::Inputs(32), a), kept };
            let stats = LayerStats { hessian: Some(&h), n_tokens: 100, ..LayerStats::default() };
            let done = BY_HESSIAN.quantize(cpu().as_ref(), &w, &stats, &plan).unwrap();
            let matrix = packed(&done);
            let n = salient_tiles(matrix).len();
            assert!((n as f64 - share * 65.0 * 13.0).abs() <= 1.0, "{n}");
            let mut row = vec![0.0; 200];
            // The last tile of a row has 8 weights, and rows are asked for from the last to the first.
            for r in (0..65).rev() {
                matrix.unpack_row(r, &mut row);
                for tile in (0..13).rev() {
                    let found: Vec<f32> =
                        (TILE * tile..(TILE * (tile + 1)).min(200)).map(|c| matrix.value(r, c)).collect();
                    assert_eq!(found, row[TILE * tile..(TILE * (tile + 1)).min(200)]);
                }
            }
            let measured = proxy_loss(cpu().as_ref(), &w, matrix, &h, 100);
            assert!((done.proxy_loss.unwrap() / measured - 1.0).abs() < 2e-3);
        }
    }
}

#[test]
fn bytes_are_those_of_a_hand_count() {
    let (w, h) = (normal(64, 1024, 31), hessian(1024, 1500, 32));
    let base = 64 * (1024 / 4 + 8 * 2 + 8 * 2 / 8);
    let of = |a: AlignedSettings| {
        let s = settings(Group::Inputs(128), a);
        let done = run(&w, &h, &s);
        assert_eq!(packed(&done).bytes(), base + a.bytes(s.layout, 64, 1024), "{a:?}");
        assert_eq!(done.counted_bits.is_some(), a.salient == Salient::EightBit);
        packed(&done).bytes()
    };
    // Eight blocks of 512 tiles each: 26 of each with a scale and eight bytes; the bitmap has a bit a tile.
    let eight_of_26 = AlignedSettings { share: 26.0 / 512.0, ..AlignedSettings::default() };
    assert_eq!(of(eight_of_26), base + 512 + 8 * 26 * 10);
    assert_eq!(of(AlignedSettings { tile_bits: TileBits::Eight, ..eight_of_26 }), base + 512 + 8 * 26 * 18);
    for k in [50, 100] {
        // 2 bits for every weight, whatever K: with the bitmap and both scales 2.33 bits, where the paper says 2.14.
        assert_eq!(of(AlignedSettings::paper(k, Salient::Mean4)), base + 512 + 64 * 8 * 2);
        assert_eq!(of(AlignedSettings::paper(k, Salient::EightBit)), base + 512 + 32 * k as usize * 18);
    }
    // In a format of their own: K = 50 of 128 columns at 8 bits, a bit a tile, two scales and a zero a group.
    let counted = |k, unit| {
        let a = AlignedSettings { unit, ..AlignedSettings::paper(k, Salient::EightBit) };
        run(&w, &h, &settings(Group::Inputs(128), a)).counted_bits.unwrap() as f64 / (64.0 * 1024.0)
    };
    assert_eq!(counted(50, Unit::Tile), (50.0 * 8.0 + 78.0 * 2.0 + 16.0 + 16.0 + 2.0) / 128.0 + 1.0 / 16.0);
    assert_eq!(counted(100, Unit::Tile), (100.0 * 8.0 + 28.0 * 2.0 + 16.0 + 16.0 + 2.0) / 128.0 + 1.0 / 16.0);
    assert_eq!(counted(50, Unit::Weight), (50.0 * 8.0 + 78.0 * 2.0 + 16.0 + 16.0 + 2.0) / 128.0 + 1.0);
}

/// With squared gradients in a few tiles alone, those are salient, and their errors shrink.
#[test]
fn the_task_decides() {
    let (w, h) = (normal(64, 256, 71), hessian(256, 700, 72));
    let mut square = Matrix::zeros(64, 256);
    let at = |r: usize| (7 * r % 16) * TILE + 3;
    (0..64).for_each(|r| square.row_mut(r)[at(r)] = 1.0);
    let stats = LayerStats { hessian: Some(&h), n_tokens: 100, square: Some(&square), ..LayerStats::default() };
    for saliency in [Saliency::Hessian, Saliency::Gain] {
        let a = AlignedSettings { share: 1.0 / 16.0, saliency, scope: Scope::Matrix, ..AlignedSettings::default() };
        let plan: LayerPlan = settings(Group::Inputs(64), a).into();
        let done = BY_TASK.quantize(cpu().as_ref(), &w, &stats, &plan).unwrap();
        let found = salient_tiles(packed(&done));
        let n = found.iter().filter(|&&(r, tile)| tile == at(r) / TILE).count();
        // Where the base happens to be right, nothing is to be gained.
        assert!(found.len() == 64 && n >= 54, "{n} of 64");
        let missing = BY_TASK.quantize(cpu().as_ref(), &w, &LayerStats { square: None, ..stats }, &plan);
        assert!(matches!(missing, Err(QuantError::SquareMissing { quantizer: "aligned-task" })));
    }
}

#[test]
fn threads_do_not_matter() {
    let (w, h) = (normal(300, 320, 41), hessian(320, 800, 42));
    for a in [
        AlignedSettings::default(),
        AlignedSettings { scope: Scope::Matrix, tile_bits: TileBits::Eight, ..AlignedSettings::default() },
        AlignedSettings::paper(50, Salient::Mean4),
        AlignedSettings { unit: Unit::Weight, ..AlignedSettings::paper(50, Salient::EightBit) },
    ] {
        let s = settings(Group::Inputs(128), a);
        let [one, three] = [1, 3].map(|n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| run(&w, &h, &s))
        });
        assert_eq!(values(packed(&one)), values(packed(&three)), "{a:?}");
        assert_eq!(salient_tiles(packed(&one)), salient_tiles(packed(&three)));
        assert_eq!((one.proxy_loss, one.relative_error), (three.proxy_loss, three.relative_error));
    }
}

/// What a finer form is worth, for weights of which a few are large as in language models.
#[test]
fn corrections_help_and_means_harm() {
    let (mut w, h) = (normal(96, 512, 51), hessian(512, 1500, 52));
    w.data_mut().iter_mut().for_each(|v| *v = v.powi(3));
    let loss = |a| run(&w, &h, &settings(Group::Inputs(128), a)).proxy_loss.unwrap();
    let plain = loss(AlignedSettings { share: 0.0, ..AlignedSettings::default() });
    let by_gain = loss(AlignedSettings::default());
    let by_hessian = loss(AlignedSettings { saliency: Saliency::Hessian, ..AlignedSettings::default() });
    let means = loss(AlignedSettings::paper(50, Salient::Mean4));
    let bytes = loss(AlignedSettings::paper(50, Salient::EightBit));
    println!("plain {plain}, gain {by_gain}, hessian {by_hessian}, means {means}, bytes {bytes}");
    assert!(by_gain < 0.9 * plain && by_gain < by_hessian && by_hessian < plain);
    assert!(means > 2.0 * plain && bytes < 0.3 * plain);
}

#[test]
fn awkward_input_is_refused_or_survives() {
    let h = hessian(40, 100, 61);
    for rows in [0, 1, 65] {
        let done = run(&normal(rows, 40, 62), &h, &settings(Group::Inputs(32), AlignedSettings::default()));
        assert_eq!((packed(&done).rows(), packed(&done).cols()), (rows, 40));
    }
    for salient in Salient::ALL.iter().copied() {
        let a = AlignedSettings { salient, share: 0.5, ..AlignedSettings::default() };
        let zeros = run(&Matrix::zeros(3, 40), &h, &settings(Group::Inputs(32), a));
        assert!(values(packed(&zeros)).iter().all(|v| *v == 0.0) && zeros.proxy_loss == Some(0.0));
        let mut w = normal(200, 40, 63);
        w.row_mut(150)[7] = f32::NAN;
        let error = try_run(&w, &h, &settings(Group::Inputs(32), a)).unwrap_err();
        assert!(matches!(error, QuantError::NonFiniteWeight { row: 150, col: 7, .. }), "{error}");
        w.row_mut(150)[7] = 3e7;
        let error = try_run(&w, &h, &settings(Group::Inputs(32), a)).unwrap_err();
        assert!(matches!(error, QuantError::ScaleOverflow { row: 150, group: 0, .. }), "{error}");
    }
    let w = normal(4, 40, 64);
    let refused = |s: LayerSettings| assert!(matches!(try_run(&w, &h, &s), Err(QuantError::Settings(_))), "{s:?}");
    let plain = settings(Group::Inputs(32), AlignedSettings::default());
    refused(LayerSettings { act_order: true, ..plain });
    for share in [-0.1, 1.1, f64::NAN] {
        refused(settings(Group::Row, AlignedSettings { share, ..AlignedSettings::default() }));
    }
    let mut three = settings(Group::Row, AlignedSettings::paper(50, Salient::Mean4));
    three.layout.bits = Bits::Three;
    refused(three);
}

#[test]
fn random_tiles_are_as_many_and_are_drawn_by_the_seed() {
    let (w, h) = (normal(40, 300, 51), hessian(300, 700, 52));
    for scope in [Scope::Block, Scope::Matrix] {
        let of = |saliency, seed| {
            let a = AlignedSettings { share: 0.1, scope, saliency, seed, ..AlignedSettings::default() };
            let done = run(&w, &h, &settings(Group::Inputs(128), a));
            (salient_tiles(packed(&done)), done.proxy_loss.unwrap())
        };
        let (chosen, drawn) = (of(Saliency::Gain, 0), of(Saliency::Random, 0));
        assert_eq!(drawn, of(Saliency::Random, 0));
        assert_eq!(chosen.0.len(), drawn.0.len());
        assert!(drawn.1 > 1.02 * chosen.1, "chance is no choice: {} {}", drawn.1, chosen.1);
        let other = of(Saliency::Random, 1);
        assert_ne!(other.0, drawn.0);
        // Another layer has other tiles.
        let a = AlignedSettings { share: 0.1, scope, saliency: Saliency::Random, ..AlignedSettings::default() };
        let layer = run(&normal(40, 300, 53), &h, &settings(Group::Inputs(128), a));
        assert_ne!(salient_tiles(packed(&layer)), drawn.0);
    }
}
