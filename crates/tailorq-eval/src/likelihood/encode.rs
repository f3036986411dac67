//! From texts to tokens, by the harness' rules (`_encode_pair` and `_loglikelihood_tokens`).

use crate::error::EvalError;
use crate::items::is_python_space;
use crate::rolling::prefix_token;
use crate::task::Subject;

/// A continuation and what it comes after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// May be empty.
    pub(crate) context: String,
    /// With the space that parts it from the context.
    pub(crate) continuation: String,
}

/// Tokens of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// What comes before; at least one token.
    pub(crate) context: Vec<u32>,
    /// What is scored; at least one token.
    pub(crate) continuation: Vec<u32>,
}

/// The requests of an item, ready for the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PreparedItem {
    /// Input tokens with which all requests begin.
    pub(crate) shared: Vec<u32>,
    /// The requests.
    pub(crate) branches: Vec<Branch>,
    /// Requests that lost the beginning of their context.
    pub(crate) shortened: usize,
}

/// What is a request's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Branch {
    /// Input tokens after the shared ones.
    pub(crate) tail: Vec<u32>,
    /// Tokens that are scored: the last of them follows the last input.
    pub(crate) targets: Vec<u32>,
}

impl PreparedItem {
    /// The input position after which the first target of a branch stands.
    pub(crate) fn first_row(&self, branch: &Branch) -> usize {
        self.shared.len() + branch.tail.len() - branch.targets.len()
    }

    /// Tokens that the model reads for the item when nothing is known yet.
    pub(crate) fn n_inputs(&self) -> usize {
        self.shared.len() + self.branches.iter().map(|b| b.tail.len()).sum::<usize>()
    }
}

/// Encodes the requests of the item `index` and finds what they share.
pub(crate) fn prepare(
    subject: &Subject<'_>,
    task: &'static str,
    index: usize,
    requests: &[Request],
) -> Result<PreparedItem, EvalError> {
    let max_length = subject.model.config.max_positions;
    let mut inputs: Vec<(Vec<u32>, Vec<u32>)> = Vec::with_capacity(requests.len());
    let mut shortened = 0;
    for request in requests {
        let Encoded { context, continuation } = encode(subject, request)?;
        if continuation.is_empty() || continuation.len() > max_length {
            return Err(EvalError::Unscorable { task, index, tokens: continuation.len(), limit: max_length });
        }
        let mut whole = [context, continuation.clone()].concat();
        crate::scored::check_tokens(subject, &whole)?;
        shortened += usize::from(whole.len() > max_length + 1);
        whole.drain(..whole.len().saturating_sub(max_length + 1));
        whole.pop();
        inputs.push((whole, continuation));
    }
    let first = inputs.first().map_or(&[][..], |(input, _)| input);
    let common = |input: &[u32]| first.iter().zip(input).take_while(|(a, b)| a == b).count();
    let n_shared = inputs.iter().map(|(input, _)| common(input)).min().unwrap_or(0);
    let shared = first[..n_shared].to_vec();
    let branches =
        inputs.into_iter().map(|(input, targets)| Branch { tail: input[n_shared..].to_vec(), targets }).collect();
    Ok(PreparedItem { shared, branches, shortened })
}

/// Context and continuation as tokens: the continuation is what the tokens of both together have beyond the number of
/// tokens of the context, so that it is tokenized where it stands.
pub(crate) fn encode(subject: &Subject<'_>, request: &Request) -> Result<Encoded, EvalError> {
    if request.context.is_empty() {
        return encode_alone(subject, &request.continuation);
    }
    let context = request.context.trim_end_matches(is_python_space);
    let spaces = &request.context[context.len()..];
    let whole = tokens(subject, &[context, spaces, &request.continuation].concat())?;
    let mut context = tokens(subject, context)?;
    let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
    if context.is_empty() {
        // Only white space stood before, and the tokenizer begins texts with no token of its own.
        context.push(prefix(subject)?);
    }
    Ok(Encoded { context, continuation })
}

/// Nothing comes before: the prefix token takes the context's place, or the first token if it is that one already.
fn encode_alone(subject: &Subject<'_>, continuation: &str) -> Result<Encoded, EvalError> {
    let prefix = prefix(subject)?;
    let mut continuation = subject.tokenizer.encode(continuation, false)?;
    if continuation.first() == Some(&prefix) {
        continuation.remove(0);
    }
    Ok(Encoded { context: vec![prefix], continuation })
}

fn prefix(subject: &Subject<'_>) -> Result<u32, EvalError> {
    prefix_token(subject.tokenizer).ok_or_else(|| EvalError::NoPrefixToken { model: subject.name.to_owned() })
}

/// Tokens with the tokenizer's own special ones, unless the text already begins with the one that would be added.
fn tokens(subject: &Subject<'_>, text: &str) -> Result<Vec<u32>, EvalError> {
    let prefix = prefix_token(subject.tokenizer).and_then(|id| subject.tokenizer.token(id));
    let special = !prefix.is_some_and(|prefix| !prefix.is_empty() && text.starts_with(&prefix));
    Ok(subject.tokenizer.encode(text, special)?)
}
