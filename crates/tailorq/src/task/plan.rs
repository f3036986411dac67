//! A plan in a file: what each linear shall become, where it differs from the recipe's settings for all.
//!
//! A safetensors file. Settings of single layers are a JSON table in the header; the elements that a layer keeps at 16 bits
//! are a tensor `kept.NAME` (U32, ascending row-major indices). The header names the inputs of the plan, so that nobody
//! quantizes one model by the plan of another.

use crate::error::PipelineError;
use crate::output::{TensorData, write_tensors_with};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tailorq_format::{SafetensorsFile, StoredType, TensorSpec};
use tailorq_model::Model;
use tailorq_quant::{ElementMask, LayerPlan, LayerSettings, QuantError};
use tailorq_tensor::{LayerId, SharedBytes};

/// Schema of plan files.
const PLAN_SCHEMA: &str = "1";

/// What departs from the settings that all layers share, by the layers' checkpoint names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Exceptions {
    /// Settings of single layers.
    pub(crate) layers: BTreeMap<String, LayerSettings>,
    /// Ascending row-major indices of kept elements.
    pub(crate) kept: BTreeMap<String, Vec<u32>>,
}

impl Exceptions {
    /// Writes them to `path`, whole or not at all, as a plan for the checkpoint with SHA-256 `model`. `made_by` is the version
    /// of tailorq whose numbers decided the plan.
    pub(crate) fn write(&self, path: &Path, model: &str, made_by: &str) -> Result<(), PipelineError> {
        let layers = serde_json::to_string(&self.layers).expect("plain data");
        let metadata = [("tailorq_plan", PLAN_SCHEMA), ("tailorq", made_by), ("model", model), ("layers", &layers)];
        let tensor = |(name, indices): (&String, &Vec<u32>)| -> TensorData {
            let spec = TensorSpec::new(format!("kept.{name}"), StoredType::U32, &[indices.len()]);
            (spec, SharedBytes::from_vec(indices.clone()))
        };
        let tensors: Vec<TensorData> = self.kept.iter().map(tensor).collect();
        write_tensors_with(path, &tensors, &metadata)
    }
}

/// A plan that was written, its masks left in the memory map.
pub(crate) struct PlanFile {
    file: SafetensorsFile,
    path: PathBuf,
    layers: BTreeMap<String, LayerSettings>,
}

impl PlanFile {
    /// Opens a plan and checks that it is one for the checkpoint with SHA-256 `model`.
    pub(crate) fn open(path: &Path, model: &str) -> Result<Self, PipelineError> {
        let file = SafetensorsFile::open(path)?;
        let fail = |problem: String| PipelineError::Output { path: path.to_path_buf(), problem };
        let found = |key: &str| file.metadata().get(key).map(String::as_str);
        if found("tailorq_plan") != Some(PLAN_SCHEMA) {
            return Err(fail("is no plan of this version of tailorq: make one with `tailorq plan`".into()));
        }
        if found("model") != Some(model) {
            return Err(fail("was made for another checkpoint: make one for this".into()));
        }
        let layers = serde_json::from_str(found("layers").unwrap_or("{}"))
            .map_err(|e| fail(format!("has settings of layers that cannot be read ({e}): make it again")))?;
        Ok(PlanFile { file, path: path.to_path_buf(), layers })
    }

    /// Whether some layer keeps elements at 16 bits.
    pub(crate) fn keeps_elements(&self) -> bool {
        self.file.names().any(|name| name.starts_with("kept."))
    }

    /// The version of tailorq whose numbers decided the plan, where it was told.
    pub(crate) fn made_by(&self) -> Option<&str> {
        self.file.metadata().get("tailorq").map(String::as_str)
    }

    /// Settings of single layers, for another plan to start from.
    pub(crate) fn layers(&self) -> &BTreeMap<String, LayerSettings> {
        &self.layers
    }

    /// Refuses a plan for linears that this model has not: it would be followed in part.
    pub(crate) fn check_names(&self, model: &Model) -> Result<(), PipelineError> {
        let names: Vec<&str> = model.blocks.iter().flat_map(|b| &b.linears).map(|l| l.name.as_str()).collect();
        match self.layers.keys().find(|name| !names.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => Err(PipelineError::Output {
                path: self.path.clone(),
                problem: format!("names {name}, which this model has not: make the plan again"),
            }),
        }
    }

    /// The elements of each layer that stay at 16 bits.
    pub(crate) fn kept(&self, model: &Model) -> Result<BTreeMap<String, Vec<u32>>, PipelineError> {
        let mut kept = BTreeMap::new();
        for linear in model.blocks.iter().flat_map(|b| &b.linears) {
            if let Some(indices) = self.kept_in(&linear.name)? {
                kept.insert(linear.name.clone(), indices);
            }
        }
        Ok(kept)
    }

    /// What a layer shall become; `default` is what it becomes where the plan is silent.
    pub(crate) fn layer(&self, model: &Model, id: LayerId, default: LayerSettings) -> Result<LayerPlan, QuantError> {
        let linear = model.blocks[id.block_idx].linear(id.slot);
        let settings = self.layers.get(&linear.name).copied().unwrap_or(default);
        let Some(indices) = self.kept_in(&linear.name).map_err(|e| QuantError::Settings(e.to_string()))? else {
            return Ok(LayerPlan { settings, kept: None });
        };
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let mask = ElementMask::from_indices(rows, cols, indices.into_iter().map(|i| i as usize))?;
        Ok(LayerPlan { settings, kept: Some(Arc::new(mask)) })
    }

    /// Ascending row-major indices of the elements of a linear that stay at 16 bits, if the plan has any.
    fn kept_in(&self, linear: &str) -> Result<Option<Vec<u32>>, PipelineError> {
        let name = format!("kept.{linear}");
        let Some(tensor) = self.file.get(&name) else { return Ok(None) };
        match (tensor.dtype, tensor.bytes.cast::<u32>()) {
            (StoredType::U32, Some(indices)) => Ok(Some(indices.to_vec())),
            _ => Err(PipelineError::Output {
                path: self.path.clone(),
                problem: format!("{name} is not a list of U32: make the plan again"),
            }),
        }
    }
}
