//! Gets a model from a Hugging Face hub or any web server into a cache directory that all servers
//! of a node may share.
//!
//! [`fetch`] is the way in: it finds out what the model consists of ([`resolve`](mod@resolve)),
//! waits for others that fetch the same ([`cache`]), and downloads what is missing, resuming after
//! cuts and checking what it got ([`download`]).
//!
//! The cache has the layout of Hugging Face's own tools (`models--<org>--<name>` with blobs,
//! snapshots and refs), so that a directory filled by them is used as it is. A model that is in the
//! cache is served without a network: a revision named by its commit at once, a branch or tag when
//! the hub can't be reached.

mod cache;
mod client;
mod digest;
mod download;
mod error;
mod fetch;
mod refusal;
mod resolve;
mod source;

pub use client::{Patience, Token};
pub use error::HubError;
pub use fetch::{Options, Progress, fetch};
pub use source::{HubModel, ModelSource};
