//! The metrics: vLLM's names, labels and buckets, and our own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use common::{Server, eventually, series};
use serde_json::json;
use tokio::task::JoinHandle;

const SCALING: &[&str] = &[
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "stoker:max_num_seqs",
    "stoker:max_num_batched_tokens",
    "stoker:max_num_seqs_ceiling",
    "stoker:max_num_batched_tokens_ceiling",
    "stoker:kv_capacity_tokens",
    "stoker:kv_tokens",
    "stoker:waiting_prompt_tokens",
    "stoker:law_base_seconds",
    "stoker:law_per_kv_token_seconds",
    "stoker:law_per_token_seconds",
    "stoker:law_per_sequence_seconds",
    "stoker:law_hidden_ratio",
    "stoker:law_confidence_ratio",
    "stoker:loading_progress_ratio",
    "stoker:loading_eta_seconds",
    "stoker:draining",
    "stoker:requests_received_total",
    "stoker:received_prompt_tokens_total",
    "stoker:objective_requests_total",
    "stoker:engine_steps_total",
    "stoker:engine_step_seconds_total",
];

const REST: &[&str] = &[
    "vllm:cache_config_info",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:iteration_tokens_total",
    "stoker:requests_set_back_total",
    "stoker:http_requests_total",
];

fn families(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect()
}

fn set(names: &[&[&str]]) -> BTreeSet<String> {
    names.concat().into_iter().map(str::to_owned).collect()
}

#[tokio::test]
async fn every_name_is_there_with_its_labels() {
    let server = Server::start(&["--served-model-name", "m"]).await;
    server
        .complete(json!({"prompt": vec![1; 30], "max_tokens": 10}))
        .await;
    let (_, all) = server.get("/metrics").await;
    assert_eq!(families(&all), set(&[SCALING, REST]));
    for line in all.lines().filter(|line| !line.starts_with('#')) {
        assert!(
            line.contains("model_name=\"m\"") && line.contains("engine=\"0\""),
            "{line}"
        );
    }
    let (_, scaling) = server.get("/metrics?include=scaling").await;
    assert_eq!(families(&scaling), set(&[SCALING]));
    assert!(scaling.len() < all.len());
}

