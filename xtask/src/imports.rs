//! The import table: which crate may know which.

use crate::lexer;
use crate::tidy::{File, Offence};
use anyhow::{Context, Result};
use toml::{Table, Value};

/// A crate of the house.
struct Room {
    name: &'static str,
    /// Imports go to lower floors only. Crates beside the house stand above all of it, and nothing imports them.
    floor: u8,
    /// What its sources may import.
    imports: &'static [&'static str],
    /// What its tests and benchmarks may import beyond that, each with a reason beside it.
    dev_imports: &'static [&'static str],
}

const TENSOR: &str = "tailorq-tensor";
const KERNELS: &str = "tailorq-kernels";
const FORMAT: &str = "tailorq-format";
const MODEL: &str = "tailorq-model";
const CUDA: &str = "tailorq-cuda";
const QUANT: &str = "tailorq-quant";
const RUNTIME: &str = "tailorq-runtime";
const EVAL: &str = "tailorq-eval";
const FACE: &str = "tailorq";

/// The table of ARCHITECTURE.md.
const HOUSE: &[Room] = &[
    Room { name: TENSOR, floor: 1, imports: &[], dev_imports: &[] },
    Room { name: KERNELS, floor: 2, imports: &[TENSOR], dev_imports: &[] },
    Room { name: FORMAT, floor: 2, imports: &[TENSOR], dev_imports: &[] },
    Room { name: MODEL, floor: 3, imports: &[TENSOR, KERNELS, FORMAT], dev_imports: &[] },
    Room { name: QUANT, floor: 4, imports: &[TENSOR, KERNELS, MODEL], dev_imports: &[] },
    Room { name: RUNTIME, floor: 4, imports: &[TENSOR, KERNELS, MODEL], dev_imports: &[] },
    // Rounding on a device is tested against the quantizers.
    Room { name: CUDA, floor: 5, imports: &[TENSOR, KERNELS, MODEL], dev_imports: &[QUANT] },
    Room { name: EVAL, floor: 5, imports: &[TENSOR, MODEL, RUNTIME], dev_imports: &[KERNELS] },
    Room {
        name: FACE,
        floor: 6,
        imports: &[TENSOR, KERNELS, FORMAT, MODEL, CUDA, QUANT, RUNTIME, EVAL],
        dev_imports: &[],
    },
    Room { name: "tailorq-cli", floor: 7, imports: &[FACE, EVAL, RUNTIME], dev_imports: &[MODEL] },
    Room { name: "xtask", floor: 8, imports: &[], dev_imports: &[] },
    Room {
        name: "oracle",
        floor: 8,
        imports: &[TENSOR, KERNELS, FORMAT, MODEL, QUANT, RUNTIME, EVAL, FACE],
        dev_imports: &[],
    },
];

/// Crates from outside that belong to some rooms only.
const GUESTS: &[(&str, &[&str])] = &[
    ("anyhow", &["tailorq-cli", "xtask"]),
    ("clap", &["tailorq-cli"]),
    ("ctrlc", &["tailorq-cli"]),
    ("indicatif", &["tailorq-cli"]),
    ("candle-core", &["oracle"]),
];

const RULE: &str = "import";

/// Checks the manifests of all crates among `files` and the paths that their sources use.
pub fn check(files: &[File]) -> Result<Vec<Offence>> {
    let mut offences = Vec::new();
    for manifest in files.iter().filter(|f| f.path.ends_with("Cargo.toml")) {
        let table: Table = manifest.text.parse().with_context(|| format!("cannot parse {}", manifest.path))?;
        // The workspace's own manifest has no package.
        let Some(name) = table.get("package").and_then(|p| p.get("name")).and_then(Value::as_str) else { continue };
        let Some(room) = HOUSE.iter().find(|room| room.name == name) else {
            let remedy = format!("`{name}` is not in the import table: give it a floor in xtask/src/imports.rs");
            offences.push(Offence::new(&manifest.path, 1, RULE, remedy));
            continue;
        };
        check_manifest(manifest, &table, room, &mut offences);
        let folder = manifest.path.trim_end_matches("Cargo.toml");
        for source in files.iter().filter(|f| f.path.starts_with(folder) && f.path.ends_with(".rs")) {
            check_source(source, folder, room, &mut offences);
        }
    }
    Ok(offences)
}

