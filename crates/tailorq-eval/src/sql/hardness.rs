//! How hard Spider calls a query: `easy`, `medium`, `hard` or `extra`, by the rules of its `evaluation.py`.
//!
//! Only what the rules count is read, not the whole grammar; a query of another dialect gets some class rather than an error.

use super::text::{Piece, pieces};

/// A class of Spider's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hardness {
    /// `easy`
    Easy,
    /// `medium`
    Medium,
    /// `hard`
    Hard,
    /// `extra`
    Extra,
}

impl Hardness {
    /// All classes, the easiest first.
    pub const ALL: [Hardness; 4] = [Hardness::Easy, Hardness::Medium, Hardness::Hard, Hardness::Extra];

    /// As Spider names it.
    pub fn name(self) -> &'static str {
        match self {
            Hardness::Easy => "easy",
            Hardness::Medium => "medium",
            Hardness::Hard => "hard",
            Hardness::Extra => "extra",
        }
    }

    /// The class of a query.
    pub fn of(query: &str) -> Self {
        let tokens = tokens(query);
        let clauses = Clauses::split(&tokens);
        let (one, two, others) = (clauses.component1(), clauses.component2(), clauses.others());
        match (one, others, two) {
            (0..=1, 0, 0) => Hardness::Easy,
            (0..=1, 0..=2, 0) | (0..=2, 0..=1, 0) => Hardness::Medium,
            (0..=2, 3.., 0) | (3, 0..=2, 0) | (0..=1, 0, 0..=1) => Hardness::Hard,
            _ => Hardness::Extra,
        }
    }
}

/// A token or what stands between parentheses.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// A word, string, number or sign in lower case.
    Plain(String),
    /// The inside of parentheses.
    Group(Vec<Token>),
}

impl Token {
    fn is(&self, word: &str) -> bool {
        matches!(self, Token::Plain(text) if text == word)
    }

    fn is_any(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.is(word))
    }

    fn is_subquery(&self) -> bool {
        matches!(self, Token::Group(inside) if inside.first().is_some_and(|t| t.is("select") || t.is_subquery()))
    }
}

fn tokens(query: &str) -> Vec<Token> {
    let mut stack = vec![Vec::new()];
    for piece in pieces(query) {
        match piece.text() {
            "(" => stack.push(Vec::new()),
            ")" if stack.len() > 1 => {
                let inside = stack.pop().unwrap_or_default();
                push(&mut stack, Token::Group(inside));
            }
            text if text.trim().is_empty()
                || matches!(piece, Piece::Quoted(t) if t.starts_with("--") || t.starts_with("/*")) => {}
            text => push(&mut stack, Token::Plain(text.to_lowercase())),
        }
    }
    // Parentheses that are never closed end with the query.
    while stack.len() > 1 {
        let inside = stack.pop().unwrap_or_default();
        push(&mut stack, Token::Group(inside));
    }
    stack.pop().unwrap_or_default()
}

fn push(stack: &mut [Vec<Token>], token: Token) {
    if let Some(top) = stack.last_mut() {
        top.push(token);
    }
}

/// The clauses of a query without those of its subqueries.
#[derive(Default)]
struct Clauses<'a> {
    select: &'a [Token],
    from: &'a [Token],
    condition: &'a [Token],
    group: &'a [Token],
    having: &'a [Token],
    order: &'a [Token],
    has_limit: bool,
    /// A second query follows by `union`, `intersect` or `except`.
    has_second: bool,
}

const AGGREGATES: [&str; 5] = ["max", "min", "count", "sum", "avg"];
const HEADS: [&str; 10] =
    ["select", "from", "where", "group", "having", "order", "limit", "union", "intersect", "except"];

impl<'a> Clauses<'a> {
    fn split(tokens: &'a [Token]) -> Self {
        // A query all in parentheses is the query inside.
        if let [Token::Group(inside), ..] = tokens
            && tokens[0].is_subquery()
            && tokens.get(1).is_none_or(|next| next.is(";"))
        {
            return Clauses::split(inside);
        }
        let mut clauses = Clauses::default();
        let starts: Vec<usize> = (0..tokens.len()).filter(|i| tokens[*i].is_any(&HEADS)).collect();
        for (n, &start) in starts.iter().enumerate() {
            let end = starts.get(n + 1).copied().unwrap_or(tokens.len());
            let body = &tokens[start + 1..end];
            let Token::Plain(head) = &tokens[start] else { continue };
            match head.as_str() {
                "select" => clauses.select = body,
                "from" => clauses.from = body,
                "where" => clauses.condition = body,
                "group" => clauses.group = body,
                "having" => clauses.having = body,
                "order" => clauses.order = body,
                "limit" => clauses.has_limit = true,
                _ => {
                    clauses.has_second = true;
                    break;
                }
            }
        }
        clauses
    }

