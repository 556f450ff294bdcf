//! The checksums that a hub promises in its etags.

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// What a file's bytes must sum up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256 of the content: files in large-file storage.
    Sha256(String),
    /// SHA-1 of git's object for it (`blob <length>\0<content>`): files in the git repository.
    GitBlob(String),
}

impl Digest {
    /// The digest that an etag is, where it is one.
    pub fn of_etag(etag: &str) -> Option<Self> {
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        match etag.len() {
            _ if !etag.bytes().all(hex) => None,
            64 => Some(Self::Sha256(etag.to_owned())),
            40 => Some(Self::GitBlob(etag.to_owned())),
            _ => None,
        }
    }

    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// Begins to sum up a file of `size` bytes.
    pub fn start(&self, size: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::GitBlob(_) => Hasher::Sha1(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }
}

#[derive(Clone)]
pub enum Hasher {
    Sha256(Sha256),
    Sha1(Sha1),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha1(hasher) => hasher.update(bytes),
        }
    }

    pub fn finish(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Sha1(hasher) => hex(&hasher.finalize()),
        }
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_sums() {
        let sum = |etag: &str, content: &[u8]| {
            let mut hasher = Digest::of_etag(etag).unwrap().start(content.len() as u64);
            hasher.update(content);
            hasher.finish()
        };
        // `printf 'hello\n' | git hash-object --stdin`
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(sum(git, b"hello\n"), git);
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(sum(sha, b"hello\n"), sha);
    }

    #[test]
    fn other_etags_promise_nothing() {
        for etag in ["", "abc", "66a1-5f2b", &"g".repeat(64), &"A".repeat(40)] {
            assert_eq!(Digest::of_etag(etag), None, "{etag}");
        }
    }
}
