//! When two results are the same: by Python's equality, whatever the order of the columns.

use super::database::{SqlValue, Table};
use std::collections::HashMap;
use std::hash::Hash;

/// A value such that equal ones are those that Python finds equal: `1 == 1.0`, `None == None`, `"1" != 1`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Key {
    Null,
    Integer(i64),
    /// Bits of a number that is no integer of 64 bits. SQLite knows no NaN, and zero is an integer.
    Real(u64),
    Text(String),
    Blob(Vec<u8>),
}

impl Key {
    fn new(value: &SqlValue) -> Self {
        match value {
            SqlValue::Null => Key::Null,
            SqlValue::Integer(i) => Key::Integer(*i),
            SqlValue::Real(r) => {
                // 2^63 is the first number that is too large; every integral f64 below it converts exactly.
                let is_integer = r.fract() == 0.0 && *r >= -(2f64.powi(63)) && *r < 2f64.powi(63);
                if is_integer { Key::Integer(*r as i64) } else { Key::Real(r.to_bits()) }
            }
            SqlValue::Text(text) => Key::Text(text.clone()),
            SqlValue::Blob(bytes) => Key::Blob(bytes.clone()),
        }
    }
}

/// `str(x) + str(type(x))`, by which the script sorts the values of a row.
fn python_sort_key(value: &SqlValue) -> String {
    match value {
        SqlValue::Null => "None<class 'NoneType'>".to_owned(),
        SqlValue::Integer(i) => format!("{i}<class 'int'>"),
        SqlValue::Real(r) => format!("{}<class 'float'>", python_float(*r)),
        SqlValue::Text(text) => format!("{text}<class 'str'>"),
        SqlValue::Blob(bytes) => format!("{}<class 'bytes'>", python_bytes(bytes)),
    }
}

/// `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "inf".to_owned() } else { "-inf".to_owned() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{value:?}")
}

/// `repr` of bytes.
fn python_bytes(bytes: &[u8]) -> String {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
    let mut text = format!("b{quote}");
    for &byte in bytes {
        match byte {
            b'\t' => text.push_str("\\t"),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\\' => text.push_str("\\\\"),
            b'\'' if quote == '\'' => text.push_str("\\'"),
            0x20..0x7f => text.push(char::from(byte)),
            _ => text.push_str(&format!("\\x{byte:02x}")),
        }
    }
    text.push(quote);
    text
}

/// Whether two results are the same after some permutation of the columns of `found`, as lists of rows if `ordered` and as
/// bags of rows otherwise.
pub(super) fn same_result(expected: &Table, found: &Table, ordered: bool) -> bool {
    if expected.rows.is_empty() && found.rows.is_empty() {
        return true;
    }
    if expected.rows.len() != found.rows.len() || expected.columns != found.columns {
        return false;
    }
    // The script compares rows without their order of columns first. That is more than a shortcut: where `1` and `1.0` sort
    // differently among their neighbours it rejects results that are equal, so it has to be done as it does it.
    if !same_unordered_rows(expected, found, ordered) {
        return false;
    }
    let (expected, found) = (columns(expected), columns(found));
    if ordered {
        // Columns must be equal as lists, so a permutation exists when they are equal as bags.
        bag(expected.iter()) == bag(found.iter())
    } else {
        Search::new(&expected, &found).exists()
    }
}

fn same_unordered_rows(expected: &Table, found: &Table, ordered: bool) -> bool {
    let unordered = |table: &Table| -> Vec<Vec<Key>> {
        let row = |row: &Vec<SqlValue>| {
            let mut cells: Vec<(String, Key)> = row.iter().map(|v| (python_sort_key(v), Key::new(v))).collect();
            cells.sort_by(|a, b| a.0.cmp(&b.0));
            cells.into_iter().map(|cell| cell.1).collect()
        };
        table.rows.iter().map(row).collect()
    };
    let (mut a, mut b) = (unordered(expected), unordered(found));
    if !ordered {
        for rows in [&mut a, &mut b] {
            rows.sort();
            rows.dedup();
        }
    }
    a == b
}

/// The columns of a table, each from the first row to the last.
fn columns(table: &Table) -> Vec<Vec<Key>> {
    (0..table.columns).map(|c| table.rows.iter().map(|row| Key::new(&row[c])).collect()).collect()
}

fn bag<T: Eq + Hash>(items: impl Iterator<Item = T>) -> HashMap<T, usize> {
    let mut counts = HashMap::new();
    for item in items {
        *counts.entry(item).or_insert(0) += 1;
    }
    counts
}

