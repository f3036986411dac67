//! Packed matrices of the shapes that models have, for the benchmarks.
#![allow(dead_code, reason = "each benchmark uses some of it")]

use half::f16;
use tailorq_tensor::{
    Bits, ElementCorrections, Group, Layout, PackedMatrix, PackedParts, Rng, ScaleBits, SharedBytes, TILE, TileBits,
    TileCorrection, TileCorrections, Weight,
};

/// What a matrix is made of.
pub struct Case {
    pub name: &'static str,
    pub bits: Bits,
    pub group: usize,
    /// Shares of tiles and of elements that are corrected.
    pub tiles: f64,
    pub elements: f64,
    /// Whether codes are places in a codebook.
    pub codebook: bool,
    /// Whether its integers have two bytes.
    pub wide: bool,
    /// Whether scales are bytes.
    pub byte_scales: bool,
}

const PLAIN: Case = Case {
    name: "",
    bits: Bits::Two,
    group: 128,
    tiles: 0.0,
    elements: 0.0,
    codebook: false,
    wide: false,
    byte_scales: false,
};

pub const CASES: [Case; 9] = [
    Case { name: "2 bit, group 128", ..PLAIN },
    Case { name: "2 bit, group 64", group: 64, ..PLAIN },
    Case { name: "2 bit, group 128, byte scales", byte_scales: true, ..PLAIN },
    Case { name: "2 bit, group 64, byte scales", group: 64, byte_scales: true, ..PLAIN },
    Case { name: "2 bit, 2 % tiles, 0.35 % elements", tiles: 0.02, elements: 0.0035, ..PLAIN },
    Case { name: "2 bit codebook, one byte", codebook: true, ..PLAIN },
    Case { name: "2 bit codebook, two bytes", codebook: true, wide: true, ..PLAIN },
    Case { name: "3 bit, group 128", bits: Bits::Three, ..PLAIN },
    Case { name: "4 bit, group 64", bits: Bits::Four, group: 64, ..PLAIN },
];

/// (outputs, inputs): of Qwen2.5 with 0.5, 1.5 and 7 billion weights.
pub const SHAPES: [(usize, usize); 6] =
    [(4864, 896), (896, 4864), (8960, 1536), (1536, 8960), (18944, 3584), (3584, 18944)];

/// A random matrix.
pub fn matrix(rng: &mut Rng, case: &Case, rows: usize, cols: usize) -> Weight {
    let layout = Layout {
        symmetric: case.codebook,
        scales: if case.byte_scales { ScaleBits::Eight } else { ScaleBits::Sixteen },
        ..Layout::new(case.bits, Group::Inputs(case.group))
    };
    let tiles = cols.div_ceil(TILE);
    let words: Vec<u32> = (0..rows * tiles * case.bits.words_per_tile()).map(|_| rng.next_u64() as u32).collect();
    let highs: Vec<u16> = (0..rows * tiles).map(|_| rng.next_u64() as u16).collect();
    let groups = layout.group.count(cols);
    let scales: Vec<f16> = (0..rows * groups).map(|_| f16::from_f32(0.01 + rng.uniform() as f32 * 0.01)).collect();
    let zeros: Vec<u8> = (0..rows * layout.zero_bytes_per_row(cols)).map(|_| rng.next_u64() as u8).collect();
    let parts = PackedParts {
        codes: SharedBytes::from_vec(words),
        codes_high: (case.bits == Bits::Three).then(|| SharedBytes::from_vec(highs)),
        scales: match layout.scales {
            ScaleBits::Sixteen => SharedBytes::from_vec(scales),
            // From 2^-7 to 2^-5.
            ScaleBits::Eight => {
                SharedBytes::from_vec((0..scales.len()).map(|_| 64 + rng.below(16) as u8).collect::<Vec<u8>>())
            }
        },
        zeros: (!case.codebook).then(|| SharedBytes::from_vec(zeros)),
    };
    let mut m = PackedMatrix::new(rows, cols, layout, parts).expect("a valid matrix");
    if case.codebook {
        // The latter as quantizers round them: integers of one byte.
        let levels =
            if case.wide { [-1.51, -0.4528, 0.4528, 1.51] } else { [-1.515625, -0.453125, 0.453125, 1.515625] };
        let levels = levels.map(f16::from_f32).to_vec();
        m = m.with_levels(SharedBytes::from_vec(levels)).expect("levels of 2 bits");
    }
    if case.tiles > 0.0 {
        let mut all = vec![Vec::new(); rows];
        for row in &mut all {
            for tile in (0..tiles).filter(|_| rng.uniform() < case.tiles).collect::<Vec<_>>() {
                let codes = std::array::from_fn(|_| rng.below(256) as u8 as i8);
                row.push(TileCorrection { tile, scale: f16::from_f32(0.001), codes });
            }
        }
        m = m
            .with_tiles(TileCorrections::from_rows(cols, TileBits::Eight, &all).expect("valid tiles"))
            .expect("same shape");
    }
    if case.elements > 0.0 {
        let mut all = vec![Vec::new(); rows];
        for row in &mut all {
            for col in (0..cols).filter(|_| rng.uniform() < case.elements).collect::<Vec<_>>() {
                row.push((col, f16::from_f32(0.1)));
            }
        }
        m = m.with_elements(ElementCorrections::from_rows(cols, &all).expect("valid elements")).expect("same shape");
    }
    m.into()
}
