//! The step-time law of a replica: what one engine step costs, as a function of what is in it.
//!
//! `seconds = max(M, C) + (1 - hidden) * min(M, C) + per_sequence * sequences`, where
//! `M = base + per_kv_token * kv_tokens` is the memory-bound part (weights and KV cache read) and
//! `C = per_token * tokens` the compute-bound part. `hidden` (0..=1) says how far the smaller of
//! the two hides behind the larger one.
//!
//! [`Law`] predicts, and answers the inverse questions: how many sequences, how many tokens for a
//! wanted step time. [`LawFit`] learns it from timed steps.

mod fit;
mod observations;
mod plan;
mod solve;

pub use fit::{LawFit, Prior};
pub use plan::RunningLoad;

use serde::{Deserialize, Serialize};

/// What one engine step contains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepShape {
    /// Sequences that take part in the step.
    pub sequences: u32,
    /// Tokens computed in the step: one a decoding sequence, plus the prompt chunks.
    pub tokens: u32,
    /// Cached tokens that attention reads, summed over sequences.
    pub kv_tokens: u64,
}

/// Terms of the law, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Law {
    pub base: f64,
    pub per_kv_token: f64,
    pub per_token: f64,
    pub per_sequence: f64,
    pub hidden: f64,
}

impl Law {
    /// A memory-bound device whose smallest step takes `base` seconds, with the other terms in
    /// the proportions of a GPU that serves a model of a few billion parameters: a guess to start
    /// from.
    pub fn typical(base: f64) -> Self {
        Self {
            base,
            per_kv_token: base * 1.3e-5,
            per_token: base * 1e-2,
            per_sequence: base * 7e-3,
            hidden: 0.9,
        }
    }

    /// Predicted duration of a step, in seconds.
    pub fn step_seconds(&self, shape: StepShape) -> f64 {
        let memory = self.base + self.per_kv_token * shape.kv_tokens as f64;
        let compute = self.per_token * f64::from(shape.tokens);
        memory.max(compute)
            + (1.0 - self.hidden) * memory.min(compute)
            + self.per_sequence * f64::from(shape.sequences)
    }

    /// The same device, `factor` times as slow.
    pub fn slowed(&self, factor: f64) -> Self {
        Self {
            base: self.base * factor,
            per_kv_token: self.per_kv_token * factor,
            per_token: self.per_token * factor,
            per_sequence: self.per_sequence * factor,
            hidden: self.hidden,
        }
    }
}
