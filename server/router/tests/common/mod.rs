//! A router in this process, stand-in replicas, and a client.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod replica;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use stoker_router::config::Config;
use stoker_router::control::{Control, serve_control, serve_metrics};
use stoker_router::listener::listen;
use stoker_router::metrics::Metrics;
use stoker_router::record::AccessLog;
use stoker_router::registry::Router;
use stoker_router::workers::Workers;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

#[allow(unused_imports, reason = "each test file uses its own part")]
pub use replica::{Behaviour, Replica};

pub struct TestRouter {
    pub router: Arc<Router>,
    pub address: SocketAddr,
    pub control: SocketAddr,
    pub metrics: SocketAddr,
    pub stop: CancellationToken,
    pub connections: TaskTracker,
}

pub fn config() -> Config {
    let mut config = Config {
        heartbeat: Duration::from_millis(100),
        poll: Duration::from_millis(100),
        ..Config::default()
    };
    config.timeouts.connect = Duration::from_millis(500);
    config.timeouts.probe = Duration::from_millis(300);
    config
}

impl TestRouter {
    pub async fn start() -> Self {
        Self::with(config()).await
    }

    pub async fn with(config: Config) -> Self {
        let router = Router::new(config, Metrics::new().unwrap(), AccessLog::off());
        let bind = || TcpListener::bind("127.0.0.1:0");
        let (public, control, metrics) = (
            bind().await.unwrap(),
            bind().await.unwrap(),
            bind().await.unwrap(),
        );
        let this = Self {
            address: public.local_addr().unwrap(),
            control: control.local_addr().unwrap(),
            metrics: metrics.local_addr().unwrap(),
            router: Arc::clone(&router),
            stop: CancellationToken::new(),
            connections: TaskTracker::new(),
        };
        let port = Control {
            router: Arc::clone(&router),
            gate: None,
            state_folder: None,
        };
        tokio::spawn(serve_control(Arc::new(port), control));
        tokio::spawn(serve_metrics(Arc::clone(&router), metrics));
        tokio::spawn(Arc::clone(&router).tick());
        tokio::spawn(listen(
            router,
            public,
            None,
            Workers::here(),
            this.connections.clone(),
            this.stop.clone(),
        ));
        this
    }

    /// Pushes a table with the one service ns/svc, host "svc.ns", model "m".
    pub fn push(&self, replicas: &[Value]) {
        self.push_with(replicas, json!({}));
    }

    pub fn push_with(&self, replicas: &[Value], more: Value) {
        let mut service = json!({"namespace": "ns", "name": "svc", "models": ["m"],
            "hosts": ["svc.ns"], "replicas": replicas, "max_queue_wait_seconds": 60,
            "cold_start_deadline_seconds": 30});
        for (name, value) in more.as_object().unwrap() {
            service[name] = value.clone();
        }
        let table = json!({"version": 1, "services": [service]});
        let table = serde_json::from_value(table).unwrap();
        self.router.apply(&table, None).unwrap();
    }

    pub async fn metric(&self, line_start: &str) -> f64 {
        let text = get(self.metrics, "x", "/metrics").await.text;
        let lines = text.lines().filter(|line| line.starts_with(line_start));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    pub async fn complete(&self, body: Value) -> Answer {
        post(self.address, "svc.ns", "/v1/completions", &body, &[]).await
    }

    pub async fn open(&self, body: Value) -> Response<Incoming> {
        let request = request("svc.ns", "/v1/completions", &body, &[]);
        send(self.address, request).await.unwrap()
    }
}

pub fn body(tokens: u32, stream: bool) -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": tokens, "stream": stream})
}

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
    /// The body ended as it should.
    pub whole: bool,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    /// Numbers of the tokens of a stream, whether it said [DONE], and its error.
    pub fn events(&self) -> (Vec<u64>, bool, Option<String>) {
        let (mut tokens, mut done, mut error) = (Vec::new(), false, None);
        for line in self.text.lines().filter(|line| !line.is_empty()) {
            if line.starts_with(':') {
                continue;
            }
            let data = line.strip_prefix("data: ").expect(line);
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let value: Value = serde_json::from_str(data).expect(data);
            match value["token"].as_u64() {
                Some(token) => tokens.push(token),
                None => error = Some(value["error"]["message"].as_str().expect(data).into()),
            }
        }
        (tokens, done, error)
    }
}

pub fn request(
    host: &str,
    path: &str,
    body: &Value,
    headers: &[(&str, &str)],
) -> Request<Full<Bytes>> {
    let mut request = Request::post(path)
        .header("host", host)
        .header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body.to_string().into())).unwrap()
}

pub async fn send(
    address: SocketAddr,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, String> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(|e| e.to_string())?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    // Ends with the response's body, or when that is dropped.
    tokio::spawn(connection);
    sender
        .send_request(request)
        .await
        .map_err(|e| e.to_string())
}

pub async fn read(response: Response<Incoming>) -> Answer {
    let (parts, mut body) = response.into_parts();
    let mut data = Vec::new();
    let mut whole = true;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => data.extend_from_slice(&frame.into_data().unwrap()),
            Err(_) => whole = false,
        }
    }
    Answer {
        status: parts.status,
        headers: parts.headers,
        text: String::from_utf8(data).unwrap(),
        whole,
    }
}

pub async fn post(
    address: SocketAddr,
    host: &str,
    path: &str,
    body: &Value,
    headers: &[(&str, &str)],
) -> Answer {
    let response = send(address, request(host, path, body, headers)).await;
    read(response.unwrap()).await
}

pub async fn get(address: SocketAddr, host: &str, path: &str) -> Answer {
    let request = Request::get(path).header("host", host);
    let request = request.body(Full::new(Bytes::new())).unwrap();
    read(send(address, request).await.unwrap()).await
}

/// Waits until something holds; fails after 10 s.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}