fn check_manifest(manifest: &File, table: &Table, room: &Room, offences: &mut Vec<Offence>) {
    let mut check_dependencies = |table: &Table| {
        for (kind, is_dev) in [("dependencies", false), ("build-dependencies", false), ("dev-dependencies", true)] {
            let Some(dependencies) = table.get(kind).and_then(Value::as_table) else { continue };
            for (key, value) in dependencies {
                let name = value.get("package").and_then(Value::as_str).unwrap_or(key);
                if let Some(remedy) = refusal(room, name, is_dev) {
                    offences.push(Offence::new(&manifest.path, line_of_key(&manifest.text, kind, key), RULE, remedy));
                }
            }
        }
    };
    check_dependencies(table);
    for platform in table.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values) {
        check_dependencies(platform.as_table().unwrap_or(&Table::new()));
    }
}

/// Why `room` may not depend on `name`, if it may not.
fn refusal(room: &Room, name: &str, is_dev: bool) -> Option<String> {
    if let Some((_, rooms)) = GUESTS.iter().find(|(guest, _)| *guest == name) {
        return (!rooms.contains(&room.name)).then(|| format!("`{name}` is for {} only", rooms.join(", ")));
    }
    let is_ours = name == FACE || name.starts_with("tailorq-") || HOUSE.iter().any(|other| other.name == name);
    let is_allowed = room.imports.contains(&name) || (is_dev && room.dev_imports.contains(&name));
    (is_ours && !is_allowed).then(|| {
        let imports = if room.imports.is_empty() { "nothing of the house".into() } else { room.imports.join(", ") };
        format!("`{}` (floor {}) may not import `{name}`; it may import {imports}", room.name, room.floor)
    })
}

/// Line of `key` in the section that ends in `kind`; 1 when it cannot be told.
fn line_of_key(text: &str, kind: &str, key: &str) -> usize {
    let mut in_section = false;
    for (i, line) in text.lines().enumerate() {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end().trim_end_matches(']');
            in_section = section == kind || section.ends_with(&format!(".{kind}"));
            if section.ends_with(&format!("{kind}.{key}")) {
                return i + 1;
            }
        }
        let rest = line.trim_start().trim_start_matches('"').strip_prefix(key);
        if in_section && rest.is_some_and(|rest| rest.starts_with([' ', '=', '.', '"'])) {
            return i + 1;
        }
    }
    1
}

/// Looks for paths into other crates, which also finds a dev-dependency used outside of tests.
fn check_source(source: &File, folder: &str, room: &Room, offences: &mut Vec<Offence>) {
    let split = lexer::split(&source.text);
    let tests = lexer::test_lines(&split.code);
    let is_dev_file = !source.path[folder.len()..].starts_with("src/");
    // A library's own name is how its tests and its binary call it.
    for other in HOUSE.iter().filter(|other| other.name != room.name) {
        let ident = other.name.replace('-', "_");
        for at in lexer::words(&split.code, &ident) {
            if !is_path(&split.code, at, ident.len()) {
                continue;
            }
            let line = lexer::line_of(&split.code, at);
            let is_dev = is_dev_file || tests.iter().any(|range| range.contains(&line));
            if let Some(remedy) = refusal(room, other.name, is_dev) {
                offences.push(Offence::new(&source.path, line, RULE, remedy));
            }
        }
    }
}

