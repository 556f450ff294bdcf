//! The continuous-batching engine: scheduler, KV blocks and the executor it drives.

pub mod executor;
