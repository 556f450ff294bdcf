use axum::http::Method;
use serde_json::{Value, json};

use super::*;
use crate::testing::{Server, answer, body_of, mock_client, refusal};

fn elector(identity: &str) -> (Elector, Leadership, Server) {
    let (client, server) = mock_client();
    let leadership = Leadership::none();
    let elector = Elector::new(
        Api::namespaced(client, "ns"),
        "lock",
        identity,
        leadership.clone(),
    );
    (elector, leadership, server)
}

fn lease(holder: &str, version: &str, transitions: i32) -> Value {
    json!({
        "metadata": {"name": "lock", "resourceVersion": version},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15,
                 "leaseTransitions": transitions, "renewTime": "2000-01-01T00:00:00.000000Z"}
    })
}

/// Answers one request after checking its method.
async fn expect(server: &mut Server, method: Method, status: u16, body: Value) -> Value {
    let (request, respond) = server.next_request().await.unwrap();
    assert_eq!(request.method(), method, "{}", request.uri());
    let sent = body_of(request).await;
    if status < 300 {
        respond.send_response(answer(status, &body));
    } else {
        respond.send_response(refusal(
            status,
            body.as_str().unwrap_or_default(),
            "as told",
        ));
    }
    sent
}

#[tokio::test(start_paused = true)]
async fn a_fresh_lease_starts_above_every_earlier_epoch() {
    let (elector, leadership, mut server) = elector("a");
    let acquiring = tokio::spawn(async move { elector.acquire().await });
    expect(&mut server, Method::GET, 404, json!("NotFound")).await;
    let (request, respond) = server.next_request().await.unwrap();
    assert_eq!(request.method(), Method::POST);
    let created = body_of(request).await;
    let transitions = created["spec"]["leaseTransitions"].as_i64().unwrap();
    assert!(transitions > 20_000_000, "{transitions}");
    respond.send_response(answer(201, &created));
    acquiring.await.unwrap();
    assert_eq!(leadership.epoch(), Some(transitions as u64));
}

#[tokio::test(start_paused = true)]
async fn takes_its_own_lease_back_at_once_under_a_new_epoch() {
    let (elector, leadership, mut server) = elector("a");
    let began = Instant::now();
    let acquiring = tokio::spawn(async move { elector.acquire().await });
    expect(&mut server, Method::GET, 200, lease("a", "7", 3)).await;
    let put = expect(&mut server, Method::PUT, 200, lease("a", "8", 4)).await;
    assert_eq!(put["metadata"]["resourceVersion"], "7");
    assert_eq!(put["spec"]["leaseTransitions"], 4);
    acquiring.await.unwrap();
    assert_eq!(leadership.epoch(), Some(4));
    assert!(began.elapsed() < PERIOD);
}

/// The holder's renewTime lies in the past by this machine's clock; that must not matter.
#[tokio::test(start_paused = true)]
async fn waits_until_anothers_lease_stood_still_for_its_duration() {
    let (elector, _, mut server) = elector("b");
    let acquiring = tokio::spawn(async move { elector.acquire().await });
    let began = Instant::now();
    expect(&mut server, Method::GET, 200, lease("a", "7", 3)).await;
    expect(&mut server, Method::GET, 200, lease("a", "8", 3)).await; // renewed in between
    let renewed = Instant::now();
    loop {
        let (request, respond) = server.next_request().await.unwrap();
        if request.method() == Method::GET {
            respond.send_response(answer(200, &lease("a", "8", 3)));
            continue;
        }
        let put = body_of(request).await;
        assert_eq!(put["spec"]["holderIdentity"], "b");
        assert_eq!(put["spec"]["leaseTransitions"], 4);
        respond.send_response(answer(200, &lease("b", "9", 4)));
        break;
    }
    acquiring.await.unwrap();
    assert!(renewed.elapsed() >= DURATION && began.elapsed() >= DURATION + PERIOD);
}

