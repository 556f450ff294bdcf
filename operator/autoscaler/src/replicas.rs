//! How many replicas: up fast, down one at a time after a proof.

use crate::Scene;
use crate::demand::Demand;
use crate::memory::{Memory, Misses};
use crate::model::{Capacity, LEAST_SHARE, ReplicaModel};
use crate::observation::{Dials, Limits};
use crate::tune::Tuned;

/// Share of a forecast's error that is left when it matters: it is made anew every few seconds while
/// replicas start.
const ERROR_LEFT: f64 = 0.5;
/// Seconds that replicas are to be ready before load comes back.
const SPARE: f64 = 20.0;
/// Ratio of the load that comes back to the trend's forecast that makes it a jump.
const JUMP: f64 = 2.0;
/// Without a law, the share of the cap that may be in use.
const PLANNED_CAP: f64 = 0.7;
/// Share of the misses allowed that the replicas left after a scale-down may be expected to have.
const KEPT_MISSES: f64 = 0.5;
/// Times the replicas that are ordered at once at most.
const MOST_TIMES: u32 = 4;
/// Seconds between two orders for more.
const BETWEEN_RAISES: f64 = 10.0;
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
/// What is left of that at each comparison that is in order: half after half an hour.
const DERATING_KEPT: f64 = 0.977;
/// Turns within an hour that make the next one twice as dear, and how dear it is at most.
const TURNS_DOUBLE: f64 = 4.0;
const DEAREST: f64 = 3.0;
/// Turns within an hour after which only the end of what repeats itself makes another one: it would be
/// the seventh, and the one back the eighth.
const MOST_TURNS: usize = 6;
/// Seconds for which it counts that replicas were missed that had just been taken away.
const REGRET: f64 = 900.0;
/// Least seconds between two steps down.
const BETWEEN_STEPS: f64 = 10.0;
/// Seconds that load must have been watched to be known to within what chance does to it, and the
/// standard errors that it may be below what was measured until then.
const KNOWN_AFTER: f64 = 15.0;
const DOUBT: f64 = 2.0;

/// Replicas that the load needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// To order, for when they will have started.
    pub up: u32,
    /// To keep. Never less than `up`.
    pub down: u32,
    /// To keep for the load of the moment and all that a proven pattern has within the time of a
    /// start.
    pub by_pattern: Option<u32>,
    /// `up` follows from the requests in flight rather than from their rate.
    pub by_in_flight: bool,
}

/// Without a law the cap in force is what counts.
pub(crate) fn need(scene: &Scene, demand: &Demand, tuned: &Tuned, memory: &mut Memory) -> Need {
    // What is known is a while behind where samples are late.
    let start = memory.starts.usual() + scene.census.delay;
    let mut trend = demand.trend;
    if memory.without.forecast {
        trend.slope = 0.0;
    }
    let ahead = trend.ahead(start).max(trend.level);
    memory.history.judge(trend.ahead(start), start);
    let doubt = if memory.history.watched() < KNOWN_AFTER {
        DOUBT * trend.error
    } else {
        0.0
    };
    // What came a period ago must be met by replicas that are ready by then.
    let horizon = memory.starts.slowest() + SPARE;
    let recurs = !memory.without.recurrence;
    let again = if recurs {
        memory.recurrence.ahead(scene.now, horizon)
    } else {
        0.0
    };
    let pattern = (recurs && memory.recurrence.is_proven()).then_some(again);
    // A slow rise is the trend's affair.
    let again = if again >= JUMP * ahead { again } else { 0.0 };
    let Some((model, dials, one)) = tuned.known() else {
        return without_law(demand, tuned, memory.misses.derating());
    };
    let fleet = Fleet {
        model,
        dials,
        saturated_rate: one.saturated_rate,
        derating: memory.misses.derating(),
        error: memory.history.error() * ERROR_LEFT,
        most: scene.limits.max_replicas.saturating_mul(2).max(1),
    };
    let lacking = tuned.lacking.max(0.0).ceil() as u32;
    let hint = memory.last_need.unwrap_or(1).saturating_sub(lacking);
    let needs = |rate: f64, share: f64, hint: u32| match fleet.needs(rate, share, hint) {
        0 => 0,
        n => n.saturating_add(lacking),
    };
    let share = memory.misses.left(fleet.model.allowed());
    let quiet = if demand.idle { 0.0 } else { 1.0 };
    let (ahead, again) = (quiet * ahead, again.max(0.0));
    let up = needs((ahead - doubt).max(again), share, hint);
    let down = needs(ahead, share * KEPT_MISSES, up).max(up);
    Need {
        up,
        down,
        by_pattern: pattern.map(|rate| needs(rate.max(ahead), share * KEPT_MISSES, down)),
        by_in_flight: false,
    }
}

