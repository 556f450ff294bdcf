//! What missed objectives teach: that a replica carries less than its law says.

use serde::{Deserialize, Serialize};

use crate::Scene;
use crate::demand::Demand;
use crate::model::Capacity;
use crate::need::Need;
use crate::tune::Tuned;

/// Seconds after a shortage in which misses teach nothing: requests that began in it still end.
pub(crate) const AFTERMATH: f64 = 90.0;
/// Seconds between two comparisons of the misses with what was predicted.
const JUDGED_EVERY: f64 = 60.0;
/// What counts of older comparisons at each: half after five minutes.
const MISSES_KEPT: f64 = 0.87;
/// The same for the misses that were spent of those allowed: half after half an hour.
const LONG_KEPT: f64 = 0.977;
/// Factor by which a replica is taken to carry less, and at most.
const DERATED_BY: f64 = 1.1;
const MOST_DERATED: f64 = 4.0;
/// Misses that tell a share of misses to within a third.
const TELLING: f64 = 10.0;
/// More than the misses allowed are expected at a time where fewer have been, at most so many times,
/// and by how much for each share of them that is left: replicas are whole, and answer to little else.
const MOST_LEFT: f64 = 1.5;
const FOR_LEFT: f64 = 4.0;

/// Misses measured against misses predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Misses {
    /// By how much less a replica carries than its law says; 0 before anything was learnt.
    pub derating: f64,
    /// Requests that ended, missed, and were expected to miss; older ones count less.
    pub ended: f64,
    pub missed: f64,
    pub expected: f64,
    /// Requests that ended and missed in the last hour or so, shortages included.
    pub long: (f64, f64),
    /// Shares predicted since the last comparison, and how many.
    pub predicted: (f64, u32),
    pub judged_at: f64,
    /// When replicas or samples were last lacking.
    pub shortage_at: f64,
}

impl Misses {
    /// How many times the misses allowed may be expected now, for what hasn't been spent of late.
    pub fn left(&self, allowed: f64) -> f64 {
        let (ended, missed) = self.long;
        // With what chance may add to them, twice its standard deviation.
        let missed = missed + 2.0 * missed.max(0.0).sqrt();
        let spent = (missed + TELLING) / (allowed * ended + TELLING);
        if spent.is_finite() {
            (1.0 + FOR_LEFT * (1.0 - spent)).clamp(1.0, MOST_LEFT)
        } else {
            1.0
        }
    }

    /// Whether more requests of the last hour or so missed than may.
    pub fn are_too_many(&self, allowed: f64) -> bool {
        let (ended, missed) = self.long;
        missed > allowed * ended
    }

    pub fn derating(&self) -> f64 {
        if self.derating.is_finite() {
            self.derating.max(1.0)
        } else {
            1.0
        }
    }
}
/// What is left of that at each comparison that is in order: half after an hour and ten minutes, since each
/// time that it turns out to be too little costs a shortage.
const DERATING_KEPT: f64 = 0.99;

/// Takes replicas to carry less where more requests miss their objectives than the law says: the law,
/// the mix or the routing is worse than believed. Nothing is learnt in a shortage or soon after.
pub(crate) fn learn(
    scene: &Scene,
    demand: &Demand,
    tuned: &Tuned,
    need: Need,
    misses: &mut Misses,
    dials_moved_at: Option<f64>,
) {
    let (census, now) = (&scene.census, scene.now);
    let settled = dials_moved_at.is_none_or(|at| now - at >= AFTERMATH);
    if need.up > census.ready() || census.unschedulable > 0 || !census.complete() || !settled {
        misses.shortage_at = now;
    }
    // Without a law nothing is predicted but that all is well.
    let predicted = tuned
        .expected_misses(scene, demand, misses.derating())
        .unwrap_or(0.0);
    let (sum, looks) = misses.predicted;
    misses.predicted = (sum + predicted, looks + 1);
    if now - misses.judged_at < JUDGED_EVERY {
        return;
    }
    let predicted = misses.predicted.0 / f64::from(misses.predicted.1);
    misses.judged_at = now;
    misses.predicted = (0.0, 0);
    let ended = demand.good + demand.missed;
    let (all, missed) = misses.long;
    misses.long = (LONG_KEPT * all + ended, LONG_KEPT * missed + demand.missed);
    if now - misses.shortage_at < AFTERMATH {
        return;
    }
    misses.ended = MISSES_KEPT * misses.ended + ended;
    misses.missed = MISSES_KEPT * misses.missed + demand.missed;
    misses.expected = MISSES_KEPT * misses.expected + ended * predicted;
    let beyond = |expected: f64, by: f64| misses.missed > expected + by * expected.max(1.0).sqrt();
    let allowed = misses.ended * allowed(scene);
    misses.derating = if beyond(allowed, 2.0) && beyond(misses.expected, 3.0) {
        (misses.ended, misses.missed, misses.expected) = (0.0, 0.0, 0.0);
        (misses.derating() * DERATED_BY).min(MOST_DERATED)
    } else {
        1.0 + (misses.derating() - 1.0) * DERATING_KEPT
    };
}

fn allowed(scene: &Scene) -> f64 {
    1.0 - scene.objectives.good_percent.clamp(0.0, 100.0) / 100.0
}

/// Whether more requests miss their objectives than chance explains, while `replicas` are used so
/// much that more of them would help.
pub(crate) fn suffers(
    scene: &Scene,
    demand: &Demand,
    capacity: Option<Capacity>,
    replicas: u32,
) -> bool {
    let ended = demand.good + demand.missed;
    let allowed = ended * allowed(scene);
    let used = capacity.map_or(1.0, |one| {
        demand.trend.level / (f64::from(replicas) * one.rate).max(1e-9)
    });
    ended >= 20.0 && demand.missed > allowed + 2.0 * allowed.max(1.0).sqrt() && used >= 0.3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_spent_is_allowed_again_and_no_more() {
        let left = |ended, missed| {
            let misses = Misses {
                long: (ended, missed),
                ..Misses::default()
            };
            misses.left(0.01)
        };
        assert_eq!(left(0.0, 0.0), 1.0, "nothing is known");
        assert_eq!(left(20_000.0, 100.0), MOST_LEFT);
        assert_eq!(left(20_000.0, 200.0), 1.0);
        assert_eq!(left(20_000.0, 5_000.0), 1.0);
        let between = left(20_000.0, 155.0);
        assert!(between > 1.0 && between < MOST_LEFT, "{between}");
        assert_eq!(left(f64::NAN, f64::NAN), 1.0);
        let too_many = |long| {
            let misses = Misses {
                long,
                ..Misses::default()
            };
            misses.are_too_many(0.01)
        };
        assert!(too_many((1000.0, 11.0)) && !too_many((1000.0, 9.0)) && !too_many((0.0, 0.0)));
    }
}
