//! The engine behind a channel: one thread owns it, handlers talk to it through a handle.

mod requests;
mod thread;
mod watch;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use stoker_engine::executor::{Executor, Sampling};
use stoker_engine::{
    AddError, Clock, EngineConfig, Limits, LimitsError, RealClock, RequestId, Stats,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::metrics::EngineMetrics;
use crate::objectives::Objectives;
use crate::openai::FinishReason;

pub use watch::StepWatch;

/// A request for the engine. Several of one HTTP request are added together.
#[derive(Clone, Debug)]
pub struct NewRequest {
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub max_tokens: u32,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub priority: i32,
}

/// News of a request.
#[derive(Clone, Debug)]
pub enum Update {
    Token(u32),
    Finished { reason: FinishReason },
}

/// Why requests were not added.
#[derive(Debug)]
pub enum SubmitError {
    /// The request can't be served here; says which of the prompts and why.
    Refused { index: usize, error: AddError },
    /// The queue is full; retry after so many seconds.
    QueueFull { waiting: usize, retry_after: u64 },
    /// The engine is dead.
    Gone,
}

enum Command {
    Add {
        requests: Vec<(RequestId, NewRequest)>,
        arrival: f64,
        updates: UnboundedSender<(usize, Update)>,
        reply: oneshot::Sender<Result<(), SubmitError>>,
    },
    /// The client went away, or the answer ended before the model did.
    Abort {
        id: RequestId,
        cause: AbortCause,
    },
    AbortAll,
    SetLimits {
        limits: Limits,
        reply: oneshot::Sender<Result<Limits, LimitsError>>,
    },
    SetObjectives(Objectives),
}

/// Why a request is ended from outside, which decides how it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AbortCause {
    /// The client went away.
    Client,
    /// A stop string was found in its text: the answer is complete.
    StopString,
}

/// What the thread publishes after each step.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    pub stats: Stats,
    pub objectives: Objectives,
}

struct Shared {
    snapshot: Mutex<Snapshot>,
    /// Requests and prompt tokens on the way to the thread.
    submitted: AtomicUsize,
    submitted_tokens: AtomicU64,
}

impl Shared {
    fn snapshot(&self) -> MutexGuard<'_, Snapshot> {
        // A snapshot is plain data, whole after any panic.
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the engine, cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    watch: Arc<StepWatch>,
    next_id: Arc<AtomicU64>,
    clock: RealClock,
}

/// What the engine thread is started with.
pub struct EngineStart {
    pub executor: Box<dyn Executor>,
    /// The clock that the executor paces itself by, if it does.
    pub clock: RealClock,
    pub limits: Limits,
    pub config: EngineConfig,
    pub objectives: Objectives,
    pub eos_token_ids: Vec<u32>,
    pub metrics: Arc<EngineMetrics>,
    /// Called once if the engine dies.
    pub on_failure: Box<dyn FnOnce(String) + Send>,
}

