//! Element corrections: single weights of a packed matrix that are kept in 16 bits, found by row.
//!
//! The circuit of TACQ (Xiao et al. 2025, "Task-Circuit Quantization") keeps about 0.35 % of the weights out of the grid.
//! What is stored is the difference from the base, so that a reader adds all corrections in one sparse pass and the base
//! has no holes.

use crate::{PackError, SharedBytes};
use bytemuck::NoUninit;
use half::f16;
use std::sync::Arc;

/// The parts of element corrections as they lie in a file, little-endian. An index (a count, a column) is a u16 in a
/// matrix of at most 65,535 columns and a u32 in a wider one, so that no row is too full for its count.
#[derive(Clone, Debug)]
pub struct ElementParts {
    /// Index `[rows]`: how many elements of each row are corrected.
    pub counts: SharedBytes,
    /// Index `[n]`: their columns, row after row, strictly ascending within a row.
    pub cols: SharedBytes,
    /// f16 `[n]`, finite: what is added to each.
    pub values: SharedBytes,
}

/// 16-bit numbers that are added to single elements of a `[rows, cols]` matrix; cheap to clone.
#[derive(Clone, Debug)]
pub struct ElementCorrections {
    rows: usize,
    cols: usize,
    parts: ElementParts,
    /// Where each row starts in `cols` and `values`, and the end: `[rows + 1]`.
    starts: Arc<[usize]>,
    /// See [`ElementCorrections::rows_of`].
    rows_of: Arc<[u8]>,
}

impl ElementCorrections {
    /// Bytes of a count and of a column index in a matrix of `cols` columns: 2, or 4 above 65,535 columns.
    pub fn index_bytes(cols: usize) -> usize {
        if cols <= usize::from(u16::MAX) { 2 } else { 4 }
    }

    /// Validates sizes, alignment, order, range and finiteness once; afterwards nothing is checked again.
    pub fn new(rows: usize, cols: usize, parts: ElementParts) -> Result<Self, PackError> {
        let width = ElementCorrections::index_bytes(cols);
        let too_large = || PackError::TooLarge(rows, cols);
        // Kernels gather inputs by signed places.
        i32::try_from(cols).map_err(|_| too_large())?;
        let size = |part, bytes: &SharedBytes, expected: usize| match bytes.len() {
            found if found == expected => Ok(()),
            found => Err(PackError::CorrectionSize { part, found, expected }),
        };
        size("element_counts", &parts.counts, rows.checked_mul(width).ok_or_else(too_large)?)?;
        let counts = Indices::of(&parts.counts, cols).ok_or(PackError::Misaligned("element_counts"))?;
        let mut starts = Vec::with_capacity(rows + 1);
        let mut n = 0usize;
        starts.push(n);
        for r in 0..rows {
            n = n.checked_add(counts.get(r)).ok_or_else(too_large)?;
            starts.push(n);
        }
        size("element_cols", &parts.cols, n.checked_mul(width).ok_or_else(too_large)?)?;
        size("element_values", &parts.values, n.checked_mul(2).ok_or_else(too_large)?)?;
        let columns = Indices::of(&parts.cols, cols).ok_or(PackError::Misaligned("element_cols"))?;
        let values = parts.values.cast::<f16>().ok_or(PackError::Misaligned("element_values"))?;
        let mut rows_of = Vec::with_capacity(n);
        for r in 0..rows {
            let mut least = 0;
            rows_of.resize(starts[r + 1], r as u8);
            let range = starts[r]..starts[r + 1];
            for (i, value) in range.clone().zip(&values[range]) {
                let col = columns.get(i);
                if col < least || col >= cols {
                    return Err(PackError::ElementColumn { row: r, col, cols });
                }
                if !value.is_finite() {
                    return Err(PackError::ElementValue { row: r, col, value: value.to_f32() });
                }
                least = col + 1;
            }
        }
        Ok(ElementCorrections { rows, cols, parts, starts: starts.into(), rows_of: rows_of.into() })
    }

    /// The corrections of each row as `(column, value)`, columns strictly ascending, for a matrix of `cols` columns.
    pub fn from_rows(cols: usize, rows: &[Vec<(usize, f16)>]) -> Result<Self, PackError> {
        let elements = || rows.iter().flatten();
        // Before the columns are narrowed: one out of range must not come back into it.
        if let Some((row, &(col, _))) =
            rows.iter().enumerate().flat_map(|(r, e)| e.iter().map(move |e| (r, e))).find(|(_, e)| e.0 >= cols)
        {
            return Err(PackError::ElementColumn { row, col, cols });
        }
        // A row with more elements than columns has one that does not ascend.
        if let Some((row, full)) = rows.iter().enumerate().find(|(_, e)| e.len() > cols) {
            return Err(PackError::ElementColumn { row, col: full[cols].0, cols });
        }
        if u32::try_from(cols).is_err() {
            return Err(PackError::TooLarge(rows.len(), cols));
        }
        let parts = ElementParts {
            counts: indices(cols, rows.iter().map(Vec::len)),
            cols: indices(cols, elements().map(|e| e.0)),
            values: SharedBytes::from_vec(elements().map(|e| e.1).collect::<Vec<f16>>()),
        };
        ElementCorrections::new(rows.len(), cols, parts)
    }

