//! Pods to samples: fetches a replica's Prometheus text and turns it into what the policy reads.

mod fetch;
mod prometheus;
mod sample;

pub use fetch::{FetchError, Fetcher};
pub use prometheus::Exposition;
pub use sample::Reading;
