//! A keeper against an API server that answers what a test tells it to.

use axum::http::Method;
use proptest::prelude::*;
use serde_json::json;
use stoker_autoscaler::Dials;

use super::*;
use crate::testing::{Server, answer, body_of, mock_client, recorder, refusal};

const MAPS: &str = "/api/v1/namespaces/ns/configmaps";
const PATH: &str = "/api/v1/namespaces/ns/configmaps/chat-memory";

fn service(uid: &str) -> InferenceService {
    serde_json::from_value(json!({
        "metadata": {"name": "chat", "namespace": "ns", "uid": uid},
        "spec": {"engine": {"device": "cpu"}},
    }))
    .unwrap()
}

fn memory(replicas: u32) -> Memory {
    let dials = Dials {
        max_num_seqs: 24,
        max_num_batched_tokens: 288,
    };
    Memory::seeded(replicas, Some(dials), 1.7e9)
}

fn keeper() -> (Keeper, Server) {
    let (client, server) = mock_client();
    (Keeper::new(client.clone(), recorder(client)), server)
}

/// What the API server holds after a write.
fn stored(memory: &Memory, owner: &str) -> Value {
    let text = serde_json::to_string(memory).unwrap();
    let mut object = serde_json::to_value(build(&service(owner), text)).unwrap();
    object["metadata"]["uid"] = json!("map");
    object
}

/// Answers the next request, which must be this one, and gives its body.
async fn next(server: &mut Server, method: Method, path: &str, status: u16, body: &Value) -> Value {
    let (request, respond) = server.next_request().await.unwrap();
    assert_eq!(*request.method(), method);
    assert_eq!(request.uri().path(), path);
    let sent = body_of(request).await;
    respond.send_response(match status {
        404 => refusal(404, "NotFound", "no such thing"),
        409 => refusal(409, "Conflict", "another object"),
        _ => answer(status, body),
    });
    sent
}

#[test]
fn what_was_stored_is_read_again() {
    let text = serde_json::to_string(&memory(3)).unwrap();
    let object = build(&service("u"), text);
    assert_eq!(object.name_any(), "chat-memory");
    assert_eq!(object.owner_references()[0].uid, "u");
    assert_eq!(object.labels()["serving.stoker.dev/service"], "chat");
    assert_eq!(parse(&object.data.unwrap()), Ok(memory(3)));
}

#[test]
fn what_cannot_be_used_says_why() {
    let data = |version: &str, text: &str| {
        BTreeMap::from([
            (VERSION_KEY.to_owned(), version.to_owned()),
            (MEMORY_KEY.to_owned(), text.to_owned()),
        ])
    };
    let current = Memory::VERSION.to_string();
    let why = |data| parse(&data).unwrap_err().to_string();
    assert_eq!(why(BTreeMap::new()), "it has no version");
    let other = why(data("0", "{}"));
    assert!(
        other.contains("\"0\"") && other.contains(&format!("reads version {}", Memory::VERSION)),
        "{other}"
    );
    assert!(why(data(&current, "{\"replicas\": -3}")).contains("can't be read"));
    assert!(why(data(&current, "null")).contains("can't be read"));
    let large = " ".repeat(MAX_BYTES + 1);
    assert!(why(data(&current, &large)).contains("16385 bytes"));
    let mut lacks = data(&current, "{}");
    lacks.remove(MEMORY_KEY);
    assert_eq!(why(lacks), "it has no memory.json");
}

proptest! {
    #[test]
    fn no_text_is_too_strange(version in "2?[ -~]{0,3}", text in "\\PC{0,200}") {
        let _ = parse(&BTreeMap::from([
            (VERSION_KEY.to_owned(), version),
            (MEMORY_KEY.to_owned(), text),
        ]));
    }
}

#[tokio::test]
async fn an_operator_goes_on_with_what_the_one_before_had_learnt() {
    let (keeper, mut server) = keeper();
    let reading = tokio::spawn(async move {
        let mut place = Place::default();
        let read = keeper.read(&mut place, &service("u")).await.unwrap();
        (read, place.standing)
    });
    next(
        &mut server,
        Method::GET,
        PATH,
        200,
        &stored(&memory(5), "u"),
    )
    .await;
    let (read, standing) = reading.await.unwrap();
    assert_eq!(read, Some(memory(5)));
    assert_eq!(standing, Standing::Ours("map".to_owned()));
}

