//! The output directory while it grows: finished parts lie under `.tailorq-partial/`, each written whole or not at all,
//! so that a killed run goes on where it stopped and a reader never sees half an artifact.

use crate::error::{PipelineError, output_error};
use crate::recipe::Recipe;
use crate::report::LayerReport;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tailorq_format::{SafetensorsWriter, TensorSet, TensorSpec, packed_tensors, read_packed, write_atomic};
use tailorq_quant::QuantizedWeight;
use tailorq_tensor::{ReadRows, SharedBytes, Weight};

/// A tensor to write: what it is and its bytes.
pub type TensorData = (TensorSpec, SharedBytes);

/// Writes a whole safetensors file under a temporary name, then renames it.
pub fn write_safetensors(path: &Path, tensors: &[TensorData]) -> Result<(), PipelineError> {
    write_tensors_with(path, tensors, &[("format", "pt")])
}

/// [`write_safetensors`] with metadata of its own in the header.
pub(crate) fn write_tensors_with(
    path: &Path,
    tensors: &[TensorData],
    metadata: &[(&str, &str)],
) -> Result<(), PipelineError> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, &specs, metadata)?;
    for (spec, bytes) in tensors {
        writer.write(&spec.name, bytes)?;
    }
    Ok(writer.commit()?)
}

/// Where parts lie until the artifact is assembled.
const PARTIAL: &str = ".tailorq-partial";
/// The recipe, in the artifact and among the parts.
const RECIPE: &str = "recipe.toml";

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

/// A finished part: quantized matrices (or 16-bit tables) and their reports.
pub struct Part {
    /// The part's tensors, memory-mapped.
    pub tensors: TensorSet,
    /// One a quantized matrix.
    pub layers: Vec<LayerReport>,
}

impl Part {
    /// The only table of this part, packed or at 16 bits, as the artifact will give it back.
    pub fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, PipelineError> {
        match self.layers.first() {
            Some(layer) => self.weight(layer),
            None => self.dense(name, rows, cols),
        }
    }

    /// A quantized matrix of this part, packed or at 16 bits, as the artifact will give it back.
    pub fn weight(&self, layer: &LayerReport) -> Result<Weight, PipelineError> {
        match layer.spec() {
            Some(spec) => Ok(read_packed(&self.tensors, &layer.name, &spec)?.into()),
            None => self.dense(&layer.name, layer.rows, layer.cols),
        }
    }

