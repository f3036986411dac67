//! The block formats of GGUF: one function a type and one table.
//!
//! A block holds a fixed number of consecutive weights of a row. Layouts and formulas are those of `ggml-quants.c`
//! (`dequantize_row_*`), with its order of floating-point operations, so that values agree to the last bit. Each decoder
//! works on fixed-size arrays, which lets the compiler drop bounds checks and vectorize.

use half::f16;

/// A type of tensor.
#[derive(Clone, Copy, Debug)]
pub struct BlockType {
    /// Its number in the file.
    pub id: u32,
    /// Its name in ggml.
    pub name: &'static str,
    /// Weights of a block.
    pub weights: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Decodes whole blocks into as many weights; `None` for a type that this crate knows by name only.
    pub decode: Option<Decode>,
}

/// `decode(blocks, out)`: `blocks` holds n whole blocks, `out` n times the weights of a block.
pub type Decode = fn(&[u8], &mut [f32]);

const fn known(id: u32, name: &'static str, weights: usize, bytes: usize, decode: Decode) -> BlockType {
    BlockType { id, name, weights, bytes, decode: Some(decode) }
}

const fn named(id: u32, name: &'static str, weights: usize, bytes: usize) -> BlockType {
    BlockType { id, name, weights, bytes, decode: None }
}

/// All types with a name, by id.
pub const TYPES: &[BlockType] = &[
    known(0, "F32", 1, 4, f32_rows),
    known(1, "F16", 1, 2, f16_rows),
    known(2, "Q4_0", 32, 18, |b, o| each(b, o, q4_0)),
    known(3, "Q4_1", 32, 20, |b, o| each(b, o, q4_1)),
    known(6, "Q5_0", 32, 22, |b, o| each(b, o, q5_0)),
    known(7, "Q5_1", 32, 24, |b, o| each(b, o, q5_1)),
    known(8, "Q8_0", 32, 34, |b, o| each(b, o, q8_0)),
    named(9, "Q8_1", 32, 36),
    known(10, "Q2_K", 256, 84, |b, o| each(b, o, q2_k)),
    known(11, "Q3_K", 256, 110, |b, o| each(b, o, q3_k)),
    known(12, "Q4_K", 256, 144, |b, o| each(b, o, q4_k)),
    known(13, "Q5_K", 256, 176, |b, o| each(b, o, q5_k)),
    known(14, "Q6_K", 256, 210, |b, o| each(b, o, q6_k)),
    named(15, "Q8_K", 256, 292),
    named(16, "IQ2_XXS", 256, 66),
    named(17, "IQ2_XS", 256, 74),
    named(18, "IQ3_XXS", 256, 98),
    named(19, "IQ1_S", 256, 50),
    named(20, "IQ4_NL", 32, 18),
    named(21, "IQ3_S", 256, 110),
    named(22, "IQ2_S", 256, 82),
    named(23, "IQ4_XS", 256, 136),
    named(24, "I8", 1, 1),
    named(25, "I16", 1, 2),
    named(26, "I32", 1, 4),
    named(27, "I64", 1, 8),
    named(28, "F64", 1, 8),
    named(29, "IQ1_M", 256, 56),
    known(30, "BF16", 1, 2, bf16_rows),
    named(34, "TQ1_0", 256, 54),
    named(35, "TQ2_0", 256, 66),
    named(39, "MXFP4", 32, 17),
    named(40, "NVFP4", 64, 36),
    named(41, "Q1_0", 128, 18),
    named(42, "Q2_0", 64, 18),
];

/// The type `id`.
pub fn block_type(id: u32) -> Option<&'static BlockType> {
    TYPES.iter().find(|t| t.id == id)
}

/// The names of all types that can be decoded.
pub fn decodable() -> Vec<&'static str> {
    TYPES.iter().filter(|t| t.decode.is_some()).map(|t| t.name).collect()
}

/// Applies `block` to each block and its weights.
fn each<const BYTES: usize, const WEIGHTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; WEIGHTS]),
) {
    let (blocks, half_block) = bytes.as_chunks::<BYTES>();
    let (outs, half_out) = out.as_chunks_mut::<WEIGHTS>();
    assert!(
        half_block.is_empty() && half_out.is_empty() && blocks.len() == outs.len(),
        "whole blocks and their weights"
    );
    for (b, o) in blocks.iter().zip(outs) {
        block(b, o);
    }
}

/// `N` bytes of a block from `AT` on, checked when compiled.
fn part<const AT: usize, const N: usize, const BYTES: usize>(block: &[u8; BYTES]) -> &[u8; N] {
    const { assert!(AT + N <= BYTES) };
    block[AT..].first_chunk().expect("asserted when compiled")
}

