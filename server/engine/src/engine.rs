//! The engine: a scheduler, the executor it drives one step ahead, and the law it learns.

use stoker_law::Prior;

use crate::clock::Clock;
use crate::executor::{Capacity, Executor, ExecutorError};
use crate::request::{AddError, Event, Limits, LimitsError, Request, RequestId};
use crate::stats::Stats;

/// Fixed settings of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Requests that may wait; one more is refused with [`AddError::QueueFull`].
    pub max_waiting: usize,
    /// Where the step-time law starts; see [`crate::calibrate`].
    pub law_prior: Prior,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_waiting: 1024,
            law_prior: Prior::default(),
        }
    }
}

/// A continuous-batching engine on top of an executor.
pub struct Engine<E: Executor> {
    executor: E,
    #[expect(dead_code)]
    config: EngineConfig,
    limits: Limits,
}

impl<E: Executor> Engine<E> {
    /// Dials above the executor's ceilings are lowered to them, zeros are raised to 1.
    pub fn new(executor: E, limits: Limits, config: EngineConfig) -> Self {
        Self {
            executor,
            config,
            limits,
        }
    }

    /// Puts a request into the queue.
    pub fn add(&mut self, request: Request) -> Result<(), AddError> {
        let _ = request;
        Ok(())
    }

    /// Ends a request; its `Finished` event comes from the next [`Self::step`]. Its blocks are
    /// free when the step that is in flight is done. Unknown ids are ignored: a request may end
    /// while its abort is on the way.
    pub fn abort(&mut self, id: RequestId) {
        let _ = id;
    }

    /// Sets the dials from the next scheduled step on and returns what is in effect: values above
    /// the ceilings are lowered to them. A lower `max_num_seqs` preempts nobody.
    pub fn set_limits(&mut self, limits: Limits) -> Result<Limits, LimitsError> {
        self.limits = limits;
        Ok(limits)
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn capacity(&self) -> Capacity {
        self.executor.capacity()
    }

    /// Schedules and submits the next step, then waits for the oldest one in flight (unless the
    /// one just submitted is the only one) and returns what came of it. Call it while
    /// [`Self::has_work`]; without work it returns at once.
    ///
    /// After an error the engine is dead: every further call returns the same error.
    pub fn step(&mut self, clock: &dyn Clock) -> Result<Vec<Event>, ExecutorError> {
        let _ = clock;
        Ok(Vec::new())
    }

    /// Whether a request waits or runs, a step is in flight, or an event has not been returned.
    pub fn has_work(&self) -> bool {
        false
    }

    pub fn stats(&self) -> Stats {
        let capacity = self.executor.capacity();
        let prior = Prior::default();
        Stats {
            running: 0,
            waiting: 0,
            kv_blocks_used: 0,
            kv_blocks_total: capacity.blocks,
            kv_block_size: capacity.block_size,
            kv_tokens: 0,
            waiting_prompt_tokens: 0,
            preemptions_total: 0,
            steps_total: 0,
            step_seconds_total: 0.0,
            prompt_tokens_total: 0,
            generation_tokens_total: 0,
            last_step: None,
            limits: self.limits,
            ceilings: Limits {
                max_num_seqs: capacity.max_num_seqs,
                max_num_batched_tokens: capacity.max_num_batched_tokens,
            },
            law: prior.law,
            law_confidence: prior.confidence,
        }
    }
}
