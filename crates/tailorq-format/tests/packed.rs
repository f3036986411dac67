//! Packed matrices survive a file, and a file that does not match its layout is refused.
#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use std::path::Path;
use tailorq_format::{
    SafetensorsWriter, StoredType, TensorSet, TensorSpec, format_version, packed_specs, packed_tensors, read_packed,
};
use tailorq_tensor::{
    Bits, CorrectionSpec, ElementCorrections, Group, InputTransform, Layout, MeanTile, PackedMatrix, PackedSpec,
    ReadRows, Rng, ScaleBits, SharedBytes, TILE, TileBits, TileCorrection, TileCorrections, TileSpec,
};

fn random(rows: usize, cols: usize, layout: Layout, seed: u64) -> PackedMatrix {
    let mut rng = Rng::new(seed);
    let levels = usize::from(layout.bits.max_code()) + 1;
    let groups = rows * layout.group.count(cols);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(levels) as u8).collect();
    let scale = |rng: &mut Rng| match layout.scales {
        ScaleBits::Eight => ScaleBits::of_byte(rng.below(248) as u8),
        ScaleBits::Sixteen => f16::from_f64(rng.uniform()),
    };
    let scales: Vec<f16> = (0..groups).map(|_| scale(&mut rng)).collect();
    let n_zeros = if layout.symmetric { 0 } else { groups };
    let zeros: Vec<u8> = (0..n_zeros).map(|_| rng.below(levels) as u8).collect();
    PackedMatrix::pack(rows, cols, layout, &codes, &scales, &zeros).unwrap()
}

/// Corrections of a fifth of the elements, in some rows none.
fn elements(rows: usize, cols: usize, seed: u64) -> ElementCorrections {
    let mut rng = Rng::new(seed);
    let mut row = |r: usize| {
        let share = 0.3 * (r % 3) as f64;
        let chosen: Vec<usize> = (0..cols).filter(|_| rng.uniform() < share).collect();
        chosen.into_iter().map(|c| (c, f16::from_f32(rng.normal()))).collect()
    };
    let all: Vec<Vec<_>> = (0..rows).map(&mut row).collect();
    ElementCorrections::from_rows(cols, &all).unwrap()
}

/// Everything that may lie beside a base, alone and together.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Beside {
    Nothing,
    Elements,
    Tiles(TileBits),
    TilesAndElements,
    Means,
    MeansAndElements,
    Rotated,
    RotatedAndElements,
    Codebook,
    CodebookRotatedAndElements,
}

impl Beside {
    const ALL: [Beside; 11] = [
        Beside::Nothing,
        Beside::Elements,
        Beside::Tiles(TileBits::Four),
        Beside::Tiles(TileBits::Eight),
        Beside::TilesAndElements,
        Beside::Means,
        Beside::MeansAndElements,
        Beside::Rotated,
        Beside::RotatedAndElements,
        Beside::Codebook,
        Beside::CodebookRotatedAndElements,
    ];

    /// Means need two bits; another matrix goes without them.
    fn add_to(self, matrix: PackedMatrix, seed: u64) -> PackedMatrix {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let with_elements = |m: PackedMatrix| m.with_elements(elements(rows, cols, seed)).unwrap();
        let rotated = |m: PackedMatrix| m.with_transform(InputTransform::hadamard(cols, seed).unwrap()).unwrap();
        let codebook = |m: PackedMatrix| match m.layout().has_codebooks() {
            true => m.clone().with_levels(levels(m.layout().bits)).unwrap(),
            false => m,
        };
        match self {
            Beside::Nothing => matrix,
            Beside::Codebook => codebook(matrix),
            Beside::CodebookRotatedAndElements => with_elements(rotated(codebook(matrix))),
            Beside::Rotated => rotated(matrix),
            Beside::RotatedAndElements => with_elements(rotated(matrix)),
            Beside::Elements => with_elements(matrix),
            Beside::Tiles(bits) => matrix.with_tiles(tiles(rows, cols, bits, seed)).unwrap(),
            Beside::TilesAndElements => {
                with_elements(matrix.with_tiles(tiles(rows, cols, TileBits::Eight, seed)).unwrap())
            }
            Beside::Means if matrix.layout().bits == Bits::Two => means(matrix, seed),
            Beside::MeansAndElements if matrix.layout().bits == Bits::Two => with_elements(means(matrix, seed)),
            Beside::Means | Beside::MeansAndElements => matrix,
        }
    }
}

