//! A picture of one linear's weights in several models side by side, and below each what it lost against the first: the
//! way the memory-aligned paper (and BiLLM before it) shows what quantization does to a matrix.
//!
//! The picture is an SVG file that needs nothing beside it. One weight is one pixel of an indexed PNG image inside it, because
//! a rectangle a weight would take a hundred times the bytes.

use crate::error::PipelineError;
use std::fmt::Write as _;
use std::ops::Range;
use tailorq_model::Model;
use tailorq_tensor::{Matrix, Weight};

/// Which weights are drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Outputs; what lies beyond the matrix is left out.
    pub rows: Range<usize>,
    /// Inputs; what lies beyond the matrix is left out.
    pub cols: Range<usize>,
}

/// Side of a panel in the picture's units.
const SIDE: usize = 360;
/// Around and between panels.
const MARGIN: usize = 20;
/// Above a panel, for its words.
const CAPTION: usize = 40;
/// Share of the first panel's weights that the colours span; larger ones have the last colour.
const SPANNED: f64 = 0.995;
/// The colour of 0.
const MIDDLE: u8 = 127;

/// The weights of `layer` (a checkpoint name, with or without `.weight`) in the labelled models, as SVG. The first model is the
/// original that errors are counted from.
///
/// # Errors
/// [`PipelineError::Settings`] when a model lacks the layer or has it in another shape, or the window holds no weight.
pub fn plot_layer(models: &[(&str, &Model)], layer: &str, window: &Window) -> Result<String, PipelineError> {
    let mut panels: Vec<(&str, String, Matrix)> = Vec::new();
    let mut shape = None;
    for &(label, model) in models {
        let weight = linear(model, label, layer)?;
        let found = (weight.rows(), weight.cols());
        let expected = *shape.get_or_insert(found);
        if found != expected {
            let ((a, b), (c, d)) = (found, expected);
            let problem = format!("{layer} is [{a}, {b}] in {label} and [{c}, {d}] in {}: not one model", models[0].0);
            return Err(PipelineError::Settings(problem));
        }
        panels.push((label, weight.reader().encoding(), cut(weight, layer, window)?));
    }
    match &panels[..] {
        [] => Err(PipelineError::Settings("a picture needs at least one model".into())),
        [(_, _, original), ..] => Ok(draw(layer, window, original, &panels)),
    }
}

fn linear<'a>(model: &'a Model, label: &str, layer: &str) -> Result<&'a Weight, PipelineError> {
    let name = layer.strip_suffix(".weight").unwrap_or(layer);
    let mut linears = model.blocks.iter().flat_map(|b| &b.linears);
    linears.find(|l| l.name == name).map(|l| &l.weight).ok_or_else(|| {
        let names = model.blocks.first().map_or(Vec::new(), |b| b.linears.iter().map(|l| l.name.as_str()).collect());
        PipelineError::Settings(format!("{label} has no linear '{name}': names are like {}", names.join(", ")))
    })
}

/// The window of a weight.
fn cut(weight: &Weight, layer: &str, window: &Window) -> Result<Matrix, PipelineError> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let row_range = window.rows.start..window.rows.end.min(rows);
    let col_range = window.cols.start..window.cols.end.min(cols);
    if row_range.is_empty() || col_range.is_empty() {
        return Err(PipelineError::Settings(format!(
            "the window holds no weight of {layer}, which is [{rows}, {cols}]"
        )));
    }
    let mut all = vec![0.0; row_range.len() * cols];
    weight.reader().read_rows(row_range.start, &mut all);
    let data = all.chunks_exact(cols).flat_map(|row| &row[col_range.clone()]).copied().collect();
    Ok(Matrix::from_vec(row_range.len(), col_range.len(), data))
}

