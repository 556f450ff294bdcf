//! From hf:// to an answer: the server downloads a checkpoint from a stand-in hub and serves it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "../model/tests/common/hugging_face.rs"]
mod hugging_face;
#[path = "../hub/tests/common/stand_in.rs"]
mod stand_in;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use common::{Server, eventually, run_to_end_with};
use hugging_face::HuggingFace;
use serde_json::{Value, json};
use stand_in::{Fault, GOOD_TOKEN, StandIn};
use tokio::net::{TcpListener, TcpStream};

const MODEL: &str = "hf://test/tiny-llama";

/// What serves the model: the CPU, unless STOKER_TEST_DEVICE says otherwise.
fn device() -> &'static str {
    static DEVICE: OnceLock<String> = OnceLock::new();
    DEVICE.get_or_init(|| std::env::var("STOKER_TEST_DEVICE").unwrap_or("cpu".to_owned()))
}

/// A hub with a gated tiny Llama in three shards.
fn hub() -> StandIn {
    let folder = tempfile::tempdir().unwrap();
    let model = HuggingFace {
        shards: 3,
        ..HuggingFace::llama3()
    };
    let model = match device() {
        "cuda" => model.for_gpu(),
        _ => model,
    };
    model.write(folder.path());
    let hub = StandIn::start();
    let files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect();
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, c)| (n.as_str(), c.clone())).collect();
    hub.add("test/tiny-llama", &files);
    hub.repository("test/tiny-llama", |r| r.gated = true);
    hub
}

fn flags<'a>(model: &'a str, hub: &'a str, cache: &'a Path) -> Vec<&'a str> {
    let cache = cache.to_str().unwrap();
    let small = ["--kv-cache-memory-bytes", "8388608", "--threads", "2"];
    let mut flags = vec![
        "--device",
        device(),
        "--model",
        model,
        "--model-cache",
        cache,
    ];
    flags.extend(small);
    if !hub.is_empty() {
        flags.extend(["--hub-endpoint", hub]);
    }
    flags
}

/// The greedy answer to a fixed chat, and the number of tokens of its prompt.
async fn chat(server: &Server) -> (String, Value) {
    let body = json!({"messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": 24, "temperature": 0});
    let (status, answer) = server.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let text = &answer["choices"][0]["message"]["content"];
    (text.as_str().unwrap().to_owned(), answer["usage"].clone())
}

#[tokio::test]
async fn a_checkpoint_of_the_hub_answers_a_chat() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.fault("?signature", 1, Fault::Cut(20_000));
    let token = [("HF_TOKEN", GOOD_TOKEN)];
    let server = Server::launch_with(&flags(MODEL, &hub.url, cache.path()), &token);
    server.wait_ready().await;
    let (text, usage) = chat(&server).await;
    assert!(!text.is_empty());
    // The template's text, a token a byte, and four control tokens.
    let words = "user\nSay something.\nassistant\n".len();
    assert_eq!(usage["prompt_tokens"], words + 4, "{usage}");
    let (_, models) = server.get("/v1/models").await;
    assert!(models.contains("test/tiny-llama"), "{models}");
    let log = server.log();
    assert!(
        log.contains("downloading") && log.contains("trying again"),
        "{log}"
    );
    assert!(
        !log.contains(GOOD_TOKEN) && !log.contains("s3cr3t"),
        "{log}"
    );
    drop(server);

    // The same from the cache, without a hub, and from the folder itself.
    hub.go_down();
    let cached = Server::launch(&flags(MODEL, "", cache.path()));
    cached.wait_ready().await;
    assert_eq!(chat(&cached).await.0, text);
    let commit = hub.commit("test/tiny-llama");
    let folder = format!("models--test--tiny-llama/snapshots/{commit}");
    let folder = cache.path().join(folder);
    let local = Server::launch(&flags(folder.to_str().unwrap(), "", cache.path()));
    local.wait_ready().await;
    assert_eq!(chat(&local).await.0, text);
}

#[tokio::test]
async fn progress_is_told_while_it_downloads() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.fault("?signature", 3, Fault::Slow(20, Duration::from_millis(100)));
    let token = [("HF_TOKEN", GOOD_TOKEN)];
    let server = Server::launch_with(&flags(MODEL, &hub.url, cache.path()), &token);
    let mut seen = Vec::new();
    eventually("half of it", async || {
        let progress = server.metric("stoker:loading_progress_ratio", &[]).await;
        let eta = server.metric("stoker:loading_eta_seconds", &[]).await;
        seen.push((progress, eta));
        progress > 0.4
    })
    .await;
    let within = |&(progress, eta): &(f64, f64)| progress > 0.0 && progress < 0.8 && eta > 0.0;
    assert!(seen.iter().any(within), "{seen:?}");
    assert!(seen.is_sorted_by(|a, b| a.0 <= b.0), "{seen:?}");
    let body = json!({"prompt": "x", "max_tokens": 1});
    let (status, answer) = server.post("/v1/completions", &body).await;
    assert_eq!(status, 503, "{answer}");
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("% done"),
        "{answer}"
    );
    server.wait_ready().await;
    assert_eq!(
        server.metric("stoker:loading_progress_ratio", &[]).await,
        1.0
    );
}

