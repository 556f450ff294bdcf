//! What the handlers share.

use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use stoker_model::{ChatTemplate, Tokenizer, cuda::GpuProfiler};

use crate::engine::{EngineHandle, Snapshot};
use crate::lifecycle::Lifecycle;
use crate::metrics::Metrics;
use crate::openai::error::ApiError;

pub struct App {
    pub model_name: Arc<str>,
    /// Unix seconds of the start.
    pub created: u64,
    pub max_body_bytes: usize,
    pub lifecycle: Arc<Lifecycle>,
    pub metrics: Metrics,
    /// Set once, when the model is loaded.
    pub serving: OnceLock<Serving>,
}

/// A loaded model and its engine.
pub struct Serving {
    pub engine: EngineHandle,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Arc<ChatTemplate>,
    pub max_model_len: u32,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Most new tokens of a chat answer that states no limit; `None`: what the context leaves.
    pub default_chat_tokens: Option<u32>,
    /// `None`: there is no profiler for the device. Locked while it records.
    pub profiler: Option<tokio::sync::Mutex<GpuProfiler>>,
}

impl App {
    pub fn new(
        model_name: &str,
        max_body_bytes: usize,
        lifecycle: Arc<Lifecycle>,
    ) -> Result<Self, prometheus::Error> {
        Ok(Self {
            model_name: model_name.into(),
            created: unix_seconds(),
            max_body_bytes,
            lifecycle,
            metrics: Metrics::new(model_name)?,
            serving: OnceLock::new(),
        })
    }

    /// The loaded model. Handlers that were admitted always find one.
    pub fn serving(&self) -> Result<&Serving, ApiError> {
        self.serving
            .get()
            .ok_or_else(|| ApiError::unavailable("loading", "the model is loading", 1))
    }

    pub fn snapshot(&self) -> Option<Snapshot> {
        self.serving.get().map(|serving| serving.engine.snapshot())
    }
}

pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
