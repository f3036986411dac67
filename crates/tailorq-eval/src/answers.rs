//! What a generated text answers, and whether that is right: the extraction rules and metrics of lm-evaluation-harness,
//! SQuAD and MMLU-Pro, as functions of text.

use regex::Regex;
use std::collections::HashMap;
use std::sync::LazyLock;

/// What the harness puts where no answer is found.
pub(crate) const INVALID: &str = "[invalid]";

fn compiled(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the patterns are constants that compile")
}

static AFTER_HASHES: LazyLock<Regex> = LazyLock::new(|| compiled(r"#### (\-?[0-9\.\,]+)"));
static THE_ANSWER_IS: LazyLock<Regex> = LazyLock::new(|| compiled(r"The answer is (\-?[0-9\.\,]+)."));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| compiled(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
static NUMBER: LazyLock<Regex> = LazyLock::new(|| compiled(r"-?[0-9][0-9,]*(?:\.[0-9]+)?"));
static ARTICLE: LazyLock<Regex> = LazyLock::new(|| compiled(r"\b(?:a|an|the)\b"));
static ANSWER_IS_LETTER: LazyLock<Regex> = LazyLock::new(|| compiled(r"answer is \(?([A-Z])\)?"));
static ANSWER_COLON_LETTER: LazyLock<Regex> = LazyLock::new(|| compiled(r".*[aA]nswer:\s*([A-Z])"));
static LONE_LETTER: LazyLock<Regex> = LazyLock::new(|| compiled(r"\b([A-Z])\b"));

/// `gsm8k`, `strict-match`: the number after the first `#### `.
pub(crate) fn after_hashes(text: &str) -> String {
    first_group(&AFTER_HASHES, text)
}

/// `gsm8k_cot`, `strict-match`: the number in the first `The answer is N.`, where any character may stand for the dot.
pub(crate) fn the_answer_is(text: &str) -> String {
    first_group(&THE_ANSWER_IS, text)
}

fn first_group(pattern: &Regex, text: &str) -> String {
    pattern.captures(text).map_or_else(|| INVALID.to_owned(), |found| found[1].trim().to_owned())
}

/// `flexible-extract`: the last run of digits, `$`, `.` and `,`.
pub(crate) fn flexible(text: &str) -> String {
    FLEXIBLE.find_iter(text).last().map_or_else(|| INVALID.to_owned(), |found| found.as_str().trim().to_owned())
}

/// The last number of a text: unlike [`flexible`], it needs a digit, and a full stop after it is none of it.
pub(crate) fn last_number(text: &str) -> Option<f64> {
    NUMBER.find_iter(text).last().and_then(|found| parse_number(found.as_str()))
}

/// A number that may have thousands separators, a dollar sign and a full stop.
pub(crate) fn parse_number(text: &str) -> Option<f64> {
    text.trim().trim_start_matches('$').trim_end_matches('.').replace(',', "").parse().ok()
}

/// What GSM8K's `exact_match` compares: without commas, dollar signs, everything up to the last `#### ` and a last
/// full stop; lower case.
pub(crate) fn normalized_number(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rfind("#### ").map_or(text.as_str(), |at| &text[at + "#### ".len()..]);
    // Python's `$` also matches before a last line break.
    let text = match (text.strip_suffix('.'), text.strip_suffix(".\n")) {
        (Some(rest), _) => rest.to_owned(),
        (None, Some(rest)) => format!("{rest}\n"),
        (None, None) => text.to_owned(),
    };
    text.to_lowercase()
}

/// SQuAD's normalisation: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016, the official
/// evaluation script).
pub fn squad_normalized(text: &str) -> String {
    let text = text.to_lowercase();
    let text: String = text.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let text = ARTICLE.replace_all(&text, " ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// SQuAD's F1 of the words of two texts: the harmonic mean of precision and recall over the bag of words they share. Two
/// empty texts agree, and an empty one with no other (the rule of version 2).
pub fn token_f1(prediction: &str, gold: &str) -> f64 {
    let (prediction, gold) = (squad_normalized(prediction), squad_normalized(gold));
    let (prediction, gold): (Vec<&str>, Vec<&str>) =
        (prediction.split_whitespace().collect(), gold.split_whitespace().collect());
    if prediction.is_empty() || gold.is_empty() {
        return f64::from(u8::from(prediction == gold));
    }
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in &gold {
        *counts.entry(word).or_insert(0) += 1;
    }
    let mut shared = 0;
    for word in &prediction {
        if let Some(count) = counts.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    // 2 P R / (P + R) with P = shared / |prediction| and R = shared / |gold|.
    2.0 * f64::from(shared) / (prediction.len() + gold.len()) as f64
}

/// The letter that a text chooses among the first `n_choices`, as MMLU-Pro's script looks for it (Wang et al. 2024): after
/// `answer is`, else after the last `Answer:` of the first line that has one, else the last letter that stands alone.
pub(crate) fn chosen_letter(text: &str, n_choices: usize) -> Option<char> {
    let letter = |found: &str| {
        let letter = found.chars().next()?;
        (letter.is_ascii_uppercase() && usize::from(letter as u8 - b'A') < n_choices).then_some(letter)
    };
    let first = |pattern: &Regex| pattern.captures_iter(text).find_map(|found| letter(&found[1]));
    first(&ANSWER_IS_LETTER)
        .or_else(|| first(&ANSWER_COLON_LETTER))
        .or_else(|| LONE_LETTER.captures_iter(text).filter_map(|found| letter(&found[1])).last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_answers_are_the_first_and_flexible_ones_the_last() {
        let text = " She has 3 cats.\n#### 1,234\nQuestion: 5 #### 7";
        assert_eq!(after_hashes(text), "1,234");
        assert_eq!(flexible(text), "7");
        assert_eq!(after_hashes("####5"), INVALID);
        assert_eq!(the_answer_is("So 4. The answer is 8.50. The answer is 9."), "8.50.");
        // The group takes the full stop too where something else follows it.
        assert_eq!(the_answer_is("The answer is 8."), "8");
        assert_eq!(the_answer_is("The answer is 8.\n"), "8");
        assert_eq!(the_answer_is("The answer is 8"), INVALID);
        assert_eq!(the_answer_is("The answer is 18"), "1", "the dot of the pattern is any character");
        assert_eq!(the_answer_is("The answer is $8."), INVALID);
        assert_eq!(flexible("It costs $5,000.50."), "$5,000.50.");
        assert_eq!(flexible("it is -7 ... and"), "...");
        assert_eq!(flexible("five"), INVALID);
    }

    #[test]
    fn numbers_are_compared_as_the_harness_compares_them() {
        assert_eq!(normalized_number("The cost\n#### 10,800"), "10800");
        assert_eq!(normalized_number("$5,000.50."), "5000.50");
        assert_eq!(normalized_number("#### 1 #### 2"), "2");
        assert_eq!(normalized_number("A.\n"), "a\n");
        assert_ne!(normalized_number("10.00"), normalized_number("10"));
        assert_eq!(last_number("about 1,200.50 in all."), Some(1200.5));
        assert_eq!(last_number("it is -7 ... and"), Some(-7.0));
        assert_eq!(last_number("none"), None);
        assert_eq!(parse_number(" $10,800. "), Some(10800.0));
    }

    #[test]
    fn words_are_compared_as_squad_compares_them() {
        assert_eq!(squad_normalized(" The  Cat's, a dog! "), "cats dog");
        assert_eq!(squad_normalized("theatre another"), "theatre another");
        assert_eq!(token_f1("the cat sat", "a cat sat down"), 2.0 * 2.0 / 5.0);
        assert_eq!(token_f1("b b b", "b"), 2.0 / 4.0);
        assert_eq!(token_f1("x", "y"), 0.0);
        assert_eq!(token_f1("the", ""), 1.0);
        assert_eq!(token_f1("", "y"), 0.0);
    }

    #[test]
    fn letters_are_found_where_answers_put_them() {
        assert_eq!(chosen_letter("A is wrong, so the answer is (C). The answer is (B).", 10), Some('C'));
        assert_eq!(chosen_letter("Answer: B\nI think", 4), Some('B'));
        assert_eq!(chosen_letter("B", 4), Some('B'));
        assert_eq!(chosen_letter("It could be A or D", 4), Some('D'));
        assert_eq!(chosen_letter("It could be A or Z", 4), Some('A'), "there is no Z");
        assert_eq!(chosen_letter("no idea", 4), None);
    }
}
