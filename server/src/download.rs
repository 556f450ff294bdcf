//! Getting the model to this machine before it is loaded.

use std::path::{Path, PathBuf};

use stoker_hub::{HubError, ModelSource, Options, Patience, Token, fetch};

use crate::app::App;
use crate::args::Args;
use crate::startup::{LOAD_SHARE, StartError};

/// Of the loading's progress, where something has to be downloaded.
const DOWNLOAD_SHARE: f64 = 0.85;

/// User and group of Stoker's images.
const IMAGE_USER: u32 = 65532;

/// A model on this machine.
pub struct LocalModel {
    pub path: PathBuf,
    /// Progress at which loading it begins.
    pub progress: f64,
}

/// Downloads the model, unless it is here. Takes as long as that takes: call it on a thread of its
/// own.
pub fn obtain(args: &Args, app: &App) -> Result<LocalModel, StartError> {
    let source = args.model.as_ref().ok_or(StartError::NoModel)?;
    if let ModelSource::Path(path) = source {
        return Ok(LocalModel {
            path: path.clone(),
            progress: 0.0,
        });
    }
    let options = Options {
        endpoint: args.hub_endpoint.clone().filter(|url| !url.is_empty()),
        token: token()?,
        cache: match &args.model_cache {
            Some(folder) => folder.clone(),
            None => default_cache(),
        },
        patience: Patience::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    let downloaded = std::cell::Cell::new(false);
    let path = runtime.block_on(fetch(source, &options, &|progress| {
        downloaded.set(progress.total > 0);
        let done = progress.done as f64 / progress.total.max(1) as f64;
        app.lifecycle
            .set_progress(LOAD_SHARE * DOWNLOAD_SHARE * done);
    }))?;
    Ok(LocalModel {
        path,
        progress: match downloaded.get() {
            true => LOAD_SHARE * DOWNLOAD_SHARE,
            false => 0.0,
        },
    })
}

/// From the environment only: a flag would show in the list of processes.
fn token() -> Result<Option<Token>, HubError> {
    match std::env::var("HF_TOKEN") {
        Ok(token) if !token.trim().is_empty() => Token::new(&token).map(Some),
        _ => Ok(None),
    }
}

fn default_cache() -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from);
    home.join(".cache/stoker/hub")
}

/// Makes a directory that servers in pods may write: what kubelets make belongs to root.
pub fn prepare_cache(folder: &Path) -> Result<(), HubError> {
    let prepare = || {
        std::fs::create_dir_all(folder)?;
        std::os::unix::fs::chown(folder, Some(IMAGE_USER), Some(IMAGE_USER))
    };
    prepare().map_err(|source| HubError::Cache {
        path: folder.to_owned(),
        source,
    })
}
