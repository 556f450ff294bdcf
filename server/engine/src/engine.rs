//! The engine: a scheduler, the executor it drives one step ahead, and the law it learns.

use std::collections::VecDeque;

use stoker_law::{LawFit, Prior};
use tracing::{error, trace_span};

use crate::clock::Clock;
use crate::executor::{Capacity, Executor, ExecutorError, Ticket};
use crate::request::{AddError, Event, FinishReason, Limits, LimitsError, Request, RequestId};
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::stats::{LastStep, Stats};

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
    capacity: Capacity,
    scheduler: Scheduler,
    /// Submitted steps, oldest first.
    tickets: VecDeque<Ticket>,
    /// Sequences that were aborted and whose `Finished` event is still to be returned.
    aborted: Vec<Sequence>,
    fit: LawFit,
    steps: u64,
    step_seconds: f64,
    last_step: Option<LastStep>,
    failure: Option<ExecutorError>,
}

impl<E: Executor> Engine<E> {
    /// Dials above the executor's ceilings are lowered to them, zeros are raised to 1.
    pub fn new(executor: E, limits: Limits, config: EngineConfig) -> Self {
        let capacity = executor.capacity();
        let limits = within(limits, &capacity);
        Self {
            executor,
            capacity,
            scheduler: Scheduler::new(capacity, limits, config.max_waiting),
            tickets: VecDeque::with_capacity(2),
            aborted: Vec::new(),
            fit: LawFit::new(config.law_prior),
            steps: 0,
            step_seconds: 0.0,
            last_step: None,
            failure: None,
        }
    }

    /// Puts a request into the queue.
    pub fn add(&mut self, request: Request) -> Result<(), AddError> {
        self.scheduler.add(request)
    }

    /// Ends a request; its `Finished` event comes from the next [`Self::step`]. Its blocks are
    /// free when the step that is in flight is done. Unknown ids are ignored: a request may end
    /// while its abort is on the way.
    pub fn abort(&mut self, id: RequestId) {
        self.aborted.extend(self.scheduler.abort(id));
    }

    /// Sets the dials from the next scheduled step on and returns what is in effect: values above
    /// the ceilings are lowered to them. A lower `max_num_seqs` preempts nobody: nothing is
    /// admitted until fewer run. With a budget below the number of running sequences these decode
    /// in turn.
    pub fn set_limits(&mut self, limits: Limits) -> Result<Limits, LimitsError> {
        let dials = [
            ("max_num_seqs", limits.max_num_seqs),
            ("max_num_batched_tokens", limits.max_num_batched_tokens),
        ];
        for (dial, value) in dials {
            if value == 0 {
                return Err(LimitsError::Zero { dial });
            }
        }
        self.scheduler.limits = within(limits, &self.capacity);
        Ok(self.scheduler.limits)
    }

    pub fn limits(&self) -> Limits {
        self.scheduler.limits
    }

    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Schedules and submits the next step, then waits for the oldest one in flight (unless the
    /// one just submitted is the only one) and returns what came of it. Call it while
    /// [`Self::has_work`]; without work it returns at once.
    ///
    /// After an error the engine is dead: every further call returns the same error.
    pub fn step(&mut self, clock: &dyn Clock) -> Result<Vec<Event>, ExecutorError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let now = clock.now();
        let mut events: Vec<Event> = self
            .aborted
            .drain(..)
            .map(|sequence| sequence.finished(FinishReason::Abort, now))
            .collect();
        match self.advance(now, clock, &mut events) {
            Ok(()) => Ok(events),
            Err(failure) => {
                error!(%failure, "the engine stops");
                self.failure = Some(failure.clone());
                Err(failure)
            }
        }
    }

    fn advance(
        &mut self,
        now: f64,
        clock: &dyn Clock,
        events: &mut Vec<Event>,
    ) -> Result<(), ExecutorError> {
        // Phases for whoever profiles: who is in the step, putting it on the device (named by what
        // it is), waiting for the one before it, and taking its tokens in.
        let last = self.last_step.map_or(0.0, |step| step.seconds);
        let batch = trace_span!("schedule").in_scope(|| self.scheduler.schedule(now, last));
        if let Some(batch) = batch {
            let phase = match batch.rows.iter().filter(|r| r.tokens.len() == 1).count() {
                0 => trace_span!("prefill"),
                decodes if decodes == batch.rows.len() => trace_span!("decode"),
                _ => trace_span!("mixed"),
            };
            let ticket = phase.in_scope(|| self.executor.submit(batch))?;
            self.tickets.push_back(ticket);
            if self.tickets.len() == 1 {
                return Ok(());
            }
        }
        let Some(ticket) = self.tickets.pop_front() else {
            return Ok(());
        };
        let output = trace_span!("wait").in_scope(|| self.executor.wait(ticket))?;
        let _commit = trace_span!("commit").entered();
        let shape = self
            .scheduler
            .commit(&output.tokens, clock.now(), events)
            .map_err(|message| ExecutorError::Device {
                step: ticket.0,
                message,
            })?;
        let seconds = output.device_time.as_secs_f64();
        self.fit.observe(shape, seconds);
        self.steps += 1;
        self.step_seconds += seconds;
        self.last_step = Some(LastStep { shape, seconds });
        Ok(())
    }

    /// The executor, for another engine. Steps in flight are given up.
    pub fn into_executor(self) -> E {
        self.executor
    }

    /// Whether a request waits or runs, a step is in flight, or an event has not been returned.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work() || !self.aborted.is_empty()
    }

    /// Counts what the engine holds; takes time in proportion to the running sequences.
    pub fn stats(&self) -> Stats {
        let scheduler = &self.scheduler;
        Stats {
            running: scheduler.running(),
            waiting: scheduler.waiting(),
            kv_blocks_used: scheduler.blocks().used(),
            kv_blocks_total: scheduler.blocks().total(),
            kv_block_size: self.capacity.block_size,
            kv_tokens: scheduler.kv_tokens(),
            waiting_prompt_tokens: scheduler.waiting_prompt_tokens(),
            preemptions_total: scheduler.preemptions,
            set_back_total: scheduler.set_back,
            steps_total: self.steps,
            step_seconds_total: self.step_seconds,
            prompt_tokens_total: scheduler.prompt_tokens,
            generation_tokens_total: scheduler.generation_tokens,
            last_step: self.last_step,
            limits: scheduler.limits,
            ceilings: Limits {
                max_num_seqs: self.capacity.max_num_seqs,
                max_num_batched_tokens: self.capacity.max_num_batched_tokens,
            },
            law: self.fit.law(),
            law_confidence: self.fit.confidence(),
        }
    }
}

/// The dials within 1 and the executor's ceilings.
fn within(limits: Limits, capacity: &Capacity) -> Limits {
    Limits {
        max_num_seqs: limits.max_num_seqs.clamp(1, capacity.max_num_seqs.max(1)),
        max_num_batched_tokens: limits
            .max_num_batched_tokens
            .clamp(1, capacity.max_num_batched_tokens.max(1)),
    }
}
