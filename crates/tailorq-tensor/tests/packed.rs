//! The packed matrix: every layout and shape round-trips, and bytes that do not form one are refused.
#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use tailorq_tensor::{
    Bits, Group, Layout, PackError, PackedMatrix, PackedParts, ReadRows, Rng, ScaleBits, SharedBytes,
};

/// Codes, scales and zeros of a matrix.
struct Content {
    codes: Vec<u8>,
    scales: Vec<f16>,
    zeros: Vec<u8>,
}

fn random(rows: usize, cols: usize, layout: Layout, seed: u64) -> Content {
    let mut rng = Rng::new(seed);
    let n_codes = usize::from(layout.bits.max_code()) + 1;
    let n_groups = rows * layout.group.count(cols);
    Content {
        codes: (0..rows * cols).map(|_| rng.below(n_codes) as u8).collect(),
        // Subnormal and zero scales are legal too.
        scales: (0..n_groups).map(|_| scale(&mut rng, layout.scales)).collect(),
        zeros: (0..if layout.symmetric { 0 } else { n_groups }).map(|_| rng.below(n_codes) as u8).collect(),
    }
}

fn scale(rng: &mut Rng, bits: ScaleBits) -> f16 {
    match bits {
        ScaleBits::Eight => ScaleBits::of_byte(rng.below(248) as u8),
        ScaleBits::Sixteen => f16::from_bits(rng.below(0x7c00) as u16),
    }
}

fn pack(rows: usize, cols: usize, layout: Layout, c: &Content) -> PackedMatrix {
    PackedMatrix::pack(rows, cols, layout, &c.codes, &c.scales, &c.zeros).unwrap()
}

fn layouts() -> impl Strategy<Value = Layout> {
    let group =
        prop_oneof![Just(Group::Inputs(32)), Just(Group::Inputs(64)), Just(Group::Inputs(128)), Just(Group::Row)];
    let bits = prop::sample::select(Bits::ALL.to_vec());
    let scales = prop::sample::select(ScaleBits::ALL.to_vec());
    let layout = |(bits, group, symmetric, scales)| Layout { symmetric, scales, ..Layout::new(bits, group) };
    (bits, group, any::<bool>(), scales).prop_map(layout)
}

fn part_bytes(parts: &PackedParts) -> usize {
    let optional = |part: &Option<SharedBytes>| part.as_ref().map_or(0, |p| p.len());
    parts.codes.len() + optional(&parts.codes_high) + parts.scales.len() + optional(&parts.zeros)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn round_trip(layout in layouts(), rows in 0usize..6, cols in 0usize..300, seed in any::<u64>()) {
        let content = random(rows, cols, layout, seed);
        let m = pack(rows, cols, layout, &content);
        prop_assert_eq!((m.rows(), m.cols(), m.layout()), (rows, cols, layout));
        prop_assert_eq!(m.bytes(), part_bytes(m.parts()));
        let n_groups = layout.group.count(cols);
        let group_len = layout.group.len(cols);
        let mut row = vec![f32::NAN; cols];
        for r in 0..rows {
            prop_assert_eq!(m.scales(r), &content.scales[r * n_groups..(r + 1) * n_groups]);
            for g in 0..n_groups {
                let zero = if layout.symmetric { layout.bits.middle() } else { content.zeros[r * n_groups + g] };
                prop_assert_eq!(m.zero(r, g), zero);
            }
            m.unpack_row(r, &mut row);
            for (c, &unpacked) in row.iter().enumerate() {
                let code = content.codes[r * cols + c];
                prop_assert_eq!(m.code(r, c), code);
                let g = c / group_len;
                let exact = (f64::from(code) - f64::from(m.zero(r, g))) * m.scales(r)[g].to_f64();
                prop_assert_eq!(f64::from(m.value(r, c)), exact);
                prop_assert_eq!(m.value(r, c), unpacked);
            }
        }
    }

    /// The parts of one matrix, read back from a copy of their bytes at an offset as in a file, are that matrix again.
    #[test]
    fn parts_reopen(layout in layouts(), rows in 1usize..5, cols in 1usize..200, seed in any::<u64>()) {
        let m = pack(rows, cols, layout, &random(rows, cols, layout, seed));
        let copy = |part: &SharedBytes| {
            // u64 elements align the vector; the part starts at the second of them.
            let mut file = vec![0u64; 1 + part.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut file)[8..8 + part.len()].copy_from_slice(part);
            SharedBytes::from_vec(file).slice(8..8 + part.len()).unwrap()
        };
        let parts = PackedParts {
            codes: copy(&m.parts().codes),
            codes_high: m.parts().codes_high.as_ref().map(copy),
            scales: copy(&m.parts().scales),
            zeros: m.parts().zeros.as_ref().map(copy),
        };
        let again = PackedMatrix::new(rows, cols, layout, parts).unwrap();
        let (mut a, mut b) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
        m.read_rows(0, &mut a);
        again.read_rows(0, &mut b);
        prop_assert_eq!(a, b);
    }

    /// One byte too many or too few in any part is refused and named.
    #[test]
    fn wrong_sizes(layout in layouts(), rows in 1usize..4, cols in 1usize..150, longer in any::<bool>(), which in 0usize..4) {
        let good = pack(rows, cols, layout, &random(rows, cols, layout, 1)).parts().clone();
        let resize = |part: &SharedBytes| {
            let mut bytes = part.to_vec();
            if longer { bytes.push(0) } else { bytes.truncate(bytes.len() - 1) }
            SharedBytes::from_vec(bytes)
        };
        let mut parts = good.clone();
        let name = match which {
            0 => { parts.codes = resize(&good.codes); "codes" }
            1 => match &good.codes_high {
                Some(high) => { parts.codes_high = Some(resize(high)); "codes_high" }
                None => { parts.codes_high = Some(SharedBytes::from_vec(vec![0u16])); "codes_high" }
            },
            2 => { parts.scales = resize(&good.scales); "scales" }
            _ => match &good.zeros {
                Some(zeros) => { parts.zeros = Some(resize(zeros)); "zeros" }
                None => { parts.zeros = Some(SharedBytes::from_vec(vec![0u8])); "zeros" }
            },
        };
        match PackedMatrix::new(rows, cols, layout, parts) {
            Err(PackError::Size { part, .. }) => prop_assert_eq!(part, name),
            other => prop_assert!(false, "expected a size error for {}, got {:?}", name, other),
        }
    }
}

