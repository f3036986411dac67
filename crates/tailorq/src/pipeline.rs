//! The main path: load, calibrate, quantize block by block, write, check.
//!
//! Each step leaves a finished part in the output directory, so that a stopped run goes on with the next one.

use crate::artifact::{retract, write_papers, write_weights};
use crate::blocks::{Run, packed_block, quantize_blocks};
use crate::error::PipelineError;
use crate::estimate::{Estimate, estimate};
use crate::inputs::{QuantizeRequest, announce, refuse_oversized, resolve};
use crate::observer::Observer;
use crate::output::{Output, Part, Prepared, prepare};
use crate::recipe::{QuantizeSettings, Recipe};
use crate::report::{CalibrationReport, LayerReport, Report, SizeReport};
use crate::tables::{half_precision_table, pack_table};
use crate::task::gather_task;
use crate::task::retention::{Gate, RetentionReport, below_bar};
use std::path::Path;
use tailorq_format::TensorSpec;
use tailorq_kernels::Device;
use tailorq_model::arch::{EMBEDDING, HEAD};
use tailorq_model::{Model, OpenedModel};
use tailorq_tensor::SharedBytes;

/// A finished run.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The artifact was written.
    Written(Box<Report>),
    /// `output` already held the artifact of this recipe.
    AlreadyFinished,
}

/// Predicts size, memory and time of a run without writing anything.
pub fn dry_run(
    device: &dyn Device,
    request: &QuantizeRequest,
    observer: &dyn Observer,
) -> Result<(Recipe, Estimate), PipelineError> {
    request.check()?;
    let opened = tailorq_model::open(&request.model)?;
    let (recipe, samples) = resolve(&opened, request, observer)?;
    Gate::open(&opened, request, (&recipe, samples.as_ref()), observer)?;
    let (tokens, longest) = samples.as_ref().map_or((0, 0), |s| (s.tokens(), s.longest()));
    let estimate = estimate(device, &opened.model, &recipe, tokens, longest);
    Ok((recipe, estimate))
}

/// Runs the whole path.
pub fn quantize(
    device: &dyn Device,
    request: &QuantizeRequest,
    observer: &dyn Observer,
) -> Result<Outcome, PipelineError> {
    request.check()?;
    let opened = tailorq_model::open(&request.model)?;
    let (mut recipe, samples) = resolve(&opened, request, observer)?;
    recipe.device = device.signature();
    if let Some(samples) = &samples {
        announce(samples, observer);
        refuse_oversized(&opened, &recipe, samples)?;
    }
    let gate = Gate::open(&opened, request, (&recipe, samples.as_ref()), observer)?;
    let output = match prepare(&request.output, &recipe, request.mode, &opened.files.path)? {
        Prepared::Finished => {
            let finished = check(device, &request.output)?;
            if let Some(gate) = gate {
                let retention = gate.measure(device, &opened, &finished, observer)?;
                announce_retention(&retention, observer);
                if !retention.passes() {
                    return Err(below_bar(&request.output, &retention, "The finished artifact was left as it is."));
                }
            }
            return Ok(Outcome::AlreadyFinished);
        }
        Prepared::Ready(output) => output,
    };
    let mut parts = vec![table_part(device, &output, &recipe.quantize, Table::Embedding, &opened, observer)?];
    // The blocks see what the artifact's embedding will give them.
    let mut model = opened.model.clone();
    model.embedding = parts[0].table(EMBEDDING, model.embedding.rows(), model.embedding.cols())?;
    let run = Run { device, output: &output, recipe: &recipe, samples: samples.as_ref(), observer };
    let task = gather_task(&run, &opened, &model, request)?;
    parts.extend(quantize_blocks(&run, (&opened.model, &model), &task, "block")?);
    if !opened.model.config.tied_head {
        parts.push(table_part(device, &output, &recipe.quantize, Table::Head, &opened, observer)?);
    }
    let retention = match &gate {
        Some(gate) => Some(pass(gate, &run, &opened, &quantized(model, &parts)?)?),
        None => None,
    };
    let report = write(&run, &opened, &parts, retention)?;
    if let Err(error) = check(device, &request.output) {
        retract(&output)?;
        return Err(error);
    }
    output.remove_partial()?;
    Ok(Outcome::Written(Box::new(report)))
}

