//! What can go wrong while a model is scored.

use crate::sql::SqlError;
use std::path::PathBuf;
use tailorq_model::ModelError;
use tailorq_runtime::RuntimeError;
use thiserror::Error;

/// Errors of tasks and metrics.
#[derive(Debug, Error)]
pub enum EvalError {
    /// A task needs an input that was not given.
    #[error("task {task} needs {input}")]
    MissingInput {
        /// The task.
        task: &'static str,
        /// What it needs, in the words of the command line.
        input: &'static str,
    },
    /// No task has this name.
    #[error("there is no task '{name}' (tasks: {known})")]
    UnknownTask {
        /// The name given.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// An option that would change nothing.
    #[error("{option} is read by none of the tasks asked for ({tasks}): leave it out (tasks that read it: {readers})")]
    UnreadOption {
        /// The option as it was given.
        option: &'static str,
        /// The tasks asked for.
        tasks: String,
        /// Those that would read it.
        readers: String,
    },
    /// A data set of the hub that could not be read.
    #[error(
        "the {split} items of {repo}{config} could not be read from the hub: {source}; or give them as {name}/{split}.jsonl with --data DIR"
    )]
    HubData {
        /// Which items.
        split: String,
        /// The data set.
        repo: String,
        /// Which part of it, after a space.
        config: String,
        /// Its folder under `--data`.
        name: String,
        /// Why; boxed, because this variant would make every result of the crate large.
        source: Box<ModelError>,
    },
    /// An option outside its range.
    #[error("{option} is {value}: {remedy}")]
    BadOption {
        /// The option's name.
        option: &'static str,
        /// What was given.
        value: usize,
        /// What may be given.
        remedy: String,
    },
    /// The text has no token to score.
    #[error("the text has {tokens} tokens: perplexity needs at least 2, because the first is never scored")]
    TextTooShort {
        /// Tokens of the text.
        tokens: usize,
    },
    /// A token that the model does not have.
    #[error(
        "token {id} at position {position} does not exist in {model}, which has {vocab} words: its tokenizer belongs to another model"
    )]
    UnknownToken {
        /// The id.
        id: u32,
        /// Its place in the text.
        position: usize,
        /// The model.
        model: String,
        /// Words of the model.
        vocab: usize,
    },
    /// Two models that cannot be compared word by word.
    #[error(
        "{model} has {vocab} words and the reference {reference} has {reference_vocab}: a divergence needs the same vocabulary"
    )]
    VocabularyDiffers {
        /// The model.
        model: String,
        /// Its words.
        vocab: usize,
        /// The reference.
        reference: String,
        /// Its words.
        reference_vocab: usize,
    },
    /// Two tokenizers that read the text differently.
    #[error(
        "{model} and the reference {reference} tokenize the text differently from token {position} on: a divergence needs the same tokens"
    )]
    TokensDiffer {
        /// The model.
        model: String,
        /// The reference.
        reference: String,
        /// First position at which they differ.
        position: usize,
    },
    /// The model computed NaN or infinity.
    #[error("{model} computes no finite probabilities in window {window}: its weights are damaged or overflow")]
    NotFinite {
        /// The model.
        model: String,
        /// The window, from 0.
        window: usize,
    },
    /// The model computed NaN or infinity for an item.
    #[error("{model} computes no finite probabilities for item {index}: its weights are damaged or overflow")]
    NotFiniteItem {
        /// The model.
        model: String,
        /// The item, from 0.
        index: usize,
    },
    /// A choice that has no token or more than the model can read.
    #[error("task {task}: a choice of item {index} has {tokens} tokens, and 1 to {limit} can be scored")]
    Unscorable {
        /// The task.
        task: &'static str,
        /// The item, from 0.
        index: usize,
        /// Tokens of the choice.
        tokens: usize,
        /// The model's context.
        limit: usize,
    },
    /// A text with nothing before it needs a token to begin after.
    #[error("{model} has neither a BOS nor an EOS token, and the first token of a document has to follow one of them")]
    NoPrefixToken {
        /// The model.
        model: String,
    },
    /// A chat is asked for, and the model has no template for one.
    #[error("{model} has no chat template: leave out --apply-chat-template, or use a model that was trained on chats")]
    NoTemplate {
        /// The model.
        model: String,
    },
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A file of items that cannot be used.
    #[error("{path} {problem}", path = path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The model was made with a test item at hand.
    #[error(
        "item {index} of task {task} ({path} line {line}) was a calibration item of {model}{more}: its score would flatter \
         the model. Test on other items, or score all of them with --allow-calibration-items",
        path = path.display(),
        more = if *others == 0 { String::new() } else { format!(", and so were {others} more") }
    )]
    CalibrationItem {
        /// The task.
        task: &'static str,
        /// The file of the item.
        path: PathBuf,
        /// Its line there, from 1.
        line: usize,
        /// The item, from 0.
        index: usize,
        /// Further items of which the same is true.
        others: usize,
        /// The model.
        model: String,
    },
    /// A file of finished items that cannot be used.
    #[error("{path} {problem}", path = path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do about it.
        problem: String,
    },
    /// A database or a gold query is of no use.
    #[error(transparent)]
    Sql(#[from] SqlError),
    /// Tokenizing failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Running the model failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}
