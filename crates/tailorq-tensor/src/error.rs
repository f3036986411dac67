//! Why bytes do not form a packed matrix.

use thiserror::Error;

/// Why bytes do not form a packed matrix.
#[derive(Debug, Error, PartialEq)]
pub enum PackError {
    /// A part has the wrong number of bytes.
    #[error("{part} has {found} bytes, a [{rows}, {cols}] matrix of this layout needs {expected}")]
    Size {
        /// `codes`, `codes_high`, `scales` or `zeros`.
        part: &'static str,
        /// Bytes it has.
        found: usize,
        /// Bytes it must have.
        expected: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// A part does not start at a multiple of its element size.
    #[error("{0} is not aligned in memory")]
    Misaligned(&'static str),
    /// A scale is NaN, infinite or negative.
    #[error("scale {index} is {value}: scales are finite and not negative")]
    Scale {
        /// Index into the scales.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A scale is none of those that 8 bits hold.
    #[error("scale {index} is {value}, which is no scale of 8 bits")]
    ScaleByte {
        /// Index into the scales.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A part of the corrections has the wrong number of bytes.
    #[error("{part} has {found} bytes, its shape and its counts ask for {expected}")]
    CorrectionSize {
        /// `element_counts`, `tile_codes`, ...
        part: &'static str,
        /// Bytes it has.
        found: usize,
        /// Bytes it must have.
        expected: usize,
    },
    /// The columns of a row's element corrections do not ascend, or go beyond the matrix.
    #[error("element corrections of row {row}: column {col} is out of order or beyond the {cols} columns")]
    ElementColumn {
        /// Row of the matrix.
        row: usize,
        /// The first offending column.
        col: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// An element correction is NaN or infinite.
    #[error("the element correction of row {row}, column {col} is {value}: corrections are finite")]
    ElementValue {
        /// Row of the matrix.
        row: usize,
        /// Column of the matrix.
        col: usize,
        /// The value.
        value: f32,
    },
    /// Tiles that are listed for a row do not ascend or are beyond its last, or its bitmap has a bit there.
    #[error("row {row} marks tile {tile}: out of order or beyond its {tiles} tiles")]
    Tile {
        /// Row of the matrix.
        row: usize,
        /// The first offending tile.
        tile: usize,
        /// Tiles in a row.
        tiles: usize,
    },
    /// A code of a tile does not fit its width, or is not 0 although it belongs to no column.
    #[error("tile {tile} of row {row} has the code {code}: it does not fit its width, or belongs to no column")]
    TileCode {
        /// Row of the matrix.
        row: usize,
        /// Tile of the row.
        tile: usize,
        /// The code.
        code: i8,
    },
    /// A scale of the corrections is NaN, infinite or negative.
    #[error("{part}: scale {index} is {value}: scales are finite and not negative")]
    CorrectionScale {
        /// `tile_scales` or `mean_scales`.
        part: &'static str,
        /// Index into the scales.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// Means of four need a base of 2 bits whose groups are theirs, and no tile corrections.
    #[error("means of four do not go with {0}: they need 2 bits, the same groups and no tile corrections")]
    Mean4(String),
    /// Levels of a codebook that is none.
    #[error("the levels of the codebook {0}")]
    Levels(String),
    /// An input transform that no matrix of this width or with these parts has.
    #[error("the input transform {0}")]
    Transform(String),
    /// Corrections are for a matrix of another shape.
    #[error("corrections for a {found:?} matrix do not belong to one of {expected:?}")]
    OtherShape {
        /// `(rows, cols)` of the corrections.
        found: (usize, usize),
        /// `(rows, cols)` of the matrix.
        expected: (usize, usize),
    },
    /// The shape overflows the address space.
    #[error("shape [{0}, {1}] is too large")]
    TooLarge(usize, usize),
}
