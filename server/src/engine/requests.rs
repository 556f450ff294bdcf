//! The book on the requests in the engine: where their tokens go and what is counted of them.

use std::collections::HashMap;
use std::sync::Arc;

use stoker_engine::{self as engine, Event, RequestId, Timing};
use stoker_law::StepShape;
use tokio::sync::mpsc::UnboundedSender;

use super::{AbortCause, Update};
use crate::metrics::{EngineMetrics, Objective};
use crate::objectives::Objectives;
use crate::openai::FinishReason;

/// Weight of the newest request in the running mean of answers' lengths.
const MEAN_WEIGHT: f64 = 0.1;

struct Entry {
    index: usize,
    updates: UnboundedSender<(usize, Update)>,
    prompt_tokens: u32,
    arrival: f64,
    first_token: Option<f64>,
    last_token: f64,
    /// Seconds between tokens.
    gaps: Vec<f32>,
    aborted: Option<AbortCause>,
}

/// Requests that are in the engine.
pub struct Requests {
    entries: HashMap<RequestId, Entry>,
    metrics: Arc<EngineMetrics>,
    pub objectives: Objectives,
    /// Running mean of the answers' lengths, in tokens; what a waiting request will cost.
    pub mean_generated: f64,
}

impl Requests {
    pub fn new(metrics: Arc<EngineMetrics>, objectives: Objectives) -> Self {
        Self {
            entries: HashMap::new(),
            metrics,
            objectives,
            mean_generated: 128.0,
        }
    }

    /// A request was admitted.
    pub fn admitted(
        &mut self,
        id: RequestId,
        index: usize,
        updates: UnboundedSender<(usize, Update)>,
        prompt_tokens: usize,
        arrival: f64,
    ) {
        self.metrics.requests_received.inc();
        self.metrics
            .received_prompt_tokens
            .inc_by(prompt_tokens as u64);
        self.entries.insert(
            id,
            Entry {
                index,
                updates,
                prompt_tokens: prompt_tokens as u32,
                arrival,
                first_token: None,
                last_token: 0.0,
                gaps: Vec::new(),
                aborted: None,
            },
        );
    }

    /// A request found the queue full: it is a miss like one that waits too long.
    pub fn turned_away(&self) {
        self.metrics.objective(Objective::Ttft, false);
        self.metrics.objective(Objective::All, false);
    }

    /// A step of this shape has ended.
    pub fn step_done(&self, shape: StepShape) {
        self.metrics
            .iteration_tokens
            .observe(f64::from(shape.tokens));
    }

    /// Notes why a request is about to end.
    pub fn aborting(&mut self, id: RequestId, cause: AbortCause) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.aborted = Some(cause);
        }
    }

    pub fn ids(&self) -> Vec<RequestId> {
        self.entries.keys().copied().collect()
    }

    /// Passes an event on and counts it.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Token { id, token, at, .. } => {
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.token(token, at, &self.metrics, &self.objectives);
                }
            }
            Event::Finished {
                id,
                reason,
                at,
                generated_tokens,
                timing,
                ..
            } => {
                if let Some(entry) = self.entries.remove(&id) {
                    self.finish(entry, reason, at, generated_tokens, timing);
                }
            }
        }
    }

    fn finish(
        &mut self,
        mut entry: Entry,
        reason: engine::FinishReason,
        at: f64,
        generated_tokens: u32,
        timing: Timing,
    ) {
        let reason = match (reason, entry.aborted) {
            (engine::FinishReason::Stop, _) => FinishReason::Stop,
            (engine::FinishReason::Length, _) => FinishReason::Length,
            (engine::FinishReason::Abort, Some(AbortCause::StopString)) => FinishReason::Stop,
            (engine::FinishReason::Abort, _) => FinishReason::Abort,
        };
        self.metrics.finished(reason);
        tracing::debug!(
            ?reason,
            prompt_tokens = entry.prompt_tokens,
            generated_tokens,
            seconds = at - entry.arrival,
            "request finished"
        );
        let ttft_limit = self.objectives.ttft_limit(entry.prompt_tokens);
        if reason == FinishReason::Abort {
            // A client that gave up counts as a miss only where it had waited too long already.
            if entry.first_token.is_none() && at - entry.arrival > ttft_limit {
                self.metrics.objective(Objective::Ttft, false);
                self.metrics.objective(Objective::All, false);
            }
        } else {
            self.mean_generated +=
                MEAN_WEIGHT * (f64::from(generated_tokens) - self.mean_generated);
            let met_ttft = entry
                .first_token
                .is_some_and(|first| first - entry.arrival <= ttft_limit);
            let met_itl = self.objectives.meets_itl(&mut entry.gaps);
            self.metrics.objective(Objective::Itl, met_itl);
            self.metrics.objective(Objective::All, met_ttft && met_itl);
            self.metrics
                .answered(entry.prompt_tokens, generated_tokens, &timing, at);
        }
        // The receiver is gone when the client is.
        let _ = entry
            .updates
            .send((entry.index, Update::Finished { reason }));
    }
}

impl Entry {
    fn token(&mut self, token: u32, at: f64, metrics: &EngineMetrics, objectives: &Objectives) {
        if self.first_token.is_none() {
            self.first_token = Some(at);
            let ttft = at - self.arrival;
            metrics.time_to_first_token.observe(ttft);
            let met = ttft <= objectives.ttft_limit(self.prompt_tokens);
            metrics.objective(Objective::Ttft, met);
        } else {
            let gap = at - self.last_token;
            metrics.inter_token_latency.observe(gap);
            self.gaps.push(gap as f32);
        }
        self.last_token = at;
        let _ = self.updates.send((self.index, Update::Token(token)));
    }
}