/// The f16 at byte `AT` of a block.
fn half_at<const AT: usize, const BYTES: usize>(block: &[u8; BYTES]) -> f32 {
    f16::from_le_bytes(*part::<AT, 2, BYTES>(block)).to_f32()
}

fn f32_rows(bytes: &[u8], out: &mut [f32]) {
    tailorq_tensor::DType::F32.decode(bytes, out);
}

fn f16_rows(bytes: &[u8], out: &mut [f32]) {
    tailorq_tensor::DType::F16.decode(bytes, out);
}

fn bf16_rows(bytes: &[u8], out: &mut [f32]) {
    tailorq_tensor::DType::BF16.decode(bytes, out);
}

/// d f16, 16 bytes of nibbles; `d * (q - 8)`.
fn q4_0(b: &[u8; 18], o: &mut [f32; 32]) {
    let d = half_at::<0, 18>(b);
    let qs = part::<2, 16, 18>(b);
    let (low, high) = o.split_at_mut(16);
    for i in 0..16 {
        low[i] = f32::from(i16::from(qs[i] & 15) - 8) * d;
        high[i] = f32::from(i16::from(qs[i] >> 4) - 8) * d;
    }
}

/// d f16, m f16, 16 bytes of nibbles; `d * q + m`.
fn q4_1(b: &[u8; 20], o: &mut [f32; 32]) {
    let (d, m) = (half_at::<0, 20>(b), half_at::<2, 20>(b));
    let qs = part::<4, 16, 20>(b);
    let (low, high) = o.split_at_mut(16);
    for i in 0..16 {
        low[i] = f32::from(qs[i] & 15) * d + m;
        high[i] = f32::from(qs[i] >> 4) * d + m;
    }
}

/// The fifth bits of the nibbles at `i`: bit `i` and bit `i + 16` of `qh`, in place.
fn fifth_bits(qh: u32, i: usize) -> (u8, u8) {
    (((qh >> i) << 4) as u8 & 16, (qh >> (i + 12)) as u8 & 16)
}

/// d f16, 32 fifth bits, 16 bytes of nibbles; `d * (q - 16)`.
fn q5_0(b: &[u8; 22], o: &mut [f32; 32]) {
    let d = half_at::<0, 22>(b);
    let qh = u32::from_le_bytes(*part::<2, 4, 22>(b));
    let qs = part::<6, 16, 22>(b);
    let (low, high) = o.split_at_mut(16);
    for i in 0..16 {
        let (h0, h1) = fifth_bits(qh, i);
        low[i] = f32::from(i16::from(qs[i] & 15 | h0) - 16) * d;
        high[i] = f32::from(i16::from(qs[i] >> 4 | h1) - 16) * d;
    }
}

/// d f16, m f16, 32 fifth bits, 16 bytes of nibbles; `d * q + m`.
fn q5_1(b: &[u8; 24], o: &mut [f32; 32]) {
    let (d, m) = (half_at::<0, 24>(b), half_at::<2, 24>(b));
    let qh = u32::from_le_bytes(*part::<4, 4, 24>(b));
    let qs = part::<8, 16, 24>(b);
    let (low, high) = o.split_at_mut(16);
    for i in 0..16 {
        let (h0, h1) = fifth_bits(qh, i);
        low[i] = f32::from(qs[i] & 15 | h0) * d + m;
        high[i] = f32::from(qs[i] >> 4 | h1) * d + m;
    }
}

/// d f16, 32 signed bytes; `d * q`.
fn q8_0(b: &[u8; 34], o: &mut [f32; 32]) {
    let d = half_at::<0, 34>(b);
    for (o, q) in o.iter_mut().zip(part::<2, 32, 34>(b)) {
        *o = f32::from(*q as i8) * d;
    }
}

/// 16 bytes of 4-bit scales and minima, 64 bytes of 2-bit codes, d f16, dmin f16; `d * sc * q - dmin * m` for each run of 16.
fn q2_k(b: &[u8; 84], o: &mut [f32; 256]) {
    let scales = part::<0, 16, 84>(b);
    let (d, min) = (half_at::<80, 84>(b), half_at::<82, 84>(b));
    let (qs, _) = part::<16, 64, 84>(b).as_chunks::<16>();
    let (runs, _) = o.as_chunks_mut::<16>();
    for (k, run) in runs.iter_mut().enumerate() {
        // A half of 128 weights reads 32 bytes at four shifts; each shift covers two runs of 16.
        let (half, shift, side) = (k / 8, k % 8 / 2 * 2, k % 2);
        let (dl, ml) = (d * f32::from(scales[k] & 15), min * f32::from(scales[k] >> 4));
        for (o, q) in run.iter_mut().zip(&qs[2 * half + side]) {
            *o = dl * f32::from(q >> shift & 3) - ml;
        }
    }
}

