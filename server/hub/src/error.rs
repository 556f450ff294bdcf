//! Why a model can't be had.

use std::path::PathBuf;

use thiserror::Error;

#[derive(Debug, Error)]
pub enum HubError {
    #[error("the model {found:?} can't be fetched: {problem}")]
    Source { found: String, problem: String },
    #[error(
        "{model} needs a hub: set --hub-endpoint (or HF_ENDPOINT) to its URL, or put the model into the cache {} beforehand", cache.display()
    )]
    NoEndpoint { model: String, cache: PathBuf },
    #[error("the hub's endpoint {found:?} is no URL of a web server: {problem}")]
    Endpoint { found: String, problem: String },
    #[error("the token in HF_TOKEN has characters that a token can't have: copy it again")]
    Token,
    /// The server said no, and will say so again.
    #[error("{what}: {reason}")]
    Refused { what: String, reason: String },
    /// Tried again and again, to no avail.
    #[error("{what} can't be fetched: {reason} (tried {attempts} times)")]
    Unreachable {
        what: String,
        reason: String,
        attempts: u32,
    },
    #[error("{what} has no model that can be served: {problem}")]
    NoModel { what: String, problem: String },
    #[error("{what}: {problem}; is the endpoint a Hugging Face hub?")]
    Protocol { what: String, problem: String },
    #[error(
        "disk full: the model needs {} more in {}, which has {} free; free some space, or give the cache a larger volume", bytes(*needed), cache.display(), bytes(*free)
    )]
    DiskFull {
        cache: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error(
        "{what} arrived damaged {attempts} times: its checksum is {found} where the server promised {expected}"
    )]
    Checksum {
        what: String,
        expected: String,
        found: String,
        attempts: u32,
    },
    #[error(
        "the model cache can't be used: {}: {source}; the directory must exist and be writable for the server's user", path.display()
    )]
    Cache {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("TLS can't be set up: {0}")]
    Tls(String),
}

impl HubError {
    /// Whether another command line or environment would have helped.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Source { .. } | Self::NoEndpoint { .. } | Self::Endpoint { .. } | Self::Token
        )
    }
}

/// A number of bytes for people: `1.5 GB`.
pub(crate) fn bytes(count: u64) -> String {
    let (unit, size) = match count {
        0..=999 => return format!("{count} B"),
        1_000..=999_999 => ("kB", 1e3),
        1_000_000..=999_999_999 => ("MB", 1e6),
        1_000_000_000..=999_999_999_999 => ("GB", 1e9),
        _ => ("TB", 1e12),
    };
    format!("{:.1} {unit}", count as f64 / size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_for_people() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(6_425_499_648), "6.4 GB");
        assert_eq!(bytes(3_000_000_000_000_000), "3000.0 TB");
    }
}
