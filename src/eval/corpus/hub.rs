//! Evaluation text from the Hugging Face hub: out of its cache where a file is there already, else
//! read by parts over HTTP.

use super::Source;
use super::http::{Client, Retry};
use crate::eval::error::{Error, Result};
use hf_hub::{Cache, Repo, RepoType};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

/// What a path keeps when it becomes part of an address.
const PATH: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Bytes of one page of a listing, at most: a page has 1,000 files.
const PAGE: u64 = 16 << 20;

/// Pages of a listing, at most.
const PAGES: usize = 100;

/// A data set of the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dataset {
    /// The Pile's test split, `monology/pile-uncopyrighted`.
    Pile,
    /// WikiText-2 raw test, `Salesforce/wikitext`, `wikitext-2-raw-v1`.
    Wikitext,
    /// Any other.
    Hub {
        /// `OWNER/NAME`.
        repository: String,
        /// A file, or a glob over files; `None` where there is only one.
        files: Option<String>,
    },
}

/// Where a data set was found.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What was found, which after a fallback is not what was asked for.
    pub dataset: Dataset,
    /// Its files, in the hub's cache or on the hub.
    pub sources: Vec<Source>,
    /// Why another data set is used instead of the one asked for.
    pub warning: Option<String>,
}

impl Dataset {
    fn location(&self) -> (&str, Option<&str>) {
        match self {
            Self::Pile => ("monology/pile-uncopyrighted", Some("test.jsonl.zst")),
            Self::Wikitext => {
                ("Salesforce/wikitext", Some("wikitext-2-raw-v1/test-00000-of-00001.parquet"))
            }
            Self::Hub { repository, files } => (repository, files.as_deref()),
        }
    }

    /// Finds the files in the hub's cache or asks the hub for them, without transferring them. The
    /// Pile falls back to WikiText, with a warning in the result. `HF_ENDPOINT`, `HF_HOME`,
    /// `HF_TOKEN` and `HF_HUB_OFFLINE` are the hub library's.
    ///
    /// # Errors
    /// Neither can be had; the message says what to pass instead.
    pub fn fetch(&self) -> Result<Fetched> {
        self.fetch_from(&Hub::from_env())
    }

    fn fetch_from(&self, hub: &Hub) -> Result<Fetched> {
        let first = match self.find(hub) {
            Ok(sources) => return Ok(Fetched { dataset: self.clone(), sources, warning: None }),
            Err(reason) => reason,
        };
        if *self == Self::Pile
            && let Ok(sources) = Self::Wikitext.find(hub)
        {
            let warning = format!(
                "The Pile could not be fetched ({first}); measuring on WikiText-2 instead, whose \
                 figures are not comparable with The Pile's"
            );
            return Ok(Fetched { dataset: Self::Wikitext, sources, warning: Some(warning) });
        }
        Err(Error::Dataset(format!(
            "cannot fetch {} from the Hugging Face hub: {first}; without a network pass a local \
             file: --data FILE.parquet, .jsonl, .jsonl.zst or .txt",
            self.location().0
        )))
    }

    fn find(&self, hub: &Hub) -> Result<Vec<Source>> {
        let (repository, files) = self.location();
        let names = match files {
            Some(file) if !file.contains(['*', '?', '[']) => vec![file.to_owned()],
            _ => choose(&hub.list(repository)?, files)?,
        };
        names.iter().map(|name| hub.source(repository, name)).collect()
    }
}

/// The files of evaluation text that a glob picks, sorted; without a glob the only one.
fn choose(listed: &[String], pattern: Option<&str>) -> Result<Vec<String>> {
    let mut found: Vec<String> = match pattern {
        Some(text) => {
            let pattern = glob::Pattern::new(text)
                .map_err(|e| Error::Dataset(format!("{text}: not a glob: {e}")))?;
            listed.iter().filter(|name| pattern.matches(name)).cloned().collect()
        }
        None => listed.iter().filter(|name| is_text(name)).cloned().collect(),
    };
    found.sort();
    let examples = || listed.iter().take(10).map(String::as_str).collect::<Vec<_>>().join(", ");
    match (pattern, found.len()) {
        (_, 0) => Err(Error::Dataset(format!(
            "no file {}; it has {}",
            pattern.map_or("of evaluation text".into(), |text| format!("that {text} matches")),
            examples()
        ))),
        (None, 2..) => Err(Error::Dataset(format!(
            "it has {} files of text ({}{}): say which, OWNER/NAME:PATH-OR-GLOB",
            found.len(),
            found[..found.len().min(5)].join(", "),
            if found.len() > 5 { ", ..." } else { "" }
        ))),
        _ => Ok(found),
    }
}

/// Whether a file holds text, rather than facts about the data set.
fn is_text(name: &str) -> bool {
    let kind = super::source::Kind::of(name);
    kind.is_some() && !name.ends_with(".json") && !name.ends_with(".txt")
}

/// The hub, or a server that speaks like it.
struct Hub {
    endpoint: String,
    token: Option<String>,
    offline: bool,
    cache: Cache,
    client: Client,
}

