//! What was measured, as it comes in: for the report at the end and for a line every second.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::client::{Answer, Failure, FailureKind, Listener};
use super::goodput::{Goodput, Tally};
use crate::stats::quantile;

/// Seconds over which the percentiles of a progress line reach.
const WINDOW: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    sent: u64,
    ok: u64,
    failed: BTreeMap<FailureKind, u64>,
    /// The first failure of each kind, for the report.
    examples: BTreeMap<FailureKind, String>,
    completion_tokens: u64,
    prompt_tokens: u64,
    /// Pieces of text that came in: the tokens as they are seen.
    texts: u64,
    latency: Vec<f64>,
    ttft: Samples,
    itl: Samples,
    tally: Tally,
    last_line: Line,
}

/// All samples, and when the newest came.
#[derive(Default)]
struct Samples {
    all: Vec<f64>,
    recent: VecDeque<(Instant, f64)>,
}

impl Samples {
    fn push(&mut self, now: Instant, seconds: f64) {
        self.all.push(seconds);
        self.recent.push_back((now, seconds));
    }

    /// 50th and 95th percentile of the last seconds, in milliseconds.
    fn recent(&mut self, now: Instant) -> (Option<f64>, Option<f64>) {
        while let Some((at, _)) = self.recent.front()
            && now.duration_since(*at) > WINDOW
        {
            self.recent.pop_front();
        }
        if self.recent.is_empty() {
            return (None, None);
        }
        let mut sorted: Vec<f64> = self.recent.iter().map(|(_, s)| *s).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let ms = |q| Some((quantile(&sorted, q) * 1e5).round() / 100.0);
        (ms(0.5), ms(0.95))
    }
}

/// Totals when the last progress line was made.
#[derive(Clone, Copy, Default)]
struct Line {
    t: f64,
    ok: u64,
    texts: u64,
}

/// A line of `--progress-jsonl`.
#[derive(Debug, Serialize)]
pub struct Progress {
    /// Seconds since the start.
    pub t: f64,
    pub concurrency: u32,
    pub in_flight: u64,
    /// Requests answered and text events a second, since the line before.
    pub requests_per_s: f64,
    pub tok_per_s: f64,
    /// Totals since the start.
    pub sent: u64,
    pub ok: u64,
    pub failed: u64,
    /// The failed ones by kind.
    pub failures: BTreeMap<FailureKind, u64>,
    /// Over the last 5 seconds; null when nothing came.
    pub ttft_p50_ms: Option<f64>,
    pub ttft_p95_ms: Option<f64>,
    pub itl_p50_ms: Option<f64>,
    pub itl_p95_ms: Option<f64>,
    /// Share of the requests that ended in the last 10 seconds and met the limits of `--goodput`;
    /// null without limits or when none ended.
    pub good_percent: Option<f64>,
}

/// All that was measured.
pub struct Measured {
    pub sent: u64,
    pub ok: u64,
    /// Requests that met the limits of `--goodput`.
    pub good: Option<u64>,
    pub failed: BTreeMap<FailureKind, u64>,
    pub examples: BTreeMap<FailureKind, String>,
    pub completion_tokens: u64,
    pub prompt_tokens: u64,
    pub latency: Vec<f64>,
    pub ttft: Vec<f64>,
    pub itl: Vec<f64>,
    pub seconds: f64,
}

pub struct Recorder {
    start: Instant,
    goodput: Option<Goodput>,
    state: Mutex<State>,
}

impl Listener for Recorder {
    fn text(&self, first: bool, since: Duration) {
        let now = Instant::now();
        let mut state = self.state();
        state.texts += 1;
        let samples = if first {
            &mut state.ttft
        } else {
            &mut state.itl
        };
        samples.push(now, since.as_secs_f64());
    }
}

impl Recorder {
    pub fn new(goodput: Option<Goodput>) -> Self {
        Self {
            start: Instant::now(),
            goodput,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn sent(&self) {
        self.state().sent += 1;
    }

    pub fn answered(&self, answer: &Answer, latency: Duration) {
        let mut state = self.state();
        state.ok += 1;
        state.completion_tokens += answer.completion_tokens;
        state.prompt_tokens += answer.prompt_tokens;
        state.latency.push(latency.as_secs_f64());
        if let Some(limits) = &self.goodput {
            state.tally.push(Instant::now(), limits.is_met_by(answer));
        }
    }

    pub fn failed(&self, failure: Failure) {
        let mut state = self.state();
        *state.failed.entry(failure.kind.clone()).or_default() += 1;
        state.examples.entry(failure.kind).or_insert(failure.detail);
        if self.goodput.is_some() {
            state.tally.push(Instant::now(), false);
        }
    }

    /// The figures of now; rates are since the call before.
    pub fn progress(&self, concurrency: u32) -> Progress {
        let now = Instant::now();
        let mut state = self.state();
        let t = now.duration_since(self.start).as_secs_f64();
        let before = state.last_line;
        let seconds = (t - before.t).max(1e-3);
        let (ttft_p50_ms, ttft_p95_ms) = state.ttft.recent(now);
        let (itl_p50_ms, itl_p95_ms) = state.itl.recent(now);
        let good_percent = state.tally.recent_percent(now);
        let failed = state.failed.values().sum();
        let rate = |count: u64| (count as f64 / seconds * 100.0).round() / 100.0;
        state.last_line = Line {
            t,
            ok: state.ok,
            texts: state.texts,
        };
        Progress {
            t: (t * 1e3).round() / 1e3,
            concurrency,
            in_flight: state.sent - state.ok - failed,
            requests_per_s: rate(state.ok - before.ok),
            tok_per_s: rate(state.texts - before.texts),
            sent: state.sent,
            ok: state.ok,
            failed,
            failures: state.failed.clone(),
            ttft_p50_ms,
            ttft_p95_ms,
            itl_p50_ms,
            itl_p95_ms,
            good_percent,
        }
    }

    pub fn finish(&self) -> Measured {
        let seconds = self.elapsed().as_secs_f64();
        let state = std::mem::take(&mut *self.state());
        Measured {
            sent: state.sent,
            ok: state.ok,
            good: self.goodput.as_ref().map(|_| state.tally.good),
            failed: state.failed,
            examples: state.examples,
            completion_tokens: state.completion_tokens,
            prompt_tokens: state.prompt_tokens,
            latency: state.latency,
            ttft: state.ttft.all,
            itl: state.itl.all,
            seconds,
        }
    }
}