/// Levels that are no multiples of anything.
fn levels(bits: Bits) -> SharedBytes {
    let n = 1 << bits.count();
    SharedBytes::from_vec((0..n).map(|i| f16::from_f32((i as f32 - 1.3).powi(3) * 0.1)).collect::<Vec<_>>())
}

/// The tiles of each row that are marked: in turn some, none and all.
fn marked(rows: usize, cols: usize, rng: &mut Rng) -> Vec<Vec<usize>> {
    let share = [0.3, 0.0, 1.0];
    (0..rows).map(|r| (0..cols.div_ceil(TILE)).filter(|_| rng.uniform() < share[r % 3]).collect()).collect()
}

fn tiles(rows: usize, cols: usize, bits: TileBits, seed: u64) -> TileCorrections {
    let mut rng = Rng::new(seed);
    let chosen = marked(rows, cols, &mut rng);
    let mut one = |tile: usize| {
        let mut codes = [0; TILE];
        codes[..TILE.min(cols - tile * TILE)].fill_with(|| rng.below(16) as i8 - 8);
        TileCorrection { tile, scale: f16::from_f64(rng.uniform()), codes }
    };
    let all: Vec<Vec<_>> = chosen.into_iter().map(|row| row.into_iter().map(&mut one).collect()).collect();
    TileCorrections::from_rows(cols, bits, &all).unwrap()
}

fn means(matrix: PackedMatrix, seed: u64) -> PackedMatrix {
    let (cols, mut rng) = (matrix.cols(), Rng::new(seed));
    let chosen = marked(matrix.rows(), cols, &mut rng);
    let n = matrix.rows() * matrix.layout().group.count(cols);
    let scales: Vec<f16> = (0..n).map(|_| f16::from_f64(rng.uniform())).collect();
    let mut one = |tile: usize| {
        let mut means = [0; 4];
        means[..TILE.min(cols - tile * TILE).div_ceil(4)].fill_with(|| rng.below(256) as u8 as i8);
        MeanTile { tile, means }
    };
    let all: Vec<Vec<_>> = chosen.into_iter().map(|row| row.into_iter().map(&mut one).collect()).collect();
    matrix.pack_mean4(&scales, &all).unwrap()
}

fn all_values(matrix: &PackedMatrix) -> Vec<f32> {
    let mut all = vec![f32::NAN; matrix.rows() * matrix.cols()];
    matrix.read_rows(0, &mut all);
    all
}

/// Writes tensors to `model.safetensors` in `dir`.
fn write(dir: &Path, tensors: &[(TensorSpec, Vec<u8>)]) -> TensorSet {
    let specs: Vec<_> = tensors.iter().map(|(s, _)| s.clone()).collect();
    let mut w = SafetensorsWriter::create(&dir.join("model.safetensors"), &specs, &[]).unwrap();
    for (spec, bytes) in tensors {
        w.write(&spec.name, bytes).unwrap();
    }
    w.commit().unwrap();
    TensorSet::open_dir(dir).unwrap()
}

fn tensors(matrix: &PackedMatrix) -> Vec<(TensorSpec, Vec<u8>)> {
    packed_tensors("w", matrix).into_iter().map(|(s, b)| (s, b.to_vec())).collect()
}

