//! Where the server stands between start and exit, and what it therefore admits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::openai::error::ApiError;

/// Seconds after which a client that met a draining replica should try again: the Service has
/// routed around it by then.
const DRAIN_RETRY_AFTER: u64 = 1;

#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// The model is being loaded or timed.
    Loading,
    Ready,
    /// Told to leave the rotation: not ready, but serves whatever still comes, and closes each
    /// connection after its next answer.
    LameDuck,
    /// On the way out since this moment: finishes what runs and refuses new connections' work.
    Draining {
        since: Instant,
    },
    /// The engine is dead; the process will exit.
    Failed {
        message: String,
    },
}

impl Phase {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::LameDuck => "lame_duck",
            Self::Draining { .. } => "draining",
            Self::Failed { .. } => "failed",
        }
    }
}

pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    started: Instant,
    /// Loading progress in millionths.
    progress: AtomicU32,
    /// API requests whose answer is not complete.
    active: AtomicUsize,
    became_idle: Notify,
}

/// Counts an API request as active until dropped.
pub struct ActiveRequest(Arc<Lifecycle>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.became_idle.notify_waiters();
        }
    }
}

impl Lifecycle {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            phase: watch::Sender::new(Phase::Loading),
            started: Instant::now(),
            progress: AtomicU32::new(0),
            active: AtomicUsize::new(0),
            became_idle: Notify::new(),
        })
    }

    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Notes how much of the loading is done (0..=1).
    pub fn set_progress(&self, done: f64) {
        let millionths = (done.clamp(0.0, 1.0) * 1e6) as u32;
        self.progress.fetch_max(millionths, Ordering::Relaxed);
    }

    /// Share of the loading that is done, 0..=1.
    pub fn progress(&self) -> f64 {
        f64::from(self.progress.load(Ordering::Relaxed)) / 1e6
    }

    /// Seconds until loading ends at the pace so far; 0 when it has ended or nothing is known.
    pub fn loading_eta(&self) -> f64 {
        let done = self.progress();
        if done <= 0.0 || *self.phase.borrow() != Phase::Loading {
            return 0.0;
        }
        self.started.elapsed().as_secs_f64() * (1.0 - done) / done
    }

    /// Loading has ended.
    pub fn set_ready(&self) {
        self.set_progress(1.0);
        self.change(|phase| matches!(phase, Phase::Loading).then_some(Phase::Ready));
    }

    /// Leaves the rotation, or returns to it. Does nothing in other phases than these two.
    pub fn set_lame_duck(&self, leave: bool) {
        self.change(|phase| match (phase, leave) {
            (Phase::Ready, true) => Some(Phase::LameDuck),
            (Phase::LameDuck, false) => Some(Phase::Ready),
            _ => None,
        });
    }

    /// Begins to drain; the first call counts.
    pub fn drain(&self) {
        self.change(|phase| match phase {
            Phase::Draining { .. } | Phase::Failed { .. } => None,
            _ => Some(Phase::Draining {
                since: Instant::now(),
            }),
        });
    }

    pub fn fail(&self, message: String) {
        self.change(|phase| {
            (!matches!(phase, Phase::Failed { .. })).then_some(Phase::Failed { message })
        });
    }

    fn change(&self, next: impl FnOnce(&Phase) -> Option<Phase>) {
        self.phase.send_if_modified(|phase| match next(phase) {
            Some(new) => {
                tracing::info!(from = phase.name(), to = new.name(), "phase");
                *phase = new;
                true
            }
            None => false,
        });
    }

    /// Whether answers should tell their connection to close, so that clients move elsewhere.
    pub fn closes_connections(&self) -> bool {
        matches!(
            *self.phase.borrow(),
            Phase::LameDuck | Phase::Draining { .. } | Phase::Failed { .. }
        )
    }

    /// Admits an API request that came on a connection accepted at `accepted`.
    ///
    /// While draining, a connection from before the drain gets its request served, with
    /// Connection: close: its client could not know, and hears it by this answer. Work on new
    /// connections is refused.
    pub fn admit(self: &Arc<Self>, accepted: Instant) -> Result<ActiveRequest, ApiError> {
        // Counted while the phase can't change, so that a drain waits for all that it doesn't
        // refuse. What is refused is never counted: it must not keep a drain waiting.
        match &*self.phase.borrow() {
            Phase::Ready | Phase::LameDuck => Ok(self.count()),
            Phase::Draining { since } if accepted < *since && self.progress() >= 1.0 => {
                Ok(self.count())
            }
            Phase::Draining { .. } => Err(ApiError::unavailable(
                "draining",
                "this replica is shutting down; send the request again",
                DRAIN_RETRY_AFTER,
            )
            .closing()),
            Phase::Loading => Err(ApiError::unavailable(
                "loading",
                format!(
                    "the model is loading, {:.0} % done; try again later",
                    100.0 * self.progress()
                ),
                (self.loading_eta().ceil() as u64).clamp(1, 60),
            )),
            Phase::Failed { message } => Err(ApiError::unavailable(
                "failed",
                format!("this replica has failed ({message}) and will restart"),
                DRAIN_RETRY_AFTER,
            )
            .closing()),
        }
    }

    fn count(self: &Arc<Self>) -> ActiveRequest {
        self.active.fetch_add(1, Ordering::AcqRel);
        ActiveRequest(self.clone())
    }

    /// API requests whose answer is not complete.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::Acquire)
    }

    /// Waits until no API request has been active for `quiet`.
    pub async fn idle_for(&self, quiet: Duration) {
        loop {
            let notified = self.became_idle.notified();
            if self.active() > 0 {
                notified.await;
                continue;
            }
            // Requests that come and go within the pause notify; the pause then starts again.
            if tokio::time::timeout(quiet, notified).await.is_err() && self.active() == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admission_follows_the_phase() {
        let lifecycle = Lifecycle::new();
        let old = Instant::now();
        let status = |accepted| {
            lifecycle
                .admit(accepted)
                .map_err(|e| e.status.as_u16())
                .err()
        };
        assert_eq!(status(old), Some(503));
        lifecycle.set_ready();
        assert_eq!(status(old), None);
        lifecycle.set_lame_duck(true);
        assert_eq!(status(old), None);
        assert!(lifecycle.closes_connections());
        lifecycle.set_lame_duck(false);
        assert_eq!(lifecycle.phase(), Phase::Ready);
        lifecycle.drain();
        assert_eq!(status(old), None, "its client could not know of the drain");
        assert_eq!(status(Instant::now()), Some(503));
        lifecycle.set_lame_duck(false);
        assert!(lifecycle.closes_connections(), "a drain is not taken back");
        assert_eq!(lifecycle.active(), 0);
    }

    #[test]
    fn a_drain_while_loading_admits_nothing() {
        let lifecycle = Lifecycle::new();
        let old = Instant::now();
        lifecycle.drain();
        assert!(lifecycle.admit(old).is_err());
        lifecycle.set_ready();
        assert_eq!(lifecycle.phase().name(), "draining");
    }

    #[tokio::test]
    async fn idle_waits_for_the_last_request() {
        let lifecycle = Lifecycle::new();
        lifecycle.set_ready();
        let request = lifecycle.admit(Instant::now()).unwrap();
        let waiter = {
            let lifecycle = lifecycle.clone();
            tokio::spawn(async move { lifecycle.idle_for(Duration::from_millis(1)).await })
        };
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(request);
        waiter.await.unwrap();
    }

    #[tokio::test]
    async fn refused_requests_do_not_hold_up_a_drain() {
        let lifecycle = Lifecycle::new();
        lifecycle.set_ready();
        lifecycle.drain();
        let mut idle = std::pin::pin!(lifecycle.idle_for(Duration::from_millis(50)));
        // Refusals come faster than the pause that the drain waits for.
        while futures::poll!(&mut idle).is_pending() {
            assert!(lifecycle.admit(Instant::now()).is_err());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
