//! How long replicas take to start, as it was measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::observation::{Observation, Phase};

/// Seconds before any start was seen, where nobody says more.
const UNKNOWN: f64 = 60.0;
/// A start that was given up may take so many times what it had taken.
const GIVEN_UP: f64 = 2.0;
/// A start that takes so many times the usual one tells nothing of others: that replica is stuck.
const STUCK: f64 = 4.0;
/// Starts that are remembered.
const KEPT: usize = 8;

/// The newest starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Starts {
    seconds: Vec<f64>,
    /// How many were ever seen.
    seen: u32,
    /// What somebody else says that one takes.
    told: Option<f64>,
    /// Age of the oldest replica that was given up before it was ready.
    given_up: f64,
    /// Replicas that are on their way, and their ages where a node takes them.
    #[serde(skip)]
    coming: BTreeMap<String, f64>,
}

impl Starts {
    pub fn observe(&mut self, observation: &Observation) {
        let mut before = std::mem::take(&mut self.coming);
        for replica in &observation.replicas {
            match replica.phase {
                Phase::Starting | Phase::Unschedulable => {
                    before.remove(&replica.id);
                    let starts = replica.phase == Phase::Starting;
                    let age = if starts { replica.age_seconds } else { 0.0 };
                    self.coming.insert(replica.id.clone(), age);
                }
                Phase::Ready if before.remove(&replica.id).is_some() => {
                    let seconds = replica.age_seconds - replica.ready_seconds;
                    if possible(seconds) {
                        self.seconds.push(seconds.round());
                        self.seen = self.seen.saturating_add(1);
                    }
                }
                Phase::Ready | Phase::Draining => {}
            }
        }
        // Who is neither on its way nor ready was given up.
        let given_up = before.into_values().filter(|age| possible(*age));
        self.given_up = given_up.fold(self.given_up, f64::max).round();
        let surplus = self.seconds.len().saturating_sub(KEPT);
        self.seconds.drain(..surplus);
    }

    /// What somebody else says that a start takes counts like one that was seen, until enough were.
    pub fn expect(&mut self, seconds: f64) {
        self.told = Some(seconds).filter(|seconds| possible(*seconds));
    }

    fn known(&self) -> impl Iterator<Item = f64> {
        let told = self.told.filter(|_| self.seconds.len() < KEPT);
        self.seconds.iter().copied().chain(told)
    }

    /// Seconds that the next start is taken to take: what one takes as a rule, or midway from there to what
    /// one that isn't over has taken already. Where the warm nodes are used up, the next has none either,
    /// unless one becomes free.
    pub fn next(&self) -> f64 {
        let usual = self.usual();
        let longest = self.coming.values().copied().fold(usual, f64::max);
        f64::midpoint(usual, longest.min(STUCK * usual))
    }

    /// Seconds that one takes as a rule.
    pub fn usual(&self) -> f64 {
        let mut sorted: Vec<f64> = self.known().collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len().saturating_sub(1) / 2;
        sorted.get(middle).copied().unwrap_or(UNKNOWN)
    }

    /// Seconds that the slowest start may take, by the slowest of the last ones: of n numbers between 0 and
    /// an unknown limit the largest, and an n-th of it more, is the limit's best unbiased estimate. All that
    /// were seen count, and what was said of them beforehand as one. A start that was given up after longer
    /// would have taken as long again, for all that is known.
    pub fn slowest(&self) -> f64 {
        let known = self.longest_known();
        let slowest = known * (1.0 + 1.0 / (f64::from(self.seen) + 1.0));
        if self.given_up > known {
            slowest.max(GIVEN_UP * self.given_up)
        } else {
            slowest
        }
    }

    /// Seconds that no start takes that isn't stuck, where one was given up that had taken longer than all that
    /// were seen.
    pub fn surely(&self) -> f64 {
        if self.given_up > self.longest_known() {
            self.slowest().max(STUCK * self.usual())
        } else {
            self.slowest()
        }
    }

    fn longest_known(&self) -> f64 {
        self.known().reduce(f64::max).unwrap_or(UNKNOWN)
    }
}

fn possible(seconds: f64) -> bool {
    (0.0..=7200.0).contains(&seconds)
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
        assert_eq!((starts.usual(), starts.slowest()), (UNKNOWN, 120.0));
        starts.expect(30.0);
        assert_eq!((starts.usual(), starts.slowest()), (30.0, 60.0));
        starts.observe(&observation(Phase::Starting, 100.0, 0.0));
        assert_eq!((starts.usual(), starts.next()), (30.0, 65.0));
        starts.observe(&observation(Phase::Starting, 3600.0, 0.0));
        assert_eq!(starts.next(), 75.0, "it is stuck");
        let mut starts = Starts::default();
        // Nobody saw this one start.
        starts.observe(&observation(Phase::Ready, 900.0, 10.0));
        assert_eq!(starts.usual(), UNKNOWN);
        starts.observe(&observation(Phase::Starting, 74.0, 0.0));
        starts.observe(&observation(Phase::Ready, 77.0, 2.0));
        assert_eq!((starts.usual(), starts.slowest()), (75.0, 112.5));
        starts.observe(&observation(Phase::Unschedulable, 100.0, 0.0));
        starts.observe(&observation(Phase::Ready, 241.0, 1.0));
        assert_eq!((starts.usual(), starts.slowest()), (75.0, 320.0));
        for _ in 0..7 {
            starts.observe(&observation(Phase::Starting, 59.0, 0.0));
            starts.observe(&observation(Phase::Ready, 61.0, 1.0));
        }
        assert_eq!((starts.usual(), starts.slowest()), (60.0, 264.0));
    }

    #[test]
    fn a_start_that_was_given_up_would_have_taken_longer() {
        let observation = |phase: Option<Phase>, age: f64| Observation {
            queue: None,
            now: 0.0,
            desired_replicas: 1,
            replicas: (phase.into_iter())
                .map(|phase| Replica {
                    id: "a".into(),
                    phase,
                    age_seconds: age,
                    ready_seconds: 0.0,
                    sample: None,
                })
                .collect(),
        };
        for gone in [None, Some(Phase::Draining)] {
            let mut starts = Starts::default();
            starts.observe(&observation(Some(Phase::Starting), 130.0));
            starts.observe(&observation(gone, 132.0));
            assert_eq!((starts.usual(), starts.slowest()), (UNKNOWN, 260.0));
            assert_eq!(starts.surely(), 260.0);
            // No node ever took it: that says nothing of how long a start takes.
            let mut starts = Starts::default();
            starts.observe(&observation(Some(Phase::Unschedulable), 130.0));
            starts.observe(&observation(gone, 132.0));
            assert_eq!((starts.slowest(), starts.surely()), (120.0, 120.0));
            // It had just taken longer than any.
            let mut starts = Starts::default();
            starts.observe(&observation(Some(Phase::Starting), 61.0));
            starts.observe(&observation(gone, 63.0));
            assert_eq!((starts.slowest(), starts.surely()), (122.0, 240.0));
        }
    }
}
