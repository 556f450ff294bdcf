//! The OpenAI API as it is meant to be used.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Server;
use serde_json::{Value, json};

fn parse(events: &[String]) -> Vec<Value> {
    events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

#[tokio::test]
async fn models_are_listed() {
    let server = Server::start(&["--served-model-name", "llama"]).await;
    let (status, text) = server.get("/v1/models").await;
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 200);
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "llama");
    assert_eq!(list["data"][0]["max_model_len"], 8192);
    assert_eq!(server.get("/v1/models/llama").await.0, 200);
    let (status, text) = server.get("/v1/models/other").await;
    assert_eq!(status, 404);
    assert!(text.contains("model_not_found"), "{text}");
}

#[tokio::test]
async fn completions_of_every_kind_of_prompt() {
    let server = Server::start(&[]).await;
    for (prompt, choices, prompt_tokens) in [
        (json!("hello"), 1, 1),
        (json!([5, 6, 7]), 1, 3),
        (json!([[5, 6], [7], [8, 9, 10]]), 3, 6),
    ] {
        let answer = server
            .complete(json!({"prompt": prompt, "max_tokens": 4, "model": "simulated-h100"}))
            .await;
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(answer["choices"].as_array().unwrap().len(), choices);
        for (index, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["finish_reason"], "length");
            assert_eq!(
                choice["text"].as_str().unwrap().split_whitespace().count(),
                4
            );
        }
        assert_eq!(
            answer["usage"],
            json!({"prompt_tokens": prompt_tokens, "completion_tokens": 4 * choices,
                "total_tokens": prompt_tokens + 4 * choices})
        );
    }
    let texts = server
        .complete(json!({"prompt": ["a", "b"], "max_tokens": 2}))
        .await;
    assert_eq!(texts["choices"].as_array().unwrap().len(), 2);
    // OpenAI's default limit.
    let answer = server.complete(json!({"prompt": "a"})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    server.wait_empty().await;
}

#[tokio::test]
async fn a_seed_repeats_and_temperature_0_repeats() {
    let server = Server::start(&[]).await;
    let text = async |body: Value| {
        server.complete(body).await["choices"][0]["text"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let seeded = |seed| json!({"prompt": "a", "max_tokens": 8, "temperature": 1, "seed": seed});
    assert_eq!(text(seeded(1)).await, text(seeded(1)).await);
    assert_ne!(text(seeded(1)).await, text(seeded(2)).await);
    let greedy = json!({"prompt": "a", "max_tokens": 8, "temperature": 0});
    assert_eq!(text(greedy.clone()).await, text(greedy).await);
}

#[tokio::test]
async fn a_streamed_completion_is_the_same_text_in_pieces() {
    let server = Server::start(&[]).await;
    let body = json!({"prompt": ["x", "y"], "max_tokens": 10, "temperature": 0});
    let whole = server.complete(body.clone()).await;
    let events = parse(&server.stream("/v1/completions", body).await);
    let mut texts = [String::new(), String::new()];
    let mut finished = [0, 0];
    for event in &events {
        assert_eq!(event["object"], "text_completion");
        assert_eq!(event["id"], events[0]["id"]);
        assert!(event.get("usage").is_none(), "not asked for: {event}");
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        assert_eq!(finished[index], 0, "text after the end");
        texts[index].push_str(choice["text"].as_str().unwrap());
        finished[index] += usize::from(choice["finish_reason"] == "length");
    }
    assert_eq!(finished, [1, 1]);
    // An event for each token and one for each end.
    assert_eq!(events.len(), 22);
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(whole["choices"][index]["text"], *text);
    }
}

#[tokio::test]
async fn a_streamed_answer_can_end_with_its_usage() {
    let server = Server::start(&[]).await;
    let body = json!({"prompt": [1, 2, 3], "max_tokens": 3,
        "stream_options": {"include_usage": true}});
    let events = parse(&server.stream("/v1/completions", body).await);
    let (last, others) = events.split_last().unwrap();
    assert!(others.iter().all(|event| event["usage"].is_null()));
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6})
    );
}

