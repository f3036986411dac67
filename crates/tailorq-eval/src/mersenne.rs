//! CPython's `random.Random(seed).sample`, because lm-evaluation-harness draws its few-shot examples with it.
//!
//! The generator is MT19937 (Matsumoto and Nishimura 1998) seeded by `init_by_array`; integers below `n` come from the
//! upper bits of a draw, with too large ones thrown away; `sample` follows `Lib/random.py`.

use std::collections::HashSet;

/// The seed of the harness' few-shot sampler.
pub(crate) const FEWSHOT_SEED: u32 = 1234;

const N: usize = 624;
const M: usize = 397;

/// The state of CPython's generator.
#[derive(Clone, Debug)]
pub(crate) struct PythonRandom {
    state: [u32; N],
    at: usize,
}

impl PythonRandom {
    /// `random.Random(seed)` for a seed of 32 bits.
    pub(crate) fn new(seed: u32) -> Self {
        let mut random = PythonRandom { state: [0; N], at: N };
        random.seed_by_number(19_650_218);
        let state = &mut random.state;
        let mut i = 1;
        // `init_by_array([seed])`: with one key its index stays 0, and so does the number added to it.
        for _ in 0..N {
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_664_525);
            state[i] = (state[i] ^ mixed).wrapping_add(seed);
            i = next_index(state, i);
        }
        for _ in 0..N - 1 {
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_566_083_941);
            state[i] = (state[i] ^ mixed).wrapping_sub(i as u32);
            i = next_index(state, i);
        }
        state[0] = 0x8000_0000;
        random
    }

    fn seed_by_number(&mut self, seed: u32) {
        self.state[0] = seed;
        for i in 1..N {
            let before = self.state[i - 1];
            self.state[i] = (before ^ (before >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
    }

    /// The next 32 bits.
    fn next_u32(&mut self) -> u32 {
        if self.at == N {
            self.refill();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
        }
        self.at = 0;
    }

    /// `_randbelow(n)` for `n` from 1 to 2^32 - 1.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let draw = (self.next_u32() >> (32 - bits)) as usize;
            if draw < n {
                return draw;
            }
        }
    }

    /// `sample(range(n), k)`, for `k <= n < 2^32`.
    pub(crate) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n && u32::try_from(n).is_ok(), "a sample of {k} from {n}");
        // Where a list of the whole population takes less room than a set of what was drawn, the list is used.
        let mut set_size = 21;
        if k > 5 {
            // 4 to the power of log4(3 k), rounded up.
            let mut power = 1;
            while power < 3 * k {
                power *= 4;
            }
            set_size += power;
        }
        if n <= set_size { self.sample_from_pool(n, k) } else { self.sample_by_set(n, k) }
    }

    fn sample_from_pool(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut pool: Vec<usize> = (0..n).collect();
        let mut sample = Vec::with_capacity(k);
        for left in (n - k + 1..=n).rev() {
            let at = self.below(left);
            sample.push(pool[at]);
            pool[at] = pool[left - 1];
        }
        sample
    }

    fn sample_by_set(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut drawn = HashSet::new();
        let mut sample = Vec::with_capacity(k);
        while sample.len() < k {
            let at = self.below(n);
            if drawn.insert(at) {
                sample.push(at);
            }
        }
        sample
    }
}

/// The index after `i`; past the end the last word moves to the front and counting goes on at 1.
fn next_index(state: &mut [u32; N], i: usize) -> usize {
    if i + 1 < N {
        return i + 1;
    }
    state[0] = state[N - 1];
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of CPython 3.11.
    #[test]
    fn samples_are_cpythons() {
        let mut random = PythonRandom::new(1234);
        assert_eq!([0; 3].map(|_| random.next_u32()), [4_150_886_329, 3_342_196_574, 1_892_932_127]);
        let cases: [(usize, usize, [&[usize]; 3]); 4] = [
            (512, 5, [&[451, 119, 7, 92, 35], &[85, 100, 363, 242, 17], &[31, 16, 354, 495, 474]]),
            (7473, 5, [&[6374, 3610, 957, 61, 742], &[7462, 6610, 4769, 286, 5501], &[5677, 687, 806, 6279, 2905]]),
            (20, 5, [&[14, 3, 0, 2, 1], &[2, 3, 11, 7, 0], &[0, 19, 11, 15, 14]]),
            (30, 3, [&[24, 14, 3], &[0, 2, 29], &[25, 18, 1]]),
        ];
        for (n, k, samples) in cases {
            let mut random = PythonRandom::new(1234);
            for expected in samples {
                assert_eq!(random.sample(n, k), expected, "{k} of {n}");
            }
        }
    }
}
