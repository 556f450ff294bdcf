//! Dials for the fleet and for replicas that are unlike it.

use std::collections::BTreeMap;

use crate::Scene;
use crate::census::Told;
use crate::demand::Demand;
use crate::dials::{self, Aim, Choice, Motion};
use crate::laws;
use crate::memory::{Known, Memory};
use crate::model::{self, Capacity, ReplicaModel};
use crate::observation::Dials;
use crate::probe;

/// What the laws say.
pub(crate) struct Tuned {
    pub dials: Dials,
    pub overrides: BTreeMap<String, Dials>,
    /// Requests in flight that unlike replicas carry, in those of an ordinary one; 0 for those that
    /// can't keep the objectives.
    pub weights: BTreeMap<String, f64>,
    /// Of a replica that is like the fleet, where a law is known.
    pub capacity: Option<Capacity>,
    /// The fleet's model with the dials that it is judged by.
    pub model: Option<(ReplicaModel, Dials)>,
    /// By how many replicas that are like the fleet the unlike ones fall short.
    pub lacking: f64,
    /// Where no dials keep the inter-token objective: seconds of the smallest step, and the
    /// objective.
    pub hopeless: Option<(f64, f64)>,
    /// Budget of the one replica that is tried, for a law to be told.
    pub tried: Option<u32>,
}

impl Tuned {
    /// Replicas that can't keep the objectives with any dials.
    pub fn too_slow(&self) -> u32 {
        self.weights
            .values()
            .filter(|weight| **weight == 0.0)
            .count() as u32
    }

    /// The fleet's model, the dials that it is judged by, and what a replica carries with them.
    pub fn known(&self) -> Option<(&ReplicaModel, Dials, Capacity)> {
        let (model, dials) = self.model.as_ref()?;
        Some((model, *dials, self.capacity?))
    }

    /// Whether the ready replicas get more than they carry.
    pub fn pressed(&self, scene: &Scene, demand: &Demand) -> bool {
        let ready = f64::from(scene.census.ready()) - self.lacking;
        let carried = self.capacity.map(|one| one.rate * ready);
        carried.is_some_and(|carried| demand.trend.level > carried)
    }

    /// Share of requests that the ready replicas will miss at the load of the moment, where each
    /// carries so much less than its law says. `None` without a law.
    pub fn expected_misses(&self, scene: &Scene, demand: &Demand, derating: f64) -> Option<f64> {
        let (model, dials) = self.model.as_ref()?;
        let ready = scene.census.ready().max(1);
        let working = (f64::from(ready) - self.lacking).max(0.5);
        Some(model.misses_at(derating * demand.trend.level / working, *dials, ready))
    }
}

pub(crate) fn tune(scene: &Scene, before: Dials, memory: &mut Memory) -> Tuned {
    let trusted = laws::trusted(&scene.census);
    let now_known = laws::typical(&trusted, scene.mix, *scene.objectives, before, memory.fleet);
    memory.fleet = now_known.or(memory.fleet);
    let mut tuned = Tuned {
        dials: before,
        overrides: BTreeMap::new(),
        weights: BTreeMap::new(),
        capacity: None,
        model: None,
        lacking: 0.0,
        hopeless: None,
        tried: None,
    };
    let size = scene.census.ready().max(1);
    let Some(fleet) = memory.fleet.filter(|known| model::usable(&known.law)) else {
        if let Some((id, dials)) = probe::probe(scene, before, memory) {
            tuned.tried = Some(dials.max_num_batched_tokens);
            tuned.overrides.insert(id, dials);
        }
        return tuned;
    };
    let model = model_of(scene, fleet);
    memory.inherited &= !scene.demand.as_ref().is_some_and(|d| d.mix_known)
        && before != dials::initial(scene.limits);
    if now_known.is_none() || memory.inherited {
        // A stored law or a guessed mix says what a replica carries, but moves nothing.
        tuned.capacity = model.capacity(before, size);
        tuned.model = Some((model, before));
    } else {
        let told = scene.census.heard.iter().map(|(_, told)| *told);
        let busiest = told.max_by_key(Told::in_flight);
        let motion = &mut memory.motion;
        let aim = aim(scene, fleet.ceilings, memory.pressed);
        match settled(scene, &model, aim, before, busiest, true, motion) {
            Some(choice) => {
                tuned.dials = dials::bounded(choice.dials, scene.limits);
                tuned.capacity = Some(choice.capacity);
                tuned.model = Some((model, choice.judged));
            }
            None => {
                tuned.dials = dials::initial(scene.limits);
                tuned.capacity = model.capacity(tuned.dials, size);
                tuned.hopeless = Some((model.step_seconds(1.0, 1.0), scene.objectives.itl_seconds));
                tuned.model = Some((model, tuned.dials));
            }
        }
    }
    own_dials(scene, &trusted, fleet, &mut tuned, memory);
    tuned
}