#[tokio::test]
async fn requests_are_counted_once_and_in_full() {
    let server = Server::start(&["--objectives", r#"{"ttft_ms": 60000, "itl_ms": 60000}"#]).await;
    server
        .complete(json!({"prompt": [vec![1; 30], vec![2; 50]], "max_tokens": 10}))
        .await;
    server.wait_empty().await;
    let (_, text) = server.get("/metrics").await;
    let value = |name: &str, labels: &[(&str, &str)]| {
        series(&text, name, labels).unwrap_or_else(|| panic!("no {name} {labels:?}"))
    };
    assert_eq!(value("vllm:prompt_tokens_total", &[]), 80.0);
    assert_eq!(value("vllm:generation_tokens_total", &[]), 20.0);
    assert_eq!(value("stoker:requests_received_total", &[]), 2.0);
    assert_eq!(value("stoker:received_prompt_tokens_total", &[]), 80.0);
    assert_eq!(
        value(
            "vllm:request_success_total",
            &[("finished_reason", "length")]
        ),
        2.0
    );
    assert_eq!(
        value(
            "vllm:request_success_total",
            &[("finished_reason", "abort")]
        ),
        0.0
    );
    assert_eq!(value("vllm:time_to_first_token_seconds_count", &[]), 2.0);
    assert_eq!(value("vllm:inter_token_latency_seconds_count", &[]), 18.0);
    assert_eq!(
        value("vllm:request_time_per_output_token_seconds_count", &[]),
        2.0
    );
    assert_eq!(
        value("vllm:request_prompt_tokens_bucket", &[("le", "20")]),
        0.0
    );
    assert_eq!(
        value("vllm:request_prompt_tokens_bucket", &[("le", "50")]),
        2.0
    );
    assert_eq!(value("vllm:request_prompt_tokens_sum", &[]), 80.0);
    assert_eq!(value("vllm:request_generation_tokens_sum", &[]), 20.0);
    assert_eq!(value("vllm:e2e_request_latency_seconds_count", &[]), 2.0);
    assert_eq!(
        value("vllm:iteration_tokens_total_count", &[]),
        value("stoker:engine_steps_total", &[])
    );
    for objective in ["ttft", "itl", "all"] {
        let labels = |met| [("objective", objective), ("met", met)];
        assert_eq!(
            value("stoker:objective_requests_total", &labels("true")),
            2.0
        );
        assert_eq!(
            value("stoker:objective_requests_total", &labels("false")),
            0.0
        );
    }
    assert!(value("stoker:engine_step_seconds_total", &[]) > 0.0);
    assert!(value("stoker:kv_capacity_tokens", &[]) > 100_000.0);
    assert_eq!(
        value(
            "stoker:http_requests_total",
            &[("code", "200"), ("path", "/v1/completions")]
        ),
        1.0
    );
    // A path that isn't ours is no label of ours.
    server.get("/some/path").await;
    let (_, text) = server.get("/metrics").await;
    assert!(!text.contains("/some/path"));
    assert!(
        series(
            &text,
            "stoker:http_requests_total",
            &[("code", "404"), ("path", "other")]
        )
        .is_some()
    );
}

#[tokio::test]
async fn vllms_buckets() {
    let server = Server::start(&[]).await;
    let (_, text) = server.get("/metrics").await;
    let bounds = |name: &str| -> Vec<String> {
        text.lines()
            .filter(|line| line.starts_with(&format!("{name}_bucket{{")))
            .map(|line| {
                let (_, rest) = line.split_once("le=\"").unwrap();
                rest.split('"').next().unwrap().to_owned()
            })
            .collect()
    };
    assert_eq!(
        bounds("vllm:inter_token_latency_seconds").join(" "),
        "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80 +Inf"
    );
    assert_eq!(
        bounds("vllm:time_to_first_token_seconds").join(" "),
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560 +Inf"
    );
    assert_eq!(
        bounds("vllm:request_prompt_tokens").join(" "),
        "1 2 5 10 20 50 100 200 500 1000 2000 5000 +Inf"
    );
}

#[tokio::test]
async fn misses_are_counted_too() {
    let server = Server::start(&["--objectives", r#"{"ttft_ms": 0.001, "itl_ms": 0.001}"#]).await;
    server
        .complete(json!({"prompt": "a", "max_tokens": 3}))
        .await;
    for objective in ["ttft", "itl", "all"] {
        let labels = [("objective", objective), ("met", "false")];
        assert_eq!(
            server
                .metric("stoker:objective_requests_total", &labels)
                .await,
            1.0
        );
    }
}

/// Begins a completion that a router has had for so many milliseconds.
fn send_after(server: &Server, waited: &str, max_tokens: u32) -> JoinHandle<u16> {
    let body = json!({"prompt": "a", "max_tokens": max_tokens, "ignore_eos": true});
    let request = (server.http.post(server.url.clone() + "/v1/completions"))
        .header("x-stoker-queue-ms", waited)
        .json(&body);
    tokio::spawn(async { request.send().await.unwrap().status().as_u16() })
}

#[tokio::test]
async fn time_in_a_router_counts() {
    let server = Server::start(&[]).await;
    // A header that can't be right counts as none.
    for waited in ["5000", "100", "soon", "99999999999"] {
        assert_eq!(send_after(&server, waited, 2).await.unwrap(), 200);
    }
    for (met, count) in [("false", 1.0), ("true", 3.0)] {
        let labels = [("objective", "ttft"), ("met", met)];
        let counted = server.metric("stoker:objective_requests_total", &labels);
        assert_eq!(counted.await, count, "{met}");
    }
}

#[tokio::test]
async fn who_is_late_lets_others_go_first() {
    let server = Server::start(&["--max-num-seqs", "1"]).await;
    let shows = async |gauge: &str| {
        eventually(gauge, async || server.metric(gauge, &[]).await == 1.0).await;
    };
    let running = send_after(&server, "0", 300);
    shows("vllm:num_requests_running").await;
    let late = send_after(&server, "5000", 200);
    shows("vllm:num_requests_waiting").await;
    shows("stoker:requests_set_back_total").await;
    assert_eq!(send_after(&server, "0", 2).await.unwrap(), 200);
    assert!(!late.is_finished(), "it has 200 tokens to go");
    for answer in [running, late] {
        assert_eq!(answer.await.unwrap(), 200);
    }
}
