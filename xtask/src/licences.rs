//! The terms, names and sources of all dependencies, against the lists of `deny.toml`.
//!
//! cargo-deny reads the same file and knows more (advisories, wildcards); this needs no tool beside cargo.

use crate::tidy::Offence;
use anyhow::{Context, Result, bail};
use serde_json::Value as Json;
use std::path::Path;
use std::process::Command;
use toml::{Table, Value};

/// Where cargo says that a crate of crates.io comes from.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";
const LOCK: &str = "Cargo.lock";

/// The lists of `deny.toml`.
struct Policy {
    /// Licences that any crate may have.
    allowed: Vec<String>,
    /// Licences that one crate may have beyond those.
    exceptions: Vec<(String, String)>,
    /// Crates that may not be there.
    banned: Vec<String>,
}

/// A crate of the lock file.
struct Package {
    name: String,
    licence: String,
    /// `None` for the crates of this workspace.
    source: Option<String>,
}

/// Asks cargo for the whole tree, all platforms and features, and checks each crate.
pub fn check(root: &Path) -> Result<Vec<Offence>> {
    let text = std::fs::read_to_string(root.join("deny.toml")).context("cannot read deny.toml")?;
    let policy = policy(&text)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
        .current_dir(root)
        .output()
        .context("cannot start cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let packages = packages(&output.stdout)?;
    Ok(packages.iter().filter_map(|package| judge(package, &policy)).collect())
}

fn policy(text: &str) -> Result<Policy> {
    let table: Table = text.parse().context("cannot parse deny.toml")?;
    let list = |section: &str, key: &str| -> Result<Vec<Value>> {
        let list = table.get(section).and_then(|s| s.get(key)).and_then(Value::as_array);
        list.cloned().with_context(|| format!("deny.toml has no list `{key}` in [{section}]"))
    };
    let strings = |values: &[Value]| values.iter().filter_map(Value::as_str).map(String::from).collect::<Vec<_>>();
    let crate_name = |value: &Value| value.get("crate").and_then(Value::as_str).map(String::from);
    let mut exceptions = Vec::new();
    for exception in list("licenses", "exceptions")? {
        let name = crate_name(&exception).context("an exception in deny.toml names no crate")?;
        let licences = exception.get("allow").and_then(Value::as_array).map(|l| strings(l)).unwrap_or_default();
        exceptions.extend(licences.into_iter().map(|licence| (name.clone(), licence)));
    }
    Ok(Policy {
        allowed: strings(&list("licenses", "allow")?),
        exceptions,
        banned: list("bans", "deny")?.iter().filter_map(crate_name).collect(),
    })
}

fn packages(metadata: &[u8]) -> Result<Vec<Package>> {
    let metadata: Json = serde_json::from_slice(metadata).context("cargo metadata wrote no JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let text = |package: &Json, key: &str| package[key].as_str().map(String::from);
    Ok(packages
        .iter()
        .map(|package| Package {
            name: text(package, "name").unwrap_or_default(),
            licence: text(package, "license").unwrap_or_default(),
            source: text(package, "source"),
        })
        .collect())
}

/// What is wrong with a crate, if anything.
fn judge(package: &Package, policy: &Policy) -> Option<Offence> {
    let Package { name, licence, source } = package;
    if policy.banned.contains(name) {
        return Some(Offence::new(LOCK, 1, "ban", format!("`{name}` is banned by deny.toml: choose other features")));
    }
    if source.as_ref().is_some_and(|source| source != CRATES_IO) {
        return Some(Offence::new(LOCK, 1, "source", format!("`{name}` does not come from crates.io: use a release")));
    }
    let is_allowed = |one: &str| {
        policy.allowed.iter().any(|l| l == one) || policy.exceptions.iter().any(|(c, l)| c == name && l == one)
    };
    if satisfied(licence, &is_allowed) {
        return None;
    }
    let remedy = format!("`{name}` is under '{licence}', which deny.toml does not allow: replace it or decide there");
    Some(Offence::new(LOCK, 1, "licence", remedy))
}

/// Whether an SPDX expression can be met with allowed licences. A slash is the old way to write `OR`.
fn satisfied(expression: &str, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    either(&tokens, &mut at, is_allowed) == Some(true) && at == tokens.len()
}

/// `a OR b OR …`; `None` when the expression is malformed.
fn either(tokens: &[&str], at: &mut usize, is_allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut met = both(tokens, at, is_allowed)?;
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(tokens, at, is_allowed)?;
    }
    Some(met)
}

/// `a AND b AND …`, which binds tighter than `OR`.
fn both(tokens: &[&str], at: &mut usize, is_allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut met = one(tokens, at, is_allowed)?;
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(tokens, at, is_allowed)?;
    }
    Some(met)
}

