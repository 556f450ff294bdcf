//! The engine's gauges and counters.

use stoker_law::{Law, StepShape};

use crate::request::Limits;

/// The newest finished step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastStep {
    pub shape: StepShape,
    /// Device time, in seconds.
    pub seconds: f64,
}

/// A snapshot of the engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stats {
    /// Sequences that hold one of the `max_num_seqs` seats.
    pub running: u32,
    /// Requests in the queue, preempted ones included.
    pub waiting: u32,
    pub kv_blocks_used: u32,
    pub kv_blocks_total: u32,
    /// Tokens a block.
    pub kv_block_size: u32,
    /// Cached tokens of the running sequences.
    pub kv_tokens: u64,
    /// Tokens of waiting and running prompts that are still to be computed (after a preemption
    /// the generated tokens are part of the prompt).
    pub waiting_prompt_tokens: u64,
    pub preemptions_total: u64,
    /// Requests that couldn't have their first token in time any more and let others go first.
    pub set_back_total: u64,
    pub steps_total: u64,
    /// Device time of all steps, in seconds.
    pub step_seconds_total: f64,
    /// Prompt tokens computed; those computed again after a preemption count once.
    pub prompt_tokens_total: u64,
    /// Tokens generated and reported.
    pub generation_tokens_total: u64,
    pub last_step: Option<LastStep>,
    /// The dials as they are set.
    pub limits: Limits,
    /// The most that the dials can be set to on this device.
    pub ceilings: Limits,
    pub law: Law,
    /// 0..=1.
    pub law_confidence: f64,
}
