//! The check of a tokenizer.json before the tokenizers library sees it.
//!
//! Texts are borrowed from the file where it writes them without escapes, which spares most of the cost of a second parse.

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

/// The part of a tokenizer.json that [`check`] looks at.
#[derive(Deserialize)]
struct Probe<'a> {
    #[serde(borrow)]
    model: ProbeModel<'a>,
}

#[derive(Deserialize)]
struct ProbeModel<'a> {
    #[serde(borrow, default)]
    vocab: Vocabulary<'a>,
    #[serde(borrow, default)]
    merges: Vec<Merge<'a>>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
}

/// A string of the file.
#[derive(PartialEq, Eq, Hash)]
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AText;
        impl<'de> Visitor<'de> for AText {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(AText)
    }
}

/// The tokens of a vocabulary that is an object; `None` for the lists of other models.
#[derive(Default)]
struct Vocabulary<'a>(Option<HashSet<Text<'a>>>);

impl<'de: 'a, 'a> Deserialize<'de> for Vocabulary<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AVocabulary;
        impl<'de> Visitor<'de> for AVocabulary {
            type Value = Vocabulary<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut tokens = HashSet::new();
                while let Some((token, _)) = map.next_entry::<Text<'de>, IgnoredAny>()? {
                    tokens.insert(token);
                }
                Ok(Vocabulary(Some(tokens)))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocabulary(None))
            }
            fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
                Ok(Vocabulary(None))
            }
        }
        deserializer.deserialize_any(AVocabulary)
    }
}

/// `["a", "b"]`, or `"a b"`.
struct Merge<'a>(Text<'a>, Option<Text<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AMerge;
        impl<'de> Visitor<'de> for AMerge {
            type Value = Merge<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: two strings, or one with a space in it")
            }
            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Merge(Text(Cow::Borrowed(text)), None))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Merge(Text(Cow::Owned(text.to_owned())), None))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut part = |n| seq.next_element()?.ok_or_else(|| A::Error::invalid_length(n, &AMerge));
                let pair = Merge(part(0)?, Some(part(1)?));
                match seq.next_element::<IgnoredAny>()? {
                    None => Ok(pair),
                    Some(_) => Err(A::Error::invalid_length(3, &AMerge)),
                }
            }
        }
        deserializer.deserialize_any(AMerge)
    }
}

/// The tokenizers library panics on a merge that makes a token longer than any of the vocabulary, so such files are
/// turned away before it sees them.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let Probe { model } = serde_json::from_slice(json).map_err(|e| format!("is not a tokenizer.json: {e}"))?;
    let Some(tokens) = model.vocab.0 else { return Ok(()) };
    if model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        return Err("uses a continuing-subword prefix, which no supported model does".into());
    }
    let mut joined = Text(Cow::Owned(String::new()));
    for Merge(first, second) in &model.merges {
        let text = joined.0.to_mut();
        text.clear();
        match second {
            Some(second) => text.extend([&*first.0, &*second.0]),
            None => text.push_str(&first.0.replacen(' ', "", 1)),
        }
        if !tokens.contains(&joined) {
            return Err(format!("merges to '{}', which is not in its vocabulary", joined.0.escape_debug()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn merges_out_of_the_vocabulary_are_an_error_not_a_panic() {
        let json = |merges: &str| {
            format!(
                r#"{{"version":"1.0","model":{{"type":"BPE","vocab":{{"a":0,"b":1,"a\"b":3,"ab":2}},"merges":{merges}}}}}"#
            )
        };
        check(json(r#"[["a","b"]]"#).as_bytes()).unwrap();
        check(json(r#"["a b"]"#).as_bytes()).unwrap();
        check(json(r#"[["a","\"b"], "a \u0022b"]"#).as_bytes()).unwrap();
        check(json("[]").as_bytes()).unwrap();
        assert!(check(json(r#"[["ab","ab"]]"#).as_bytes()).unwrap_err().contains("abab"));
        for bad in [r#"["a b", ["a"]]"#, r#"[["a", "b", "c"]]"#, "[5]", r#"[["a", 5]]"#, "{}"] {
            assert!(check(json(bad).as_bytes()).unwrap_err().contains("tokenizer.json"), "{bad}");
        }
        assert!(check(b"{").is_err());
    }

    #[test]
    fn models_without_merges_pass() {
        check(br#"{"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}"#).unwrap();
        check(br#"{"model": {"type": "WordLevel", "vocab": {"a": 0}}}"#).unwrap();
        check(br#"{"model": {"type": "BPE", "vocab": null}}"#).unwrap();
    }
}
