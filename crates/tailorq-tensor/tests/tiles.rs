//! Tile corrections and means of four: any tile is found in place, and bytes that do not form them are refused.
#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use tailorq_tensor::{
    Bits, ElementCorrections, Group, Layout, Mean4, MeanTile, PackError, PackedMatrix, ReadRows, Rng, SharedBytes,
    TILE, TileBits, TileCorrection, TileCorrections, TileMap, TileParts,
};

const TWO: Layout = Layout::new(Bits::Two, Group::Inputs(32));

fn base(rows: usize, cols: usize, layout: Layout, rng: &mut Rng) -> PackedMatrix {
    let groups = rows * layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(4) as u8).collect();
    let zeros: Vec<u8> = (0..if layout.symmetric { 0 } else { groups }).map(|_| rng.below(4) as u8).collect();
    PackedMatrix::pack(rows, cols, layout, &codes, &scales(groups, rng), &zeros).unwrap()
}

fn scales(n: usize, rng: &mut Rng) -> Vec<f16> {
    // Subnormal and zero scales are legal too.
    (0..n).map(|_| f16::from_bits(rng.below(0x7c00) as u16)).collect()
}

/// Some of the tiles of each row: none for a share of 0, all for 1.
fn chosen(rows: usize, cols: usize, share: f64, rng: &mut Rng) -> Vec<Vec<usize>> {
    (0..rows).map(|_| (0..cols.div_ceil(TILE)).filter(|_| rng.uniform() < share).collect()).collect()
}

fn tiles(rows: usize, cols: usize, bits: TileBits, share: f64, rng: &mut Rng) -> Vec<Vec<TileCorrection>> {
    let levels = 1usize << bits.count();
    let mut one = |tile: usize| {
        let mut codes = [0; TILE];
        let used = TILE.min(cols - tile * TILE);
        codes[..used].fill_with(|| (rng.below(levels) as i16 - levels as i16 / 2) as i8);
        TileCorrection { tile, scale: scales(1, rng)[0], codes }
    };
    let chosen = chosen(rows, cols, share, &mut Rng::new(77));
    chosen.into_iter().map(|row| row.into_iter().map(&mut one).collect()).collect()
}

fn means(rows: usize, cols: usize, share: f64, rng: &mut Rng) -> Vec<Vec<MeanTile>> {
    let mut one = |tile: usize| {
        let mut means = [0; 4];
        means[..TILE.min(cols - tile * TILE).div_ceil(4)].fill_with(|| rng.below(256) as u8 as i8);
        MeanTile { tile, means }
    };
    let chosen = chosen(rows, cols, share, &mut Rng::new(78));
    chosen.into_iter().map(|row| row.into_iter().map(&mut one).collect()).collect()
}

fn all_values(m: &PackedMatrix) -> Vec<f32> {
    let mut all = vec![f32::NAN; m.rows() * m.cols()];
    m.read_rows(0, &mut all);
    all
}

