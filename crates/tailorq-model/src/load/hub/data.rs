//! Files of data sets of the hub, from the same cache and by the same settings as models.

use super::Settings;
use crate::error::ModelError;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};

/// Which of the files that a data set has (paths inside it, `/` between folders, sorted) are wanted, in their order; none if
/// some of those that are needed are not there.
pub type Select<'a> = dyn Fn(&[String]) -> Vec<String> + 'a;

/// The wanted files of the data set `repo` (`org/name`), as paths on this machine: those of the first of `revisions` that
/// the cache holds whole, or else of the first that has them on the hub, fetched into the cache.
pub fn data_set_files(repo: &str, revisions: &[&str], select: &Select<'_>) -> Result<Vec<PathBuf>, ModelError> {
    files(repo, revisions, select, &Settings::from_environment())
}

fn files(repo: &str, revisions: &[&str], select: &Select<'_>, settings: &Settings) -> Result<Vec<PathBuf>, ModelError> {
    if let Some(found) = revisions.iter().find_map(|revision| cached(repo, revision, select, settings)) {
        return Ok(found);
    }
    if settings.offline {
        return Err(ModelError::Hub(format!(
            "data set {repo} has none of the files that are needed in the cache {}, and HF_HUB_OFFLINE forbids to fetch them; fetch them \
             once while online",
            settings.cache.display()
        )));
    }
    let mut first_failure = None;
    for revision in revisions {
        match fetch(repo, revision, select, settings) {
            Ok(files) if !files.is_empty() => return Ok(files),
            Ok(_) => {}
            Err(error) => drop(first_failure.get_or_insert(error)),
        }
    }
    Err(first_failure.unwrap_or_else(|| {
        let page = format!("{}/datasets/{repo}", settings.endpoint);
        ModelError::Hub(format!("{page} has none of the files that are needed (revisions {})", revisions.join(", ")))
    }))
}

/// The wanted files among those of the cached snapshot.
fn cached(repo: &str, revision: &str, select: &Select<'_>, settings: &Settings) -> Option<Vec<PathBuf>> {
    let folder = settings.cache.join(format!("datasets--{}", repo.replace('/', "--")));
    let commit = std::fs::read_to_string(folder.join("refs").join(revision)).ok()?;
    let snapshot = folder.join("snapshots").join(commit.trim());
    let mut names = Vec::new();
    list(&snapshot, "", &mut names);
    names.sort_unstable();
    let wanted = select(&names);
    (!wanted.is_empty()).then(|| wanted.iter().map(|name| snapshot.join(name)).collect())
}

/// All files below a folder, by their paths from `prefix` on.
fn list(folder: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Files of a snapshot are links; what they point to may have been removed.
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        if path.is_dir() {
            list(&path, &format!("{name}/"), names);
        } else if path.exists() {
            names.push(name);
        }
    }
}

fn fetch(repo: &str, revision: &str, select: &Select<'_>, settings: &Settings) -> Result<Vec<PathBuf>, ModelError> {
    let failed = |file: &str, error: &ApiError| failure((repo, revision), settings, file, error);
    let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
        .with_endpoint(settings.endpoint.clone())
        .with_token(settings.token.clone())
        .with_progress(false)
        .build()
        .map_err(|e| failed("", &e))?;
    let api = api.repo(Repo::with_revision(repo.to_owned(), RepoType::Dataset, revision.to_owned()));
    let listing = api.info().map_err(|e| failed("", &e))?;
    // Names become paths in the cache.
    let plain = |name: &String| !name.contains('\\') && name.split('/').all(|p| !["", ".", ".."].contains(&p));
    let mut names: Vec<String> = listing.siblings.into_iter().map(|s| s.rfilename).filter(plain).collect();
    names.sort_unstable();
    select(&names).iter().map(|name| api.get(name).map_err(|e| failed(name, &e))).collect()
}

