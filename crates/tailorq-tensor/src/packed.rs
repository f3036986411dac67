//! The packed matrix. Its scalar accessors define every layout; kernels are optimizations tested against them.

use crate::layout::{Bits, Layout, TILE};
use crate::{
    CorrectionSpec, ElementCorrections, InputTransform, Mean4, MeanTile, PackError, PackedSpec, ReadRows, ScaleBits,
    Scales, SharedBytes, TileCorrections, TileSpec,
};
use half::f16;
use std::borrow::Cow;

/// The parts of a packed matrix's base as they lie in a file, little-endian.
#[derive(Clone, Debug)]
pub struct PackedParts {
    /// u32 `[rows, tiles * words_per_tile]`, see [`Bits`]. Codes past `cols` in a row's last tile are 0.
    pub codes: SharedBytes,
    /// 3 bits: u16 `[rows, tiles]`, bit `i` is the high bit of the tile's code `i`. 6 bits: u32 `[rows, tiles]`, bits `2i` and
    /// `2i + 1` are the high bits of code `i`. Others have none.
    pub codes_high: Option<SharedBytes>,
    /// f16 `[rows, groups]`, finite and not negative; with scales of 8 bits u8, see [`ScaleBits::of_byte`].
    pub scales: SharedBytes,
    /// u8 `[rows, zero_bytes_per_row]`, asymmetric only: per row a bit stream, zero `g` at bits `g * bits`.
    pub zeros: Option<SharedBytes>,
}

/// A `[rows, cols]` weight matrix at 2, 3, 4, 6 or 8 bits, `value = (code - zero) * scale`, or `levels[code] * scale` with a
/// codebook, plus the corrections of tiles and of
/// single elements where there are any. With an input transform `T` the base `B` of these values belongs to rotated inputs, and
/// the weights are `B T + C` with the corrections `C`.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    layout: Layout,
    parts: PackedParts,
    levels: Option<SharedBytes>,
    transform: Option<InputTransform>,
    mean4: Option<Mean4>,
    tiles: Option<TileCorrections>,
    elements: Option<ElementCorrections>,
}

impl PackedMatrix {
    /// Validates sizes, alignment and scales once; afterwards nothing is checked again.
    pub fn new(rows: usize, cols: usize, layout: Layout, parts: PackedParts) -> Result<Self, PackError> {
        if rows.checked_mul(cols).and_then(|n| n.checked_mul(8)).is_none() {
            return Err(PackError::TooLarge(rows, cols));
        }
        let tiles = cols.div_ceil(TILE);
        let size = |part, bytes: &SharedBytes, expected: usize| {
            if bytes.len() == expected {
                Ok(())
            } else {
                Err(PackError::Size { part, found: bytes.len(), expected, rows, cols })
            }
        };
        // Empty, but aligned all the same.
        let absent = SharedBytes::from_vec(Vec::<u32>::new());
        size("codes", &parts.codes, rows * tiles * layout.bits.words_per_tile() * 4)?;
        let high = parts.codes_high.as_ref().unwrap_or(&absent);
        size("codes_high", high, rows * tiles * layout.bits.high_bytes())?;
        size("scales", &parts.scales, rows * layout.group.count(cols) * layout.scales.bytes())?;
        size("zeros", parts.zeros.as_ref().unwrap_or(&absent), rows * layout.zero_bytes_per_row(cols))?;
        parts.codes.cast::<u32>().ok_or(PackError::Misaligned("codes"))?;
        let is_aligned =
            if layout.bits == Bits::Six { high.cast::<u32>().is_some() } else { high.cast::<u16>().is_some() };
        if !is_aligned {
            return Err(PackError::Misaligned("codes_high"));
        }
        read_scales(layout.scales, &parts.scales).ok_or(PackError::Misaligned("scales"))?.check()?;
        let (levels, transform, mean4, tiles, elements) = (None, None, None, None, None);
        Ok(PackedMatrix { rows, cols, layout, parts, levels, transform, mean4, tiles, elements })
    }