#[tokio::test(start_paused = true)]
async fn losing_the_race_for_a_free_lease_is_no_victory() {
    let (elector, leadership, mut server) = elector("b");
    let acquiring = tokio::spawn(async move { elector.acquire().await });
    expect(&mut server, Method::GET, 200, lease("", "7", 3)).await;
    expect(&mut server, Method::PUT, 409, json!("Conflict")).await;
    assert_eq!(leadership.epoch(), None);
    expect(&mut server, Method::GET, 200, lease("a", "8", 4)).await;
    assert!(!acquiring.is_finished());
    acquiring.abort();
}

#[tokio::test(start_paused = true)]
async fn stops_leading_before_the_lease_may_pass_on() {
    let (elector, leadership, mut server) = elector("a");
    leadership.extend(Instant::now(), 4);
    let held: Lease = serde_json::from_value(lease("a", "7", 4)).unwrap();
    let began = Instant::now();
    let holding = tokio::spawn(async move { elector.hold(held).await });
    expect(&mut server, Method::PUT, 200, lease("a", "8", 4)).await;
    let renewed = Instant::now();
    // From here on the API server fails every call.
    let failing = tokio::spawn(async move {
        while let Some((_, respond)) = server.next_request().await {
            respond.send_response(refusal(503, "ServiceUnavailable", "etcd is away"));
        }
    });
    let error = holding.await.unwrap();
    assert!(matches!(error, LeaseError::Expired { .. }), "{error}");
    assert!(
        renewed.elapsed() <= RENEW_DEADLINE,
        "{:?}",
        renewed.elapsed()
    );
    assert!(began.elapsed() < DURATION);
    assert_eq!(leadership.epoch(), None);
    failing.abort();
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_hangs_ends_leadership_too() {
    let (elector, leadership, mut server) = elector("a");
    leadership.extend(Instant::now(), 4);
    let held: Lease = serde_json::from_value(lease("a", "7", 4)).unwrap();
    let began = Instant::now();
    let silent = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Some(pair) = server.next_request().await {
            kept.push(pair);
        }
    });
    let error = elector.hold(held).await;
    assert!(matches!(error, LeaseError::Expired { .. }), "{error}");
    assert!(began.elapsed() <= RENEW_DEADLINE + Duration::from_millis(1));
    assert_eq!(leadership.epoch(), None);
    silent.abort();
}

#[tokio::test(start_paused = true)]
async fn a_foreign_label_is_no_loss_but_another_epoch_is() {
    let (elector, leadership, mut server) = elector("a");
    leadership.extend(Instant::now(), 4);
    let held: Lease = serde_json::from_value(lease("a", "7", 4)).unwrap();
    let holding = tokio::spawn(async move { elector.hold(held).await });
    expect(&mut server, Method::PUT, 409, json!("Conflict")).await;
    expect(&mut server, Method::GET, 200, lease("a", "9", 4)).await;
    let put = expect(&mut server, Method::PUT, 200, lease("a", "10", 4)).await;
    assert_eq!(put["metadata"]["resourceVersion"], "9");
    // A second process with the same identity took it.
    expect(&mut server, Method::PUT, 409, json!("Conflict")).await;
    expect(&mut server, Method::GET, 200, lease("a", "11", 5)).await;
    let error = holding.await.unwrap();
    assert!(matches!(error, LeaseError::Taken { .. }), "{error}");
    assert_eq!(leadership.epoch(), None);
}

#[tokio::test(start_paused = true)]
async fn release_frees_only_what_it_holds() {
    let (elector, leadership, mut server) = elector("a");
    leadership.extend(Instant::now(), 4);
    let releasing = tokio::spawn(async move { elector.release().await });
    expect(&mut server, Method::GET, 200, lease("a", "7", 4)).await;
    let put = expect(&mut server, Method::PUT, 200, lease("", "8", 4)).await;
    assert!(put["spec"].get("holderIdentity").is_none());
    releasing.await.unwrap().unwrap();
    assert_eq!(leadership.epoch(), None);
}