/// An entry of a listing.
#[derive(Deserialize)]
struct Entry {
    r#type: String,
    path: String,
}

impl Hub {
    fn from_env() -> Self {
        let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
        Self {
            endpoint: endpoint(),
            token: token(),
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.to_uppercase().as_str()),
            cache: Cache::from_env(),
            client: Client::new(Retry::default()),
        }
    }

    /// A file of a repository: the cached one, or the hub's after it has answered.
    fn source(&self, repository: &str, file: &str) -> Result<Source> {
        let cached = self.cache.repo(Repo::new(repository.into(), RepoType::Dataset)).get(file);
        if let Some(path) = cached {
            return Source::file(&path);
        }
        self.online()?;
        let file = utf8_percent_encode(file, PATH);
        let url = format!("{}/datasets/{repository}/resolve/main/{file}", self.endpoint);
        let remote = self.client.remote(&url, self.token.clone());
        let source = Source::remote(remote.clone())?;
        remote.open()?;
        Ok(source)
    }

    /// The files of a repository.
    fn list(&self, repository: &str) -> Result<Vec<String>> {
        self.online()?;
        let mut url =
            Some(format!("{}/api/datasets/{repository}/tree/main?recursive=true", self.endpoint));
        let mut files = Vec::new();
        for _ in 0..PAGES {
            let Some(page) = url.take() else { return Ok(files) };
            let (body, headers) = self.client.remote(&page, self.token.clone()).document(PAGE)?;
            let entries: Vec<Entry> = serde_json::from_slice(&body).map_err(|e| {
                Error::Dataset(format!("{repository}: the hub's listing is not understood: {e}"))
            })?;
            files.extend(entries.into_iter().filter(|e| e.r#type == "file").map(|e| e.path));
            let link = headers.get("link").and_then(|value| value.to_str().ok());
            // The token goes with the request: pages elsewhere are not followed.
            url = link.and_then(next);
            if let Some(next) = url.as_ref().filter(|next| !within(next, &self.endpoint)) {
                return Err(Error::Dataset(format!(
                    "{repository}: the listing goes on at {next}, outside {}: name the file",
                    self.endpoint
                )));
            }
        }
        Err(Error::Dataset(format!("{repository} has too many files to list: name the file")))
    }

    fn online(&self) -> Result<()> {
        match self.offline {
            true => Err(Error::Dataset("it is not in the cache, and HF_HUB_OFFLINE is set".into())),
            false => Ok(()),
        }
    }
}

/// The address of the next page in a `Link` header (RFC 8288).
fn next(link: &str) -> Option<String> {
    let entry = link.split(',').find(|entry| entry.contains("rel=\"next\""))?;
    let (_, rest) = entry.split_once('<')?;
    Some(rest.split_once('>')?.0.to_owned())
}

fn endpoint() -> String {
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|text| !text.is_empty());
    let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".into());
    endpoint.trim_end_matches('/').to_owned()
}

fn token() -> Option<String> {
    let set = std::env::var("HF_TOKEN").ok().map(|token| token.trim().to_owned());
    set.filter(|token| !token.is_empty()).or_else(|| Cache::from_env().token())
}

/// Whether an address belongs to a server.
fn within(url: &str, endpoint: &str) -> bool {
    url.strip_prefix(endpoint).is_some_and(|rest| rest.starts_with('/'))
}

/// The hub's token, for addresses of the hub only.
pub(super) fn token_for(url: &str) -> Option<String> {
    within(url, &endpoint()).then(token).flatten()
}

impl std::str::FromStr for Dataset {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let plain = |text: &str| {
            !text.is_empty()
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && text.chars().any(|c| c != '.')
        };
        let (repository, files) = match name.split_once(':') {
            Some((repository, files)) => (repository, Some(files.to_owned())),
            None => (name, None),
        };
        match (name, repository.split_once('/')) {
            ("pile", _) => Ok(Self::Pile),
            ("wikitext", _) => Ok(Self::Wikitext),
            (_, Some((owner, own)))
                if plain(owner) && plain(own) && files.as_deref() != Some("") =>
            {
                Ok(Self::Hub { repository: repository.into(), files })
            }
            _ => Err(format!(
                "unknown data set {name:?}; known are pile, wikitext, and any of the hub as \
                 OWNER/NAME or OWNER/NAME:PATH-OR-GLOB"
            )),
        }
    }
}

