//! What runs a step: a model on some device, or the simulated one.

use std::time::Duration;

use stoker_law::StepShape;
use thiserror::Error;

/// Index of a KV block of `block_size` tokens in the executor's memory.
pub type BlockId = u32;

/// A row of sampling state that the executor may keep per sequence; given out by the scheduler,
/// below `max_num_seqs`, unique among the rows of a step, and reused after a sequence ends: at the
/// earliest in the step after its last one, where the new owner starts with known tokens.
pub type Slot = u32;

/// One token that goes into a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputToken {
    Known(u32),
    /// The token that the step before, still in flight, samples for the same slot.
    FromPreviousStep,
}

/// How the next token of a sequence is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1].
    pub top_p: f32,
    /// 0 means no limit.
    pub top_k: u32,
    /// Together with the position it determines the random draw, so that a sequence that was
    /// preempted and computed again samples the same tokens.
    pub seed: u64,
}

/// A sequence's part of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub slot: Slot,
    /// Tokens to compute, in order; the first stands at `start`.
    pub tokens: Vec<InputToken>,
    /// Position of the first token = tokens of this sequence already in the KV cache.
    pub start: u32,
    /// Blocks that hold positions `0..start + tokens.len()`, in order.
    pub blocks: Vec<BlockId>,
    /// `Some` where the last token's logits are to be sampled (`None` for a prompt chunk that
    /// isn't the last one).
    pub sample: Option<Sampling>,
}

/// One step: rows of different sequences, decodes and prompt chunks mixed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepBatch {
    pub rows: Vec<Row>,
}

impl StepBatch {
    /// What the step contains, in the step-time law's terms.
    pub fn shape(&self) -> StepShape {
        let mut shape = StepShape::default();
        for row in &self.rows {
            shape.sequences += 1;
            shape.tokens += row.tokens.len() as u32;
            shape.kv_tokens += u64::from(row.start) + row.tokens.len() as u64;
        }
        shape
    }
}

/// A submitted step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);

#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    /// One entry a row, in the batch's order; `None` where the row asked for no sample.
    pub tokens: Vec<Option<u32>>,
    /// Time the device worked on this step, without waiting for the host.
    pub device_time: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExecutorError {
    #[error("the device failed in step {step}: {message}")]
    Device { step: u64, message: String },
}

/// Fixed properties of an executor's memory and model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub blocks: u32,
    /// Tokens a block.
    pub block_size: u32,
    pub max_model_len: u32,
    /// Hard ceilings of the two dials on this device.
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
}

/// Runs steps in the order they were submitted; at most two are in flight.
pub trait Executor: Send {
    fn capacity(&self) -> Capacity;
    /// Starts a step and returns at once; blocks only while two steps are in flight already.
    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError>;
    /// Waits for a step's end. Tickets are waited for in the order of submission.
    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError>;
}

impl<E: Executor + ?Sized> Executor for Box<E> {
    fn capacity(&self) -> Capacity {
        (**self).capacity()
    }
    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        (**self).submit(batch)
    }
    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        (**self).wait(ticket)
    }
}
