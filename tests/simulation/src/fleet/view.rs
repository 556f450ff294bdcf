//! What a policy sees of a fleet.

use stoker_autoscaler::{Dials, Observation, Phase, Queue, Replica, Sample};
use stoker_law::Law;

use crate::replica::Tally;

/// The policy's clock when a trace begins: an ordinary day's.
pub(crate) const EPOCH: f64 = 1_700_000_000.0;

/// What a scrape said.
#[derive(Clone, Copy, Debug)]
pub struct Gauge {
    pub at: f64,
    pub running: u32,
    pub waiting: u32,
    pub kv_tokens: u64,
    pub kv_capacity: u64,
    pub waiting_prompt_tokens: u64,
    pub dials: Dials,
    pub ceilings: Dials,
    pub law: Law,
    pub law_confidence: f64,
    pub tally: Tally,
}

impl Gauge {
    pub fn outstanding(&self) -> u32 {
        self.running + self.waiting
    }

    /// 0 to 1.
    pub fn kv_use(&self) -> f64 {
        self.kv_tokens as f64 / self.kv_capacity.max(1) as f64
    }
}

#[derive(Clone, Debug)]
pub struct ReplicaView {
    pub id: u32,
    pub phase: Phase,
    pub created: f64,
    /// Infinite while it isn't.
    pub ready_at: f64,
    /// `None` where it can't be scraped, or the scrape was lost.
    pub gauge: Option<Gauge>,
}

#[derive(Clone, Debug)]
pub struct View {
    pub now: f64,
    pub desired: u32,
    pub dials: Dials,
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Requests that wait at the router for any replica to be ready.
    pub held: u32,
    /// What a router tells of them, with [`super::Routing::Router`].
    pub queue: Option<Queue>,
    pub replicas: Vec<ReplicaView>,
}

impl View {
    /// Gauges of the ready replicas that were heard.
    pub fn ready(&self) -> impl Iterator<Item = (&ReplicaView, &Gauge)> {
        let ready = self.replicas.iter().filter(|r| r.phase == Phase::Ready);
        ready.filter_map(|r| Some((r, r.gauge.as_ref()?)))
    }

    pub fn ready_count(&self) -> u32 {
        let ready = self.replicas.iter().filter(|r| r.phase == Phase::Ready);
        ready.count() as u32
    }

    /// Ready and coming.
    pub fn alive_count(&self) -> u32 {
        let alive = self.replicas.iter().filter(|r| super::alive(r.phase));
        alive.count() as u32
    }

    /// Whether pods are on their way.
    pub fn starting(&self) -> bool {
        self.alive_count() > self.ready_count()
    }

    pub fn running(&self) -> u32 {
        self.ready().map(|(_, gauge)| gauge.running).sum()
    }

    pub fn waiting(&self) -> u32 {
        self.held + self.ready().map(|(_, gauge)| gauge.waiting).sum::<u32>()
    }

    /// As the operator hands it to the policy. Its clock is an ordinary day's.
    pub fn observation(&self) -> Observation {
        let replicas = self.replicas.iter().map(|replica| {
            let sample = replica.gauge.as_ref().map(|gauge| Sample {
                at: EPOCH + gauge.at,
                running: gauge.running,
                waiting: gauge.waiting,
                waiting_prompt_tokens: gauge.waiting_prompt_tokens,
                kv_tokens: gauge.kv_tokens,
                kv_capacity_tokens: gauge.kv_capacity,
                dials: gauge.dials,
                ceilings: gauge.ceilings,
                law: gauge.law,
                law_confidence: gauge.law_confidence,
                counters: gauge.tally.counters(),
            });
            Replica {
                id: name(replica.id),
                phase: replica.phase,
                age_seconds: self.now - replica.created,
                ready_seconds: (self.now - replica.ready_at).max(0.0),
                sample,
            }
        });
        Observation {
            queue: self.queue,
            now: EPOCH + self.now,
            desired_replicas: self.desired,
            replicas: replicas.collect(),
        }
    }
}

/// A replica's name, in an order that is its number's.
pub(crate) fn name(id: u32) -> String {
    format!("replica-{id:05}")
}

pub(crate) fn number(name: &str) -> Option<u32> {
    name.strip_prefix("replica-")?.parse().ok()
}
