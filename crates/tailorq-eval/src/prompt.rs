//! What stands before an answer: a description, worked examples, the question; as plain text or as a conversation.
//!
//! As lm-evaluation-harness builds it (`ConfigurableTask.fewshot_context`): question and answer are a space apart, examples end
//! in an empty line. In a conversation the description is the system's turn, examples and question are one user's turn
//! or, if asked for, turns of their own, without what parts them in the text.

use crate::completion::{rendered_prompt, user};
use crate::error::EvalError;
use crate::task::{Subject, TaskOptions};
use tailorq_model::{ChatMessage, ChatTemplate};

/// Between a question and its answer.
pub(crate) const ANSWER_DELIMITER: &str = " ";
/// After an example.
const EXAMPLE_DELIMITER: &str = "\n\n";

/// How a task whose prompts are text asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptStyle {
    /// By text, as a base model continues it.
    #[default]
    Text,
    /// Through the chat template, examples and question in one user's turn (`--apply_chat_template --fewshot_as_multiturn
    /// false` of the harness).
    Chat,
    /// The same with turns for every example (the harness' default beside `--apply_chat_template`).
    ChatOfTurns,
}

/// How a model is asked.
#[derive(Clone, Copy)]
pub(crate) struct Asker<'a> {
    /// Its name, for errors.
    pub(crate) model: &'a str,
    /// Its chat template.
    pub(crate) template: Option<&'a ChatTemplate>,
    /// How.
    pub(crate) style: PromptStyle,
}

impl<'a> Asker<'a> {
    pub(crate) fn new(subject: &Subject<'a>, options: &TaskOptions<'_>) -> Self {
        Asker { model: subject.name, template: subject.template, style: options.items.style }
    }
}

/// An example: what is asked, and the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shot {
    /// Without what parts it from the answer.
    pub(crate) asked: String,
    /// Without what follows.
    pub(crate) answer: String,
}

impl Shot {
    /// The example as text before another question.
    pub(crate) fn text(&self) -> String {
        [&self.asked, ANSWER_DELIMITER, &self.answer, EXAMPLE_DELIMITER].concat()
    }
}

/// What comes before a question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lead {
    /// May be empty.
    pub(crate) description: String,
    /// The examples.
    pub(crate) shots: Vec<Shot>,
}

impl Lead {
    fn shots_text(&self) -> String {
        self.shots.iter().map(Shot::text).collect()
    }

    /// Lead and question as text.
    pub(crate) fn text(&self, question: &str) -> String {
        [&self.description, &self.shots_text()[..], question].concat()
    }

    /// Lead and question as the turns before the answer.
    pub(crate) fn turns(&self, question: &str, with_turns_for_shots: bool) -> Vec<ChatMessage> {
        let turn = |role: &str, content: &str| ChatMessage { role: role.to_owned(), content: content.to_owned() };
        let mut turns = Vec::new();
        if !self.description.is_empty() {
            turns.push(turn("system", &self.description));
        }
        if with_turns_for_shots {
            turns.extend(self.shots.iter().flat_map(|s| [turn("user", &s.asked), turn("assistant", &s.answer)]));
            turns.push(user(question));
        } else {
            turns.push(user(self.shots_text() + question));
        }
        turns
    }

    /// What a continuation is scored after, and what parts it from that: nothing after a template's own text.
    pub(crate) fn context(&self, asker: Asker<'_>, question: &str) -> Result<(String, &'static str), EvalError> {
        if asker.style == PromptStyle::Text {
            return Ok((self.text(question), ANSWER_DELIMITER));
        }
        if asker.template.is_none() {
            return Err(EvalError::NoTemplate { model: asker.model.to_owned() });
        }
        let turns = self.turns(question, asker.style == PromptStyle::ChatOfTurns);
        let rendered = match rendered_prompt(asker.template, &turns) {
            // A template that knows no system's turn: the harness leaves it out.
            Err(_) if turns[0].role == "system" => rendered_prompt(asker.template, &turns[1..])?,
            rendered => rendered?,
        };
        Ok((rendered.0, ""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lead() -> Lead {
        let shot = |asked: &str, answer: &str| Shot { asked: asked.to_owned(), answer: answer.to_owned() };
        Lead { description: "About. \n\n".to_owned(), shots: vec![shot("Q1\nAnswer:", "A"), shot("Q2\nAnswer:", "B")] }
    }

    /// What `fewshot_context` of lm-evaluation-harness 0.4.13 gives for the same fields.
    #[test]
    fn text_and_turns_are_the_harness_ones() {
        let lead = lead();
        assert_eq!(lead.text("Q3\nAnswer:"), "About. \n\nQ1\nAnswer: A\n\nQ2\nAnswer: B\n\nQ3\nAnswer:");
        let turns = |multiturn| -> Vec<(String, String)> {
            lead.turns("Q3\nAnswer:", multiturn).into_iter().map(|t| (t.role, t.content)).collect()
        };
        let of = |turns: &[(&str, &str)]| -> Vec<(String, String)> {
            turns.iter().map(|(r, c)| ((*r).to_owned(), (*c).to_owned())).collect()
        };
        let text = "Q1\nAnswer: A\n\nQ2\nAnswer: B\n\nQ3\nAnswer:";
        assert_eq!(turns(false), of(&[("system", "About. \n\n"), ("user", text)]));
        assert_eq!(
            turns(true),
            of(&[
                ("system", "About. \n\n"),
                ("user", "Q1\nAnswer:"),
                ("assistant", "A"),
                ("user", "Q2\nAnswer:"),
                ("assistant", "B"),
                ("user", "Q3\nAnswer:"),
            ])
        );
        let dir = tempfile::tempdir().unwrap();
        tailorq_model::testing::TinyModel::new("llama", 1).unwrap().write_directory(dir.path()).unwrap();
        let opened = tailorq_model::open(dir.path().to_str().unwrap()).unwrap();
        let asker = |style, template| Asker { model: "tiny", template, style };
        let template = opened.template.as_ref();
        let user = |text: &str| format!("<|im_start|>user\n{text}<|im_end|>\n");
        let (context, delimiter) = lead.context(asker(PromptStyle::Chat, template), "Q3\nAnswer:").unwrap();
        let system = "<|im_start|>system\nAbout. \n\n<|im_end|>\n";
        assert_eq!(context, format!("{system}{}<|im_start|>assistant\n", user(text)));
        assert_eq!(delimiter, "", "an answer begins its turn without a space");
        let (context, _) = lead.context(asker(PromptStyle::ChatOfTurns, template), "Q3\nAnswer:").unwrap();
        let first = format!("{system}{}<|im_start|>assistant\nA<|im_end|>\n", user("Q1\nAnswer:"));
        assert!(context.starts_with(&first), "{context}");
        assert_eq!(lead.context(asker(PromptStyle::Text, None), "Q3\nAnswer:").unwrap().1, " ");
        let message = lead.context(asker(PromptStyle::Chat, None), "Q").unwrap_err().to_string();
        assert!(message.contains("tiny") && message.contains("--apply-chat-template"), "{message}");
        let bare = Lead::default().turns("Q", false);
        assert_eq!((bare.len(), bare[0].role.as_str()), (1, "user"));
    }
}