fn draw(layer: &str, window: &Window, original: &Matrix, panels: &[(&str, String, Matrix)]) -> String {
    let limit = span(original);
    let height_of = |m: &Matrix| (SIDE * m.rows() / m.cols()).max(1);
    let side = height_of(original).min(4 * SIDE);
    let (step, band) = (SIDE + MARGIN, side + CAPTION + MARGIN);
    let (width, height) = (MARGIN + step * panels.len(), MARGIN + CAPTION + 2 * band);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let (rows, cols) = (original.rows(), original.cols());
    let title = format!(
        "{layer}, outputs {} to {}, inputs {} to {}; colours from {} (blue) to {limit:.4} (red)",
        window.rows.start,
        window.rows.start + rows - 1,
        window.cols.start,
        window.cols.start + cols - 1,
        format_args!("{:.4}", -limit),
    );
    text(&mut svg, (MARGIN, MARGIN + 4), &title, "bold");
    let energy: f64 = original.data().iter().map(|w| f64::from(*w).powi(2)).sum();
    for (i, (label, encoding, values)) in panels.iter().enumerate() {
        let (x, y) = (MARGIN + i * step, MARGIN + CAPTION);
        text(&mut svg, (x, y), label, "bold");
        text(&mut svg, (x, y + 17), encoding, "normal");
        image(&mut svg, (x, y + CAPTION - 16, side), values, limit);
        if i == 0 {
            continue;
        }
        let errors: Vec<f32> = original.data().iter().zip(values.data()).map(|(w, q)| w - q).collect();
        let lost: f64 = errors.iter().map(|e| f64::from(*e).powi(2)).sum();
        let share = if energy > 0.0 { lost / energy } else { 0.0 };
        text(&mut svg, (x, y + band + 12), &format!("its error: {share:.4} of the mean square"), "normal");
        image(&mut svg, (x, y + band + CAPTION - 16, side), &Matrix::from_vec(rows, cols, errors), limit);
    }
    svg.push_str("</svg>\n");
    svg
}

/// The magnitude that all but the largest weights stay below; 1 for a window of zeros.
fn span(values: &Matrix) -> f32 {
    let mut magnitudes: Vec<f32> = values.data().iter().map(|v| v.abs()).collect();
    magnitudes.sort_unstable_by(f32::total_cmp);
    let limit = magnitudes[((magnitudes.len() - 1) as f64 * SPANNED) as usize];
    if limit > 0.0 && limit.is_finite() { limit } else { 1.0 }
}

fn text(svg: &mut String, (x, y): (usize, usize), words: &str, weight: &str) {
    let words = escape(words);
    writeln!(svg, "<text x=\"{x}\" y=\"{y}\" font-weight=\"{weight}\">{words}</text>").expect("a string takes all");
}

/// Text as SVG holds it between tags.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn image(svg: &mut String, (x, y, side): (usize, usize, usize), values: &Matrix, limit: f32) {
    let pixels: Vec<u8> = values
        .data()
        .iter()
        .map(|v| (f32::from(MIDDLE) * (1.0 + (v / limit).clamp(-1.0, 1.0))).round() as u8)
        .collect();
    let png = base64(&indexed_png(values.cols(), &pixels));
    writeln!(
        svg,
        "<image x=\"{x}\" y=\"{y}\" width=\"{SIDE}\" height=\"{side}\" preserveAspectRatio=\"none\" \
         style=\"image-rendering:pixelated\" href=\"data:image/png;base64,{png}\"/>"
    )
    .expect("a string takes all");
}

/// The colour of a pixel value: blue below [`MIDDLE`], white there, red above.
fn colour(index: u8) -> [u8; 3] {
    let t = (f32::from(index) / f32::from(MIDDLE) - 1.0).clamp(-1.0, 1.0);
    let fade = |end: f32| (255.0 + (end - 255.0) * t.abs()).round() as u8;
    if t < 0.0 { [fade(33.0), fade(102.0), fade(172.0)] } else { [fade(178.0), fade(24.0), fade(43.0)] }
}

