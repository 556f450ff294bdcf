//! Whatever is observed: no panic, nothing outside of the limits.

use proptest::prelude::*;
use serde_json::Value;
use stoker_autoscaler::{
    Counters, DialRange, Dials, Histogram, ItlOf, Limits, Memory, Objectives, Observation, Phase,
    Queue, Replica, Sample, decide,
};
use stoker_law::Law;

use crate::fleet::within;

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => 0.0..1e4f64,
        2 => 0.0..1e-2f64,
        1 => prop_oneof![
            Just(f64::NAN), Just(f64::INFINITY), Just(f64::NEG_INFINITY), Just(0.0), Just(-1.0),
            Just(1e308), Just(5e-324), Just(-1e12),
        ],
    ]
}

fn count() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..300u32, 1 => prop_oneof![Just(u32::MAX), Just(0)], 1 => any::<u32>()]
}

fn dials() -> impl Strategy<Value = Dials> {
    (count(), count()).prop_map(|(max_num_seqs, max_num_batched_tokens)| Dials {
        max_num_seqs,
        max_num_batched_tokens,
    })
}

fn histogram() -> impl Strategy<Value = Histogram> {
    let buckets = prop::collection::vec((number(), number()), 0..5);
    (buckets, number(), number()).prop_map(|(buckets, sum, count)| Histogram {
        buckets,
        sum,
        count,
    })
}

fn counters() -> impl Strategy<Value = Counters> {
    let scalars = prop::collection::vec(number(), 12);
    let histograms = prop::collection::vec(histogram(), 4);
    (scalars, histograms).prop_map(|(s, h)| Counters {
        requests_received: s[0],
        prompt_tokens_received: s[1],
        prompt_tokens: s[2],
        generation_tokens: s[3],
        requests_finished: s[4],
        preemptions: s[5],
        all_met: s[6],
        all_missed: s[7],
        ttft_met: s[8],
        ttft_missed: s[9],
        itl_met: s[10],
        itl_missed: s[11],
        ttft: h[0].clone(),
        itl: h[1].clone(),
        prompt_length: h[2].clone(),
        generation_length: h[3].clone(),
    })
}

fn law() -> impl Strategy<Value = Law> {
    prop::collection::vec(number(), 5).prop_map(|t| Law {
        base: t[0],
        per_kv_token: t[1],
        per_token: t[2],
        per_sequence: t[3],
        hidden: t[4],
    })
}

/// A law that makes sense, so that the other numbers reach the arithmetic behind it.
fn sane_law() -> impl Strategy<Value = Law> {
    (
        1e-4..0.1f64,
        0.0..1e-5f64,
        0.0..1e-3f64,
        0.0..1e-2f64,
        0.0..=1.0f64,
    )
        .prop_map(
            |(base, per_kv_token, per_token, per_sequence, hidden)| Law {
                base,
                per_kv_token,
                per_token,
                per_sequence,
                hidden,
            },
        )
}

fn sample(now: f64) -> impl Strategy<Value = Sample> {
    (
        prop_oneof![3 => Just(now), 1 => number()],
        (count(), count(), any::<u32>(), any::<u32>(), count()),
        (dials(), dials()),
        prop_oneof![law(), sane_law()],
        number(),
        prop_oneof![counters(), Just(Counters::default())],
    )
        .prop_map(
            |(at, gauges, (dials, ceilings), law, confidence, counters)| Sample {
                at,
                running: gauges.0,
                waiting: gauges.1,
                waiting_prompt_tokens: u64::from(gauges.2) << (gauges.4 % 33),
                kv_tokens: u64::from(gauges.3) << (gauges.4 % 33),
                kv_capacity_tokens: u64::from(gauges.4),
                dials,
                ceilings,
                law,
                law_confidence: confidence,
                counters,
            },
        )
}

fn replica(now: f64) -> impl Strategy<Value = Replica> {
    (
        "[a-c]",
        prop_oneof![
            1 => Just(Phase::Unschedulable),
            1 => Just(Phase::Starting),
            5 => Just(Phase::Ready),
            1 => Just(Phase::Draining),
        ],
        number(),
        number(),
        prop::option::weighted(0.8, sample(now)),
    )
        .prop_map(|(id, phase, age_seconds, ready_seconds, sample)| Replica {
            id,
            phase,
            age_seconds,
            ready_seconds,
            sample,
        })
}

