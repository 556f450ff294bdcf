//! Connections: accepted, served, and closed politely.
//!
//! A connection is never cut off between requests for its age: an answer tells the client to
//! close (`Connection: close`), so no request can be lost in a closing socket.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::lifecycle::Lifecycle;
use crate::openai::error::ApiError;

/// How long a connection may wait for a request's head, idle time included.
const HEADER_TIMEOUT: Duration = Duration::from_secs(90);

/// When a peer that vanished without a word is noticed: after 30 s of silence, 3 probes of 10 s.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// Pause after a failed accept (no more file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a router has had the request already, in milliseconds.
const QUEUE_MS: HeaderName = HeaderName::from_static("x-stoker-queue-ms");
/// More than that is no request's wait: the header is something else's.
const MOST_WAITED: Duration = Duration::from_secs(3600);

/// How a request came.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    /// When its connection was accepted.
    pub at: Instant,
    /// How long a router had had it before.
    pub waited: Duration,
}

impl<S: Sync> FromRequestParts<S> for Accepted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts
            .extensions
            .get()
            .copied()
            .ok_or_else(|| ApiError::internal("the request has no connection"))
    }
}

/// A header that can't be read counts as none: it is a hint.
fn waited(headers: &HeaderMap) -> Duration {
    let text = headers.get(QUEUE_MS).and_then(|value| value.to_str().ok());
    let waited = text.and_then(|text| text.parse().ok());
    (waited.map(Duration::from_millis))
        .filter(|waited| *waited <= MOST_WAITED)
        .unwrap_or_default()
}

/// How the connections of a port are served.
#[derive(Clone)]
pub struct Port {
    pub router: Router,
    pub lifecycle: Arc<Lifecycle>,
    /// Age at which the next answer closes the connection; `None`: never.
    pub max_age: Option<Duration>,
    /// Cancelled to end: connections finish their answer and close.
    pub shutdown: CancellationToken,
    pub tasks: TaskTracker,
}

impl Port {
    /// Accepts connections until the shutdown.
    pub async fn serve(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let port = self.clone();
                    self.tasks.spawn(port.serve_connection(stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve_connection(self, stream: TcpStream) {
        tune(&stream);
        let at = Instant::now();
        // Spread, so that connections opened together don't come back together.
        let expires = self
            .max_age
            .map(|age| at + age.mul_f64(rand::random_range(0.9..1.1)));
        let service = service_fn(|mut request: Request<Incoming>| {
            let waited = waited(request.headers());
            request.extensions_mut().insert(Accepted { at, waited });
            let answer = self.router.clone().oneshot(request.map(Body::new));
            let lifecycle = &self.lifecycle;
            async move {
                let mut response = answer.await?;
                let expired = expires.is_some_and(|expires| Instant::now() >= expires);
                if expired || lifecycle.closes_connections() {
                    response
                        .headers_mut()
                        .insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            // Clients that leave in the middle are everyday business.
            tracing::debug!(%error, "connection ended early");
        }
    }
}

fn tune(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| SockRef::from(stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = tuned {
        tracing::debug!(%error, "socket options");
    }
}