/// A licence, one `WITH` an exception, or an expression in parentheses.
fn one(tokens: &[&str], at: &mut usize, is_allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let name = *tokens.get(*at)?;
    *at += 1;
    if name == "(" {
        let met = either(tokens, at, is_allowed)?;
        let closed = tokens.get(*at) == Some(&")");
        *at += 1;
        return closed.then_some(met);
    }
    if matches!(name, ")" | "OR" | "AND" | "WITH") {
        return None;
    }
    if tokens.get(*at) == Some(&"WITH") {
        let exception = tokens.get(*at + 1)?;
        *at += 2;
        return Some(is_allowed(&format!("{name} WITH {exception}")));
    }
    Some(is_allowed(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENY: &str = "[licenses]\nallow = [\"MIT\", \"Zlib\", \"Apache-2.0 WITH LLVM-exception\"]\n\
                        exceptions = [{ crate = \"certs\", allow = [\"CDLA\"] }]\n\
                        [bans]\ndeny = [{ crate = \"openssl\" }]\n";

    fn rule(name: &str, licence: &str, source: Option<&str>) -> Option<&'static str> {
        let package = Package { name: name.into(), licence: licence.into(), source: source.map(String::from) };
        judge(&package, &policy(DENY).unwrap()).map(|o| o.rule)
    }

    #[test]
    fn expressions_follow_spdx() {
        let met = |expression: &str| satisfied(expression, &|l| matches!(l, "MIT" | "ISC" | "A WITH E"));
        for good in
            ["MIT", "GPL OR MIT", "GPL/MIT", "MIT AND ISC", "(GPL OR MIT) AND ISC", "GPL AND X OR MIT", "A WITH E"]
        {
            assert!(met(good), "{good}");
        }
        for bad in ["", "GPL", "GPL AND MIT", "MIT AND (GPL OR X)", "A", "MIT OR", "(MIT", "MIT)", "MIT ISC", "A WITH"]
        {
            assert!(!met(bad), "{bad}");
        }
    }

    #[test]
    fn crates_are_judged_by_name_source_and_terms() {
        assert_eq!(rule("a", "GPL-3.0 OR Zlib", Some(CRATES_IO)), None);
        assert_eq!(rule("ours", "MIT", None), None);
        assert_eq!(rule("a", "GPL-3.0", Some(CRATES_IO)), Some("licence"));
        assert_eq!(rule("a", "", Some(CRATES_IO)), Some("licence"));
        assert_eq!(rule("certs", "CDLA", Some(CRATES_IO)), None);
        assert_eq!(rule("a", "CDLA", Some(CRATES_IO)), Some("licence"));
        assert_eq!(rule("openssl", "MIT", Some(CRATES_IO)), Some("ban"));
        assert_eq!(rule("a", "MIT", Some("git+https://example.org/a")), Some("source"));
    }

    #[test]
    fn what_cargo_says_is_read() {
        let json =
            br#"{"packages":[{"name":"a","license":"MIT","source":null},{"name":"b","license":null,"source":"x"}]}"#;
        let found = packages(json).unwrap();
        assert_eq!((found[0].licence.as_str(), found[0].source.as_deref()), ("MIT", None));
        assert_eq!((found[1].licence.as_str(), found[1].source.as_deref()), ("", Some("x")));
        assert!(packages(b"{}").is_err());
        assert!(policy("[licenses]").is_err());
    }

    #[test]
    fn the_shipped_policy_can_be_read() {
        let text = std::fs::read_to_string(crate::workspace_root().join("deny.toml")).unwrap();
        assert!(policy(&text).unwrap().allowed.contains(&"MIT".to_string()));
    }
}