fn layouts() -> Vec<Layout> {
    let groups = [Group::Inputs(32), Group::Inputs(64), Group::Inputs(128), Group::Row];
    let mut all = Vec::new();
    for bits in Bits::ALL {
        for (group, scales) in groups.into_iter().flat_map(|g| ScaleBits::ALL.map(|s| (g, s))) {
            all.extend([true, false].map(|symmetric| Layout { symmetric, scales, ..Layout::new(bits, group) }));
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_layout_survives_a_file(
        layout in prop::sample::select(layouts()), rows in 0usize..6, cols in 1usize..300,
        beside in prop::sample::select(Beside::ALL.to_vec()), seed: u64,
    ) {
        let matrix = beside.add_to(random(rows, cols, layout, seed), seed);
        let spec = matrix.spec();
        let specs = packed_specs("w", &spec);
        prop_assert_eq!(specs.iter().map(|s| s.bytes().unwrap()).sum::<usize>(), matrix.bytes());
        let has_third = spec.transform.is_some() || spec.codebook || layout.bits == Bits::Six;
        let version = match layout.scales {
            ScaleBits::Eight => 4,
            _ if has_third => 3,
            _ => 1 + u32::from(!spec.corrections.is_none()),
        };
        prop_assert_eq!(format_version([&spec]), version);
        let plain = PackedSpec::base(1, 1, Layout::new(Bits::Two, layout.group));
        prop_assert_eq!(format_version([&spec, &plain]), version);
        let json = serde_json::to_string(&spec).unwrap();
        prop_assert_eq!(serde_json::from_str::<PackedSpec>(&json).unwrap(), spec);
        let dir = tempfile::tempdir().unwrap();
        let set = write(dir.path(), &tensors(&matrix));
        let read = read_packed(&set, "w", &spec).unwrap();
        prop_assert_eq!(read.spec(), spec);
        prop_assert_eq!(all_values(&read), all_values(&matrix));
        // The parts lie in the map where the file has them.
        for (spec, part) in packed_tensors("w", &read) {
            prop_assert!(part.is_empty() || (part.as_ptr() as usize).is_multiple_of(64), "{}", spec.name);
        }
    }
}

#[test]
fn scales_of_another_width_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let half = Layout::new(Bits::Two, Group::Inputs(32));
    let byte = Layout { scales: ScaleBits::Eight, ..half };
    let message = |matrix: &PackedMatrix, layout| {
        let set = write(dir.path(), &tensors(matrix));
        read_packed(&set, "w", &PackedSpec::base(2, 40, layout)).unwrap_err().to_string()
    };
    for (stored, read) in [(half, byte), (byte, half)] {
        let text = message(&random(2, 40, stored, 1), read);
        assert!(text.contains("'w.scales'") && text.contains(dir.path().to_str().unwrap()), "{text}");
    }
    // Bytes past the largest finite scale are damage.
    let mut any = tensors(&random(2, 40, byte, 1));
    let at = any.iter().position(|(s, _)| s.name == "w.scales").unwrap();
    for (value, is_scale) in [(0, true), (1, true), (0x80, true), (247, true), (248, false), (255, false)] {
        any[at].1[3] = value;
        match read_packed(&write(dir.path(), &any), "w", &PackedSpec::base(2, 40, byte)) {
            Ok(read) => assert!(is_scale && all_values(&read).iter().all(|v| v.is_finite()), "{value}"),
            Err(e) => assert!(!is_scale && e.to_string().contains("scale 3 is"), "{value}: {e}"),
        }
    }
    let spec = |bits: &str| {
        let text = format!(
            "{{\"bits\": 2, \"group\": 32, \"symmetric\": false, \"scale_bits\": {bits}, \"rows\": 2, \"cols\": 40}}"
        );
        serde_json::from_str::<PackedSpec>(&text)
    };
    assert_eq!(spec("8").unwrap(), PackedSpec::base(2, 40, byte));
    assert_eq!(spec("16").unwrap(), PackedSpec::base(2, 40, half));
    for bad in ["4", "0", "-8", "\"8\"", "null"] {
        assert!(spec(bad).is_err(), "{bad}");
    }
    // Readers of earlier versions find nothing that they do not know where all scales have 16 bits.
    assert!(!serde_json::to_string(&PackedSpec::base(2, 40, half)).unwrap().contains("scale_bits"));
}

#[test]
fn transforms_that_no_matrix_has_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Inputs(32)) };
    let set = write(dir.path(), &tensors(&random(2, 40, layout, 1)));
    let spec = |transform: &str| {
        let text = format!(
            "{{\"bits\": 2, \"group\": 32, \"symmetric\": true, \"rows\": 2, \"cols\": 40, \"transform\": {transform}}}"
        );
        serde_json::from_str::<PackedSpec>(&text)
    };
    let good = spec("{\"kind\": \"hadamard\", \"seed\": 18446744073709551615, \"block\": 8}").unwrap();
    assert_eq!(read_packed(&set, "w", &good).unwrap().spec(), good);
    for block in ["0", "3", "64", "18446744073709551615"] {
        let bad = spec(&format!("{{\"kind\": \"hadamard\", \"seed\": 1, \"block\": {block}}}")).unwrap();
        let text = read_packed(&set, "w", &bad).unwrap_err().to_string();
        assert!(text.contains("transform") && text.contains(dir.path().to_str().unwrap()), "{text}");
    }
    for bad in [
        "{\"kind\": \"cosine\", \"seed\": 1, \"block\": 8}",
        "{\"kind\": \"hadamard\", \"seed\": -1, \"block\": 8}",
        "{\"kind\": \"hadamard\", \"seed\": 1, \"block\": 8, \"more\": 1}",
        "{\"kind\": \"hadamard\", \"block\": 8}",
    ] {
        assert!(spec(bad).is_err(), "{bad}");
    }
    // No rows have no codes whose size would tell a width that is only claimed.
    let wide = "{\"bits\": 2, \"group\": \"row\", \"symmetric\": true, \"rows\": 0, \"cols\": 4611686018427387904, \
                \"transform\": {\"kind\": \"hadamard\", \"seed\": 1, \"block\": 1}}";
    assert!(read_packed(&set, "w", &serde_json::from_str(wide).unwrap()).is_err());
}

