//! What a run did, layer by layer, without times or paths: the same run writes the same report.

use crate::error::PipelineError;
use crate::inspect::inspect;
use crate::recipe::Recipe;
use crate::samples::Samples;
use crate::task::retention::RetentionReport;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use tailorq_eval::CalibrationItems;
use tailorq_model::OpenedModel;
use tailorq_model::arch::{EMBEDDING, HEAD};
use tailorq_quant::QuantizedLayer;
use tailorq_tensor::{CorrectionSpec, Layout, PackedMatrix, PackedSpec, TransformSpec};

/// One quantized matrix of the artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Checkpoint name without `.weight`.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Bits, group, symmetry of a packed matrix.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Element type of a matrix that is stored at 16 bits: `BF16` or `F16`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dtype: Option<String>,
    /// Codes of a packed matrix are places in a codebook.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub codebook: bool,
    /// What is done to the inputs before they meet a packed base.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub transform: Option<TransformSpec>,
    /// What lies beside the base, counted.
    #[serde(flatten, default)]
    pub corrections: CorrectionSpec,
    /// Bytes of all parts in the file: codes, scales, zeros, corrections, or two a weight.
    pub bytes: usize,
    /// The method's own format is not among those that are stored: the file has its values in a larger one.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub simulated: bool,
    /// Of a simulated matrix: bits a weight that the method's own format would take, scales, bitmaps and indices included.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub counted_bits: Option<f64>,
    /// `|W - Q| / |W|`, Frobenius norms.
    pub relative_error: f64,
    /// `tr(E H E^T)` a token, the mean squared error of the layer's output on the calibration set; absent without calibration.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub proxy_loss: Option<f64>,
    /// What the user should know: raised damping, a fallback.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
}

/// What the calibration set was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// Shape of the items.
    pub shape: String,
    /// Whether the chat template rendered them.
    pub chat_template: bool,
    /// Items in the file.
    pub available: usize,
    /// Items used.
    pub used: usize,
    /// Items cut to the sequence length.
    pub shortened: usize,
    /// Tokens used.
    pub tokens: usize,
    /// What each item used is known by: hashes of its sentences, so that an evaluation can refuse it as a test item.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub fingerprints: Vec<String>,
}

/// Bytes and bits of the artifact beside those of its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SizeReport {
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// How the source stores its linears, when that is itself quantized.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source_encoding: Option<String>,
    /// Bytes of the same weights at 16 bit.
    pub half_precision_bytes: u64,
    /// Bytes of the artifact's weight files.
    pub artifact_bytes: u64,
    /// Bits per weight of the quantized linears, scales, zeros and corrections included.
    pub linear_bits_per_weight: f64,
    /// The same with simulated matrices counted as their own format would take; absent when there are none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub counted_bits_per_weight: Option<f64>,
    /// Bits per weight of everything: linears, embedding, head, norms, biases.
    pub total_bits_per_weight: f64,
}

/// `report.json` of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of tailorq.
    pub tailorq: String,
    /// What was asked.
    pub recipe: Recipe,
    /// Calibration as used; absent for methods without.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibration: Option<CalibrationReport>,
    /// Bytes and bits.
    pub size: SizeReport,
    /// The held-out score, where a bar was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub retention: Option<RetentionReport>,
    /// The quantized matrices in file order.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// All notes, each with its layer's name.
    pub fn notes(&self) -> impl Iterator<Item = String> + '_ {
        self.layers.iter().flat_map(LayerReport::named_notes)
    }

    /// By kind of linear (`q_proj`): the squared error of its weights over their own energy, in the mean over blocks.
    pub fn squared_errors(&self) -> BTreeMap<String, f64> {
        let mut sums: BTreeMap<String, (f64, usize)> = BTreeMap::new();
        for layer in self.layers.iter().filter(|l| l.name != EMBEDDING && l.name != HEAD) {
            let kind = layer.name.rsplit('.').next().unwrap_or(&layer.name);
            let (sum, n) = sums.entry(kind.into()).or_default();
            (*sum, *n) = (*sum + layer.relative_error.powi(2), *n + 1);
        }
        sums.into_iter().map(|(kind, (sum, n))| (kind, sum / n as f64)).collect()
    }

    /// Mean relative error of the layers' weights.
    pub fn mean_relative_error(&self) -> f64 {
        self.layers.iter().map(|l| l.relative_error).sum::<f64>() / self.layers.len().max(1) as f64
    }
}

