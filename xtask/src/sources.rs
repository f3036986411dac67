//! Rules about one source file: its size, its name, what it must begin with and what it must not hold.

use crate::lexer::{self, Split};
use crate::tidy::{File, Offence};

/// Lines a file may have.
const FILE_LINES: usize = 800;
/// Lines a function may have, from `fn` to the closing brace.
const FUNCTION_LINES: usize = 100;
/// Lines the main path may have: a newcomer reads it in one sitting.
const MAIN_PATH: (&str, usize) = ("crates/tailorq/src/pipeline.rs", 250);
/// Names that say nothing about what a module is for.
const EMPTY_NAMES: [&str; 5] = ["utils", "common", "helpers", "misc", "manager"];
/// Macros that have no place in finished code.
const UNFINISHED: [&str; 3] = ["todo", "dbg", "unimplemented"];
/// How far above an unsafe block its justification may begin, unless a longer comment stands right there.
const SAFETY_LINES: usize = 3;
/// Files of one-line wrappers around intrinsics, each sound for the one reason that stands at the top: a token proves
/// that the processor has them. They must say so in the reason with which they allow clippy's own lint.
const ONE_REASON_FOR_ALL: [&str; 2] =
    ["crates/tailorq-kernels/src/cpu/simd/avx2.rs", "crates/tailorq-kernels/src/cpu/simd/avx512.rs"];
/// How such a file begins to give its reason.
const ALLOWS_WITH_REASON: &str = "#![allow(clippy::undocumented_unsafe_blocks, reason = ";
/// The only place where sources may depend on a cargo feature.
const FEATURES_LIVE_IN: &str = "crates/tailorq-kernels/";
/// Crates that may not hold unsafe code at all.
const SAFE_CRATES: [&str; 1] = ["crates/tailorq-tensor/src/lib.rs"];
/// Where the folders of people and of workplaces begin. In pieces, so that this file keeps its own rule.
const MACHINE_PATHS: [&str; 5] = [
    concat!("/", "home/"),
    concat!("/", "Users/"),
    concat!("/", "root/"),
    concat!("/", "work/"),
    concat!(r"C:\", "Users"),
];

/// Rules for any text: no path of a developer's machine.
pub fn check_text(file: &File) -> Vec<Offence> {
    let mut offences = Vec::new();
    for (i, line) in file.text.lines().enumerate() {
        let begins_path = |at: usize| !line[..at].ends_with(|c: char| lexer::is_word(c) || "./~-".contains(c));
        for path in MACHINE_PATHS {
            if line.match_indices(path).any(|(at, _)| begins_path(at)) {
                let remedy = format!("'{path}' is a path of one machine: take it from an argument or the environment");
                offences.push(Offence::new(&file.path, i + 1, "machine path", remedy));
            }
        }
    }
    offences
}

/// Rules for Rust sources.
pub fn check_rust(file: &File) -> Vec<Offence> {
    let split = lexer::split(&file.text);
    let mut offences = Vec::new();
    check_size(file, &split, &mut offences);
    check_docs(file, &mut offences);
    check_names(file, &split, &mut offences);
    check_features(file, &split, &mut offences);
    check_unfinished(file, &split, &mut offences);
    check_unsafe(file, &split, &mut offences);
    offences
}

fn check_size(file: &File, split: &Split, offences: &mut Vec<Offence>) {
    let n_lines = file.text.lines().count();
    let limit = if file.path == MAIN_PATH.0 { MAIN_PATH.1 } else { FILE_LINES };
    if n_lines > limit {
        let remedy = format!("{n_lines} lines, at most {limit}: split it along its ideas");
        offences.push(Offence::new(&file.path, limit + 1, "file size", remedy));
    }
    for function in lexer::functions(&split.code) {
        let n_lines = function.lines.len();
        if n_lines > FUNCTION_LINES {
            let remedy = format!("`{}` has {n_lines} lines, at most {FUNCTION_LINES}: name its steps", function.name);
            offences.push(Offence::new(&file.path, function.lines.start, "function size", remedy));
        }
    }
}

fn check_docs(file: &File, offences: &mut Vec<Offence>) {
    if !file.text.starts_with("//!") {
        offences.push(Offence::new(
            &file.path,
            1,
            "file docs",
            "begin with a `//!` sentence that says what the file is for",
        ));
    }
}

fn check_names(file: &File, split: &Split, offences: &mut Vec<Offence>) {
    let remedy = |name: &str| format!("`{name}` says nothing: name it after what it does");
    for part in file.path.split('/') {
        let stem = part.strip_suffix(".rs").unwrap_or(part);
        if EMPTY_NAMES.contains(&stem) {
            offences.push(Offence::new(&file.path, 1, "name", remedy(stem)));
        }
    }
    for at in lexer::words(&split.code, "mod") {
        let start = lexer::skip_blanks(&split.code, at + "mod".len());
        let name = lexer::word_at(&split.code, start);
        // `mod name;` is reported at the file it declares.
        let is_inline = split.code.get(lexer::skip_blanks(&split.code, start + name.chars().count())) == Some(&'{');
        if is_inline && EMPTY_NAMES.contains(&name.as_str()) {
            offences.push(Offence::new(&file.path, lexer::line_of(&split.code, at), "name", remedy(&name)));
        }
    }
}

fn check_features(file: &File, split: &Split, offences: &mut Vec<Offence>) {
    if file.path.starts_with(FEATURES_LIVE_IN) {
        return;
    }
    for at in lexer::words(&split.code, "feature") {
        let is_set = split.code.get(lexer::skip_blanks(&split.code, at + "feature".len())) == Some(&'=');
        // Back to where the statement or attribute begins.
        let start = split.code[..at].iter().rposition(|c| ";{}#".contains(*c)).unwrap_or(0);
        let before: String = split.code[start..at].iter().collect();
        if is_set && before.contains("cfg") {
            let remedy = format!("features are for {FEATURES_LIVE_IN}: decide at run time here");
            offences.push(Offence::new(&file.path, lexer::line_of(&split.code, at), "cfg(feature)", remedy));
        }
    }
}

/// Whether cargo builds the file for tests or benchmarks alone.
fn is_test_file(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "tests" | "benches" | "tests.rs"))
}

