//! GSM8K (Cobbe et al. 2021) by generation, in the harness' two ways and through the chat template.

use super::gsm8k_examples::WEI;
use super::{Judgement, Prompt};
use crate::answers::{INVALID, after_hashes, flexible, last_number, normalized_number, parse_number, the_answer_is};
use crate::completion::user;
use crate::prompt::{Lead, PromptStyle, Shot};

/// Which of the ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// `gsm8k`: five random training items before the question.
    FiveShot,
    /// `gsm8k_cot`: the eight examples of Wei et al. before it.
    ChainOfThought,
    /// `gsm8k_chat`: the question alone, as a user's turn.
    Chat,
}

impl Style {
    /// The harness' stop strings; a chat ends where the model ends its turn.
    pub(crate) fn stop(self) -> &'static [&'static str] {
        match self {
            Style::FiveShot => &["Question:", "</s>", "<|im_end|>"],
            Style::ChainOfThought => &["Q:", "</s>", "<|im_end|>"],
            Style::Chat => &[],
        }
    }

    /// Examples before a question, where so many are asked for.
    pub(crate) fn n_shots(self, asked_for: Option<usize>) -> usize {
        match self {
            Style::FiveShot => asked_for.unwrap_or(5),
            Style::ChainOfThought => WEI.len(),
            Style::Chat => 0,
        }
    }

    /// The prompt; `shots` are questions and answers of training items, which only [`Style::FiveShot`] uses.
    pub(crate) fn prompt(self, shots: &[(&str, &str)], question: &str, style: PromptStyle) -> Prompt {
        let (shots, [ask, answer]) = match self {
            Style::FiveShot => (shots, ["Question: ", "\nAnswer:"]),
            Style::ChainOfThought => (&WEI[..], ["Q: ", "\nA:"]),
            Style::Chat => return Prompt::Chat(vec![user(question)]),
        };
        let asked = |question: &str| [ask, question, answer].concat();
        let shot =
            |(question, solution): &(&str, &str)| Shot { asked: asked(question), answer: (*solution).to_owned() };
        let lead = Lead { description: String::new(), shots: shots.iter().map(shot).collect() };
        match style {
            PromptStyle::Text => Prompt::Text(lead.text(&asked(question))),
            PromptStyle::Chat => Prompt::Chat(lead.turns(&asked(question), false)),
            PromptStyle::ChatOfTurns => Prompt::Chat(lead.turns(&asked(question), true)),
        }
    }

    /// Judges a completion by the item's `answer`, which ends in `#### N`.
    pub(crate) fn judge(self, completion: &str, answer: &str) -> Judgement {
        let gold = match self {
            Style::FiveShot => answer,
            Style::ChainOfThought | Style::Chat => answer.rsplit("####").next().unwrap_or(answer).trim(),
        };
        let matches = |prediction: &str| f64::from(u8::from(normalized_number(prediction) == normalized_number(gold)));
        let flexible = flexible(completion);
        let loose = ("exact_match,flexible-extract", matches(&flexible));
        let (prediction, first) = match self {
            Style::Chat => {
                let number = last_number(completion);
                let is_right = number.is_some() && number == parse_number(gold);
                let prediction = number.map_or_else(|| INVALID.to_owned(), |n| n.to_string());
                (prediction, ("exact_match,last-number", f64::from(u8::from(is_right))))
            }
            Style::FiveShot | Style::ChainOfThought => {
                let cut = if self == Style::FiveShot { after_hashes } else { the_answer_is };
                let strict = cut(completion);
                let score = ("exact_match,strict-match", matches(&strict));
                (strict, score)
            }
        };
        Judgement { prediction, gold: normalized_number(gold), scores: vec![first, loose] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "It is 5*2=<<5*2=10>>10 thousand.\n#### 10,000";

    fn scores(style: Style, completion: &str) -> [f64; 2] {
        let judged = style.judge(completion, ANSWER);
        assert_eq!(judged.gold, "10000");
        [judged.scores[0].1, judged.scores[1].1]
    }

    #[test]
    fn prompts_are_the_harness_ones() {
        let shots = [("Q1?", "A <<1+1=2>>\n#### 2"), ("Q2?", "#### 3")];
        let Prompt::Text(text) = Style::FiveShot.prompt(&shots, "Q3?", PromptStyle::Text) else {
            panic!("five-shot is text")
        };
        assert_eq!(
            text,
            "Question: Q1?\nAnswer: A <<1+1=2>>\n#### 2\n\nQuestion: Q2?\nAnswer: #### 3\n\nQuestion: Q3?\nAnswer:"
        );
        let Prompt::Text(text) = Style::ChainOfThought.prompt(&[], "Why?", PromptStyle::Text) else {
            panic!("so is chain of thought")
        };
        assert!(text.starts_with("Q: There are 15 trees in the grove."), "{text}");
        assert!(text.ends_with("23 - 15 is 8. The answer is 8.\n\nQ: Why?\nA:"), "{text}");
        assert_eq!(text.matches("Q: ").count(), 9);
        assert_eq!(Style::Chat.prompt(&[], "Why?", PromptStyle::Text), Prompt::Chat(vec![user("Why?")]));
        let Prompt::Chat(turns) = Style::FiveShot.prompt(&shots, "Q3?", PromptStyle::ChatOfTurns) else {
            panic!("turns make a chat")
        };
        assert_eq!(
            (turns.len(), &turns[3].content[..], &turns[4].content[..]),
            (5, "#### 3", "Question: Q3?\nAnswer:")
        );
    }

    #[test]
    fn both_filters_judge() {
        assert_eq!(scores(Style::FiveShot, " It is\n#### 10,000"), [1.0, 1.0]);
        assert_eq!(scores(Style::FiveShot, " #### 10000. Then 7"), [1.0, 0.0]);
        assert_eq!(scores(Style::FiveShot, " $10000"), [0.0, 1.0]);
        assert_eq!(scores(Style::ChainOfThought, " The answer is 10000."), [1.0, 1.0]);
        assert_eq!(scores(Style::ChainOfThought, " #### 10000"), [0.0, 1.0]);
        assert_eq!(scores(Style::Chat, "That makes **$10,000.00**."), [1.0, 0.0]);
        assert_eq!(scores(Style::Chat, "no number ..."), [0.0, 0.0]);
    }
}