/// Whether the word at `at` names a crate: it begins a path or stands right after `use` or `crate`.
fn is_path(code: &[char], at: usize, len: usize) -> bool {
    let before: String = code[..at].iter().collect();
    let before = before.trim_end();
    // `crate::runtime::…` and `self.tailorq` are somebody else's.
    if before.ends_with('.') || (before.ends_with("::") && before.trim_end_matches("::").ends_with(lexer::is_word)) {
        return false;
    }
    let after: String = code[at + len..].iter().take_while(|c| **c != '\n').collect();
    after.trim_start().starts_with("::") || before.ends_with("use") || before.ends_with("extern crate")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offences of one crate with the given manifest tail and sources, as `path:line`.
    fn broken(name: &str, manifest: &str, sources: &[(&str, &str)]) -> Vec<String> {
        let folder = format!("crates/{name}");
        let text = format!("[package]\nname = \"{name}\"\n{manifest}");
        let mut files = vec![File { path: format!("{folder}/Cargo.toml"), text }];
        files
            .extend(sources.iter().map(|(path, text)| File { path: format!("{folder}/{path}"), text: (*text).into() }));
        check(&files).unwrap().iter().map(|o| format!("{}:{}", &o.path[folder.len() + 1..], o.line)).collect()
    }

    #[test]
    fn the_table_only_points_down() {
        for room in HOUSE {
            for import in room.imports.iter().chain(room.dev_imports) {
                let below = HOUSE.iter().find(|other| other.name == *import).unwrap();
                assert!(below.floor < room.floor, "{} imports {import}, which is not below it", room.name);
            }
        }
    }

    #[test]
    fn the_architecture_page_shows_this_table() {
        let page = std::fs::read_to_string(crate::workspace_root().join("ARCHITECTURE.md")).unwrap();
        let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(String::from).collect::<Vec<_>>();
        let shown: Vec<(Vec<String>, String, Vec<String>)> = page
            .lines()
            .filter_map(|line| {
                let cells: Vec<&str> = line.split('|').collect();
                let floor = cells.get(2)?.trim();
                floor.parse::<u8>().is_ok().then(|| (quoted(cells[1]), floor.to_string(), quoted(cells[3])))
            })
            .collect();
        let strings = |names: &[&str]| names.iter().map(|n| (*n).to_string()).collect::<Vec<_>>();
        let kept: Vec<_> =
            HOUSE.iter().map(|r| (strings(&[r.name]), r.floor.to_string(), strings(r.imports))).collect();
        assert_eq!(shown, kept, "ARCHITECTURE.md and xtask/src/imports.rs disagree");
    }

    #[test]
    fn what_the_table_allows_passes() {
        let manifest =
            "[dependencies]\ntailorq-tensor.workspace = true\nrayon = \"1\"\n[dev-dependencies]\nproptest = \"1\"\n";
        let source = "use tailorq_tensor::Matrix;\nlet a = tailorq_kernels::x();";
        assert_eq!(broken(KERNELS, manifest, &[("src/lib.rs", source)]), [""; 0]);
    }

    #[test]
    fn a_crate_without_a_floor_is_refused() {
        assert_eq!(broken("tailorq-magic", "", &[]), ["Cargo.toml:1"]);
    }

    #[test]
    fn upward_and_sideways_dependencies_are_refused() {
        let depends = |kind: &str, name: &str| format!("\n[{kind}]\nserde = \"1\"\n{name}.workspace = true\n");
        assert_eq!(broken(TENSOR, &depends("dependencies", KERNELS), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(RUNTIME, &depends("dependencies", QUANT), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(EVAL, &depends("dependencies", QUANT), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(QUANT, &depends("dependencies", FORMAT), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(TENSOR, &depends("dev-dependencies", FACE), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(TENSOR, &depends("build-dependencies", MODEL), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(TENSOR, &depends("target.'cfg(unix)'.dependencies", MODEL), &[]), ["Cargo.toml:6"]);
        assert_eq!(broken(FACE, &depends("dependencies", "oracle"), &[]), ["Cargo.toml:6"]);
    }

    #[test]
    fn a_renamed_dependency_is_still_seen() {
        let manifest = "[dependencies]\nq = { package = \"tailorq-quant\", path = \"../tailorq-quant\" }\n";
        assert_eq!(broken(RUNTIME, manifest, &[]), ["Cargo.toml:4"]);
        let manifest = "[dependencies.tailorq-quant]\npath = \"../tailorq-quant\"\n";
        assert_eq!(broken(RUNTIME, manifest, &[]), ["Cargo.toml:3"]);
    }

    #[test]
    fn guests_stay_in_their_rooms() {
        assert_eq!(broken(QUANT, "[dependencies]\nindicatif = \"0.18\"\n", &[]), ["Cargo.toml:4"]);
        assert_eq!(broken(MODEL, "[dev-dependencies]\ncandle-core = \"0.11\"\n", &[]), ["Cargo.toml:4"]);
        assert_eq!(broken("tailorq-cli", "[dependencies]\nanyhow = \"1\"\n", &[]), [""; 0]);
    }

    #[test]
    fn sources_are_read_too() {
        let sources = [("src/lib.rs", "use tailorq_quant::Rtn;\n"), ("tests/a.rs", "\nlet x = tailorq::run();\n")];
        assert_eq!(broken(RUNTIME, "", &sources), ["src/lib.rs:1", "tests/a.rs:2"]);
        let harmless = "// tailorq_quant::x\nlet tailorq = 1;\nlet s = \"tailorq_quant::x\";\nuse crate::tailorq::A;\n";
        assert_eq!(broken(RUNTIME, "", &[("src/lib.rs", harmless)]), [""; 0]);
    }

    #[test]
    fn a_broken_manifest_is_an_error() {
        let files = [File { path: "crates/x/Cargo.toml".into(), text: "[package".into() }];
        assert!(check(&files).unwrap_err().to_string().contains("crates/x/Cargo.toml"));
    }
}
