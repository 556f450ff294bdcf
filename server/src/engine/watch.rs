//! Sees the steps that go into an executor: when each began and what it holds.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stoker_engine::executor::{Capacity, Executor, ExecutorError, StepBatch, StepOutput, Ticket};
use stoker_engine::{Clock, RealClock};
use stoker_law::StepShape;

/// The steps in flight, readable from other threads.
#[derive(Default)]
pub struct StepWatch {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    in_flight: VecDeque<StepShape>,
    /// When the oldest step in flight began: at its submission, or when the one before ended.
    began: f64,
}

impl StepWatch {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is two plain values, whole after any panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest step in flight: when it began on the engine's clock, and its shape.
    pub fn oldest(&self) -> Option<(f64, StepShape)> {
        let state = self.state();
        state.in_flight.front().map(|shape| (state.began, *shape))
    }
}

/// An executor that reports its steps to a [`StepWatch`].
pub struct WatchedExecutor {
    inner: Box<dyn Executor>,
    watch: Arc<StepWatch>,
    clock: RealClock,
}

impl WatchedExecutor {
    pub fn new(inner: Box<dyn Executor>, watch: Arc<StepWatch>, clock: RealClock) -> Self {
        Self {
            inner,
            watch,
            clock,
        }
    }
}

impl Executor for WatchedExecutor {
    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }

    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        let mut shape = StepShape::default();
        for row in &batch.rows {
            shape.sequences += 1;
            shape.tokens += row.tokens.len() as u32;
            shape.kv_tokens += u64::from(row.start) + row.tokens.len() as u64;
        }
        {
            let mut state = self.watch.state();
            if state.in_flight.is_empty() {
                state.began = self.clock.now();
            }
            state.in_flight.push_back(shape);
        }
        self.inner.submit(batch)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        let output = self.inner.wait(ticket)?;
        let mut state = self.watch.state();
        state.in_flight.pop_front();
        state.began = self.clock.now();
        Ok(output)
    }
}
