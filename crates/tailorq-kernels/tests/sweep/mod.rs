//! Operations of the devices that `devices()` of the test names, against the scalar reference.

mod backward;
mod forward;

use super::{devices, inputs};