/// The 16 signed 6-bit scales of Q3_K: low nibbles in bytes 0 to 7, two high bits each in bytes 8 to 11.
fn q3_k_scale(scales: &[u8; 12], k: usize) -> i8 {
    let low = scales[k % 8] >> (k / 8 * 4) & 15;
    let high = scales[8 + k % 4] >> (k / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// 32 bytes of third bits, 64 bytes of 2-bit codes, 12 bytes of scales, d f16; `d * sc * (q - 4)`, third bit included in q.
fn q3_k(b: &[u8; 110], o: &mut [f32; 256]) {
    let (masks, _) = part::<0, 32, 110>(b).as_chunks::<16>();
    let (qs, _) = part::<32, 64, 110>(b).as_chunks::<16>();
    let scales = part::<96, 12, 110>(b);
    let d = half_at::<108, 110>(b);
    let (runs, _) = o.as_chunks_mut::<16>();
    for (k, run) in runs.iter_mut().enumerate() {
        let (half, shift, side) = (k / 8, k % 8 / 2 * 2, k % 2);
        let dl = d * f32::from(q3_k_scale(scales, k));
        for i in 0..16 {
            let third = masks[side][i] >> (k / 2) & 1;
            let q = qs[2 * half + side][i] >> shift & 3 | third << 2;
            run[i] = dl * f32::from(i16::from(q) - 4);
        }
    }
}

/// Scale and minimum of run `k` (0 to 7) of Q4_K and Q5_K, 6 bits each in 12 bytes.
fn k4_scale_min(s: &[u8; 12], k: usize) -> (f32, f32) {
    let (scale, min) = if k < 4 {
        (s[k] & 63, s[k + 4] & 63)
    } else {
        (s[k + 4] & 15 | (s[k - 4] >> 6) << 4, s[k + 4] >> 4 | (s[k] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d f16, dmin f16, 12 bytes of scales and minima, 128 bytes of nibbles; `d * sc * q - dmin * m` for each run of 32.
fn q4_k(b: &[u8; 144], o: &mut [f32; 256]) {
    let (d, min) = (half_at::<0, 144>(b), half_at::<2, 144>(b));
    let scales = part::<4, 12, 144>(b);
    let (qs, _) = part::<16, 128, 144>(b).as_chunks::<32>();
    let (runs, _) = o.as_chunks_mut::<32>();
    for (k, run) in runs.iter_mut().enumerate() {
        let (scale, m) = k4_scale_min(scales, k);
        let (dl, ml, shift) = (d * scale, min * m, k % 2 * 4);
        for (o, q) in run.iter_mut().zip(&qs[k / 2]) {
            *o = dl * f32::from(q >> shift & 15) - ml;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `k` of byte `i` belongs to weight `i` of run `k`.
fn q5_k(b: &[u8; 176], o: &mut [f32; 256]) {
    let (d, min) = (half_at::<0, 176>(b), half_at::<2, 176>(b));
    let scales = part::<4, 12, 176>(b);
    let qh = part::<16, 32, 176>(b);
    let (qs, _) = part::<48, 128, 176>(b).as_chunks::<32>();
    let (runs, _) = o.as_chunks_mut::<32>();
    for (k, run) in runs.iter_mut().enumerate() {
        let (scale, m) = k4_scale_min(scales, k);
        let (dl, ml, shift) = (d * scale, min * m, k % 2 * 4);
        let qs = &qs[k / 2];
        for i in 0..32 {
            let q = qs[i] >> shift & 15 | (qh[i] >> k & 1) << 4;
            run[i] = dl * f32::from(q) - ml;
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, d f16; `d * sc * (q - 32)` for each run of 16.
fn q6_k(b: &[u8; 210], o: &mut [f32; 256]) {
    let (ql, _) = part::<0, 128, 210>(b).as_chunks::<16>();
    let (qh, _) = part::<128, 64, 210>(b).as_chunks::<16>();
    let scales = part::<192, 16, 210>(b);
    let d = half_at::<208, 210>(b);
    let (runs, _) = o.as_chunks_mut::<16>();
    for (k, run) in runs.iter_mut().enumerate() {
        // In a half of 128 weights, quarter j (32 weights) takes its nibbles from 64 bytes (quarters 0 and 1 low, 2 and 3
        // high) and its bit pairs from 32 bytes at shift 2j.
        let (half, quarter, side) = (k / 8, k % 8 / 2, k % 2);
        let low = &ql[4 * half + quarter % 2 * 2 + side];
        let high = &qh[2 * half + side];
        let (low_shift, high_shift) = (quarter / 2 * 4, 2 * quarter);
        let dl = d * f32::from(scales[k] as i8);
        for i in 0..16 {
            let q = low[i] >> low_shift & 15 | (high[i] >> high_shift & 3) << 4;
            run[i] = dl * f32::from(i16::from(q) - 32);
        }
    }
}
