//! The output directory while it grows: finished parts lie under `.tailorq-partial/`, each written whole or not at all,
//! so that a killed run goes on where it stopped and a reader never sees half an artifact.

use crate::error::{PipelineError, output_error};
use crate::recipe::Recipe;
use crate::report::LayerReport;
use std::fs::File;
use std::path::{Path, PathBuf};
use tailorq_format::{SafetensorsWriter, TensorSet, TensorSpec, packed_tensors, read_packed, write_atomic};
use tailorq_tensor::{PackedMatrix, SharedBytes};

/// A tensor to write: what it is and its bytes.
pub type TensorData = (TensorSpec, SharedBytes);

/// Writes a whole safetensors file under a temporary name, then renames it.
pub fn write_safetensors(path: &Path, tensors: &[TensorData]) -> Result<(), PipelineError> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, &specs, &[("format", "pt")])?;
    for (spec, bytes) in tensors {
        writer.write(&spec.name, bytes)?;
    }
    Ok(writer.commit()?)
}

/// Where parts lie until the artifact is assembled.
const PARTIAL: &str = ".tailorq-partial";

/// What to do with a directory that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputMode {
    /// Refuse it.
    Fresh,
    /// Go on with the run that left it, or be content with a finished one.
    Resume,
    /// Replace the artifact in it.
    Overwrite,
}

/// An output directory made ready.
pub enum Prepared {
    /// It already holds the artifact of this very recipe.
    Finished,
    /// Parts can be written.
    Ready(Output),
}

/// A growing output directory; locked against a second process.
pub struct Output {
    dir: PathBuf,
    partial: PathBuf,
    _lock: File,
}

/// A finished part: packed matrices (or 16-bit tables) and their reports.
pub struct Part {
    /// The part's tensors, memory-mapped.
    pub tensors: TensorSet,
    /// One a packed matrix.
    pub layers: Vec<LayerReport>,
}

impl Part {
    /// A packed matrix of this part.
    pub fn matrix(&self, layer: &LayerReport) -> Result<PackedMatrix, PipelineError> {
        Ok(read_packed(&self.tensors, &layer.name, layer.rows, layer.cols, layer.layout)?)
    }
}

/// Checks the directory against `mode` and `recipe`; creates it when needed. `model` is the checkpoint's own place,
/// which must not be written into.
pub fn prepare(dir: &Path, recipe: &Recipe, mode: OutputMode, model: &Path) -> Result<Prepared, PipelineError> {
    let fail = |problem: String| Err(PipelineError::Output { path: dir.to_path_buf(), problem });
    if dir.exists() && !dir.is_dir() {
        return fail("is a file: --output needs a directory".into());
    }
    if let (Ok(a), Ok(b)) = (dir.canonicalize(), model.canonicalize())
        && (a == b || b.parent() == Some(&a) && mode != OutputMode::Resume && b.is_file())
    {
        return fail("holds the source checkpoint: choose another --output".into());
    }
    let partial = dir.join(PARTIAL);
    let started = Recipe::read(&partial.join("recipe.toml")).ok();
    match mode {
        OutputMode::Fresh if !is_empty(dir) => {
            return fail("is not empty: use --resume to go on with a stopped run or --overwrite to replace it".into());
        }
        OutputMode::Resume if !is_empty(dir) => {
            let finished = is_artifact(dir).then(|| Recipe::read(&dir.join("recipe.toml")));
            match (started, finished) {
                (Some(there), _) if &there == recipe => {}
                (_, Some(there)) => {
                    let there = there?;
                    if &there == recipe {
                        return Ok(Prepared::Finished);
                    }
                    return fail(mismatch(recipe, &there));
                }
                (Some(there), None) => return fail(mismatch(recipe, &there)),
                (None, None) if partial.exists() && only_partial(dir) => {}
                (None, None) => return fail("holds no run to resume: choose an empty directory".into()),
            }
        }
        OutputMode::Overwrite => {
            if dir.join("config.json").exists() && !is_artifact(dir) {
                return fail("holds a model that tailorq did not write: choose another --output".into());
            }
        }
        OutputMode::Fresh | OutputMode::Resume => {}
    }
    std::fs::create_dir_all(&partial).map_err(|e| output_error(&partial, &e))?;
    let lock = lock(&partial)?;
    if mode == OutputMode::Overwrite {
        clear(&partial)?;
    }
    write_atomic(&partial.join("recipe.toml"), recipe.to_toml().as_bytes())?;
    Ok(Prepared::Ready(Output { dir: dir.to_path_buf(), partial, _lock: lock }))
}

