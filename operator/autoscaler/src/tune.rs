//! Dials for the fleet and for replicas that are unlike it.

use std::collections::BTreeMap;

use crate::Scene;
use crate::demand::Demand;
use crate::dials::{self, Choice, Motion};
use crate::laws;
use crate::memory::{Known, Memory};
use crate::model::{self, Capacity, ReplicaModel};
use crate::observation::{Dials, Sample};

/// Searches for the dials of unlike replicas in one call: the others wait for their turn.
const SEARCHES: u32 = 1;

/// What the laws say.
pub(crate) struct Tuned {
    pub dials: Dials,
    pub overrides: BTreeMap<String, Dials>,
    /// Of a replica that is like the fleet, where a law is known.
    pub capacity: Option<Capacity>,
    /// The fleet's model with the dials that it is judged by.
    pub model: Option<(ReplicaModel, Dials)>,
    /// By how many replicas that are like the fleet the unlike ones fall short.
    pub lacking: f64,
    /// Where no dials keep the inter-token objective: seconds of the smallest step, and the
    /// objective.
    pub hopeless: Option<(f64, f64)>,
}

impl Tuned {
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
        capacity: None,
        model: None,
        lacking: 0.0,
        hopeless: None,
    };
    let size = scene.census.ready().max(1);
    let Some(fleet) = memory.fleet.filter(|known| model::usable(&known.law)) else {
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
        let samples = scene.census.sampled.iter().map(|(_, sample)| *sample);
        let busiest = samples.max_by_key(|sample| in_flight(sample));
        let motion = &mut memory.motion;
        match settled(scene, &model, fleet, before, busiest, true, motion) {
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
    let own = own_dials(scene, &trusted, fleet, &mut tuned, memory);
    if let Some(one) = &tuned.capacity {
        let lacks = |own: &Capacity| (1.0 - own.rate / one.rate).max(-1.0);
        tuned.lacking = own.iter().map(lacks).sum();
    }
    tuned
}

/// Gives unlike replicas dials of their own, and returns what these carry.
fn own_dials(
    scene: &Scene,
    trusted: &[(&crate::Replica, &Sample)],
    fleet: Known,
    tuned: &mut Tuned,
    memory: &mut Memory,
) -> Vec<Capacity> {
    let mut before = std::mem::take(&mut memory.own);
    let mut carried = Vec::new();
    let mut searches = SEARCHES;
    for (replica, sample) in trusted {
        let known = laws::known(sample);
        if !laws::unlike(known, fleet, scene.mix, *scene.objectives, tuned.dials) {
            continue;
        }
        let (was, mut motion) =
            (before.remove(&replica.id)).unwrap_or((tuned.dials, Motion::default()));
        let was = dials::bounded(was, scene.limits);
        let model = model_of(scene, known);
        let young = motion.search_began_at();
        let may_search = searches > 0;
        let choice = settled(
            scene,
            &model,
            known,
            was,
            Some(sample),
            may_search,
            &mut motion,
        );
        searches -= u32::from(may_search && motion.search_began_at() != young);
        let Some(choice) = choice else {
            continue;
        };
        let own = dials::bounded(choice.dials, scene.limits);
        if !dials::alike(own, tuned.dials) {
            tuned.overrides.insert(replica.id.clone(), own);
        }
        memory.own.insert(replica.id.clone(), (own, motion));
        carried.push(choice.capacity);
    }
    carried
}

fn model_of(scene: &Scene, known: Known) -> ReplicaModel {
    ReplicaModel::new(
        known.law,
        scene.mix,
        *scene.objectives,
        known.kv_capacity_tokens,
    )
}

fn settled(
    scene: &Scene,
    model: &ReplicaModel,
    known: Known,
    before: Dials,
    busiest: Option<&Sample>,
    may_search: bool,
    motion: &mut Motion,
) -> Option<Choice> {
    let lately = scene.demand.as_ref().map_or(0, |d| d.peak_in_flight);
    let peak = busiest.map_or(0, in_flight).max(lately);
    dials::settled(
        model,
        dials::ranges(scene.limits, known.ceilings),
        before,
        dials::Look {
            peak,
            fleet: scene.census.ready().max(1),
            may_search,
            now: scene.now,
        },
        motion,
    )
}

fn in_flight(sample: &Sample) -> u32 {
    sample.running.saturating_add(sample.waiting)
}
