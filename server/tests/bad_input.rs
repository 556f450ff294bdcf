//! Whatever is sent: the right 4xx in OpenAI's form, and nothing left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Server;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A bad request and how it must be answered.
struct Case {
    name: &'static str,
    method: Method,
    path: &'static str,
    body: Vec<u8>,
    status: u16,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

fn completion(name: &'static str, body: Value) -> Case {
    Case {
        name,
        method: Method::POST,
        path: "/v1/completions",
        body: body.to_string().into_bytes(),
        status: 400,
        param: None,
        code: None,
    }
}

fn chat(name: &'static str, body: Value) -> Case {
    Case {
        path: "/v1/chat/completions",
        ..completion(name, body)
    }
}

impl Case {
    fn raw(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    fn at(mut self, method: Method, path: &'static str) -> Self {
        (self.method, self.path) = (method, path);
        self
    }

    fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    fn param(mut self, param: &'static str) -> Self {
        self.param = Some(param);
        self
    }

    fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }
}

fn cases() -> Vec<Case> {
    let hi = || json!([{"role": "user", "content": "hi"}]);
    let none = || json!({});
    vec![
        completion("empty body", none()).raw(b""),
        completion("truncated JSON", none()).raw(b"{\"prompt\": \"a\", \"max_tok"),
        completion("not JSON", none()).raw(b"prompt=a"),
        completion("invalid UTF-8", none()).raw(b"{\"prompt\": \"a\xff\xfe\"}"),
        completion("two objects", none()).raw(b"{\"prompt\":\"a\"}{}"),
        completion("a list", json!([1])),
        completion("deep nesting", none())
            .raw(format!("{{\"x\":{}", "[".repeat(10_000)).as_bytes()),
        completion("a field given twice", none()).raw(b"{\"prompt\":\"a\",\"prompt\":\"b\"}"),
        completion("NaN", none()).raw(b"{\"prompt\":\"a\",\"temperature\":NaN}"),
        completion("a number too large", none()).raw(b"{\"prompt\":\"a\",\"temperature\":1e999}"),
        completion("no prompt", none()).param("prompt"),
        completion("null prompt", json!({"prompt": null})).param("prompt"),
        completion("empty prompt", json!({"prompt": ""})).param("prompt"),
        completion("empty list", json!({"prompt": []})).param("prompt"),
        completion("an empty prompt among others", json!({"prompt": [[1], []]})).param("prompt"),
        completion("prompt of a wrong type", json!({"prompt": 5})).param("prompt"),
        completion("mixed prompt", json!({"prompt": [1, "a"]})).param("prompt"),
        completion("negative token", json!({"prompt": [-1]})).param("prompt[0]"),
        completion("fraction as token", json!({"prompt": [1.5]})).param("prompt[0]"),
        completion(
            "token out of the vocabulary",
            json!({"prompt": [1, 128_000]}),
        )
        .param("prompt"),
        completion(
            "stop token out of the vocabulary",
            json!({"prompt": "a", "stop_token_ids": [4_000_000]}),
        )
        .param("stop_token_ids"),
        completion("prompt over the context", json!({"prompt": vec![1; 8193]}))
            .param("prompt")
            .code("context_length_exceeded"),
        completion(
            "prompt and answer over the context",
            json!({"prompt": vec![1; 8000], "max_tokens": 193}),
        )
        .code("context_length_exceeded"),
        completion(
            "absurd max_tokens",
            json!({"prompt": "a", "max_tokens": i64::MAX}),
        )
        .code("context_length_exceeded"),
        completion(
            "negative max_tokens",
            json!({"prompt": "a", "max_tokens": -1}),
        )
        .param("max_tokens"),
        completion("max_tokens 0", json!({"prompt": "a", "max_tokens": 0})).param("max_tokens"),
        completion(
            "max_tokens as text",
            json!({"prompt": "a", "max_tokens": "5"}),
        )
        .param("max_tokens"),
        completion(
            "temperature too high",
            json!({"prompt": "a", "temperature": 2.1}),
        )
        .param("temperature"),
        completion(
            "temperature negative",
            json!({"prompt": "a", "temperature": -0.1}),
        )
        .param("temperature"),
        completion(
            "temperature as text",
            json!({"prompt": "a", "temperature": "hot"}),
        )
        .param("temperature"),
        completion("top_p 0", json!({"prompt": "a", "top_p": 0})).param("top_p"),
        completion("top_p above 1", json!({"prompt": "a", "top_p": 1.01})).param("top_p"),
        completion("top_k negative", json!({"prompt": "a", "top_k": -2})).param("top_k"),
        completion("seed as fraction", json!({"prompt": "a", "seed": 0.5})).param("seed"),
        completion(
            "priority too large",
            json!({"prompt": "a", "priority": 1_i64 << 40}),
        )
        .param("priority"),
        completion(
            "five stops",
            json!({"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}),
        )
        .param("stop"),
        completion("empty stop", json!({"prompt": "a", "stop": ""})).param("stop"),
        completion("stop of a wrong type", json!({"prompt": "a", "stop": [1]})),
        completion("stream as text", json!({"prompt": "a", "stream": "yes"})).param("stream"),
        completion(
            "stream_options without stream",
            json!({"prompt": "a", "stream_options": {}}),
        )
        .param("stream_options"),
        completion(
            "unknown stream option",
            json!({"prompt": "a", "stream": true, "stream_options": {"x": 1}}),
        ),
        completion("two choices", json!({"prompt": "a", "n": 2}))
            .param("n")
            .code("unsupported_parameter"),
        completion("best_of", json!({"prompt": "a", "best_of": 3}))
            .param("best_of")
            .code("unsupported_parameter"),
        completion("logprobs", json!({"prompt": "a", "logprobs": 1}))
            .param("logprobs")
            .code("unsupported_parameter"),
        completion("echo", json!({"prompt": "a", "echo": true}))
            .param("echo")
            .code("unsupported_parameter"),
        completion("suffix", json!({"prompt": "a", "suffix": "b"}))
            .param("suffix")
            .code("unsupported_parameter"),
        completion("misspelt field", json!({"prompt": "a", "temprature": 0}))
            .param("temprature")
            .code("unknown_parameter"),
        completion("unknown model", json!({"prompt": "a", "model": "gpt-5"}))
            .status(404)
            .param("model")
            .code("model_not_found"),
        chat("no messages", none()).param("messages"),
        chat("empty messages", json!({"messages": []})).param("messages"),
        chat("messages as text", json!({"messages": "hi"})).param("messages"),
        chat(
            "a message without role",
            json!({"messages": [{"content": "hi"}]}),
        ),
        chat(
            "unknown role",
            json!({"messages": [{"role": "king", "content": "hi"}]}),
        )
        .param("messages[0].role"),
        chat("no content", json!({"messages": [{"role": "user"}]})).param("messages[0].content"),
        chat(
            "an image",
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        )
        .param("messages[0].content[0].type")
        .code("unsupported_parameter"),
        chat(
            "tools",
            json!({"messages": hi(), "tools": [{"type": "function"}]}),
        )
        .param("tools")
        .code("unsupported_parameter"),
        chat(
            "JSON mode",
            json!({"messages": hi(), "response_format": {"type": "json_object"}}),
        )
        .param("response_format")
        .code("unsupported_parameter"),
        chat("logprobs", json!({"messages": hi(), "logprobs": true}))
            .param("logprobs")
            .code("unsupported_parameter"),
        chat(
            "max_completion_tokens 0",
            json!({"messages": hi(), "max_completion_tokens": 0}),
        )
        .param("max_completion_tokens"),
        chat(
            "over the context",
            json!({"messages": [{"role": "user", "content": "word ".repeat(9000)}]}),
        )
        .param("messages")
        .code("context_length_exceeded"),
        completion("unknown route", none())
            .at(Method::POST, "/v1/embeddings")
            .status(404)
            .code("unknown_url"),
        completion("unknown route, GET", none())
            .at(Method::GET, "/")
            .status(404)
            .code("unknown_url"),
        completion("wrong method", none())
            .at(Method::GET, "/v1/completions")
            .status(405)
            .code("method_not_allowed"),
        completion("wrong method on a probe", none())
            .at(Method::POST, "/ready")
            .status(405)
            .code("method_not_allowed"),
        completion("unknown metrics", none())
            .at(Method::GET, "/metrics?include=all")
            .param("include"),
        completion("oversized body", none())
            .raw(&vec![b' '; (64 << 10) + 1])
            .status(413)
            .code("request_too_large"),
        completion("a far oversized body", none())
            .raw(&vec![b' '; 8 << 20])
            .status(413)
            .code("request_too_large"),
    ]
}

#[tokio::test]
async fn every_bad_request_gets_its_answer() {
    let server = Server::start(&["--max-body-bytes", "65536"]).await;
    let before = server.metric("stoker:requests_received_total", &[]).await;
    for case in cases() {
        let response = server
            .http
            .request(case.method, server.url.clone() + case.path)
            .body(case.body)
            .send()
            .await
            .unwrap_or_else(|e| panic!("{}: {e:?}", case.name));
        assert_eq!(response.status().as_u16(), case.status, "{}", case.name);
        let body: Value = response.json().await.expect(case.name);
        let error = &body["error"];
        assert!(
            error["message"].as_str().is_some_and(|m| m.len() > 10),
            "{}: {body}",
            case.name
        );
        assert!(error["type"].is_string(), "{}: {body}", case.name);
        if let Some(param) = case.param {
            assert_eq!(error["param"], param, "{}: {body}", case.name);
        }
        if let Some(code) = case.code {
            assert_eq!(error["code"], code, "{}: {body}", case.name);
        }
    }
    let after = server.metric("stoker:requests_received_total", &[]).await;
    assert_eq!(before, after, "a refused request reached the engine");
    server.wait_empty().await;
    server
        .complete(json!({"prompt": "still alive", "max_tokens": 1}))
        .await;
}

/// Sends bytes as they are and returns all that comes back until the server closes.
async fn raw(server: &Server, bytes: &[u8], then_close: bool) -> String {
    let address = server.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    if then_close {
        stream.shutdown().await.unwrap();
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn bytes_that_are_not_http_are_refused_or_closed() {
    let server = Server::start(&[]).await;
    for bytes in [
        &b"\x16\x03\x01\x02\x00"[..],
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let answer = raw(&server, bytes, true).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{:?}: {answer}",
            String::from_utf8_lossy(bytes)
        );
    }
    // A body that breaks off is nobody's request.
    let half =
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{\"prompt\":";
    raw(&server, half, true).await;
    server.wait_empty().await;
    server
        .complete(json!({"prompt": "still alive", "max_tokens": 1}))
        .await;
}

#[test]
fn wrong_flags_end_with_code_2_and_a_reason() {
    for (flags, word) in [
        (&["--device", "cuda"][..], "--model"),
        (&["--device", "gpu"], "possible values"),
        (&[], "--model"),
        (&["--model", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (
            &["--device", "simulated", "--max-num-seqs", "0"],
            "--max-num-seqs",
        ),
        (
            &["--device", "simulated", "--objectives", "{\"itl_ms\": -1}"],
            "itl_ms",
        ),
        (
            &["--device", "simulated", "--no-such-flag"],
            "--no-such-flag",
        ),
        (
            &[
                "--device",
                "simulated",
                "--pod-uid",
                "u",
                "--control-key",
                "/nowhere/key.pem",
                "--port",
                "0",
                "--control-port",
                "0",
            ],
            "/nowhere/key.pem",
        ),
    ] {
        let (code, text) = common::run_to_end(flags);
        assert_eq!(code, 2, "{flags:?}: {text}");
        assert!(text.contains(word), "{flags:?}: {text}");
    }
}