#[test]
fn codebooks_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Row) };
    let matrix = random(2, 40, layout, 1).with_levels(levels(Bits::Two)).unwrap();
    let (good, spec) = (tensors(&matrix), matrix.spec());
    let at = good.iter().position(|t| t.0.name == "w.levels").unwrap();
    let message = |good: &[(TensorSpec, Vec<u8>)], spec: &PackedSpec| {
        read_packed(&write(dir.path(), good), "w", spec).unwrap_err().to_string()
    };
    for bad in [[0.0, f32::NAN, 1.0, 2.0], [0.0, 1.0, 2.0, f32::INFINITY], [0.0, 2.0, 1.0, 3.0]] {
        let mut wrong = good.clone();
        wrong[at].1 = bad.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let text = message(&wrong, &spec);
        assert!(text.contains("levels") && text.contains(dir.path().to_str().unwrap()), "{text}");
    }
    let mut less = good.clone();
    less.remove(at);
    assert!(message(&less, &spec).contains("'w.levels' is missing"));
    assert!(message(&good, &PackedSpec { codebook: false, ..spec }).contains("'w.levels' is there"));
    let mut short = good.clone();
    short[at] = (TensorSpec::new("w.levels".to_string(), StoredType::F16, &[3]), vec![0; 6]);
    assert!(message(&short, &spec).contains("'w.levels'"));
    // Zeros and codebooks do not go together, nor do codebooks and wide codes.
    for layout in [Layout { symmetric: false, ..layout }, Layout { bits: Bits::Eight, ..layout }] {
        assert!(random(2, 40, layout, 1).with_levels(levels(layout.bits)).is_err());
    }
}

