//! The methods by their definitions, in f64: inverse and Cholesky without a library, then one column of the whole matrix
//! after another. Slow, and plainly right.
#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::sync::Arc;
use tailorq_kernels::Device;
use tailorq_quant::quantize::{GridRule, proxy_loss};
use tailorq_quant::{Clip, LayerSettings};
use tailorq_tensor::{Bits, Layout, Matrix, Rng};

pub fn cpu() -> Arc<dyn Device> {
    tailorq_kernels::cpu()
}

pub fn normal(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    Matrix::from_vec(rows, cols, (0..rows * cols).map(|_| rng.normal()).collect())
}

/// The lower triangle of `sum x x^T` over correlated tokens with a few strong channels, as language models have them.
pub fn hessian(cols: usize, n_tokens: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    let mut x = Matrix::zeros(n_tokens, cols);
    for t in 0..n_tokens {
        let row = x.row_mut(t);
        let mut carried = 0.0;
        for (c, value) in row.iter_mut().enumerate() {
            carried = 0.8 * carried + rng.normal();
            *value = carried * if c % 37 == 5 { 6.0 } else { 1.0 };
        }
    }
    let mut h = Matrix::zeros(cols, cols);
    cpu().gram(x.data(), &mut h);
    h
}

/// `U` with `(H + damping mean(diag) I)^-1 = U^T U`.
pub fn factor(h: &Matrix, damping: f64) -> Vec<Vec<f64>> {
    let n = h.cols();
    let mean = (0..n).map(|i| f64::from(h.row(i)[i])).sum::<f64>() / n as f64;
    let mut a: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let mut row: Vec<f64> = (0..n).map(|j| f64::from(h.row(i.max(j))[i.min(j)])).collect();
            row[i] += damping * mean;
            row.extend((0..n).map(|j| if i == j { 1.0 } else { 0.0 }));
            row
        })
        .collect();
    // Gauss and Jordan; a positive definite matrix needs no pivoting.
    for i in 0..n {
        let pivot = a[i][i];
        a[i].iter_mut().for_each(|v| *v /= pivot);
        let pivot_row = a[i].clone();
        for (_, row) in a.iter_mut().enumerate().filter(|(r, _)| *r != i) {
            let f = row[i];
            row.iter_mut().zip(&pivot_row).for_each(|(v, p)| *v -= f * p);
        }
    }
    let inverse: Vec<Vec<f64>> = a.iter().map(|row| row[n..].to_vec()).collect();
    // Upper Cholesky, row by row: inverse = U^T U.
    let mut u = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in i..n {
            let sum: f64 = (0..i).map(|k| u[k][i] * u[k][j]).sum();
            u[i][j] = if i == j { (inverse[i][i] - sum).sqrt() } else { (inverse[i][j] - sum) / u[i][i] };
        }
    }
    u
}

type Rows = Vec<Vec<f64>>;

fn to_rows(w: &Matrix) -> Rows {
    (0..w.rows()).map(|r| w.row(r).iter().map(|v| f64::from(*v)).collect()).collect()
}

/// Column `j` ends as `value`, and its error goes to all later columns of the row.
fn feed_back(row: &mut [f64], j: usize, value: f64, u: &Rows) {
    let error = (row[j] - value) / u[j][j];
    row[j] = value;
    for k in j + 1..row.len() {
        row[k] -= error * u[j][k];
    }
}

fn clamp_round(x: f64, max: f64) -> f64 {
    x.round().clamp(0.0, max)
}

/// Low end, step and number of codes of a plain min-max grid, whose zero is no integer.
fn min_max(values: &[f64], max: f64) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (low, (high - low) / max)
}

fn on_grid(x: f64, (low, step): (f64, f64), max: f64) -> f64 {
    low + step * clamp_round((x - low) / step, max)
}