const THREE: Layout = Layout::new(Bits::Three, Group::Inputs(32));

#[test]
fn known_bytes() {
    // Two tiles, the second of one weight: code i at bits 2i, high bits in the u16 plane, zeros as a stream of 3 bits.
    let codes = [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 7, 5];
    let m = PackedMatrix::pack(1, 17, THREE, &codes, &[f16::from_f32(0.5)], &[6]).unwrap();
    assert_eq!(m.code_words(0), [0b11_00_00_00_00_00_00_00_11_10_01_00_11_10_01_00, 0b01]);
    assert_eq!(m.code_highs(0), [0b1000_0000_1111_0000, 0b1]);
    assert_eq!(m.parts().zeros.as_deref(), Some(&[6u8][..]));
    assert_eq!(m.bytes(), 8 + 4 + 2 + 1);
    assert_eq!(m.value(0, 0), -3.0);
    assert_eq!(m.value(0, 16), -0.5);
}

#[test]
fn known_bytes_of_six_bits() {
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Six, Group::Row) };
    let codes: Vec<u8> = (0..17).map(|i| [63, 16, 35][i % 3]).collect();
    let m = PackedMatrix::pack(1, 17, layout, &codes, &[f16::from_f32(0.5)], &[]).unwrap();
    // Low four bits f, 0, 3 and high two bits 3, 1, 2 in turn.
    assert_eq!(m.code_words(0), [0x0f30_f30f, 0xf30f_30f3, 0, 0]);
    assert_eq!(m.code_high_words(0), [0b11_100111_100111_100111_100111_100111, 0b01]);
    assert_eq!((m.bytes(), m.code_highs(0).len()), (16 + 8 + 2, 0));
    assert_eq!((m.value(0, 0), m.value(0, 16)), (15.5, -8.0));
}

#[test]
fn a_codebook_is_looked_up_and_scaled() {
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Inputs(32)) };
    let plain =
        PackedMatrix::pack(1, 33, layout, &[[3; 32].as_slice(), &[1]].concat(), &[f16::ONE, f16::from_f32(4.0)], &[]);
    let levels = |v: [f32; 4]| SharedBytes::from_vec(v.map(f16::from_f32).to_vec());
    let m = plain.unwrap().with_levels(levels([-1.5, -0.25, -0.25, 2.0])).unwrap();
    assert_eq!((m.value(0, 31), m.base_value(0, 32), m.bytes()), (2.0, -1.0, 12 + 4 + 8));
    let mut row = [0.0; 33];
    m.unpack_row(0, &mut row);
    assert_eq!((row[0], row[32]), (2.0, -1.0));
    assert_eq!(m.spec().to_string(), "2-bit codebook, group 32");
    let stacked = PackedMatrix::stack(&[m.clone(), m.clone()]);
    assert_eq!((stacked.value(1, 32), stacked.levels()), (-1.0, m.levels()));
    for bad in [[0.0, f32::NAN, 1.0, 2.0], [0.0, 1.0, 0.5, 2.0]] {
        assert!(matches!(m.clone().with_levels(levels(bad)), Err(PackError::Levels(_))));
    }
    let short = SharedBytes::from_vec(vec![f16::ONE; 3]);
    assert!(matches!(m.with_levels(short), Err(PackError::CorrectionSize { part: "levels", .. })));
}