#[test]
fn mismatches_name_file_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(Bits::Three, Group::Inputs(32));
    let good = tensors(&random(2, 40, layout, 1));
    let message = |set: &TensorSet, rows, cols, layout| {
        let message = read_packed(set, "w", &PackedSpec::base(rows, cols, layout)).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        message
    };
    let set = write(dir.path(), &good);
    assert!(read_packed(&set, "w", &PackedSpec::base(2, 40, layout)).is_ok());
    for (rows, cols) in [(3, 40), (2, 64), (2, usize::MAX), (usize::MAX, 40), (0, 0)] {
        let text = message(&set, rows, cols, layout);
        assert!(text.contains("'w.codes'") && text.contains("config.json") || text.contains("expected"), "{text}");
    }
    let text = message(&set, 2, 40, Layout { bits: Bits::Two, ..layout });
    assert!(text.contains("'w.codes_high'"), "{text}");
    let text = message(&set, 2, 40, Layout { symmetric: true, ..layout });
    assert!(text.contains("'w.zeros'"), "{text}");
    for (i, (spec, _)) in good.iter().enumerate() {
        let mut less = good.clone();
        less.remove(i);
        let text = message(&write(dir.path(), &less), 2, 40, layout);
        assert!(text.contains(&format!("'{}' is missing", spec.name)), "{text}");
    }
    let mut retyped = good.clone();
    retyped[0].0.dtype = StoredType::I32;
    let text = message(&write(dir.path(), &retyped), 2, 40, layout);
    assert!(text.contains("'w.codes'") && text.contains("I32"), "{text}");
    for bad in [f16::NAN, f16::INFINITY, f16::from_f32(-1.0)] {
        let mut scaled = good.clone();
        let at = scaled.iter().position(|(s, _)| s.name == "w.scales").unwrap();
        scaled[at].1[2..4].copy_from_slice(&bad.to_le_bytes());
        let text = message(&write(dir.path(), &scaled), 2, 40, layout);
        assert!(text.contains("'w'") && text.contains("scale 1 is"), "{text}");
    }
}

#[test]
fn corrections_that_the_configuration_does_not_describe_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Inputs(32)) };
    let matrix = random(3, 40, layout, 1).with_elements(elements(3, 40, 2)).unwrap();
    let (spec, good) = (matrix.spec(), tensors(&matrix));
    let n = spec.corrections.elements.unwrap();
    let message = |set: &TensorSet, spec: &PackedSpec| {
        let message = read_packed(set, "w", spec).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        message
    };
    let set = write(dir.path(), &good);
    assert_eq!(all_values(&read_packed(&set, "w", &spec).unwrap()), all_values(&matrix));
    let text = message(&set, &PackedSpec::base(3, 40, layout));
    assert!(text.contains("'w.element_counts' is there") && text.contains("quantize again"), "{text}");
    for wrong in [0, n - 1, n + 1, usize::MAX] {
        let text = message(
            &set,
            &PackedSpec { corrections: CorrectionSpec { elements: Some(wrong), ..spec.corrections }, ..spec },
        );
        assert!(text.contains("'w.element_cols'") && text.contains("expected"), "{text}");
    }
    for part in ["element_counts", "element_cols", "element_values"] {
        let less: Vec<_> = good.iter().filter(|(s, _)| s.name != format!("w.{part}")).cloned().collect();
        let text = message(&write(dir.path(), &less), &spec);
        assert!(text.contains(&format!("'w.{part}' is missing")), "{text}");
    }
    let damage = |part: &str, at: usize, bytes: [u8; 2]| {
        let mut damaged = good.clone();
        let tensor = damaged.iter_mut().find(|(s, _)| s.name == format!("w.{part}")).unwrap();
        tensor.1[at..at + 2].copy_from_slice(&bytes);
        message(&write(dir.path(), &damaged), &spec)
    };
    for (part, at, bytes, expected) in [
        ("element_counts", 0, 9u16.to_le_bytes(), "ask for"),
        ("element_cols", 2, 40u16.to_le_bytes(), "column 40"),
        ("element_cols", 2, 0u16.to_le_bytes(), "column 0"),
        ("element_values", 2, f16::NAN.to_le_bytes(), "NaN"),
    ] {
        let text = damage(part, at, bytes);
        assert!(text.contains("'w'") && text.contains(expected) && text.contains("damaged"), "{text}");
    }
}