    /// This matrix with its codes read as places in a codebook: f16 `[2^bits]`, finite and in ascending order (equal ones may
    /// stand beside each other). For symmetric layouts of 2, 3 or 4 bits, which have no zeros, and not with means.
    pub fn with_levels(self, levels: SharedBytes) -> Result<Self, PackError> {
        let bits = self.layout.bits;
        if !self.layout.has_codebooks() || self.mean4.is_some() {
            return Err(PackError::Levels(format!("do not go with {}", self.spec())));
        }
        let (found, expected) = (levels.len(), Layout::level_bytes(bits));
        if found != expected {
            return Err(PackError::CorrectionSize { part: "levels", found, expected });
        }
        let values = levels.cast::<f16>().ok_or(PackError::Misaligned("levels"))?;
        if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
            return Err(PackError::Levels(format!("hold {bad}: levels are finite")));
        }
        if !values.is_sorted() {
            return Err(PackError::Levels("do not ascend".into()));
        }
        Ok(PackedMatrix { levels: Some(levels), ..self })
    }

    /// This matrix with its base read as one of rotated inputs; corrections stay where they are. Not with means, which replace
    /// tiles of the weights themselves.
    pub fn with_transform(self, transform: InputTransform) -> Result<Self, PackError> {
        let problem = if transform.width() != self.cols {
            format!("is for rows of {}, not of {}", transform.width(), self.cols)
        } else if self.mean4.is_some() {
            "does not go with means of four".into()
        } else {
            return Ok(PackedMatrix { transform: Some(transform), ..self });
        };
        Err(PackError::Transform(problem))
    }

    /// This matrix with `elements` added to it, instead of those that it may have had.
    pub fn with_elements(self, elements: ElementCorrections) -> Result<Self, PackError> {
        self.belongs((elements.rows(), elements.cols()))?;
        Ok(PackedMatrix { elements: Some(elements), ..self })
    }

    /// This matrix with `tiles` added to it, instead of those that it may have had.
    pub fn with_tiles(self, tiles: TileCorrections) -> Result<Self, PackError> {
        self.belongs((tiles.rows(), tiles.cols()))?;
        match self.mean4 {
            Some(_) => Err(PackError::Mean4("tile corrections".into())),
            None => Ok(PackedMatrix { tiles: Some(tiles), ..self }),
        }
    }

    /// This matrix with the words of some tiles read as means, which is what its codes must hold there.
    pub fn with_mean4(self, mean4: Mean4) -> Result<Self, PackError> {
        self.belongs((mean4.rows(), mean4.cols()))?;
        let is_alone = self.tiles.is_none() && self.transform.is_none() && self.levels.is_none();
        if self.layout.bits != Bits::Two || self.layout.group != mean4.group() || !is_alone {
            return Err(PackError::Mean4(self.spec().to_string()));
        }
        mean4.check(self.parts.codes.cast().expect("checked at the door"))?;
        Ok(PackedMatrix { mean4: Some(mean4), ..self })
    }

    /// This matrix with some of its tiles replaced by means: `rows` lists them in ascending order, `scales` (`[rows, groups]`)
    /// are those of the means.
    pub fn pack_mean4(mut self, scales: &[f16], rows: &[Vec<MeanTile>]) -> Result<Self, PackError> {
        let mean4 = Mean4::from_rows(self.cols, self.layout.group, scales, rows)?;
        self.belongs((mean4.rows(), mean4.cols()))?;
        if self.layout.bits == Bits::Two {
            let mut words = self.parts.codes.cast::<u32>().expect("checked at the door").to_vec();
            for (row, tiles) in words.chunks_exact_mut(self.tiles_per_row().max(1)).zip(rows) {
                for tile in tiles {
                    row[tile.tile] = tile.word();
                }
            }
            self.parts.codes = SharedBytes::from_vec(words);
        }
        self.with_mean4(mean4)
    }

    fn belongs(&self, found: (usize, usize)) -> Result<(), PackError> {
        let expected = (self.rows, self.cols);
        if found == expected { Ok(()) } else { Err(PackError::OtherShape { found, expected }) }
    }

    /// Packs codes (`[rows, cols]`, one a byte), scales (`[rows, groups]`) and zeros (`[rows, groups]`; empty when the
    /// layout is symmetric). Panics when a slice has the wrong length; fails when a scale is not finite, or none of those that
    /// the layout stores.
    pub fn pack(
        rows: usize,
        cols: usize,
        layout: Layout,
        codes: &[u8],
        scales: &[f16],
        zeros: &[u8],
    ) -> Result<Self, PackError> {
        assert_eq!(codes.len(), rows * cols, "one code a weight");
        let (words, high) = pack_codes(rows, cols, layout.bits, codes);
        PackedMatrix::from_planes(rows, cols, layout, (SharedBytes::from_vec(words), high), scales.to_vec(), zeros)
    }

    /// As [`PackedMatrix::pack`] with codes that are packed already: the planes `codes` and `codes_high` of [`PackedParts`].
    pub fn from_planes(
        rows: usize,
        cols: usize,
        layout: Layout,
        (codes, codes_high): (SharedBytes, Option<SharedBytes>),
        scales: Vec<f16>,
        zeros: &[u8],
    ) -> Result<Self, PackError> {
        let zeros = (!layout.symmetric).then(|| SharedBytes::from_vec(pack_zeros(rows, cols, layout, zeros)));
        let parts = PackedParts { codes, codes_high, scales: pack_scales(layout.scales, scales)?, zeros };
        PackedMatrix::new(rows, cols, layout, parts)
    }

    /// The rows of all `panels` (same columns, layout, codebook and transform, tile codes of one width), one under the other. Panics when they
    /// differ or when there are none. What only some panels have, the others have none of.
    pub fn stack(panels: &[PackedMatrix]) -> Self {
        let first = &panels[0];
        let base = |p: &PackedMatrix| (p.cols, p.layout, p.levels().map(<[f16]>::to_vec));
        let alike = |p: &PackedMatrix| base(p) == base(first) && p.transform == first.transform;
        assert!(panels.iter().all(alike), "panels of one matrix");
        let parts = PackedParts {
            codes: stack_part::<u32>(panels, |p| Some(&p.codes)).expect("every layout has codes"),
            codes_high: match first.layout.bits {
                Bits::Six => stack_part::<u32>(panels, |p| p.codes_high.as_ref()),
                _ => stack_part::<u16>(panels, |p| p.codes_high.as_ref()),
            },
            scales: match first.layout.scales {
                ScaleBits::Eight => stack_part::<u8>(panels, |p| Some(&p.scales)),
                ScaleBits::Sixteen => stack_part::<f16>(panels, |p| Some(&p.scales)),
            }
            .expect("every layout has scales"),
            zeros: stack_part::<u8>(panels, |p| p.zeros.as_ref()),
        };
        let rows = panels.iter().map(|p| p.rows).sum();
        let tiles: Vec<_> = panels.iter().map(|p| (p.rows, p.tiles.as_ref())).collect();
        let elements: Vec<_> = panels.iter().map(|p| (p.rows, p.elements.as_ref())).collect();
        let mean4: Vec<_> = panels.iter().map(|p| (p.rows, p.mean4.as_ref())).collect();
        let stacked = PackedMatrix {
            levels: first.levels.clone(),
            transform: first.transform.clone(),
            mean4: Mean4::stack(first.cols, &mean4),
            tiles: TileCorrections::stack(first.cols, &tiles),
            elements: ElementCorrections::stack(first.cols, &elements),
            ..PackedMatrix::new(rows, first.cols, first.layout, parts)
                .expect("stacked panels are as valid as each of them")
        };
        assert!(stacked.mean4.is_none() || stacked.tiles.is_none(), "means and tile corrections do not go together");
        stacked
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The layout.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Shape, layout, transform and corrections.
    pub fn spec(&self) -> PackedSpec {
        let corrections = CorrectionSpec {
            mean4: self.mean4.as_ref().map(Mean4::len),
            tiles: self.tiles.as_ref().map(|t| TileSpec { bits: t.bits(), count: t.len() }),
            elements: self.elements.as_ref().map(ElementCorrections::len),
        };
        let transform = self.transform.as_ref().map(InputTransform::spec);
        let codebook = self.levels.is_some();
        PackedSpec { layout: self.layout, rows: self.rows, cols: self.cols, codebook, transform, corrections }
    }

    /// The parts of the base as they lie in a file.
    pub fn parts(&self) -> &PackedParts {
        &self.parts
    }

    /// The levels of a codebook, `[2^bits]`, ascending; `None` for an affine grid.
    pub fn levels(&self) -> Option<&[f16]> {
        self.levels.as_ref().map(|levels| levels.cast().expect("checked at the door"))
    }

    /// The same as they lie in a file.
    pub fn level_bytes(&self) -> Option<&SharedBytes> {
        self.levels.as_ref()
    }

    /// What is done to inputs before they meet the base, if anything is.
    pub fn transform(&self) -> Option<&InputTransform> {
        self.transform.as_ref()
    }

    /// The tiles whose words hold means instead of codes, if there are any.
    pub fn mean4(&self) -> Option<&Mean4> {
        self.mean4.as_ref()
    }

    /// What is added to tiles of the base, if anything is.
    pub fn tiles(&self) -> Option<&TileCorrections> {
        self.tiles.as_ref()
    }

    /// What is added to single elements of the base, if anything is.
    pub fn elements(&self) -> Option<&ElementCorrections> {
        self.elements.as_ref()
    }

    /// Bytes of all parts together, corrections included.
    pub fn bytes(&self) -> usize {
        self.spec().bytes()
    }

    /// Tiles in a row.
    pub fn tiles_per_row(&self) -> usize {
        self.cols.div_ceil(TILE)
    }

    /// The main code plane of row `r`: u32 `[tiles * words_per_tile]`.
    pub fn code_words(&self, r: usize) -> &[u32] {
        let n = self.tiles_per_row() * self.layout.bits.words_per_tile();
        &self.parts.codes.cast::<u32>().expect("checked at the door")[r * n..(r + 1) * n]
    }

    /// The high plane of row `r`: u16 `[tiles]`; empty unless the layout has 3 bits.
    pub fn code_highs(&self, r: usize) -> &[u16] {
        let n = self.tiles_per_row();
        match &self.parts.codes_high {
            Some(high) if self.layout.bits == Bits::Three => {
                &high.cast::<u16>().expect("checked at the door")[r * n..(r + 1) * n]
            }
            _ => &[],
        }
    }

    /// The high plane of row `r`: u32 `[tiles]`; empty unless the layout has 6 bits.
    pub fn code_high_words(&self, r: usize) -> &[u32] {
        let n = self.tiles_per_row();
        match &self.parts.codes_high {
            Some(high) if self.layout.bits == Bits::Six => {
                &high.cast::<u32>().expect("checked at the door")[r * n..(r + 1) * n]
            }
            _ => &[],
        }
    }

    /// The scales of row `r` as numbers: f16 `[groups]`, whatever their width is.
    pub fn scales(&self, r: usize) -> Cow<'_, [f16]> {
        self.row_scales(r).to_halves()
    }

    /// The scales of row `r` where they lie, `[groups]`.
    pub fn row_scales(&self, r: usize) -> Scales<'_> {
        let n = self.layout.group.count(self.cols);
        self.stored_scales().part(r * n, n)
    }

    /// All scales where they lie, `[rows, groups]`.
    pub fn stored_scales(&self) -> Scales<'_> {
        read_scales(self.layout.scales, &self.parts.scales).expect("checked at the door")
    }

    /// The code of weight `(r, c)` in the base; of no meaning in a tile of means.
    pub fn code(&self, r: usize, c: usize) -> u8 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        let (tile, i) = (c / TILE, c % TILE);
        let words = self.code_words(r);
        match self.layout.bits {
            Bits::Two => (words[tile] >> (2 * i) & 3) as u8,
            Bits::Three => (words[tile] >> (2 * i) & 3) as u8 | ((self.code_highs(r)[tile] >> i & 1) << 2) as u8,
            Bits::Four => (words[2 * tile + i / 8] >> (4 * (i % 8)) & 15) as u8,
            Bits::Six => {
                let low = (words[2 * tile + i / 8] >> (4 * (i % 8)) & 15) as u8;
                low | ((self.code_high_words(r)[tile] >> (2 * i) & 3) << 4) as u8
            }
            Bits::Eight => (words[4 * tile + i / 4] >> (8 * (i % 4)) & 255) as u8,
        }
    }

    /// The zero point of group `g` in row `r`.
    pub fn zero(&self, r: usize, g: usize) -> u8 {
        let Some(zeros) = &self.parts.zeros else { return self.layout.bits.middle() };
        let bits = self.layout.bits.count() as usize;
        let n = self.layout.zero_bytes_per_row(self.cols);
        let row = &zeros[r * n..(r + 1) * n];
        (0..bits).fold(0, |z, b| {
            let at = g * bits + b;
            z | (row[at / 8] >> (at % 8) & 1) << b
        })
    }

    /// Number `(r, c)` of the base: `(code - zero) * scale`, its level times the scale, or its mean where the tile holds means; exact in f32. With a
    /// transform it belongs to rotated input `c`.
    pub fn base_value(&self, r: usize, c: usize) -> f32 {
        if let Some(mean) = self.mean4.as_ref().and_then(|m| m.get(r, c, self.code_words(r))) {
            return mean;
        }
        let g = c / self.layout.group.len(self.cols);
        if let Some(levels) = self.levels() {
            return levels[usize::from(self.code(r, c))].to_f32() * self.row_scales(r).get(g).to_f32();
        }
        f32::from(i16::from(self.code(r, c)) - i16::from(self.zero(r, g))) * self.row_scales(r).get(g).to_f32()
    }

    /// Weight `(r, c)`: the base, rotated back where it has a transform (which takes a look at the whole row), plus its tile's
    /// correction, plus its own, each sum rounded to f32.
    pub fn value(&self, r: usize, c: usize) -> f32 {
        let tile = self.tiles.as_ref().and_then(|t| t.get(r, c));
        let element = self.elements.as_ref().and_then(|e| e.get(r, c));
        let base = match &self.transform {
            None => self.base_value(r, c),
            Some(transform) => {
                let mut row = vec![0.0; self.cols];
                self.unpack_base(r, &mut row);
                transform.backward(&mut row);
                row[c]
            }
        };
        [tile, element].into_iter().flatten().fold(base, |value, correction| value + correction)
    }

    /// Row `r` as f32, the same values as [`PackedMatrix::value`].
    pub fn unpack_row(&self, r: usize, out: &mut [f32]) {
        self.unpack_base(r, out);
        if let Some(transform) = &self.transform {
            transform.backward(out);
        }
        if let Some(mean4) = &self.mean4 {
            mean4.write_to_row(r, self.code_words(r), out);
        }
        if let Some(tiles) = &self.tiles {
            tiles.add_to_row(r, out);
        }
        if let Some(elements) = &self.elements {
            elements.add_to_row(r, out);
        }
    }

    /// The codes of row `r` on their grid, tile by tile, as if no tile held means: the base alone, not rotated back.
    pub fn unpack_base(&self, r: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "unpack_row: output length");
        let (words, scales) = (self.code_words(r), self.row_scales(r));
        let (highs, high_words) = (self.code_highs(r), self.code_high_words(r));
        let mut levels = [0.0; TILE];
        if let Some(stored) = self.levels() {
            levels.iter_mut().zip(stored).for_each(|(level, stored)| *level = stored.to_f32());
        }
        let group = self.layout.group.len(self.cols);
        let per_tile = self.layout.bits.words_per_tile();
        let mut codes = [0u8; TILE];
        for (tile, values) in out.chunks_mut(TILE).enumerate() {
            let high = highs.get(tile).map(|h| u32::from(*h)).or(high_words.get(tile).copied()).unwrap_or(0);
            tile_codes(self.layout.bits, &words[tile * per_tile..(tile + 1) * per_tile], high, &mut codes);
            // Groups are multiples of a tile, so a tile lies in one group.
            let g = tile * TILE / group;
            let (zero, scale) = (f32::from(self.zero(r, g)), scales.get(g).to_f32());
            if self.levels.is_some() {
                // A codebook has at most 16 levels.
                values.iter_mut().zip(codes).for_each(|(v, code)| *v = levels[usize::from(code) % TILE] * scale);
                continue;
            }
            for (value, code) in values.iter_mut().zip(codes) {
                *value = (f32::from(code) - zero) * scale;
            }
        }
    }
}

