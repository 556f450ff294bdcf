//! Where requests go, who waits, and what the operator and the client are told of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{Replica, TestRouter, body, get, post, read, until};
use http_body_util::BodyExt;
use hyper::StatusCode;
use serde_json::{Value, json};

#[tokio::test]
async fn services_are_found_by_host_or_model() {
    let router = TestRouter::start().await;
    let early = router.complete(body(1, false)).await;
    assert_eq!(early.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(router.metrics, "x", "/ready").await.status, 503);
    let (a, b) = (Replica::start("a").await, Replica::start("b").await);
    let table = json!({"version": 1, "services": [
        {"namespace": "ns", "name": "a", "models": ["m", "only-a"], "hosts": ["a.ns"],
         "replicas": [a.entry(1)]},
        {"namespace": "ns", "name": "b", "models": ["m"], "hosts": ["b.ns", "198.18.0.7"],
         "replicas": [b.entry(1)]}]});
    let put = hyper::Request::put("/control/v1/table").header("host", "x");
    let put = put
        .body(http_body_util::Full::new(table.to_string().into()))
        .unwrap();
    let answer = read(common::send(router.control, put).await.unwrap()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.json()["replicas"], 2);
    assert_eq!(get(router.metrics, "x", "/ready").await.status, 200);

    let ask = |host: &'static str, model: &'static str| async move {
        let body = json!({"model": model, "prompt": "x", "max_tokens": 1});
        post(router.address, host, "/v1/completions", &body, &[]).await
    };
    assert_eq!(ask("A.NS:8000", "m").await.json()["id"], "a");
    assert_eq!(ask("198.18.0.7", "m").await.json()["id"], "b");
    assert_eq!(ask("router", "only-a").await.json()["id"], "a");
    for (model, says) in [("m", "a.ns, b.ns"), ("other", "m, only-a")] {
        let answer = ask("router", model).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        let error = answer.json()["error"].clone();
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        assert_eq!(error["code"], "service_not_found");
    }
    let models = get(router.address, "b.ns", "/v1/models").await.json();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    let models = get(router.address, "router", "/v1/models").await.json();
    assert_eq!(models["data"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_replica_never_gets_more_than_its_cap_and_a_short_buffer() {
    let router = TestRouter::start().await;
    let replicas = [Replica::start("a").await, Replica::start("b").await];
    for replica in &replicas {
        replica.max_num_seqs.store(4, SeqCst);
    }
    router.push(&[replicas[0].entry(1), replicas[1].entry(1)]);
    let asked = (0..100).map(|_| router.complete(body(5, true)));
    let answers = futures_join(asked).await;
    for answer in answers {
        assert_eq!(answer.events(), ((0..5).collect(), true, None));
    }
    for replica in &replicas {
        let most = replica.most_running.load(SeqCst);
        assert!((4..=5).contains(&most), "{most}");
        let share = replica.requests.load(SeqCst);
        assert!((35..=65).contains(&share), "{share}");
    }
    assert!(router.metric("stoker_router_queue_seconds_count").await >= 100.0);
}

#[tokio::test]
async fn a_new_replica_takes_from_the_queue_at_once() {
    let router = TestRouter::start().await;
    let (old, new) = (Replica::start("old").await, Replica::start("new").await);
    old.max_num_seqs.store(1, SeqCst);
    old.pace(100);
    router.push(&[old.entry(1)]);
    let asked: Vec<_> = (0..20)
        .map(|_| {
            let address = router.address;
            tokio::spawn(async move {
                post(address, "svc.ns", "/v1/completions", &body(20, true), &[]).await
            })
        })
        .collect();
    let queue = || router.router.routes().services[0].load().queue_length;
    until("the queue is long", || queue() == 18).await;
    router.push(&[old.entry(1), new.entry(1)]);
    until("the new one has its fill", || new.running.load(SeqCst) >= 8).await;
    assert_eq!(old.running.load(SeqCst), 2);
    for answer in asked {
        assert_eq!(answer.await.unwrap().events().0.len(), 20);
    }
}

#[tokio::test]
async fn weight_zero_gets_no_new_work_and_finishes_what_it_has() {
    let router = TestRouter::start().await;
    let (a, b) = (Replica::start("a").await, Replica::start("b").await);
    a.pace(20);
    router.push(&[a.entry(1)]);
    let running = router.open(body(20, true)).await;
    router.push(&[a.entry(0), b.entry(1)]);
    for _ in 0..10 {
        assert_eq!(router.complete(body(1, false)).await.json()["id"], "b");
    }
    assert_eq!(
        read(running).await.events(),
        ((0..20).collect(), true, None)
    );
    // Gone from the table altogether: the same.
    let running = router.open(body(200, true)).await;
    router.push(&[a.entry(1)]);
    assert_eq!(read(running).await.events().0.len(), 200);
    until("the way back is open", || a.requests.load(SeqCst) == 1).await;
    assert_eq!(router.complete(body(1, false)).await.json()["id"], "a");
}

#[tokio::test]
async fn waiting_requests_go_by_priority_then_arrival() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    replica.max_num_seqs.store(1, SeqCst);
    router.push(&[replica.entry(1)]);
    replica.pace(300);
    let mut asked = Vec::new();
    let arrivals = [
        ("fill", 0),
        ("fill", 0),
        ("c", 0),
        ("d", 0),
        ("z", 9),
        ("a", -5),
        ("b", -5),
    ];
    for (count, (user, priority)) in arrivals.into_iter().enumerate() {
        let mut body = body(1, false);
        body["priority"] = priority.into();
        body["user"] = user.into();
        let address = router.address;
        asked.push(tokio::spawn(async move {
            post(address, "svc.ns", "/v1/completions", &body, &[]).await
        }));
        let load = || {
            let load = router.router.routes().services[0].load();
            load.queue_length + load.replicas[0].in_flight() as usize
        };
        until("it is there", || load() == count + 1).await;
    }
    // One place from now on, so that the order is strict.
    for task in asked {
        assert_eq!(task.await.unwrap().status, 200);
    }
    let order = replica.order.lock().clone();
    assert_eq!(
        order[2..].iter().map(String::as_str).collect::<Vec<_>>(),
        ["a", "b", "c", "d", "z"]
    );
}

#[tokio::test]
async fn a_sleeping_service_is_woken_and_its_requests_wait() {
    let router = TestRouter::start().await;
    router.push(&[]);
    let request = hyper::Request::get("/control/v1/watch").header("host", "x");
    let request = request.body(http_body_util::Full::new("".into())).unwrap();
    let mut watch = common::send(router.control, request)
        .await
        .unwrap()
        .into_body();
    let first = watch.frame().await.unwrap().unwrap().into_data().unwrap();
    let first: Value = serde_json::from_slice(&first).unwrap();
    assert_eq!(
        (&first["event"], &first["services"][0]["usable"]),
        (&json!("queues"), &json!(false))
    );

    let address = router.address;
    let asked: Vec<_> = (0..100)
        .map(|number| {
            tokio::spawn(async move {
                let body = body(3, number % 2 == 0);
                post(address, "svc.ns", "/v1/completions", &body, &[]).await
            })
        })
        .collect();
    let mut woken = 0;
    let waiting = loop {
        let line = watch.frame().await.unwrap().unwrap().into_data().unwrap();
        let line: Value = serde_json::from_slice(&line).unwrap();
        if line["event"] == "wake" {
            assert_eq!(
                (&line["namespace"], &line["name"]),
                (&json!("ns"), &json!("svc"))
            );
            woken += 1;
            continue;
        }
        let service = line["services"][0].clone();
        if service["queue_length"] == 100 {
            break service;
        }
    };
    assert_eq!(woken, 1);
    assert!(waiting["queued_prompt_tokens"].as_u64().unwrap() >= 100);
    assert!(waiting["requests_per_second"].as_f64().unwrap() > 10.0);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let replica = Replica::start("first").await;
    router.push(&[replica.entry(1)]);
    for (number, answer) in asked.into_iter().enumerate() {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status, 200);
        if number % 2 == 0 {
            assert!(
                answer.text.starts_with(": waiting for a replica"),
                "{}",
                answer.text
            );
            assert_eq!(answer.events(), (vec![0, 1, 2], true, None));
        } else {
            let cold: u64 = answer.headers["x-stoker-cold-start-ms"]
                .to_str()
                .unwrap()
                .parse()
                .unwrap();
            assert!(cold >= 300);
        }
    }
    assert_eq!(
        router
            .metric("stoker_router_cold_start_seconds_count")
            .await,
        1.0
    );
}

#[tokio::test]
async fn nobody_waits_longer_than_the_cold_start_deadline() {
    let router = TestRouter::start().await;
    router.push_with(&[], json!({"cold_start_deadline_seconds": 0.3}));
    let answer = router.complete(body(3, false)).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers.contains_key("retry-after"));
    let (tokens, done, error) = router.complete(body(3, true)).await.events();
    assert_eq!((tokens.len(), done), (0, false));
    assert!(error.unwrap().contains("No replica of service ns/svc"));
}