fn check_unfinished(file: &File, split: &Split, offences: &mut Vec<Offence>) {
    if is_test_file(&file.path) {
        return;
    }
    let tests = lexer::test_lines(&split.code);
    for name in UNFINISHED {
        for at in lexer::words(&split.code, name) {
            let line = lexer::line_of(&split.code, at);
            let is_macro =
                split.code.get(at + name.len()) == Some(&'!') && split.code.get(at + name.len() + 1) != Some(&'=');
            if is_macro && !tests.iter().any(|range| range.contains(&line)) {
                let remedy = format!("`{name}!` is unfinished work: finish it or take it out");
                offences.push(Offence::new(&file.path, line, "unfinished", remedy));
            }
        }
    }
}

fn check_unsafe(file: &File, split: &Split, offences: &mut Vec<Offence>) {
    if SAFE_CRATES.contains(&file.path.as_str()) && !file.text.contains("#![forbid(unsafe_code)]") {
        offences.push(Offence::new(&file.path, 1, "unsafe", "this crate keeps `#![forbid(unsafe_code)]`"));
    }
    if ONE_REASON_FOR_ALL.contains(&file.path.as_str()) && file.text.contains(ALLOWS_WITH_REASON) {
        return;
    }
    let (code, comments) = (lexer::lines(&split.code), lexer::lines(&split.comments));
    for at in lexer::words(&split.code, "unsafe") {
        let next = lexer::skip_blanks(&split.code, at + "unsafe".len());
        let is_block = split.code.get(next) == Some(&'{');
        if !is_block && lexer::word_at(&split.code, next) != "impl" {
            continue;
        }
        let line = lexer::line_of(&split.code, at);
        if !has_safety_comment(&code, &comments, line - 1) {
            let remedy = format!("say in a `// SAFETY:` comment within {SAFETY_LINES} lines above why it is sound");
            offences.push(Offence::new(&file.path, line, "unsafe", remedy));
        }
    }
}