impl ReadRows for PackedMatrix {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn bytes(&self) -> usize {
        PackedMatrix::bytes(self)
    }
    fn read_rows(&self, first: usize, out: &mut [f32]) {
        for (i, row) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.unpack_row(first + i, row);
        }
    }
    fn encoding(&self) -> String {
        self.spec().to_string()
    }
}

/// The 16 codes of one tile.
fn tile_codes(bits: Bits, words: &[u32], high: u32, codes: &mut [u8; TILE]) {
    match bits {
        Bits::Two => {
            for (i, c) in codes.iter_mut().enumerate() {
                *c = (words[0] >> (2 * i) & 3) as u8;
            }
        }
        Bits::Three => {
            for (i, c) in codes.iter_mut().enumerate() {
                *c = (words[0] >> (2 * i) & 3) as u8 | ((high >> i & 1) << 2) as u8;
            }
        }
        Bits::Four => {
            for (i, c) in codes.iter_mut().enumerate() {
                *c = (words[i / 8] >> (4 * (i % 8)) & 15) as u8;
            }
        }
        Bits::Six => {
            for (i, c) in codes.iter_mut().enumerate() {
                *c = (words[i / 8] >> (4 * (i % 8)) & 15) as u8 | ((high >> (2 * i) & 3) << 4) as u8;
            }
        }
        Bits::Eight => {
            for (i, c) in codes.iter_mut().enumerate() {
                *c = (words[i / 4] >> (8 * (i % 4))) as u8;
            }
        }
    }
}

