//! A service of many replicas in virtual time: arrivals, routing, starts, drains, failures.

mod faults;
mod pods;
mod routing;
mod run;
mod trial;
mod view;

pub use faults::Fault;
pub use run::{Outcome, Point, simulate};
pub(crate) use view::{EPOCH, number};
pub use view::{Gauge, ReplicaView, View};

use stoker_autoscaler::{Dials, Phase};

use crate::flight::Goals;
use crate::replica::{Backend, Device};

/// How long a replica takes to start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Starts {
    /// Nodes that wait for a pod. A pod that goes leaves its node behind, up to this number.
    pub warm_nodes: u32,
    /// Seconds on one of them, and where a node has to come first.
    pub warm_seconds: f64,
    pub cold_seconds: f64,
}

impl Default for Starts {
    fn default() -> Self {
        Starts {
            warm_nodes: 2,
            warm_seconds: 75.0,
            cold_seconds: 240.0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Routing {
    /// To the ready replica with the fewest requests for its weight.
    LeastOutstanding,
    /// A plain Service: so many connections, each to a replica taken at random when it was opened,
    /// opened anew after `max_age` seconds or when its replica goes; requests take any of them.
    Connections { connections: u32, max_age: f64 },
    /// As stoker-router does it, by the rules of docs/router.md (one router, which knows everything):
    /// a replica gets its cap and an eighth more; the rest waits in order of arrival for whichever has
    /// room first, and is refused where it would wait, or has waited, for longer than its objective for
    /// the first token allows. Of those with room the one with the fewest tokens to do is taken.
    Router,
}

/// The world that a policy is tried in.
#[derive(Clone, Debug)]
pub struct Setup {
    pub device: Device,
    pub backend: Backend,
    pub goals: Goals,
    pub starts: Starts,
    pub routing: Routing,
    /// Seconds that a ready pod is out of rotation on trial before it is told to go, one after the
    /// other; 0: it goes at once.
    pub trial_seconds: f64,
    /// Seconds that one which was told to go is still there at least, one after the other.
    pub leave_seconds: f64,
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Ready at the beginning.
    pub replicas: u32,
    /// Into so many parts the first two minutes are cut, of which the busiest says how many those are.
    pub opening_parts: u32,
    /// Seconds in which the first fleet doesn't shrink: what autoscalers average over is empty then.
    pub settling: f64,
    pub dials: Dials,
    pub faults: Vec<Fault>,
    pub seed: u64,
}

/// Seconds that are watched, and paid for, after the last arrival.
pub const TAIL: f64 = 60.0;

impl Setup {
    /// The world of the reference study, with a fleet of one.
    pub fn study() -> Self {
        Setup {
            device: Device::study_t4(),
            backend: Backend::Engine,
            goals: Goals::default(),
            starts: Starts::default(),
            routing: Routing::LeastOutstanding,
            trial_seconds: 0.0,
            leave_seconds: 0.0,
            min_replicas: 1,
            max_replicas: 40,
            replicas: 1,
            opening_parts: 2,
            settling: 120.0,
            dials: Dials {
                max_num_seqs: 32,
                max_num_batched_tokens: 2048,
            },
            faults: Vec::new(),
            seed: 1,
        }
    }

    pub fn with_dials(&self, max_num_seqs: u32, max_num_batched_tokens: u32) -> Self {
        Setup {
            dials: Dials {
                max_num_seqs,
                max_num_batched_tokens,
            },
            ..self.clone()
        }
    }

    pub fn with_replicas(&self, replicas: u32) -> Self {
        Setup {
            replicas,
            ..self.clone()
        }
    }

    pub fn with_backend(&self, backend: Backend) -> Self {
        Setup {
            backend,
            ..self.clone()
        }
    }
}

/// What a policy wants.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    pub replicas: u32,
    pub dials: Dials,
    /// Dials of single replicas, by number.
    pub overrides: Vec<(u32, Dials)>,
    /// Requests that single replicas are to have in flight, in those of an ordinary one.
    pub weights: Vec<(u32, f64)>,
}

/// Decides over a fleet.
pub trait Policy {
    /// Seconds between two looks.
    fn period(&self) -> f64;
    fn decide(&mut self, view: &View) -> Action;
    /// The program that runs the policy is started anew: what it doesn't store is lost.
    fn restart(&mut self) {}
    /// Its last decision in words, where it has any.
    fn reason(&self) -> Option<String> {
        None
    }
}

/// Not ready, with a node or without; ready; going.
pub(crate) fn alive(phase: Phase) -> bool {
    phase != Phase::Draining
}

#[cfg(test)]
mod tests;
