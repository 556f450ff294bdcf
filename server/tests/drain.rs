//! From loading to exit, and connections in between.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{PATIENCE, Server, eventually};
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// A connection of a client that does as it likes.
struct Connection(BufReader<TcpStream>);

impl Connection {
    async fn open(server: &Server) -> Self {
        let address = server.url.strip_prefix("http://").unwrap();
        Self(BufReader::new(TcpStream::connect(address).await.unwrap()))
    }

    async fn send(&mut self, body: &Value) {
        let body = body.to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0
            .get_mut()
            .write_all(request.as_bytes())
            .await
            .unwrap();
    }

    /// Reads an answer's head; its first line and its headers in lower case.
    async fn head(&mut self) -> (String, String) {
        let mut first = String::new();
        self.0.read_line(&mut first).await.unwrap();
        let mut headers = String::new();
        while !headers.ends_with("\r\n\r\n") && headers != "\r\n" {
            let n = self.0.read_line(&mut headers).await.unwrap();
            assert!(n > 0, "closed within the head: {first}{headers}");
        }
        (first, headers.to_lowercase())
    }

    async fn body(&mut self, headers: &str) -> String {
        let length = headers
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map(|n| n.trim().parse::<usize>().unwrap());
        let mut body = Vec::new();
        match length {
            Some(length) => {
                body.resize(length, 0);
                self.0.read_exact(&mut body).await.unwrap();
            }
            None => {
                while !body.ends_with(b"\r\n0\r\n\r\n") {
                    let n = self.0.read_until(b'\n', &mut body).await.unwrap();
                    assert!(n > 0, "closed within the body");
                }
            }
        }
        String::from_utf8(body).unwrap()
    }

    /// Whether the server has closed, within the time a test may take.
    async fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        matches!(
            tokio::time::timeout(PATIENCE, self.0.read(&mut byte)).await,
            Ok(Ok(0) | Err(_))
        )
    }
}

#[tokio::test]
async fn the_port_answers_while_the_model_loads() {
    let server = Server::launch(&["--device", "simulated", "--simulated-load-seconds", "3"]);
    assert_eq!(server.get("/health").await.0, 200);
    assert_eq!(server.get("/live").await.0, 200);
    let (status, body) = server.get("/ready").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &body["status"]), (503, &json!("loading")));
    let percent = body["percent"].as_u64().unwrap();
    assert!(percent < 100);
    assert!(server.metric("stoker:loading_progress_ratio", &[]).await < 1.0);
    let response = server
        .response("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "loading");
    assert_eq!(server.get("/v1/models").await.0, 503);
    let (status, _) = server.control(Method::GET, "limits", None).await;
    assert_eq!(status, 503);
    server.wait_ready().await;
    assert_eq!(
        server.metric("stoker:loading_progress_ratio", &[]).await,
        1.0
    );
    server.complete(json!({"prompt": "a"})).await;
}