    /// The conditions of joins, one list of tokens for each `on`.
    fn joined(&self) -> Vec<&'a [Token]> {
        let ends = |t: &Token| t.is_any(&["join", "left", "right", "inner", "outer", "cross", "natural", ","]);
        let mut conditions = Vec::new();
        for (at, _) in self.from.iter().enumerate().filter(|(_, t)| t.is("on")) {
            let rest = &self.from[at + 1..];
            conditions.push(&rest[..rest.iter().position(ends).unwrap_or(rest.len())]);
        }
        conditions
    }

    /// Everything that is a list of conditions.
    fn conditions(&self) -> Vec<&'a [Token]> {
        let mut all = self.joined();
        all.extend([self.condition, self.having]);
        all
    }

    /// WHERE, GROUP BY, ORDER BY, LIMIT, joins, ORs and LIKEs.
    fn component1(&self) -> usize {
        let clauses = [self.condition, self.group, self.order].iter().filter(|c| !c.is_empty()).count();
        let joins = self.from.iter().filter(|t| t.is("join")).count();
        let words: usize =
            self.conditions().iter().map(|c| c.iter().filter(|t| t.is_any(&["or", "like"])).count()).sum();
        clauses + usize::from(self.has_limit) + joins + words
    }

    /// Subqueries in conditions, and a second query.
    fn component2(&self) -> usize {
        let nested: usize = self.conditions().iter().map(|c| c.iter().filter(|t| t.is_subquery()).count()).sum();
        nested + usize::from(self.has_second)
    }

    /// How many of these there is more than one of: aggregates, selected columns, conditions, grouping columns.
    fn others(&self) -> usize {
        let counts =
            [self.aggregates(), n_items(self.select), n_conditions(self.condition), n_items(without_by(self.group))];
        counts.iter().filter(|n| **n > 1).count()
    }

    /// What the script counts as aggregates, which is a little more: a `not` of a condition too, and every connective of
    /// HAVING.
    fn aggregates(&self) -> usize {
        let leading = |items: Vec<&[Token]>| {
            items.iter().filter(|item| item.first().is_some_and(|t| t.is_any(&AGGREGATES))).count()
        };
        let selected = leading(items(skip_distinct(self.select)));
        let grouped = leading(items(without_by(self.group)));
        let ordered = without_by(self.order).iter().filter(|t| t.is_any(&AGGREGATES)).count();
        let nots = |condition: &[Token]| condition.iter().filter(|t| t.is("not")).count();
        let connectives = n_conditions(self.having).saturating_sub(1);
        selected + grouped + ordered + nots(self.condition) + nots(self.having) + connectives
    }
}

fn without_by(clause: &[Token]) -> &[Token] {
    clause.strip_prefix(&[Token::Plain("by".to_owned())][..]).unwrap_or(clause)
}

fn skip_distinct(clause: &[Token]) -> &[Token] {
    clause.strip_prefix(&[Token::Plain("distinct".to_owned())][..]).unwrap_or(clause)
}

/// What stands between commas.
fn items(clause: &[Token]) -> Vec<&[Token]> {
    clause.split(|t| t.is(",")).collect()
}

fn n_items(clause: &[Token]) -> usize {
    if clause.is_empty() { 0 } else { items(clause).len() }
}

/// Conditions joined by `and` or `or`; the `and` of a `between` joins none.
fn n_conditions(clause: &[Token]) -> usize {
    let (mut n, mut between) = (usize::from(!clause.is_empty()), false);
    for token in clause {
        if token.is("between") {
            between = true;
        } else if token.is("and") && between {
            between = false;
        } else if token.is_any(&["and", "or"]) {
            n += 1;
        }
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classes_are_spiders() {
        for (query, expected) in [
            ("SELECT count(*) FROM singer", "easy"),
            ("SELECT name FROM s WHERE a BETWEEN 1 AND 2", "easy"),
            ("SELECT DISTINCT country FROM singer WHERE age > 20;", "easy"),
            ("SELECT avg(age), min(age) FROM singer", "medium"),
            ("SELECT T1.a FROM t AS T1 JOIN u AS T2 ON T1.x = T2.x WHERE b LIKE '%or (%'", "hard"),
            ("SELECT name FROM s WHERE id NOT IN (SELECT id FROM u WHERE a = 1 OR b = 2)", "hard"),
            ("SELECT a FROM t WHERE b = 1 INTERSECT SELECT a FROM t WHERE b = 2", "hard"),
            ("SELECT a, b FROM t WHERE c > (SELECT avg(c) FROM t)", "extra"),
            ("SELECT a FROM t GROUP BY a ORDER BY count(*) DESC LIMIT 1", "hard"),
            ("", "easy"),
            ("((((", "easy"),
        ] {
            assert_eq!(Hardness::of(query).name(), expected, "{query}");
        }
    }
}
