//! The backward operations: gradients of linears, norms, attention, the gated unit and the vocabulary's softmax.

pub(super) mod attention;
pub(super) mod elementwise;
pub(super) mod linear;
pub(super) mod logits;
