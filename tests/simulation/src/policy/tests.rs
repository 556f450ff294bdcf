//! Each peer follows its rules.

use stoker_autoscaler::{Dials, Phase};

use super::*;
use crate::fleet::{Gauge, ReplicaView, Setup, View, simulate};
use crate::replica::{Backend, Tally};
use crate::trace::{Mix, Shape};

const DIALS: Dials = Dials {
    max_num_seqs: 32,
    max_num_batched_tokens: 2048,
};

/// A fleet whose replicas all have so much to do.
fn view(now: f64, replicas: u32, running: u32, waiting: u32, kv_tokens: u64) -> View {
    let device = Setup::study().device;
    let replica = |id| ReplicaView {
        id,
        phase: Phase::Ready,
        created: 0.0,
        ready_at: 0.0,
        gauge: Some(Gauge {
            at: now,
            running,
            waiting,
            kv_tokens,
            kv_capacity: 60_000,
            waiting_prompt_tokens: 0,
            dials: DIALS,
            ceilings: DIALS,
            law: device.profile.law,
            law_confidence: 0.9,
            tally: Tally::default(),
        }),
    };
    View {
        queue: None,
        now,
        desired: replicas,
        dials: DIALS,
        min_replicas: 1,
        max_replicas: 40,
        held: 0,
        replicas: (0..replicas).map(replica).collect(),
    }
}

/// Replicas after each look; the fleet follows at once.
fn follow(
    policy: &mut dyn Policy,
    seconds: f64,
    load: impl Fn(f64) -> (u32, u32, u64),
) -> Vec<u32> {
    let mut replicas = 4;
    let mut all = Vec::new();
    let mut now = 0.0;
    while now < seconds {
        let (running, waiting, kv) = load(now);
        replicas = policy
            .decide(&view(now, replicas, running, waiting, kv))
            .replicas;
        all.push(replicas);
        now += policy.period();
    }
    all
}

#[test]
fn kpa_takes_the_mean_panics_and_calms_down() {
    let mut kpa = Peer::Kpa.policy(10.0, DIALS);
    // 4 x 5 requests: two replicas; at most half at once.
    let replicas = kpa.decide(&view(0.0, 4, 5, 0, 0)).replicas;
    assert_eq!(replicas, 2);
    // A jump to 100 requests: 6 s of it are enough for panic, which never goes down.
    let mut kpa = Peer::Kpa.policy(10.0, DIALS);
    for step in 0..30 {
        kpa.decide(&view(2.0 * f64::from(step), 4, 10, 0, 0));
    }
    let mut last = 4;
    for step in 30..33 {
        let next = kpa
            .decide(&view(2.0 * f64::from(step), 4, 25, 0, 0))
            .replicas;
        assert!(next >= last);
        last = next;
    }
    assert_eq!(last, 10);
    let held = kpa.decide(&view(70.0, 10, 2, 0, 0)).replicas;
    assert_eq!(held, 10);
    let later = follow(kpa.as_mut(), 0.0, |_| (0, 0, 0));
    assert!(later.is_empty());
    let calm = kpa.decide(&view(140.0, 10, 2, 0, 0)).replicas;
    assert!(calm < 10, "{calm}");
}

#[test]
fn hpa_goes_up_at_once_and_down_after_300_s() {
    let mut hpa = Peer::HpaInflight.policy(10.0, DIALS);
    assert_eq!(hpa.decide(&view(0.0, 4, 10, 0, 0)).replicas, 4);
    assert_eq!(
        hpa.decide(&view(15.0, 4, 9, 0, 0)).replicas,
        4,
        "within 10 %"
    );
    assert_eq!(hpa.decide(&view(30.0, 4, 15, 0, 0)).replicas, 6);
    assert_eq!(
        hpa.decide(&view(45.0, 6, 32, 8, 0)).replicas,
        12,
        "twice as many at most"
    );
    assert_eq!(hpa.decide(&view(60.0, 12, 1, 0, 0)).replicas, 12);
    assert_eq!(hpa.decide(&view(330.0, 12, 1, 0, 0)).replicas, 12);
    assert_eq!(hpa.decide(&view(361.0, 12, 1, 0, 0)).replicas, 2);
    let mut idle = Peer::HpaInflight.policy(10.0, DIALS);
    let steps = follow(idle.as_mut(), 400.0, |_| (0, 0, 0));
    assert_eq!((steps[19], steps[20]), (4, 0), "nothing to do for 300 s");
    let mut waiting = Peer::HpaWaiting.policy(5.0, DIALS);
    assert_eq!(waiting.decide(&view(0.0, 4, 32, 0, 0)).replicas, 4);
    assert_eq!(waiting.decide(&view(15.0, 4, 32, 10, 0)).replicas, 8);
}

