//! The cheapest schedule that somebody who knows the arrivals finds: local search over the number
//! of replicas in each minute on the fast surrogate, checked with the real engine.

use crate::fleet::{Outcome, Setup, TAIL, simulate};
use crate::policy::Schedule;
use crate::random::Random;
use crate::replica::Backend;
use crate::score::Score;
use crate::trace::Trace;

/// Seconds a slot.
const SLOT: f64 = 60.0;
/// Lengths of the stretches, in slots, that are lowered together in the first passes.
const STRETCHES: [usize; 6] = [32, 16, 8, 4, 2, 1];
/// Schedules that are tried with the engine before giving up.
const CHECKS: usize = 40;

/// A schedule with what it costs and brings on the real engine.
pub struct Oracle {
    pub schedule: Schedule,
    pub setup: Setup,
    pub outcome: Outcome,
}

struct Search<'a> {
    setup: Setup,
    trace: &'a Trace,
    target: f64,
    best: Vec<u32>,
    hours: f64,
    /// Every schedule that was the best one for a while.
    found: Vec<Vec<u32>>,
    left: u32,
}

impl Search<'_> {
    fn schedule(&self, replicas: &[u32]) -> Schedule {
        Schedule {
            slot: SLOT,
            replicas: replicas.to_vec(),
            dials: self.setup.dials,
        }
    }

    fn score(&mut self, replicas: &[u32]) -> Score {
        self.left = self.left.saturating_sub(1);
        let setup = (self.setup).with_replicas(replicas.first().copied().unwrap_or(1));
        simulate(&setup, self.trace, &mut self.schedule(replicas)).score
    }

    /// Takes a schedule over if it is good enough and cheaper.
    fn consider(&mut self, replicas: Vec<u32>) -> bool {
        let score = self.score(&replicas);
        let better = score.good >= self.target && score.replica_hours < self.hours - 1e-6;
        if better {
            self.hours = score.replica_hours;
            self.best.clone_from(&replicas);
            self.found.push(replicas);
        }
        better
    }

    fn changed(&self, start: usize, length: usize, by: i64) -> Option<Vec<u32>> {
        let mut replicas = self.best.clone();
        let end = (start + length).min(replicas.len());
        let (min, max) = (self.setup.min_replicas, self.setup.max_replicas);
        for slot in replicas.get_mut(start..end)? {
            *slot = (i64::from(*slot) + by).clamp(i64::from(min), i64::from(max)) as u32;
        }
        (replicas != self.best).then_some(replicas)
    }

    /// Lowers stretch by stretch, long ones first, as long as something comes of it.
    fn descend(&mut self) {
        for length in STRETCHES {
            loop {
                let before = self.hours;
                for start in (0..self.best.len()).step_by(length.div_ceil(2)) {
                    while self.left > 0
                        && let Some(replicas) = self.changed(start, length, -1)
                        && self.consider(replicas)
                    {}
                }
                if self.hours >= before || self.left == 0 {
                    break;
                }
            }
        }
    }

    /// Takes from one stretch what it gives to a shorter one.
    fn exchange(&mut self, random: &mut Random) {
        while self.left > 0 {
            let slots = self.best.len();
            let length = 1 + random.below(8);
            let Some(mut replicas) = self.changed(random.below(slots), length, -1) else {
                self.left -= 1;
                continue;
            };
            if length > 1 {
                let given = 1 + random.below(length - 1);
                let start = random.below(slots);
                for slot in replicas.iter_mut().skip(start).take(given) {
                    *slot = (*slot + 1).min(self.setup.max_replicas);
                }
            }
            self.consider(replicas);
        }
    }
}

