//! Who is ready, who was heard of late, and what they said.

use stoker_law::Law;

use crate::fleet::Tracks;
use crate::history::NEWEST;
use crate::observation::{Dials, Observation, Phase, Queue, Sample};

/// What a replica said last, beside its counters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Told {
    /// When.
    pub at: f64,
    pub running: u32,
    pub waiting: u32,
    pub kv_capacity_tokens: u64,
    pub ceilings: Dials,
    pub law: Law,
    pub law_confidence: f64,
}

impl Told {
    pub fn of(sample: &Sample) -> Self {
        Told {
            at: sample.at,
            running: sample.running,
            waiting: sample.waiting,
            kv_capacity_tokens: sample.kv_capacity_tokens,
            ceilings: sample.ceilings,
            law: sample.law,
            law_confidence: sample.law_confidence,
        }
    }

    pub fn in_flight(&self) -> u32 {
        self.running.saturating_add(self.waiting)
    }
}

/// What the observation says about the pods.
#[derive(Debug, Default)]
pub(crate) struct Census<'a> {
    /// Ready replicas that were heard of late, whether or not the last scrape was lost.
    pub heard: Vec<(&'a str, Told)>,
    /// Ready replicas that weren't.
    pub silent: u32,
    /// Ready replicas that have been so for all of the newest seconds.
    pub settled: u32,
    pub starting: u32,
    pub unschedulable: u32,
    /// What waits in front of them.
    pub queue: Queue,
    /// Seconds that the oldest of what was heard is behind.
    pub delay: f64,
}

impl<'a> Census<'a> {
    pub fn new(observation: &'a Observation, tracks: &Tracks, now: f64) -> Self {
        let mut census = Census {
            queue: observation.queue.unwrap_or_default(),
            ..Census::default()
        };
        for replica in &observation.replicas {
            if replica.phase == Phase::Ready && replica.ready_seconds >= NEWEST {
                census.settled += 1;
            }
            match replica.phase {
                Phase::Unschedulable => census.unschedulable += 1,
                Phase::Starting => census.starting += 1,
                Phase::Draining => {}
                Phase::Ready => match tracks.told(&replica.id, now) {
                    Some(told) => {
                        census.delay = census.delay.max(now - told.at);
                        census.heard.push((&replica.id, told));
                    }
                    None => census.silent += 1,
                },
            }
        }
        census
    }

    pub fn ready(&self) -> u32 {
        self.silent + self.heard()
    }

    pub fn heard(&self) -> u32 {
        u32::try_from(self.heard.len()).unwrap_or(u32::MAX)
    }

    /// Every ready replica has been heard.
    pub fn complete(&self) -> bool {
        self.silent == 0
    }

    pub fn running(&self) -> u32 {
        (self.heard.iter()).fold(0, |sum, (_, told)| sum.saturating_add(told.running))
    }

    pub fn waiting(&self) -> u32 {
        (self.heard.iter()).fold(self.queue.requests, |sum, (_, told)| {
            sum.saturating_add(told.waiting)
        })
    }
}