#[tokio::test]
async fn what_cant_be_had_ends_the_server_with_the_reason() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    for (model, endpoint, token, code, words) in [
        (MODEL, hub.url.as_str(), "", 1, "model is gated"),
        (MODEL, hub.url.as_str(), "hf_expired", 1, "isn't accepted"),
        (MODEL, "", "", 2, "set --hub-endpoint"),
        (MODEL, "ftp://x", "", 2, "neither http nor https"),
        ("hf://test/none", hub.url.as_str(), "", 1, "no such model"),
    ] {
        let mut flags = flags(model, endpoint, cache.path());
        flags.extend(["--host", "127.0.0.1", "--port", "0", "--control-port", "0"]);
        let environment = [("HF_TOKEN", token), ("HF_ENDPOINT", endpoint)];
        let (found, log) = run_to_end_with(&flags, &environment);
        assert_eq!(found, code, "{log}");
        assert!(log.contains(words), "{words}: {log}");
        assert!(token.is_empty() || !log.contains(token), "{log}");
    }
}

/// A TLS port before a plain one, with a certificate of its own authority.
async fn with_tls(plain: String, certificate: &rcgen::CertifiedKey<rcgen::KeyPair>) -> String {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(certificate.signing_key.serialize_der());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key.unwrap())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let plain: SocketAddr = plain.strip_prefix("http://").unwrap().parse().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut tls = acceptor.accept(stream).await?;
                let mut plain = TcpStream::connect(plain).await?;
                tokio::io::copy_bidirectional(&mut tls, &mut plain).await
            });
        }
    });
    format!("https://localhost:{port}")
}

#[tokio::test]
async fn a_hub_behind_tls_needs_a_certificate_that_is_trusted() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let file = cache.path().join("ca.pem");
    std::fs::write(&file, certificate.cert.pem()).unwrap();
    let endpoint = with_tls(hub.url.clone(), &certificate).await;
    let storage = with_tls(hub.storage(), &certificate).await;
    let token = ("HF_TOKEN", GOOD_TOKEN);
    let trusted = ("SSL_CERT_FILE", file.to_str().unwrap());

    let flags = flags(MODEL, &endpoint, cache.path());
    // Storage without TLS: what comes from there could be read on the way.
    let end = tokio::task::spawn_blocking({
        let flags: Vec<String> = flags.iter().map(|&s| s.to_owned()).collect();
        let file = file.to_str().unwrap().to_owned();
        move || {
            let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            flags.extend(["--host", "127.0.0.1", "--port", "0", "--control-port", "0"]);
            run_to_end_with(&flags, &[token, ("SSL_CERT_FILE", &file)])
        }
    });
    let (code, log) = end.await.unwrap();
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("from https to an unprotected"), "{log}");

    hub.set_storage(&storage);
    let server = Server::launch_with(&flags, &[token, trusted]);
    server.wait_ready().await;
    chat(&server).await;
}

#[test]
fn a_cache_directory_is_made_ready() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("a/b");
    let flags = ["--prepare-model-cache", folder.to_str().unwrap()];
    let (code, log) = run_to_end_with(&flags, &[]);
    let is_root = std::os::unix::fs::MetadataExt::uid(&root.path().metadata().unwrap()) == 0;
    assert!(folder.is_dir(), "{log}");
    let owner = std::os::unix::fs::MetadataExt::uid(&folder.metadata().unwrap());
    match is_root {
        true => assert_eq!((code, owner), (0, 65532), "{log}"),
        // Only root may give a directory away.
        false => assert!(code == 1 && log.contains("model cache"), "{log}"),
    }
}

/// Where there is no GPU the server says what is missing, and ends.
#[test]
fn a_gpu_that_isnt_there_ends_the_server_with_the_reason() {
    if device() == "cuda" {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    HuggingFace::llama3().for_gpu().write(folder.path());
    let model = folder.path().to_str().unwrap();
    let (code, text) = run_to_end_with(&["--device", "cuda", "--model", model, "--port", "0"], &[]);
    let reasons = [
        "no NVIDIA driver is here",
        "this build has no CUDA kernels",
        "has no GPU for this process",
    ];
    assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
    assert_eq!(code, 3, "{text}");
}
