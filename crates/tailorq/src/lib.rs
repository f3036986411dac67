//! tailorq as a library: from a checkpoint, calibration text and settings to a quantized artifact.
//!
//! Start at [`pipeline`]: it is the main path, top to bottom.

mod artifact;
mod blocks;
pub mod compare;
pub mod demo;
mod devices;
mod error;
mod estimate;
mod held_out;
mod inputs;
mod inspect;
mod names;
mod observer;
mod output;
pub mod pipeline;
mod plot;
mod presets;
mod probe;
mod recipe;
mod report;
mod samples;
mod spill;
mod tables;
mod task;
mod threads;

pub use devices::{DeviceChoice, OpenedDevice, open_decoders, open_device};
pub use error::PipelineError;
pub use estimate::{Estimate, available_memory};
pub use inputs::{CalibrationRequest, QuantizeRequest, model_sha256};
pub use inspect::{Inspection, Share, StoredMatrix, inspect};
pub use observer::{Observer, Silent};
pub use output::OutputMode;
pub use pipeline::{Outcome, dry_run, quantize};
pub use plot::{Window, plot_layer};
pub use presets::{Method, PRESETS, Preset};
pub use probe::{GradientOutput, GradientProbe, ProbeError, check_tokens, probe, probe_gradients};
pub use recipe::{CalibrationInput, LossKind, ModelInput, PlanInput, QuantizeSettings, Recipe, hash_files};
pub use report::{CalibrationReport, LayerReport, Report, SizeReport, calibration_items};
pub use spill::SpillFile;
pub use tailorq_cuda::{CudaError, CudaOptions, Precision};
pub use tailorq_kernels::{Activations, Device, cpu, cpu_with, reference};
pub use tailorq_model::{
    ChatMessage, ChatTemplate, Decoders, Model, ModelError, ModelFiles, OpenedModel, Tokenizer, open,
};
pub use tailorq_quant::quantize::{Saliency, Salient, Scope, Unit};
pub use tailorq_quant::survey::Needs;
pub use tailorq_quant::{AlignedSettings, CircuitSignal, Clip, GridKind, TokenWeight, TransformSettings};
pub use tailorq_tensor::{Bits, Group, ScaleBits, TileBits, TransformKind};
pub use task::allocation::{
    AllocationSettings, AllocationSignal, MeasureKind, Rule, RuleSettings, ScoreSettings, Span, UnitKind,
};
pub use task::circuit::{CircuitSettings, Reference};
pub use task::planning::{PlanSummary, plan};
pub use task::retention::{RetainRequest, RetentionReport};
pub use task::score::{ScoreRequest, score};
pub use task::scores::{ScoredCandidate, ScoredUnit, Scores};
pub use task::survey::{SurveyRequest, survey};
pub use threads::{on_pool, set_threads};