fn without_law(demand: &Demand, tuned: &Tuned, derating: f64) -> Need {
    if demand.idle {
        return Need::default();
    }
    let one = PLANNED_CAP * f64::from(tuned.dials.max_num_seqs.max(1)) / derating;
    let up = whole(demand.in_flight_up / one);
    Need {
        up,
        down: whole(demand.in_flight_down / one).max(up),
        by_pattern: None,
        by_in_flight: true,
    }
}

fn whole(x: f64) -> u32 {
    (x - 1e-9).ceil().max(0.0) as u32
}

/// What is asked of a number of replicas.
struct Fleet<'a> {
    model: &'a ReplicaModel,
    dials: Dials,
    /// Requests a second of one replica that never lacks work.
    saturated_rate: f64,
    /// By how much less a replica carries than the law says.
    derating: f64,
    /// Relative standard error of the forecast.
    error: f64,
    most: u32,
}

/// Nodes and weights of the normal distribution for Gauss and Hermite's quadrature.
const NODES: [(f64, f64); 5] = [
    (0.0, 0.533_333),
    (-1.355_626, 0.222_076),
    (1.355_626, 0.222_076),
    (-2.856_970, 0.011_257),
    (2.856_970, 0.011_257),
];

impl Fleet<'_> {
    /// Share of requests that miss an objective when so many replicas are to carry what is forecast,
    /// over what it may turn out to be.
    fn misses(&self, rate: f64, replicas: u32) -> f64 {
        let each = self.derating * rate / f64::from(replicas);
        let misses = NODES.map(|(z, weight)| {
            let rate = each * (self.error * z).exp();
            weight * self.model.misses_at(rate, self.dials, replicas)
        });
        misses.iter().sum()
    }

    /// The least number of replicas of which no more than `share` of the misses allowed is expected,
    /// or that serve so little each that more of them wouldn't help; looked for from `hint` on.
    fn needs(&self, rate: f64, share: f64, hint: u32) -> u32 {
        if rate <= 0.0 {
            return 0;
        }
        let enough = |replicas: u32| {
            self.derating * rate / f64::from(replicas) <= LEAST_SHARE * self.saturated_rate
                || self.misses(rate, replicas) <= share * self.model.allowed()
        };
        let hint = hint.clamp(1, self.most);
        let (mut fails, mut does, mut stride) = (0, hint, 1);
        if enough(hint) {
            while does > 1 {
                let fewer = does.saturating_sub(stride).max(1);
                if !enough(fewer) {
                    fails = fewer;
                    break;
                }
                (does, stride) = (fewer, stride.saturating_mul(2));
            }
        } else {
            fails = hint;
            loop {
                if fails >= self.most {
                    return self.most;
                }
                does = fails.saturating_add(stride).min(self.most);
                if enough(does) {
                    break;
                }
                (fails, stride) = (does, stride.saturating_mul(2));
            }
        }
        while does - fails > 1 {
            let middle = u32::midpoint(fails, does);
            if enough(middle) {
                does = middle;
            } else {
                fails = middle;
            }
        }
        does
    }
}

