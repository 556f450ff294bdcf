//! What a model consists of: which files of which version, how large, with which checksums.

use std::collections::BTreeSet;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::Method;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use url::Url;

use crate::{
    client::{Client, Failure, Follow, Response, Retries},
    digest::{Digest, hex},
    error::HubError,
    source::{HubModel, ModelSource, is_name, is_path},
};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// What a server reads beside the weights, where it is there.
const BESIDE: [&str; 5] = [
    CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Files that are asked about at once.
const AT_ONCE: usize = 8;

/// The revision of what a URL leads to.
pub(crate) const LATEST: &str = "latest";

/// A model as its server has it at the moment.
#[derive(Debug)]
pub(crate) struct Remote {
    /// A branch or tag, or the commit itself.
    pub(crate) revision: String,
    pub(crate) commit: String,
    pub(crate) files: Vec<RemoteFile>,
    pub(crate) model: Model,
}

#[derive(Clone, Debug)]
pub(crate) struct RemoteFile {
    pub(crate) path: String,
    pub(crate) url: Url,
    pub(crate) size: u64,
    /// What the server calls this content.
    pub(crate) etag: String,
    pub(crate) digest: Option<Digest>,
}

/// What of a snapshot is the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    /// All of it: config, tokenizer and safetensors.
    Folder {
        /// Whether the files with weights are those that an index lists.
        indexed: bool,
    },
    /// A GGUF file.
    File(String),
}

/// The name of a model's folder in the cache.
pub(crate) fn folder_name(source: &ModelSource) -> String {
    match source {
        ModelSource::Hub(model) => format!("models--{}", model.repository.replace('/', "--")),
        other => format!("url--{}", &hex(&Sha256::digest(other.to_string()))[..32]),
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Asks a hub.
pub(crate) async fn hub(
    client: &Client,
    endpoint: &Url,
    model: &HubModel,
) -> Result<Remote, HubError> {
    let what = model.to_string();
    let repository: Vec<&str> = model.repository.split('/').collect();
    let url = join(
        endpoint,
        ["api", "models"]
            .into_iter()
            .chain(repository.iter().copied())
            .chain(["revision", &model.revision]),
    );
    let answer = client.text(&url, &what).await?;
    let wrong = |problem: String| HubError::Protocol {
        what: what.clone(),
        problem,
    };
    let revision: Revision =
        serde_json::from_slice(&answer).map_err(|e| wrong(format!("its answer is odd: {e}")))?;
    if !is_name(&revision.sha) {
        return Err(wrong(format!("its commit is {:?}", revision.sha)));
    }
    let names: Vec<String> = revision
        .siblings
        .into_iter()
        .map(|sibling| sibling.rfilename)
        // What follows makes paths of them.
        .filter(|name| is_path(name))
        .collect();
    let chosen = choose(model.file.as_deref(), &names).map_err(|problem| HubError::NoModel {
        what: what.clone(),
        problem,
    })?;
    let url_of = |path: &str| {
        let parts = repository
            .iter()
            .copied()
            .chain(["resolve", &revision.sha])
            .chain(path.split('/'));
        join(endpoint, parts)
    };
    let files = match &chosen {
        Model::File(file) => vec![file.clone()],
        Model::Folder { indexed } => {
            let beside = BESIDE
                .iter()
                .filter(|file| names.iter().any(|name| name == *file));
            let mut files: Vec<String> = beside.map(|&file| file.to_owned()).collect();
            if *indexed {
                let index = client
                    .text(&url_of(INDEX), &format!("{what}: {INDEX}"))
                    .await?;
                let weights = indexed_files(&index).map_err(|problem| HubError::NoModel {
                    what: what.clone(),
                    problem,
                })?;
                files.push(INDEX.to_owned());
                files.extend(weights);
            } else {
                files.push(SINGLE.to_owned());
            }
            files
        }
    };
    let files = stream::iter(files)
        .map(|path| describe(client, url_of(&path), path, &what))
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    Ok(Remote {
        revision: model.revision.clone(),
        commit: revision.sha.clone(),
        files,
        model: chosen,
    })
}

/// Asks a web server about a file.
pub(crate) async fn url(client: &Client, url: &Url) -> Result<Remote, HubError> {
    let what = ModelSource::Url(url.clone()).to_string();
    let path = match url.path().rsplit('/').next() {
        Some(name) if is_name(name) => name.to_owned(),
        _ => "model.gguf".to_owned(),
    };
    let mut file = describe(client, url.clone(), path, &what).await?;
    // Not every server names its content's version, and one's names may be another's.
    let version = format!("{what} {} {}", file.etag, file.size);
    let commit = hex(&Sha256::digest(version))[..40].to_owned();
    if file.digest.is_none() {
        file.etag = commit.clone();
    }
    Ok(Remote {
        revision: LATEST.to_owned(),
        commit,
        model: Model::File(file.path.clone()),
        files: vec![file],
    })
}

/// A URL below the endpoint; slashes within a part are escaped, as hubs expect of revisions.
fn join<'a>(endpoint: &Url, parts: impl IntoIterator<Item = &'a str>) -> Url {
    let mut url = endpoint.clone();
    // An endpoint has been checked to be a web server's.
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(parts);
    }
    url
}

