//! Random inputs of the kernel tests.
#![allow(dead_code, reason = "each test binary uses some of them")]
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;
use tailorq_kernels::{AttentionSpan, KeyValues, KvBlock, KvType, RopeTable};
use tailorq_tensor::{
    Bits, DType, DenseRows, ElementCorrections, Group, Layout, Matrix, PackedMatrix, Rng, ScaleBits, SharedBytes, TILE,
    TileBits, TileCorrection, TileCorrections, Weight,
};

/// `n` standard normal numbers.
pub fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

/// A random weight of every storage.
pub fn weights(rng: &mut Rng, rows: usize, cols: usize) -> Vec<Weight> {
    let values = normal(rng, rows * cols);
    let halves: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
    let stored = DenseRows::new(rows, cols, DType::BF16, SharedBytes::from_vec(halves)).unwrap();
    let mut all = vec![Weight::Dense(Matrix::from_vec(rows, cols, values).into()), Weight::Stored(Arc::new(stored))];
    all.extend(layouts().into_iter().map(|layout| packed(rng, rows, cols, layout).into()));
    all
}

/// The matrix with corrections of tiles and of single elements, in some rows none and in some all.
pub fn corrected(rng: &mut Rng, matrix: PackedMatrix) -> PackedMatrix {
    let share = [0.3, 1.0, 0.0, 0.6];
    let cols = matrix.cols();
    let mut rows = vec![Vec::new(); matrix.rows()];
    for (r, row) in rows.iter_mut().enumerate() {
        for tile in 0..cols.div_ceil(TILE) {
            if rng.uniform() < share[r % 4] {
                let mut codes = [0; TILE];
                codes[..TILE.min(cols - tile * TILE)].fill_with(|| rng.below(256) as u8 as i8);
                row.push(TileCorrection { tile, scale: f16::from_f32(0.01 * rng.uniform() as f32), codes });
            }
        }
    }
    let tiles = TileCorrections::from_rows(cols, TileBits::Eight, &rows).unwrap();
    with_elements(rng, matrix.with_tiles(tiles).unwrap())
}

/// The matrix with corrections of single elements.
fn with_elements(rng: &mut Rng, matrix: PackedMatrix) -> PackedMatrix {
    let share = [0.05, 0.0, 0.5, 1.0];
    let chosen: Vec<Vec<_>> = (0..matrix.rows())
        .map(|r| {
            let kept: Vec<usize> = (0..matrix.cols()).filter(|_| rng.uniform() < share[r % 4]).collect();
            kept.into_iter().map(|c| (c, f16::from_f32(rng.normal()))).collect()
        })
        .collect();
    let elements = ElementCorrections::from_rows(matrix.cols(), &chosen).unwrap();
    matrix.with_elements(elements).unwrap()
}

/// Every layout there is.
pub fn layouts() -> Vec<Layout> {
    let groups = Group::SIZES.into_iter().map(Group::Inputs).chain([Group::Row]);
    groups
        .flat_map(|group| Bits::ALL.into_iter().map(move |bits| (group, bits)))
        .flat_map(|(group, bits)| ScaleBits::ALL.map(|scales| Layout { scales, ..Layout::new(bits, group) }))
        .flat_map(|layout| [true, false].map(|symmetric| Layout { symmetric, ..layout }))
        .collect()
}

/// A random packed matrix.
pub fn packed(rng: &mut Rng, rows: usize, cols: usize, layout: Layout) -> PackedMatrix {
    let levels = usize::from(layout.bits.max_code()) + 1;
    let groups = rows * layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(levels) as u8).collect();
    let scale = |x: f64| layout.scales.nearest((0.1 + x as f32) / levels as f32).unwrap();
    let scales: Vec<f16> = (0..groups).map(|_| scale(rng.uniform())).collect();
    let n_zeros = if layout.symmetric { 0 } else { groups };
    let zeros: Vec<u8> = (0..n_zeros).map(|_| rng.below(levels) as u8).collect();
    PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap()
}

/// Angles of `positions` positions.
pub fn rope_table(positions: usize, half: usize) -> RopeTable {
    let angles: Vec<f32> = (0..positions)
        .flat_map(|p| (0..half).map(move |i| p as f32 * 10000f32.powf(-(i as f32) / half as f32)))
        .collect();
    RopeTable { half, cos: angles.iter().map(|a| a.cos()).collect(), sin: angles.iter().map(|a| a.sin()).collect() }
}

/// The owner of one attention span.
pub struct Sequence {
    pub rows: Range<usize>,
    pub past: usize,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

impl Sequence {
    pub fn random(rng: &mut Rng, rows: Range<usize>, past: usize, kv_width: usize) -> Self {
        let n = (past + rows.len()) * kv_width;
        Sequence { rows, past, keys: normal(rng, n), values: normal(rng, n) }
    }

    /// The same keys and values in a cache.
    pub fn cached(&self, kind: KvType, kv_heads: usize, head_dim: usize) -> KvBlock {
        let mut block = KvBlock::new(kind, kv_heads, head_dim);
        block.push(&self.keys, &self.values);
        block
    }

    pub fn span(&self) -> AttentionSpan<'_> {
        let source = KeyValues::Rows { keys: &self.keys, values: &self.values };
        AttentionSpan { rows: self.rows.clone(), source, past: self.past }
    }
}

/// `X^T X + ridge I` over `2 n` random rows, lower triangle; the upper triangle is rubbish that nobody may read.
pub fn positive_definite(rng: &mut Rng, n: usize, ridge: f32) -> Matrix {
    let tokens = 2 * n;
    let x = normal(rng, tokens * n);
    let mut h = Matrix::from_vec(n, n, vec![f32::NAN; n * n]);
    for i in 0..n {
        for j in 0..=i {
            let sum: f32 = (0..tokens).map(|t| x[t * n + i] * x[t * n + j]).sum();
            h.row_mut(i)[j] = sum + if i == j { ridge } else { 0.0 };
        }
    }
    h
}