#[test]
fn production_stack_moves_by_one_a_minute() {
    let mut stack = Peer::ProductionStack.policy(5.0, DIALS);
    let up = follow(stack.as_mut(), 180.0, |_| (30, 0, 0));
    assert_eq!(up.last(), Some(&7));
    assert!(up.windows(2).all(|w| w[1] - w[0] <= 1));
}

#[test]
fn kubeai_goes_down_after_three_lower_results() {
    let mut kubeai = Peer::KubeAi.policy(10.0, DIALS);
    let steps = follow(kubeai.as_mut(), 40.0, |_| (2, 0, 0));
    assert_eq!(steps[..3], [4, 4, 1]);
}

#[test]
fn ray_serve_waits_before_either_way() {
    let mut ray = Peer::RayServe.policy(2.0, DIALS);
    let up = follow(ray.as_mut(), 45.0, |_| (4, 0, 0));
    assert_eq!(up[..6], [4; 6]);
    assert_eq!(up[6], 8);
    let mut ray = Peer::RayServe.policy(10.0, DIALS);
    let down = follow(ray.as_mut(), 700.0, |_| (2, 0, 0));
    assert_eq!(down[119], 4);
    assert_eq!(down[120], 1);
}

#[test]
fn aibrix_at_most_doubles_and_cools_down_before_it_shrinks() {
    let mut apa = Peer::AibrixApa.policy(0.1, DIALS);
    assert_eq!(apa.decide(&view(0.0, 4, 20, 0, 30_000)).replicas, 8);
    let mut apa = Peer::AibrixApa.policy(0.5, DIALS);
    let mut look = |now, replicas| apa.decide(&view(now, replicas, 1, 0, 3_000)).replicas;
    assert_eq!(look(0.0, 4), 4, "as many were wanted before");
    assert_eq!(look(290.0, 4), 4, "cooling down");
    assert_eq!(look(300.0, 4), 2, "half at most");
    assert_eq!(look(310.0, 2), 2);
    assert_eq!(look(610.0, 2), 1);
}

#[test]
fn wva_orders_by_spare_capacity_and_not_while_pods_come() {
    let mut v1 = Peer::WvaV1.policy(5.1, DIALS);
    assert_eq!(
        v1.decide(&view(0.0, 4, 20, 0, 45_000)).replicas,
        5,
        "KV is short"
    );
    assert_eq!(
        v1.decide(&view(15.0, 4, 20, 3, 10_000)).replicas,
        5,
        "the queue is long"
    );
    assert_eq!(
        v1.decide(&view(30.0, 4, 20, 0, 38_000)).replicas,
        4,
        "not enough for three"
    );
    assert_eq!(v1.decide(&view(45.0, 4, 20, 0, 20_000)).replicas, 3);
    let mut coming = view(60.0, 5, 20, 0, 45_000);
    if let Some(pod) = coming.replicas.last_mut() {
        (pod.phase, pod.gauge) = (Phase::Starting, None);
    }
    assert_eq!(v1.decide(&coming).replicas, 5);
}

#[test]
fn every_peer_holds_a_small_load_and_stays_within_limits() {
    let trace = Shape::Steady
        .generate(2.0, &Mix::fixed(800, 100), 1)
        .first(900.0);
    for peer in Peer::ALL {
        let parameter = peer.default_parameter(32).unwrap_or(3.0);
        let setup = Setup::study()
            .with_backend(Backend::Surrogate)
            .with_replicas(3);
        let outcome = simulate(&setup, &trace, peer.policy(parameter, DIALS).as_mut());
        let most = outcome.timeline.iter().map(|p| p.desired).max();
        assert!(most <= Some(40), "{peer:?}");
        assert_eq!(outcome.ledger.flights.len(), trace.requests.len());
        assert!(peer.grid().len() >= 7);
    }
}
