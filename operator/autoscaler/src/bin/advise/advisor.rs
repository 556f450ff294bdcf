//! From the protocol's observations to the policy's, and back.

use std::collections::BTreeMap;

use stoker_autoscaler::{
    Counters, DialRange, Dials, Histogram, ItlOf, Limits, Memory, Objectives, Observation, Phase,
    Replica, Sample, decide,
};
use stoker_law::Law;

use crate::fit::{self, Steps};
use crate::wire::{self, Advice, Counters as Counted, State};

/// The protocol's time 0 on the policy's clock.
const EPOCH: f64 = 1_700_000_000.0;
/// Ranges of the dials, as the CRD's defaults have them.
const SEQS: (u32, u32) = (1, 256);
const TOKENS: (u32, u32) = (64, 8192);
/// Seconds that fewer replicas must have been enough, as the CRD's default has it.
const STABILIZATION: f64 = 75.0;
/// How far a law of sums is trusted, and one that is only a guess.
const FITTED: f64 = 0.9;
const GUESSED: f64 = 0.1;

const TTFT: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const ITL: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const LENGTH: [f64; 15] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4,
];

/// A replica that is slower or faster by more than this factor has a law of its own.
const UNLIKE: f64 = 1.15;

/// What is known of a replica beyond its newest counters.
#[derive(Clone, Debug, Default)]
struct Known {
    ready_since: f64,
    /// Requests that met all goals: never less than it was.
    met: f64,
    counters: Counted,
}

#[derive(Default)]
pub struct Advisor {
    memory: Option<Memory>,
    /// Dials at the first look.
    initial: Option<Dials>,
    /// Replicas of the last look, and the budget in force since then.
    known: BTreeMap<String, Known>,
    budget: u32,
    steps: Steps,
}

impl Advisor {
    pub fn advise(&mut self, seen: &wire::Observation) -> Advice {
        let now = EPOCH + seen.t;
        let dials = Dials {
            max_num_seqs: seen.max_num_seqs,
            max_num_batched_tokens: seen.max_num_batched_tokens,
        };
        let initial = *self.initial.get_or_insert(dials);
        self.count_steps(seen);
        let law = self.steps.law();
        let replicas = self.replicas(seen, now, dials, law);
        let observation = Observation {
            queue: None,
            now,
            desired_replicas: seen.desired,
            replicas,
        };
        let memory = self.memory.get_or_insert_with(|| {
            Memory::default().expecting_start(seen.start_s.unwrap_or(f64::NAN))
        });
        let decision = decide(
            &observation,
            &objectives(&seen.goals),
            &limits(seen, initial),
            memory,
        );
        Advice {
            replicas: decision.replicas,
            max_num_seqs: decision.dials.max_num_seqs,
            max_num_batched_tokens: decision.dials.max_num_batched_tokens,
        }
    }

    /// Counts the steps since the last look, but those while the budget moved: nobody knows which of
    /// them were made under which. What was before the first look counts as under the one in force.
    fn count_steps(&mut self, seen: &wire::Observation) {
        let budget = seen.max_num_batched_tokens;
        let moved = self.memory.is_some() && self.budget != budget;
        self.budget = budget;
        for replica in seen.replicas.iter().filter(|_| !moved) {
            let known = self.known.get(&id_of(replica));
            let before = known.map(|known| known.counters.clone());
            let before = before.unwrap_or_default();
            self.steps.add(&before, &replica.counters, budget);
        }
    }

    fn replicas(
        &mut self,
        seen: &wire::Observation,
        now: f64,
        dials: Dials,
        law: Option<Law>,
    ) -> Vec<Replica> {
        let first = self.memory.is_none();
        let mut known = BTreeMap::new();
        let replicas = seen.replicas.iter().map(|replica| {
            let id = id_of(replica);
            let phase = match replica.state {
                State::Starting => Phase::Starting,
                State::Ready => Phase::Ready,
                State::Draining => Phase::Draining,
            };
            let mut before = self.known.remove(&id).unwrap_or_else(|| Known {
                ready_since: if first { now - replica.age_s } else { now },
                ..Known::default()
            });
            let ready_since = before.ready_since;
            let serves = phase != Phase::Starting;
            let sample = serves.then(|| sample(replica, seen, now, dials, law, &mut before));
            if serves {
                before.counters = replica.counters.clone();
                known.insert(id.clone(), before);
            }
            Replica {
                id,
                phase,
                age_seconds: replica.age_s,
                ready_seconds: if serves { now - ready_since } else { 0.0 },
                sample,
            }
        });
        let replicas = replicas.collect();
        self.known = known;
        replicas
    }
}

