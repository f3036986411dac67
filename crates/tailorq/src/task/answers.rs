//! TAQO's task metric: half exact match, half F1 of greedy answers against the items' completions.

use crate::error::PipelineError;
use crate::observer::Observer;
use std::ops::ControlFlow;
use tailorq_eval::{squad_normalized, token_f1};
use tailorq_kernels::Device;
use tailorq_model::{Model, OpenedModel, Tokenizer};
use tailorq_quant::QuantError;
use tailorq_quant::survey::{Metric, SurveySample};
use tailorq_runtime::{BatchOptions, CompletionRequest, RuntimeError, generate_batch};

/// Tokens that an answer may be longer than its gold.
const SLACK: usize = 8;

/// The metric over some items.
pub(crate) struct AnswerMetric<'a> {
    device: &'a dyn Device,
    tokenizer: &'a Tokenizer,
    observer: &'a dyn Observer,
    requests: Vec<CompletionRequest>,
    golds: Vec<String>,
}

impl<'a> AnswerMetric<'a> {
    /// The items that have a prompt and a completion; it is an error when none has.
    pub(crate) fn new(
        (device, opened): (&'a dyn Device, &'a OpenedModel),
        items: &[SurveySample],
        observer: &'a dyn Observer,
    ) -> Result<Self, PipelineError> {
        let (tokenizer, mut requests, mut golds) = (&opened.tokenizer, Vec::new(), Vec::new());
        let context = opened.model.config.max_positions;
        for item in items {
            let Some(n) = item.scored.as_ref().and_then(|flags| flags.iter().position(|&f| f)) else { continue };
            if n == 0 {
                continue;
            }
            let (prompt, gold) = item.ids.split_at(n);
            let max_tokens = (gold.len() + SLACK).min(context - 1);
            requests.push(CompletionRequest { prompt: prompt.to_vec(), max_tokens, stop: Vec::new() });
            golds.push(tokenizer.decode(gold, true)?);
        }
        if requests.is_empty() {
            return Err(PipelineError::Settings(
                "answers are measured against completions, and no item has one: give JSONL with prompt and completion"
                    .into(),
            ));
        }
        Ok(AnswerMetric { device, tokenizer, observer, requests, golds })
    }
}

impl Metric for AnswerMetric<'_> {
    fn score(&self, model: &Model) -> Result<f64, QuantError> {
        let mut watch = |_: tailorq_runtime::BatchProgress<'_>| {
            if self.observer.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let options = BatchOptions::for_device(self.device);
        let found = generate_batch(model, self.tokenizer, self.device, &self.requests, &options, &mut watch);
        let found = found.map_err(|error| match error {
            RuntimeError::Interrupted => QuantError::Interrupted,
            other => QuantError::Metric(other.to_string()),
        })?;
        let score = |(answer, gold): (&tailorq_runtime::Completion, &String)| {
            let exact = squad_normalized(&answer.text) == squad_normalized(gold);
            0.5 * f64::from(u8::from(exact)) + 0.5 * token_f1(&answer.text, gold)
        };
        Ok(found.iter().zip(&self.golds).map(score).sum::<f64>() / self.golds.len() as f64)
    }
}
