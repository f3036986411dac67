//! Streaming text: tokens in, whole characters out, and nothing of a stop string.

/// What a decoder puts where bytes are no UTF-8 (yet).
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Turns tokens into text as they come. A character whose bytes are spread over several tokens appears once it is whole.
///
/// Some tokenizers decode a token differently after another (a leading space, joined pieces), so tokens are decoded
/// together with those before them and only the new text is handed out.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    ids: Vec<u32>,
    /// Tokens before this one no longer matter.
    start: usize,
    /// Tokens before this one have handed out all their text.
    settled: usize,
    /// Bytes of the text of `ids[start..]` that were handed out.
    given: usize,
}

impl TextStream {
    /// Takes a token and returns the text that is certain now (often empty in the middle of a character). `decode` turns
    /// a run of tokens into text, with [`char::REPLACEMENT_CHARACTER`] for bytes that are no UTF-8.
    pub fn push<E>(&mut self, id: u32, decode: impl Fn(&[u32]) -> Result<String, E>) -> Result<String, E> {
        self.ids.push(id);
        let text = decode(&self.ids[self.start..])?;
        // The bytes at the end may be the beginning of a character that the next token completes.
        let certain = text.trim_end_matches(REPLACEMENT).len();
        let piece = text.get(self.given..certain).unwrap_or_default().to_owned();
        self.given = self.given.max(certain);
        if certain == text.len() {
            // From here on the tokens since `settled` are context enough.
            self.start = self.settled;
            self.settled = self.ids.len();
            self.given = decode(&self.ids[self.start..])?.len();
        }
        Ok(piece)
    }

    /// What was held back: the replacement characters of a character that never became whole.
    pub fn finish<E>(&mut self, decode: impl Fn(&[u32]) -> Result<String, E>) -> Result<String, E> {
        let text = decode(&self.ids[self.start..])?;
        let piece = text.get(self.given..).unwrap_or_default().to_owned();
        self.given = self.given.max(text.len());
        Ok(piece)
    }
}

/// Watches a stream for stop strings and holds back text that may be the beginning of one.
#[derive(Clone, Debug, Default)]
pub struct StopFinder {
    stops: Vec<String>,
    held: String,
}

impl StopFinder {
    /// A watcher for `stops`; empty strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        StopFinder { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes a piece; returns the text that may be shown, and whether a stop string was found right after it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let kept = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - kept);
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// What was held back although no stop string came.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest proper beginning of `stop` that ends `text`.
fn overlap(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().map(|(at, _)| at).filter(|at| *at <= text.len());
    beginnings.filter(|at| text.ends_with(&stop[..*at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// A tokenizer with one token a byte.
    fn bytes(ids: &[u32]) -> Result<String, Infallible> {
        let bytes: Vec<u8> = ids.iter().map(|id| *id as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn pieces(text: &[u8]) -> Vec<String> {
        let mut stream = TextStream::default();
        let mut pieces: Vec<String> = text.iter().map(|b| stream.push(u32::from(*b), bytes).unwrap()).collect();
        pieces.push(stream.finish(bytes).unwrap());
        pieces
    }

    #[test]
    fn characters_appear_whole() {
        assert_eq!(pieces("aé€😀b".as_bytes()), ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]);
    }

    #[test]
    fn broken_characters_become_replacements_and_lose_nothing() {
        for text in [&b"a\xe2\x82b"[..], b"\xff\xff\xe2\x82\xac", b"x\xf0\x9f", b"\xe2\xe2\x82\xacz\xc3"] {
            assert_eq!(pieces(text).concat(), String::from_utf8_lossy(text), "{text:?}");
        }
    }

    #[test]
    fn spaces_that_depend_on_the_token_before_are_kept() {
        // A decoder that drops the space of the first token, as SentencePiece does.
        let words = |ids: &[u32]| -> Result<String, Infallible> {
            Ok(ids.iter().map(|id| format!(" w{id}")).collect::<String>().trim_start().to_owned())
        };
        let mut stream = TextStream::default();
        let text: Vec<String> = (0..4).map(|id| stream.push(id, words).unwrap()).collect();
        assert_eq!(text, ["w0", " w1", " w2", " w3"]);
    }

    #[test]
    fn stop_strings_are_found_across_pieces_and_never_shown() {
        let mut finder = StopFinder::new(["END".to_owned(), String::new(), "\n\n".to_owned()]);
        assert_eq!(finder.push("one E"), ("one ".to_owned(), false));
        assert_eq!(finder.push("N"), (String::new(), false));
        assert_eq!(finder.push("Ergy\n"), ("ENErgy".to_owned(), false));
        assert_eq!(finder.push("x EN"), ("\nx ".to_owned(), false));
        assert_eq!(finder.push("DONE"), (String::new(), true));
    }

    #[test]
    fn the_first_stop_wins_and_held_text_is_returned_at_the_end() {
        let mut finder = StopFinder::new(["bc".to_owned(), "abc".to_owned()]);
        assert_eq!(finder.push("xxabcxx"), ("xx".to_owned(), true));
        let mut finder = StopFinder::new(["€€".to_owned()]);
        assert_eq!(finder.push("5€"), ("5".to_owned(), false));
        assert_eq!(finder.finish(), "€");
        assert_eq!(StopFinder::default().push("all"), ("all".to_owned(), false));
    }
}
