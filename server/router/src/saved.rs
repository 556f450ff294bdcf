//! The last good table on disk, so that a router that starts again serves at once.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::table::Table;

const FILE: &str = "table.json";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    pub epoch: Option<u64>,
    pub table: Table,
}

/// Writes so that a crash leaves the old or the new table, never half of one.
///
/// # Errors
/// Those of the file system.
pub fn save(folder: &Path, saved: &Saved) -> std::io::Result<()> {
    let new = folder.join(format!(".{FILE}.new"));
    let mut options = std::fs::File::options();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&new)?;
    file.write_all(&serde_json::to_vec(saved)?)?;
    file.sync_all()?;
    std::fs::rename(new, path(folder))
}

/// None when there is none that can be used; why is logged.
#[must_use]
pub fn load(folder: &Path) -> Option<Saved> {
    let path = path(folder);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the saved table can't be read");
            return None;
        }
    };
    match serde_json::from_slice(&text) {
        Ok(saved) => Some(saved),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the saved table is damaged");
            None
        }
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_comes_back_and_a_damaged_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load(folder.path()), None);
        let table = r#"{"version":3,"services":[{"namespace":"a","name":"b","replicas":[
            {"id":"u","address":"198.18.0.1:80"}],"api_keys":[]}]}"#;
        let saved = Saved {
            epoch: Some(2),
            table: serde_json::from_str(table).unwrap(),
        };
        save(folder.path(), &saved).unwrap();
        save(folder.path(), &saved).unwrap();
        assert_eq!(load(folder.path()), Some(saved));
        std::fs::write(path(folder.path()), "{").unwrap();
        assert_eq!(load(folder.path()), None);
    }
}
