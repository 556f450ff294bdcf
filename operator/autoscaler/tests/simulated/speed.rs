//! What a decision costs. `cargo test --release -p stoker-autoscaler --test simulated speed -- --nocapture`
//! prints it; machines that run tests are shared, so nothing is asserted of time.

use std::time::Instant;

use stoker_autoscaler::{Observation, decide};

use crate::fleet::{Clients, Fleet, Lengths, PERIOD};

const CHAT: Lengths = Lengths {
    prompt: 1000.0,
    output: 130.0,
    random: true,
};

/// Milliseconds of a decision over a hundred replicas, of which `unlike` are slower than the rest, each
/// in its own way: the median, and what one in ten takes at least.
fn milliseconds(unlike: usize) -> (f64, f64) {
    let mut fleet = Fleet::on_t4(200, 75.0, CHAT);
    fleet.limits.min_replicas = 100;
    fleet.desired = 100;
    fleet.run(60.0, |_| Clients::Open(60.0));
    for (place, replica) in fleet.replicas.iter_mut().enumerate().take(unlike) {
        replica.told_law = fleet.law.slowed(1.3 + 0.01 * place as f64);
    }
    let seen = fleet.observe();
    assert_eq!(seen.replicas.len(), 100);
    let mut memory = fleet.memory.clone();
    let mut times: Vec<f64> = (1..=150)
        .map(|look| {
            let later = PERIOD * f64::from(look);
            let mut observation = Observation {
                now: seen.now + later,
                ..seen.clone()
            };
            for sample in observation.replicas.iter_mut().flat_map(|r| &mut r.sample) {
                sample.at += later;
                sample.counters.requests_received += 1.2 * f64::from(look);
                sample.counters.prompt_tokens_received += 1200.0 * f64::from(look);
            }
            let start = Instant::now();
            let decision = decide(&observation, &fleet.objectives, &fleet.limits, &mut memory);
            let took = start.elapsed();
            assert!(decision.replicas >= 100);
            took.as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 9 / 10])
}

#[test]
fn a_hundred_replicas() {
    for unlike in [0, 60] {
        let (took, slow) = milliseconds(unlike);
        println!(
            "decide() for 100 replicas, {unlike} of them unlike the rest: {took:.2} ms, one in ten \
             {slow:.2} ms"
        );
    }
}

#[test]
fn a_thousand_services() {
    const SERVICES: usize = 1000;
    let mut fleet = Fleet::on_t4(20, 75.0, CHAT);
    fleet.limits.min_replicas = 5;
    fleet.desired = 5;
    fleet.run(120.0, |_| Clients::Open(5.0));
    let seen = fleet.observe();
    assert_eq!(seen.replicas.len(), 5);
    let mut memories = vec![fleet.memory.clone(); SERVICES];
    let mut observation = seen.clone();
    let mut rounds: Vec<f64> = (1..=10)
        .map(|_| {
            observation.now += PERIOD;
            for sample in observation.replicas.iter_mut().flat_map(|r| &mut r.sample) {
                sample.at += PERIOD;
                sample.counters.requests_received += PERIOD;
                sample.counters.prompt_tokens_received += 1000.0 * PERIOD;
            }
            let start = Instant::now();
            for memory in &mut memories {
                decide(&observation, &fleet.objectives, &fleet.limits, memory);
            }
            start.elapsed().as_secs_f64()
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    println!(
        "decide() for 1,000 services of 5 replicas: {:.3} s a round of {PERIOD} s",
        rounds[rounds.len() / 2]
    );
}
