//! The nouns of tailorq: dtypes, matrices, the packed matrix and its layouts.
//!
//! Nothing here computes beyond what defines a data type: the scalar unpack of a layout *is* the definition of that
//! layout, and every fast kernel is tested against it. Matrices are `[rows, cols]` row-major with `rows` = outputs and
//! `cols` = inputs of a linear.
#![forbid(unsafe_code)]

mod bytes;
mod corrections;
mod dtype;
mod error;
mod layer;
mod layout;
mod matrix;
mod mean4;
mod packed;
mod rng;
mod scales;
mod spec;
mod tilemap;
mod tiles;
mod transform;
mod weight;

pub use bytes::SharedBytes;
pub use corrections::{ElementCorrections, ElementParts};
pub use dtype::DType;
pub use error::PackError;
pub use layer::{InputGroup, LayerId, Slot};
pub use layout::{Bits, Group, Layout, TILE};
pub use matrix::{Matrix, Remote};
pub use mean4::{Mean4, MeanTile};
pub use packed::{PackedMatrix, PackedParts};
pub use rng::Rng;
pub use scales::{ScaleBits, Scales};
pub use spec::{CorrectionSpec, PackedSpec, TileSpec};
pub use tilemap::{TileMap, TilePlace};
pub use tiles::{TileBits, TileCorrection, TileCorrections, TileParts};
pub use transform::{InputTransform, TransformKind, TransformSpec};
pub use weight::{DenseRows, ReadRows, RowOrder, Weight};
