//! Rotary tables: the angles of every position, grown on demand.

use crate::config::{ModelConfig, RopeScaling};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use tailorq_kernels::RopeTable;

/// Positions of the first table; later ones double.
const FIRST_POSITIONS: usize = 256;

/// The frequency of each rotated pair, `[head_dim / 2]`, in radians a position, scaling applied.
pub(crate) fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let half = config.head_dim / 2;
    let plain = |i: usize| config.rope_theta.powf(-((2 * i) as f64) / config.head_dim as f64);
    match &config.rope_scaling {
        RopeScaling::None => (0..half).map(plain).collect(),
        RopeScaling::Linear { factor } => (0..half).map(|i| plain(i) / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => (0..half)
            .map(|i| {
                plain(i) / llama3_divisor(plain(i), *factor, *low_freq_factor, *high_freq_factor, *original_context)
            })
            .collect(),
        RopeScaling::Divisors(divisors) => (0..half).map(|i| plain(i) / f64::from(divisors[i])).collect(),
    }
}

/// By how much Llama 3.1 divides a frequency: 1 for short wavelengths, `factor` for long ones, between them the
/// reciprocal of a line through both in frequency.
pub(crate) fn llama3_divisor(frequency: f64, factor: f64, low: f64, high: f64, original_context: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / frequency;
    if wavelength < original_context / high {
        1.0
    } else if wavelength > original_context / low {
        factor
    } else {
        let smooth = (original_context / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

/// Cosines and sines of positions `0..positions`. Angles are f64 and rounded once, so a longer table begins with the
/// very numbers of a shorter one.
fn table(frequencies: &[f64], positions: usize) -> RopeTable {
    let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
    RopeTable {
        half: frequencies.len(),
        cos: angles().map(|a| a.cos() as f32).collect(),
        sin: angles().map(|a| a.sin() as f32).collect(),
    }
}

/// A table that grows to the longest position asked for. Clones share it.
#[derive(Clone)]
pub(crate) struct Rope {
    frequencies: Arc<[f64]>,
    table: Arc<RwLock<Arc<RopeTable>>>,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Rope::of(frequencies(config).into())
    }

    fn of(frequencies: Arc<[f64]>) -> Self {
        let empty = RopeTable { half: frequencies.len(), cos: Vec::new(), sin: Vec::new() };
        Rope { frequencies, table: Arc::new(RwLock::new(Arc::new(empty))) }
    }

    /// A table of at least `positions` positions.
    pub(crate) fn table(&self, positions: usize) -> Arc<RopeTable> {
        let enough = |t: &RopeTable| t.cos.len() >= positions * t.half;
        // A poisoned lock still holds a whole table: it is replaced in one assignment.
        let current = Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner));
        if enough(&current) {
            return current;
        }
        let mut slot = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if !enough(&slot) {
            let positions = positions.next_power_of_two().max(FIRST_POSITIONS);
            *slot = Arc::new(table(&self.frequencies, positions));
        }
        Arc::clone(&slot)
    }
}

impl fmt::Debug for Rope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rope({} frequencies)", self.frequencies.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        let divisor = |wavelength: f64| llama3_divisor(std::f64::consts::TAU / wavelength, 8.0, 1.0, 4.0, 8192.0);
        assert_eq!(divisor(100.0), 1.0);
        assert_eq!(divisor(10_000.0), 8.0);
        // Half way in frequency between 1 and 1/8: wavelength 8192 / 2.5.
        assert!((divisor(8192.0 / 2.5) - 1.0 / 0.5625).abs() < 1e-12);
    }

    #[test]
    fn tables_grow_without_changing() {
        let rope = Rope::of([1.0, 0.25].into());
        let short = rope.table(3);
        let long = rope.table(FIRST_POSITIONS + 1);
        assert_eq!(long.cos.len(), 2 * 2 * FIRST_POSITIONS);
        assert_eq!(short.cos[..], long.cos[..short.cos.len()]);
        assert_eq!(long.sin[5], (2.0f64 * 0.25).sin() as f32);
    }
}
