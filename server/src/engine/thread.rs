//! The engine's thread: takes commands between steps, runs steps, hands tokens out.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stoker_engine::executor::Executor;
use stoker_engine::{AddError, Clock, Engine, RealClock, Request, RequestId, Stats};
use stoker_law::StepShape;
use tokio::sync::mpsc::UnboundedSender;

use super::requests::Requests;
use super::watch::{StepWatch, WatchedExecutor};
use super::{AbortCause, Command, EngineStart, NewRequest, Shared, Snapshot, SubmitError, Update};

/// The next step is submitted when this share of the one in flight has passed: late enough that
/// requests which arrive meanwhile are in it, early enough that the device never waits.
const SUBMIT_AFTER: f64 = 0.5;

/// Longest wait for late requests, in seconds: bounds what a law that errs can cost.
const MAX_SUBMIT_DELAY: f64 = 0.01;

/// Longest hint in a Retry-After header, in seconds.
const MAX_RETRY_AFTER: f64 = 60.0;

pub struct EngineThread {
    engine: Engine<Box<dyn Executor>>,
    commands: Receiver<Command>,
    requests: Requests,
    eos_token_ids: Vec<u32>,
    shared: Arc<Shared>,
    watch: Arc<StepWatch>,
    clock: RealClock,
    steps_seen: u64,
    on_failure: Option<Box<dyn FnOnce(String) + Send>>,
}

impl EngineThread {
    pub fn new(
        start: EngineStart,
        commands: Receiver<Command>,
        watch: Arc<StepWatch>,
    ) -> (Self, Arc<Shared>) {
        let executor: Box<dyn Executor> = Box::new(WatchedExecutor::new(
            start.executor,
            watch.clone(),
            start.clock,
        ));
        let engine = Engine::new(executor, start.limits, start.config);
        let shared = Arc::new(Shared {
            snapshot: Mutex::new(Snapshot {
                stats: engine.stats(),
                objectives: start.objectives,
            }),
            submitted: AtomicUsize::new(0),
            submitted_tokens: AtomicU64::new(0),
        });
        let thread = Self {
            engine,
            commands,
            requests: Requests::new(start.metrics, start.objectives),
            eos_token_ids: start.eos_token_ids,
            shared: shared.clone(),
            watch,
            clock: start.clock,
            steps_seen: 0,
            on_failure: Some(start.on_failure),
        };
        (thread, shared)
    }

    /// Runs until the last handle is gone or the device fails.
    pub fn run(mut self) {
        while self.take_commands() {
            match self.engine.step(&self.clock) {
                Ok(events) => {
                    let _answer = tracing::trace_span!("answer").entered();
                    for event in events {
                        self.requests.handle(event);
                    }
                    self.publish();
                }
                Err(error) => {
                    tracing::error!(%error, "the engine has failed");
                    if let Some(on_failure) = self.on_failure.take() {
                        on_failure(error.to_string());
                    }
                    // Dropping the requests' channels tells their handlers.
                    return;
                }
            }
        }
    }