#[test]
fn missing_parts() {
    let good = pack(2, 40, THREE, &random(2, 40, THREE, 3)).parts().clone();
    let no_high = PackedParts { codes_high: None, ..good.clone() };
    assert!(matches!(PackedMatrix::new(2, 40, THREE, no_high), Err(PackError::Size { part: "codes_high", .. })));
    let no_zeros = PackedParts { zeros: None, ..good };
    assert!(matches!(PackedMatrix::new(2, 40, THREE, no_zeros), Err(PackError::Size { part: "zeros", .. })));
}

#[test]
fn misaligned_parts() {
    let good = pack(2, 40, THREE, &random(2, 40, THREE, 4)).parts().clone();
    let shift = |part: &SharedBytes| {
        let mut bytes = vec![0u64; 2 + part.len() / 8];
        bytemuck::cast_slice_mut(&mut bytes)[1..1 + part.len()].copy_from_slice(part);
        SharedBytes::from_vec(bytes).slice(1..1 + part.len()).unwrap()
    };
    let cases = [
        ("codes", PackedParts { codes: shift(&good.codes), ..good.clone() }),
        ("codes_high", PackedParts { codes_high: good.codes_high.as_ref().map(shift), ..good.clone() }),
        ("scales", PackedParts { scales: shift(&good.scales), ..good.clone() }),
    ];
    for (name, parts) in cases {
        assert_eq!(PackedMatrix::new(2, 40, THREE, parts).unwrap_err(), PackError::Misaligned(name));
    }
    // Zeros are bytes: any address will do.
    let parts = PackedParts { zeros: good.zeros.as_ref().map(shift), ..good };
    assert!(PackedMatrix::new(2, 40, THREE, parts).is_ok());
}

#[test]
fn bad_scales() {
    let content = random(3, 64, THREE, 5);
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY, f16::from_f32(-1.0)] {
        let mut scales = content.scales.clone();
        scales[4] = bad;
        let error = PackedMatrix::pack(3, 64, THREE, &content.codes, &scales, &content.zeros).unwrap_err();
        assert!(matches!(error, PackError::Scale { index: 4, .. }), "{bad}: {error}");
    }
}

#[test]
fn known_bytes_of_eight_bit_scales() {
    let layout = Layout { scales: ScaleBits::Eight, ..Layout::new(Bits::Two, Group::Inputs(32)) };
    // 2^-2 (1 + 3 / 8): exponent 13, fraction 3; and the smallest.
    let scales = [f16::from_f32(0.34375), f16::from_f32(2f32.powi(-17))];
    let m = PackedMatrix::pack(1, 33, layout, &[3; 33], &scales, &[1, 0]).unwrap();
    assert_eq!(&m.parts().scales[..], [0x6b, 1]);
    assert_eq!((m.value(0, 0), m.value(0, 32), m.bytes()), (0.6875, 3.0 * 2f32.powi(-17), 12 + 2 + 1));
    assert_eq!(m.spec().to_string(), "2-bit affine, group 32, 8-bit scales");
    let stacked = PackedMatrix::stack(&[m.clone(), m.clone()]);
    assert_eq!((stacked.scales(1), stacked.value(1, 32)), (m.scales(0), m.value(0, 32)));
    // One place too fine, too large, negative.
    for bad in [0.359375, f32::INFINITY, -0.25] {
        let error = PackedMatrix::pack(1, 33, layout, &[3; 33], &[f16::ZERO, f16::from_f32(bad)], &[1, 0]);
        assert!(matches!(error, Err(PackError::ScaleByte { index: 1, .. })), "{bad}: {error:?}");
    }
    // Bytes lie anywhere.
    let shifted = SharedBytes::from_vec(vec![0u8, 0x6b, 1]).slice(1..3).unwrap();
    let parts = PackedParts { scales: shifted, ..m.parts().clone() };
    assert_eq!(PackedMatrix::new(1, 33, layout, parts).unwrap().scales(0), m.scales(0));
    for bad in [248u8, 252, 255] {
        let parts = PackedParts { scales: SharedBytes::from_vec(vec![7, bad]), ..m.parts().clone() };
        let error = PackedMatrix::new(1, 33, layout, parts);
        assert!(matches!(error, Err(PackError::Scale { index: 1, .. })), "{bad}: {error:?}");
    }
}

#[test]
fn absurd_shapes() {
    let empty = || SharedBytes::from_vec(Vec::<u64>::new());
    let parts = || PackedParts { codes: empty(), codes_high: Some(empty()), scales: empty(), zeros: Some(empty()) };
    let shapes = [(usize::MAX, 2), (2, usize::MAX), (usize::MAX, usize::MAX), (1 << 40, 1 << 40)];
    for (rows, cols) in shapes {
        let error = PackedMatrix::new(rows, cols, THREE, parts()).unwrap_err();
        assert_eq!(error, PackError::TooLarge(rows, cols));
    }
}
