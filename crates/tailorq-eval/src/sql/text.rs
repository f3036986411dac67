//! Queries as text: what the test-suite script does to them before they run.

use regex::Regex;
use std::sync::LazyLock;

static CURRENT_YEAR: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*").expect("the pattern is a constant that compiles")
});

/// A piece of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Letters, digits, `_` and `$`.
    Word(&'a str),
    /// A string, a quoted name or a comment, with its marks.
    Quoted(&'a str),
    /// One character.
    Other(&'a str),
}

impl<'a> Piece<'a> {
    pub(super) fn text(self) -> &'a str {
        match self {
            Piece::Word(text) | Piece::Quoted(text) | Piece::Other(text) => text,
        }
    }
}

/// Cuts a query into pieces, which together are the query.
pub(super) fn pieces(mut rest: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
        let (piece, length) = if is_word(first) {
            let length = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            (Piece::Word(&rest[..length]), length)
        } else if let Some(length) = quoted_length(rest, first) {
            (Piece::Quoted(&rest[..length]), length)
        } else {
            (Piece::Other(&rest[..first.len_utf8()]), first.len_utf8())
        };
        pieces.push(piece);
        rest = &rest[length..];
    }
    pieces
}

/// Bytes of the string, quoted name or comment with which `text` begins, if it begins with one. What is never closed
/// goes to the end, but a lone quote that is never closed is a character like others.
fn quoted_length(text: &str, first: char) -> Option<usize> {
    if text.starts_with("--") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    if let Some(comment) = text.strip_prefix("/*") {
        return Some(comment.find("*/").map_or(text.len(), |at| at + 4));
    }
    let close = match first {
        '\'' | '"' | '`' => first,
        '[' => ']',
        _ => return None,
    };
    // A doubled quote inside is two strings side by side here, which cuts at the same places.
    text[1..].find(close).map(|at| at + 2)
}

/// The text up to the first `;` outside of strings and comments, without it.
pub fn first_statement(query: &str) -> &str {
    let mut at = 0;
    for piece in pieces(query) {
        if piece == Piece::Other(";") {
            return &query[..at];
        }
        at += piece.text().len();
    }
    query
}

/// Whether anything but blanks and comments follows the first statement.
pub(super) fn has_more_statements(query: &str) -> bool {
    let rest = query[first_statement(query).len()..].trim_start_matches(';');
    let is_comment = |text: &str| text.starts_with("--") || text.starts_with("/*");
    pieces(rest).iter().any(|piece| !piece.text().trim().is_empty() && !is_comment(piece.text()))
}

/// A query as the script runs it: operators joined, the first statement, no `distinct` unless it is kept, and the year
/// 2020 for the current one, which SQLite has no such function for.
pub(super) fn prepare(query: &str, keep_distinct: bool) -> String {
    let query = query.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=");
    let query = first_statement(&query);
    let query = if keep_distinct { query.to_owned() } else { without_distinct(query) };
    CURRENT_YEAR.replace_all(&query, "2020").into_owned()
}

fn without_distinct(query: &str) -> String {
    let keep = |piece: &Piece<'_>| !matches!(piece, Piece::Word(word) if word.eq_ignore_ascii_case("distinct"));
    pieces(query).into_iter().filter(keep).map(Piece::text).collect()
}

/// Whether rows come in an order that counts.
pub(super) fn is_ordered(gold: &str) -> bool {
    gold.to_lowercase().contains("order by")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_goes_where_it_is_a_word() {
        let prepared = |query| prepare(query, false);
        assert_eq!(prepared("SELECT DISTINCT a, count(distinct b)"), "SELECT  a, count( b)");
        let kept = r#"SELECT 'distinct', "Distinct", [distinct], `distinct`, indistinct, distinct_1 -- distinct"#;
        assert_eq!(prepared(kept), kept);
        assert_eq!(
            prepared("SELECT 'it''s distinct' /* distinct; */, distinct 'x"),
            "SELECT 'it''s distinct' /* distinct; */,  'x"
        );
        assert_eq!(prepare("SELECT DISTINCT a", true), "SELECT DISTINCT a");
    }

    #[test]
    fn operators_are_joined_and_the_year_is_2020() {
        let query = "SELECT a WHERE b > = 3 AND c < = 4 AND d ! = year ( curdate ( ) ) AND e > YEAR(CURDATE())-1";
        assert_eq!(prepare(query, false), "SELECT a WHERE b >= 3 AND c <= 4 AND d != 2020AND e > 2020-1");
    }

    #[test]
    fn the_first_statement_ends_at_a_semicolon_that_is_not_quoted() {
        assert_eq!(first_statement("SELECT ';' ; DROP TABLE t"), "SELECT ';' ");
        assert_eq!(first_statement("SELECT 1 -- ;\n; x"), "SELECT 1 -- ;\n");
        assert_eq!(first_statement("SELECT 'a"), "SELECT 'a");
        assert_eq!(first_statement(";"), "");
        assert!(has_more_statements("SELECT 1; SELECT 2"));
        assert!(!has_more_statements("SELECT ';' ; -- SELECT 2\n /* x */"));
        assert!(!has_more_statements("SELECT 1"));
    }

    #[test]
    fn order_counts_where_the_words_stand() {
        assert!(is_ordered("SELECT a ORDER BY b"));
        assert!(!is_ordered("SELECT a ORDER  BY b"), "the script looks for one space");
    }
}
