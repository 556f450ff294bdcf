//! Trying out other dials on one replica, where traffic alone doesn't tell the law.
//!
//! Steps that are all alike have no law: prompts of one length and answers of a token or two give one
//! kind of step, and the dials stay where they are. Then one replica computes its prompts in smaller
//! chunks for a while. That is safe for the tokens that are generated meanwhile, since smaller chunks
//! make shorter steps, and small for the prompts: no request waits, and no objective is at risk. As soon
//! as one law is trusted nothing is tried any more: from there traffic goes where it matters by itself.

use crate::Scene;
use crate::demand::Demand;
use crate::laws;
use crate::memory::Memory;
use crate::misses::AFTERMATH;
use crate::model::usable;
use crate::observation::Dials;

/// Seconds that a replica is tried for, and those between two.
const LASTS: f64 = 30.0;
const BETWEEN: f64 = 30.0;
/// Tries at most, until a law is known.
const MOST: u32 = 4;
/// Of the chunks that there are, one after the other.
const SHARES: [f64; MOST as usize] = [0.75, 0.5, 0.75, 0.5];
/// Share of the misses allowed that there may be.
const AT_EASE: f64 = 0.5;

/// Tries up to now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Probe {
    /// The replica that is tried, its dials, and since when.
    now: Option<(String, Dials, f64)>,
    ended_at: f64,
    made: u32,
}

/// The replica that is to be tried, and its dials. Only for a fleet of which no law is known.
pub(crate) fn probe(scene: &Scene, before: Dials, memory: &mut Memory) -> Option<(String, Dials)> {
    let demand = scene.demand.as_ref().filter(|d| d.mix_known && !d.idle)?;
    let safe = !memory.without.probing && is_safe(scene, demand, memory);
    let probe = &mut memory.probe;
    let heard = |id: &str| scene.census.heard.iter().any(|(other, _)| *other == id);
    if let Some((id, dials, since)) = &probe.now {
        if safe && scene.now - since < LASTS && heard(id) {
            return Some((id.clone(), *dials));
        }
        probe.now = None;
        probe.ended_at = scene.now;
    }
    if !safe || probe.made >= MOST || scene.now - probe.ended_at < BETWEEN {
        return None;
    }
    // The one of which most is known already: it lacks least to be trusted.
    let told = scene.census.heard.iter();
    let (id, told) = told
        .filter(|(_, told)| usable(&told.law) && told.law_confidence < laws::TRUSTED)
        .max_by(|a, b| a.1.law_confidence.total_cmp(&b.1.law_confidence))?;
    let share = SHARES.get(probe.made as usize)?;
    let chunk = f64::from(before.max_num_batched_tokens).min(demand.mix.prompt);
    let budget = (share * chunk) as u32;
    // Whoever decodes needs a token each.
    let least = (scene.limits.max_num_batched_tokens.min).max(2 * told.running.max(1));
    if budget < least {
        return None;
    }
    let dials = Dials {
        max_num_batched_tokens: budget,
        ..before
    };
    probe.made += 1;
    probe.now = Some(((*id).to_owned(), dials, scene.now));
    Some(((*id).to_owned(), dials))
}

/// Nobody waits, nobody is silent, no shortage was of late, and far fewer requests miss than may.
fn is_safe(scene: &Scene, demand: &Demand, memory: &Memory) -> bool {
    let census = &scene.census;
    let allowed = 1.0 - scene.objectives.good_percent.clamp(0.0, 100.0) / 100.0;
    census.complete()
        && census.waiting() == 0
        && census.unschedulable == 0
        && scene.now - memory.misses.shortage_at >= AFTERMATH
        && demand.missed <= AT_EASE * allowed * (demand.good + demand.missed)
}

#[cfg(test)]
mod tests {
    use stoker_law::Law;

    use super::*;
    use crate::decide;
    use crate::memory::Without;
    use crate::observation::{
        Counters, DialRange, Histogram, ItlOf, Limits, Objectives, Observation, Phase, Replica,
        Sample,
    };

    const DIALS: Dials = Dials {
        max_num_seqs: 8,
        max_num_batched_tokens: 512,
    };

    /// Two replicas that get a request a second each, all alike.
    #[derive(Clone, Copy)]
    struct World {
        confidence: f64,
        /// Share of the requests that miss.
        missed: f64,
        waiting: u32,
        prompt: f64,
        probing: bool,
    }

    const UNTOLD: World = World {
        confidence: 0.3,
        missed: 0.0,
        waiting: 0,
        prompt: 1000.0,
        probing: true,
    };