fn failure((repo, revision): (&str, &str), settings: &Settings, file: &str, error: &ApiError) -> ModelError {
    let page = format!("{}/datasets/{repo}", settings.endpoint);
    let file = if file.is_empty() { String::new() } else { format!(": {file}") };
    let text = error.to_string();
    let remedy = if text.contains("401") || text.contains("403") {
        "it is private or gated: accept its terms on that page and set HF_TOKEN"
    } else if text.contains("404") {
        "there is no such data set or revision any more"
    } else {
        "check the network, or set HF_HUB_OFFLINE=1 to use only what the cache holds"
    };
    ModelError::Hub(format!("cannot fetch {page}{file} (revision {revision}): {text}; {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        Settings::read(|name| variables.get(name).map(|v| (*v).to_owned()))
    }

    fn tests_of(config: &'static str) -> impl Fn(&[String]) -> Vec<String> {
        move |names| names.iter().filter(|n| n.starts_with(config) && n.contains("/test-")).cloned().collect()
    }

    #[test]
    fn the_cache_is_enough() {
        let home = tempfile::tempdir().unwrap();
        let settings = settings(&[("HF_HUB_CACHE", home.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")]);
        let select = tests_of("easy");
        let of = |revisions: &[&str]| files("org/set", revisions, &select, &settings);
        let message = of(&["main"]).unwrap_err().to_string();
        assert!(message.contains("org/set") && message.contains("HF_HUB_OFFLINE"), "{message}");
        let folder = home.path().join("datasets--org--set");
        for (revision, commit) in [("main", "abc"), ("refs/convert/parquet", "def")] {
            let reference = folder.join("refs").join(revision);
            std::fs::create_dir_all(reference.parent().unwrap()).unwrap();
            std::fs::write(reference, format!("{commit}\n")).unwrap();
            std::fs::create_dir_all(folder.join("snapshots").join(commit).join("easy")).unwrap();
        }
        assert!(of(&["main"]).is_err());
        let converted = folder.join("snapshots/def/easy/test-0.parquet");
        std::fs::write(&converted, "x").unwrap();
        assert_eq!(of(&["main", "refs/convert/parquet"]).unwrap(), [converted]);
        let main = folder.join("snapshots/abc/easy/test-1.parquet");
        std::fs::write(&main, "x").unwrap();
        assert_eq!(of(&["main", "refs/convert/parquet"]).unwrap(), [main], "the first revision that has them");
    }

    /// Answers one request as the hub would: a listing, or a file that holds its own path.
    fn answer(mut stream: TcpStream) {
        let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
            .lines()
            .map(Result::unwrap)
            .take_while(|line| !line.is_empty())
            .collect();
        let path = lines[0].split(' ').nth(1).unwrap_or_default().to_owned();
        let first_byte_only = lines.iter().any(|l| l.eq_ignore_ascii_case("range: bytes=0-0"));
        let (headers, body) = if path.starts_with("/api/datasets/org/set/revision/main") {
            let names = ["README.md", "easy/test-0.parquet", "easy/train-0.parquet", "../easy/test-evil"];
            let siblings: Vec<_> = names.iter().map(|n| serde_json::json!({"rfilename": n})).collect();
            (String::new(), serde_json::json!({"sha": "abc", "siblings": siblings}).to_string())
        } else {
            let body = if first_byte_only { path[..1].to_owned() } else { path.clone() };
            let range = format!("bytes 0-{}/{}", body.len() - 1, path.len());
            (format!("ETag: \"tag\"\r\nX-Repo-Commit: abc\r\nContent-Range: {range}\r\n"), body)
        };
        let status = if headers.is_empty() { "200 OK" } else { "206 Partial Content" };
        let answer =
            format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        stream.write_all(answer.as_bytes()).unwrap();
    }

    #[test]
    fn wanted_files_are_fetched_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || listener.incoming().for_each(|stream| answer(stream.unwrap())));
        let home = tempfile::tempdir().unwrap();
        let cache = home.path().to_str().unwrap();
        let online = settings(&[("HF_HUB_CACHE", cache), ("HF_ENDPOINT", &endpoint)]);
        let found = files("org/set", &["main"], &tests_of("easy"), &online).unwrap();
        let snapshot = home.path().join("datasets--org--set/snapshots/abc");
        assert_eq!(found, [snapshot.join("easy/test-0.parquet")]);
        let text = std::fs::read_to_string(&found[0]).unwrap();
        assert_eq!(text, "/datasets/org/set/resolve/main/easy/test-0.parquet");
        assert!(!snapshot.join("easy/train-0.parquet").exists(), "only what is wanted");
        let offline = settings(&[("HF_HUB_CACHE", cache), ("HF_HUB_OFFLINE", "1")]);
        assert_eq!(files("org/set", &["main"], &tests_of("easy"), &offline).unwrap(), found);
        let none = files("org/set", &["main"], &tests_of("hard"), &online).unwrap_err().to_string();
        assert!(none.contains("none of the files") && none.contains("/datasets/org/set"), "{none}");
    }
}
