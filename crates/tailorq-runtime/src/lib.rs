//! The theatre: a model on stage. Sessions hold a sequence and its keys and values, samplers choose the next token,
//! [`generate`] plays a continuation and hands out its text piece by piece, [`generate_batch`] plays many at once.
//!
//! A model runs on a device operation by operation, or, where a device decodes by itself, on its [`Decoder`]; what is generated is
//! put together by the same code. Nothing here knows how a model was quantized.

mod awake;
mod batch;
mod bench;
mod decoded;
mod error;
mod generate;
mod sampler;
mod session;
mod text;

pub use awake::awake_on;
pub use batch::{BatchOptions, BatchProgress, Completion, CompletionRequest, PREFIX_CHUNK, generate_batch};
pub use bench::{
    BENCH_START, BenchOptions, BenchReport, BenchStage, OnStage, Spread, StepBytes, bench, bench_decoding,
};
pub use decoded::generate_batch_decoding;
pub use error::RuntimeError;
pub use generate::{FinishReason, Generation, GenerationOptions, Piece, generate};
pub use sampler::{Sampler, SamplerOptions};
pub use session::{PREFILL_CHUNK, Session};
pub use tailorq_kernels::{Device, KvType};
pub use tailorq_model::{Decoder, DecoderSize, Decoders};
pub use text::{StopFinder, TextStream};