/// Searches with so many runs of the surrogate. `None` where not even the largest fleet is good
/// enough.
pub fn search(setup: &Setup, trace: &Trace, runs: u32) -> Option<Oracle> {
    let fast = match setup.backend {
        Backend::Engine => setup.with_backend(Backend::Surrogate),
        Backend::Surrogate | Backend::Lockstep => setup.clone(),
    };
    let slots = ((trace.duration + TAIL) / SLOT).ceil() as usize;
    let mut search = Search {
        setup: fast,
        trace,
        target: setup.goals.good_percent,
        best: Vec::new(),
        hours: f64::INFINITY,
        found: Vec::new(),
        left: runs,
    };
    for n in setup.min_replicas..=setup.max_replicas {
        if search.consider(vec![n; slots]) {
            break;
        }
    }
    if search.best.is_empty() {
        return None;
    }
    // A fleet in proportion to the load that is to come is a better start than a constant one.
    let load = load_ahead(trace, slots);
    let peaks = (4..=4 * setup.max_replicas).map(|quarters| f64::from(quarters) / 4.0);
    for peak in peaks {
        let whole = |share: &f64| (peak * share).ceil() as u32;
        let replicas = load.iter().map(whole);
        let (min, max) = (setup.min_replicas, setup.max_replicas);
        let replicas: Vec<u32> = replicas.map(|n| n.clamp(min, max)).collect();
        if replicas.iter().sum::<u32>() >= search.best.iter().sum() || search.consider(replicas) {
            break;
        }
    }
    search.descend();
    search.exchange(&mut Random::of(setup.seed, "oracle"));

    // The engine isn't the surrogate: the cheapest schedule that holds on it, too.
    let found = std::mem::take(&mut search.found);
    let stride = (found.len() / CHECKS).max(1);
    found.iter().rev().step_by(stride).find_map(|replicas| {
        let setup = setup.with_replicas(replicas.first().copied().unwrap_or(1));
        let mut schedule = search.schedule(replicas);
        let outcome = simulate(&setup, trace, &mut schedule);
        (outcome.score.good >= setup.goals.good_percent).then_some(Oracle {
            schedule,
            setup,
            outcome,
        })
    })
}

/// The best that comes of an order `delay` seconds after load jumped, which must be a multiple of it: the
/// smallest constant fleet that is good enough before, and from there on whatever size turns out best, in
/// hindsight. Replicas before and after, and the outcome.
pub fn after_jump(
    setup: &Setup,
    trace: &Trace,
    jump: f64,
    delay: f64,
) -> Option<(u32, u32, Outcome)> {
    let constant = |n: u32, trace: &Trace| {
        let mut fixed = crate::policy::Fixed::new(n, setup.dials);
        simulate(&setup.with_replicas(n), trace, &mut fixed)
    };
    let until = trace.between(0.0, jump);
    let before = (setup.min_replicas..=setup.max_replicas)
        .find(|&n| constant(n, &until).score.good >= setup.goals.good_percent)?;
    let slots = ((trace.duration + TAIL) / delay).ceil() as usize;
    let first = (jump / delay).round() as usize + 1;
    let ordered = |n: u32| {
        let place = |slot: usize| if slot < first { before } else { n };
        let mut schedule = Schedule {
            slot: delay,
            replicas: (0..slots).map(place).collect(),
            dials: setup.dials,
        };
        let outcome = simulate(&setup.with_replicas(before), trace, &mut schedule);
        (before, n, outcome)
    };
    let outcomes = (before..=setup.max_replicas.min(4 * before + 8)).map(ordered);
    outcomes.max_by(|a, b| a.2.score.good.total_cmp(&b.2.score.good))
}

/// For each slot the heaviest load of the next minutes, in which a replica that is made now serves;
/// as a share of the heaviest of all.
fn load_ahead(trace: &Trace, slots: usize) -> Vec<f64> {
    /// What generating a token costs, in prompt tokens.
    const OUTPUT: f64 = 3.0;
    const AHEAD: usize = 4;
    let mut load = vec![0.0; slots];
    for request in &trace.requests {
        if let Some(slot) = load.get_mut((request.arrival / SLOT) as usize) {
            *slot += f64::from(request.prompt) + OUTPUT * f64::from(request.output);
        }
    }
    let heaviest = load.iter().copied().fold(1.0, f64::max);
    let ahead = |slot: usize| load.iter().skip(slot).take(AHEAD + 1).copied();
    (0..slots)
        .map(|slot| ahead(slot).fold(0.0, f64::max) / heaviest)
        .collect()
}

/// Replicas that a constant fleet with these dials needs for load like that of the busiest part of a
/// trace's first two minutes: what every policy starts with.
pub fn first_fleet(setup: &Setup, trace: &Trace) -> u32 {
    let parts = setup.opening_parts.max(1);
    let length = 120.0 / f64::from(parts);
    let parts = (0..parts).map(|part| {
        let from = f64::from(part) * length;
        trace.between(from, from + length)
    });
    let busiest = parts.max_by_key(|part| part.requests.len());
    let Some(load) = busiest.map(|part| part.repeated(5)) else {
        return setup.min_replicas;
    };
    let fast = setup.with_backend(Backend::Surrogate);
    let enough = (setup.min_replicas..=setup.max_replicas).find(|&n| {
        let mut fixed = crate::policy::Fixed::new(n, setup.dials);
        let outcome = simulate(&fast.with_replicas(n), &load, &mut fixed);
        outcome.score.good >= setup.goals.good_percent
    });
    enough.unwrap_or(setup.max_replicas)
}