    fn dense(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, PipelineError> {
        Ok(Weight::Stored(Arc::new(self.tensors.dense_rows(&format!("{name}.weight"), rows, cols)?)))
    }
}

/// The tensors of a quantized matrix: the parts of a packed one, or `NAME.weight` at 16 bits.
fn weight_tensors(name: &str, weight: &QuantizedWeight) -> Vec<TensorData> {
    match weight {
        QuantizedWeight::Packed(matrix) => packed_tensors(name, matrix),
        QuantizedWeight::Dense(rows) => {
            let shape = [ReadRows::rows(rows), ReadRows::cols(rows)];
            vec![(TensorSpec::new(format!("{name}.weight"), rows.dtype(), &shape), rows.data().clone())]
        }
    }
}

/// Checks the directory against `mode` and `recipe`; creates it when needed. `model` is the checkpoint's own place,
/// which must not be written into.
pub fn prepare(dir: &Path, recipe: &Recipe, mode: OutputMode, model: &Path) -> Result<Prepared, PipelineError> {
    let fail = |problem: &str| Err(PipelineError::Output { path: dir.to_path_buf(), problem: problem.into() });
    if dir.exists() && !dir.is_dir() {
        return fail("is a file: --output needs a directory");
    }
    if let (Ok(a), Ok(b)) = (dir.canonicalize(), model.canonicalize())
        && (a == b || b.parent() == Some(&a))
    {
        return fail("holds the source checkpoint: choose another --output");
    }
    let partial = dir.join(PARTIAL);
    // Parts whose recipe is gone were left by a clean-up that did not finish: nobody knows what they are.
    let mut keep_parts = false;
    match mode {
        _ if is_empty(dir) => {}
        OutputMode::Fresh => {
            return fail("is not empty: use --resume to go on with a stopped run or --overwrite to replace it");
        }
        OutputMode::Resume => match state(dir, recipe)? {
            State::Finished => {
                remove_partial(&partial)?;
                return Ok(Prepared::Finished);
            }
            State::Started => keep_parts = true,
            State::Leftover => {}
            State::Foreign => return fail("holds no run to resume: choose an empty directory"),
        },
        OutputMode::Overwrite => {
            if !is_artifact(dir) && !partial.exists() {
                return fail("holds files that tailorq did not write: choose another --output");
            }
        }
    }
    std::fs::create_dir_all(&partial).map_err(|e| output_error(&partial, &e))?;
    let lock = lock(&partial)?;
    if !keep_parts {
        clear(&partial)?;
    }
    write_atomic(&partial.join(RECIPE), recipe.to_toml().as_bytes())?;
    Ok(Prepared::Ready(Output { dir: dir.to_path_buf(), partial, _lock: lock }))
}

/// What a directory that is not empty holds.
enum State {
    /// The artifact of this recipe.
    Finished,
    /// Parts of this recipe's artifact.
    Started,
    /// Nothing but a partial directory without a recipe.
    Leftover,
    /// Something else.
    Foreign,
}

fn state(dir: &Path, recipe: &Recipe) -> Result<State, PipelineError> {
    let read = |path: PathBuf| path.exists().then(|| Recipe::read(&path)).transpose();
    let started = read(dir.join(PARTIAL).join(RECIPE))?;
    if started.as_ref() == Some(recipe) {
        return Ok(State::Started);
    }
    let finished = if is_artifact(dir) { read(dir.join(RECIPE))? } else { None };
    match finished.or(started) {
        Some(there) if &there == recipe => Ok(State::Finished),
        Some(there) => {
            Err(PipelineError::OtherRun { path: dir.to_path_buf(), differences: recipe.differences(&there).join("; ") })
        }
        None if only_partial(dir) => Ok(State::Leftover),
        None => Ok(State::Foreign),
    }
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

/// Removes all parts, their recipe first: parts without a recipe are never used again.
fn clear(partial: &Path) -> Result<(), PipelineError> {
    let remove = |path: &Path| match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(output_error(path, &e)),
        _ => Ok(()),
    };
    remove(&partial.join(RECIPE))?;
    for entry in std::fs::read_dir(partial).map_err(|e| output_error(partial, &e))?.flatten() {
        if entry.file_name() != "lock" {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_partial(partial: &Path) -> Result<(), PipelineError> {
    if !partial.exists() {
        return Ok(());
    }
    clear(partial)?;
    std::fs::remove_dir_all(partial).map_err(|e| output_error(partial, &e))
}

impl Output {
    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn tensors_path(&self, part: &str) -> PathBuf {
        self.partial.join(format!("{part}.safetensors"))
    }

    /// A part of `n_layers` matrices that an earlier run finished; `None` when it is missing or cannot be read (it is then
    /// made again).
    pub fn part(&self, name: &str, n_layers: usize) -> Option<Part> {
        let layers = std::fs::read(self.partial.join(format!("{name}.json"))).ok()?;
        let part = Part {
            tensors: TensorSet::open(self.tensors_path(name)).ok()?,
            layers: serde_json::from_slice(&layers).ok()?,
        };
        let whole = part.layers.len() == n_layers && part.layers.iter().all(|l| part.weight(l).is_ok());
        whole.then_some(part)
    }

    /// Writes a part of quantized matrices and opens it again.
    pub fn write_part(
        &self,
        name: &str,
        weights: &[QuantizedWeight],
        layers: Vec<LayerReport>,
    ) -> Result<Part, PipelineError> {
        let tensors = weights.iter().zip(&layers).flat_map(|(w, l)| weight_tensors(&l.name, w)).collect();
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

    /// The place of a file that only this run reads; whoever makes it writes it whole or not at all.
    pub fn extra(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Removes the partial directory, after the artifact is complete.
    pub fn remove_partial(self) -> Result<(), PipelineError> {
        remove_partial(&self.partial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use tailorq_tensor::{
        Bits, CorrectionSpec, ElementCorrections, Group, InputTransform, Layout, Matrix, PackedMatrix,
    };

    /// A part with corrections is found again by a resumed run, and counted with them.
    #[test]
    fn parts_keep_their_corrections() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output {
            dir: dir.path().to_path_buf(),
            partial: dir.path().to_path_buf(),
            _lock: File::create(dir.path().join("lock")).unwrap(),
        };
        let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Row) };
        let base = PackedMatrix::pack(2, 20, layout, &[1; 40], &[f16::ONE; 2], &[]).unwrap();
        let rows = [vec![(3, f16::from_f32(0.25))], vec![(0, f16::ONE), (19, f16::ONE)]];
        let matrix = base.clone().with_elements(ElementCorrections::from_rows(20, &rows).unwrap()).unwrap();
        let matrix = matrix.with_transform(InputTransform::hadamard(20, u64::MAX).unwrap()).unwrap();
        let report = LayerReport {
            name: "w".into(),
            rows: 2,
            cols: 20,
            layout: Some(layout),
            dtype: None,
            codebook: false,
            transform: matrix.spec().transform,
            corrections: matrix.spec().corrections,
            bytes: matrix.bytes(),
            relative_error: 0.5,
            proxy_loss: None,
            notes: Vec::new(),
            simulated: false,
            counted_bits: None,
        };
        // Counts of two rows, columns and values of three elements.
        assert_eq!(report.bytes, base.bytes() + 2 * 2 + 3 * 4);
        output.write_part("part", &[matrix.clone().into()], vec![report.clone()]).unwrap();
        let part = output.part("part", 1).unwrap();
        assert_eq!(part.layers, [report]);
        let read = part.weight(&part.layers[0]).unwrap();
        assert_eq!(read.to_matrix(), Weight::from(matrix).to_matrix());
        // A report that knows nothing of them does not belong to this file.
        let mut plain = part.layers[0].clone();
        plain.corrections = CorrectionSpec::default();
        assert!(part.weight(&plain).is_err());
    }

    /// Packed and 16-bit matrices lie in one part, and their reports say which is which after they were read back.
    #[test]
    fn parts_mix_packed_and_dense() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output {
            dir: dir.path().to_path_buf(),
            partial: dir.path().to_path_buf(),
            _lock: File::create(dir.path().join("lock")).unwrap(),
        };
        let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Row) };
        let packed = PackedMatrix::pack(2, 20, layout, &[1; 40], &[f16::ONE; 2], &[]).unwrap();
        let values = Matrix::from_vec(3, 2, vec![0.1, -2.0, 3.0, 0.0, 1e-3, 7.0]);
        let weights: [QuantizedWeight; 2] = [packed.into(), QuantizedWeight::half(&values).unwrap()];
        let report = |name: &str, weight: &QuantizedWeight| LayerReport {
            name: name.into(),
            rows: weight.reader().rows(),
            cols: weight.reader().cols(),
            layout: weight.packed().map(PackedMatrix::layout),
            dtype: weight.packed().is_none().then(|| weight.reader().encoding()),
            codebook: false,
            transform: None,
            corrections: CorrectionSpec::default(),
            bytes: weight.reader().bytes(),
            relative_error: 0.25,
            proxy_loss: Some(1.5),
            notes: Vec::new(),
            simulated: weight.packed().is_none(),
            counted_bits: weight.packed().is_none().then_some(2.25),
        };
        let reports = vec![report("a", &weights[0]), report("b", &weights[1])];
        assert_eq!(reports[1].bytes, 12);
        output.write_part("part", &weights, reports.clone()).unwrap();
        let part = output.part("part", 2).unwrap();
        assert_eq!(part.layers, reports);
        for (layer, weight) in part.layers.iter().zip(&weights) {
            assert_eq!(part.weight(layer).unwrap().to_matrix(), weight.to_matrix());
        }
        let mut other = part.layers[1].clone();
        other.rows = 2;
        assert!(part.weight(&other).is_err());
    }
}