#[tokio::test]
async fn garbage_is_told_and_replaced() {
    let (keeper, mut server) = keeper();
    let mut garbage = stored(&memory(5), "u");
    garbage["data"]["version"] = json!("999");
    let run = tokio::spawn(async move {
        let mut place = Place::default();
        assert_eq!(keeper.read(&mut place, &service("u")).await.unwrap(), None);
        place.due = Some(Instant::now());
        keeper.write(&mut place, &service("u"), &memory(2)).await;
    });
    next(&mut server, Method::GET, PATH, 200, &garbage).await;
    let events = "/apis/events.k8s.io/v1/namespaces/ns/events";
    let event = next(
        &mut server,
        Method::POST,
        events,
        201,
        &json!({"metadata": {}}),
    )
    .await;
    assert_eq!(event["reason"], "MemoryDiscarded");
    let note = event["note"].as_str().unwrap();
    assert!(
        note.contains("chat-memory") && note.contains("\"999\""),
        "{note}"
    );
    // The write can land on this very object only.
    let written = next(
        &mut server,
        Method::PATCH,
        PATH,
        200,
        &stored(&memory(2), "u"),
    )
    .await;
    assert_eq!(written["metadata"]["uid"], "map");
    assert_eq!(written["data"]["version"], Memory::VERSION.to_string());
    run.await.unwrap();
}

/// A user's ConfigMap, or what a deleted service of the name has left, is neither read nor written.
#[tokio::test]
async fn what_is_somebody_elses_is_left_alone() {
    let (keeper, mut server) = keeper();
    let run = tokio::spawn(async move {
        let mut place = Place::default();
        assert_eq!(keeper.read(&mut place, &service("u")).await.unwrap(), None);
        place.due = Some(Instant::now());
        keeper.write(&mut place, &service("u"), &memory(2)).await;
    });
    next(
        &mut server,
        Method::GET,
        PATH,
        200,
        &stored(&memory(5), "other"),
    )
    .await;
    let (request, respond) = server.next_request().await.unwrap();
    assert_eq!(body_of(request).await["reason"], "MemoryNotKept");
    respond.send_response(answer(201, &json!({"metadata": {}})));
    // It is looked at again, in case the name is free by then, and that is not told again.
    next(
        &mut server,
        Method::GET,
        PATH,
        200,
        &stored(&memory(5), "other"),
    )
    .await;
    run.await.unwrap();
    assert!(server.next_request().await.is_none(), "it was written to");
}

#[tokio::test(start_paused = true)]
async fn it_is_written_once_a_minute_and_only_when_it_has_changed() {
    let (keeper, mut server) = keeper();
    let api_server = tokio::spawn(async move {
        let mut writes = Vec::new();
        next(&mut server, Method::GET, PATH, 404, &json!({})).await;
        let found = stored(&memory(1), "u");
        writes.push(next(&mut server, Method::POST, MAPS, 201, &found).await);
        // Somebody has deleted it.
        next(&mut server, Method::PATCH, PATH, 409, &json!({})).await;
        next(&mut server, Method::GET, PATH, 404, &json!({})).await;
        let found = stored(&memory(3), "u");
        writes.push(next(&mut server, Method::POST, MAPS, 201, &found).await);
        assert!(server.next_request().await.is_none(), "one write too many");
        writes
    });
    let start = Instant::now();
    let mut place = Place::default();
    let service = service("u");
    assert_eq!(keeper.read(&mut place, &service).await.unwrap(), None);
    for tick in 0..150 {
        let at = Duration::from_secs(2 * tick);
        tokio::time::sleep_until(start + at).await;
        // Time alone is no change.
        let replicas = if at < Duration::from_secs(100) { 1 } else { 3 };
        let mut now = serde_json::to_value(memory(replicas)).unwrap();
        now["decided_at"] = json!(1.7e9 + at.as_secs_f64());
        let now = serde_json::from_value(now).unwrap();
        keeper.write(&mut place, &service, &now).await;
    }
    drop(keeper);
    let writes = api_server.await.unwrap();
    let texts = writes
        .iter()
        .map(|write| write["data"]["memory.json"].as_str().unwrap());
    assert_eq!(
        texts.filter(|text| text.contains("\"replicas\":3")).count(),
        1
    );
}

/// Of a thousand services that are seen at the same moment, hardly more than their share writes in any
/// second.
#[test]
fn first_writes_are_spread() {
    let mut seconds = BTreeMap::<u64, u32>::new();
    for n in 0..1000 {
        let after = first_after(&format!("0b1c9e5a-{n:04}-4a6f-8f43-1d1c3f5a7b2e"));
        assert!(after < SPREAD);
        *seconds.entry(after.as_secs()).or_default() += 1;
    }
    let most = seconds.values().max().copied();
    assert!(most < Some(70), "{seconds:?}");
}
