//! Codebooks as integers, so that they meet activations as codes of an affine grid do.
//!
//! Levels are f16 and seldom far apart: as multiples of the finest of their last places, most codebooks are numbers of 8 or 16
//! bits without rounding. The least level is the zero, so that none is negative.

use half::f16;

/// The levels of a codebook: `(integer - zero) * factor`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Levels {
    /// The low bytes of the integers.
    pub(super) low: [u8; 16],
    /// Their high bytes.
    pub(super) high: [u8; 16],
    /// Whether a high byte is not 0.
    pub(super) is_wide: bool,
    pub(super) zero: f32,
    pub(super) factor: f32,
}

impl Levels {
    /// Finite and ascending, at most sixteen. Where the largest is more than 65,535 times the finest last place, levels are
    /// rounded to 16 bits.
    pub(super) fn of(levels: &[f16]) -> Self {
        // f16 are multiples of 2^-24, below 2^16: exact, and so are their differences.
        let fixed = |level: f16| (level.to_f64() * f64::from(1 << 24)) as i64;
        let first = levels.first().map_or(0, |&l| fixed(l));
        let differences = || levels.iter().map(|&l| fixed(l) - first);
        let largest = differences().max().unwrap_or(0);
        let shared = (fixed_bits(levels.iter().map(|&l| fixed(l)))).min(40);
        // Steps so wide that the largest difference has 16 bits, at least.
        let needed = (i64::BITS - largest.leading_zeros()).saturating_sub(16);
        let shift = shared.max(needed);
        let half = (1i64 << shift) >> 1;
        let (mut low, mut high) = ([0; 16], [0; 16]);
        for (i, difference) in differences().enumerate() {
            let integer = ((difference + half) >> shift).min(0xFFFF);
            (low[i], high[i]) = (integer as u8, (integer >> 8) as u8);
        }
        let step = (1i64 << shift) as f64;
        Levels {
            low,
            high,
            is_wide: high.iter().any(|&b| b != 0),
            zero: (-first as f64 / step) as f32,
            factor: (step / f64::from(1 << 24)) as f32,
        }
    }

    /// The integer of a code.
    pub(super) fn integer(&self, code: u8) -> i32 {
        let code = usize::from(code);
        i32::from(self.low[code]) | i32::from(self.high[code]) << 8
    }
}

/// Zero bits that all numbers end in.
fn fixed_bits(all: impl Iterator<Item = i64>) -> u32 {
    all.fold(0, |bits, n| bits | n).trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(values: &[f32]) -> (Vec<f32>, Levels) {
        let stored: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        (stored.iter().map(|l| l.to_f32()).collect(), Levels::of(&stored))
    }

    fn read(l: &Levels, n: usize) -> Vec<f32> {
        (0..n).map(|code| (l.integer(code as u8) as f32 - l.zero) * l.factor).collect()
    }

    #[test]
    fn usual_levels_are_exact() {
        for values in [
            &[-1.51, -0.4528, 0.4528, 1.51][..],
            &[-2.152, -1.344, -0.756, -0.2451, 0.2451, 0.756, 1.344, 2.152],
            &[-1.5, -0.25, -0.25, 2.0],
            &[0.0, 0.0, 0.0, 0.0],
            &[
                -2.733, -2.069, -1.618, -1.256, -0.9424, -0.6568, -0.3881, -0.1284, 0.1284, 0.3881, 0.6568, 0.9424,
                1.256, 1.618, 2.069, 2.733,
            ],
            &[3.0, 3.0, 3.0, 65504.0],
        ] {
            let (stored, l) = levels(values);
            assert_eq!(read(&l, stored.len()), stored);
        }
        assert!(!levels(&[-1.5, -0.25, -0.25, 2.0]).1.is_wide);
        assert!(levels(&[-1.51, -0.4528, 0.4528, 1.51]).1.is_wide);
    }

    #[test]
    fn levels_far_apart_are_rounded_to_16_bits() {
        let (stored, l) = levels(&[-65504.0, -1e-5, 6e-8, 65504.0]);
        for (found, level) in read(&l, 4).into_iter().zip(stored) {
            assert!((found - level).abs() <= 2.0 * 65504.0 / 32768.0, "{found} is not {level}");
        }
    }
}