    impl World {
        fn replica(self, place: usize, t: f64) -> Replica {
            let all = |value: f64| Histogram {
                buckets: vec![(value, t), (f64::INFINITY, t)],
                sum: t * value,
                count: t,
            };
            Replica {
                id: format!("r{place}"),
                phase: Phase::Ready,
                age_seconds: 1000.0 + t,
                ready_seconds: 900.0 + t,
                sample: Some(Sample {
                    at: 1e9 + t,
                    running: 1,
                    waiting: self.waiting,
                    waiting_prompt_tokens: 0,
                    kv_tokens: 1000,
                    kv_capacity_tokens: 60_000,
                    dials: DIALS,
                    ceilings: Dials {
                        max_num_seqs: 0,
                        max_num_batched_tokens: 0,
                    },
                    law: Law::typical(0.03),
                    // One is told a little better than the other.
                    law_confidence: self.confidence + 0.01 * place as f64,
                    counters: Counters {
                        requests_received: t,
                        prompt_tokens_received: t * self.prompt,
                        prompt_tokens: t * self.prompt,
                        generation_tokens: 4.0 * t,
                        requests_finished: t,
                        all_met: t * (1.0 - self.missed),
                        all_missed: t * self.missed,
                        prompt_length: all(self.prompt),
                        generation_length: all(5.0),
                        ..Counters::default()
                    },
                }),
            }
        }

        /// Budgets that replicas were told to try, and when.
        fn tries(self, seconds: u32) -> Vec<(u32, String, u32)> {
            let range = |min: u32, max: u32, initial: u32| DialRange { min, max, initial };
            let limits = Limits {
                min_replicas: 2,
                max_replicas: 2,
                max_num_seqs: range(1, 256, 8),
                max_num_batched_tokens: range(64, 8192, 512),
                scale_down_stabilization_seconds: 75.0,
                idle_seconds: 0.0,
            };
            let objectives = Objectives {
                good_percent: 99.0,
                ttft_seconds: 2.0,
                ttft_free_prompt_tokens: 1000.0,
                ttft_seconds_per_prompt_token: 1e-3,
                itl_seconds: 0.1,
                itl_of: ItlOf::Mean,
            };
            let mut memory = Memory::default().without(Without {
                probing: !self.probing,
                ..Without::default()
            });
            let mut tries = Vec::new();
            for t in (0..seconds).step_by(2) {
                let observation = Observation {
                    now: 1e9 + f64::from(t),
                    desired_replicas: 2,
                    replicas: (0..2).map(|n| self.replica(n, f64::from(t))).collect(),
                    queue: None,
                };
                let decision = decide(&observation, &objectives, &limits, &mut memory);
                assert!(decision.overrides.len() <= 1, "one replica at a time");
                let told = decision.reason.message.contains("tries a budget of");
                assert_eq!(
                    told,
                    !decision.overrides.is_empty(),
                    "{}",
                    decision.reason.message
                );
                for (id, dials) in decision.overrides {
                    assert_eq!(dials.max_num_seqs, DIALS.max_num_seqs);
                    tries.push((t, id, dials.max_num_batched_tokens));
                }
            }
            tries
        }
    }

    #[test]
    fn one_replica_is_tried_with_smaller_chunks_a_few_times() {
        let tries = UNTOLD.tries(1200);
        let (first, last) = (tries.first().unwrap(), tries.last().unwrap());
        assert!(f64::from(first.0) >= AFTERMATH, "{first:?}");
        assert!(last.0 < 400, "{last:?}: for good");
        let seconds = 2.0 * tries.len() as f64;
        assert!(seconds <= f64::from(MOST) * (LASTS + 2.0), "{seconds}");
        assert!(tries.iter().all(|(_, id, _)| id == "r1"), "{tries:?}");
        let budgets: Vec<u32> = tries.iter().map(|(.., budget)| *budget).collect();
        assert!(
            budgets.iter().all(|b| [384, 256].contains(b)),
            "{budgets:?}"
        );
        // A budget that no prompt fills tells nothing.
        let short = World {
            prompt: 300.0,
            ..UNTOLD
        };
        assert_eq!(short.tries(200).first().unwrap().2, 225);
    }

    #[test]
    fn nothing_is_tried_where_it_may_do_harm_or_no_good() {
        let none = |world: World| assert_eq!(world.tries(600), []);
        none(World {
            confidence: 0.8,
            ..UNTOLD
        });
        none(World {
            missed: 0.01,
            ..UNTOLD
        });
        none(World {
            waiting: 1,
            ..UNTOLD
        });
        none(World {
            prompt: 40.0,
            ..UNTOLD
        });
        none(World {
            probing: false,
            ..UNTOLD
        });
    }
}
