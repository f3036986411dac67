//! As much of Rust's lexical grammar as the rules need: what is code, what is comment, where functions lie.

use std::ops::Range;

/// A source split in two texts of the same shape: same lines, same columns, the other part blanked out.
#[derive(Debug)]
pub struct Split {
    /// Code. Comments and the insides of string and character literals are blanks.
    pub code: Vec<char>,
    /// Comments, documentation included. All else is blanks.
    pub comments: Vec<char>,
}

/// Splits a source. A literal or comment that never ends runs to the end of the file.
pub fn split(source: &str) -> Split {
    let chars: Vec<char> = source.chars().collect();
    let blank = |c: &char| if *c == '\n' { '\n' } else { ' ' };
    let mut code = chars.clone();
    let mut comments: Vec<char> = chars.iter().map(blank).collect();
    let mut at = 0;
    while at < chars.len() {
        let (end, is_comment) = match (chars[at], chars.get(at + 1)) {
            ('/', Some('/')) => (line_end(&chars, at), true),
            ('/', Some('*')) => (block_comment_end(&chars, at), true),
            ('"', _) => (string_end(&chars, at), false),
            ('r', Some('"' | '#')) if !continues_word(&chars, at) => (raw_string_end(&chars, at), false),
            ('\'', _) => (char_end(&chars, at), false),
            _ => (at + 1, false),
        };
        if is_comment {
            comments[at..end].copy_from_slice(&chars[at..end]);
        }
        if is_comment || end > at + 1 {
            for c in &mut code[at..end] {
                *c = blank(c);
            }
        }
        at = end;
    }
    Split { code, comments }
}

fn line_end(chars: &[char], at: usize) -> usize {
    chars[at..].iter().position(|&c| c == '\n').map_or(chars.len(), |n| at + n)
}

/// Block comments nest.
fn block_comment_end(chars: &[char], at: usize) -> usize {
    let (mut depth, mut i) = (0usize, at);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                i += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    chars.len()
}

fn string_end(chars: &[char], at: usize) -> usize {
    let mut i = at + 1;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of `r"…"` or `r##"…"##`; `at + 1` when this is no raw string (`r#type`, or a variable named r).
fn raw_string_end(chars: &[char], at: usize) -> usize {
    let n_hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let open = at + 1 + n_hashes;
    if chars.get(open) != Some(&'"') {
        return at + 1;
    }
    let closes =
        |i: &usize| chars[*i] == '"' && chars[i + 1..].iter().take(n_hashes).filter(|&&c| c == '#').count() == n_hashes;
    (open + 1..chars.len()).find(closes).map_or(chars.len(), |i| i + 1 + n_hashes)
}

/// The end of a character literal; `at + 1` when the quote begins a lifetime or a label.
fn char_end(chars: &[char], at: usize) -> usize {
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), Some(_)) => {
            // The character after the backslash may itself be a quote.
            chars[at + 3..].iter().position(|&c| c == '\'').map_or(chars.len(), |n| at + 4 + n)
        }
        (Some(_), Some('\'')) => at + 3,
        _ => at + 1,
    }
}

/// Whether the character belongs to an identifier.
pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the character at `at` continues an identifier (`br"…"` and `cr"…"` are prefixes, not identifiers).
fn continues_word(chars: &[char], at: usize) -> bool {
    let start = chars[..at].iter().rposition(|&c| !is_word(c)).map_or(0, |i| i + 1);
    !matches!(chars[start..at], [] | ['b'] | ['c'])
}

/// Line of an offset, from 1.
pub fn line_of(text: &[char], at: usize) -> usize {
    1 + text[..at.min(text.len())].iter().filter(|&&c| c == '\n').count()
}

/// The lines of a text.
pub fn lines(text: &[char]) -> Vec<String> {
    text.split(|&c| c == '\n').map(|line| line.iter().collect()).collect()
}

/// Offsets at which `word` stands as a whole identifier.
pub fn words(code: &[char], word: &str) -> Vec<usize> {
    let word: Vec<char> = word.chars().collect();
    (0..code.len().saturating_sub(word.len() - 1))
        .filter(|&at| code[at..at + word.len()] == word[..])
        .filter(|&at| at == 0 || !is_word(code[at - 1]))
        .filter(|&at| code.get(at + word.len()).is_none_or(|&c| !is_word(c)))
        .collect()
}

/// Offset of the first character that is no white space, from `at` on.
pub fn skip_blanks(code: &[char], at: usize) -> usize {
    code[at..].iter().position(|c| !c.is_whitespace()).map_or(code.len(), |n| at + n)
}

