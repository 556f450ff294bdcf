//! How long replicas take to start, as it was measured.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::observation::{Observation, Phase};

/// Seconds before any start was seen.
const UNKNOWN: f64 = 60.0;
/// Starts that are remembered.
const KEPT: usize = 8;

/// The newest starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Starts {
    seconds: Vec<f64>,
    /// Replicas that are on their way.
    #[serde(skip)]
    coming: BTreeSet<String>,
}

impl Starts {
    pub fn observe(&mut self, observation: &Observation) {
        let mut coming = BTreeSet::new();
        for replica in &observation.replicas {
            match replica.phase {
                Phase::Starting | Phase::Unschedulable => {
                    coming.insert(replica.id.clone());
                }
                Phase::Ready if self.coming.contains(&replica.id) => {
                    let seconds = replica.age_seconds - replica.ready_seconds;
                    if seconds.is_finite() && (0.0..=7200.0).contains(&seconds) {
                        self.seconds.push(seconds.round());
                    }
                }
                Phase::Ready | Phase::Draining => {}
            }
        }
        self.coming = coming;
        let surplus = self.seconds.len().saturating_sub(KEPT);
        self.seconds.drain(..surplus);
    }

    /// What somebody else says that a start takes counts like one that was seen.
    pub fn expect(&mut self, seconds: f64) {
        if self.seconds.is_empty() && seconds.is_finite() && (0.0..=7200.0).contains(&seconds) {
            self.seconds.push(seconds);
        }
    }

    /// Seconds that a start takes as a rule.
    pub fn usual(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len().saturating_sub(1) / 2;
        sorted.get(middle).copied().unwrap_or(UNKNOWN)
    }

    /// Seconds that the slowest of the last starts took.
    pub fn slowest(&self) -> f64 {
        let slowest = self.seconds.iter().copied().fold(0.0, f64::max);
        if self.seconds.is_empty() {
            UNKNOWN
        } else {
            slowest
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::Replica;

    #[test]
    fn a_start_is_what_a_replica_was_old_when_it_became_ready() {
        let observation = |phase: Phase, age: f64, ready: f64| Observation {
            queue: None,
            now: 0.0,
            desired_replicas: 1,
            replicas: vec![Replica {
                id: "a".into(),
                phase,
                age_seconds: age,
                ready_seconds: ready,
                sample: None,
            }],
        };
        let mut starts = Starts::default();
        assert_eq!(starts.usual(), UNKNOWN);
        // Nobody saw this one start.
        starts.observe(&observation(Phase::Ready, 900.0, 10.0));
        assert_eq!(starts.usual(), UNKNOWN);
        starts.observe(&observation(Phase::Starting, 74.0, 0.0));
        starts.observe(&observation(Phase::Ready, 77.0, 2.0));
        assert_eq!((starts.usual(), starts.slowest()), (75.0, 75.0));
        starts.observe(&observation(Phase::Unschedulable, 100.0, 0.0));
        starts.observe(&observation(Phase::Ready, 241.0, 1.0));
        assert_eq!((starts.usual(), starts.slowest()), (75.0, 240.0));
    }
}
