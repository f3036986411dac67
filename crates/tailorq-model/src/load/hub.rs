//! Hub ids: from `org/name[@revision]` to a directory of the local cache, fetched if need be.

mod data;

pub use data::{Select, data_set_files};

use crate::error::ModelError;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Files that a model must have beside its weights.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Files that are fetched when the repository has them, beside the extra files of a directory.
const OPTIONAL: [&str; 2] = ["generation_config.json", "tokenizer_config.json"];

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A repository of the hub at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubId {
    repo: String,
    revision: String,
}

impl HubId {
    /// Reads `org/name` or `org/name@revision`; `None` when `source` can only be a path.
    pub(super) fn parse(source: &str) -> Option<Self> {
        let (repo, revision) = source.split_once('@').unwrap_or((source, "main"));
        let (org, name) = repo.split_once('/')?;
        let word = |s: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !s.is_empty() && !s.starts_with('.') && s.chars().all(legal)
        };
        let plain_revision = !revision.is_empty()
            && revision.split('/').all(|part| !part.is_empty() && part != ".." && part != ".")
            && revision.chars().all(|c| !c.is_control() && !c.is_whitespace() && !"\\?#%".contains(c));
        let legal = word(org) && word(name) && plain_revision && !name.ends_with(".gguf");
        legal.then(|| HubId { repo: repo.to_owned(), revision: revision.to_owned() })
    }
}

/// Where the cache lies and how the hub is asked, from the environment variables of the Hugging Face libraries.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    /// Where a token was looked for, for messages.
    token_file: PathBuf,
    offline: bool,
}

impl Settings {
    pub(super) fn from_environment() -> Self {
        Settings::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let user_cache =
            || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME").or_else(|| path("USERPROFILE"))?.join(".cache")));
        let home = path("HF_HOME").unwrap_or_else(|| user_cache().unwrap_or_default().join("huggingface"));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = (variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")))
            .or_else(|| std::fs::read_to_string(&token_file).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let truth = |name: &str| {
            variable(name).is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.to_ascii_uppercase().as_str()))
        };
        Settings {
            cache,
            endpoint: variable("HF_ENDPOINT").map_or(DEFAULT_ENDPOINT.into(), |e| e.trim_end_matches('/').to_owned()),
            token,
            token_file,
            offline: truth("HF_HUB_OFFLINE") || truth("TRANSFORMERS_OFFLINE"),
        }
    }
}

/// The directory of the model: a whole snapshot of the cache if there is one, else fetched.
pub(super) fn resolve(id: &HubId, settings: &Settings) -> Result<PathBuf, ModelError> {
    if let Some(snapshot) = cached_snapshot(id, settings) {
        return Ok(snapshot);
    }
    if settings.offline {
        return Err(ModelError::Hub(format!(
            "{} (revision {}) is not in the cache {}, and HF_HUB_OFFLINE forbids to fetch it; fetch it once while online, or give the \
             path of a model",
            id.repo,
            id.revision,
            settings.cache.display()
        )));
    }
    fetch(id, settings)
}

/// The snapshot of `id` in the cache, if all files that are needed lie in it.
fn cached_snapshot(id: &HubId, settings: &Settings) -> Option<PathBuf> {
    let repo = settings.cache.join(format!("models--{}", id.repo.replace('/', "--")));
    let commit = std::fs::read_to_string(repo.join("refs").join(&id.revision));
    // A commit hash has no file under refs.
    let commit = commit.map_or_else(|_| id.revision.clone(), |c| c.trim().to_owned());
    let snapshot = repo.join("snapshots").join(commit);
    let whole = REQUIRED.iter().all(|f| snapshot.join(f).exists())
        && (snapshot.join(WEIGHTS).exists() || has_all_shards(&snapshot));
    whole.then_some(snapshot)
}

fn has_all_shards(snapshot: &Path) -> bool {
    let index = super::directory::read_json(&snapshot.join(INDEX)).ok();
    index.and_then(|index| shards(&index)).is_some_and(|shards| shards.iter().all(|s| snapshot.join(s).exists()))
}

/// The files that a shard index names; `None` when it is no index, or names a file outside its directory.
fn shards(index: &Value) -> Option<BTreeSet<String>> {
    let map = index.get("weight_map")?.as_object()?;
    let names: Option<BTreeSet<String>> = map.values().map(|v| v.as_str().map(str::to_owned)).collect();
    names.filter(|names| names.iter().all(|n| !n.contains(['/', '\\']) && n.ends_with(".safetensors")))
}