fn shares() -> impl Strategy<Value = f64> {
    prop::sample::select(vec![0.0, 0.05, 0.5, 1.0])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Ranks count the marked tiles in order, whether asked for one by one or row by row.
    #[test]
    fn maps_number_their_tiles(rows in 0usize..4, cols in 0usize..5000, share in shares(), seed: u64) {
        let chosen = chosen(rows, cols, share, &mut Rng::new(seed));
        let map = TileMap::from_rows(cols, chosen.iter().map(|row| row.iter().copied())).unwrap();
        prop_assert_eq!(map.len(), chosen.iter().map(Vec::len).sum::<usize>());
        prop_assert_eq!(map.bytes().len(), rows * TileMap::row_bytes(cols));
        let mut next = 0;
        for (r, row) in chosen.iter().enumerate() {
            let listed: Vec<_> = map.row(r).collect();
            let places = &map.places()[map.rank_of_row(r)..map.rank_of_row(r + 1)];
            prop_assert_eq!(&places.iter().map(|p| p.tile()).collect::<Vec<_>>(), row);
            prop_assert!(places.iter().all(|p| p.row_after(r) == 0 && p.row_after(r.saturating_sub(1)) == r.min(1)));
            prop_assert_eq!(&listed, &row.iter().copied().zip(next..).collect::<Vec<_>>());
            for tile in 0..cols.div_ceil(TILE) {
                let expected = listed.iter().find(|t| t.0 == tile).map(|t| t.1);
                prop_assert_eq!(map.rank(r, tile), expected);
            }
            next += row.len();
        }
    }

    /// Places tell 256 rows apart, wherever one begins to count.
    #[test]
    fn places_count_rows_from_anywhere(rows in 1usize..700, first in 0usize..700, seed: u64) {
        let first = first % rows;
        let map = TileMap::from_rows(40, chosen(rows, 40, 0.3, &mut Rng::new(seed))).unwrap();
        for r in first..rows.min(first + 256) {
            let places = &map.places()[map.rank_of_row(r)..map.rank_of_row(r + 1)];
            prop_assert!(places.iter().all(|p| p.row_after(first) == r - first));
        }
    }

    #[test]
    fn tiles_and_elements_are_added_to_the_base(
        rows in 0usize..5, cols in 0usize..300, share in shares(), bits in prop::sample::select(TileBits::ALL.to_vec()),
        three: bool, seed: u64,
    ) {
        let mut rng = Rng::new(seed);
        let layout = Layout { bits: if three { Bits::Three } else { Bits::Two }, ..TWO };
        let plain = base(rows, cols, layout, &mut rng);
        let given = tiles(rows, cols, bits, share, &mut rng);
        let corrections = TileCorrections::from_rows(cols, bits, &given).unwrap();
        let n: usize = given.iter().map(Vec::len).sum();
        let bytes = rows * TileMap::row_bytes(cols) + n * (bits.tile_bytes() + 2);
        prop_assert_eq!((corrections.len(), corrections.bytes()), (n, bytes));
        for (r, row) in given.iter().enumerate() {
            prop_assert_eq!(&corrections.row(r).collect::<Vec<_>>(), row);
        }
        let kept: Vec<Vec<_>> = (0..rows).map(|r| (r..cols).step_by(7).map(|c| (c, f16::from_f32(rng.normal()))).collect()).collect();
        let elements = ElementCorrections::from_rows(cols, &kept).unwrap();
        let m = plain.clone().with_tiles(corrections).unwrap();
        prop_assert_eq!(m.bytes(), plain.bytes() + bytes);
        let both = m.clone().with_elements(elements.clone()).unwrap();
        prop_assert_eq!(both.bytes(), m.bytes() + elements.bytes());
        let (one, all) = (all_values(&m), all_values(&both));
        for (r, row) in given.iter().enumerate() {
            for c in 0..cols {
                let tile = row.iter().find(|t| t.tile == c / TILE).map(|t| f32::from(t.codes[c % TILE]) * t.scale.to_f32());
                prop_assert_eq!(m.tiles().unwrap().get(r, c), tile);
                let expected = plain.value(r, c) + tile.unwrap_or(0.0);
                prop_assert_eq!((m.value(r, c), one[r * cols + c]), (expected, expected));
                let expected = expected + elements.get(r, c).unwrap_or(0.0);
                prop_assert_eq!((both.value(r, c), all[r * cols + c]), (expected, expected));
            }
        }
    }

    #[test]
    fn means_stand_in_for_codes(
        rows in 0usize..5, cols in 0usize..300, share in shares(), row_group: bool, symmetric: bool, seed: u64,
    ) {
        let mut rng = Rng::new(seed);
        let layout = Layout { group: if row_group { Group::Row } else { TWO.group }, symmetric, ..TWO };
        let plain = base(rows, cols, layout, &mut rng);
        let given = means(rows, cols, share, &mut rng);
        let groups = layout.group.count(cols);
        let scales = scales(rows * groups, &mut rng);
        let m = plain.clone().pack_mean4(&scales, &given).unwrap();
        prop_assert_eq!(m.bytes(), plain.bytes() + rows * TileMap::row_bytes(cols) + 2 * rows * groups);
        prop_assert_eq!(m.mean4().unwrap().bytes(), m.bytes() - plain.bytes());
        let kept: Vec<Vec<_>> = (0..rows).map(|r| (r..cols).step_by(7).map(|c| (c, f16::from_f32(rng.normal()))).collect()).collect();
        let elements = ElementCorrections::from_rows(cols, &kept).unwrap();
        let both = m.clone().with_elements(elements.clone()).unwrap();
        let (one, all) = (all_values(&m), all_values(&both));
        for (r, row) in given.iter().enumerate() {
            for c in 0..cols {
                let scale = scales[r * groups + c / layout.group.len(cols)].to_f32();
                let mean = row.iter().find(|t| t.tile == c / TILE).map(|t| f32::from(t.means[c % TILE / 4]) * scale);
                let expected = mean.unwrap_or(plain.value(r, c));
                prop_assert_eq!((m.base_value(r, c), m.value(r, c), one[r * cols + c]), (expected, expected, expected));
                let expected = expected + elements.get(r, c).unwrap_or(0.0);
                prop_assert_eq!((both.value(r, c), all[r * cols + c]), (expected, expected));
            }
        }
    }

    /// Panels with, without and with empty corrections stack to the rows of all of them.
    #[test]
    fn panels_stack(
        panels in prop::collection::vec((0usize..4, prop::option::of(0.0f64..1.0)), 1..5), cols in 0usize..100,
        as_means: bool, seed: u64,
    ) {
        let mut rng = Rng::new(seed);
        let panel = |&(rows, share): &(usize, Option<f64>), rng: &mut Rng| {
            let plain = base(rows, cols, TWO, rng);
            match share {
                None => plain,
                Some(share) if as_means => {
                    let scales = scales(rows * TWO.group.count(cols), rng);
                    plain.pack_mean4(&scales, &means(rows, cols, share, rng)).unwrap()
                }
                Some(share) => {
                    let given = tiles(rows, cols, TileBits::Four, share, rng);
                    plain.with_tiles(TileCorrections::from_rows(cols, TileBits::Four, &given).unwrap()).unwrap()
                }
            }
        };
        let parts: Vec<_> = panels.iter().map(|p| panel(p, &mut rng)).collect();
        let stacked = PackedMatrix::stack(&parts);
        let some = panels.iter().any(|p| p.1.is_some());
        prop_assert_eq!((stacked.mean4().is_some(), stacked.tiles().is_some()), (some && as_means, some && !as_means));
        prop_assert_eq!(all_values(&stacked), parts.iter().flat_map(all_values).collect::<Vec<_>>());
    }
}

