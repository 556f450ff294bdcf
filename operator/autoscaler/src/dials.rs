//! The two dials from the law.

use std::collections::BTreeMap;

use crate::model::{Capacity, HALVINGS, ReplicaModel};
use crate::observation::{DialRange, Dials, Limits};

/// A dial that would move by less than this share stays where it is. The cap that the budget can
/// feed goes with the ratio of answers to prompts, which is known only roughly.
const BUDGET_BAND: f64 = 0.1;
const CAP_BAND: f64 = 0.25;
/// A cap that has stood for so many seconds is trimmed where it is off by this share: where it was put
/// when law and mix were known from a few steps and requests isn't where it stays.
const STOOD: f64 = 60.0;
const TRIMMED_FROM: f64 = 0.05;
/// A budget is kept while it is worth at least this share of the best one.
const GOOD_ENOUGH: f64 = 0.97;
/// Among budgets worth this share of the best one the smallest is taken: it has the shortest steps.
const AS_GOOD: f64 = 0.99;
/// Of the budgets every fourth is tried at first.
const STRIDE: usize = 4;
/// Halvings that tell settings apart by half a percent.
const ROUGHLY: u32 = 8;
/// Seconds for which a search's result is good while law and mix stay within this share of what it
/// was about.
const SEARCH_KEPT: f64 = 20.0;
const NEAR: f64 = 0.05;
/// Seconds before a dial may go back on its last move.
const BEFORE_REVERSAL: f64 = 60.0;
/// Before load asks for more, the cap goes no further than this multiple of its initial value: the
/// law is sure about what the replica has tried, not about a hundred times as much.
const UNASKED: u32 = 4;

/// The last move of each dial: when, and whether upwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Motion {
    cap: Option<(f64, bool)>,
    budget: Option<(f64, bool)>,
    /// When the cap was last trimmed, which is no move that anything has to settle after.
    trimmed: Option<f64>,
    #[serde(skip)]
    search: Option<Search>,
}

/// What came of the last search for the best dials, and for what.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Search {
    at: f64,
    about: [f64; 6],
    aim: Aim,
    found: Choice,
}

/// What a search is for, beside the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Aim {
    pub ranges: (DialRange, DialRange),
    /// Replicas that share the load.
    pub fleet: u32,
    /// They get more than they carry: dials that are nearly as good as the best won't do.
    pub pressed: bool,
}

impl Motion {
    /// The last search's result, where it is young and was about nearly the same.
    fn found(&self, model: &ReplicaModel, aim: Aim, now: f64) -> Option<Choice> {
        let search = self.search.filter(|search| {
            let near = |(a, b): (&f64, f64)| (a - b).abs() <= NEAR * a.abs();
            (0.0..SEARCH_KEPT).contains(&(now - search.at))
                && search.aim == aim
                && search.about.iter().zip(model.about()).all(near)
        })?;
        Some(search.found)
    }

    /// Whether that is so.
    pub fn is_found(&self, model: &ReplicaModel, aim: Aim, now: f64) -> bool {
        self.found(model, aim, now).is_some()
    }

    /// Goes by the result of somebody else's search, where that was about nearly the same.
    pub fn share(&mut self, other: &Motion, model: &ReplicaModel, aim: Aim, now: f64) {
        if other.is_found(model, aim, now) {
            self.search = other.search;
        }
    }

    /// When the last search was made.
    pub fn searched_at(&self) -> Option<f64> {
        Some(self.search?.at)
    }

    /// Whether the cap is where it has been for a while.
    fn cap_stood(&self, now: f64) -> bool {
        let moved = self.cap.map(|(at, _)| at);
        let times = [moved, self.trimmed].into_iter().flatten();
        times.fold(f64::INFINITY, |least, at| least.min(now - at)) >= STOOD
    }

    /// When a dial moved last.
    pub fn last(&self) -> Option<f64> {
        let times = [self.cap, self.budget].into_iter().flatten();
        times.map(|(at, _)| at).reduce(f64::max)
    }
}

/// What both dials may be on a device with the given ceilings (0: it doesn't say).
pub(crate) fn ranges(limits: &Limits, ceilings: Dials) -> (DialRange, DialRange) {
    let range = |range: DialRange, ceiling: u32| {
        let max = if ceiling == 0 {
            range.max
        } else {
            range.max.min(ceiling)
        };
        let max = max.max(range.min).max(1);
        let min = range.min.clamp(1, max);
        DialRange {
            min,
            max,
            initial: range.initial.max(min).min(max),
        }
    };
    (
        range(limits.max_num_seqs, ceilings.max_num_seqs),
        range(
            limits.max_num_batched_tokens,
            ceilings.max_num_batched_tokens,
        ),
    )
}