/// Takes replicas to carry less where more requests miss their objectives than the law says: the law,
/// the mix or the routing is worse than believed. Nothing is learnt in a shortage or soon after.
pub(crate) fn learn_from_misses(
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
fn suffers(scene: &Scene, demand: &Demand, capacity: Option<Capacity>, replicas: u32) -> bool {
    let ended = demand.good + demand.missed;
    let allowed = ended * allowed(scene);
    let used = capacity.map_or(1.0, |one| {
        demand.trend.level / (f64::from(replicas) * one.rate).max(1e-9)
    });
    ended >= 20.0 && demand.missed > allowed + 2.0 * allowed.max(1.0).sqrt() && used >= 0.3
}

/// What is done about the replicas, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    Raise {
        from: u32,
        to: u32,
    },
    /// Demand has been low for so many seconds.
    Lower {
        from: u32,
        to: u32,
        seconds: u32,
        /// And did so a period ago.
        again: bool,
    },
    Keep(u32),
    /// Some pods find no node: no more are ordered.
    KeepUnschedulable(u32),
    KeepAtMax(u32),
    /// Fewer would do, but it hasn't been so for long enough.
    KeepStabilizing {
        replicas: u32,
        seconds_left: u32,
    },
}

impl Plan {
    pub fn replicas(self) -> u32 {
        match self {
            Plan::Raise { to, .. } | Plan::Lower { to, .. } => to,
            Plan::Keep(replicas)
            | Plan::KeepUnschedulable(replicas)
            | Plan::KeepAtMax(replicas)
            | Plan::KeepStabilizing { replicas, .. } => replicas,
        }
    }
}

/// Within the limits; where they contradict each other the lower one wins.
pub(crate) fn bounded(replicas: u32, limits: &Limits) -> u32 {
    replicas.min(limits.max_replicas).max(limits.min_replicas)
}

/// Replicas that were asked for. What the Deployment is asked for lags behind by a moment; where
/// it stays the same other number, somebody else decided meanwhile, and that is where we go on from.
pub(crate) fn in_force(memory: &mut Memory, observed: u32, limits: &Limits, now: f64) -> u32 {
    let asked = memory.replicas.unwrap_or(observed);
    if asked == observed {
        memory.differs = None;
    } else {
        let before = memory.differs.filter(|(number, _)| *number == observed);
        let (_, since) = *memory.differs.insert(before.unwrap_or((observed, now)));
        if now - since > 30.0 {
            memory.differs = None;
            return bounded(observed, limits);
        }
    }
    bounded(asked, limits)
}

pub(crate) fn plan(
    scene: &Scene,
    demand: &Demand,
    capacity: Option<Capacity>,
    need: Need,
    current: u32,
    memory: &mut Memory,
) -> Plan {
    let (census, limits, now) = (&scene.census, scene.limits, scene.now);
    // Without a replica nobody could tell of demand.
    let floor = bounded(limits.min_replicas.max(1), limits);
    let patience = patience(limits).max(regret(scene, demand, capacity, memory)) + census.delay;
    memory.low.note(now, need.down, DEAREST * patience);
    // One odd look isn't enough to order anything, but for a jump that no chance explains.
    let before = memory.last_need.replace(need.up);
    let agreed = if demand.trend.jumped {
        need.up
    } else {
        need.up.min(before.unwrap_or(0))
    };
    let sure = bounded(agreed, limits).max(floor);

    if sure > current {
        if census.unschedulable > 0 {
            return Plan::KeepUnschedulable(current);
        }
        let step = current.saturating_mul(MOST_TIMES);
        let to = bounded(sure.min(step), limits);
        let recent = memory.raised_at.is_some_and(|at| now - at < BETWEEN_RAISES);
        if to > current && !recent {
            memory.raised_at = Some(now);
            memory.turns.note(now, true);
            return Plan::Raise { from: current, to };
        }
        return Plan::Keep(current);
    }
    if census.unschedulable > 0 && census.ready() + census.starting < need.up.max(floor) {
        return Plan::KeepUnschedulable(current);
    }
    if need.up > current && current >= limits.max_replicas {
        return Plan::KeepAtMax(current);
    }
    let fewer = need.down.max(floor) < current && census.complete() && census.ready() > 0;
    if !fewer || (!demand.idle && suffers(scene, demand, capacity, current - 1)) {
        return Plan::Keep(current);
    }
    // A fall that is part of a pattern needs no patience: load won't be back before replicas can.
    if let Some(enough) = need.by_pattern.map(|n| n.max(need.down).max(floor))
        && enough < current
        && memory.low.lasted(now, current - 1) >= BETWEEN_STEPS
        && (current - enough >= 2 || memory.turns.wait(now, MOST_TURNS) <= 0.0)
    {
        let to = bounded(enough, limits);
        memory.lower(current, to, now);
        return Plan::Lower {
            from: current,
            to,
            seconds: BETWEEN_STEPS as u32,
            again: true,
        };
    }
    // The first step waits for the stabilization time, the next ones for as long as the fleet
    // needs to show how it bears the last.
    let pause = if demand.idle {
        patience / 6.0
    } else {
        patience / 2.0
    };
    let pause = pause.max(BETWEEN_STEPS).min(patience.max(1.0));
    let since = |at: Option<f64>| at.map_or(f64::INFINITY, |at| now - at);
    let unneeded = current - need.down.max(floor);
    let left = (turning(patience, unneeded, now, memory) - memory.low.lasted(now, current - 1))
        .max(patience - since(memory.raised_at))
        .max(memory.turns.wait(now, MOST_TURNS))
        .max(pause - since(memory.lowered_at));
    if left > 0.0 {
        return Plan::KeepStabilizing {
            replicas: current,
            seconds_left: left.ceil() as u32,
        };
    }
    // Half of what nobody has needed for that long: the other half is the proof.
    let unneeded = current.saturating_sub(memory.low.most(now, patience).max(floor));
    let to = bounded(current - unneeded.div_ceil(2).max(1), limits);
    memory.lower(current, to, now);
    Plan::Lower {
        from: current,
        to,
        seconds: patience.round() as u32,
        again: false,
    }
}

