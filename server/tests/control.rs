//! The control port: dials, objectives, and who may set them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use common::Server;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey, EncodePublicKey};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::Method;
use serde_json::{Value, json};

const POD: &str = "5f2c1e7a-pod";

struct Operator {
    key: SigningKey,
}

impl Operator {
    fn new(seed: u8) -> Self {
        Self {
            key: SigningKey::from_bytes(&[seed; 32]),
        }
    }

    fn write_public_key(&self, path: &Path) {
        let pem = self.key.verifying_key().to_public_key_pem(LineEnding::LF);
        std::fs::write(path, pem.unwrap()).unwrap();
    }

    fn sign(&self, claims: &Value) -> String {
        let pem = self.key.to_pkcs8_pem(LineEnding::LF).unwrap();
        let key = EncodingKey::from_ed_pem(pem.as_bytes()).unwrap();
        jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), claims, &key).unwrap()
    }
}

fn claims(epoch: u64) -> Value {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    json!({"sub": POD, "iss": "stoker-operator", "exp": now + 60, "epoch": epoch})
}

fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

fn without(mut claims: Value, name: &str) -> Value {
    claims.as_object_mut().unwrap().remove(name);
    claims
}

/// Asks for the limits with this Authorization header.
async fn ask(server: &Server, authorization: Option<String>) -> (u16, String) {
    let mut request = server
        .http
        .get(format!("{}/control/v1/limits", server.control_url));
    if let Some(value) = authorization {
        request = request.header("authorization", value);
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

#[tokio::test]
async fn only_the_leaders_tokens_for_this_pod_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.pem");
    let operator = Operator::new(1);
    operator.write_public_key(&path);
    let key = path.to_str().unwrap();
    let server = Server::start(&["--control-key", key, "--pod-uid", POD]).await;
    let bearer = |claims: &Value| Some(format!("Bearer {}", operator.sign(claims)));

    let (status, body) = ask(&server, bearer(&claims(3))).await;
    assert_eq!(status, 200, "{body}");
    let hmac = jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims(3),
        &EncodingKey::from_secret(&std::fs::read(&path).unwrap()),
    )
    .unwrap();
    let refused = [
        (None, 401, "Bearer"),
        (Some("Basic YTpi".into()), 401, "Bearer"),
        (Some("Bearer".into()), 401, "Bearer"),
        (Some("Bearer nonsense".into()), 401, "can't be read"),
        (Some(format!("Bearer {hmac}")), 401, "can't be read"),
        (
            Some(format!("Bearer {}", Operator::new(2).sign(&claims(3)))),
            401,
            "signature",
        ),
        (bearer(&with(claims(3), "sub", json!("other"))), 403, POD),
        (bearer(&with(claims(3), "exp", json!(1))), 403, "expired"),
        (bearer(&with(claims(3), "iss", json!("me"))), 403, "issuer"),
        (bearer(&without(claims(3), "sub")), 403, "sub"),
        (bearer(&without(claims(3), "exp")), 403, "exp"),
        (bearer(&without(claims(3), "epoch")), 403, "epoch"),
        (bearer(&claims(2)), 403, "epoch 3"),
    ];
    for (authorization, expected, word) in refused {
        let (status, body) = ask(&server, authorization.clone()).await;
        assert_eq!(status, expected, "{authorization:?}: {body}");
        assert!(body.contains(word), "{authorization:?}: {body}");
    }
    // A refused token raises no epoch; the next leader's does.
    assert_eq!(ask(&server, bearer(&claims(3))).await.0, 200);
    assert_eq!(ask(&server, bearer(&claims(4))).await.0, 200);
    assert_eq!(ask(&server, bearer(&claims(3))).await.0, 403);
    // Every path of the port is guarded.
    assert_eq!(server.control(Method::POST, "drain", None).await.0, 401);
    assert_eq!(server.control(Method::GET, "nothing", None).await.0, 401);
    assert_eq!(server.get("/ready").await.0, 200);

    // The key file is replaced: the old key ends, the new one begins.
    let successor = Operator::new(9);
    successor.write_public_key(&path);
    assert_eq!(ask(&server, bearer(&claims(5))).await.0, 401);
    let token = successor.sign(&claims(5));
    assert_eq!(ask(&server, Some(format!("bearer {token}"))).await.0, 200);
    // A key that can't be read refuses everybody.
    std::fs::write(&path, "not a key").unwrap();
    let token = successor.sign(&claims(5));
    assert_eq!(ask(&server, Some(format!("Bearer {token}"))).await.0, 500);
}

