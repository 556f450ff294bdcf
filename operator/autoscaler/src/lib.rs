//! The scaling policy: observation in, decision and reason out. Pure: no clock, no I/O, no Kubernetes.
//!
//! | file | from | to |
//! |---|---|---|
//! | `fleet` | counters of replicas that come and go | what happened within a window |
//! | `census` | pods, and what they said last | who is ready, who is silent |
//! | `demand` | windows | rates, backlog, the mix of requests |
//! | `laws` | the replicas' laws | the fleet's law, and who is unlike it |
//! | `model` | a law, a mix, objectives | what dials carry, and at what latency |
//! | `dials` | the model | the dials to use |
//! | `tune` | all of these | dials for the fleet and for unlike replicas |
//! | `probe` | steps that tell no law | dials of one replica that do |
//! | `need` | demand, capacity | how many replicas load needs |
//! | `history`, `jump` | load of the last minutes | where it stands and goes |
//! | `recurrence`, `days` | load of the last hours, of the day before | what comes back, and when |
//! | `burst` | load that jumps and is soon gone | what is kept for the next one |
//! | `misses` | expected and missed objectives | by how much less a replica carries |
//! | `lowering` | needs and turns of the past | for how long fewer would have done |
//! | `replicas` | the need, now and before | what is done about it |
//! | `sleep` | the router's queue | zero replicas and back |
//! | `reason` | all of it | a sentence |

pub mod decision;
pub mod memory;
pub mod observation;

mod burst;
mod census;
mod days;
mod demand;
mod dials;
mod fleet;
mod histogram;
mod history;
mod jump;
mod laws;
mod lowering;
mod misses;
mod mix;
mod model;
mod need;
mod probe;
mod raising;
mod reason;
mod recurrence;
mod replicas;
mod sleep;
mod slots;
mod starts;
mod tune;

pub use decision::{Decision, Load, Outlook, Reason, ReasonCode};
pub use memory::{Memory, Without};
pub use observation::{
    Counters, DialRange, Dials, Histogram, ItlOf, Limits, Objectives, Observation, Phase, Queue,
    Replica, Sample,
};

use census::Census;
use demand::Demand;
use mix::Mix;
use need::Need;
use tune::Tuned;

/// What a decision rests on.
pub(crate) struct Scene<'a> {
    pub now: f64,
    pub census: Census<'a>,
    /// `None` before any replica has been sampled twice.
    pub demand: Option<Demand>,
    pub mix: Mix,
    pub objectives: &'a Objectives,
    pub limits: &'a Limits,
}

/// Decides how many replicas a service should have and how their dials should stand.
///
/// Deterministic: the same observations with the same memory give the same decisions. Never
/// panics, whatever the numbers are, and never leaves `limits`. Meant to be called every 2 s or
/// so; more seldom is worse but safe.
pub fn decide(
    observation: &Observation,
    objectives: &Objectives,
    limits: &Limits,
    memory: &mut Memory,
) -> Decision {
    // 1. What is known: pods, samples, load.
    let since = observation.now - memory.decided_at;
    let now = memory.resume(observation.now);
    let come = memory.tracks.observe(observation, now);
    let census = Census::new(observation, &memory.tracks, now);
    memory.starts.observe(observation);
    if !census.heard.is_empty() {
        let until = now - census.delay;
        memory.history.note(&come, until);
        let history = &memory.history;
        memory
            .recurrence
            .note(until, |seconds| history.rate(seconds));
        memory.days.note(until, history.rate(slots::MEASURED));
    }
    let demand = demand::measure(&memory.tracks, &memory.history, &census, memory.mix);
    if let Some(demand) = &demand {
        memory.remember_mix(demand, since);
    }
    let known = memory.mix.unwrap_or(Mix::UNKNOWN);
    let scene = Scene {
        now,
        census,
        mix: demand.as_ref().map_or(known, |demand| demand.mix),
        demand,
        objectives,
        limits,
    };

    // 2. What is in force.
    let current = replicas::in_force(memory, observation.desired_replicas, limits, now);
    let before = match memory.dials {
        Some(dials) => dials::bounded(dials, limits),
        None => dials::initial(limits),
    };

    // 3. Dials from the law.
    let tuned = tune::tune(&scene, before, memory);
    let mut facts = reason::Facts {
        scene: &scene,
        capacity: tuned.capacity,
        need: Need::default(),
        derating: memory.misses.derating(),
        dials: tuned.dials,
        moved_from: (tuned.dials != before).then_some(before),
        hopeless: tuned.hopeless,
        too_slow: tuned.too_slow(),
        tried: tuned.tried,
    };

    // 4. Replicas from demand.
    let heard = !scene.census.heard.is_empty();
    let asleep = sleep::plan(&scene, observation.queue, current);
    let (replicas, reason) = match (asleep, scene.demand.as_ref().filter(|_| heard)) {
        (Some(plan), _) => plan,
        (None, Some(demand)) => {
            let need = need::need(&scene, demand, &tuned, memory);
            let moved_at = memory.motion.last();
            let misses = &mut memory.misses;
            misses::learn(&scene, demand, &tuned, need, misses, moved_at);
            let plan = replicas::plan(&scene, demand, tuned.capacity, need, current, memory);
            facts.need = need;
            (plan.replicas(), facts.of(plan, demand))
        }
        (None, None) => {
            memory.misses.shortage_at = now;
            (current, facts.no_data())
        }
    };

    let outlook = outlook(&scene, &tuned);
    memory.pressed = scene
        .demand
        .as_ref()
        .is_some_and(|d| tuned.pressed(&scene, d));
    memory.replicas = Some(replicas);
    memory.dials = Some(tuned.dials);
    Decision {
        replicas,
        dials: tuned.dials,
        overrides: tuned.overrides,
        weights: tuned.weights,
        reason,
        load: scene.demand.map(|demand| demand.load),
        outlook,
    }
}

fn outlook(scene: &Scene, tuned: &Tuned) -> Option<Outlook> {
    let (demand, one) = (scene.demand.as_ref()?, tuned.capacity?);
    let missed = tuned.expected_misses(scene, demand, 1.0)?;
    Some(Outlook {
        one_carries: one.rate,
        good_percent: 100.0 * (1.0 - missed),
    })
}
