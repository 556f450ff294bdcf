//! One replica as this router sees it: its load, its health, its connections.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};

use tokio::sync::Notify;

use crate::choose::Candidate;
use crate::prefix::Slot;
use crate::table::ReplicaEntry;
use crate::upstream::Pool;

/// Failures in a row after which a replica gets no more requests until it answers a probe.
const FAILURES_TO_EJECT: u32 = 3;
/// A replica whose own queue is full gets nothing for so long.
const FULL_SECONDS: f64 = 0.25;
/// A report older than this says nothing about other routers' load any more.
const STALE_SECONDS: f64 = 5.0;

static NEXT_SLOT: AtomicU32 = AtomicU32::new(0);

/// Why a replica was taken out of the rotation by this router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ejection {
    /// It refused or broke connections.
    Failing,
    /// It says itself that it isn't ready: loading or draining. What it runs, it finishes.
    NotReady,
    /// It doesn't answer at all: requests that wait for their first byte go elsewhere.
    Unresponsive,
}

impl Ejection {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failing => "failing",
            Self::NotReady => "not_ready",
            Self::Unresponsive => "unresponsive",
        }
    }
}

/// What a replica's metrics say, as far as routing reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    pub max_num_seqs: Option<u32>,
    /// Running and waiting, of all routers.
    pub requests: u32,
    /// Prompt tokens accepted and not yet computed.
    pub waiting_prompt_tokens: f64,
}

#[derive(Debug)]
pub struct Replica {
    pub id: String,
    pub address: SocketAddr,
    pub slot: Slot,
    pub pool: Pool,
    /// Tells requests without a first byte that they wait in vain.
    pub unresponsive: Notify,
    /// As bits.
    weight: AtomicU64,
    table_cap: AtomicU32,
    reported_cap: AtomicU32,
    in_flight: AtomicU32,
    tokens: AtomicI64,
    others_requests: AtomicU32,
    others_tokens: AtomicU32,
    reported_at_ms: AtomicU64,
    failures: AtomicU32,
    ejected: AtomicBool,
    starting: AtomicBool,
    full_until_ms: AtomicU64,
    removed: AtomicBool,
}

impl Replica {
    #[must_use]
    pub fn new(entry: &ReplicaEntry) -> Self {
        Self {
            id: entry.id.clone(),
            address: entry.address,
            slot: NEXT_SLOT.fetch_add(1, Relaxed),
            pool: Pool::new(entry.address),
            unresponsive: Notify::new(),
            weight: AtomicU64::new(entry.weight.to_bits()),
            table_cap: AtomicU32::new(entry.max_num_seqs),
            reported_cap: AtomicU32::new(0),
            in_flight: AtomicU32::new(0),
            tokens: AtomicI64::new(0),
            others_requests: AtomicU32::new(0),
            others_tokens: AtomicU32::new(0),
            reported_at_ms: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            ejected: AtomicBool::new(!entry.ready),
            starting: AtomicBool::new(!entry.ready),
            full_until_ms: AtomicU64::new(0),
            removed: AtomicBool::new(false),
        }
    }

    pub fn update(&self, entry: &ReplicaEntry) {
        self.weight.store(entry.weight.to_bits(), Relaxed);
        self.table_cap.store(entry.max_num_seqs, Relaxed);
        if entry.ready && self.is_starting() {
            self.restore();
        }
    }