/// A replica unlike the rest, with what is remembered of it.
struct Unlike<'a> {
    id: &'a str,
    told: Told,
    model: ReplicaModel,
    was: Dials,
    motion: Motion,
}

/// Gives unlike replicas dials of their own, and requests in proportion to what they carry.
fn own_dials(
    scene: &Scene,
    trusted: &[(&str, Told)],
    fleet: Known,
    tuned: &mut Tuned,
    memory: &mut Memory,
) {
    let mut before = std::mem::take(&mut memory.own);
    let mut unlike: Vec<Unlike> = (trusted.iter())
        .filter(|(_, told)| {
            let known = laws::known(*told);
            laws::unlike(known, fleet, scene.mix, *scene.objectives, tuned.dials)
        })
        .map(|(id, told)| {
            let fresh = (tuned.dials, Motion::default());
            let (was, motion) = before.remove(*id).unwrap_or(fresh);
            Unlike {
                id,
                told: *told,
                model: model_of(scene, laws::known(*told)),
                was: dials::bounded(was, scene.limits),
                motion,
            }
        })
        .collect();
    let pressed = memory.pressed;
    // Like ones share what was found for one of them. There is one search a call, for the one that
    // has waited longest: the rest go on with what was found for them before.
    let aim = |u: &Unlike| aim(scene, u.told.ceilings, pressed);
    let due = |u: &Unlike, now| !u.motion.is_found(&u.model, aim(u), now);
    let searched = |u: &Unlike| u.motion.searched_at().unwrap_or(f64::NEG_INFINITY);
    let mut turn = None;
    if memory.motion.searched_at() != Some(scene.now) {
        let due = (unlike.iter().enumerate()).filter(|(_, u)| due(u, scene.now));
        let first = due.min_by(|(_, a), (_, b)| searched(a).total_cmp(&searched(b)));
        turn = first.map(|(place, _)| place);
    }
    let mut found: Option<Motion> = None;
    let order = (turn.into_iter()).chain((0..unlike.len()).filter(|place| turn != Some(*place)));
    for place in order {
        let Some(own) = unlike.get_mut(place) else {
            continue;
        };
        let aim = aim(own);
        if let Some(found) = found.filter(|_| due(own, scene.now)) {
            own.motion.share(&found, &own.model, aim, scene.now);
        }
        let (was, motion) = (own.was, &mut own.motion);
        let (may_search, busiest) = (turn == Some(place), Some(own.told));
        let choice = settled(scene, &own.model, aim, was, busiest, may_search, motion);
        let mut dials = was;
        let mut weight = 0.0;
        if let Some(choice) = choice {
            dials = dials::bounded(choice.dials, scene.limits);
            if !dials::alike(dials, tuned.dials) {
                tuned.overrides.insert(own.id.to_owned(), dials);
            }
            if let Some(one) = tuned.capacity.filter(|_| choice.capacity.keeps) {
                weight = choice.capacity.in_flight / one.in_flight;
                tuned.lacking += (1.0 - choice.capacity.rate / one.rate).max(-1.0);
            }
        }
        if weight == 0.0 {
            tuned.lacking += 1.0;
        }
        if may_search {
            found = Some(own.motion);
        }
        tuned.weights.insert(own.id.to_owned(), weight);
        memory.own.insert(own.id.to_owned(), (dials, own.motion));
    }
}

fn model_of(scene: &Scene, known: Known) -> ReplicaModel {
    ReplicaModel::new(
        known.law,
        scene.mix,
        *scene.objectives,
        known.kv_capacity_tokens,
    )
}

fn aim(scene: &Scene, ceilings: Dials, pressed: bool) -> Aim {
    Aim {
        ranges: dials::ranges(scene.limits, ceilings),
        fleet: scene.census.ready().max(1),
        pressed,
    }
}

fn settled(
    scene: &Scene,
    model: &ReplicaModel,
    aim: Aim,
    before: Dials,
    busiest: Option<Told>,
    may_search: bool,
    motion: &mut Motion,
) -> Option<Choice> {
    let lately = scene.demand.as_ref().map_or(0, |d| d.peak_in_flight);
    let peak = busiest.map_or(0, |told| told.in_flight()).max(lately);
    let look = dials::Look {
        peak,
        may_search,
        now: scene.now,
    };
    dials::settled(model, aim, before, look, motion)
}
