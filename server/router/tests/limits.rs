//! Keys, limits, slow clients, TLS, and a graceful end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{Replica, TestRouter, body, get, post, read, until};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use stoker_router::listener::listen;
use stoker_router::tls::Tls;
use stoker_router::workers::Workers;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn key(name: &str, secret: &str, limits: Value) -> Value {
    let digest = Sha256::digest(secret);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut key = json!({"name": name, "sha256": hex});
    for (name, value) in limits.as_object().unwrap() {
        key[name] = value.clone();
    }
    key
}

async fn ask(router: &TestRouter, secret: &str, tokens: u32) -> common::Answer {
    let bearer = format!("Bearer {secret}");
    let headers = [("authorization", bearer.as_str())];
    post(
        router.address,
        "svc.ns",
        "/v1/completions",
        &body(tokens, false),
        &headers,
    )
    .await
}

#[tokio::test]
async fn keys_are_asked_for_and_limited() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    let keys = json!({"api_keys": [
        key("a", "one", json!({"requests_per_minute": 3})),
        key("b", "two", json!({"tokens_per_minute": 200}))]});
    router.push_with(&[replica.entry(1)], keys);
    for secret in ["", "three"] {
        let answer = ask(&router, secret, 1).await;
        assert_eq!(answer.status, 401);
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
    }
    assert_eq!(
        get(router.address, "svc.ns", "/v1/models").await.status,
        401
    );
    assert_eq!(replica.requests.load(SeqCst), 0);
    for left in ["2", "1", "0"] {
        let answer = ask(&router, "one", 1).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["x-ratelimit-limit-requests"], "3");
        assert_eq!(answer.headers["x-ratelimit-remaining-requests"], left);
    }
    let refused = ask(&router, "one", 1).await;
    assert_eq!(refused.status, 429);
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(refused.headers["x-ratelimit-remaining-requests"], "0");
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    assert_eq!(ask(&router, "two", 150).await.status, 200);
    assert_eq!(ask(&router, "two", 150).await.status, 429);
    let heads = replica.heads.lock().join("");
    assert!(
        !heads.to_ascii_lowercase().contains("authorization"),
        "{heads}"
    );
    assert_eq!(replica.requests.load(SeqCst), 4);
}

#[tokio::test]
async fn a_flood_of_one_key_does_not_delay_another() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    replica.max_num_seqs.store(2, SeqCst);
    replica.pace(50);
    let keys = json!({"api_keys": [key("flood", "f", json!({})), key("calm", "c", json!({}))]});
    router.push_with(&[replica.entry(1)], keys);
    let mut flood = tokio::task::JoinSet::new();
    let address = router.address;
    for _ in 0..200 {
        let headers = [("authorization", "Bearer f")];
        flood.spawn(async move {
            post(
                address,
                "svc.ns",
                "/v1/completions",
                &body(4, false),
                &headers,
            )
            .await
        });
    }
    let queue = || router.router.routes().services[0].load().queue_length;
    until("the flood waits", || queue() > 150).await;
    let before = replica.requests.load(SeqCst);
    for _ in 0..5 {
        assert_eq!(ask(&router, "c", 4).await.status, 200);
    }
    // Each waited for its turn between two flows, never for the flood's queue.
    let meanwhile = replica.requests.load(SeqCst) - before;
    assert!(
        meanwhile <= 40,
        "{meanwhile} requests went before 5 calm ones were done"
    );
    flood.abort_all();
}