/// Asks for a file's size and version.
async fn describe(
    client: &Client,
    url: Url,
    path: String,
    what: &str,
) -> Result<RemoteFile, HubError> {
    let what = format!("{what}: {path}");
    let mut retries = Retries::new(&client.patience, &what);
    let (size, etag) = loop {
        let head = client.request(Method::HEAD, &url, 0, Follow::UntilDescribed, &what);
        let described = match head.await {
            Ok(response) => Ok(size_and_etag(&response)),
            Err(Failure::Final(refused)) => {
                // Signed URLs are for one method only.
                let get = client.request(Method::GET, &url, 0, Follow::UntilDescribed, &what);
                match get.await {
                    Ok(response) => Ok(size_and_etag(&response)),
                    Err(Failure::Final(_)) => Err(Failure::Final(refused)),
                    Err(passing) => Err(passing),
                }
            }
            Err(passing) => Err(passing),
        };
        match described {
            Ok(described) => break described,
            Err(failure) => retries.after(failure).await?,
        }
    };
    let size = size.ok_or_else(|| HubError::Protocol {
        what: what.clone(),
        problem: "the server doesn't say how long it is".to_owned(),
    })?;
    Ok(RemoteFile {
        digest: Digest::of_etag(&etag),
        path,
        url,
        size,
        etag,
    })
}

fn size_and_etag(response: &Response) -> (Option<u64>, String) {
    let linked = response
        .header("x-linked-size")
        .and_then(|s| s.parse().ok());
    let size = linked.or_else(|| response.length());
    let etag = response
        .header("x-linked-etag")
        .or_else(|| response.header("etag"))
        .unwrap_or_default();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    (size, etag.to_owned())
}

/// What of a repository's files is the model; an error says why nothing is.
pub(crate) fn choose(file: Option<&str>, names: &[String]) -> Result<Model, String> {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    if let Some(file) = file {
        return match has(file) {
            true => Ok(Model::File(file.to_owned())),
            false => Err(format!("it has no file {file}")),
        };
    }
    if has(CONFIG) && (has(INDEX) || has(SINGLE)) {
        return match has(TOKENIZER) {
            true => Ok(Model::Folder {
                indexed: has(INDEX),
            }),
            false => Err(format!(
                "it has no {TOKENIZER}; checkpoints with tokenizer.model only need to be saved \
                 again by transformers, or converted to GGUF"
            )),
        };
    }
    let files: Vec<&String> = names
        .iter()
        .filter(|name| name.ends_with(".gguf"))
        .collect();
    match files.as_slice() {
        [] => Err(
            "it has neither safetensors with a config.json nor a .gguf file (weights in .bin or \
             .pth files aren't read)"
                .to_owned(),
        ),
        [file] => Ok(Model::File((*file).clone())),
        several => {
            let list: Vec<&str> = several.iter().map(|s| s.as_str()).take(20).collect();
            Err(format!(
                "it has several .gguf files; choose one by hf://<org>/<name>/<file>: {}",
                list.join(", ")
            ))
        }
    }
}

/// The files that a model.safetensors.index.json lists.
pub(crate) fn indexed_files(index: &[u8]) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| format!("{INDEX}: {e}"))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    match files.iter().find(|file| !is_name(file)) {
        Some(file) => Err(format!(
            "{INDEX} names {file:?}, which isn't a file beside it"
        )),
        None if files.is_empty() => Err(format!("{INDEX} lists no tensors")),
        None => Ok(files.into_iter().collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose_of(file: Option<&str>, names: &[&str]) -> Result<Model, String> {
        let names: Vec<String> = names.iter().map(|&s| s.to_owned()).collect();
        choose(file, &names)
    }

    #[test]
    fn safetensors_come_before_gguf() {
        let folder = |indexed| Ok(Model::Folder { indexed });
        let file = |name: &str| Ok(Model::File(name.to_owned()));
        let names = [CONFIG, TOKENIZER, SINGLE, "a.gguf", "pytorch_model.bin"];
        assert_eq!(choose_of(None, &names), folder(false));
        assert_eq!(choose_of(None, &[CONFIG, TOKENIZER, INDEX]), folder(true));
        assert_eq!(choose_of(None, &["README.md", "a.gguf"]), file("a.gguf"));
        assert_eq!(
            choose_of(Some("q/b.gguf"), &["a.gguf", "q/b.gguf"]),
            file("q/b.gguf")
        );
    }

    #[test]
    fn what_cant_be_served_is_said() {
        for (file, names, word) in [
            (
                None,
                &[CONFIG, "pytorch_model.bin"][..],
                "neither safetensors",
            ),
            (None, &[CONFIG, SINGLE], "no tokenizer.json"),
            (None, &["a.gguf", "b.gguf"], "a.gguf, b.gguf"),
            (Some("c.gguf"), &["a.gguf"], "no file c.gguf"),
        ] {
            let error = choose_of(file, names).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn urls_escape_a_revisions_slashes() {
        let endpoint = Url::parse("https://hub.example/mirror/").unwrap();
        let url = join(
            &endpoint,
            ["api", "models", "o", "n", "revision", "refs/pr/1"],
        );
        assert_eq!(
            url.as_str(),
            "https://hub.example/mirror/api/models/o/n/revision/refs%2Fpr%2F1"
        );
    }
}