pub fn spqr(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Vec<f64> {
    let (n_rows, cols) = (w.rows(), w.cols());
    let max = f64::from(s.layout.bits.max_code());
    let u = factor(h, s.damping);
    let mut rows = to_rows(w);
    let column_term = |c: usize| {
        let mean = rows.iter().map(|r| r[c]).sum::<f64>() / n_rows as f64;
        let variance = rows.iter().map(|r| (r[c] - mean).powi(2)).sum::<f64>() / (n_rows - 1) as f64;
        variance / u[c][c].powi(2)
    };
    let threshold = 0.2 * (0..cols).map(column_term).sum::<f64>() / cols as f64;
    for start in (0..cols).step_by(16) {
        let group = start..(start + 16).min(cols);
        for tile in (0..n_rows).step_by(16) {
            let tile = tile..(tile + 16).min(n_rows);
            // Scale and zero of each row, without likely outliers.
            let statistics: Vec<(f64, f64)> = tile
                .clone()
                .map(|r| {
                    let cost = |set: &[usize]| {
                        let values: Vec<f64> = set.iter().map(|&c| rows[r][c]).collect();
                        let grid = min_max(&values, max);
                        set.iter()
                            .map(|&c| ((rows[r][c] - on_grid(rows[r][c], grid, max)) / u[c][c]).powi(2))
                            .sum::<f64>()
                    };
                    let all: Vec<usize> = group.clone().collect();
                    let without = |c: usize| all.iter().copied().filter(|&k| k != c).collect::<Vec<_>>();
                    let likely = |c: &usize| cost(&all) - cost(&without(*c)) > threshold;
                    let rest: Vec<f64> = all.iter().filter(|c| !likely(c)).map(|&c| rows[r][c]).collect();
                    let (low, step) = min_max(&rest, max);
                    (step, -low / step)
                })
                .collect();
            let second = |values: Vec<f64>| -> Vec<f64> {
                let half = |x: f64| half::f16::from_f64(x).to_f64();
                let (low, step) = min_max(&values, 7.0);
                let grid = (half(low), half(step));
                values.iter().map(|v| on_grid(*v, grid, 7.0)).collect()
            };
            let scales = second(statistics.iter().map(|s| s.0).collect());
            let zeros = second(statistics.iter().map(|s| s.1).collect());
            for (i, r) in tile.enumerate() {
                for j in group.clone() {
                    let weight = rows[r][j];
                    let value = scales[i] * (clamp_round(weight / scales[i] + zeros[i], max) - zeros[i]);
                    let is_outlier = ((weight - value) / u[j][j]).powi(2) > threshold;
                    feed_back(&mut rows[r], j, if is_outlier { weight } else { value }, &u);
                }
            }
        }
    }
    rows.concat()
}

pub fn pb_llm(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Vec<f64> {
    let cols = w.cols();
    let u = factor(h, s.damping);
    let mut rows = to_rows(w);
    let mut scores: Vec<(f64, usize)> =
        (0..w.data().len()).map(|i| ((rows[i / cols][i % cols] / u[i % cols][i % cols]).powi(2), i)).collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut salient = vec![false; scores.len()];
    scores[..scores.len() / 10].iter().for_each(|s| salient[s.1] = true);
    for (r, row) in rows.iter_mut().enumerate() {
        let (low, high) = row.iter().fold((0.0f64, 0.0f64), |(l, h), w| (l.min(*w), h.max(*w)));
        let scale = (high - low) / 255.0;
        let zero = (-low / scale).round();
        let rest: Vec<f64> = (0..cols).map(|c| if salient[r * cols + c] { 0.0 } else { row[c] }).collect();
        let mean = rest.iter().sum::<f64>() / cols as f64;
        let size = rest.iter().map(|w| (w - mean).abs()).sum::<f64>() / cols as f64;
        for j in 0..cols {
            let value = if salient[r * cols + j] {
                (clamp_round(row[j] / scale + zero, 255.0) - zero) * scale
            } else {
                mean + size * (row[j] - mean).signum()
            };
            feed_back(row, j, value, &u);
        }
    }
    rows.concat()
}

/// Mean +- mean distance over the members of a row, `order` times.
fn residual(row: &[f64], members: &[usize], order: usize) -> Vec<(usize, f64)> {
    let mut done: Vec<(usize, f64)> = members.iter().map(|&c| (c, 0.0)).collect();
    for _ in 0..order {
        let n = members.len().max(1) as f64;
        let mean = done.iter().map(|(c, v)| row[*c] - v).sum::<f64>() / n;
        let size = done.iter().map(|(c, v)| (row[*c] - v - mean).abs()).sum::<f64>() / n;
        done.iter_mut().for_each(|(c, v)| *v += mean + size * (row[*c] - *v - mean).signum());
    }
    done
}

/// Members of each part of a row, and how many rounds it gets.
type Parts = [(Vec<usize>, usize); 3];

pub fn billm(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Vec<f64> {
    let cols = w.cols();
    let u = factor(h, s.damping);
    let mut rows = to_rows(w);
    for start in (0..cols).step_by(128) {
        let block: Vec<usize> = (start..(start + 128).min(cols)).collect();
        let scores: Rows =
            rows.iter().map(|row| row.iter().enumerate().map(|(c, w)| (w / u[c][c]).powi(2)).collect()).collect();
        let error = |parts: &dyn Fn(&[f64]) -> Parts| -> f64 {
            let of_row = |row: &Vec<f64>| -> f64 {
                let all = parts(row).into_iter().flat_map(|(members, order)| residual(row, &members, order));
                all.map(|(c, v)| (row[c] - v).powi(2)).sum()
            };
            scores.iter().map(of_row).sum()
        };
        let mut falling = block.clone();
        let sum = |c: usize| scores.iter().map(|row| row[c]).sum::<f64>();
        falling.sort_by(|a, b| sum(*b).total_cmp(&sum(*a)));
        let two = |i: usize| error(&|_| [(falling[..i].to_vec(), 2), (falling[i..].to_vec(), 2), (Vec::new(), 1)]);
        let n = (1..50.min(block.len())).min_by(|a, b| two(*a).total_cmp(&two(*b))).unwrap();
        let salient = &falling[..n];
        let mut sizes: Vec<f64> = scores
            .iter()
            .flat_map(|row| block.iter().map(|c| if salient.contains(c) { 0.0 } else { row[*c] }))
            .collect();
        sizes.sort_by(f64::total_cmp);
        let quantile = |i: usize| {
            let at = (0.1 + 0.01 * i as f64) * (sizes.len() - 1) as f64;
            let (low, part) = (at.floor() as usize, at.fract());
            sizes[low] + part * (sizes[(low + 1).min(sizes.len() - 1)] - sizes[low])
        };
        let parts = |row: &[f64], split: f64| {
            let of = |keep: &dyn Fn(usize) -> bool| block.iter().copied().filter(|&c| keep(c)).collect::<Vec<_>>();
            let is_salient = |c: usize| salient.contains(&c);
            let low = of(&|c| !is_salient(c) && row[c] < split);
            let high = of(&|c| !is_salient(c) && row[c] >= split);
            [(low, 1), (high, 1), (of(&is_salient), 2)]
        };
        let split_error = |i: &usize| error(&|row| parts(row, quantile(*i)));
        let best = (0..81).min_by(|a, b| split_error(a).total_cmp(&split_error(b))).unwrap();
        for (row, scores) in rows.iter_mut().zip(&scores) {
            let done: Vec<(usize, f64)> = parts(scores, quantile(best))
                .into_iter()
                .flat_map(|(members, order)| residual(row, &members, order))
                .collect();
            for (c, value) in done {
                let error = (row[c] - value) / u[c][c];
                row[c] = value;
                (start + block.len()..cols).for_each(|k| row[k] -= error * u[c][k]);
            }
        }
    }
    rows.concat()
}

pub fn awq(w: &Matrix, h: &Matrix, s: &LayerSettings, n_tokens: usize) -> Vec<f64> {
    let (n_rows, cols) = (w.rows(), w.cols());
    let group = s.layout.group.len(cols);
    let at = |i: usize, j: usize| f64::from(h.row(i.max(j))[i.min(j)]);
    let rule = GridRule::new(Layout::new(s.layout.bits, s.layout.group), Clip::None);
    let round = |scales: &[f64], r: usize, start: usize, range: f64| -> Vec<f64> {
        let inputs = start..(start + group).min(cols);
        let scaled: Vec<f64> = inputs.clone().map(|c| f64::from(w.row(r)[c]) * scales[c]).collect();
        let largest = range * scaled.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let clipped: Vec<f32> = scaled.iter().map(|x| x.clamp(-largest, largest) as f32).collect();
        let grid = rule.fit(&clipped, None).unwrap();
        let codes = clipped.iter().map(|x| grid.code(s.layout.bits, *x));
        codes.zip(inputs).map(|(code, c)| f64::from(grid.value(code)) / scales[c]).collect()
    };
    let scales_of = |i: usize| -> Vec<f64> {
        let sizes = (0..cols).map(|c| (at(c, c) / n_tokens as f64).sqrt().powf(i as f64 / 20.0).max(1e-4));
        let sizes: Vec<f64> = sizes.collect();
        let (low, high) = sizes.iter().fold((f64::INFINITY, 0.0f64), |(l, h), s| (l.min(*s), h.max(*s)));
        sizes.iter().map(|s| f64::from(half::f16::from_f64(s / (low * high).sqrt()).to_f32())).collect()
    };
    let values_of = |scales: &[f64]| -> Vec<f64> {
        let row = |r: usize| (0..cols).step_by(group).flat_map(|g| round(scales, r, g, 1.0)).collect::<Vec<_>>();
        (0..n_rows).flat_map(row).collect()
    };
    let loss = |i: &usize| {
        let values = values_of(&scales_of(*i)).iter().map(|v| *v as f32).collect();
        proxy_loss(cpu().as_ref(), w, &Matrix::from_vec(n_rows, cols, values), h, n_tokens)
    };
    let best = (0..20).min_by(|a, b| loss(a).total_cmp(&loss(b))).unwrap();
    assert!(best > 0, "a case in which scaling helps");
    let scales = scales_of(best);
    let clipped = |r: usize, start: usize| -> Vec<f64> {
        let cost = |step: &usize| {
            let values = round(&scales, r, start, 1.0 - *step as f64 / 20.0);
            let e: Vec<f64> = values.iter().enumerate().map(|(i, v)| f64::from(w.row(r)[start + i]) - v).collect();
            let product = |i: usize| (0..e.len()).map(|j| at(start + i, start + j) * e[j]).sum::<f64>();
            (0..e.len()).map(|i| e[i] * product(i)).sum::<f64>()
        };
        let step = (0..10).min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap();
        round(&scales, r, start, 1.0 - step as f64 / 20.0)
    };
    (0..n_rows).flat_map(|r| (0..cols).step_by(group).flat_map(|g| clipped(r, g)).collect::<Vec<_>>()).collect()
}

pub fn slim_llm(w: &Matrix, h: &Matrix, s: &LayerSettings) -> Vec<f64> {
    let cols = w.cols();
    assert_eq!((s.layout.bits, cols.div_ceil(128)), (Bits::Two, 2), "two blocks: one gains a bit, the other loses one");
    let u = factor(h, s.damping);
    let mut rows = to_rows(w);
    let salience = |block: usize| -> f64 {
        let inputs = || block * 128..(block * 128 + 128).min(cols);
        rows.iter().map(|row| inputs().map(|c| (row[c] / u[c][c]).powi(2)).sum::<f64>()).sum()
    };
    let salient = usize::from(salience(1) > salience(0));
    for row in &mut rows {
        for (block, start) in (0..cols).step_by(128).enumerate() {
            let group = start..(start + 128).min(cols);
            let weights = &row[group.clone()];
            let n = weights.len() as f64;
            let (mean, size) = (weights.iter().sum::<f64>() / n, weights.iter().map(|w| w.abs()).sum::<f64>() / n);
            let (low, high) = weights.iter().fold((0.0f64, 0.0f64), |(l, h), w| (l.min(*w), h.max(*w)));
            let zero = (-low / (high - low) * 7.0).round();
            let on_grid = |w: f64, scale: f64| (clamp_round(w / scale + zero, 7.0) - zero) * scale;
            let cost = |scale: f64| weights.iter().map(|w| (w - on_grid(*w, scale)).abs().powf(2.4)).sum::<f64>();
            let scales = (-50..=50).map(|i| (high - low) / 7.0 * (1.0 + 0.002 * f64::from(i)));
            let scale = scales.min_by(|a, b| cost(*a).total_cmp(&cost(*b))).unwrap();
            for j in group {
                let value =
                    if block == salient { on_grid(row[j], scale) } else { mean + size * (row[j] - mean).signum() };
                feed_back(row, j, value, &u);
            }
        }
    }
    rows.concat()
}
