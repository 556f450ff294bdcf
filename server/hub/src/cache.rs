//! The directory that servers of a node share, in the layout of Hugging Face's tools:
//!
//! ```text
//! models--<org>--<name>/blobs/<etag>              content; <etag>.incomplete while it comes in
//!                       snapshots/<commit>/<file> links to blobs
//!                       refs/<revision>           the commit that a branch or tag was last
//! .locks/models--<org>--<name>/stoker.lock        held by the one who downloads
//! ```

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use sha2::{Digest as _, Sha256};

use crate::{digest::hex, error::HubError, source::is_name};

/// How often a waiting server looks how far the downloading one is.
const LOOK: Duration = Duration::from_millis(500);

/// One model's part of the cache.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    name: String,
}

/// Held while files are downloaded; let go when it is dropped or its process ends, however that
/// happens.
pub(crate) struct Lock(#[allow(dead_code, reason = "an open file is what holds the lock")] File);

impl Folder {
    pub(crate) fn new(root: &Path, name: String) -> Self {
        Self {
            root: root.to_owned(),
            name,
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// Where a file's content is when it is complete.
    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.path().join("blobs").join(file_name(etag))
    }

    /// Where it is until then.
    pub(crate) fn partial(&self, etag: &str) -> PathBuf {
        let name = format!("{}.incomplete", file_name(etag));
        self.path().join("blobs").join(name)
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.path().join("snapshots").join(commit)
    }

    /// Bytes of a file that are still to come.
    pub(crate) fn missing(&self, etag: &str, size: u64) -> u64 {
        let length = |path: PathBuf| fs::metadata(path).ok().map(|m| m.len());
        if length(self.blob(etag)) == Some(size) {
            return 0;
        }
        size - length(self.partial(etag)).unwrap_or(0).min(size)
    }

    /// Bytes that a file will still take of the disk: what was reserved for it is its own already.
    pub(crate) fn missing_space(&self, etag: &str, size: u64) -> u64 {
        let missing = self.missing(etag, size);
        match fs::metadata(self.partial(etag)) {
            Ok(partial) => missing.min(size.saturating_sub(partial.blocks() * 512)),
            Err(_) => missing,
        }
    }

    pub(crate) fn make_folders(&self) -> Result<(), HubError> {
        for folder in [self.path().join("blobs"), self.lock_folder()] {
            fs::create_dir_all(&folder).map_err(|source| cache_error(&folder, source))?;
        }
        Ok(())
    }

    fn lock_folder(&self) -> PathBuf {
        self.root.join(".locks").join(&self.name)
    }

    /// Becomes the only one that downloads this model; `waiting` is called now and then meanwhile.
    pub(crate) async fn lock(&self, mut waiting: impl FnMut()) -> Result<Lock, HubError> {
        let path = self.lock_folder().join("stoker.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| cache_error(&path, source))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock(file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(cache_error(&path, source)),
            }
            if !told {
                tracing::info!(model = self.name, "another server downloads it; waiting");
                told = true;
            }
            waiting();
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Makes a complete blob a file of a snapshot.
    pub(crate) fn link(&self, commit: &str, path: &str, etag: &str) -> Result<(), HubError> {
        let link = self.snapshot(commit).join(path);
        let depth = 2 + path.matches('/').count();
        let target = PathBuf::from("../".repeat(depth))
            .join("blobs")
            .join(file_name(etag));
        if fs::read_link(&link).is_ok_and(|found| found == target) {
            return Ok(());
        }
        let place = || -> io::Result<()> {
            if let Some(folder) = link.parent() {
                fs::create_dir_all(folder)?;
            }
            // Renaming replaces a link to an older blob without a moment in between.
            let new = link.with_extension(format!("new-{}", std::process::id()));
            std::os::unix::fs::symlink(&target, &new)?;
            fs::rename(&new, &link)
        };
        place().map_err(|source| cache_error(&link, source))
    }

    pub(crate) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let path = self.path().join("refs").join(revision);
        if revision == commit || self.read_ref(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let write = || -> io::Result<()> {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let new = path.with_extension(format!("new-{}", std::process::id()));
            fs::write(&new, commit)?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| cache_error(&path, source))
    }

    fn read_ref(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.path().join("refs").join(revision)).ok()?;
        let commit = text.trim();
        is_name(commit).then(|| commit.to_owned())
    }

    /// The snapshot of a revision, if there is one: its folder and the files in it.
    pub(crate) fn find(&self, revision: &str) -> Option<(PathBuf, Vec<String>)> {
        let commit = match is_commit(revision) {
            true => revision.to_owned(),
            false => self.read_ref(revision)?,
        };
        let folder = self.snapshot(&commit);
        let mut files = Vec::new();
        list(&folder, "", &mut files).ok()?;
        Some((folder, files))
    }
}

/// Whether a revision is a commit's full hash, which never means anything else.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40
        && revision
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The files below a folder whose content is there, as paths relative to it.
fn list(folder: &Path, prefix: &str, files: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let name = format!("{prefix}{name}");
        // Follows links, and fails where they lead nowhere.
        match fs::metadata(entry.path()) {
            Ok(metadata) if metadata.is_dir() => list(&entry.path(), &format!("{name}/"), files)?,
            Ok(metadata) if metadata.is_file() => files.push(name),
            _ => {}
        }
    }
    Ok(())
}

/// A name for what a server calls its file.
fn file_name(etag: &str) -> String {
    match is_name(etag) && etag.len() <= 80 {
        true => etag.to_owned(),
        false => hex(&Sha256::digest(etag)),
    }
}

pub(crate) fn cache_error(path: &Path, source: io::Error) -> HubError {
    HubError::Cache {
        path: path.to_owned(),
        source,
    }
}

/// Fails unless the disk has `needed` bytes more.
pub(crate) fn check_space(root: &Path, needed: u64) -> Result<(), HubError> {
    let free = free_bytes(root).map_err(|source| cache_error(root, source))?;
    match needed <= free {
        true => Ok(()),
        false => Err(HubError::DiskFull {
            cache: root.to_owned(),
            needed,
            free,
        }),
    }
}

fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Takes the disk space for a file of `size` bytes without making it longer, so that nobody else
/// can take it. A file system that can't do this fills up as bytes arrive.
pub(crate) fn reserve(file: &File, size: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, size.max(1)) {
        Err(error) if error == rustix::io::Errno::NOSPC => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn folder() -> (tempfile::TempDir, Folder) {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path(), "models--a--b".into());
        folder.make_folders().unwrap();
        (root, folder)
    }

    #[test]
    fn a_snapshot_is_found_by_commit_and_by_branch() {
        let (_root, folder) = folder();
        fs::write(folder.blob("e1"), "one").unwrap();
        folder.link(COMMIT, "config.json", "e1").unwrap();
        folder.link(COMMIT, "sub/x.gguf", "e1").unwrap();
        folder.link(COMMIT, "gone", "e2").unwrap();
        assert!(folder.find("main").is_none());
        folder.write_ref("main", COMMIT).unwrap();
        folder.write_ref("refs/pr/1", COMMIT).unwrap();
        for revision in ["main", "refs/pr/1", COMMIT] {
            let (path, mut files) = folder.find(revision).unwrap();
            files.sort();
            assert_eq!(files, ["config.json", "sub/x.gguf"]);
            assert_eq!(fs::read_to_string(path.join("sub/x.gguf")).unwrap(), "one");
        }
        // A file that changes leads to the new content.
        fs::write(folder.blob("e2"), "two").unwrap();
        folder.link(COMMIT, "config.json", "e2").unwrap();
        let text = fs::read_to_string(folder.snapshot(COMMIT).join("config.json"));
        assert_eq!(text.unwrap(), "two");
    }

    #[test]
    fn what_is_missing_counts_what_came_before() {
        let (_root, folder) = folder();
        assert_eq!(folder.missing("e", 100_000), 100_000);
        fs::write(folder.partial("e"), vec![0; 40_000]).unwrap();
        assert_eq!(folder.missing("e", 100_000), 60_000);
        let file = OpenOptions::new()
            .write(true)
            .open(folder.partial("e"))
            .unwrap();
        reserve(&file, 100_000).unwrap();
        assert_eq!(folder.missing("e", 100_000), 60_000);
        assert!(folder.missing_space("e", 100_000) <= 60_000);
        fs::write(folder.blob("e"), vec![0; 100_000]).unwrap();
        assert_eq!(folder.missing("e", 100_000), 0);
        // Not the file that it should be.
        assert_eq!(folder.missing("e", 100_001), 60_001);
    }

    #[test]
    fn strange_etags_stay_within_the_folder() {
        for etag in ["../../x", "a/b", "", ".hidden", &"x".repeat(200)] {
            let name = file_name(etag);
            assert!(is_name(&name) && name.len() == 64, "{etag}: {name}");
        }
    }

    #[test]
    fn a_disk_thats_too_small_is_told_with_both_numbers() {
        let (root, _) = folder();
        check_space(root.path(), 1).unwrap();
        let error = check_space(root.path(), 3_000_000_000_000_000).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("disk full") && text.contains("3000.0 TB"),
            "{text}"
        );
        assert!(text.contains(" free"), "{text}");
    }
}
