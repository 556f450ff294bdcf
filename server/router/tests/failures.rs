//! Replicas that die, drain, hang or refuse: requests go elsewhere or end readably.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{Behaviour, Replica, TestRouter, body, until};
use hyper::StatusCode;
use serde_json::json;

/// A bad and a good replica; the bad one gets the first request.
async fn pair(
    behaviour: Behaviour,
) -> (TestRouter, std::sync::Arc<Replica>, std::sync::Arc<Replica>) {
    let router = TestRouter::start().await;
    let (bad, good) = (Replica::start("bad").await, Replica::start("good").await);
    bad.behave(behaviour);
    router.push(&[bad.entry(1_000_000), good.entry(1)]);
    // Fills the good one a little, so that the bad one is preferred.
    (router, bad, good)
}

#[tokio::test]
async fn what_fails_before_the_first_byte_goes_elsewhere() {
    for behaviour in [
        Behaviour::DieBeforeFirstByte,
        Behaviour::DieAfterHead,
        Behaviour::Drain,
        Behaviour::Full,
    ] {
        for stream in [true, false] {
            let (router, bad, good) = pair(behaviour).await;
            for _ in 0..10 {
                let answer = router.complete(body(3, stream)).await;
                assert_eq!(
                    answer.status,
                    StatusCode::OK,
                    "{behaviour:?} {}",
                    answer.text
                );
                assert!(answer.whole);
                if stream {
                    assert_eq!(answer.events(), (vec![0, 1, 2], true, None));
                } else {
                    assert_eq!(answer.json()["id"], "good");
                }
            }
            assert!(bad.requests.load(SeqCst) > 0, "{behaviour:?}: never tried");
            assert_eq!(good.requests.load(SeqCst), 10);
            assert!(router.metric("stoker_router_retries_total").await > 0.0);
        }
    }
}

#[tokio::test]
async fn a_dead_replica_is_ejected_and_comes_back() {
    let router = TestRouter::start().await;
    let (first, second) = (
        Replica::start("first").await,
        Replica::start("second").await,
    );
    router.push(&[first.entry(1), second.entry(1)]);
    first.kill();
    for _ in 0..20 {
        assert_eq!(router.complete(body(1, false)).await.status, StatusCode::OK);
    }
    assert!(router.metric("stoker_router_ejections_total").await >= 1.0);
    let address = first.address;
    drop(first);
    let again = Replica::start_at("first", address).await;
    for _ in 0..500 {
        router.complete(body(1, false)).await;
        if again.requests.load(SeqCst) > 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the replica that came back got nothing");
}

#[tokio::test]
async fn a_cut_stream_ends_with_an_error_event() {
    for (behaviour, count) in [(Behaviour::DieAfter(3), 3), (Behaviour::EndEarly(2), 2)] {
        let (router, bad, good) = pair(behaviour).await;
        let answer = router.complete(body(10, true)).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.whole, "the stream itself must end properly");
        let (tokens, done, error) = answer.events();
        assert_eq!(tokens, (0..count).collect::<Vec<_>>());
        assert!(!done);
        assert!(
            error.unwrap().contains("failed in the middle"),
            "{behaviour:?}"
        );
        assert_eq!(bad.requests.load(SeqCst), 1);
        assert_eq!(
            good.requests.load(SeqCst),
            0,
            "begun streams are never repeated"
        );
        assert!(router.metric("stoker_router_broken_streams_total").await >= 1.0);
    }
}

#[tokio::test]
async fn a_short_answer_cut_in_the_middle_is_asked_for_again() {
    let (router, bad, good) = pair(Behaviour::DieAfter(1)).await;
    let answer = router.complete(body(500, false)).await;
    assert!(answer.whole);
    assert_eq!(answer.json()["id"], "good");
    assert_eq!(
        (bad.requests.load(SeqCst), good.requests.load(SeqCst)),
        (1, 1)
    );
}

#[tokio::test]
async fn a_replica_that_says_nothing_is_left() {
    let (router, _bad, good) = pair(Behaviour::HangAll).await;
    let answer = router.complete(body(3, true)).await;
    assert_eq!(answer.events(), (vec![0, 1, 2], true, None));
    assert_eq!(good.requests.load(SeqCst), 1);
    assert!(
        router
            .metric("stoker_router_ejections_total{reason=\"unresponsive\"")
            .await
            >= 1.0
    );
}

#[tokio::test]
async fn the_first_byte_has_a_limit() {
    let mut config = common::config();
    config.timeouts.first_byte = Duration::from_millis(300);
    let router = TestRouter::with(config).await;
    let (bad, good) = (Replica::start("bad").await, Replica::start("good").await);
    bad.behave(Behaviour::Hang);
    router.push(&[bad.entry(1_000_000), good.entry(1)]);
    let answer = router.complete(body(3, false)).await;
    assert_eq!(answer.json()["id"], "good");
    until("the hanging request is cancelled", || {
        bad.cancelled.load(SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_falls_silent_ends() {
    let mut config = common::config();
    config.timeouts.stream_idle = Duration::from_millis(200);
    let router = TestRouter::with(config).await;
    let slow = Replica::start("slow").await;
    slow.pace(100_000);
    router.push(&[slow.entry(1)]);
    let (tokens, done, error) = router.complete(body(3, true)).await.events();
    assert_eq!((tokens, done), (vec![0], false));
    assert!(error.unwrap().contains("sent nothing"));
    until("the replica is told", || slow.cancelled.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn a_request_that_kills_replicas_does_not_kill_all() {
    let router = TestRouter::start().await;
    let mut replicas = Vec::new();
    for number in 0..6 {
        let replica = Replica::start(&format!("r{number}")).await;
        replica.behave(Behaviour::DieBeforeFirstByte);
        replicas.push(replica);
    }
    let entries: Vec<_> = replicas.iter().map(|replica| replica.entry(1)).collect();
    router.push(&entries);
    let answer = router.complete(body(3, false)).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert!(
        answer.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("3 attempts")
    );
    let tried = replicas.iter().filter(|r| r.requests.load(SeqCst) > 0);
    assert_eq!(tried.count(), 3);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_place() {
    for stream in [true, false] {
        let router = TestRouter::start().await;
        let replica = Replica::start("only").await;
        replica.pace(if stream { 50 } else { 0 });
        if !stream {
            replica.behave(Behaviour::Hang);
        }
        router.push(&[replica.entry(1)]);
        let address = router.address;
        let client = tokio::spawn(async move {
            common::post(
                address,
                "svc.ns",
                "/v1/completions",
                &body(1000, stream),
                &[],
            )
            .await
        });
        until("the request runs", || replica.requests.load(SeqCst) == 1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.abort();
        until("the replica is told", || {
            replica.cancelled.load(SeqCst) == 1
        })
        .await;
        let load = || router.router.routes().services[0].load().replicas[0].in_flight();
        until("its place is free", || load() == 0).await;
        let tokens = router.router.routes().services[0].load().replicas[0].tokens();
        assert_eq!(tokens, 0);
    }
}

#[tokio::test]
async fn all_replicas_gone_ends_with_a_readable_error() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    let entry = replica.entry(1);
    replica.kill();
    router.push_with(&[entry], json!({"cold_start_deadline_seconds": 0.5}));
    let answer = router.complete(body(3, false)).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{}", answer.text);
    assert!(
        answer.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("no connection")
    );
    let (tokens, done, error) = router.complete(body(3, true)).await.events();
    assert_eq!((tokens.len(), done), (0, false));
    assert!(error.is_some());
}
