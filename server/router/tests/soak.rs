//! Random deaths, drains, weights and scale changes under load: every request ends with an
//! answer or a readable error, and no token comes twice.
//!
//! SOAK_SECONDS (default 20) and SOAK_SEED (default: random, printed) change the run.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{Behaviour, Replica, TestRouter, body, post};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

const CLIENTS: u64 = 24;

#[derive(Default)]
struct Counts {
    complete: AtomicU64,
    broken_streams: AtomicU64,
    errors: AtomicU64,
    kills: AtomicU64,
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_and_no_token_comes_twice() {
    let seconds = setting("SOAK_SECONDS", 20);
    let seed = setting("SOAK_SEED", rand::random());
    println!("SOAK_SEED={seed} SOAK_SECONDS={seconds}");
    let router = Arc::new(TestRouter::start().await);
    let counts = Arc::new(Counts::default());
    let over = Arc::new(AtomicBool::new(false));
    let mut random = StdRng::seed_from_u64(seed);
    let mut fleet = vec![Replica::start("r0").await, Replica::start("r1").await];
    push(&router, &fleet, &mut random);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let seed = seed.wrapping_add(number);
            tokio::spawn(client(
                Arc::clone(&router),
                Arc::clone(&counts),
                Arc::clone(&over),
                seed,
            ))
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut number = 2;
    while Instant::now() < end {
        match random.random_range(0..10) {
            // A new pod.
            0..=2 if fleet.len() < 6 => {
                let replica = Replica::start(&format!("r{number}")).await;
                number += 1;
                replica.pace(random.random_range(1..6));
                fleet.push(replica);
                push(&router, &fleet, &mut random);
            }
            // kill -9; the operator notices later.
            3..=5 => {
                let victim = fleet.swap_remove(random.random_range(0..fleet.len()));
                victim.kill();
                counts.kills.fetch_add(1, SeqCst);
                if fleet.is_empty() {
                    fleet.push(Replica::start(&format!("r{number}")).await);
                    number += 1;
                }
                tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
                push(&router, &fleet, &mut random);
            }
            // Drains, refuses or hangs for a while, then answers again.
            6..=7 => {
                let victim = &fleet[random.random_range(0..fleet.len())];
                let behaviours = [
                    Behaviour::Drain,
                    Behaviour::Full,
                    Behaviour::DieAfterHead,
                    Behaviour::DieBeforeFirstByte,
                    Behaviour::DieAfter(2),
                    Behaviour::HangAll,
                ];
                victim.behave(behaviours[random.random_range(0..behaviours.len())]);
                let victim = Arc::clone(victim);
                let wait = random.random_range(50..400);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                    victim.behave(Behaviour::Answer);
                });
            }
            _ => push(&router, &fleet, &mut random),
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(20..150))).await;
    }
    // Everyone well again, so that what waits can finish.
    for replica in &fleet {
        replica.behave(Behaviour::Answer);
    }
    let entries: Vec<Value> = fleet.iter().map(|replica| replica.entry(1)).collect();
    router.push(&entries);
    over.store(true, SeqCst);
    for client in clients {
        tokio::time::timeout(Duration::from_secs(60), client)
            .await
            .unwrap()
            .unwrap();
    }
    let load = router.router.routes().services[0].load();
    assert_eq!(load.queue_length, 0);
    for replica in &load.replicas {
        assert_eq!(
            (replica.in_flight(), replica.tokens()),
            (0, 0),
            "a place was never freed"
        );
    }
    let count = |counter: &AtomicU64| counter.load(SeqCst);
    println!(
        "complete {}, streams with an error event {}, other errors {}, kills {}",
        count(&counts.complete),
        count(&counts.broken_streams),
        count(&counts.errors),
        count(&counts.kills)
    );
    assert!(count(&counts.complete) > 100 * seconds.min(20) / 20);
    // Only requests that broke three replicas in turn may fail before their first byte.
    assert!(count(&counts.errors) * 50 <= count(&counts.complete));
}

fn push(router: &TestRouter, fleet: &[Arc<Replica>], random: &mut StdRng) {
    let mut entries: Vec<Value> = fleet
        .iter()
        .map(|replica| replica.entry(u32::from(random.random_bool(0.85))))
        .collect();
    if random.random_bool(0.1) {
        entries.clear();
    }
    router.push(&entries);
}

async fn client(router: Arc<TestRouter>, counts: Arc<Counts>, over: Arc<AtomicBool>, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    while !over.load(SeqCst) {
        let tokens = random.random_range(1..30);
        let stream = random.random_bool(0.7);
        let body = body(tokens, stream);
        let asked = post(router.address, "svc.ns", "/v1/completions", &body, &[]);
        if random.random_bool(0.03) {
            // Gives up.
            let _ = tokio::time::timeout(Duration::from_millis(20), asked).await;
            continue;
        }
        let answer = asked.await;
        assert!(answer.whole, "a silent cut: {answer:?}");
        if !stream || answer.status != 200 {
            let value = answer.json();
            if answer.status == 200 {
                assert_eq!(value["usage"]["completion_tokens"], tokens);
                counts.complete.fetch_add(1, SeqCst);
            } else {
                assert!(value["error"]["message"].is_string(), "{answer:?}");
                counts.errors.fetch_add(1, SeqCst);
            }
            continue;
        }
        let (got, done, error) = answer.events();
        let expected: Vec<u64> = (0..got.len() as u64).collect();
        assert_eq!(got, expected, "a token is missing or came twice");
        assert_eq!(
            done,
            error.is_none(),
            "neither done nor an error: {answer:?}"
        );
        if done {
            assert_eq!(got.len(), tokens as usize);
            counts.complete.fetch_add(1, SeqCst);
        } else {
            counts.broken_streams.fetch_add(1, SeqCst);
        }
    }
}
