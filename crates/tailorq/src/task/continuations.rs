//! The model's own answers to prompts that have none: what it says greedily, as samples whose answer is what counts.

use crate::error::PipelineError;
use crate::observer::Observer;
use std::ops::ControlFlow;
use tailorq_kernels::Device;
use tailorq_model::OpenedModel;
use tailorq_quant::survey::SurveySample;
use tailorq_runtime::{BatchOptions, Completion, CompletionRequest, FinishReason, RuntimeError, generate_batch};

/// Each prompt with up to `tokens` tokens that the model goes on with, which alone are scored. Prompts hold a token at least.
/// One that fills the context loses tokens at its start.
pub(crate) fn continue_prompts(
    (device, opened): (&dyn Device, &OpenedModel),
    prompts: &[Vec<u32>],
    tokens: usize,
    observer: &dyn Observer,
) -> Result<Vec<SurveySample>, PipelineError> {
    let (model, tokenizer) = (&opened.model, &opened.tokenizer);
    let max_tokens = model.config.max_positions.saturating_sub(1).min(tokens);
    let request = |p: &Vec<u32>| CompletionRequest { prompt: p.clone(), max_tokens, stop: Vec::new() };
    let requests: Vec<CompletionRequest> = prompts.iter().map(request).collect();
    observer.stage("continuing the prompts", requests.len() as u64);
    let found = generate_batch(model, tokenizer, device, &requests, &BatchOptions::for_device(device), &mut |p| {
        observer.progress(p.done as u64, "");
        if observer.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let whole = |(prompt, done): (&Vec<u32>, Completion)| {
        let mut ids = prompt[done.cut_tokens..].to_vec();
        let n_prompt = ids.len();
        ids.extend(done.tokens);
        // That the model stops is a prediction as well.
        ids.extend(tokenizer.eos.first().filter(|_| done.finish == FinishReason::EndOfSequence));
        SurveySample { scored: Some((0..ids.len()).map(|t| t >= n_prompt).collect()), ids }
    };
    Ok(prompts.iter().zip(found.map_err(runtime_error)?).map(whole).collect())
}

fn runtime_error(error: RuntimeError) -> PipelineError {
    match error {
        RuntimeError::Interrupted => PipelineError::Cancelled,
        other => PipelineError::Settings(format!("the prompts could not be continued: {other}")),
    }
}