/// The dials before anything is known.
pub(crate) fn initial(limits: &Limits) -> Dials {
    bounded(
        Dials {
            max_num_seqs: limits.max_num_seqs.initial,
            max_num_batched_tokens: limits.max_num_batched_tokens.initial,
        },
        limits,
    )
}

/// The same dials within limits; where a range is empty its lower end wins.
pub(crate) fn bounded(dials: Dials, limits: &Limits) -> Dials {
    let bound = |x: u32, range: &DialRange| x.min(range.max).max(range.min);
    Dials {
        max_num_seqs: bound(dials.max_num_seqs, &limits.max_num_seqs),
        max_num_batched_tokens: bound(dials.max_num_batched_tokens, &limits.max_num_batched_tokens),
    }
}

/// How far two settings differ, as the larger of both dials' relative differences.
pub(crate) fn distance(a: Dials, b: Dials) -> f64 {
    let apart = |x: u32, y: u32| (f64::from(x) - f64::from(y)).abs() / f64::from(y.max(1));
    apart(a.max_num_seqs, b.max_num_seqs)
        .max(apart(a.max_num_batched_tokens, b.max_num_batched_tokens))
}

/// Whether a step from one setting to the other is one that people would call a move.
pub(crate) fn alike(a: Dials, b: Dials) -> bool {
    distance(a, b) < BUDGET_BAND
}

/// What the law allows: dials, and what they carry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub dials: Dials,
    /// The dials that the capacity is about: the cap may follow load below what the law allows.
    pub judged: Dials,
    pub capacity: Capacity,
}

impl Choice {
    /// What a setting is worth: the geometric mean of the requests a second that it carries within
    /// all objectives and of those that it serves when saturated, still within the inter-token
    /// one, for the dials must also do when replicas are late or lacking.
    fn worth(&self) -> f64 {
        (self.capacity.kept_rate * self.capacity.saturated_rate).sqrt()
    }
}

fn choice(
    model: &ReplicaModel,
    budget: u32,
    caps: DialRange,
    fleet: u32,
    halvings: u32,
) -> Option<Choice> {
    let cap = model.cap(budget, caps.max);
    if cap == 0 {
        return None;
    }
    let dials = Dials {
        max_num_seqs: cap.max(caps.min),
        max_num_batched_tokens: budget,
    };
    let capacity = model.capacity_within(dials, fleet, halvings)?;
    Some(Choice {
        dials,
        judged: dials,
        capacity,
    })
}

/// The best dials by the law alone, or `current`'s budget while that is nearly as good; `None`
/// where not even one sequence keeps the objective.
pub(crate) fn best(model: &ReplicaModel, aim: Aim, current: Dials) -> Option<Choice> {
    let ((caps, budgets), fleet) = (aim.ranges, aim.fleet);
    // Worth rises to one peak and falls: around the best of a few budgets the others are tried.
    let budgets: Vec<u32> = candidates(budgets).collect();
    let mut tried: BTreeMap<usize, Choice> = BTreeMap::new();
    let attempt = |tried: &mut BTreeMap<usize, Choice>, place: usize| {
        if let Some(&budget) = budgets.get(place)
            && !tried.contains_key(&place)
        {
            let choice = choice(model, budget, caps, fleet, ROUGHLY);
            tried.extend(choice.map(|choice| (place, choice)));
        }
    };
    let last = budgets.len().saturating_sub(1);
    for place in (0..=last).step_by(STRIDE).chain([last]) {
        attempt(&mut tried, place);
    }
    let peak = tried
        .iter()
        .max_by(|a, b| a.1.worth().total_cmp(&b.1.worth()));
    let peak = peak.map_or(0, |(place, _)| *place);
    for place in peak.saturating_sub(STRIDE - 1)..peak + STRIDE {
        attempt(&mut tried, place);
    }
    let most = tried.values().map(Choice::worth).fold(0.0, f64::max);
    let kept = choice(model, current.max_num_batched_tokens, caps, fleet, ROUGHLY);
    let enough = if aim.pressed { AS_GOOD } else { GOOD_ENOUGH };
    let kept = kept.filter(|c| c.worth() >= enough * most && model.keeps(c.dials));
    kept.or_else(|| tried.into_values().find(|c| c.worth() >= AS_GOOD * most))
}

/// Budgets to try, ascending: 32 tokens apart at first, then an eighth.
fn candidates(range: DialRange) -> impl Iterator<Item = u32> {
    let (min, max) = (u64::from(range.min), u64::from(range.max));
    let mut next = Some(min);
    std::iter::from_fn(move || {
        let budget = next?;
        let step = (budget / 8 / 32 * 32).max(32);
        let above = (budget + step) / 32 * 32;
        next = (budget < max).then(|| above.min(max));
        u32::try_from(budget).ok()
    })
}

