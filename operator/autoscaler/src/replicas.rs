//! What is done about replicas: up fast, down one at a time after a proof.

use crate::Scene;
use crate::demand::Demand;
use crate::memory::Memory;
use crate::misses::suffers;
use crate::model::Capacity;
use crate::need::Need;
use crate::observation::Limits;

/// Times the replicas that are ordered at once at most.
const MOST_TIMES: u32 = 4;
/// Seconds between two orders for more.
const BETWEEN_RAISES: f64 = 10.0;
/// Turns within an hour that make the next one twice as dear, and how dear it is at most.
const TURNS_DOUBLE: f64 = 4.0;
const DEAREST: f64 = 3.0;
/// Turns within an hour after which only the end of what repeats itself makes another one: it would be
/// the seventh, and the one back the eighth.
const MOST_TURNS: usize = 6;
/// Least seconds between two steps down.
const BETWEEN_STEPS: f64 = 10.0;

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
    /// These came too late for a burst that is over.
    GiveUp {
        from: u32,
        to: u32,
    },
    /// Fewer would do, but a burst may come back.
    KeepForBurst(u32),
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
            Plan::Raise { to, .. } | Plan::Lower { to, .. } | Plan::GiveUp { to, .. } => to,
            Plan::Keep(replicas)
            | Plan::KeepForBurst(replicas)
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
    let patience = patience(limits) + census.delay;
    let start = memory.starts.slowest();
    memory
        .low
        .note(now, need.down, (DEAREST * patience).max(2.0 * start));
    // Replicas that load may want back before others could have started, as far as it is known to.
    let kept = match need.back {
        Some(back) => memory.low.worth_keeping(now, start).min(back),
        None => memory.low.most(now, start),
    };
    let kept = kept
        .min(need.by_pattern.unwrap_or(u32::MAX))
        .max(need.for_burst)
        .max(floor);
    // An odd look or two aren't enough to order anything, but for a jump that no chance explains.
    memory.looks.note(now, need.up);
    let agreed = if demand.trend.jumped_from.is_some() {
        need.up
    } else {
        memory.looks.agreed()
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
    // What came too late for a burst goes, but for what serves the backlog within a start.
    if memory.burst.is_over(now, start) {
        let serves = |one: Capacity| (one.rate * memory.starts.next()).max(1e-9);
        let waiting = f64::from(census.waiting());
        let for_backlog = capacity.map_or(0.0, |one| (waiting / serves(one)).ceil()) as u32;
        let serve = need.down.saturating_add(for_backlog);
        let to = bounded(serve.max(memory.burst.replicas), limits);
        if to < current {
            memory.lower(now);
            return Plan::GiveUp { from: current, to };
        }
    }
    // A fall that is part of a pattern needs no patience: load won't be back before replicas can. What
    // one replica fewer would do for is no fall.
    if let Some(enough) = need.by_pattern.map(|n| n.max(need.down).max(floor))
        && current.saturating_sub(enough) >= 2
        && memory.low.lasted(now, current - 1) >= BETWEEN_STEPS
    {
        let to = bounded(enough, limits);
        memory.lower(now);
        return Plan::Lower {
            from: current,
            to,
            seconds: BETWEEN_STEPS as u32,
            again: true,
        };
    }
    if need.for_burst >= current {
        return Plan::KeepForBurst(current);
    }
    if need.down.max(kept) >= current {
        let left = match need.back {
            Some(_) => memory.low.kept_for(now, start, current),
            None => start - memory.low.lasted(now, current - 1),
        };
        return Plan::KeepStabilizing {
            replicas: current,
            seconds_left: left.max(1.0).ceil() as u32,
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
    let unneeded = current - need.down.max(kept);
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
    // Half of what nobody has needed for that long: the other half is the proof. What doesn't serve yet
    // goes first, and proves nothing.
    let unneeded = current.saturating_sub(memory.low.most(now, patience).max(kept));
    let fewer = unneeded.div_ceil(2).max(unneeded.min(census.starting));
    let to = bounded(current - fewer.max(1), limits);
    memory.lower(now);
    Plan::Lower {
        from: current,
        to,
        seconds: patience.round() as u32,
        again: false,
    }
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