#[tokio::test]
async fn dials_and_objectives_change_and_show() {
    let server = Server::start(&["--max-num-seqs", "4", "--objectives", r#"{"itl_ms": 70}"#]).await;
    let (status, body) = server.control(Method::GET, "limits", None).await;
    assert_eq!(status, 200);
    assert_eq!(body["max_num_seqs"], 4);
    assert_eq!(body["objectives"]["itl_ms"], 70.0);
    assert_eq!(body["objectives"]["ttft_ms"], 2000.0);

    let patch = json!({"max_num_seqs": 12, "max_num_batched_tokens": 300, "objectives": {
        "ttft_ms": 1500.0, "ttft_free_prompt_tokens": 1000.0, "ttft_ms_per_prompt_token": 1.0,
        "itl_ms": 100.0, "itl_of": "p95"}});
    let (status, body) = server.control(Method::PATCH, "limits", Some(patch)).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(
        (&body["max_num_seqs"], &body["max_num_batched_tokens"]),
        (&json!(12), &json!(300))
    );
    assert_eq!(body["objectives"]["itl_of"], "p95");
    assert_eq!(server.metric("stoker:max_num_seqs", &[]).await, 12.0);
    assert_eq!(
        server.metric("stoker:max_num_batched_tokens", &[]).await,
        300.0
    );

    // A part is a part; above the ceiling is the ceiling.
    let patch = json!({"max_num_seqs": 1_000_000});
    let (_, body) = server.control(Method::PATCH, "limits", Some(patch)).await;
    assert_eq!(body["max_num_seqs"], body["max_num_seqs_ceiling"]);
    assert_eq!(body["max_num_batched_tokens"], 300);

    for bad in [
        json!({"max_num_seqs": 0}),
        json!({"max_num_seqs": -1}),
        json!({"max_num_seqs": 2.5}),
        json!({"cap": 5}),
        json!({"objectives": {"itl_ms": 0}}),
        json!({"objectives": {"latency": 5}}),
        json!([]),
    ] {
        let (status, body) = server
            .control(Method::PATCH, "limits", Some(bad.clone()))
            .await;
        assert_eq!(status, 400, "{bad}: {body}");
        assert!(body["error"]["message"].is_string(), "{bad}: {body}");
    }
    let (_, after) = server.control(Method::GET, "limits", None).await;
    assert_eq!(body, after, "a bad change changes nothing");
    let (status, _) = server.control(Method::DELETE, "limits", None).await;
    assert_eq!(status, 405);
    let (_, state) = server.control(Method::GET, "state", None).await;
    assert_eq!(
        (&state["phase"], &state["percent"]),
        (&json!("ready"), &json!(100))
    );
}

#[tokio::test]
async fn the_cap_holds_from_the_next_step_on() {
    let server = Server::start(&["--max-num-seqs", "1"]).await;
    let body = json!({"prompt": "a", "max_tokens": 3000});
    let requests: Vec<_> = (0..6)
        .map(|_| server.response("/v1/completions", &body))
        .collect();
    let watch = async {
        let running = async || server.metric("vllm:num_requests_running", &[]).await;
        common::eventually("one runs", async || running().await == 1.0).await;
        common::eventually("five wait", async || {
            server.metric("vllm:num_requests_waiting", &[]).await == 5.0
        })
        .await;
        let patch = json!({"max_num_seqs": 4});
        server.control(Method::PATCH, "limits", Some(patch)).await;
        common::eventually("four run", async || running().await == 4.0).await;
    };
    tokio::select! {
        _ = futures::future::join_all(requests) => panic!("answered before the cap was raised"),
        () = watch => {}
    }
}

#[tokio::test]
async fn only_a_gpu_can_be_profiled() {
    let server = Server::start(&[]).await;
    let url = format!("{}/control/v1/profile", server.control_url);
    for (body, word) in [
        (json!({"seconds": 1}), "isn't an NVIDIA GPU"),
        (json!({"seconds": 0}), "above 0"),
        (json!({"seconds": 61}), "at most 60"),
        (json!({}), "seconds"),
    ] {
        let response = server.http.post(&url).json(&body).send().await.unwrap();
        assert_eq!(response.status(), 400);
        let text = response.text().await.unwrap();
        assert!(text.contains(word), "{text}");
    }
}