/// A PNG image of 8-bit indices, rows of `width`, in stored (uncompressed) deflate blocks.
fn indexed_png(width: usize, pixels: &[u8]) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        png.extend((data.len() as u32).to_be_bytes());
        let from = png.len();
        png.extend(kind);
        png.extend(data);
        let sum = crc32(&png[from..]);
        png.extend(sum.to_be_bytes());
    };
    let mut header = (width as u32).to_be_bytes().to_vec();
    header.extend(((pixels.len() / width) as u32).to_be_bytes());
    // 8 bits, indexed, and the only methods of compression, filtering and interlacing that need no more code.
    header.extend([8, 3, 0, 0, 0]);
    chunk(b"IHDR", &header);
    chunk(b"PLTE", &(0..=255).flat_map(colour).collect::<Vec<u8>>());
    // Each row begins with its filter: none.
    let raw: Vec<u8> =
        pixels.chunks_exact(width).flat_map(|row| std::iter::once(0).chain(row.iter().copied())).collect();
    chunk(b"IDAT", &stored_zlib(&raw));
    chunk(b"IEND", &[]);
    png
}

/// A zlib stream (RFC 1950) that holds `raw` as it is.
fn stored_zlib(raw: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x78, 0x01];
    let blocks: Vec<&[u8]> = raw.chunks(usize::from(u16::MAX)).collect();
    for (i, block) in blocks.iter().enumerate() {
        let n = block.len() as u16;
        stream.push(u8::from(i + 1 == blocks.len()));
        stream.extend(n.to_le_bytes());
        stream.extend((!n).to_le_bytes());
        stream.extend(*block);
    }
    let (a, b) = raw.iter().fold((1u32, 0u32), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65521;
        (a, (b + a) % 65521)
    });
    stream.extend((b << 16 | a).to_be_bytes());
    stream
}

/// The checksum of PNG chunks (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let at = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let word = at(0) << 16 | at(1) << 8 | at(2);
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= three.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_model::testing::TinyModel;

    #[test]
    fn sums_and_letters_are_those_of_the_standards() {
        // The check values of the two checksums, and RFC 4648's examples.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(stored_zlib(b"Wikipedia")[2 + 5 + 9..], 0x11e6_0398u32.to_be_bytes());
        let examples =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (plain, coded) in examples {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!((colour(MIDDLE), colour(0), colour(254)), ([255; 3], [33, 102, 172], [178, 24, 43]));
    }

    #[test]
    fn an_image_has_a_pixel_a_weight() {
        // More than one stored block.
        let pixels: Vec<u8> = (0..300 * 256).map(|i| (i % 251) as u8).collect();
        let png = indexed_png(256, &pixels);
        assert_eq!(png[16..24], [[0, 0, 1, 0], [0, 0, 1, 44]].concat());
        let idat = png.windows(4).position(|w| w == b"IDAT").unwrap() + 4;
        let first = u16::from_le_bytes([png[idat + 3], png[idat + 4]]);
        assert_eq!((png[idat + 2], first), (0, u16::MAX), "the first block is not the last");
        assert_eq!(png[idat + 7..idat + 7 + 257], [&[0][..], &pixels[..256]].concat());
    }

    #[test]
    fn models_are_drawn_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        TinyModel::new("llama", 3).unwrap().write_directory(dir.path()).unwrap();
        let model = crate::open(&dir.path().display().to_string()).unwrap().model;
        let layer = model.blocks[0].linears[0].name.clone();
        let window = Window { rows: 0..16, cols: 8..1000 };
        let svg = plot_layer(&[("a < b", &model), ("same", &model)], &layer, &window).unwrap();
        assert_eq!(svg.matches("<image").count(), 3, "two matrices and one error");
        assert!(svg.contains("a &lt; b") && svg.contains("its error: 0.0000") && svg.ends_with("</svg>\n"));
        let with_suffix =
            plot_layer(&[("a < b", &model), ("same", &model)], &format!("{layer}.weight"), &window).unwrap();
        assert_eq!(with_suffix.len(), svg.len() + ".weight".len());
        let refused = plot_layer(&[("a", &model)], "nothing", &window).unwrap_err().to_string();
        assert!(refused.contains(&layer), "{refused}");
        assert!(plot_layer(&[("a", &model)], &layer, &Window { rows: 0..16, cols: 5000..5001 }).is_err());
        assert!(plot_layer(&[], &layer, &window).is_err());
    }
}
