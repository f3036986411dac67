//! `tailorq run`: one prompt, one answer.

use super::engine::EngineArgs;
use super::sampling::SamplingArgs;
use crate::console::Console;
use crate::interrupt;
use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::json;
use std::io::Read;
use std::ops::ControlFlow;
use tailorq::{ChatMessage, OpenedModel};
use tailorq_runtime::{FinishReason, Generation, generate};

/// Answer one prompt, as a stream of text.
///
/// Where the model has a chat template, the prompt is sent as a user's message; `--raw` continues the text as it is.
/// The answer ends when the model says so, at a `--stop` text, or after `--max-tokens`.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq run HuggingFaceTB/SmolLM2-135M-Instruct \"Why is the sky blue?\"
  tailorq run ./my-model --raw --temperature 0 --max-tokens 32 \"The three primary colours are\"
  cat question.txt | tailorq run model.gguf - --json")]
pub struct RunArgs {
    /// Directory, GGUF file or hub id
    model: String,
    /// The prompt; `-` reads it from standard input
    #[arg(allow_hyphen_values = true)]
    prompt: String,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// System message put before the prompt [default: what the model's template puts there]
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn execute(args: &RunArgs, console: &Console) -> anyhow::Result<()> {
    let prompt = read_prompt(&args.prompt)?;
    ensure!(!prompt.is_empty(), "the prompt is empty: give a text to answer or to continue");
    let opened = super::open(&args.model, console)?;
    let ids = prompt_tokens(&opened, args, &prompt)?;
    let options = args.sampling.options(0);
    let engine = args.engine.open(&opened.model, console)?;
    let mut session = engine.session(&opened.model, ids.len() + options.max_tokens)?;
    let mut written = Ok(());
    let generation = generate(
        &mut session,
        &opened.tokenizer,
        &ids,
        &options,
        &interrupt::requested,
        // With --json the text comes in the object.
        &mut |piece| {
            written = console.text(piece.text);
            if written.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    )?;
    written?;
    finish(&args.model, &generation, console)
}

fn read_prompt(prompt: &str) -> anyhow::Result<String> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let mut text = String::new();
    interrupt::idle(|| std::io::stdin().read_to_string(&mut text))
        .context("cannot read the prompt from standard input")?;
    Ok(text)
}

fn prompt_tokens(opened: &OpenedModel, args: &RunArgs, prompt: &str) -> anyhow::Result<Vec<u32>> {
    let Some(template) = opened.template.as_ref().filter(|_| !args.raw) else {
        ensure!(args.system.is_none(), "this model has no chat template, so there is no place for a system message");
        return Ok(opened.tokenizer.encode(prompt, true)?);
    };
    let message = |role: &str, content: &str| ChatMessage { role: role.to_owned(), content: content.to_owned() };
    let system = args.system.iter().map(|text| message("system", text));
    let messages: Vec<ChatMessage> = system.chain([message("user", prompt)]).collect();
    // The template writes the BOS token itself where the model wants one.
    Ok(opened.tokenizer.encode(&template.render(&messages, true)?, false)?)
}

fn finish(model: &str, generation: &Generation, console: &Console) -> anyhow::Result<()> {
    console.text("\n")?;
    console.object(&json!({
        "model": model,
        "text": generation.text,
        "tokens": generation.tokens.len(),
        "token_ids": generation.tokens,
        "tokens_per_second": generation.tokens_per_second(),
        "prompt_tokens": generation.prompt_tokens,
        "prefill_seconds": generation.prefill.as_secs_f64(),
        "decode_seconds": generation.decode.as_secs_f64(),
        "finish_reason": generation.finish.name(),
    }))?;
    console.detail(&speed(generation));
    match generation.finish {
        FinishReason::Interrupted => bail!("interrupted"),
        FinishReason::ContextFull => console.note("stopped because the model's context is full"),
        _ => {}
    }
    Ok(())
}

/// Speed and reason of the end, for people.
pub fn speed(generation: &Generation) -> String {
    format!(
        "prompt: {} tokens in {:.2} s; answer: {} tokens in {:.2} s, {:.1} tokens/s ({})",
        generation.prompt_tokens,
        generation.prefill.as_secs_f64(),
        generation.tokens.len(),
        generation.decode.as_secs_f64(),
        generation.tokens_per_second(),
        generation.finish.name()
    )
}