/// Seconds that demand must be low because it came back, of late, before the replicas that were taken
/// away could: as long as a start takes. That half of the fleet was gone and requests missed for it
/// shows that it was so.
fn regret(scene: &Scene, demand: &Demand, capacity: Option<Capacity>, memory: &mut Memory) -> f64 {
    let (now, ready) = (scene.now, scene.census.ready());
    let start = memory.starts.slowest();
    let (from, to) = memory.lowered;
    let came_back = memory.lowered_at.is_some_and(|at| now - at < start)
        && memory.raised_at > memory.lowered_at;
    let missed = 2 * to <= from && ready < from;
    if came_back && missed && !demand.idle && suffers(scene, demand, capacity, ready) {
        memory.regretted_at = Some(now);
    }
    let regrets = (memory.regretted_at).is_some_and(|at| (0.0..REGRET).contains(&(now - at)));
    if regrets { start } else { 0.0 }
}

/// Seconds that demand must be low before a scale-down that follows a scale-up: the more the fleet
/// has turned in the last hour, the more replica-seconds must have been idle.
fn turning(patience: f64, unneeded: u32, now: f64, memory: &Memory) -> f64 {
    if !memory.turns.was_upwards() {
        return patience;
    }
    let turns = f64::from(memory.turns.count(now));
    let price = (1.0 + turns / TURNS_DOUBLE).min(DEAREST);
    patience * (price / f64::from(unneeded.max(1))).max(1.0)
}

/// Seconds that demand must be low before a scale-down.
fn patience(limits: &Limits) -> f64 {
    match limits.scale_down_stabilization_seconds {
        s if s.is_finite() => s.clamp(0.0, 86_400.0),
        _ => 75.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::DialRange;

    #[test]
    fn a_deployment_that_still_moves_is_nobody_elses_doing() {
        let range = DialRange {
            min: 1,
            max: 8,
            initial: 8,
        };
        let limits = Limits {
            min_replicas: 1,
            max_replicas: 9,
            idle_seconds: 600.0,
            max_num_seqs: range,
            max_num_batched_tokens: range,
            scale_down_stabilization_seconds: 75.0,
        };
        let mut memory = Memory {
            replicas: Some(2),
            ..Memory::default()
        };
        let mut in_force = |observed, now| in_force(&mut memory, observed, &limits, now);
        // A step down takes 25 s.
        for (observed, now) in [
            (5, 0.0),
            (5, 24.0),
            (4, 25.0),
            (4, 49.0),
            (3, 50.0),
            (3, 80.0),
        ] {
            assert_eq!(in_force(observed, now), 2, "{observed} at {now}");
        }
        assert_eq!(in_force(3, 81.0), 3, "there it stays");
    }
}
