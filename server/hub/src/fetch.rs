//! From a source to a path that can be loaded.

use std::path::{Path, PathBuf};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use url::Url;

use crate::{
    cache::{Folder, check_space, is_commit},
    client::{Client, Patience, Token},
    download::{Meter, download},
    error::{HubError, bytes},
    resolve::{self, INDEX, LATEST, Model, Remote},
    source::ModelSource,
};

/// Files that are downloaded at once.
const AT_ONCE: usize = 4;

/// Tries to reach a server while there is a copy in the cache to fall back to.
const ATTEMPTS_WITH_A_COPY: u32 = 3;

/// What a fetch needs to know beside the source.
#[derive(Clone, Debug)]
pub struct Options {
    /// Base URL of the hub that `hf://` means.
    pub endpoint: Option<String>,
    pub token: Option<Token>,
    /// The directory to keep models in; made if it isn't there.
    pub cache: PathBuf,
    pub patience: Patience,
}

/// How far a fetch has come: bytes that have come in of those that were missing at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

/// Brings a model to this machine, unless it is here already, and gives the path to load: a GGUF
/// file or the folder of a checkpoint. `progress` is called often.
///
/// Writes files on the thread that polls it: give it one of its own.
///
/// # Errors
/// See [`HubError`]; each says what to do about it.
pub async fn fetch(
    source: &ModelSource,
    options: &Options,
    progress: &dyn Fn(Progress),
) -> Result<PathBuf, HubError> {
    if let ModelSource::Path(path) = source {
        return Ok(path.clone());
    }
    let folder = Folder::new(&options.cache, resolve::folder_name(source));
    let copy = local_copy(source, &folder);
    if let ModelSource::Hub(model) = source
        && is_commit(&model.revision)
        && let Some(path) = copy
    {
        tracing::info!(model = %source, path = %path.display(), "found in the cache");
        return Ok(path);
    }
    let endpoint = match (source, &options.endpoint) {
        (ModelSource::Hub(_), None) => {
            return copy.ok_or_else(|| HubError::NoEndpoint {
                model: source.to_string(),
                cache: options.cache.clone(),
            });
        }
        (ModelSource::Hub(_), Some(endpoint)) => Some(parse_endpoint(endpoint)?),
        _ => None,
    };
    let mut patience = options.patience;
    if copy.is_some() {
        patience.attempts = patience.attempts.min(ATTEMPTS_WITH_A_COPY);
    }
    let client = Client::new(endpoint.clone(), options.token.clone(), patience)?;
    let remote = match (source, &endpoint) {
        (ModelSource::Hub(model), Some(endpoint)) => resolve::hub(&client, endpoint, model).await,
        (ModelSource::Url(url), _) => resolve::url(&client, url).await,
        _ => return Err(no_source(source)),
    };
    let remote = match (remote, copy) {
        (Ok(remote), _) => remote,
        (Err(error @ HubError::Unreachable { .. }), Some(path)) => {
            tracing::warn!(
                model = %source,
                %error,
                path = %path.display(),
                "using the copy in the cache, which may be an older version"
            );
            return Ok(path);
        }
        (Err(error), _) => return Err(error),
    };
    let client = Client::new(endpoint, options.token.clone(), options.patience)?;
    obtain(&client, source, &folder, &remote, progress).await?;
    Ok(path_of(&folder.snapshot(&remote.commit), &remote.model))
}

fn no_source(source: &ModelSource) -> HubError {
    HubError::Source {
        found: source.to_string(),
        problem: "it names no server".to_owned(),
    }
}

fn parse_endpoint(endpoint: &str) -> Result<Url, HubError> {
    let wrong = |problem: String| HubError::Endpoint {
        found: endpoint.to_owned(),
        problem,
    };
    let url = Url::parse(endpoint).map_err(|e| wrong(e.to_string()))?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(url),
        scheme => Err(wrong(format!("{scheme:?} is neither http nor https"))),
    }
}

fn path_of(snapshot: &Path, model: &Model) -> PathBuf {
    match model {
        Model::Folder { .. } => snapshot.to_owned(),
        Model::File(file) => snapshot.join(file),
    }
}

/// The model in the cache, if all of it is there.
fn local_copy(source: &ModelSource, folder: &Folder) -> Option<PathBuf> {
    let (revision, file) = match source {
        ModelSource::Hub(model) => (model.revision.as_str(), model.file.as_deref()),
        _ => (LATEST, None),
    };
    let (snapshot, files) = folder.find(revision)?;
    let model = resolve::choose(file, &files).ok()?;
    if model == (Model::Folder { indexed: true }) {
        let index = std::fs::read(snapshot.join(INDEX)).ok()?;
        let weights = resolve::indexed_files(&index).ok()?;
        if !weights.iter().all(|weight| files.contains(weight)) {
            return None;
        }
    }
    Some(path_of(&snapshot, &model))
}

/// Downloads what is missing of a model.
async fn obtain(
    client: &Client,
    source: &ModelSource,
    folder: &Folder,
    remote: &Remote,
    progress: &dyn Fn(Progress),
) -> Result<(), HubError> {
    folder.make_folders()?;
    let missing = || -> u64 {
        let files = remote.files.iter();
        files
            .map(|file| folder.missing(&file.etag, file.size))
            .sum()
    };
    let total = missing();
    if total > 0 {
        let _lock = folder
            .lock(|| {
                progress(Progress {
                    done: total.saturating_sub(missing()),
                    total,
                });
            })
            .await?;
        download_missing(client, source, folder, remote, total, progress).await?;
    }
    for file in &remote.files {
        folder.link(&remote.commit, &file.path, &file.etag)?;
    }
    folder.write_ref(&remote.revision, &remote.commit)
}

async fn download_missing(
    client: &Client,
    source: &ModelSource,
    folder: &Folder,
    remote: &Remote,
    total: u64,
    progress: &dyn Fn(Progress),
) -> Result<(), HubError> {
    let what = source.to_string();
    // Another server may have brought some of it meanwhile.
    let mut files: Vec<_> = remote
        .files
        .iter()
        .filter(|file| {
            std::fs::metadata(folder.blob(&file.etag))
                .map(|m| m.len())
                .ok()
                != Some(file.size)
        })
        .collect();
    // Two files of the same content are one blob.
    files.sort_by(|a, b| a.etag.cmp(&b.etag));
    files.dedup_by(|a, b| a.etag == b.etag);
    let missing: u64 = files.iter().map(|f| folder.missing(&f.etag, f.size)).sum();
    let space = files.iter().map(|f| folder.missing_space(&f.etag, f.size));
    check_space(folder.root(), space.sum())?;
    tracing::info!(
        model = what,
        files = files.len(),
        size = bytes(missing),
        cache = %folder.root().display(),
        "downloading"
    );
    let meter = Meter::new(total, total.saturating_sub(missing), progress);
    stream::iter(files)
        .map(|file| download(client, folder, file, &what, &meter))
        .buffer_unordered(AT_ONCE)
        .try_collect::<()>()
        .await?;
    tracing::info!(model = what, "downloaded");
    Ok(())
}