fn numbers<T: bytemuck::NoUninit + Send + Sync>(all: &[T]) -> SharedBytes {
    SharedBytes::from_vec(all.to_vec())
}

#[test]
fn known_bytes() {
    let codes = [-8, 7, -1, 0, 1, 2, 3, 4, 5, 6, -2, -3, -4, -5, -6, -7];
    let row = vec![TileCorrection { tile: 9, scale: f16::ONE, codes }];
    let four = TileCorrections::from_rows(160, TileBits::Four, std::slice::from_ref(&row)).unwrap();
    assert_eq!(four.parts().tilemap[..], [0, 0b10]);
    assert_eq!(four.parts().codes[..], [0x78, 0x0f, 0x21, 0x43, 0x65, 0xde, 0xbc, 0x9a]);
    let eight = TileCorrections::from_rows(160, TileBits::Eight, &[row]).unwrap();
    assert_eq!(eight.parts().codes[..4], [0xf8, 0x07, 0xff, 0x00]);
    assert_eq!((four.codes(0), eight.codes(0)), (codes, codes));
    let base = PackedMatrix::pack(1, 20, TWO, &[3; 20], &[f16::ONE], &[0]).unwrap();
    let m = base.pack_mean4(&[f16::from_f32(0.5)], &[vec![MeanTile { tile: 1, means: [-2, 0, 0, 0] }]]).unwrap();
    assert_eq!(m.code_words(0), [0xffff_ffff, 0x0000_00fe]);
    assert_eq!((m.value(0, 15), m.value(0, 16), m.value(0, 19)), (3.0, -1.0, -1.0));
    assert_eq!(m.mean4().unwrap().map().bytes()[..], [0b10]);
}

