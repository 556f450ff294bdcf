//! The control port: the operator pushes the table and reads the queues.
//!
//! And the metrics port: Prometheus and the kubelet's probes.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::error::ApiError;
use crate::queues::{Reporter, Wake};
use crate::registry::{ApplyError, Router};
use crate::saved::{self, Saved};
use crate::table::Table;
use crate::token::Gate;

type Answer = Response<BoxBody<Bytes, io::Error>>;

const MAX_TABLE_BYTES: usize = 32 << 20;
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// What the control port needs.
#[derive(Debug)]
pub struct Control {
    pub router: Arc<Router>,
    /// None: nobody signs, and the port is on loopback.
    pub gate: Option<Gate>,
    pub state_folder: Option<PathBuf>,
}

/// Serves the control port for ever.
pub async fn serve_control(control: Arc<Control>, listener: TcpListener) {
    serve(listener, move |request| {
        let control = Arc::clone(&control);
        async move { control.answer(request).await }
    })
    .await;
}

/// Serves the metrics port for ever.
pub async fn serve_metrics(router: Arc<Router>, listener: TcpListener) {
    serve(listener, move |request: Request<Incoming>| {
        let router = Arc::clone(&router);
        async move {
            match request.uri().path() {
                "/metrics" => {
                    router.measure();
                    let mut answer = Response::new(full(router.metrics.text()));
                    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
                    answer.headers_mut().insert(CONTENT_TYPE, kind);
                    answer
                }
                "/health" | "/live" => value(StatusCode::OK, &json!({"status": "ok"})),
                "/ready" if router.is_ready() => value(StatusCode::OK, &json!({"status": "ready"})),
                "/ready" => {
                    let why = if router.is_draining() {
                        "draining"
                    } else {
                        "no routing table yet"
                    };
                    value(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": why}))
                }
                path => error(&ApiError::not_found(format!("Nothing is at {path}."))),
            }
        }
    })
    .await;
}

async fn serve<F, A>(listener: TcpListener, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

impl Control {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let epoch = match &self.gate {
            None => None,
            Some(gate) => match gate.check(request.headers()) {
                Ok(epoch) => Some(epoch),
                Err(why) => {
                    let status = StatusCode::FORBIDDEN;
                    return error(&ApiError::invalid(status, "forbidden", why.to_string()));
                }
            },
        };
        let path = request.uri().path().to_owned();
        match (request.method(), path.as_str()) {
            (&Method::PUT, "/control/v1/table") => self.put_table(request, epoch).await,
            (&Method::GET, "/control/v1/table") => self.table(),
            (&Method::GET, "/control/v1/queues") => {
                let queues = Reporter::default().report(&self.router);
                value(StatusCode::OK, &json!(queues))
            }
            (&Method::GET, "/control/v1/watch") => self.watch(),
            (method, path) => error(&ApiError::not_found(format!(
                "Nothing is at {method} {path}."
            ))),
        }
    }

    async fn put_table(&self, request: Request<Incoming>, epoch: Option<u64>) -> Answer {
        let bad = |code, why: String| error(&ApiError::invalid(code, "bad_table", why));
        let body = Limited::new(request.into_body(), MAX_TABLE_BYTES);
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(why) => {
                return bad(
                    StatusCode::BAD_REQUEST,
                    format!("The table can't be read: {why}."),
                );
            }
        };
        let table: Table = match serde_json::from_slice(&body) {
            Ok(table) => table,
            Err(why) => {
                return bad(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    format!("Not a table: {why}."),
                );
            }
        };
        match self.router.apply(&table, epoch) {
            Ok(()) => {}
            Err(why @ ApplyError::Old { .. }) => return bad(StatusCode::CONFLICT, why.to_string()),
            Err(why) => return bad(StatusCode::UNPROCESSABLE_ENTITY, why.to_string()),
        }
        tracing::info!(
            version = table.version,
            services = table.services.len(),
            "table applied"
        );
        let mut saved_to_disk = false;
        if let Some(folder) = self.state_folder.clone() {
            let saved = Saved { epoch, table };
            let written = tokio::task::spawn_blocking(move || saved::save(&folder, &saved)).await;
            match written {
                Ok(Ok(())) => saved_to_disk = true,
                Ok(Err(error)) => tracing::error!(%error, "the table couldn't be saved"),
                Err(error) => tracing::error!(%error, "the table couldn't be saved"),
            }
        }
        let mut answer = self.summary();
        answer["saved"] = saved_to_disk.into();
        value(StatusCode::OK, &answer)
    }

    fn table(&self) -> Answer {
        if self.router.routes().version.is_none() {
            return error(&ApiError::not_found("No table came yet."));
        }
        value(StatusCode::OK, &self.summary())
    }

    fn summary(&self) -> Value {
        let routes = self.router.routes();
        let version = routes.version;
        let replicas: usize = routes
            .services
            .iter()
            .map(|service| service.settings().entry.replicas.len())
            .sum();
        json!({
            "version": version.map(|version| version.version),
            "epoch": version.map(|version| version.epoch),
            "services": routes.services.len(),
            "replicas": replicas,
        })
    }

    /// JSON lines: a report a second, and a wake at once.
    fn watch(&self) -> Answer {
        let (sender, receiver) = mpsc::channel(16);
        let router = Arc::clone(&self.router);
        tokio::spawn(async move {
            let mut wakes = router.wakes.subscribe();
            let mut reporter = Reporter::default();
            let mut interval = tokio::time::interval(REPORT_EVERY);
            loop {
                let line = tokio::select! {
                    wake = wakes.recv() => match wake {
                        Ok(key) => json!(Wake::new(&key)),
                        // The next report tells what was missed.
                        Err(_) => continue,
                    },
                    _ = interval.tick() => json!(reporter.report(&router)),
                    () = sender.closed() => return,
                };
                if sender.send(format!("{line}\n")).await.is_err() {
                    return;
                }
            }
        });
        let mut answer = Response::new(BoxBody::new(Lines(receiver)));
        let kind = HeaderValue::from_static("application/x-ndjson");
        answer.headers_mut().insert(CONTENT_TYPE, kind);
        answer
    }
}

struct Lines(mpsc::Receiver<String>);

impl http_body::Body for Lines {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let line = self.0.poll_recv(context);
        line.map(|line| line.map(|line| Ok(Frame::data(line.into()))))
    }
}

fn full(data: impl Into<Bytes>) -> BoxBody<Bytes, io::Error> {
    BoxBody::new(Full::new(data.into()).map_err(|never| match never {}))
}

fn value(status: StatusCode, value: &Value) -> Answer {
    json_answer(status, value.to_string().into())
}

fn error(error: &ApiError) -> Answer {
    json_answer(error.status, error.json())
}

fn json_answer(status: StatusCode, json: Bytes) -> Answer {
    let mut answer = Response::new(full(json));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}