#[tokio::test]
async fn a_stop_while_loading_is_an_exit() {
    let server = Server::launch(&["--device", "simulated", "--simulated-load-seconds", "600"]);
    server.terminate();
    assert_eq!(server.wait_exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_refuses_what_is_new() {
    let server = Server::start(&[]).await;
    // An old connection, idle; one with an answer under way.
    let mut idle = Connection::open(&server).await;
    idle.send(&json!({"prompt": "a", "max_tokens": 1})).await;
    let (_, headers) = idle.head().await;
    assert!(!headers.contains("connection: close"), "{headers}");
    idle.body(&headers).await;
    let mut busy = Connection::open(&server).await;
    busy.send(&json!({"prompt": "a", "max_tokens": 1000, "stream": true}))
        .await;
    let (first, busy_headers) = busy.head().await;
    assert!(first.contains(" 200 "), "{first}");

    server.terminate();
    eventually("not ready", async || server.get("/ready").await.0 == 503).await;
    assert_eq!(server.get("/live").await.0, 200);
    assert_eq!(server.metric("stoker:draining", &[]).await, 1.0);

    // New work on a new connection: refused, with a hint.
    let mut new = Connection::open(&server).await;
    new.send(&json!({"prompt": "a", "max_tokens": 1})).await;
    let (first, headers) = new.head().await;
    assert!(first.contains(" 503 "), "{first}");
    assert!(headers.contains("retry-after: "), "{headers}");
    assert!(headers.contains("connection: close"), "{headers}");
    assert!(new.body(&headers).await.contains("\"draining\""));
    assert!(new.is_closed().await);

    // The next request on an old connection: its client could not know. Served, and told.
    idle.send(&json!({"prompt": "a", "max_tokens": 1})).await;
    let (first, headers) = idle.head().await;
    assert!(first.contains(" 200 "), "{first}");
    assert!(headers.contains("connection: close"), "{headers}");
    idle.body(&headers).await;
    assert!(idle.is_closed().await);

    // What ran comes to its end.
    let text = busy.body(&busy_headers).await;
    assert!(text.contains("\"length\"") && text.contains("[DONE]"));
    assert!(busy.is_closed().await);
    assert_eq!(server.wait_exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_drain_ends_in_time_even_if_a_request_does_not() {
    let server = Server::start(&["--drain-timeout-seconds", "0.3"]).await;
    let long = json!({"prompt": "a", "max_tokens": 8000, "stream": true});
    let mut busy = Connection::open(&server).await;
    busy.send(&long).await;
    let (_, headers) = busy.head().await;
    server.terminate();
    let text = busy.body(&headers).await;
    assert!(text.contains("\"finish_reason\":\"abort\""), "{text}");
    assert_eq!(server.wait_exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_replica_can_leave_the_rotation_and_come_back() {
    let server = Server::start(&[]).await;
    let (status, state) = server.control(Method::POST, "drain", None).await;
    assert_eq!((status, &state["phase"]), (200, &json!("lame_duck")));
    assert_eq!(server.get("/ready").await.0, 503);
    // It still serves, and sends its clients elsewhere.
    let response = server
        .response("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["connection"], "close");
    let (_, state) = server.control(Method::DELETE, "drain", None).await;
    assert_eq!(state["phase"], "ready");
    assert_eq!(server.get("/ready").await.0, 200);
    let response = server
        .response("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert!(!response.headers().contains_key("connection"));
}

#[tokio::test]
async fn an_old_connection_is_closed_with_its_next_answer() {
    let server = Server::start(&["--max-connection-age-seconds", "0.5"]).await;
    for stream in [false, true] {
        let mut connection = Connection::open(&server).await;
        let body = json!({"prompt": "a", "max_tokens": 2, "stream": stream});
        let mut answers = 0;
        loop {
            connection.send(&body).await;
            let (first, headers) = connection.head().await;
            assert!(first.contains(" 200 "), "{first}");
            let text = connection.body(&headers).await;
            assert!(text.contains("length"), "whole to the end: {text}");
            answers += 1;
            if headers.contains("connection: close") {
                break;
            }
            assert!(answers < 10_000, "never closed");
        }
        assert!(answers > 1, "closed before its time");
        assert!(connection.is_closed().await);
    }
    // An answer that streams past the age is not cut.
    let mut connection = Connection::open(&server).await;
    let long = json!({"prompt": "a", "max_tokens": 600, "stream": true});
    connection.send(&long).await;
    let (_, headers) = connection.head().await;
    assert!(connection.body(&headers).await.contains("[DONE]"));
}

#[tokio::test]
async fn clients_that_leave_free_what_they_held() {
    let server = Server::start(&["--max-num-seqs", "4"]).await;
    let long = |stream: bool| json!({"prompt": vec![7; 500], "max_tokens": 7000, "stream": stream});
    let mut gone = Vec::new();
    // Streaming, waiting for a whole answer, and waiting in the queue.
    for stream in [true, false, true, false, true, false] {
        let mut connection = Connection::open(&server).await;
        connection.send(&long(stream)).await;
        gone.push(connection);
    }
    eventually("all arrived", async || {
        server.metric("vllm:num_requests_running", &[]).await == 4.0
            && server.metric("vllm:num_requests_waiting", &[]).await == 2.0
    })
    .await;
    assert!(server.metric("stoker:kv_tokens", &[]).await >= 500.0);
    drop(gone);
    server.wait_empty().await;
    let aborted = [("finished_reason", "abort")];
    assert_eq!(
        server.metric("vllm:request_success_total", &aborted).await,
        6.0
    );
    server.complete(json!({"prompt": "still alive"})).await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_no_block_for_long() {
    let server = Server::start(&[]).await;
    let mut deaf = Connection::open(&server).await;
    deaf.send(&json!({"prompt": "a", "max_tokens": 3000, "stream": true}))
        .await;
    eventually("it runs", async || {
        server.metric("vllm:num_requests_running", &[]).await == 1.0
    })
    .await;
    // The engine goes on; the text waits for its reader, bounded by max_tokens.
    server.wait_empty().await;
    let (_, headers) = deaf.head().await;
    assert!(deaf.body(&headers).await.contains("[DONE]"));
}

#[tokio::test]
async fn many_clients_at_once_lose_nothing() {
    let server = Server::start(&["--max-num-seqs", "64"]).await;
    let requests = (0..200).map(|n| {
        let (server, stream) = (&server, n % 2 == 0);
        async move {
            let body = json!({"prompt": [n], "max_tokens": 20, "stream": stream});
            let response = server.response("/v1/completions", &body).await;
            response.text().await.unwrap()
        }
    });
    let texts: Vec<String> = futures::stream::iter(requests)
        .buffer_unordered(100)
        .collect()
        .await;
    assert!(texts.iter().all(|text| text.contains("\"length\"")));
    server.wait_empty().await;
    assert_eq!(
        server.metric("stoker:requests_received_total", &[]).await,
        200.0
    );
    assert_eq!(
        server.metric("vllm:generation_tokens_total", &[]).await,
        4000.0
    );
}