impl LayerReport {
    /// The report of a quantized layer.
    pub(crate) fn of(layer: &QuantizedLayer) -> Self {
        let (reader, packed) = (layer.weight.reader(), layer.weight.packed());
        let (rows, cols) = (reader.rows(), reader.cols());
        LayerReport {
            name: layer.name.clone(),
            rows,
            cols,
            layout: packed.map(PackedMatrix::layout),
            dtype: packed.is_none().then(|| reader.encoding()),
            codebook: packed.is_some_and(|m| m.levels().is_some()),
            transform: packed.and_then(|m| m.spec().transform),
            corrections: packed.map_or_else(CorrectionSpec::default, |m| m.spec().corrections),
            bytes: reader.bytes(),
            simulated: layer.counted_bits.is_some(),
            counted_bits: layer.counted_bits.map(|bits| rounded(bits as f64 / (rows * cols).max(1) as f64)),
            relative_error: rounded(layer.relative_error),
            proxy_loss: layer.proxy_loss.map(rounded),
            notes: layer.notes.iter().map(ToString::to_string).collect(),
        }
    }

    /// What the configuration records of a packed matrix; `None` for one at 16 bits.
    pub fn spec(&self) -> Option<PackedSpec> {
        let &LayerReport { layout, rows, cols, codebook, transform, corrections, .. } = self;
        layout.map(|layout| PackedSpec { layout, rows, cols, codebook, transform, corrections })
    }

    /// The notes, each with the layer's name.
    pub fn named_notes(&self) -> impl Iterator<Item = String> + '_ {
        self.notes.iter().map(|n| format!("{}: {n}", self.name))
    }
}

/// Six significant digits. A part's report is read back from JSON when a run resumes, and a decimal this short comes back
/// as the very number that was written, which one of 17 digits need not.
pub(crate) fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

impl CalibrationReport {
    pub(crate) fn of(samples: &Samples) -> Self {
        CalibrationReport {
            shape: samples.shape.into(),
            chat_template: samples.chat_template,
            available: samples.available,
            used: samples.sequences.len(),
            shortened: samples.shortened,
            tokens: samples.tokens(),
            fingerprints: samples.fingerprints.clone(),
        }
    }
}

/// What an artifact was calibrated on, by the `report.json` beside it; `None` for a model without one, or one made before
/// reports told it.
pub fn calibration_items(opened: &OpenedModel) -> Result<Option<CalibrationItems>, PipelineError> {
    let path = opened.files.path.join("report.json");
    let Ok(bytes) = std::fs::read(&path) else { return Ok(None) };
    let fail = |problem: String| {
        let problem = format!("{problem}: restore it or move it away; without it no calibration item is known");
        PipelineError::Output { path: path.clone(), problem }
    };
    let report: Value = serde_json::from_slice(&bytes).map_err(|e| fail(format!("is no JSON ({e})")))?;
    let Some(fingerprints) = report.pointer("/calibration/fingerprints").and_then(Value::as_array) else {
        return Ok(None);
    };
    let texts: Option<Vec<&str>> = fingerprints.iter().map(Value::as_str).collect();
    let items = texts.and_then(|texts| CalibrationItems::new(&opened.files.source, texts));
    items.map(Some).ok_or_else(|| fail("has fingerprints of calibration items that are none".into()))
}

impl SizeReport {
    pub(crate) fn of(source: &OpenedModel, layers: &[LayerReport], artifact_bytes: u64) -> Self {
        let files = &source.files;
        let source_encoding = files.is_quantized.then(|| files.stored_as.clone());
        let source = inspect(source);
        let in_blocks = |l: &&LayerReport| l.name != EMBEDDING && l.name != HEAD;
        let linear_bytes: usize = layers.iter().filter(in_blocks).map(|l| l.bytes).sum();
        let counted = |l: &LayerReport| l.counted_bits.map_or(8.0 * l.bytes as f64, |b| b * (l.rows * l.cols) as f64);
        let counted_bits: f64 = layers.iter().filter(in_blocks).map(counted).sum();
        let is_simulated = layers.iter().any(|l| l.simulated);
        SizeReport {
            source_bytes: source.file_bytes,
            source_encoding,
            half_precision_bytes: 2 * source.parameters as u64,
            artifact_bytes,
            linear_bits_per_weight: linear_bytes as f64 * 8.0 / source.linears.parameters as f64,
            counted_bits_per_weight: is_simulated.then(|| rounded(counted_bits / source.linears.parameters as f64)),
            total_bits_per_weight: artifact_bytes as f64 * 8.0 / source.parameters as f64,
        }
    }
}