impl std::fmt::Display for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pile => f.write_str("pile"),
            Self::Wikitext => f.write_str("wikitext"),
            Self::Hub { repository, files: None } => f.write_str(repository),
            Self::Hub { repository, files: Some(files) } => write!(f, "{repository}:{files}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::http::{Server, quick};
    use super::*;
    use crate::eval::observer::Silent;

    fn hub(server: &Server, cache: &std::path::Path) -> Hub {
        Hub {
            endpoint: server.url.clone(),
            token: Some("hf_x".into()),
            offline: false,
            cache: Cache::new(cache.into()),
            client: quick(),
        }
    }

    fn texts(fetched: &Fetched) -> Vec<String> {
        let open = |source: &Source| source.open(&Silent).unwrap();
        fetched.sources.iter().flat_map(open).map(|document| document.unwrap().text).collect()
    }

    fn line(text: &str) -> Vec<u8> {
        format!("{{\"text\": \"{text}\"}}\n").into_bytes()
    }

    const TREE: &str = "api/datasets/me/set/tree/main";
    const FILES: &str = "datasets/me/set/resolve/main";

    #[test]
    fn files_are_listed_chosen_and_read_with_the_token() {
        let page = |paths: &[&str]| {
            let entry = |path: &&str| serde_json::json!({"type": "file", "path": path, "size": 1});
            let mut entries: Vec<_> = paths.iter().map(entry).collect();
            entries.push(serde_json::json!({"type": "directory", "path": "data"}));
            serde_json::to_vec(&entries).unwrap()
        };
        let listing = ["README.md", "data/b c.jsonl", "data/a.jsonl", "info.json"];
        let server = Server::new([
            (TREE, page(&listing)),
            (&format!("{FILES}/data/a.jsonl"), line("a")),
            (&format!("{FILES}/data/b%20c.jsonl"), line("b")),
        ]);
        let dir = tempfile::tempdir().unwrap();
        let fetch =
            |name: &str| name.parse::<Dataset>().unwrap().fetch_from(&hub(&server, dir.path()));
        assert_eq!(texts(&fetch("me/set:data/*.jsonl").unwrap()), ["a", "b"]);
        assert_eq!(texts(&fetch("me/set:data/a.jsonl").unwrap()), ["a"]);
        assert!(server.state().requests.iter().all(|r| r.token.as_deref() == Some("Bearer hf_x")));
        let several = fetch("me/set").unwrap_err().to_string();
        assert!(several.contains("2 files of text (data/a.jsonl, data/b c.jsonl)"), "{several}");
        let none = fetch("me/set:x/*.parquet").unwrap_err().to_string();
        assert!(none.contains("that x/*.parquet matches; it has README.md"), "{none}");
        let missing = fetch("me/other").unwrap_err().to_string();
        assert!(missing.contains("404") && missing.contains("--data FILE"), "{missing}");

        server.state().files.insert(format!("/{TREE}"), page(&listing[..3]));
        let next = format!("<{}/second>; rel=\"next\"", server.at(TREE));
        server.state().files.insert(format!("/{TREE}/second"), page(&["c.parquet"]));
        server.state().headers.push(format!("Link: {next}"));
        let endless = fetch("me/set").unwrap_err().to_string();
        assert!(endless.contains("too many files"), "{endless}");
    }

    #[test]
    fn the_cache_comes_first_and_is_all_there_is_offline() {
        let server = Server::new([(&*format!("{FILES}/a.jsonl"), line("hub"))]);
        let dir = tempfile::tempdir().unwrap();
        let cached = dir.path().join("datasets--me--set");
        std::fs::create_dir_all(cached.join("refs")).unwrap();
        std::fs::create_dir_all(cached.join("snapshots/abc")).unwrap();
        std::fs::write(cached.join("refs/main"), "abc").unwrap();
        std::fs::write(cached.join("snapshots/abc/a.jsonl"), line("cache")).unwrap();
        let hub = Hub { offline: true, ..hub(&server, dir.path()) };
        let fetch = |name: &str| name.parse::<Dataset>().unwrap().fetch_from(&hub);
        assert_eq!(texts(&fetch("me/set:a.jsonl").unwrap()), ["cache"]);
        let message = fetch("me/set:b.jsonl").unwrap_err().to_string();
        assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
        assert!(server.state().requests.is_empty());
    }

    #[test]
    fn the_pile_falls_back_to_wikitext_and_says_so() {
        let path = "datasets/Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/\
                    test-00000-of-00001.parquet";
        let parquet = super::super::http::testing_parquet(&["x".to_owned()], 1);
        let server = Server::new([(path, parquet)]);
        let dir = tempfile::tempdir().unwrap();
        let fetched = Dataset::Pile.fetch_from(&hub(&server, dir.path())).unwrap();
        assert_eq!((&fetched.dataset, texts(&fetched)), (&Dataset::Wikitext, vec!["x".to_owned()]));
        let warning = fetched.warning.unwrap();
        assert!(warning.contains("404") && warning.contains("not comparable"), "{warning}");
    }

    #[test]
    fn names() {
        let parse = |name: &str| name.parse::<Dataset>().map(|dataset| dataset.to_string());
        for good in ["pile", "wikitext", "a/b-c.d", "a/b:c d/*.parquet"] {
            assert_eq!(parse(good).as_deref(), Ok(good));
        }
        for bad in ["", "x", "a/b/c", "../x", "a/..", "a/b:", "a b/c"] {
            assert!(parse(bad).unwrap_err().contains("OWNER/NAME"), "{bad}");
        }
        let link = "<https://x/1>; rel=\"prev\", <https://x/2>; rel=\"next\"";
        assert_eq!(next(link).as_deref(), Some("https://x/2"));
        assert!(within("https://x/a", "https://x") && !within("https://x.evil/a", "https://x"));
    }
}
