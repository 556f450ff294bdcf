//! What a decision costs. `cargo test --release -p stoker-autoscaler --test simulated speed -- --nocapture`
//! prints it.

use std::time::Instant;

use stoker_autoscaler::{Observation, decide};

use crate::fleet::{Clients, Fleet, Lengths, PERIOD};

const CHAT: Lengths = Lengths {
    prompt: 1000.0,
    output: 130.0,
    random: true,
};

/// Median milliseconds of a decision over a hundred replicas, of which `unlike` are slower than the rest.
fn milliseconds(unlike: usize) -> f64 {
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
    times[times.len() / 2]
}

#[test]
fn a_hundred_replicas_are_decided_on_in_about_a_millisecond() {
    for unlike in [0, 60] {
        let took = milliseconds(unlike);
        println!("decide() for 100 replicas, {unlike} of them unlike the rest: {took:.2} ms");
        // Machines that run tests are shared: the figure is what is printed.
        assert!(took < 10.0, "{took} ms");
    }
}