#[tokio::test]
async fn bodies_have_a_size_and_a_time() {
    let mut config = common::config();
    config.timeouts.body_read = Duration::from_millis(200);
    config.timeouts.header_read = Duration::from_millis(300);
    let router = TestRouter::with(config).await;
    let replica = Replica::start("only").await;
    router.push_with(&[replica.entry(1)], json!({"max_body_bytes": 1000}));
    let large = json!({"model": "m", "prompt": "x".repeat(2000)});
    let answer = router.complete(large).await;
    assert_eq!(
        (
            answer.status.as_u16(),
            answer.json()["error"]["code"].as_str().unwrap()
        ),
        (413, "body_too_large")
    );
    let raw = |text: &'static str| async move {
        let mut stream = TcpStream::connect(router.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    };
    let chunked =
        "POST /v1/completions HTTP/1.1\r\nhost: svc.ns\r\ntransfer-encoding: chunked\r\n\r\n";
    let slow =
        raw("POST /v1/completions HTTP/1.1\r\nhost: svc.ns\r\ncontent-length: 99\r\n\r\n{\"a\"")
            .await;
    assert!(slow.starts_with("HTTP/1.1 408"), "{slow}");
    let mut over = chunked.to_owned();
    over.push_str(&format!("{:x}\r\n{}\r\n0\r\n\r\n", 1500, "x".repeat(1500)));
    let over = raw(Box::leak(over.into_boxed_str())).await;
    assert!(over.starts_with("HTTP/1.1 413"), "{over}");
    let cut = raw("POST /v1/completions HTTP/1.1\r\nhost: svc.ns\r\nconnection: close\r\ncontent-length: 12\r\n\r\n{\"model\":\"m\"").await;
    assert!(
        cut.starts_with("HTTP/1.1 400") && cut.contains("invalid_json"),
        "{cut}"
    );
    // A head that never ends: the connection is closed.
    raw("POST /v1/completions HTTP/1.1\r\nhost: svc").await;
    assert_eq!(replica.requests.load(SeqCst), 0);
    assert_eq!(router.complete(body(1, false)).await.status, 200);
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off() {
    let mut config = common::config();
    config.timeouts.write_stall = Duration::from_millis(300);
    let router = TestRouter::with(config).await;
    let replica = Replica::start("only").await;
    replica.pace(0);
    router.push(&[replica.entry(1)]);
    let mut stream = TcpStream::connect(router.address).await.unwrap();
    let body = body(10_000_000, true).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: svc.ns\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..3000 {
        if replica.cancelled.load(SeqCst) == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the stalled stream was never cut off");
}

#[tokio::test]
async fn requests_are_told_apart_and_passed_on_as_they_are() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    router.push(&[replica.entry(1)]);
    let headers = [
        ("x-request-id", "mine-1"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("x-end", "2"),
        ("x-stoker-queue-ms", "9999"),
    ];
    let answer = post(
        router.address,
        "svc.ns",
        "/v1/completions?a=b",
        &body(1, false),
        &headers,
    )
    .await;
    assert_eq!(answer.headers["x-request-id"], "mine-1");
    assert_eq!(answer.headers["x-stoker-replica"], "only");
    assert!(answer.headers.contains_key("x-stoker-queue-ms"));
    let head = replica.heads.lock()[0].to_ascii_lowercase();
    assert!(
        head.starts_with("post /v1/completions?a=b http/1.1"),
        "{head}"
    );
    assert!(
        head.contains("x-request-id: mine-1") && head.contains("x-end: 2"),
        "{head}"
    );
    assert!(head.contains("x-forwarded-for: 127.0.0.1"), "{head}");
    assert!(!head.contains("x-hop"), "{head}");
    // The router's own word on how long it had the request, not the client's.
    assert!(head.contains("x-stoker-queue-ms: "), "{head}");
    assert!(!head.contains("9999"), "{head}");
    let made = router.complete(body(1, false)).await;
    assert!(
        made.headers["x-request-id"]
            .to_str()
            .unwrap()
            .starts_with("req-")
    );
    let code = router
        .metric("stoker_router_requests_total{code=\"200\",service=\"ns/svc\"}")
        .await;
    assert_eq!(code, 2.0);
}

#[tokio::test]
async fn at_the_end_what_runs_is_finished() {
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    replica.pace(20);
    router.push(&[replica.entry(1)]);
    let running = router.open(body(20, true)).await;
    // An idle connection kept open must not hold up the end.
    let _idle = TcpStream::connect(router.address).await.unwrap();
    router.router.drain();
    router.stop.cancel();
    router.connections.close();
    assert_eq!(get(router.metrics, "x", "/ready").await.status, 503);
    assert_eq!(
        read(running).await.events(),
        ((0..20).collect(), true, None)
    );
    tokio::time::timeout(Duration::from_secs(5), router.connections.wait())
        .await
        .unwrap();
}

#[tokio::test]
async fn tls_serves_with_whatever_certificate_is_there_now() {
    let folder = tempfile::tempdir().unwrap();
    let (cert, private) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    let write = |age: u64| {
        let made = rcgen::generate_simple_self_signed(["svc.ns".to_owned()]).unwrap();
        std::fs::write(&private, made.signing_key.serialize_pem()).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        let time = std::time::SystemTime::now() + Duration::from_secs(age);
        let file = std::fs::File::options().write(true).open(&cert).unwrap();
        file.set_modified(time).unwrap();
        made.cert.der().clone()
    };
    let first = write(0);
    let router = TestRouter::start().await;
    let replica = Replica::start("only").await;
    router.push(&[replica.entry(1)]);
    let tls = Arc::new(Tls::new(cert.clone(), private.clone()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(Arc::clone(&tls).reload_every(Duration::from_millis(50)));
    tokio::spawn(listen(
        Arc::clone(&router.router),
        listener,
        Some(tls),
        Workers::here(),
        router.connections.clone(),
        router.stop.clone(),
    ));
    let ask = |trusted: rustls::pki_types::CertificateDer<'static>| async move {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(trusted).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector
            .connect("svc.ns".try_into().unwrap(), stream)
            .await
            .ok()?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let request = common::request("svc.ns", "/v1/completions", &body(3, true), &[]);
        Some(
            read(sender.send_request(request).await.unwrap())
                .await
                .events(),
        )
    };
    assert_eq!(ask(first.clone()).await, Some((vec![0, 1, 2], true, None)));
    let second = write(10);
    for _ in 0..200 {
        if let Some(events) = ask(second.clone()).await {
            assert!(events.1);
            assert_eq!(ask(first).await, None);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the new certificate was never used");
}