#[derive(Clone, Copy)]
enum Table {
    Embedding,
    Head,
}

fn table_part(
    device: &dyn Device,
    output: &Output,
    settings: &QuantizeSettings,
    table: Table,
    opened: &OpenedModel,
    observer: &dyn Observer,
) -> Result<Part, PipelineError> {
    let (part, name, weight, bits, layout) = match table {
        Table::Embedding => {
            let (bits, layout) = (settings.embedding_bits, settings.embedding_layout());
            ("embedding", EMBEDDING, &opened.model.embedding, bits, layout)
        }
        Table::Head => ("head", HEAD, &opened.model.head, settings.head_bits, settings.head_layout()),
    };
    if let Some(done) = output.part(part, usize::from(layout.is_some())) {
        return Ok(done);
    }
    observer.stage(&format!("packing the {part} at {bits} bits"), 0);
    match layout {
        Some(layout) => {
            let (matrix, report) = pack_table(device, name, weight, layout)?;
            output.write_part(part, &[matrix.into()], vec![report])
        }
        None => {
            let (dtype, bytes) = half_precision_table(name, weight)?;
            let spec = TensorSpec::new(format!("{name}.weight"), dtype, &[weight.rows(), weight.cols()]);
            output.write_tensors(part, vec![(spec, SharedBytes::from_vec(bytes))], Vec::new())
        }
    }
}

/// The model that the artifact will be, its weights in the parts. `model` has the artifact's embedding already.
fn quantized(mut model: Model, parts: &[Part]) -> Result<Model, PipelineError> {
    for (block, part) in model.blocks.iter_mut().zip(&parts[1..]) {
        *block = packed_block(block, part)?;
    }
    model.head = match parts.get(1 + model.blocks.len()) {
        Some(head) => head.table(HEAD, model.head.rows(), model.head.cols())?,
        None => model.embedding.clone(),
    };
    Ok(model)
}

/// Measures the model before it is written. One that fails leaves no artifact, only parts: nobody takes it for a good one,
/// and a run with a lower bar begins with them.
fn pass(gate: &Gate, run: &Run<'_>, opened: &OpenedModel, model: &Model) -> Result<RetentionReport, PipelineError> {
    let retention = gate.measure(run.device, opened, model, run.observer)?;
    announce_retention(&retention, run.observer);
    if retention.passes() {
        return Ok(retention);
    }
    retract(run.output)?;
    let remains =
        "No artifact was written; its parts are kept, and --resume with a lower --min-retain writes it from them.";
    Err(below_bar(run.output.dir(), &retention, remains))
}

fn announce_retention(retention: &RetentionReport, observer: &dyn Observer) {
    let RetentionReport { share, stderr, min, items, .. } = retention;
    observer.note(&format!(
        "held out: {share:.4} (standard error {stderr:.4}) of the original's score on {items} items; {min} was asked for"
    ));
}

fn write(
    run: &Run<'_>,
    opened: &OpenedModel,
    parts: &[Part],
    retention: Option<RetentionReport>,
) -> Result<Report, PipelineError> {
    let Run { output, recipe, samples, observer, .. } = run;
    observer.stage("writing the artifact", 0);
    let artifact_bytes = write_weights(output, &opened.model, parts)?;
    let layers: Vec<LayerReport> = parts.iter().flat_map(|p| p.layers.iter().cloned()).collect();
    let report = Report {
        tailorq: recipe.tailorq.clone(),
        recipe: (*recipe).clone(),
        calibration: samples.map(CalibrationReport::of),
        size: SizeReport::of(opened, &layers, artifact_bytes),
        retention,
        layers,
    };
    write_papers(output, opened, &report)?;
    Ok(report)
}

/// Opens what was written and lets it say one token: an artifact that cannot is not a success.
fn check(device: &dyn Device, dir: &Path) -> Result<Model, PipelineError> {
    let opened = tailorq_model::open(&dir.to_string_lossy())?;
    let batch = tailorq_model::Batch::new([&[0u32][..]]);
    let logits = opened.model.logits(device, &opened.model.hidden(device, &batch, None));
    if logits.data().iter().all(|l| l.is_finite()) {
        Ok(opened.model)
    } else {
        let problem = "the quantized model's logits are not finite: report this with the recipe".into();
        Err(PipelineError::Output { path: dir.to_path_buf(), problem })
    }
}
