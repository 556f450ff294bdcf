//! The real model over HTTP against llama.cpp's continuations in f32
//! (../model/tests/data/smollm2_greedy_reference.json).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::Server;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use stoker_model::Tokenizer;
use stoker_model::gguf::GgufFile;

/// Where the best two tokens are nearer than this (nats), arithmetic in another order may choose
/// the other one.
const NEAR_TIE: f64 = 0.2;

/// Room for the longest prompt and its continuation; the KV cache holds little more than one.
const MAX_MODEL_LEN: u64 = 704;
const KV_TOKENS: u64 = 720;
/// Keys and values of 30 layers of 3 heads of 64 in f16.
const KV_BYTES_PER_TOKEN: u64 = 2 * 30 * 3 * 64 * 2;

/// A KV cache for the whole context.
const ROOMY: &[&str] = &["--kv-cache-memory-bytes", "268435456"];

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    kind: String,
    prompt: String,
    prompt_ids: Vec<u32>,
    user_text: Option<String>,
    reference: Continuation,
}

#[derive(Deserialize)]
struct Continuation {
    text: String,
    n: u64,
    stop_type: String,
    ids: Vec<u32>,
    margin_top1_top2: Vec<f64>,
}

fn prompts() -> Vec<Prompt> {
    let text = include_str!("../model/tests/data/smollm2_greedy_reference.json");
    serde_json::from_str::<Reference>(text).unwrap().prompts
}

fn model_path() -> PathBuf {
    let path = match std::env::var_os("STOKER_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
            .join(".cache/stoker/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    assert!(
        path.is_file(),
        "the test model {} isn't there: run `make model`, or set STOKER_TEST_MODEL to its path",
        path.display()
    );
    path
}

async fn start(flags: &[&str]) -> Server {
    let path = model_path();
    let model = ["--device", "cpu", "--model", path.to_str().unwrap()];
    let server = Server::launch(&[&model, flags].concat());
    server.wait_ready().await;
    server
}

/// Passes where the texts are equal, or part at a near tie.
#[track_caller]
fn assert_equals_reference(prompt: &Prompt, text: &str) {
    let reference = &prompt.reference;
    if text == reference.text {
        return;
    }
    let same = reference
        .text
        .bytes()
        .zip(text.bytes())
        .take_while(|(a, b)| a == b)
        .count();
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&model_path()).unwrap()).unwrap();
    let ids = &reference.ids;
    let token = (0..ids.len())
        .find(|&n| tokenizer.decode(&ids[..=n]).len() > same)
        .unwrap_or(ids.len() - 1);
    let margin = reference.margin_top1_top2[token];
    assert!(
        margin < NEAR_TIE,
        "{}: parts at token {token}, by a margin of {margin} nats:\n{text:?}\n{:?}",
        prompt.name,
        reference.text
    );
    eprintln!(
        "{}: another choice at token {token}, margin {margin}",
        prompt.name
    );
}

fn greedy(prompt: Value) -> Value {
    json!({"prompt": prompt, "max_tokens": 64, "temperature": 0})
}

#[tokio::test]
async fn the_capital_of_france() {
    let server = start(&[&["--served-model-name", "smollm2"], ROOMY].concat()).await;
    let body = json!({"model": "smollm2", "temperature": 0, "messages": [
        {"role": "user", "content": "What is the capital of France?"}]});
    let (status, answer) = server.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(
        choice["message"]["content"],
        "The capital of France is Paris."
    );
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45})
    );
    let events = server.stream("/v1/chat/completions", body).await;
    let text: String = events
        .iter()
        .map(|event| serde_json::from_str::<Value>(event).unwrap())
        .filter_map(|event| Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(text, "The capital of France is Paris.");
}

#[tokio::test]
async fn the_reference_one_by_one() {
    let server = start(ROOMY).await;
    for prompt in prompts() {
        let answer = server.complete(greedy(json!(prompt.prompt))).await;
        let text = answer["choices"][0]["text"].as_str().unwrap();
        assert_equals_reference(&prompt, text);
        let usage = &answer["usage"];
        assert_eq!(
            usage["prompt_tokens"],
            prompt.prompt_ids.len(),
            "{}",
            prompt.name
        );
        if text == prompt.reference.text {
            assert_eq!(
                usage["completion_tokens"], prompt.reference.n,
                "{}",
                prompt.name
            );
            let reason = match prompt.reference.stop_type.as_str() {
                "eos" => "stop",
                _ => "length",
            };
            assert_eq!(
                answer["choices"][0]["finish_reason"], reason,
                "{}",
                prompt.name
            );
        }
        // The same by way of the chat template and of token ids.
        if prompt.kind == "chat" {
            let user = &prompt.user_text;
            let body = json!({"messages": [{"role": "user", "content": user}],
                "max_tokens": 64, "temperature": 0});
            let (_, chat) = server.post("/v1/chat/completions", &body).await;
            let text = chat["choices"][0]["message"]["content"].as_str().unwrap();
            assert_equals_reference(&prompt, text);
            assert_eq!(chat["usage"]["prompt_tokens"], prompt.prompt_ids.len());
        }
    }
    server.wait_empty().await;
}

/// Everything at once: random arrivals, a KV cache that holds hardly more than the longest
/// request, chunked prompts, and dials that move all the time.
#[tokio::test]
async fn the_reference_under_preemption_and_moving_dials() {
    let kv = (KV_TOKENS * KV_BYTES_PER_TOKEN).to_string();
    let length = MAX_MODEL_LEN.to_string();
    let flags = ["--max-model-len", &length, "--kv-cache-memory-bytes", &kv];
    let server = start(&flags).await;
    assert_eq!(
        server.metric("stoker:kv_capacity_tokens", &[]).await,
        KV_TOKENS as f64
    );
    let memory = async |part| {
        server
            .metric("stoker:device_memory_bytes", &[("part", part)])
            .await
    };
    assert_eq!(
        memory("kv_cache").await,
        (KV_TOKENS * KV_BYTES_PER_TOKEN) as f64
    );
    assert!(memory("weights").await > 50e6);
    let prompts = prompts();
    let answers = prompts.iter().enumerate().map(|(n, prompt)| {
        let server = &server;
        async move {
            // A fixed shuffle of arrivals within 300 ms.
            let delay = Duration::from_millis((n as u64 * 7 % 10) * 30);
            tokio::time::sleep(delay).await;
            let answer = server.complete(greedy(json!(prompt.prompt_ids))).await;
            answer["choices"][0]["text"].as_str().unwrap().to_owned()
        }
    });
    let dials = async {
        for n in 0u64.. {
            let patch = json!({"max_num_seqs": 1 + n * 5 % 13,
                "max_num_batched_tokens": 16 + n * 37 % 200});
            let (status, _) = server.control(Method::PATCH, "limits", Some(patch)).await;
            assert_eq!(status, 200);
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    };
    let answers = tokio::select! {
        answers = futures::future::join_all(answers) => answers,
        () = dials => unreachable!("the dials move for ever"),
    };
    for (prompt, text) in prompts.iter().zip(&answers) {
        assert_equals_reference(prompt, text);
    }
    let preemptions = server.metric("vllm:num_preemptions_total", &[]).await;
    assert!(preemptions > 0.0, "the KV cache was never short");
    server.wait_empty().await;
}