/// Looks for a permutation of columns that makes two tables equal as bags of rows, column by column.
///
/// The rows of a table are told apart by class numbers: rows that agree in all columns chosen so far have the same
/// class, numbered by the expected table. A column can be added when both tables then have equally many rows of each
/// class, which prunes exactly: what is cut off cannot become equal.
struct Search<'a> {
    expected: &'a [Vec<Key>],
    found: &'a [Vec<Key>],
    used: Vec<bool>,
}

impl<'a> Search<'a> {
    fn new(expected: &'a [Vec<Key>], found: &'a [Vec<Key>]) -> Self {
        Search { expected, found, used: vec![false; found.len()] }
    }

    fn exists(mut self) -> bool {
        let rows = self.expected.first().map_or(0, Vec::len);
        self.extend(0, &vec![0; rows], &vec![0; rows])
    }

    fn extend(&mut self, depth: usize, expected_classes: &[usize], found_classes: &[usize]) -> bool {
        if depth == self.expected.len() {
            return true;
        }
        for candidate in 0..self.found.len() {
            // Of equal columns that are free only the first is tried.
            let twin = (0..candidate).any(|c| !self.used[c] && self.found[c] == self.found[candidate]);
            if self.used[candidate] || twin {
                continue;
            }
            let (a, b) = (&self.expected[depth], &self.found[candidate]);
            let Some((a, b)) = refine(expected_classes, a, found_classes, b) else { continue };
            self.used[candidate] = true;
            if self.extend(depth + 1, &a, &b) {
                return true;
            }
            self.used[candidate] = false;
        }
        false
    }
}

