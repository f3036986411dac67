//! What a configuration records of a packed matrix: shape, layout and corrections, which together fix every size.

use crate::{ElementCorrections, Layout};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Which corrections a packed matrix has beside its base, and how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CorrectionSpec {
    /// Elements with a 16-bit correction, see [`ElementCorrections`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elements: Option<usize>,
}

impl CorrectionSpec {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == CorrectionSpec::default()
    }

    /// Bytes of the corrections of a `[rows, cols]` matrix.
    pub fn bytes(&self, rows: usize, cols: usize) -> usize {
        let index = ElementCorrections::index_bytes(cols);
        self.elements.map_or(0, |n| rows * index + n * (index + 2))
    }
}

/// Everything about a packed matrix but its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PackedSpec {
    /// Layout of the base.
    #[serde(flatten)]
    pub layout: Layout,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// What lies beside the base.
    #[serde(flatten)]
    pub corrections: CorrectionSpec,
}

impl PackedSpec {
    /// A `[rows, cols]` matrix that is nothing but a base.
    pub fn base(rows: usize, cols: usize, layout: Layout) -> Self {
        PackedSpec { layout, rows, cols, corrections: CorrectionSpec::default() }
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        self.layout.bytes(self.rows, self.cols) + self.corrections.bytes(self.rows, self.cols)
    }
}

impl fmt::Display for PackedSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.layout)?;
        if self.corrections.elements.is_some() {
            f.write_str(" + elements")?;
        }
        Ok(())
    }
}
