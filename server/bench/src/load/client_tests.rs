use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Notes the texts it is told of.
#[derive(Default)]
struct Texts(Mutex<Vec<bool>>);

impl Listener for Texts {
    fn text(&self, first: bool, _since: Duration) {
        self.0.lock().unwrap().push(first);
    }
}

/// Sends a request to a server that answers with these bytes and closes.
async fn send(answer: &'static str, stream: bool) -> (Result<Answer, Failure>, Vec<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = Target {
        url: format!("http://{}/v1/completions", listener.local_addr().unwrap()),
        model: None,
        stream,
        timeout: Duration::from_millis(500),
    };
    let server = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        assert!(socket.read(&mut request).await.unwrap() > 0);
        if answer == "silence" {
            std::future::pending::<()>().await;
        }
        socket.write_all(answer.as_bytes()).await.unwrap();
    };
    let texts = Texts::default();
    let prompt = Prompt {
        ids: vec![1, 2],
        max_tokens: 2,
    };
    let client = target.client().unwrap();
    let mut sent = Box::pin(target.send(&client, &prompt, &texts));
    let result = tokio::select! {
        result = &mut sent => result,
        () = server => sent.as_mut().await,
    };
    drop(sent);
    (result, texts.0.into_inner().unwrap())
}

const EVENTS: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n\
    data: {\"choices\":[{\"text\":\"a\"}]}\n\n\
    data: {\"choices\":[{\"text\":\"b\"}],\"usage\":null}\n\n\
    data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":2}}\n\n\
    data: [DONE]\n\n";

#[tokio::test]
async fn a_streamed_answer_is_counted_and_timed() {
    let (result, texts) = send(EVENTS, true).await;
    let answer = result.unwrap();
    assert_eq!((answer.prompt_tokens, answer.completion_tokens), (2, 2));
    assert_eq!(texts, [true, false]);
}

#[tokio::test]
async fn a_whole_answer_is_counted() {
    let json = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n\
        {\"choices\":[{\"text\":\"ab\"}],\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":2}}";
    assert_eq!(send(json, false).await.0.unwrap().completion_tokens, 2);
}

#[tokio::test]
async fn every_failure_has_its_kind() {
    let cases = [
        ("", "disconnected"),
        ("silence", "timeout"),
        (
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\n{}",
            "http_503",
        ),
        (
            "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n",
            "http_429",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: {\"choices\":[{\"text\":\"a\"}]}\n\n",
            "incomplete",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:",
            "disconnected",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: {\"error\":{\"message\":\"x\"}}\n\n",
            "stream_error",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: {oops\n\n",
            "bad_response",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: [DONE]\n\n",
            "bad_response",
        ),
    ];
    for (answer, kind) in cases {
        let failure = send(answer, true).await.0.unwrap_err();
        assert_eq!(failure.kind, kind, "{answer:?}: {}", failure.detail);
        let after = (kind == "http_503").then_some(Duration::from_secs(7));
        assert_eq!(failure.retry_after, after, "{answer:?}");
    }
    let target = Target {
        // A port that nobody listens on.
        url: "http://127.0.0.1:1/".into(),
        model: None,
        stream: true,
        timeout: Duration::from_secs(5),
    };
    let prompt = Prompt {
        ids: vec![1],
        max_tokens: 1,
    };
    let client = target.client().unwrap();
    let failure = target.send(&client, &prompt, &Texts::default()).await;
    assert_eq!(failure.unwrap_err().kind, "connect");
}