#[test]
fn a_wide_matrix_survives_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (cols, layout) = (65_600, Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Row) });
    let rows = [vec![(1, f16::ONE), (65_599, f16::from_f32(-2.0))], vec![(65_536, f16::ONE)]];
    let elements = ElementCorrections::from_rows(cols, &rows).unwrap();
    let matrix = random(2, cols, layout, 1).with_elements(elements).unwrap();
    let set = write(dir.path(), &tensors(&matrix));
    assert_eq!(set.get("w.element_cols").unwrap().dtype, StoredType::U32);
    assert_eq!(all_values(&read_packed(&set, "w", &matrix.spec()).unwrap()), all_values(&matrix));
}

#[test]
fn tiles_that_the_configuration_does_not_describe_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Inputs(32)) };
    let message = |good: &[(TensorSpec, Vec<u8>)], spec: &PackedSpec| {
        let message = read_packed(&write(dir.path(), good), "w", spec).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        message
    };
    let matrices = [
        Beside::Tiles(TileBits::Four).add_to(random(3, 40, layout, 1), 2),
        Beside::Tiles(TileBits::Eight).add_to(random(3, 40, layout, 1), 2),
        Beside::Means.add_to(random(3, 40, layout, 1), 2),
    ];
    for matrix in matrices {
        let (spec, good) = (matrix.spec(), tensors(&matrix));
        let text = message(&good, &PackedSpec::base(3, 40, layout));
        assert!(text.contains("'w.tilemap' is there"), "{text}");
        for part in good.iter().map(|(s, _)| s.name.clone()) {
            let less: Vec<_> = good.iter().filter(|(s, _)| s.name != part).cloned().collect();
            let text = message(&less, &spec);
            assert!(text.contains(&format!("'{part}' is missing")), "{text}");
        }
        let with = |corrections| PackedSpec { corrections, ..spec };
        let announced = spec.corrections;
        if let Some(TileSpec { bits, count }) = announced.tiles {
            let wider = if bits == TileBits::Four { TileBits::Eight } else { TileBits::Four };
            for tiles in [TileSpec { bits, count: count + 1 }, TileSpec { bits: wider, count }] {
                let text = message(&good, &with(CorrectionSpec { tiles: Some(tiles), ..announced }));
                assert!(text.contains("'w.tile_codes'"), "{text}");
            }
            let text = message(&good, &with(CorrectionSpec { mean4: Some(1), ..announced }));
            assert!(text.contains("'w.mean_scales' is missing"), "{text}");
        } else {
            let one_more = CorrectionSpec { mean4: announced.mean4.map(|n| n + 1), ..announced };
            let text = message(&good, &with(one_more));
            assert!(text.contains("the configuration announces"), "{text}");
            let text = message(&good, &PackedSpec { layout: Layout { bits: Bits::Four, ..layout }, ..spec });
            assert!(text.contains("'w.codes'"), "{text}");
        }
        // A bit beyond the last tile, then one too few.
        for (map, expected) in [([0b1000, 0, 0b111], "tile 3"), ([0, 0, 0b011], "announces|ask for")] {
            let mut damaged = good.clone();
            damaged.iter_mut().find(|(s, _)| s.name == "w.tilemap").unwrap().1 = map.to_vec();
            let text = message(&damaged, &spec);
            assert!(text.contains("'w'") && expected.split('|').any(|e| text.contains(e)), "{text}");
        }
        let mut damaged = good.clone();
        let scales = damaged.iter_mut().find(|(s, _)| s.name.ends_with("e_scales") || s.name.ends_with("mean_scales"));
        scales.unwrap().1[2..4].copy_from_slice(&f16::INFINITY.to_le_bytes());
        let text = message(&damaged, &spec);
        assert!(text.contains("_scales: scale 1 is inf"), "{text}");
    }
}