/// Fetches what is missing into the cache.
fn fetch(id: &HubId, settings: &Settings) -> Result<PathBuf, ModelError> {
    let failed = |file: &str| {
        let file = file.to_owned();
        move |error: ApiError| fetch_error(id, settings, &file, &error)
    };
    let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
        .with_endpoint(settings.endpoint.clone())
        .with_token(settings.token.clone())
        .with_progress(false)
        .build()
        .map_err(failed(""))?;
    let repo = api.repo(Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone()));
    let listing = repo.info().map_err(failed(""))?;
    let available: BTreeSet<&str> = listing.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    check_listing(id, settings, &available)?;
    let optional = OPTIONAL.iter().chain(&super::directory::EXTRA_FILES).filter(|f| available.contains(**f));
    let mut config = None;
    for file in REQUIRED.iter().chain(optional) {
        let path = repo.get(file).map_err(failed(file))?;
        config.get_or_insert(path);
    }
    fetch_weights(&repo, &available, &failed)?;
    let snapshot = config.as_deref().and_then(Path::parent).map(Path::to_owned);
    Ok(snapshot.expect("config.json is always fetched, and a fetched file lies in a snapshot"))
}

fn fetch_weights<F: Fn(ApiError) -> ModelError>(
    repo: &ApiRepo,
    available: &BTreeSet<&str>,
    failed: &dyn Fn(&str) -> F,
) -> Result<(), ModelError> {
    if available.contains(WEIGHTS) {
        repo.get(WEIGHTS).map_err(failed(WEIGHTS))?;
        return Ok(());
    }
    let index_path = repo.get(INDEX).map_err(failed(INDEX))?;
    let shards = shards(&super::directory::read_json(&index_path)?).ok_or_else(|| ModelError::File {
        path: index_path,
        problem: "is not an index of safetensors shards that lie beside it".into(),
    })?;
    for shard in &shards {
        repo.get(shard).map_err(failed(shard))?;
    }
    Ok(())
}

/// Fails early, and with a remedy, when the repository cannot be a model for tailorq.
fn check_listing(id: &HubId, settings: &Settings, available: &BTreeSet<&str>) -> Result<(), ModelError> {
    let page = format!("{}/{}", settings.endpoint, id.repo);
    if !available.contains(WEIGHTS) && !available.contains(INDEX) {
        let remedy = match available.iter().find(|f| f.ends_with(".gguf")) {
            Some(file) => format!("it has GGUF files: download one, such as {file}, and give its path"),
            None => "only safetensors weights are read".into(),
        };
        return Err(ModelError::Hub(format!("{page} has no {WEIGHTS}; {remedy}")));
    }
    match REQUIRED.iter().find(|f| !available.contains(**f)) {
        None => Ok(()),
        Some(file) => Err(ModelError::Hub(format!(
            "{page} has no {file}; download the model, make the file with transformers \
             (AutoTokenizer.from_pretrained, save_pretrained) and give the directory"
        ))),
    }
}

