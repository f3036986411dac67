//! `tailorq chat`: a conversation on standard input.

use super::engine::EngineArgs;
use super::run::speed;
use super::sampling::SamplingArgs;
use crate::console::{self, Console};
use crate::interrupt;
use anyhow::Context;
use clap::Args;
use serde_json::json;
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use tailorq::{ChatMessage, ChatTemplate, OpenedModel};
use tailorq_runtime::{FinishReason, RuntimeError, Session, generate};

const COMMANDS: &str = "/reset  forget the conversation
/help   this list
/exit   leave (also Ctrl-D)
Ctrl-C interrupts an answer; at the prompt it leaves.
";

/// Tokens of a conversation where a GPU sets memory aside for it at the start; the model's context where that is shorter.
const LONGEST: usize = 16384;

/// Talk with a model, line by line.
///
/// Reads a message a line from standard input and streams the answers. What was said stays in the model's memory (its
/// keys and values), so each turn only costs its new tokens. `/help` lists the commands. With `--json` the answers go
/// to standard error and the whole conversation is printed at its end.
#[derive(Args)]
#[command(after_help = "Examples:
  tailorq chat HuggingFaceTB/SmolLM2-135M-Instruct
  tailorq chat ./my-model --system \"Answer in one sentence.\" --temperature 0
  printf 'Hello\\nAnd again?\\n' | tailorq chat model.gguf --json --quiet")]
pub struct ChatArgs {
    /// Directory, GGUF file or hub id; it needs a chat template
    model: String,
    /// System message at the beginning [default: what the model's template puts there]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn execute(args: &ChatArgs, console: &Console) -> anyhow::Result<()> {
    let opened = super::open(&args.model, console)?;
    let template = opened.template.as_ref().with_context(|| {
        format!("{} has no chat template, so it cannot chat; use `tailorq run --raw` to continue a text", args.model)
    })?;
    let engine = args.engine.open(&opened.model, console)?;
    let session = engine.session(&opened.model, LONGEST)?;
    let mut chat = Chat { args, console, opened: &opened, template, session, messages: Vec::new(), turns: 0 };
    chat.reset();
    let talks = io::stdin().is_terminal() && console::is_watched() && !console.quiet;
    if talks {
        console::write_err(&format!("Talking with {}. /help lists the commands.\n", args.model));
    }
    while let Some(line) = read_line(talks)? {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            "/reset" => chat.reset(),
            "/help" => console::write_err(COMMANDS),
            command if command.starts_with('/') && !command.contains(' ') => {
                console.note(&format!("there is no command {command}; /help lists those there are"));
            }
            text => chat.turn(text)?,
        }
    }
    console.object(&json!({ "model": args.model, "messages": chat.messages }))
}

/// The next line, `None` at the end of the input.
fn read_line(talks: bool) -> anyhow::Result<Option<String>> {
    if talks {
        console::write_err("> ");
    }
    let mut line = String::new();
    let n = interrupt::idle(|| io::stdin().read_line(&mut line)).context("cannot read from standard input")?;
    Ok((n > 0).then_some(line))
}

struct Chat<'a> {
    args: &'a ChatArgs,
    console: &'a Console,
    opened: &'a OpenedModel,
    template: &'a ChatTemplate,
    session: Session<'a>,
    messages: Vec<ChatMessage>,
    turns: u64,
}

impl Chat<'_> {
    /// Forgets everything but the system message.
    fn reset(&mut self) {
        self.messages.clear();
        self.session.reset();
        if let Some(text) = self.args.system.clone() {
            self.say("system", text);
        }
    }

    fn say(&mut self, role: &str, content: String) {
        self.messages.push(ChatMessage { role: role.to_owned(), content });
    }

    /// One message and its answer.
    fn turn(&mut self, text: &str) -> anyhow::Result<()> {
        self.say("user", text.to_owned());
        let ids = self.opened.tokenizer.encode(&self.template.render(&self.messages, true)?, false)?;
        // Templates may rewrite what was said before, so the common beginning decides what stays in memory.
        let kept = self.session.rewind_to(&ids);
        let options = self.args.sampling.options(self.turns);
        self.turns += 1;
        let console = self.console;
        let mut written = Ok(());
        let outcome = generate(
            &mut self.session,
            &self.opened.tokenizer,
            &ids[kept..],
            &options,
            &interrupt::requested,
            &mut |piece| {
                written = console.stream(piece.text);
                if written.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        );
        written?;
        match outcome {
            Ok(generation) => {
                console.stream("\n")?;
                console.detail(&speed(&generation));
                if generation.finish == FinishReason::ContextFull {
                    console.note("the model's context is full; /reset starts anew");
                }
                self.say("assistant", generation.text);
            }
            Err(error @ (RuntimeError::ContextFull { .. } | RuntimeError::Interrupted)) => {
                self.messages.pop();
                console.note(&format!("{error}; the message was dropped, /reset starts anew"));
            }
            Err(error) => return Err(error.into()),
        }
        interrupt::clear();
        Ok(())
    }
}