/// Looks at line `at` (from 0), at the lines right above it, and up through a comment that reaches into those.
fn has_safety_comment(code: &[String], comments: &[String], at: usize) -> bool {
    let mut first = at.saturating_sub(SAFETY_LINES);
    while first > 0 && code[first].trim().is_empty() && !comments[first].trim().is_empty() {
        first -= 1;
    }
    comments[first..=at].iter().any(|comment| comment.contains("SAFETY:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules that a source at `path` breaks, as `rule:line`.
    fn broken_at(path: &str, text: &str) -> Vec<String> {
        let file = File { path: path.into(), text: text.into() };
        let found = check_text(&file).into_iter().chain(check_rust(&file));
        found.map(|o| format!("{}:{}", o.rule, o.line)).collect()
    }

    fn broken(text: &str) -> Vec<String> {
        broken_at("crates/tailorq-quant/src/grid.rs", &format!("//! Grids.\n{text}"))
    }

    #[test]
    fn a_good_file_breaks_nothing() {
        assert_eq!(broken("/// Adds.\npub fn add(a: u8, b: u8) -> u8 {\n    a + b\n}\n"), [""; 0]);
    }

    #[test]
    fn files_have_at_most_800_lines_and_the_main_path_250() {
        assert_eq!(broken(&"\n".repeat(799)), [""; 0]);
        assert_eq!(broken(&"\n".repeat(800)), ["file size:801"]);
        let main_path = |n| broken_at(MAIN_PATH.0, &format!("//! Path.\n{}", "\n".repeat(n)));
        assert_eq!(main_path(249), [""; 0]);
        assert_eq!(main_path(250), ["file size:251"]);
    }

    #[test]
    fn functions_have_at_most_100_lines() {
        let function = |n_inner| format!("fn f() {{\n{}}}\n", "    g();\n".repeat(n_inner));
        assert_eq!(broken(&function(98)), [""; 0]);
        assert_eq!(broken(&function(99)), ["function size:2"]);
    }

    #[test]
    fn braces_in_literals_do_not_stretch_a_function() {
        let text = format!(
            "fn f() -> char {{\n    g(\"{{\", r#\"{{\"#); // {{\n    '{{'\n}}\n{}",
            "const A: u8 = 1;\n".repeat(200)
        );
        assert_eq!(broken(&text), [""; 0]);
    }

    #[test]
    fn every_file_begins_with_its_docs() {
        assert_eq!(broken_at("crates/tailorq-quant/src/grid.rs", "fn f() {}\n"), ["file docs:1"]);
        assert_eq!(broken_at("crates/tailorq-quant/src/grid.rs", ""), ["file docs:1"]);
    }

    #[test]
    fn empty_names_are_refused_as_file_folder_and_module() {
        assert_eq!(broken_at("crates/tailorq-quant/src/utils.rs", "//! U.\n"), ["name:1"]);
        assert_eq!(broken_at("crates/tailorq-quant/tests/common/mod.rs", "//! C.\n"), ["name:1"]);
        assert_eq!(broken("\nmod helpers {\n}\n"), ["name:3"]);
        assert_eq!(broken("// mod misc {}\nmod manager_of_grids {}\n"), [""; 0]);
    }

    #[test]
    fn features_are_decided_in_kernels_alone() {
        let text = "//! K.\n#[cfg(feature = \"cuda\")]\nmod cuda {}\n";
        assert_eq!(broken_at("crates/tailorq-kernels/src/lib.rs", text), [""; 0]);
        assert_eq!(broken_at("crates/tailorq/src/lib.rs", text), ["cfg(feature):2"]);
        assert_eq!(broken("#[cfg(all(\n    unix,\n    feature=\"x\"\n))]\nfn f() {}\n"), ["cfg(feature):4"]);
        assert_eq!(broken("fn f() -> bool {\n    cfg!(feature = \"x\")\n}\n"), ["cfg(feature):3"]);
        assert_eq!(broken("#[target_feature(enable = \"avx2\")]\nfn f() {}\n// cfg(feature = \"x\")\n"), [""; 0]);
    }

    #[test]
    fn paths_of_a_machine_are_refused_in_any_text() {
        for path in MACHINE_PATHS {
            assert_eq!(broken(&format!("const P: &str = \"{path}/me/model\";\n")), ["machine path:2"]);
        }
        assert_eq!(broken(&format!("// https://example.org{}page\n", MACHINE_PATHS[0])), [""; 0]);
    }

    #[test]
    fn unfinished_work_is_refused_outside_tests() {
        for name in UNFINISHED {
            let call = format!("fn f() {{\n    {name}!();\n}}\n");
            assert_eq!(broken(&call), ["unfinished:3"]);
            assert_eq!(broken(&format!("#[cfg(test)]\nmod tests {{\n{call}}}\n")), [""; 0]);
            assert_eq!(broken_at("crates/tailorq/tests/run.rs", &format!("//! T.\n{call}")), [""; 0]);
        }
        assert_eq!(broken("fn f(todo: u8) -> bool {\n    todo!=1 // todo!\n}\n"), [""; 0]);
    }

    #[test]
    fn unsafe_needs_its_reason() {
        assert_eq!(broken("fn f() {\n    unsafe { g() }\n}\n"), ["unsafe:3"]);
        assert_eq!(broken("unsafe impl Send for A {}\n"), ["unsafe:2"]);
        assert_eq!(broken("// SAFETY: the pointer is owned.\nunsafe impl Send for A {}\n"), [""; 0]);
        assert_eq!(
            broken("// SAFETY: too far away.\nfn f() {\n    a();\n    b();\n    unsafe { g() }\n}\n"),
            ["unsafe:6"]
        );
        let long = "// SAFETY: a long story\n// goes on\n// and on\n// and on.\nunsafe { g() }\n";
        assert_eq!(broken(long), [""; 0]);
        assert_eq!(broken("unsafe fn g() {}\nconst S: &str = \"unsafe {\";\n"), [""; 0]);
    }

    #[test]
    fn wrappers_of_intrinsics_give_one_reason_for_all() {
        let block = "fn f() {\n    unsafe { g() }\n}\n";
        let reasoned = format!("//! L.\n{ALLOWS_WITH_REASON}\"the token\")]\n{block}");
        assert_eq!(broken_at(ONE_REASON_FOR_ALL[0], &reasoned), [""; 0]);
        assert_eq!(broken_at(ONE_REASON_FOR_ALL[0], &format!("//! L.\n{block}")), ["unsafe:3"]);
        assert_eq!(broken_at("crates/tailorq-kernels/src/cpu/gram.rs", &reasoned), ["unsafe:4"]);
    }

    #[test]
    fn the_tensor_crate_forbids_unsafe_code() {
        assert_eq!(broken_at(SAFE_CRATES[0], "//! T.\n"), ["unsafe:1"]);
        assert_eq!(broken_at(SAFE_CRATES[0], "//! T.\n#![forbid(unsafe_code)]\n"), [""; 0]);
    }
}
