//! Comparisons: methods at budgets and seeds on one model and task, with the controls that make a claim believable.
//!
//! An [`Experiment`] becomes [`Arms`] (each recipe once), which are quantized and measured one after the other. What is
//! finished lies in the output directory under the hash of its recipe, so that a stopped comparison goes on, and one
//! whose file has grown runs only what is new:
//!
//! ```text
//! arms/KEY/result.json   a measured arm        arms/KEY/model/   its artifact, until it is measured
//! surveys/, scores/      shared between arms   cache/            finished items of evaluations
//! results.json, results.md, results.svg, timings.json
//! ```

mod arms;
mod chart;
mod controls;
mod error;
mod evaluate;
mod experiment;
mod general;
mod progress;
mod results;
mod run;
mod shared;
mod table;

pub use arms::{Arm, Arms, Row};
pub use error::CompareError;
pub use evaluate::Metric;
pub use experiment::{Budgets, CalibrationTable, EvaluationTable, Experiment, GeneralTable, MethodTable};
pub use results::{Compared, MeasuredArm, Original, Results, RowMetric, RowResult};
pub use run::{Finished, Planned, compare, plan};