fn fetch_error(id: &HubId, settings: &Settings, file: &str, error: &ApiError) -> ModelError {
    let page = format!("{}/{}", settings.endpoint, id.repo);
    let what = match file {
        "" => format!("{page} (revision {})", id.revision),
        file => format!("{page}: {file} (revision {})", id.revision),
    };
    let token = match &settings.token {
        Some(_) => "a token was sent".to_owned(),
        None => format!("no token was found in HF_TOKEN, HUGGING_FACE_HUB_TOKEN or {}", settings.token_file.display()),
    };
    let text = error.to_string();
    let remedy = if text.contains("404") {
        "there is no such model or revision (nor a file or directory of this name); check the spelling".to_owned()
    } else if text.contains("401") || text.contains("403") {
        format!(
            "there is no such model, or it is private or gated: accept its terms on that page and set HF_TOKEN ({token})"
        )
    } else {
        "check the network, or set HF_HUB_OFFLINE=1 to use only what the cache holds".to_owned()
    };
    ModelError::Hub(format!("cannot fetch {what}: {text}; {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        Settings::read(|name| variables.get(name).map(|v| (*v).to_owned()))
    }

    fn id(source: &str) -> HubId {
        HubId::parse(source).unwrap()
    }

    #[test]
    fn ids_and_paths() {
        assert_eq!(id("org/name"), HubId { repo: "org/name".into(), revision: "main".into() });
        assert_eq!(id("org/na.me-1@refs/pr/3").revision, "refs/pr/3");
        for path in [
            "name",
            "./org/name",
            "/org/name",
            "a/b/c",
            "org/",
            "../name",
            "org/name@",
            "a/b@../x",
            "a/b.gguf",
            "a b/c",
        ] {
            assert_eq!(HubId::parse(path), None, "{path}");
        }
    }

    #[test]
    fn environment_of_the_hugging_face_libraries() {
        let s = settings(&[("HOME", "/u")]);
        assert_eq!((s.cache, s.token_file), ("/u/.cache/huggingface/hub".into(), "/u/.cache/huggingface/token".into()));
        let s = settings(&[
            ("HF_HOME", "/h"),
            ("HF_TOKEN", " t\n"),
            ("HF_HUB_OFFLINE", "true"),
            ("HF_ENDPOINT", "http://m/"),
        ]);
        assert_eq!((s.cache, s.token.as_deref(), s.offline), ("/h/hub".into(), Some("t"), true));
        assert_eq!(s.endpoint, "http://m");
        let s = settings(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c"), ("HUGGING_FACE_HUB_TOKEN", "u")]);
        assert_eq!((s.cache, s.token.as_deref(), s.offline), ("/c".into(), Some("u"), false));
    }

    #[test]
    fn the_token_file_is_read() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from-file\n").unwrap();
        assert_eq!(settings(&[("HF_HOME", home.path().to_str().unwrap())]).token.as_deref(), Some("from-file"));
    }

    #[test]
    fn offline_reads_whole_snapshots_only() {
        let home = tempfile::tempdir().unwrap();
        let settings = settings(&[("HF_HOME", home.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")]);
        let message = resolve(&id("org/name"), &settings).unwrap_err().to_string();
        assert!(message.contains("HF_HUB_OFFLINE") && message.contains("org/name"), "{message}");

        let repo = home.path().join("hub/models--org--name");
        let snapshot = repo.join("snapshots/abc");
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        for file in REQUIRED {
            std::fs::write(snapshot.join(file), "{}").unwrap();
        }
        std::fs::write(snapshot.join(INDEX), r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#)
            .unwrap();
        std::fs::write(snapshot.join("1.safetensors"), "").unwrap();
        assert!(resolve(&id("org/name"), &settings).is_err(), "one shard is missing");
        std::fs::write(snapshot.join("2.safetensors"), "").unwrap();
        assert_eq!(resolve(&id("org/name"), &settings).unwrap(), snapshot);
        assert_eq!(resolve(&id("org/name@abc"), &settings).unwrap(), snapshot, "by commit");
        assert!(resolve(&id("org/name@other"), &settings).is_err());
    }

    /// A hub that answers every request with this status line and body, for as many requests as the test makes.
    fn hub(status: &'static str, body: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                while lines.next().is_some_and(|l| l.is_ok_and(|l| !l.is_empty())) {}
                let answer =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        address
    }

    fn failure(status: &'static str, body: &'static str) -> String {
        let home = tempfile::tempdir().unwrap();
        let endpoint = hub(status, body);
        let settings = settings(&[("HF_HOME", home.path().to_str().unwrap()), ("HF_ENDPOINT", &endpoint)]);
        let message = resolve(&id("org/name"), &settings).unwrap_err().to_string();
        assert!(message.contains(&format!("{endpoint}/org/name")), "{message}");
        message
    }

    #[test]
    fn refusals_of_the_hub_say_what_to_do() {
        assert!(failure("404 Not Found", "").contains("no such model"));
        let gated = failure("401 Unauthorized", "");
        assert!(gated.contains("gated") && gated.contains("HF_TOKEN") && gated.contains("token"), "{gated}");
        let gguf = failure("200 OK", r#"{"siblings": [{"rfilename": "m.Q4_0.gguf"}], "sha": "abc"}"#);
        assert!(gguf.contains("m.Q4_0.gguf"), "{gguf}");
        let slow = failure(
            "200 OK",
            r#"{"siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}], "sha": "abc"}"#,
        );
        assert!(slow.contains("no tokenizer.json"), "{slow}");
    }
}