#[test]
fn bad_tiles_are_refused() {
    let one = |tile| TileCorrection { tile, scale: f16::ONE, codes: [0; TILE] };
    let refused = |bits, row: Vec<TileCorrection>| TileCorrections::from_rows(40, bits, &[vec![], row]).unwrap_err();
    let tile = |tile| PackError::Tile { row: 1, tile, tiles: 3 };
    assert_eq!(refused(TileBits::Eight, vec![one(3)]), tile(3));
    assert_eq!(refused(TileBits::Eight, vec![one(1), one(1)]), tile(1));
    assert_eq!(refused(TileBits::Eight, vec![one(2), one(0)]), tile(0));
    let mut wide = one(1);
    for code in [8, -9] {
        wide.codes[5] = code;
        assert_eq!(refused(TileBits::Four, vec![wide]), PackError::TileCode { row: 1, tile: 1, code });
    }
    let mut past = one(2);
    past.codes[8] = -1;
    for bits in TileBits::ALL {
        assert_eq!(refused(bits, vec![past]), PackError::TileCode { row: 1, tile: 2, code: -1 });
    }
    for bad in [f16::NAN, f16::INFINITY, f16::from_f32(-1.0)] {
        let error = refused(TileBits::Eight, vec![one(0), TileCorrection { scale: bad, ..one(1) }]);
        assert!(matches!(error, PackError::CorrectionScale { part: "tile_scales", index: 1, .. }), "{error}");
    }
    let tiles = TileCorrections::from_rows(40, TileBits::Four, &[vec![], vec![one(1)]]).unwrap();
    let mut rng = Rng::new(1);
    for (rows, cols) in [(3, 40), (2, 41)] {
        let error = base(rows, cols, TWO, &mut rng).with_tiles(tiles.clone()).unwrap_err();
        assert_eq!(error, PackError::OtherShape { found: (2, 40), expected: (rows, cols) });
    }
    let means = base(2, 40, TWO, &mut rng).pack_mean4(&[f16::ONE; 4], &[vec![], vec![]]).unwrap();
    assert!(matches!(means.with_tiles(tiles).unwrap_err(), PackError::Mean4(_)));
}

