//! Rows of any weight as f32.

use super::simd::{Isa, LANES, Simd, per_isa};
use tailorq_tensor::{Bits, PackedMatrix, TILE, TileBits, TileCorrections, Weight};

/// Reads `out.len() / cols` rows from row `first` on, as [`tailorq_tensor::ReadRows::read_rows`] does.
pub(super) fn read_rows(isa: Isa, w: &Weight, first: usize, out: &mut [f32]) {
    match w {
        Weight::Packed(m) => {
            for (i, row) in out.chunks_exact_mut(m.cols().max(1)).enumerate() {
                unpack_row(isa, m, first + i, row);
            }
        }
        _ => w.reader().read_rows(first, out),
    }
}

per_isa! {
    /// Row `r` of a packed matrix, bit for bit what [`PackedMatrix::unpack_row`] gives: `(code - zero) * scale` is exact, and
    /// corrections are added in the same order.
    pub(super) fn unpack_row(m: &PackedMatrix, r: usize, out: &mut [f32]) = unpack_body
}

#[inline(always)]
fn unpack_body<S: Simd>(simd: S, m: &PackedMatrix, r: usize, out: &mut [f32]) {
    match m.layout().bits {
        // Levels are looked up one by one.
        _ if m.levels().is_some() => m.unpack_base(r, out),
        Bits::Two => unpack_tiles::<S, 2>(simd, m, r, out),
        Bits::Three => unpack_tiles::<S, 3>(simd, m, r, out),
        Bits::Four => unpack_tiles::<S, 4>(simd, m, r, out),
        Bits::Six => unpack_tiles::<S, 6>(simd, m, r, out),
        Bits::Eight => unpack_tiles::<S, 8>(simd, m, r, out),
    }
    if let Some(transform) = m.transform() {
        transform.backward(out);
    }
    if let Some(mean4) = m.mean4() {
        mean4.write_to_row(r, m.code_words(r), out);
    }
    if let Some(tiles) = m.tiles() {
        match tiles.bits() {
            TileBits::Four => add_tiles::<S, 4>(simd, tiles, r, out),
            TileBits::Eight => add_tiles::<S, 8>(simd, tiles, r, out),
        }
    }
    if let Some(elements) = m.elements() {
        elements.add_to_row(r, out);
    }
}

/// Adds the corrections of one row's tiles. `code * scale` is exact, so that only the sum is rounded.
#[inline(always)]
fn add_tiles<S: Simd, const BITS: usize>(simd: S, tiles: &TileCorrections, r: usize, out: &mut [f32]) {
    let scales = tiles.scales();
    for (tile, rank) in tiles.map().row(r) {
        let codes = signed_codes::<S, BITS>(simd, tiles.code_bytes(rank));
        let correction = simd.mul(codes, simd.splat(scales[rank].to_f32()));
        let weights = &mut out[tile * TILE..];
        if let Some(whole) = weights.first_chunk_mut::<LANES>() {
            simd.store(simd.add(simd.load(whole), correction), whole);
        } else {
            simd.store_partial(simd.add(simd.load_partial(weights, 0.0), correction), weights);
        }
    }
}

/// Two's complement codes: with the sign bit flipped they count from the smallest code on.
#[inline(always)]
pub(super) fn signed_codes<S: Simd, const BITS: usize>(simd: S, bytes: &[u8]) -> S::F {
    let word = |i: usize, flip: u32| u32::from_le_bytes(bytes.as_chunks::<4>().0[i]) ^ flip;
    if BITS == 4 {
        let flip = 0x8888_8888;
        simd.sub(simd.codes4([word(0, flip), word(1, flip)]), simd.splat(8.0))
    } else {
        let flip = 0x8080_8080;
        simd.sub(simd.codes8([word(0, flip), word(1, flip), word(2, flip), word(3, flip)]), simd.splat(128.0))
    }
}