    /// Takes the commands there are; waits for one when there is nothing to do, and for late ones
    /// while the device is busy anyway. False when the last handle is gone.
    fn take_commands(&mut self) -> bool {
        while !self.engine.has_work() {
            match self.commands.recv() {
                Ok(command) => self.handle(command),
                Err(_) => return false,
            }
        }
        loop {
            let now = self.clock.now();
            let wait = self.submit_at().map_or(0.0, |at| (at - now).max(0.0));
            let wait = Duration::try_from_secs_f64(wait).unwrap_or_default();
            match self.commands.recv_timeout(wait) {
                Ok(command) => self.handle(command),
                Err(RecvTimeoutError::Timeout) => return true,
                // Nobody is left to hear an answer.
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    /// When the next step should be submitted; `None`: at once.
    fn submit_at(&self) -> Option<f64> {
        let (began, shape) = self.watch.oldest()?;
        let seconds = self.engine.stats().law.step_seconds(shape);
        Some(began + (SUBMIT_AFTER * seconds).min(MAX_SUBMIT_DELAY))
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Add {
                requests,
                arrival,
                updates,
                reply,
            } => {
                let count = requests.len();
                let tokens = requests.iter().map(|(_, r)| r.prompt.len() as u64).sum();
                let answer = self.add(requests, arrival, &updates);
                self.shared.submitted.fetch_sub(count, Ordering::Relaxed);
                self.shared
                    .submitted_tokens
                    .fetch_sub(tokens, Ordering::Relaxed);
                // A handler that is gone has sent its abort already.
                let _ = reply.send(answer);
            }
            Command::Abort { id, cause } => self.abort(id, cause),
            Command::AbortAll => {
                for id in self.requests.ids() {
                    self.engine.abort(id);
                }
            }
            Command::SetLimits { limits, reply } => {
                let answer = self.engine.set_limits(limits);
                self.publish();
                let _ = reply.send(answer);
                return;
            }
            Command::SetObjectives(objectives) => self.requests.objectives = objectives,
        }
        self.publish();
    }

    fn abort(&mut self, id: RequestId, cause: AbortCause) {
        self.requests.aborting(id, cause);
        self.engine.abort(id);
    }

    /// Adds requests, all or none.
    fn add(
        &mut self,
        requests: Vec<(RequestId, NewRequest)>,
        arrival: f64,
        updates: &UnboundedSender<(usize, Update)>,
    ) -> Result<(), SubmitError> {
        let mut added: Vec<(RequestId, usize)> = Vec::with_capacity(requests.len());
        for (index, (id, request)) in requests.into_iter().enumerate() {
            let prompt_tokens = request.prompt.len();
            match self.engine.add(self.engine_request(id, request, arrival)) {
                Ok(()) => added.push((id, prompt_tokens)),
                Err(error) => {
                    // Not in the book: their end is heard by nobody and counted nowhere.
                    for (id, _) in added {
                        self.engine.abort(id);
                    }
                    return Err(self.refusal(index, error));
                }
            }
        }
        for (index, (id, prompt_tokens)) in added.into_iter().enumerate() {
            self.requests
                .admitted(id, index, updates.clone(), prompt_tokens, arrival);
        }
        Ok(())
    }

    fn engine_request(&self, id: RequestId, request: NewRequest, arrival: f64) -> Request {
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let ttft_limit = self.requests.objectives.ttft_limit(prompt_tokens);
        Request {
            id,
            prompt: request.prompt,
            sampling: request.sampling,
            max_tokens: request.max_tokens,
            stop_token_ids: request.stop_token_ids,
            ignore_eos: request.ignore_eos,
            eos_token_ids: self.eos_token_ids.clone(),
            priority: request.priority,
            arrival,
            first_token_due: Some(arrival + ttft_limit),
        }
    }

    fn refusal(&self, index: usize, error: AddError) -> SubmitError {
        match error {
            AddError::QueueFull { waiting } => {
                self.requests.turned_away();
                SubmitError::QueueFull {
                    waiting,
                    retry_after: retry_after(&self.engine.stats(), self.requests.mean_generated),
                }
            }
            error => SubmitError::Refused { index, error },
        }
    }

    fn publish(&mut self) {
        let stats = self.engine.stats();
        if stats.steps_total > self.steps_seen {
            self.steps_seen = stats.steps_total;
            if let Some(step) = stats.last_step {
                self.requests.step_done(step.shape);
            }
        }
        *self.shared.snapshot() = Snapshot {
            stats,
            objectives: self.requests.objectives,
        };
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        // Reached by a panic as well: an engine that is gone must not go unnoticed.
        if std::thread::panicking()
            && let Some(on_failure) = self.on_failure.take()
        {
            on_failure("the engine's thread panicked; its message is in the log".into());
        }
    }
}

/// Seconds until half of a full queue has found a seat, by the law: waiting for that long meets
/// a queue with room, and not an empty engine.
fn retry_after(stats: &Stats, mean_generated: f64) -> u64 {
    let budget = stats.limits.max_num_batched_tokens;
    let chunk = u32::try_from(stats.waiting_prompt_tokens)
        .unwrap_or(u32::MAX)
        .min(budget.saturating_sub(stats.running));
    let step = stats.law.step_seconds(StepShape {
        sequences: stats.running.max(1),
        tokens: stats.running.saturating_add(chunk).max(1),
        kv_tokens: stats.kv_tokens,
    });
    let waiting = f64::from(stats.waiting) / 2.0;
    let decode_steps = waiting * mean_generated / f64::from(stats.running.max(1));
    let prompt_steps = stats.waiting_prompt_tokens as f64 / 2.0 / f64::from(budget.max(1));
    let seconds = step * decode_steps.max(prompt_steps);
    // NaN, from a law not yet fitted, ends as the lower bound.
    seconds.ceil().clamp(1.0, MAX_RETRY_AFTER).max(1.0) as u64
}

#[cfg(test)]
mod tests {
    use stoker_engine::Limits;
    use stoker_law::Law;

    use super::*;

    fn stats(running: u32, waiting: u32, waiting_prompt_tokens: u64) -> Stats {
        let limits = Limits {
            max_num_seqs: 8,
            max_num_batched_tokens: 500,
        };
        Stats {
            running,
            waiting,
            kv_blocks_used: 0,
            kv_blocks_total: 100,
            kv_block_size: 16,
            kv_tokens: 0,
            waiting_prompt_tokens,
            preemptions_total: 0,
            set_back_total: 0,
            steps_total: 0,
            step_seconds_total: 0.0,
            prompt_tokens_total: 0,
            generation_tokens_total: 0,
            last_step: None,
            limits,
            ceilings: limits,
            law: Law {
                base: 0.02,
                per_kv_token: 0.0,
                per_token: 0.0,
                per_sequence: 0.0,
                hidden: 1.0,
            },
            law_confidence: 1.0,
        }
    }

    #[test]
    fn retry_after_follows_the_queue() {
        // 8 of 16 waiting requests need 8 x 100 tokens = 100 steps of 8 seats.
        assert_eq!(retry_after(&stats(8, 16, 0), 100.0), 2);
        // 25,000 prompt tokens are 50 steps of 500, for half of the queue.
        assert_eq!(retry_after(&stats(8, 2, 50_000), 100.0), 1);
        assert_eq!(retry_after(&stats(8, 2, 500_000), 100.0), 10);
        assert_eq!(retry_after(&stats(8, 100_000, 0), 1000.0), 60);
        let mut unfitted = stats(8, 16, 0);
        unfitted.law.base = f64::NAN;
        assert_eq!(retry_after(&unfitted, 100.0), 1);
    }
}