#[test]
fn hostile_tiles_are_refused() {
    let one = |tile| TileCorrection { tile, scale: f16::ONE, codes: [0; TILE] };
    let good = TileCorrections::from_rows(40, TileBits::Eight, &[vec![one(1), one(2)], vec![one(0)]]).unwrap();
    let refused = |edit: &dyn Fn(&mut TileParts)| {
        let mut parts = good.parts().clone();
        edit(&mut parts);
        TileCorrections::new(2, 40, TileBits::Eight, parts).unwrap_err()
    };
    let size = |part, found, expected| PackError::CorrectionSize { part, found, expected };
    // One tile more or less than there are codes and scales for.
    assert_eq!(refused(&|p| p.tilemap = numbers(&[0b110u8, 0b101])), size("tile_codes", 48, 64));
    assert_eq!(refused(&|p| p.tilemap = numbers(&[0b110u8, 0])), size("tile_codes", 48, 32));
    assert_eq!(refused(&|p| p.tilemap = numbers(&[0b110u8])), size("tilemap", 1, 2));
    assert_eq!(refused(&|p| p.tilemap = numbers(&[0b1110u8, 0])), PackError::Tile { row: 0, tile: 3, tiles: 3 });
    assert_eq!(refused(&|p| p.tilemap = numbers(&[0b110u8, 128])), PackError::Tile { row: 1, tile: 7, tiles: 3 });
    assert_eq!(refused(&|p| p.scales = numbers(&[f16::ONE; 2])), size("tile_scales", 4, 6));
    assert_eq!(
        refused(&|p| p.codes = numbers(&[1i8; 48])),
        PackError::TileCode { row: 0, tile: 2, code: 1 },
        "codes past column 40"
    );
    for rows in [usize::MAX, usize::MAX / 2 + 2] {
        assert!(TileCorrections::new(rows, 40, TileBits::Eight, good.parts().clone()).is_err());
        assert!(TileMap::new(rows, usize::MAX, numbers(&[0u8])).is_err());
    }
    let mut odd = vec![0u64; 3];
    bytemuck::cast_slice_mut(&mut odd)[1..7].copy_from_slice(&good.parts().scales);
    let odd = SharedBytes::from_vec(odd).slice(1..7).unwrap();
    assert_eq!(refused(&|p| p.scales = odd.clone()), PackError::Misaligned("tile_scales"));
}

#[test]
fn means_go_with_two_bits_alone() {
    let mut rng = Rng::new(2);
    let none = || vec![vec![], vec![]];
    let three = Layout { bits: Bits::Three, ..TWO };
    assert!(matches!(base(2, 40, three, &mut rng).pack_mean4(&[f16::ONE; 4], &none()), Err(PackError::Mean4(_))));
    let two = base(2, 40, TWO, &mut rng);
    let other = Mean4::new(2, 40, Group::Row, numbers(&[0u8; 2]), numbers(&[f16::ONE; 2])).unwrap();
    assert!(matches!(two.clone().with_mean4(other), Err(PackError::Mean4(_))), "other groups");
    let tiled = two.clone().with_tiles(TileCorrections::from_rows(40, TileBits::Four, &[vec![], vec![]]).unwrap());
    assert!(matches!(tiled.unwrap().pack_mean4(&[f16::ONE; 4], &none()), Err(PackError::Mean4(_))), "beside tiles");
    let size = |found, expected| PackError::CorrectionSize { part: "mean_scales", found, expected };
    assert_eq!(two.clone().pack_mean4(&[f16::ONE; 3], &none()).unwrap_err(), size(6, 8));
    let shape = two.clone().pack_mean4(&[f16::ONE; 6], &[vec![], vec![], vec![]]).unwrap_err();
    assert_eq!(shape, PackError::OtherShape { found: (3, 40), expected: (2, 40) });
    let bad = two.clone().pack_mean4(&[f16::ONE, f16::NAN, f16::ONE, f16::ONE], &none()).unwrap_err();
    assert!(matches!(bad, PackError::CorrectionScale { part: "mean_scales", index: 1, .. }), "{bad}");
    // Columns 32 to 39 are two means of the third tile.
    let last = |means| two.clone().pack_mean4(&[f16::ONE; 4], &[vec![], vec![MeanTile { tile: 2, means }]]);
    assert_eq!(last([1, 1, 1, 0]).unwrap_err(), PackError::TileCode { row: 1, tile: 2, code: 1 });
    assert!(last([1, 1, 0, 0]).is_ok());
    let tile = two.clone().pack_mean4(&[f16::ONE; 4], &[vec![], vec![MeanTile { tile: 3, means: [0; 4] }]]);
    assert_eq!(tile.unwrap_err(), PackError::Tile { row: 1, tile: 3, tiles: 3 });
}