/// The base: scales the codes of tile after tile, group by group.
#[inline(always)]
fn unpack_tiles<S: Simd, const BITS: u32>(simd: S, m: &PackedMatrix, r: usize, out: &mut [f32]) {
    const { assert!(TILE == LANES, "a tile is a vector") };
    assert_eq!(out.len(), m.cols(), "unpack_row: output length");
    let (layout, scales, zeros) = (m.layout(), m.row_scales(r), zero_bytes(m, r));
    let planes = Planes { words: m.code_words(r), highs: m.code_highs(r), high_words: m.code_high_words(r) };
    let group = layout.group.len(m.cols());
    for (g, values) in out.chunks_mut(group).enumerate() {
        let zero = simd.splat(f32::from(zero_point(layout.bits, zeros, g)));
        let scale = simd.splat(scales.get(g).to_f32());
        let first = g * group / TILE;
        let (tiles, tail) = values.as_chunks_mut::<LANES>();
        let n = tiles.len();
        for (i, tile) in tiles.iter_mut().enumerate() {
            let codes = codes::<S, BITS>(simd, &planes, first + i);
            simd.store(simd.mul(simd.sub(codes, zero), scale), tile);
        }
        if !tail.is_empty() {
            let codes = codes::<S, BITS>(simd, &planes, first + n);
            simd.store_partial(simd.mul(simd.sub(codes, zero), scale), tail);
        }
    }
}

/// The codes of a row.
struct Planes<'a> {
    words: &'a [u32],
    highs: &'a [u16],
    high_words: &'a [u32],
}

/// The codes of one tile. Not a closure: those are not sure to be inlined, and take no target features with them.
#[inline(always)]
fn codes<S: Simd, const BITS: u32>(simd: S, planes: &Planes<'_>, tile: usize) -> S::F {
    let words = planes.words;
    match BITS {
        2 => simd.codes2(words[tile]),
        3 => simd.codes3(words[tile], planes.highs[tile]),
        4 => simd.codes4(words.as_chunks::<2>().0[tile]),
        // Small integers: sums and products are exact.
        6 => {
            let high = simd.mul(simd.codes2(planes.high_words[tile]), simd.splat(16.0));
            simd.add(high, simd.codes4(words.as_chunks::<2>().0[tile]))
        }
        _ => simd.codes8(words.as_chunks::<4>().0[tile]),
    }
}

/// The packed zeros of row `r`; `None` when the layout is symmetric.
#[inline(always)]
fn zero_bytes(m: &PackedMatrix, r: usize) -> Option<&[u8]> {
    let n = m.layout().zero_bytes_per_row(m.cols());
    m.parts().zeros.as_ref().map(|zeros| &zeros[r * n..(r + 1) * n])
}