/// The main plane, and that of the high bits.
fn pack_codes(rows: usize, cols: usize, bits: Bits, codes: &[u8]) -> (Vec<u32>, Option<SharedBytes>) {
    let (tiles, per_tile) = (cols.div_ceil(TILE), bits.words_per_tile());
    let mut words = vec![0u32; rows * tiles * per_tile];
    let mut high = vec![0u16; if bits == Bits::Three { rows * tiles } else { 0 }];
    let mut high_words = vec![0u32; if bits == Bits::Six { rows * tiles } else { 0 }];
    // `max(1)`: chunks of zero columns would panic, and there is nothing to pack then.
    for (r, row) in codes.chunks_exact(cols.max(1)).enumerate() {
        for (t, tile) in row.chunks(TILE).enumerate() {
            let at = r * tiles + t;
            for (i, &code) in tile.iter().enumerate() {
                debug_assert!(code <= bits.max_code());
                let code = u32::from(code);
                match bits {
                    Bits::Two => words[at] |= code << (2 * i),
                    Bits::Three => {
                        words[at] |= (code & 3) << (2 * i);
                        high[at] |= ((code >> 2) as u16) << i;
                    }
                    Bits::Four => words[2 * at + i / 8] |= code << (4 * (i % 8)),
                    Bits::Six => {
                        words[2 * at + i / 8] |= (code & 15) << (4 * (i % 8));
                        high_words[at] |= (code >> 4) << (2 * i);
                    }
                    Bits::Eight => words[4 * at + i / 4] |= code << (8 * (i % 4)),
                }
            }
        }
    }
    let high = match bits {
        Bits::Three => Some(SharedBytes::from_vec(high)),
        Bits::Six => Some(SharedBytes::from_vec(high_words)),
        Bits::Two | Bits::Four | Bits::Eight => None,
    };
    (words, high)
}