    /// It left the table; what it runs may finish.
    pub fn remove(&self) {
        self.removed.store(true, Relaxed);
        self.pool.clear();
    }

    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.removed.load(Relaxed)
    }

    /// Requests that this router has there.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Tokens still to do of those requests.
    #[must_use]
    pub fn tokens(&self) -> i64 {
        self.tokens.load(Relaxed)
    }

    #[must_use]
    pub fn weight(&self) -> f64 {
        f64::from_bits(self.weight.load(Relaxed))
    }

    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    /// It has never been ready yet.
    #[must_use]
    pub fn is_starting(&self) -> bool {
        self.starting.load(Relaxed)
    }

    /// In the rotation and healthy; perhaps without room.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.weight() > 0.0 && !self.is_ejected() && !self.is_removed()
    }

    /// Requests that it may have: its cap and a short buffer, so that it needn't idle between
    /// the end of one request and the arrival of the next.
    #[must_use]
    pub fn slots(&self) -> u32 {
        let cap = match self.reported_cap.load(Relaxed) {
            0 => self.table_cap.load(Relaxed),
            cap => cap,
        };
        cap.saturating_add((cap / 8).max(1))
    }

    /// The replica as a candidate, if it has room now.
    #[must_use]
    pub fn candidate(&self, now: f64) -> Option<Candidate> {
        if !self.is_usable() || millis(now) < self.full_until_ms.load(Relaxed) {
            return None;
        }
        let fresh = now - self.reported_at_ms.load(Relaxed) as f64 / 1000.0 < STALE_SECONDS;
        let others = if fresh {
            self.others_requests.load(Relaxed)
        } else {
            0
        };
        if self.in_flight().saturating_add(others) >= self.slots() {
            return None;
        }
        let others_tokens = self.others_tokens.load(Relaxed);
        Some(Candidate {
            own_tokens: self.tokens().max(0) as f64,
            others_tokens: if fresh { f64::from(others_tokens) } else { 0.0 },
            cached_tokens: 0.0,
            weight: self.weight(),
            tried: false,
        })
    }

    pub(crate) fn begin(&self, tokens: i64) {
        self.in_flight.fetch_add(1, Relaxed);
        self.tokens.fetch_add(tokens, Relaxed);
    }

    pub(crate) fn progress(&self, tokens: i64) {
        self.tokens.fetch_sub(tokens, Relaxed);
    }

    pub(crate) fn end(&self, tokens: i64) {
        self.in_flight.fetch_sub(1, Relaxed);
        self.tokens.fetch_sub(tokens, Relaxed);
    }

    /// Takes in a report. `own_requests` and `own_tokens` are this router's, the larger of
    /// before and after the poll: what the replica has beyond them came from others.
    pub fn report(&self, report: &Report, own_requests: u32, mean_output: f64, now: f64) {
        self.reported_cap
            .store(report.max_num_seqs.unwrap_or(0), Relaxed);
        let others = report.requests.saturating_sub(own_requests);
        let share = f64::from(others) / f64::from(report.requests.max(1));
        // On average a running request has half its answer before it.
        let tokens = f64::from(others) * mean_output / 2.0 + report.waiting_prompt_tokens * share;
        self.others_requests.store(others, Relaxed);
        self.others_tokens
            .store(tokens.clamp(0.0, 4e9) as u32, Relaxed);
        self.reported_at_ms.store(millis(now), Relaxed);
    }

    pub fn succeeded(&self) {
        self.failures.store(0, Relaxed);
    }

    /// Its own queue is full.
    pub fn full(&self, now: f64) {
        self.full_until_ms
            .store(millis(now + FULL_SECONDS), Relaxed);
    }

    /// One more failure; true when that ejects it.
    pub fn failed(&self) -> bool {
        let failures = self.failures.fetch_add(1, Relaxed) + 1;
        failures >= FAILURES_TO_EJECT && self.eject(Ejection::Failing)
    }

    /// Out of the rotation until a probe succeeds; false when it was out already.
    pub fn eject(&self, why: Ejection) -> bool {
        let first = !self.ejected.swap(true, Relaxed);
        if why == Ejection::Unresponsive {
            self.unresponsive.notify_waiters();
        }
        self.pool.clear();
        first
    }

    /// A probe succeeded; true when it was out.
    pub fn restore(&self) -> bool {
        self.failures.store(0, Relaxed);
        self.starting.store(false, Relaxed);
        self.ejected.swap(false, Relaxed)
    }
}

fn millis(seconds: f64) -> u64 {
    (seconds.max(0.0) * 1000.0) as u64
}