/// The identifier that begins at `at`; empty when there is none.
pub fn word_at(code: &[char], at: usize) -> String {
    code[at..].iter().take_while(|&&c| is_word(c)).collect()
}

/// A function with a body.
#[derive(Debug, PartialEq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Lines from `fn` to the closing brace, from 1, end exclusive.
    pub lines: Range<usize>,
}

/// All functions with a body, nested ones too.
pub fn functions(code: &[char]) -> Vec<Function> {
    words(code, "fn").into_iter().filter_map(|at| function(code, at)).collect()
}

fn function(code: &[char], at: usize) -> Option<Function> {
    // A type such as `fn(u32) -> u32` has no name.
    let name = word_at(code, skip_blanks(code, at + 2));
    if name.is_empty() {
        return None;
    }
    let open = body_start(code, at)?;
    let close = matching_brace(code, open);
    Some(Function { name, lines: line_of(code, at)..line_of(code, close) + 1 })
}

/// The brace that opens what is declared at `at`; `None` when a semicolon ends the declaration first.
pub fn body_start(code: &[char], at: usize) -> Option<usize> {
    let mut depth = 0i32;
    for (i, c) in code.iter().enumerate().skip(at) {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            ';' if depth == 0 => return None,
            '{' if depth == 0 => return Some(i),
            _ => {}
        }
    }
    None
}

/// The brace that closes the one at `open`; the last character when there is none.
pub fn matching_brace(code: &[char], open: usize) -> usize {
    let mut depth = 0i32;
    for (i, c) in code.iter().enumerate().skip(open) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    code.len() - 1
}

/// Lines of items under `#[cfg(test)]`, from 1, ends exclusive.
pub fn test_lines(code: &[char]) -> Vec<Range<usize>> {
    let attribute: Vec<char> = "#[cfg(test)]".chars().collect();
    let mut found = Vec::new();
    for at in 0..code.len().saturating_sub(attribute.len()) {
        if code[at..at + attribute.len()] != attribute[..] {
            continue;
        }
        let end = body_start(code, at + attribute.len()).map_or(at, |open| matching_brace(code, open));
        found.push(line_of(code, at)..line_of(code, end) + 1);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(source: &str) -> String {
        split(source).code.iter().collect()
    }

    fn comments(source: &str) -> String {
        split(source).comments.iter().collect::<String>().trim().to_string()
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        assert_eq!(code("a // {\nb"), "a     \nb");
        assert_eq!(code("a /* { /* } */ */ b"), format!("a {} b", " ".repeat(15)));
        assert_eq!(code("f(\"{\\\"\")").trim_end(), format!("f({})", " ".repeat(5)));
        assert_eq!(code("r#\"{\"}\"# x").trim(), "x");
        assert_eq!(code("br\"{\" x"), format!("b{} x", " ".repeat(4)));
        assert_eq!(code("'{' '\\'' '\\u{7b}' x").trim(), "x");
        assert_eq!(comments("a // why\nb"), "// why");
        assert_eq!(comments("let s = \"// no comment\";"), "");
    }

    #[test]
    fn lifetimes_raw_identifiers_and_words_that_end_in_r_are_code() {
        for source in ["fn f<'a>(x: &'a str) {}", "let r#type = 1;", "r + 1", "for#"] {
            assert_eq!(code(source), source);
        }
        assert_eq!(code("'outer: loop { break 'outer; }"), "'outer: loop { break 'outer; }");
    }

    #[test]
    fn what_never_ends_runs_to_the_end_of_the_file() {
        for source in ["\"abc", "r#\"abc", "/* abc", "'\\", "'\\n", "'", "b'"] {
            assert_eq!(split(source).code.len(), source.chars().count());
        }
    }

    #[test]
    fn functions_have_names_and_lines() {
        let source = "trait T {\n    fn declared(&self) -> [u8; 4];\n    fn given(&self) {\n        g(\"}\")\n    }\n}\n\
                      type F = fn(u8) -> u8;\nfn last(a: [u8; 2]) where u8: Copy {\n}";
        let found = functions(&split(source).code);
        let names: Vec<(&str, Range<usize>)> = found.iter().map(|f| (f.name.as_str(), f.lines.clone())).collect();
        assert_eq!(names, [("given", 3..6), ("last", 8..10)]);
    }

    #[test]
    fn test_modules_are_found_and_a_declaration_is_one_line() {
        let source = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n#[cfg(test)]\nmod more;\n";
        assert_eq!(test_lines(&split(source).code), [2..6, 7..8]);
    }

    #[test]
    fn words_are_whole() {
        let code: Vec<char> = "unsafe_op unsafe { x.unsafe } an_unsafe".chars().collect();
        assert_eq!(words(&code, "unsafe"), [10, 21]);
    }
}