/// The cap that follows load: what the law allows, but not far above what has been asked for.
/// `peak` is the most requests that one replica had running or waiting of late.
pub(crate) fn following(allowed: u32, peak: u32, current: u32, caps: DialRange) -> u32 {
    let asked = peak.saturating_mul(2).checked_next_power_of_two();
    let unasked = caps.initial.saturating_mul(UNASKED);
    let wanted = asked.unwrap_or(u32::MAX).max(unasked);
    // A smaller peak gives room back in one large step, or when all is quiet.
    let wanted = if wanted < current && peak > 0 && wanted.saturating_mul(4) > current {
        current
    } else {
        wanted
    };
    allowed.min(wanted).max(caps.min)
}

/// What a choice of dials goes by, beside the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    /// The most requests that one replica had in flight of late.
    pub peak: u32,
    /// Whether it is this one's turn to search for the best dials.
    pub may_search: bool,
    pub now: f64,
}

/// The dials to use from now on: what the law allows and load asks for, without small moves and
/// without going back on a recent one; and what a replica carries with all that the law allows.
/// `None` where no dials keep the objective.
pub(crate) fn settled(
    model: &ReplicaModel,
    aim: Aim,
    current: Dials,
    look: Look,
    motion: &mut Motion,
) -> Option<Choice> {
    let Look {
        peak,
        may_search,
        now,
    } = look;
    let ((caps, budgets), fleet) = (aim.ranges, aim.fleet);
    let known = motion.found(model, aim, now);
    // Whoever's turn it isn't goes on with what was found before.
    let stale = motion.search.filter(|_| !may_search);
    let known = known.or(stale.map(|search| search.found));
    let best = match known {
        Some(found) => found,
        None => {
            let found = if may_search {
                best(model, aim, current)
            } else {
                let capacity = model.capacity_within(current, fleet, ROUGHLY);
                capacity.map(|capacity| Choice {
                    dials: current,
                    judged: current,
                    capacity,
                })
            };
            motion.search = Some(Search {
                // What wasn't searched for is due at once.
                at: if may_search { now } else { now - SEARCH_KEPT },
                about: model.about(),
                aim,
                found: found?,
            });
            found?
        }
    };
    // Moves that the objective is broken without, as by a mix that has changed.
    let urgent = !model.keeps(current);
    let budget = turn(
        current.max_num_batched_tokens,
        best.dials.max_num_batched_tokens,
        if aim.pressed { 0.0 } else { BUDGET_BAND },
        urgent,
        now,
        &mut motion.budget,
    );
    // Where the budget stays a little off the best one, the cap goes with the budget in force.
    let best = if !may_search || (known.is_some() && budget == best.dials.max_num_batched_tokens) {
        best
    } else {
        let exact = choice(model, budget, caps, fleet, HALVINGS).unwrap_or(best);
        if let Some(search) = motion
            .search
            .as_mut()
            .filter(|_| budget == best.dials.max_num_batched_tokens)
        {
            search.found = exact;
        }
        exact
    };
    let wanted = following(best.dials.max_num_seqs, peak, current.max_num_seqs, caps);
    let mut cap = turn(
        current.max_num_seqs,
        wanted,
        if aim.pressed { 0.0 } else { CAP_BAND },
        urgent,
        now,
        &mut motion.cap,
    );
    if cap == current.max_num_seqs && share(cap, wanted) >= TRIMMED_FROM && motion.cap_stood(now) {
        cap = wanted;
        motion.trimmed = Some(now);
    }
    // A current value may lie outside of a range that has just changed.
    let bound = |x: u32, range: DialRange| x.min(range.max).max(range.min);
    let dials = Dials {
        max_num_seqs: bound(cap, caps),
        max_num_batched_tokens: bound(budget, budgets),
    };
    Some(Choice { dials, ..best })
}

/// By what share of itself a dial would move.
fn share(current: u32, wanted: u32) -> f64 {
    (f64::from(wanted) - f64::from(current)).abs() / f64::from(current.max(1))
}

fn turn(
    current: u32,
    wanted: u32,
    band: f64,
    urgent: bool,
    now: f64,
    last: &mut Option<(f64, bool)>,
) -> u32 {
    let change = share(current, wanted);
    let upwards = wanted > current;
    let reverses = last.is_some_and(|(at, up)| up != upwards && now - at < BEFORE_REVERSAL);
    let urgent = urgent && !upwards;
    if wanted == current || (!urgent && (change < band || reverses)) {
        return current;
    }
    *last = Some((now, upwards));
    wanted
}

#[cfg(test)]
#[path = "dials_tests.rs"]
mod tests;
