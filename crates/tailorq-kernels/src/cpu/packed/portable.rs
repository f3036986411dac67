//! Codes times 8-bit activations in plain Rust: what processors without a kernel of their own run.

use super::activations::{LANES, Quantized};
use super::base::Base;
use crate::cpu::tile::Tile;

/// `y[t, i] = base[first + i] x[t]` for all of `y`, whose rows are tokens.
pub(super) fn rows(base: &Base<'_>, x: &Quantized, first: usize, y: &mut Tile<'_>) {
    let mut planes = vec![0u8; base.steps() * base.order.step()];
    for i in 0..y.cols() {
        let row = Row { base, row: first + i };
        row.read_codes(&mut planes);
        for t in 0..y.rows() {
            y.row_mut(t)[i] = row.product(x, t, &planes);
        }
    }
}

#[derive(Clone, Copy)]
struct Row<'a> {
    base: &'a Base<'a>,
    row: usize,
}

impl Row<'_> {
    /// The codes of the row in the order of planes: `[steps, planes, 64]`.
    fn read_codes(self, planes: &mut [u8]) {
        let base = self.base;
        let words = &base.words[self.row * base.words_per_row..(self.row + 1) * base.words_per_row];
        // Bits of a code in the word, which has the low bits of a 3-bit code.
        let width = 8 / base.order.planes;
        let mask = (u32::from(u8::MAX) >> (8 - width)) as u8;
        planes.fill(0);
        for (w, word) in words.iter().enumerate() {
            let (step, lane) = (w / LANES, w % LANES);
            for (b, byte) in word.to_le_bytes().into_iter().enumerate() {
                for p in 0..base.order.planes {
                    // A 3-bit code has one high bit, a 6-bit code has two.
                    let wide = if base.order.planes == 4 { 1 } else { 2 };
                    let high = if base.has_highs() {
                        let of_word = base.highs[self.row * base.words_per_row + w];
                        (of_word >> (4 * b + wide * p) & (2 * wide as u16 - 1)) << width
                    } else {
                        0
                    };
                    let at = (step * base.order.planes + p) * 64 + 4 * lane + b;
                    planes[at] = byte >> (width * p) & mask | high as u8;
                }
            }
        }
    }

    fn product(self, x: &Quantized, token: usize, planes: &[u8]) -> f32 {
        let base = self.base;
        let n = base.order.planes;
        let mut sum = 0.0;
        for g in 0..base.groups {
            let of_group = x.sums[token * x.chunks + g / LANES].0[g % LANES];
            sum -= base.scale(self.row, g) * base.zero(self.row, g) * of_group;
        }
        let group = base.layout.group.len(base.cols);
        for s in 0..x.steps {
            let step = token * x.steps + s;
            let mut dots = [0i32; LANES];
            for (plane, x) in planes[s * n * 64..].chunks_exact(64).zip(&x.codes[step * n..(step + 1) * n]) {
                for (k, (&code, &x)) in plane.iter().zip(&x.0).enumerate() {
                    dots[k / 4] += base.integer(code) * i32::from(x);
                }
            }
            for (lane, dot) in dots.into_iter().enumerate() {
                let col = s * base.order.step() + lane * base.order.lane();
                if col < base.cols {
                    sum += dot as f32 * x.scales[step].0[lane] * base.scale(self.row, col / group);
                }
            }
        }
        sum * base.factor()
    }
}