/// Scales in the width that their layout has; `None` when they are misaligned.
fn read_scales(bits: ScaleBits, bytes: &SharedBytes) -> Option<Scales<'_>> {
    match bits {
        ScaleBits::Eight => Some(Scales::Bytes(bytes)),
        ScaleBits::Sixteen => bytes.cast().map(Scales::Halves),
    }
}

fn pack_scales(bits: ScaleBits, scales: Vec<f16>) -> Result<SharedBytes, PackError> {
    if bits == ScaleBits::Sixteen {
        return Ok(SharedBytes::from_vec(scales));
    }
    let byte = |(index, scale): (usize, &f16)| {
        ScaleBits::byte(*scale).ok_or(PackError::ScaleByte { index, value: scale.to_f32() })
    };
    let bytes: Vec<u8> = scales.iter().enumerate().map(byte).collect::<Result<_, _>>()?;
    Ok(SharedBytes::from_vec(bytes))
}

fn pack_zeros(rows: usize, cols: usize, layout: Layout, zeros: &[u8]) -> Vec<u8> {
    let (groups, bits) = (layout.group.count(cols), layout.bits.count() as usize);
    assert_eq!(zeros.len(), rows * groups, "one zero a group");
    let n = layout.zero_bytes_per_row(cols);
    let mut packed = vec![0u8; rows * n];
    for r in 0..rows {
        for g in 0..groups {
            for b in 0..bits {
                let at = g * bits + b;
                packed[r * n + at / 8] |= (zeros[r * groups + g] >> b & 1) << (at % 8);
            }
        }
    }
    packed
}

/// One part of all panels, end to end; `None` when the layout has no such part.
fn stack_part<T: bytemuck::Pod + Send + Sync>(
    panels: &[PackedMatrix],
    part: fn(&PackedParts) -> Option<&SharedBytes>,
) -> Option<SharedBytes> {
    part(&panels[0].parts)?;
    let pieces = panels.iter().filter_map(|p| part(&p.parts)?.cast::<T>());
    Some(SharedBytes::from_vec(pieces.flatten().copied().collect::<Vec<T>>()))
}
