//! Rectangles of a row-major matrix that several threads write at once.
//!
//! A `&mut [f32]` cannot be split by columns; a [`Tile`] can. Every tile is made by cutting a larger one in two, so that
//! no element belongs to two tiles, and this file is the only place that has to say so.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable rectangle of a row-major matrix: row `r` starts `r * stride` elements after the first.
///
/// Invariant: the elements `(r, c)`, `r < rows`, `c < cols`, lie in one allocation that is borrowed for `'a`, `cols <=
/// stride` (where there is more than one row), and no other live reference or tile covers any of them.
pub(crate) struct Tile<'a> {
    first: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile has its elements to itself for its whole life, as a `&mut [f32]` has, and f32 is Send.
unsafe impl Send for Tile<'_> {}
// SAFETY: a shared tile gives no access to elements.
unsafe impl Sync for Tile<'_> {}

impl<'a> Tile<'a> {
    /// The matrix `[rows, cols]` in `data`.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride), "[{rows}, {cols}] by {stride} in {} elements", data.len());
        Tile { first: data.as_mut_ptr(), rows, cols, stride, borrow: PhantomData }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Address of the first element, for a foreign kernel.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }

    /// Row `r`.
    pub(crate) fn row_mut(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: by the invariant these `cols` elements are valid and this tile's alone; the borrow of `self` keeps
        // a second reference from being made.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.cols) }
    }

    /// The first `at` rows and the rest.
    pub(crate) fn split_rows(self, at: usize) -> (Tile<'a>, Tile<'a>) {
        assert!(at <= self.rows, "row {at} of {}", self.rows);
        let rest = Tile { first: self.offset(at, 0), rows: self.rows - at, ..self };
        (Tile { rows: at, ..self }, rest)
    }

    /// The first `at` columns and the rest.
    pub(crate) fn split_cols(self, at: usize) -> (Tile<'a>, Tile<'a>) {
        assert!(at <= self.cols, "column {at} of {}", self.cols);
        let rest = Tile { first: self.offset(0, at), cols: self.cols - at, ..self };
        (Tile { cols: at, ..self }, rest)
    }

    /// Some columns, for as long as the whole is not used.
    pub(crate) fn cols_mut(&mut self, cols: Range<usize>) -> Tile<'_> {
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        let first = self.offset(0, cols.start);
        Tile { first, rows: self.rows, cols: cols.len(), stride: self.stride, borrow: PhantomData }
    }

    /// Cuts into a grid of tiles of at most `rows` by `cols`, row of tiles by row of tiles.
    pub(crate) fn grid(self, rows: usize, cols: usize) -> Vec<Part<'a>> {
        assert!(rows > 0 && cols > 0, "a grid of empty tiles");
        let mut parts = Vec::with_capacity(self.rows.div_ceil(rows) * self.cols.div_ceil(cols));
        let (mut below, mut row) = (self, 0);
        while below.rows > 0 {
            let height = below.rows.min(rows);
            let (mut right, rest) = below.split_rows(height);
            let mut col = 0;
            while right.cols > 0 {
                let width = right.cols.min(cols);
                let (tile, rest) = right.split_cols(width);
                parts.push(Part { row, col, tile });
                (right, col) = (rest, col + width);
            }
            (below, row) = (rest, row + height);
        }
        parts
    }

    /// Address of element `(r, c)`, or of the end of the tile.
    fn offset(&self, r: usize, c: usize) -> *mut f32 {
        if r >= self.rows || c >= self.cols {
            // What starts here is empty and is never read; the address may lie past the allocation.
            return self.first;
        }
        // SAFETY: element (r, c) is in the allocation.
        unsafe { self.first.add(r * self.stride + c) }
    }
}

/// One tile of a grid and where its first element lies in the whole.
pub(crate) struct Part<'a> {
    pub(crate) row: usize,
    pub(crate) col: usize,
    pub(crate) tile: Tile<'a>,
}

/// Whether a strided row-major `[rows, cols]` fits in `len` elements.
pub(super) fn fits(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    if rows == 0 || cols == 0 {
        return true;
    }
    let end = (rows - 1).checked_mul(stride).and_then(|at| at.checked_add(cols));
    end.is_some_and(|end| end <= len) && (rows == 1 || stride >= cols)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_covers_every_element_once() {
        let mut data = vec![0.0; 7 * 11];
        for mut part in Tile::new(&mut data, 7, 10, 11).grid(3, 4) {
            for r in 0..part.tile.rows() {
                for (c, value) in part.tile.row_mut(r).iter_mut().enumerate() {
                    *value += ((part.row + r) * 10 + part.col + c) as f32 + 1.0;
                }
            }
        }
        for (r, row) in data.chunks(11).enumerate() {
            let expected: Vec<f32> = (0..10).map(|c| (r * 10 + c) as f32 + 1.0).chain([0.0]).collect();
            assert_eq!(row, expected);
        }
    }

    #[test]
    fn some_columns_are_those() {
        let mut data = vec![0.0; 3 * 5];
        let mut tile = Tile::new(&mut data, 3, 5, 5);
        for cols in [0..2, 2..2, 3..5] {
            let mut some = tile.cols_mut(cols.clone());
            assert_eq!((some.rows(), some.cols()), (3, cols.len()));
            (0..3).for_each(|r| some.row_mut(r).fill(cols.start as f32 + 1.0));
        }
        assert_eq!(data, [1.0, 1.0, 0.0, 4.0, 4.0].repeat(3));
    }

    #[test]
    fn empty_matrices_have_no_tiles() {
        assert!(Tile::new(&mut [], 0, 5, 5).grid(2, 2).is_empty());
        assert!(Tile::new(&mut [], 5, 0, 0).grid(2, 2).is_empty());
    }

    #[test]
    #[should_panic = "elements"]
    fn a_tile_does_not_exceed_its_slice() {
        Tile::new(&mut [0.0; 10], 3, 4, 4);
    }
}
