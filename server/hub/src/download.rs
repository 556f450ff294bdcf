//! One file: from where an earlier try ended, until its checksum is right.

use std::{
    cell::Cell,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
};

use http::{Method, StatusCode};

use crate::{
    cache::{Folder, cache_error, check_space, reserve},
    client::{Client, Failure, Follow, Response, Retries},
    digest::Hasher,
    error::{HubError, bytes},
    fetch::Progress,
    resolve::RemoteFile,
};

/// Downloads of a file whose checksum is wrong before giving up: the server has it wrong, then.
const DAMAGED: u32 = 2;

/// Bytes of an unfinished file that are summed up at once.
const READ: usize = 1 << 20;

/// Counts what has come in, over all files.
pub(crate) struct Meter<'a> {
    total: u64,
    done: Cell<u64>,
    report: &'a dyn Fn(Progress),
}

impl<'a> Meter<'a> {
    /// `total` bytes are to come in, of which `done` have.
    pub(crate) fn new(total: u64, done: u64, report: &'a dyn Fn(Progress)) -> Self {
        let meter = Self {
            total,
            done: Cell::new(done),
            report,
        };
        meter.add(0);
        meter
    }

    fn add(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        (self.report)(Progress {
            done: self.done.get(),
            total: self.total,
        });
    }

    /// What came in is thrown away.
    fn take(&self, bytes: u64) {
        self.done.set(self.done.get().saturating_sub(bytes));
    }
}

/// A file on its way in.
struct Partial<'a> {
    folder: &'a Folder,
    remote: &'a RemoteFile,
    what: &'a str,
    meter: &'a Meter<'a>,
    file: File,
    length: u64,
    /// Of the first `length` bytes, where a checksum was promised.
    hasher: Option<Hasher>,
}

/// Brings a file into the cache. The caller holds the lock.
pub(crate) async fn download(
    client: &Client,
    folder: &Folder,
    remote: &RemoteFile,
    what: &str,
    meter: &Meter<'_>,
) -> Result<(), HubError> {
    let what = format!("{what}: {}", remote.path);
    let mut partial = Partial::open(folder, remote, &what, meter)?;
    let mut retries = Retries::new(&client.patience, &what);
    let mut damaged = 0;
    loop {
        let before = partial.length;
        if let Err(failure) = partial.receive(client).await {
            if partial.length > before {
                retries.progress();
            }
            retries.after(failure).await?;
            continue;
        }
        let Some((expected, found)) = partial.mismatch() else {
            return partial.complete();
        };
        damaged += 1;
        tracing::warn!(what, expected, found, "arrived damaged");
        partial.start_over()?;
        if damaged == DAMAGED {
            return Err(HubError::Checksum {
                what,
                expected,
                found,
                attempts: damaged,
            });
        }
    }
}

impl<'a> Partial<'a> {
    fn open(
        folder: &'a Folder,
        remote: &'a RemoteFile,
        what: &'a str,
        meter: &'a Meter<'a>,
    ) -> Result<Self, HubError> {
        let path = folder.partial(&remote.etag);
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)
            .map_err(|source| cache_error(&path, source))?;
        let mut partial = Self {
            folder,
            remote,
            what,
            meter,
            file,
            length: 0,
            hasher: None,
        };
        partial.hasher = partial.new_hasher();
        if let Err(source) = partial.take_up() {
            return Err(cache_error(&path, source));
        }
        reserve(&partial.file, remote.size).map_err(|source| partial.disk_error(source))?;
        Ok(partial)
    }

    fn new_hasher(&self) -> Option<Hasher> {
        let digest = self.remote.digest.as_ref()?;
        Some(digest.start(self.remote.size))
    }

    /// Goes on from what an earlier process left.
    fn take_up(&mut self) -> io::Result<()> {
        let found = self.file.metadata()?.len();
        if found > self.remote.size {
            return self.file.set_len(0);
        }
        let mut buffer = vec![0; READ];
        loop {
            let count = self.file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            self.take_in(count, &buffer[..count]);
        }
        if self.length > 0 {
            tracing::info!(
                what = self.what,
                bytes = self.length,
                of = self.remote.size,
                "resuming"
            );
        }
        Ok(())
    }

    fn take_in(&mut self, count: usize, bytes: &[u8]) {
        self.length += count as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
    }

    /// One connection's worth, ideally all that is missing.
    async fn receive(&mut self, client: &Client) -> Result<(), Failure> {
        if self.length == self.remote.size {
            return Ok(());
        }
        let (url, what) = (&self.remote.url, self.what);
        let mut response = client
            .request(Method::GET, url, self.length, Follow::All, what)
            .await?;
        self.check_start(&response)?;
        while let Some(chunk) = response.chunk().await? {
            let room = self.remote.size - self.length;
            if chunk.len() as u64 > room {
                let size = self.remote.size;
                self.start_over()?;
                return Err(Failure::passing(format!(
                    "more came than the {} that were promised",
                    bytes(size)
                )));
            }
            self.file
                .write_all(&chunk)
                .map_err(|source| self.disk_error(source))?;
            self.take_in(chunk.len(), &chunk);
            self.meter.add(chunk.len() as u64);
        }
        match self.remote.size - self.length {
            0 => Ok(()),
            missing => Err(Failure::passing(format!(
                "the connection ended {} too early",
                bytes(missing)
            ))),
        }
    }

    /// Checks that the answer begins where it should and is as long as it should be.
    fn check_start(&mut self, response: &Response) -> Result<(), Failure> {
        if self.length > 0 {
            let range = response.header("content-range").unwrap_or_default();
            let start = format!("bytes {}-", self.length);
            if response.status != StatusCode::PARTIAL_CONTENT || !range.starts_with(&start) {
                // A server without ranges sends everything.
                self.start_over()?;
                if response.status == StatusCode::PARTIAL_CONTENT {
                    return Err(Failure::passing(format!(
                        "the server sent another range ({range:?})"
                    )));
                }
            }
        }
        let missing = self.remote.size - self.length;
        match response.length() {
            Some(length) if length != missing => Err(Failure::passing(format!(
                "the server wants to send {} where {} are missing",
                bytes(length),
                bytes(missing)
            ))),
            _ => Ok(()),
        }
    }

    /// The checksums promised and found, where they differ.
    fn mismatch(&self) -> Option<(String, String)> {
        let expected = self.remote.digest.as_ref()?.hex();
        let found = self.hasher.clone()?.finish();
        (found != expected).then(|| (expected.to_owned(), found))
    }

    fn start_over(&mut self) -> Result<(), HubError> {
        self.file
            .set_len(0)
            .map_err(|source| self.disk_error(source))?;
        self.meter.take(self.length);
        self.length = 0;
        self.hasher = self.new_hasher();
        Ok(())
    }

    fn complete(self) -> Result<(), HubError> {
        let (partial, blob) = (
            self.folder.partial(&self.remote.etag),
            self.folder.blob(&self.remote.etag),
        );
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&partial, &blob))
            .map_err(|source| self.disk_error(source))
    }

    fn disk_error(&self, source: io::Error) -> HubError {
        let root = self.folder.root();
        if source.kind() == io::ErrorKind::StorageFull {
            let needed = self.remote.size.saturating_sub(self.length);
            if let Err(full) = check_space(root, needed) {
                return full;
            }
        }
        cache_error(&self.folder.partial(&self.remote.etag), source)
    }
}