#[tokio::test]
async fn chat_whole_and_streamed() {
    let server = Server::start(&[]).await;
    let body = json!({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
        ], "max_completion_tokens": 5, "temperature": 0});
    let (status, whole) = server.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 5);

    let events = parse(&server.stream("/v1/chat/completions", body).await);
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!(
        (&last["finish_reason"], &last["delta"]),
        (&json!("length"), &json!({}))
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_wherever_the_tokens_cut_it() {
    let server = Server::start(&[]).await;
    let body = json!({"prompt": "z", "max_tokens": 40, "temperature": 0});
    let whole = server.complete(body.clone()).await;
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    // Words of 4 bytes: this reaches over the end of the 5th and the 6th token.
    let stop = &text[18..25];
    let at = text.find(stop).unwrap();
    for stops in [json!(stop), json!(["never there", stop])] {
        let mut body = body.clone();
        body["stop"] = stops;
        let answer = server.complete(body.clone()).await;
        assert_eq!(answer["choices"][0]["text"], text[..at]);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let used = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert_eq!(used as usize, (at + stop.len()).div_ceil(4));

        let events = parse(&server.stream("/v1/completions", body).await);
        let streamed: String = events
            .iter()
            .filter_map(|event| event["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(streamed, text[..at]);
        assert_eq!(
            events.last().unwrap()["choices"][0]["finish_reason"],
            "stop"
        );
    }
    server.wait_empty().await;
    assert_eq!(
        server
            .metric("vllm:request_success_total", &[("finished_reason", "stop")])
            .await,
        4.0
    );
}

#[tokio::test]
async fn a_stop_token_ends_the_answer_and_gives_no_text() {
    let server = Server::start(&[]).await;
    let body = json!({"prompt": [77], "max_tokens": 6, "temperature": 0});
    let whole = server.complete(body.clone()).await;
    let text = whole["choices"][0]["text"].as_str().unwrap();
    // Every id is tried as a stop token in one request: the answer ends with its first token.
    let mut all = body.clone();
    all["stop_token_ids"] = (0..128_000).collect();
    let answer = server.complete(all).await;
    assert_eq!(answer["choices"][0]["text"], "");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    assert!(!text.is_empty());
}

#[tokio::test]
async fn harmless_fields_are_accepted() {
    let server = Server::start(&[]).await;
    server
        .complete(
            json!({"prompt": "a", "max_tokens": 1, "n": 1, "best_of": 1, "echo": false,
            "logprobs": null, "user": "me", "presence_penalty": 0, "frequency_penalty": 0.0,
            "logit_bias": {}, "suffix": null, "stream": false, "top_k": -1, "priority": -3,
            "stop": null, "ignore_eos": true}),
        )
        .await;
}

#[tokio::test]
async fn lower_priority_numbers_run_first() {
    let server = Server::start(&["--max-num-seqs", "1"]).await;
    let ask = async |priority: i32, max_tokens: u32| {
        server
            .complete(json!({"prompt": "a", "max_tokens": max_tokens, "priority": priority}))
            .await;
        priority
    };
    // The first holds the only seat while the others queue up.
    let first = ask(0, 400);
    let late = async {
        common::eventually("a seat is taken", async || {
            server.metric("vllm:num_requests_running", &[]).await == 1.0
        })
        .await;
        let order = std::sync::Mutex::new(Vec::new());
        let one = async |priority| {
            let priority = ask(priority, 20).await;
            order.lock().unwrap().push(priority);
        };
        let low = one(5);
        let high = async {
            common::eventually("one waits", async || {
                server.metric("vllm:num_requests_waiting", &[]).await == 1.0
            })
            .await;
            one(-5).await;
        };
        futures::join!(low, high);
        order.into_inner().unwrap()
    };
    let (_, order) = futures::join!(first, late);
    assert_eq!(order, [-5, 5]);
}

#[tokio::test]
async fn a_full_queue_is_told_when_to_come_back() {
    let server = Server::start(&["--max-num-seqs", "1", "--max-waiting", "2"]).await;
    let body = json!({"prompt": "a", "max_tokens": 300});
    let sent: Vec<_> = (0..12)
        .map(|_| server.response("/v1/completions", &body))
        .collect();
    let mut refused = 0;
    for response in futures::future::join_all(sent).await {
        match response.status().as_u16() {
            200 => assert!(response.text().await.unwrap().contains("\"length\"")),
            429 => {
                refused += 1;
                let after = response.headers()["retry-after"]
                    .to_str()
                    .unwrap()
                    .to_owned();
                assert!((1..=60).contains(&after.parse::<u64>().unwrap()));
                let body: Value = response.json().await.unwrap();
                assert_eq!(body["error"]["code"], "queue_full");
            }
            other => panic!("{other}"),
        }
    }
    assert!(refused >= 8, "1 seat, 2 places, {refused} refused");
    let missed = [("objective", "all"), ("met", "false")];
    let missed = server
        .metric("stoker:objective_requests_total", &missed)
        .await;
    assert!(missed >= f64::from(refused));
    server.wait_empty().await;
    // More prompts than can ever wait are refused for good.
    let many = json!({"prompt": [[1], [2], [3]]});
    assert_eq!(server.post("/v1/completions", &many).await.0, 400);
}