/// Zero `g` of a row: a field of a little-endian bit stream that touches two bytes at most.
#[inline(always)]
fn zero_point(bits: Bits, zeros: Option<&[u8]>, g: usize) -> u8 {
    let Some(zeros) = zeros else { return bits.middle() };
    let at = g * bits.count() as usize;
    let low = u16::from(zeros[at / 8]);
    let high = zeros.get(at / 8 + 1).map_or(0, |&b| u16::from(b));
    ((low | high << 8) >> (at % 8)) as u8 & bits.max_code()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use tailorq_tensor::{
        ElementCorrections, Group, InputTransform, Layout, MeanTile, Rng, ScaleBits, SharedBytes, TileCorrection,
    };

    fn base(rng: &mut Rng, rows: usize, cols: usize, layout: Layout) -> PackedMatrix {
        let levels = usize::from(layout.bits.max_code()) + 1;
        let groups = rows * layout.group.count(cols);
        let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(levels) as u8).collect();
        let scale = |x: f64| layout.scales.nearest(x as f32).unwrap();
        let scales: Vec<f16> = (0..groups).map(|_| scale(rng.uniform())).collect();
        let n_zeros = if layout.symmetric { 0 } else { groups };
        let zeros: Vec<u8> = (0..n_zeros).map(|_| rng.below(levels) as u8).collect();
        PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap()
    }

    /// Corrections of no, some and all elements of rows.
    fn elements(rng: &mut Rng, rows: usize, cols: usize) -> ElementCorrections {
        let mut row = |r: usize| {
            let chosen: Vec<usize> = (0..cols).filter(|_| rng.below(2) < r).collect();
            chosen.into_iter().map(|c| (c, f16::from_f32(rng.normal()))).collect()
        };
        let all: Vec<Vec<_>> = (0..rows).map(&mut row).collect();
        ElementCorrections::from_rows(cols, &all).unwrap()
    }

    /// Corrections of no, some and all tiles of rows.
    fn tiles(rng: &mut Rng, rows: usize, cols: usize, bits: TileBits) -> TileCorrections {
        let levels = 1 << bits.count();
        let mut all = vec![Vec::new(); rows];
        for (r, row) in all.iter_mut().enumerate() {
            for tile in (0..cols.div_ceil(TILE)).filter(|_| rng.below(2) < r).collect::<Vec<_>>() {
                let mut codes = [0; TILE];
                let used = TILE.min(cols - tile * TILE);
                codes[..used].fill_with(|| (rng.below(levels) as i16 - levels as i16 / 2) as i8);
                row.push(TileCorrection { tile, scale: f16::from_f32(rng.uniform() as f32), codes });
            }
        }
        TileCorrections::from_rows(cols, bits, &all).unwrap()
    }

    /// No, some and all tiles of rows as means.
    fn means(rng: &mut Rng, m: PackedMatrix) -> PackedMatrix {
        let (cols, groups) = (m.cols(), m.layout().group.count(m.cols()));
        let scales: Vec<f16> = (0..m.rows() * groups).map(|_| f16::from_f32(rng.uniform() as f32)).collect();
        let mut all = vec![Vec::new(); m.rows()];
        for (r, row) in all.iter_mut().enumerate() {
            for tile in (0..cols.div_ceil(TILE)).filter(|_| rng.below(2) < r).collect::<Vec<_>>() {
                let mut means = [0; 4];
                let used = TILE.min(cols - tile * TILE).div_ceil(4);
                means[..used].fill_with(|| rng.below(256) as u8 as i8);
                row.push(MeanTile { tile, means });
            }
        }
        m.pack_mean4(&scales, &all).unwrap()
    }

    fn check(m: &PackedMatrix) {
        let cols = m.cols();
        for (r, isa) in (0..m.rows()).flat_map(|r| Isa::available().into_iter().map(move |isa| (r, isa))) {
            let (mut expected, mut found) = (vec![0.0; cols], vec![f32::NAN; cols]);
            m.unpack_row(r, &mut expected);
            unpack_row(isa, m, r, &mut found);
            assert_eq!(found, expected, "{} {} [{}, {cols}]", isa.name(), m.spec(), m.rows());
        }
    }

    #[test]
    fn every_layout_unpacks_to_its_definition() {
        let mut rng = Rng::new(3);
        for bits in Bits::ALL {
            for group in [Group::Inputs(32), Group::Inputs(64), Group::Inputs(128), Group::Row] {
                for (symmetric, cols) in
                    [true, false].into_iter().flat_map(|s| [0, 1, 16, 33, 576, 600].map(|c| (s, c)))
                {
                    // Both widths of scales, in turn for the rest.
                    let layout = |scales| Layout { symmetric, scales, ..Layout::new(bits, group) };
                    let all = ScaleBits::ALL.map(|scales| base(&mut rng, 3, cols, layout(scales)));
                    all.iter().for_each(check);
                    let layout = layout(ScaleBits::ALL[cols % 2]);
                    let m = base(&mut rng, 3, cols, layout);
                    check(&m);
                    check(&m.clone().with_elements(elements(&mut rng, 3, cols)).unwrap());
                    for bits in TileBits::ALL {
                        let tiled = m.clone().with_tiles(tiles(&mut rng, 3, cols, bits)).unwrap();
                        check(&tiled);
                        check(&tiled.with_elements(elements(&mut rng, 3, cols)).unwrap());
                    }
                    let rotated = m.clone().with_transform(InputTransform::hadamard(cols, 7).unwrap()).unwrap();
                    check(&rotated);
                    let rotated = rotated.with_tiles(tiles(&mut rng, 3, cols, TileBits::Four)).unwrap();
                    check(&rotated.with_elements(elements(&mut rng, 3, cols)).unwrap());
                    if layout.has_codebooks() {
                        let n = usize::from(bits.max_code()) + 1;
                        let mut levels: Vec<f16> = (0..n).map(|_| f16::from_f32(rng.normal())).collect();
                        levels.sort_by(f16::total_cmp);
                        let m = m.clone().with_levels(SharedBytes::from_vec(levels)).unwrap();
                        check(&m);
                        let rotated = m.with_transform(InputTransform::hadamard(cols, 7).unwrap()).unwrap();
                        check(&rotated.with_elements(elements(&mut rng, 3, cols)).unwrap());
                    }
                    if layout.bits == Bits::Two {
                        let means = means(&mut rng, m);
                        check(&means);
                        check(&means.with_elements(elements(&mut rng, 3, cols)).unwrap());
                    }
                }
            }
        }
    }
}
