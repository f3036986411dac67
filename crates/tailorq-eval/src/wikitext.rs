//! WikiText as lm-evaluation-harness sees it: pages of a raw file, their detokenized text, and the words of a page.

use regex::Regex;
use std::sync::LazyLock;

/// White space in Python's sense: Unicode's, and the four separators of ASCII.
const SPACE: &str = r"[\s\x1c-\x1f]";

/// Substitutions by pattern, in order; the first of them never finds anything in a text without slashes around it.
static PATTERNS: LazyLock<[(Regex, &str); 6]> = LazyLock::new(|| {
    let regex =
        |pattern: &str| Regex::new(&pattern.replace(r"\s", SPACE)).expect("the patterns are constants that compile");
    [
        (regex(r"/' [0-9]/"), "/'[0-9]/"),
        (regex(r"\(\s*([^\)]*?)\s*\)"), "(${1})"),
        (regex(r"\[\s*([^\]]*?)\s*\]"), "[${1}]"),
        (regex(r"\{\s*([^}]*?)\s*\}"), "{${1}}"),
        (regex(r#""\s*([^"]*?)\s*""#), "\"${1}\""),
        (regex(r"'\s*([^']*?)\s*'"), "'${1}'"),
    ]
});

static SPACES: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(&format!("{SPACE}+")).expect("the pattern is a constant that compiles"));

/// The pages of a raw file. A page begins with a line `= Title =`; two lines of the test split look like titles without
/// being any, which is why the harness counts 62 pages in it.
pub(crate) fn pages(text: &str) -> Vec<String> {
    let (mut pages, mut lines) = (Vec::new(), Vec::new());
    for line in text.split('\n') {
        let heading = line.replace("= = =", "===").replace("= =", "==");
        let heading = heading.trim();
        if heading.starts_with("= ") && heading.ends_with(" =") {
            let page = lines.join("\n");
            if !page.trim().is_empty() {
                pages.push(page);
            }
            lines.clear();
        }
        lines.push(line);
    }
    pages.push(lines.join("\n"));
    pages
}

/// A page with the marks of WikiText's tokenizer taken back.
pub(crate) fn detokenize(page: &str) -> String {
    let mut text = page.replace("s '", "s'");
    let (numbers, brackets) = PATTERNS.split_at(1);
    substitute(&mut text, numbers);
    for (from, to) in [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")] {
        text = text.replace(from, to);
    }
    for mark in [':', ';', '.', '!', '?', ','] {
        text = text.replace(&format!(" {mark} "), &format!("{mark} "));
    }
    substitute(&mut text, brackets);
    let rest = [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ];
    rest.iter().fold(text, |text, (from, to)| text.replace(from, to))
}

fn substitute(text: &mut String, patterns: &[(Regex, &str)]) {
    for (pattern, to) in patterns {
        *text = pattern.replace_all(text, *to).into_owned();
    }
}

/// `len(re.split(r"\s+", page))`: an empty string before or after white space counts as a word.
pub(crate) fn count_words(page: &str) -> usize {
    SPACES.split(page).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_begin_at_titles_and_not_at_sections() {
        let text = " \n = Aa = \n \n One . \n \n = = Bb = = \n \n = = = Cc = = = \n two \n = Dd = \n";
        let expected = [" = Aa = \n \n One . \n \n = = Bb = = \n \n = = = Cc = = = \n two ", " = Dd = \n"];
        assert_eq!(pages(text), expected);
        assert_eq!(pages("no title"), ["no title"]);
    }

    #[test]
    fn marks_are_taken_back() {
        let page = " = A @-@ B ( film ) = \n \n It 's 1 @,@ 000 @.@ 5 , \" quoted \" ; the boys ' and [ x ] { y } at 5 ° N \n = = C = = \n";
        let expected = " = A-B (film) =\n\nIt's 1,000.5, \"quoted\"; the boys' and [x] {y} at 5°N\n== C ==\n";
        assert_eq!(detokenize(page), expected);
        assert_eq!(detokenize("a N b N c"), "a 1 b 1 c");
    }

    #[test]
    fn words_are_what_stands_between_spaces() {
        assert_eq!(count_words(" a  b\n"), 4);
        assert_eq!(count_words("a"), 1);
        assert_eq!(count_words(""), 1);
    }
}