fn mismatch(here: &Recipe, there: &Recipe) -> String {
    format!(
        "was started with other settings ({}): repeat those, or use --overwrite",
        here.differences(there).join("; ")
    )
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none())
}

fn only_partial(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|entries| entries.flatten().all(|e| e.file_name() == PARTIAL))
}

/// Whether the directory holds a finished artifact of tailorq: `config.json` is written last.
fn is_artifact(dir: &Path) -> bool {
    let config = std::fs::read(dir.join("config.json")).ok();
    let config: Option<serde_json::Value> = config.and_then(|b| serde_json::from_slice(&b).ok());
    config.is_some_and(|c| c["quantization_config"]["quant_method"] == "tailorq")
}

fn lock(partial: &Path) -> Result<File, PipelineError> {
    let path = partial.join("lock");
    let file = File::create(&path).map_err(|e| output_error(&path, &e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(PipelineError::Output {
            path: partial.to_path_buf(),
            problem: "another tailorq is writing here: wait for it or choose another --output".into(),
        }),
        // A file system without locks: the run goes on unguarded.
        Err(std::fs::TryLockError::Error(_)) => Ok(file),
    }
}

fn clear(partial: &Path) -> Result<(), PipelineError> {
    for entry in std::fs::read_dir(partial).map_err(|e| output_error(partial, &e))?.flatten() {
        if entry.file_name() != "lock" {
            std::fs::remove_file(entry.path()).map_err(|e| output_error(&entry.path(), &e))?;
        }
    }
    Ok(())
}

impl Output {
    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn tensors_path(&self, part: &str) -> PathBuf {
        self.partial.join(format!("{part}.safetensors"))
    }

    /// A part that an earlier run finished; `None` when it is missing or cannot be read (it is then made again).
    pub fn part(&self, name: &str) -> Option<Part> {
        let layers = std::fs::read(self.partial.join(format!("{name}.json"))).ok()?;
        let part = Part {
            tensors: TensorSet::open(self.tensors_path(name)).ok()?,
            layers: serde_json::from_slice(&layers).ok()?,
        };
        part.layers.iter().all(|l| part.matrix(l).is_ok()).then_some(part)
    }

    /// Writes a part of packed matrices and opens it again.
    pub fn write_part(
        &self,
        name: &str,
        matrices: &[PackedMatrix],
        layers: Vec<LayerReport>,
    ) -> Result<Part, PipelineError> {
        let tensors = matrices.iter().zip(&layers).flat_map(|(m, l)| packed_tensors(&l.name, m)).collect();
        self.write_tensors(name, tensors, layers)
    }

    /// Writes a part of any tensors and opens it again. The tensor file comes last: it marks the part as finished.
    pub fn write_tensors(
        &self,
        name: &str,
        tensors: Vec<TensorData>,
        layers: Vec<LayerReport>,
    ) -> Result<Part, PipelineError> {
        let json = serde_json::to_vec(&layers).expect("a report is plain data");
        write_atomic(&self.partial.join(format!("{name}.json")), &json)?;
        write_safetensors(&self.tensors_path(name), &tensors)?;
        Ok(Part { tensors: TensorSet::open(self.tensors_path(name))?, layers })
    }

    /// Removes the partial directory, after the artifact is complete.
    pub fn remove_partial(self) -> Result<(), PipelineError> {
        std::fs::remove_dir_all(&self.partial).map_err(|e| output_error(&self.partial, &e))
    }
}