#[tokio::test]
async fn beyond_what_objectives_allow_it_says_when_to_come_back() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    replica.max_num_seqs.store(1, SeqCst);
    replica.pace(200);
    router.push_with(&[replica.entry(1)], json!({"max_queue_wait_seconds": 0.3}));
    // Teaches how long an answer takes.
    router.complete(body(2, false)).await;
    let answers = futures_join((0..20).map(|_| router.complete(body(2, false)))).await;
    let busy: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status == 429)
        .collect();
    assert!(busy.len() >= 14, "{}", busy.len());
    for answer in &busy {
        let after = answer.headers["retry-after"].to_str().unwrap();
        assert!(after.parse::<u64>().unwrap() >= 1);
        assert_eq!(answer.json()["error"]["code"], "queue_full");
    }
    assert!(
        answers
            .iter()
            .all(|answer| [200, 429].contains(&answer.status.as_u16()))
    );
}

#[tokio::test]
async fn table_changes_under_load_lose_nothing() {
    let router = TestRouter::start().await;
    let mut replicas = Vec::new();
    for number in 0..4 {
        replicas.push(Replica::start(&format!("r{number}")).await);
    }
    router.push(&[replicas[0].entry(1)]);
    let load = async {
        futures_join((0..300).map(|number: u64| {
            let router = &router;
            async move {
                tokio::time::sleep(Duration::from_millis(number * 5)).await;
                router.complete(body(10, number.is_multiple_of(2))).await
            }
        }))
        .await
    };
    let changes = async {
        for round in 0u32.. {
            let entries: Vec<_> = (0..4u32)
                .filter(|number| (round + number) % 4 != 0)
                .map(|number| replicas[number as usize].entry((round + number) % 3))
                .collect();
            router.push(&entries);
            tokio::time::sleep(Duration::from_millis(7)).await;
        }
    };
    let answers = tokio::select! {
        answers = load => answers,
        () = changes => unreachable!(),
    };
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer.status, 200, "{}", answer.text);
        if number % 2 == 0 {
            assert_eq!(answer.events(), ((0..10).collect(), true, None));
        }
    }
    let load = router.router.routes().services[0].load();
    assert_eq!(load.queue_length, 0);
    for replica in load.replicas {
        assert_eq!((replica.in_flight(), replica.tokens()), (0, 0));
    }
}

#[tokio::test]
async fn a_prompt_goes_where_its_beginning_went() {
    let router = TestRouter::start().await;
    let mut entries = Vec::new();
    let mut replicas = Vec::new();
    for number in 0..4 {
        let replica = Replica::start(&format!("r{number}")).await;
        entries.push(replica.entry(1));
        replicas.push(replica);
    }
    router.push(&entries);
    for group in 0..5 {
        let prompt = format!("{group}").repeat(3000);
        let mut homes = std::collections::HashSet::new();
        for turn in 0..6 {
            let body = json!({"model": "m", "prompt": format!("{prompt} {turn}"), "max_tokens": 1});
            let answer = router.complete(body).await;
            homes.insert(answer.json()["id"].as_str().unwrap().to_owned());
        }
        assert_eq!(homes.len(), 1, "{homes:?}");
    }
    assert!(router.metric("stoker_router_affinity_hits_total").await >= 25.0);
}

async fn futures_join<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut pending: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        let mut ready = true;
        for (future, output) in &mut pending {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => *output = Some(value),
                    std::task::Poll::Pending => ready = false,
                }
            }
        }
        if ready {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    pending
        .into_iter()
        .map(|(_, output)| output.unwrap())
        .collect()
}
