//! What goes wrong around the policy.

use stoker_autoscaler::{Memory, ReasonCode};

use crate::fleet::{Clients, Fleet, Lengths};

const CHAT: Lengths = Lengths {
    prompt: 1000.0,
    output: 130.0,
    random: true,
};

/// A fleet that has settled under 4.5 requests a second.
fn settled(stabilization: f64) -> Fleet {
    let mut fleet = Fleet::on_t4(8, stabilization, CHAT);
    fleet.run(240.0, |_| Clients::Open(4.5));
    assert!(fleet.last().ready >= 3, "{:?}", fleet.last());
    fleet
}

#[test]
fn lost_samples_never_scale_down() {
    // All of them, one replica's, and every second round.
    let losses: [fn(f64, &str) -> bool; 3] = [
        |_, _| true,
        |_, id| id == "pod-1",
        |t, _| (t / 2.0).floor() % 2.0 == 0.0,
    ];
    for (i, lost) in losses.into_iter().enumerate() {
        let mut fleet = settled(30.0);
        let before = fleet.last().decision.replicas;
        fleet.lost = Box::new(lost);
        let from = fleet.history.len();
        // The load falls while nobody can tell for sure.
        fleet.run(200.0, |_| Clients::Open(0.2));
        // Where a sample is missing now and then, the rounds that have all may decide.
        let lowered = fleet.history[from + 1..]
            .iter()
            .any(|m| m.decision.replicas < before);
        assert_eq!(lowered, i == 2, "{:?}", fleet.last());
        let code = fleet.last().decision.reason.code;
        assert!(i != 0 || code == ReasonCode::NoData, "{code:?}");
        fleet.lost = Box::new(|_, _| false);
        fleet.run(200.0, |_| Clients::Open(0.2));
        assert!(fleet.last().decision.replicas < before);
    }
}

#[test]
fn pods_without_a_node_are_not_ordered_again_and_the_reason_says_so() {
    let mut fleet = Fleet::on_t4(8, 60.0, CHAT);
    fleet.accelerators = 2;
    fleet.run(20.0, |_| Clients::Open(0.5));
    fleet.run(200.0, |_| Clients::Open(4.0));
    let last = fleet.last().clone();
    let reason = &last.decision.reason;
    assert_eq!(reason.code, ReasonCode::WaitingForAccelerator, "{reason:?}");
    assert!(reason.message.contains("dials"), "{reason:?}");
    assert_eq!(last.ready, 2);
    let stuck = fleet.history.iter().filter(|m| m.unschedulable > 0);
    let orders: Vec<u32> = stuck.map(|m| m.decision.replicas).collect();
    assert!(orders.windows(2).all(|w| w[1] <= w[0]), "{orders:?}");

    fleet.accelerators = 8;
    fleet.run(240.0, |_| Clients::Open(4.0));
    let last = fleet.last().clone();
    assert!(last.ready >= 3 && last.unschedulable == 0, "{last:?}");
    assert!(fleet.reversals() <= 1, "{} reversals", fleet.reversals());
}

#[test]
fn a_server_that_restarts_is_neither_negative_nor_endless_demand() {
    let mut fleet = settled(60.0);
    let before = fleet.last().decision.replicas;
    let from = fleet.history.len();
    for _ in 0..4 {
        fleet.replicas[0].restart();
        fleet.run(40.0, |_| Clients::Open(4.5));
    }
    for moment in &fleet.history[from..] {
        let load = moment.decision.load.unwrap();
        assert!((1.0..=8.0).contains(&load.requests_per_second), "{load:?}");
        let replicas = moment.decision.replicas;
        assert!((before - 1..=before + 2).contains(&replicas), "{moment:?}");
    }
}

#[test]
fn an_operator_that_restarts_every_minute_decides_the_same() {
    for stored in [false, true] {
        let mut fleet = settled(60.0);
        let (before, dials) = (fleet.last().decision.replicas, fleet.last().decision.dials);
        let from = fleet.history.len();
        for _ in 0..6 {
            fleet.memory = if stored {
                let json = serde_json::to_string(&fleet.memory).unwrap();
                serde_json::from_str(&json).unwrap()
            } else {
                Memory::seeded(fleet.desired, Some(dials), fleet.t)
            };
            fleet.run(60.0, |_| Clients::Open(4.5));
        }
        for moment in &fleet.history[from..] {
            let (now, was) = (moment.decision.dials, dials);
            assert!(now.max_num_seqs >= was.max_num_seqs / 2, "{moment:?}");
            assert!(
                (now.max_num_batched_tokens as f64 / f64::from(was.max_num_batched_tokens) - 1.0)
                    .abs()
                    < 0.35,
                "{moment:?}"
            );
            let replicas = moment.decision.replicas;
            assert!((before - 1..=before + 2).contains(&replicas), "{moment:?}");
        }
    }
}

#[test]
fn a_slow_replica_gets_dials_of_its_own() {
    let mut fleet = settled(60.0);
    let slow = fleet.law.slowed(2.0);
    fleet.replicas[0].law = slow;
    fleet.replicas[0].told_law = slow;
    fleet.run(60.0, |_| Clients::Open(4.5));
    let decision = fleet.last().decision.clone();
    let own = decision.overrides.get("pod-1").unwrap();
    assert!(
        own.max_num_batched_tokens < decision.dials.max_num_batched_tokens,
        "{decision:?}"
    );
    assert_eq!(decision.overrides.len(), 1);
}

#[test]
fn a_law_that_is_not_trusted_moves_no_dial() {
    let mut fleet = Fleet::on_t4(4, 60.0, CHAT);
    for _ in 0..20 {
        let mut observation = fleet.observe();
        observation.now += 1e-3;
        for replica in &mut observation.replicas {
            if let Some(sample) = &mut replica.sample {
                sample.law_confidence = 0.2;
            }
        }
        let mut memory = Memory::default();
        let decision =
            stoker_autoscaler::decide(&observation, &fleet.objectives, &fleet.limits, &mut memory);
        assert_eq!(decision.dials.max_num_seqs, 8);
        assert_eq!(decision.dials.max_num_batched_tokens, 2048);
        fleet.run(2.0, |_| Clients::Open(1.0));
    }
}

#[test]
fn a_deployment_that_is_slow_to_follow_is_not_asked_to_and_fro() {
    let mut fleet = settled(30.0);
    let mut memory = fleet.memory.clone();
    fleet.run(60.0, |_| Clients::Open(0.3));
    let mut asked = Vec::new();
    // The observation keeps saying what was asked for long ago.
    for i in 0..10 {
        let mut observation = fleet.observe();
        observation.now += f64::from(i) * 2.0;
        for replica in &mut observation.replicas {
            if let Some(sample) = &mut replica.sample {
                sample.at = observation.now;
            }
        }
        let decision =
            stoker_autoscaler::decide(&observation, &fleet.objectives, &fleet.limits, &mut memory);
        asked.push(decision.replicas);
    }
    assert!(asked.windows(2).all(|w| w[1] <= w[0]), "{asked:?}");
}
