//! A replica's engine in virtual time: the real one, or a surrogate that is some fifteen times faster.

mod device;
mod queue;
mod real;
mod surrogate;
mod tally;

pub use device::Device;
pub use tally::{Buckets, Tally};

use stoker_autoscaler::Dials;
use stoker_law::Law;

use crate::flight::Ledger;
use real::Real;
use surrogate::Surrogate;

/// What runs a replica's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// stoker-engine's scheduler.
    Engine,
    /// A scheduler that counts instead of moving tokens: as the engine, a step is put together
    /// while the one before it runs.
    Surrogate,
    /// The surrogate, but a step is put together when the one before it has ended, as most
    /// simulators do it (the reference study's among them).
    Lockstep,
}

/// Gauges of an engine, as a scrape tells them.
#[derive(Clone, Copy, Debug)]
pub struct Gauges {
    pub running: u32,
    pub waiting: u32,
    pub kv_tokens: u64,
    pub waiting_prompt_tokens: u64,
    pub law: Law,
    pub law_confidence: f64,
}

pub enum Core {
    Real(Box<Real>),
    Surrogate(Box<Surrogate>),
}

impl Core {
    /// `seed` makes the noise of this replica's steps its own.
    pub fn new(backend: Backend, device: &Device, dials: Dials, seed: u64) -> Self {
        match backend {
            Backend::Engine => Core::Real(Box::new(Real::new(device, dials, seed))),
            Backend::Surrogate => {
                Core::Surrogate(Box::new(Surrogate::new(device, dials, seed, true)))
            }
            Backend::Lockstep => {
                Core::Surrogate(Box::new(Surrogate::new(device, dials, seed, false)))
            }
        }
    }

    /// Puts a request into the queue; false where the engine refuses it. `now` is never before
    /// that of an earlier call, and never after [`Self::next`].
    pub fn add(&mut self, request: u32, ledger: &Ledger, now: f64) -> bool {
        match self {
            Core::Real(core) => core.add(request, ledger, now),
            Core::Surrogate(core) => core.add(request, ledger, now),
        }
    }

    /// Takes a request out that has no token yet or some.
    pub fn abort(&mut self, request: u32) {
        match self {
            Core::Real(core) => core.abort(request),
            Core::Surrogate(core) => core.abort(request),
        }
    }

    pub fn set_dials(&mut self, dials: Dials) {
        match self {
            Core::Real(core) => core.set_dials(dials),
            Core::Surrogate(core) => core.set_dials(dials),
        }
    }

    /// When the step in flight ends; infinite while there is none.
    pub fn next(&self) -> f64 {
        match self {
            Core::Real(core) => core.next(),
            Core::Surrogate(core) => core.next(),
        }
    }

    /// Ends the step in flight and starts the next. Returns how many requests ended.
    pub fn advance(&mut self, ledger: &mut Ledger, tally: &mut Tally) -> u32 {
        match self {
            Core::Real(core) => core.advance(ledger, tally),
            Core::Surrogate(core) => core.advance(ledger, tally),
        }
    }

    pub fn gauges(&self) -> Gauges {
        match self {
            Core::Real(core) => core.gauges(),
            Core::Surrogate(core) => core.gauges(),
        }
    }

    /// How often a sequence lost its cache, since the start.
    pub fn preemptions(&self) -> u64 {
        match self {
            Core::Real(core) => core.preemptions(),
            Core::Surrogate(core) => core.preemptions,
        }
    }
}

#[cfg(test)]
mod tests;
