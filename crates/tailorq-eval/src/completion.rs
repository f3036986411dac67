//! A prompt and its completion as tokens: what a model reads, and which of it is scored.

use crate::error::EvalError;
use crate::task::Subject;
use tailorq_model::{ChatMessage, ChatTemplate};

/// Templates that ask for the date get 26 July 2024 (which those of Llama 3 assume when they get none), so that a score
/// is the same on every day.
const TEMPLATE_TIME: u64 = 1_721_952_000;

/// A user's turn.
pub(crate) fn user(content: impl Into<String>) -> ChatMessage {
    ChatMessage { role: "user".to_owned(), content: content.into() }
}

/// The tokens after which the assistant speaks: rendered by the template, or the turns as lines where there is none.
pub(crate) fn chat_prompt(subject: &Subject<'_>, messages: &[ChatMessage]) -> Result<Vec<u32>, EvalError> {
    let (text, special) = rendered_prompt(subject.template, messages)?;
    Ok(subject.tokenizer.encode(&text, special)?)
}

/// The text after which the assistant speaks, and whether the tokenizer adds its own special tokens (a template writes
/// them itself).
pub(crate) fn rendered_prompt(
    template: Option<&ChatTemplate>,
    messages: &[ChatMessage],
) -> Result<(String, bool), EvalError> {
    Ok(match template {
        Some(template) => (template.render_at(messages, true, TEMPLATE_TIME)?, false),
        None => (messages.iter().map(|m| m.content.as_str()).chain([""]).collect::<Vec<_>>().join("\n"), true),
    })
}

/// What is read and what of it is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scored {
    /// Tokens before the completion.
    pub(crate) prompt: Vec<u32>,
    /// The completion, with the token that ends the turn if the template writes one.
    pub(crate) completion: Vec<u32>,
}

/// The tokens of a conversation's last turn, which is the assistant's, after those of the turns before.
///
/// Everything that the template writes after the generation prompt belongs to the completion, up to and with the first
/// token that ends a generation; what follows it (a line break, as a rule) no model is ever asked for.
pub(crate) fn scored_completion(
    subject: &Subject<'_>,
    before: &[ChatMessage],
    completion: &str,
) -> Result<Scored, EvalError> {
    let (prompt, special) = rendered_prompt(subject.template, before)?;
    let whole = match subject.template {
        Some(template) => {
            let last = ChatMessage { role: "assistant".to_owned(), content: completion.to_owned() };
            template.render_at(&[before, &[last]].concat(), false, TEMPLATE_TIME)?
        }
        None => format!("{prompt}{completion}"),
    };
    // A template that writes more before an open turn than before a finished one: the completion follows the prompt.
    let rest = whole.strip_prefix(prompt.as_str()).unwrap_or(completion);
    let prompt_ids = subject.tokenizer.encode(&prompt, special)?;
    let together = subject.tokenizer.encode(&format!("{prompt}{rest}"), special)?;
    let mut completion = match together.strip_prefix(&prompt_ids[..]) {
        Some(completion) => completion.to_vec(),
        // A token lies across the border, which generation never sees: the prompt keeps its tokens.
        None => subject.tokenizer.encode(rest, false)?,
    };
    if let Some(end) = completion.iter().position(|id| subject.tokenizer.eos.contains(id)) {
        completion.truncate(end + 1);
    }
    Ok(Scored { prompt: prompt_ids, completion })
}