    /// The rows of all `panels`, one under the other; a panel is `(rows, its corrections)` and may have none. `None` when
    /// no panel has any.
    pub(crate) fn stack(cols: usize, panels: &[(usize, Option<&ElementCorrections>)]) -> Option<Self> {
        panels.iter().find(|p| p.1.is_some())?;
        let counts = panels.iter().flat_map(|&(rows, panel)| (0..rows).map(move |r| panel.map_or(0, |p| p.n_in(r))));
        let there = || panels.iter().filter_map(|p| p.1);
        let parts = ElementParts {
            counts: indices(cols, counts),
            cols: indices(cols, there().flat_map(|p| (0..p.len()).map(|i| p.columns().get(i)))),
            values: SharedBytes::from_vec(there().flat_map(|p| p.values()).copied().collect::<Vec<f16>>()),
        };
        let rows = panels.iter().map(|p| p.0).sum();
        Some(ElementCorrections::new(rows, cols, parts).expect("stacked corrections are as valid as each of them"))
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The parts as they lie in a file.
    pub fn parts(&self) -> &ElementParts {
        &self.parts
    }

    /// How many elements are corrected.
    pub fn len(&self) -> usize {
        self.starts[self.rows]
    }

    /// Whether no element is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all parts together.
    pub fn bytes(&self) -> usize {
        let ElementParts { counts, cols, values } = &self.parts;
        counts.len() + cols.len() + values.len()
    }

    /// The elements of row `r` as `(column, what is added)`, columns ascending.
    pub fn row(&self, r: usize) -> impl ExactSizeIterator<Item = (usize, f32)> + '_ {
        let (columns, values) = (self.columns(), self.values());
        (self.starts[r]..self.starts[r + 1]).map(move |i| (columns.get(i), values[i].to_f32()))
    }

    /// Where the elements of each row start among all, and the end: `[rows + 1]`.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// The row of each element modulo 256: a byte each, in memory alone. Who walks over many rows takes their elements as one
    /// flat run with it, instead of a loop of a few turns a row.
    pub fn rows_of(&self) -> &[u8] {
        &self.rows_of
    }

    /// What is added to element `(r, c)`; `None` when it is not corrected.
    pub fn get(&self, r: usize, c: usize) -> Option<f32> {
        let columns = self.columns();
        let (mut low, mut high) = (self.starts[r], self.starts[r + 1]);
        while low < high {
            let middle = low + (high - low) / 2;
            if columns.get(middle) < c { low = middle + 1 } else { high = middle }
        }
        (low < self.starts[r + 1] && columns.get(low) == c).then(|| self.values()[low].to_f32())
    }

    /// Adds the corrections of row `r` to that row, `[cols]`.
    pub fn add_to_row(&self, r: usize, row: &mut [f32]) {
        let (range, values) = (self.starts[r]..self.starts[r + 1], self.values());
        match self.columns() {
            Indices::U16(columns) => add(&columns[range.clone()], &values[range], row),
            Indices::U32(columns) => add(&columns[range.clone()], &values[range], row),
        }
    }

    fn n_in(&self, r: usize) -> usize {
        self.starts[r + 1] - self.starts[r]
    }

    fn columns(&self) -> Indices<'_> {
        Indices::of(&self.parts.cols, self.cols).expect("checked at the door")
    }

    fn values(&self) -> &[f16] {
        self.parts.values.cast().expect("checked at the door")
    }
}

/// Counts or columns of either width.
#[derive(Clone, Copy)]
enum Indices<'a> {
    U16(&'a [u16]),
    U32(&'a [u32]),
}

impl Indices<'_> {
    /// `None` when `bytes` are misaligned.
    fn of(bytes: &SharedBytes, cols: usize) -> Option<Indices<'_>> {
        match ElementCorrections::index_bytes(cols) {
            2 => bytes.cast().map(Indices::U16),
            _ => bytes.cast().map(Indices::U32),
        }
    }

    fn get(self, i: usize) -> usize {
        match self {
            Indices::U16(all) => all[i].index(),
            Indices::U32(all) => all[i].index(),
        }
    }
}

/// A count or column as stored.
trait Index: NoUninit + Send + Sync {
    fn index(self) -> usize;
}

impl Index for u16 {
    fn index(self) -> usize {
        usize::from(self)
    }
}

impl Index for u32 {
    fn index(self) -> usize {
        self as usize
    }
}

fn add<I: Index>(columns: &[I], values: &[f16], row: &mut [f32]) {
    for (column, value) in columns.iter().zip(values) {
        row[column.index()] += value.to_f32();
    }
}

/// Counts or columns of a matrix of `cols` columns, none above `cols`, as bytes.
fn indices(cols: usize, all: impl Iterator<Item = usize>) -> SharedBytes {
    if ElementCorrections::index_bytes(cols) == 2 {
        SharedBytes::from_vec(all.map(|i| i as u16).collect::<Vec<_>>())
    } else {
        SharedBytes::from_vec(all.map(|i| i as u32).collect::<Vec<_>>())
    }
}