fn id_of(replica: &wire::Replica) -> String {
    match &replica.id {
        serde_json::Value::String(name) => name.clone(),
        other => other.to_string(),
    }
}

fn sample(
    replica: &wire::Replica,
    seen: &wire::Observation,
    now: f64,
    dials: Dials,
    law: Option<Law>,
    known: &mut Known,
) -> Sample {
    let told = &replica.counters;
    let slowness = law.and_then(|law| fit::slowness(&law, &told.reg_decode));
    let unlike = |factor: &f64| *factor > UNLIKE || *factor < 1.0 / UNLIKE;
    let law = law.map(|law| law.slowed(slowness.filter(unlike).unwrap_or(1.0)));
    // A first token that is late is counted before its request ends.
    let missed = told.ttft_over_goal + told.itl_over_goal + told.timeouts;
    known.met = known.met.max(told.finished - missed);
    Sample {
        at: now,
        running: replica.running,
        waiting: replica.waiting,
        waiting_prompt_tokens: 0,
        kv_tokens: replica.kv_tokens,
        kv_capacity_tokens: seen.kv_capacity_tokens,
        dials,
        ceilings: Dials {
            max_num_seqs: 0,
            max_num_batched_tokens: 0,
        },
        law: law.unwrap_or(Law::typical(0.03)),
        law_confidence: if law.is_some() { FITTED } else { GUESSED },
        counters: Counters {
            requests_received: told.arrived,
            prompt_tokens_received: told.arrived_prompt_tokens,
            prompt_tokens: told.prompt_tokens,
            generation_tokens: told.generation_tokens,
            requests_finished: told.finished,
            preemptions: told.preemptions,
            all_met: known.met,
            all_missed: missed,
            ttft_met: 0.0,
            ttft_missed: told.ttft_over_goal,
            itl_met: 0.0,
            itl_missed: told.itl_over_goal,
            ttft: histogram(&TTFT, &told.ttft_hist),
            itl: histogram(&ITL, &told.itl_hist),
            prompt_length: histogram(&LENGTH, &told.prompt_hist),
            generation_length: histogram(&LENGTH, &told.gen_hist),
        },
    }
}

/// Empty where there are not as many counts as buckets.
fn histogram(bounds: &[f64], counts: &[f64]) -> Histogram {
    if counts.len() != bounds.len() + 1 {
        return Histogram::default();
    }
    let mut below = 0.0;
    let bounds = bounds.iter().copied().chain([f64::INFINITY]);
    let buckets = bounds.zip(counts).map(|(bound, count)| {
        below += count;
        (bound, below)
    });
    Histogram {
        buckets: buckets.collect(),
        sum: 0.0,
        count: below,
    }
}

fn objectives(goals: &wire::Goals) -> Objectives {
    Objectives {
        good_percent: 99.0,
        ttft_seconds: goals.ttft_s,
        ttft_free_prompt_tokens: goals.ttft_free_tokens,
        ttft_seconds_per_prompt_token: goals.ttft_s_per_token,
        itl_seconds: goals.itl_s,
        itl_of: ItlOf::Mean,
    }
}

fn limits(seen: &wire::Observation, initial: Dials) -> Limits {
    let range = |(min, max): (u32, u32), initial: u32| DialRange { min, max, initial };
    Limits {
        idle_seconds: 0.0,
        min_replicas: seen.min_replicas,
        max_replicas: seen.max_replicas,
        max_num_seqs: range(SEQS, initial.max_num_seqs),
        max_num_batched_tokens: range(TOKENS, initial.max_num_batched_tokens),
        scale_down_stabilization_seconds: STABILIZATION,
    }
}