fn observation(step: usize) -> impl Strategy<Value = Observation> {
    let usual = 1e9 + step as f64 * 2.0;
    let now = prop_oneof![6 => Just(usual), 1 => number()];
    now.prop_flat_map(|now| {
        let replicas = prop::collection::vec(replica(now), 0..6);
        (count(), replicas, prop::option::of(queue())).prop_map(
            move |(desired_replicas, replicas, queue)| Observation {
                now,
                desired_replicas,
                replicas,
                queue,
            },
        )
    })
}

fn queue() -> impl Strategy<Value = Queue> {
    let numbers = (number(), number());
    (count(), any::<u64>(), count(), numbers).prop_map(
        |(requests, prompt_tokens, outstanding_requests, (oldest_age_seconds, idle_seconds))| {
            Queue {
                requests,
                prompt_tokens,
                oldest_age_seconds,
                outstanding_requests,
                idle_seconds,
            }
        },
    )
}

fn range() -> impl Strategy<Value = DialRange> {
    (count(), count(), count()).prop_map(|(a, b, initial)| DialRange {
        min: a.min(b),
        max: a.max(b),
        initial,
    })
}

fn limits() -> impl Strategy<Value = Limits> {
    (count(), count(), range(), range(), number()).prop_map(|(a, b, caps, budgets, seconds)| {
        Limits {
            min_replicas: a.min(b),
            idle_seconds: 60.0,
            max_replicas: a.max(b),
            max_num_seqs: caps,
            max_num_batched_tokens: budgets,
            scale_down_stabilization_seconds: seconds,
        }
    })
}

fn objectives() -> impl Strategy<Value = Objectives> {
    let of = prop_oneof![Just(ItlOf::Mean), Just(ItlOf::P95)];
    (prop::collection::vec(number(), 5), of).prop_map(|(x, itl_of)| Objectives {
        good_percent: x[0],
        ttft_seconds: x[1],
        ttft_free_prompt_tokens: x[2],
        ttft_seconds_per_prompt_token: x[3],
        itl_seconds: x[4],
        itl_of,
    })
}

fn observations() -> impl Strategy<Value = Vec<Observation>> {
    (1..8usize).prop_flat_map(|n| (0..n).map(observation).collect::<Vec<_>>())
}

/// A stored memory in which somebody wrote other numbers.
fn edited(memory: &Memory, numbers: &[f64]) -> Option<Memory> {
    fn edit(value: &mut Value, numbers: &mut impl Iterator<Item = f64>) {
        match value {
            Value::Number(number) => {
                let other = numbers.next().and_then(serde_json::Number::from_f64);
                if let Some(other) = other.filter(|_| number.is_f64()) {
                    *number = other;
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| edit(value, numbers)),
            Value::Object(fields) => fields.values_mut().for_each(|value| edit(value, numbers)),
            _ => {}
        }
    }
    let mut stored = serde_json::to_value(memory).ok()?;
    edit(&mut stored, &mut numbers.iter().copied().cycle());
    serde_json::from_value(stored).ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decide_never_panics_and_keeps_the_limits(
        observations in observations(),
        objectives in objectives(),
        limits in limits(),
        desired in count(),
        dials in prop::option::of(dials()),
        numbers in prop::collection::vec(number(), 1..60),
    ) {
        let mut memory = match dials {
            Some(_) => Memory::seeded(desired, dials, 1e9),
            None => Memory::default(),
        };
        for observation in &observations {
            let decision = decide(observation, &objectives, &limits, &mut memory);
            within(&decision, &limits);
            prop_assert!(!decision.reason.message.is_empty());
            // What is remembered can be stored, and is the same when it is read again.
            let stored = serde_json::to_string(&memory).unwrap();
            prop_assert!(stored.len() < 8192, "{}", stored.len());
            let mut again: Memory = serde_json::from_str(&stored).unwrap();
            let _ = decide(observation, &objectives, &limits, &mut again);
            if let Some(edited) = edited(&memory, &numbers) {
                let mut edited = edited.restored(desired, dials);
                within(&decide(observation, &objectives, &limits, &mut edited), &limits);
            }
        }
    }

    #[test]
    fn the_same_observations_give_the_same_decisions(
        observations in observations(),
        objectives in objectives(),
        limits in limits(),
    ) {
        let run = || {
            let mut memory = Memory::default();
            let decisions = observations.iter().map(|o| decide(o, &objectives, &limits, &mut memory));
            serde_json::to_string(&decisions.map(|d| (d.replicas, d.dials, d.reason)).collect::<Vec<_>>()).unwrap()
        };
        prop_assert_eq!(run(), run());
    }
}