impl EngineHandle {
    /// Starts the engine's thread; it ends when the last handle is gone.
    pub fn start(start: EngineStart) -> std::io::Result<Self> {
        let (commands, receiver) = mpsc::channel();
        let watch = Arc::new(StepWatch::default());
        let clock = start.clock;
        let (thread, shared) = thread::EngineThread::new(start, receiver, watch.clone());
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || thread.run())?;
        Ok(Self {
            commands,
            shared,
            watch,
            next_id: Arc::new(AtomicU64::new(1)),
            clock,
        })
    }

    /// Adds requests: all of them or none. They arrived so long ago: in a router, which held them.
    pub async fn submit(
        &self,
        requests: Vec<NewRequest>,
        waited: Duration,
    ) -> Result<Generation, SubmitError> {
        let arrival = self.clock.now() - waited.as_secs_f64();
        let count = requests.len();
        let tokens: u64 = requests.iter().map(|r| r.prompt.len() as u64).sum();
        let first = self.next_id.fetch_add(count as u64, Ordering::Relaxed);
        let ids: Vec<RequestId> = (first..first + count as u64).map(RequestId).collect();
        let (updates, receiver) = unbounded_channel();
        let (reply, answer) = oneshot::channel();
        // From here on a dropped handler must leave nothing behind, so the guard comes first. An
        // abort that overtakes nothing: the channel keeps the order.
        let generation = Generation {
            updates: receiver,
            open: ids.iter().copied().map(Some).collect(),
            commands: self.commands.clone(),
        };
        self.shared.submitted.fetch_add(count, Ordering::Relaxed);
        self.shared
            .submitted_tokens
            .fetch_add(tokens, Ordering::Relaxed);
        let sent = self.commands.send(Command::Add {
            requests: ids.into_iter().zip(requests).collect(),
            arrival,
            updates,
            reply,
        });
        if sent.is_err() {
            return Err(SubmitError::Gone);
        }
        match answer.await {
            Ok(Ok(())) => Ok(generation),
            Ok(Err(error)) => {
                generation.forget();
                Err(error)
            }
            Err(_) => Err(SubmitError::Gone),
        }
    }

    /// Sets the dials; values above the ceilings are lowered to them. `None` once the engine is
    /// dead.
    pub async fn set_limits(&self, limits: Limits) -> Option<Result<Limits, LimitsError>> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::SetLimits { limits, reply })
            .ok()?;
        answer.await.ok()
    }

    pub fn set_objectives(&self, objectives: Objectives) {
        // A dead engine has no objectives to change; its failure is reported elsewhere.
        let _ = self.commands.send(Command::SetObjectives(objectives));
    }

    /// Ends every request; their answers say `abort`.
    pub fn abort_all(&self) {
        let _ = self.commands.send(Command::AbortAll);
    }

    /// The newest figures, with the requests that are on the way to the engine counted as waiting.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = *self.shared.snapshot();
        let stats = &mut snapshot.stats;
        stats.waiting += self.shared.submitted.load(Ordering::Relaxed) as u32;
        stats.waiting_prompt_tokens += self.shared.submitted_tokens.load(Ordering::Relaxed);
        snapshot
    }

    /// Seconds that the oldest step in flight has taken so far.
    pub fn step_age(&self) -> f64 {
        self.watch
            .oldest()
            .map_or(0.0, |(began, _)| self.clock.now() - began)
    }
}

/// The answer to come of requests that were added together. Dropping it aborts what is not
/// finished.
pub struct Generation {
    updates: UnboundedReceiver<(usize, Update)>,
    /// The ids of the requests not yet finished, by index.
    open: Vec<Option<RequestId>>,
    commands: mpsc::Sender<Command>,
}

impl Generation {
    /// Waits for news of any of the requests and appends all there are to `buffer`, with the
    /// request's index. False when no more can come: every request is finished, or the engine is
    /// dead.
    pub async fn next(&mut self, buffer: &mut Vec<(usize, Update)>) -> bool {
        let had = buffer.len();
        if self.updates.recv_many(buffer, 256).await == 0 {
            return false;
        }
        for (index, update) in &buffer[had..] {
            if matches!(update, Update::Finished { .. })
                && let Some(slot) = self.open.get_mut(*index)
            {
                *slot = None;
            }
        }
        true
    }

    /// Ends a request whose answer is complete because of a stop string.
    pub fn stop(&mut self, index: usize) {
        self.abort(index, AbortCause::StopString);
    }

    fn abort(&mut self, index: usize, cause: AbortCause) {
        if let Some(id) = self.open.get_mut(index).and_then(Option::take) {
            // A dead engine has nothing to abort.
            let _ = self.commands.send(Command::Abort { id, cause });
        }
    }

    /// The requests were never added.
    fn forget(mut self) {
        self.open.clear();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for index in 0..self.open.len() {
            self.abort(index, AbortCause::Client);
        }
    }
}

#[cfg(test)]
mod tests;