/// The classes of rows once a column is added to each table, or `None` when the bags differ.
fn refine(
    a_classes: &[usize],
    a_column: &[Key],
    b_classes: &[usize],
    b_column: &[Key],
) -> Option<(Vec<usize>, Vec<usize>)> {
    let mut numbers: HashMap<(usize, &Key), (usize, isize)> = HashMap::new();
    let mut a = Vec::with_capacity(a_classes.len());
    for row in a_classes.iter().copied().zip(a_column) {
        let next = numbers.len();
        let (number, count) = numbers.entry(row).or_insert((next, 0));
        *count += 1;
        a.push(*number);
    }
    let mut b = Vec::with_capacity(b_classes.len());
    for row in b_classes.iter().copied().zip(b_column) {
        let (number, count) = numbers.get_mut(&row)?;
        *count -= 1;
        b.push(*number);
    }
    numbers.values().all(|(_, count)| *count == 0).then_some((a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use SqlValue::{Integer, Null, Real};
    use proptest::prelude::*;

    fn text(text: &str) -> SqlValue {
        SqlValue::Text(text.to_owned())
    }

    fn table(rows: &[&[SqlValue]]) -> Table {
        Table { columns: rows.first().map_or(0, |r| r.len()), rows: rows.iter().map(|r| r.to_vec()).collect() }
    }

    fn same(a: &[&[SqlValue]], b: &[&[SqlValue]]) -> (bool, bool) {
        (same_result(&table(a), &table(b), true), same_result(&table(a), &table(b), false))
    }

    #[test]
    fn values_are_equal_as_in_python() {
        assert_eq!(same(&[&[Integer(1)]], &[&[Real(1.0)]]), (true, true));
        assert_eq!(same(&[&[Null]], &[&[Null]]), (true, true));
        assert_eq!(same(&[&[Real(0.0)]], &[&[Real(-0.0)]]), (true, true));
        for (a, b) in [(Integer(1), text("1")), (Null, Integer(0)), (text(""), Null), (text("a"), text("A"))] {
            assert_eq!(same(&[&[a]], &[&[b]]), (false, false));
        }
        assert_eq!(same(&[&[text("a")]], &[&[SqlValue::Blob(b"a".to_vec())]]), (false, false));
        // The f64 nearest to 2^53 + 1 is 2^53: Python compares them exactly.
        let big = 1i64 << 53;
        assert_eq!(same(&[&[Integer(big + 1)]], &[&[Real(big as f64)]]), (false, false));
        assert_eq!(same(&[&[Integer(i64::MAX)]], &[&[Real(2f64.powi(63))]]), (false, false));
    }

    #[test]
    fn rows_are_a_bag_unless_order_counts() {
        let (a, b) = ([Integer(1), text("x")], [Integer(2), text("y")]);
        assert_eq!(same(&[&a, &b], &[&b, &a]), (false, true));
        assert_eq!(same(&[&a, &a, &b], &[&a, &b, &b]), (false, false), "as often as there");
        assert_eq!(same(&[&a], &[&a, &a]), (false, false));
        assert_eq!(same(&[], &[&a]), (false, false));
        assert_eq!(same(&[], &[]), (true, true));
    }

    #[test]
    fn columns_may_be_permuted_all_together() {
        let swap = |rows: &[[SqlValue; 2]]| rows.iter().map(|[a, b]| [b.clone(), a.clone()]).collect::<Vec<_>>();
        let rows = [[Integer(1), Integer(2)], [Integer(2), Integer(3)]];
        let swapped = swap(&rows);
        assert_eq!(same(&[&rows[0], &rows[1]], &[&swapped[0], &swapped[1]]), (true, true));
        // Each row is a permutation of its row, but not by the same one.
        assert_eq!(same(&[&rows[0], &rows[1]], &[&rows[0], &swapped[1]]), (false, false));
        assert_eq!(same(&[&[Integer(1), Integer(1)]], &[&[Integer(1)]]), (false, false));
    }

    #[test]
    fn the_quirk_of_the_quick_check_is_kept() {
        // Sorted as text, 1 and "1.0" stand in another order than 1.0 and "1.0", so the script says that they differ.
        let (a, b) = ([Integer(1), text("1!")], [Real(1.0), text("1!")]);
        let as_text = |row: &[SqlValue; 2]| row.each_ref().map(python_sort_key);
        assert!(as_text(&a)[0] > as_text(&a)[1] && as_text(&b)[0] > as_text(&b)[1]);
        assert_eq!(same(&[&a], &[&b]), (true, true));
        let (a, b) = ([Integer(1), text("1/")], [Real(1.0), text("1/")]);
        assert!(as_text(&a)[0] > as_text(&a)[1] && as_text(&b)[0] < as_text(&b)[1]);
        assert_eq!(same(&[&a], &[&b]), (false, false));
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        let cases = [
            (1.0, "1.0"),
            (-0.5, "-0.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (0.0, "0.0"),
            (123456.789, "123456.789"),
            (f64::INFINITY, "inf"),
        ];
        for (value, expected) in cases {
            assert_eq!(python_float(value), expected);
        }
        assert_eq!(python_bytes(b"a'\n\x00\xff"), r#"b"a'\n\x00\xff""#);
        assert_eq!(python_bytes(b"'\""), r#"b'\'"'"#);
    }

    /// All permutations of `0..n`.
    fn permutations(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![vec![]];
        }
        let insert = |p: Vec<usize>| (0..n).map(move |at| [&p[..at], &[n - 1], &p[at..]].concat());
        permutations(n - 1).into_iter().flat_map(insert).collect()
    }

    proptest! {
        /// Against trying every permutation.
        #[test]
        fn the_search_finds_what_trying_all_finds(
            cells in prop::collection::vec(0i64..3, 20),
            columns in 1usize..5,
            other in prop::collection::vec(0i64..3, 20),
            related in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let build = |cells: &[i64]| -> Vec<Vec<SqlValue>> {
                cells.chunks_exact(columns).map(|r| r.iter().map(|c| Integer(*c)).collect()).take(4).collect()
            };
            let a = build(&cells);
            let mut b = if related { a.clone() } else { build(&other) };
            if related {
                // Shuffled rows and columns, and every other time one cell changed.
                let perms = permutations(columns);
                let perm = &perms[seed as usize % perms.len()];
                b.iter_mut().for_each(|row| *row = perm.iter().map(|c| row[*c].clone()).collect());
                b.reverse();
                if seed % 2 == 0 { b[0][0] = Integer(seed as i64 % 3) }
            }
            let (a, b) = (Table { columns, rows: a }, Table { columns, rows: b });
            let sorted = |table: &Table, perm: &[usize]| {
                let mut rows: Vec<Vec<Key>> =
                    table.rows.iter().map(|r| perm.iter().map(|c| Key::new(&r[*c])).collect()).collect();
                rows.sort();
                rows
            };
            let identity: Vec<usize> = (0..columns).collect();
            let expected = permutations(columns).iter().any(|p| sorted(&b, p) == sorted(&a, &identity));
            prop_assert_eq!(same_result(&a, &b, false), expected);
            let plain = |table: &Table, perm: &[usize]| -> Vec<Vec<Key>> {
                table.rows.iter().map(|r| perm.iter().map(|c| Key::new(&r[*c])).collect()).collect()
            };
            let expected = permutations(columns).iter().any(|p| plain(&b, p) == plain(&a, &identity));
            prop_assert_eq!(same_result(&a, &b, true), expected);
        }
    }
}
