//! One request on its way to a replica: wait for room, try, try elsewhere, answer.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::response;
use hyper::{Method, Request, Response, StatusCode, Uri};

use crate::body::{Body, Learn, StreamBody};
use crate::clock;
use crate::config::Timeouts;
use crate::error::ApiError;
use crate::keys::Usages;
use crate::lease::Lease;
use crate::record::Record;
use crate::registry::HeldBytes;
use crate::replica::Ejection;
use crate::service::{Refusal, Service, Ticket};
use crate::sse::{Events, usage};
use crate::upstream::{Connection, SendError};

/// Answers up to this size are read whole before they are passed on, so that a replica's death
/// in the middle is no loss.
const BUFFERED: usize = 1 << 20;
/// A request may take down at most so many replicas before it is suspected itself.
const MOST_BROKEN: u32 = 3;
/// Attempts of all kinds.
const MOST_ATTEMPTS: u32 = 20;
const REFUSAL_BYTES: usize = 64 << 10;

pub const QUEUE_MS: HeaderName = HeaderName::from_static("x-stoker-queue-ms");
pub const COLD_START_MS: HeaderName = HeaderName::from_static("x-stoker-cold-start-ms");
pub const REPLICA: HeaderName = HeaderName::from_static("x-stoker-replica");
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request that was read, understood and admitted.
#[derive(Debug)]
pub struct Exchange {
    pub service: Arc<Service>,
    pub ticket: Ticket,
    pub method: Method,
    pub uri: Uri,
    /// Without those of the connection.
    pub headers: HeaderMap,
    pub body: Bytes,
    pub held: HeldBytes,
    pub stream: bool,
    pub learn: Learn,
    pub usages: Usages,
    pub request_id: HeaderValue,
    pub record: Box<Record>,
    pub timeouts: Timeouts,
    /// Spent on reading the request from the client.
    pub reading: f64,
}

/// Why an attempt failed; the client has seen nothing of it.
enum Failure {
    Connect(String),
    /// The replica answered that it can't take it.
    Refused(Response<Bytes>),
    Broken(String),
    Silent,
}

/// What came of an attempt.
enum Answer {
    Whole(response::Parts, Bytes),
    Stream(response::Parts, Incoming, Bytes, Option<Events>),
}

impl Exchange {
    /// Takes the request to its end, whatever happens.
    pub async fn run(mut self) -> Response<Body> {
        let mut broken = 0;
        let mut waited = 0.0;
        let mut cold = false;
        let mut last: Option<Failure> = None;
        loop {
            let asked = clock::now();
            let was_cold = !self.service.is_usable();
            let lease = self.service.acquire(&self.ticket).await;
            let wait = clock::now() - asked;
            waited += wait;
            cold |= was_cold;
            self.record.line.queue_ms = milliseconds(waited);
            self.record.line.cold_start_ms = cold.then(|| milliseconds(waited));
            let lease = match lease {
                Ok(lease) => lease,
                Err(refusal) => return self.refused(&refusal, last),
            };
            if self.record.line.attempts == 0 {
                self.service.metrics.queue_seconds.observe(waited);
            }
            self.record.line.attempts += 1;
            self.record.line.replica = Some(lease.replica.id.clone());
            let (failure, lease) = match self.attempt(lease, waited).await {
                Ok(response) => return self.finish(response),
                Err(failed) => failed,
            };
            broken += u32::from(matches!(failure, Failure::Broken(_) | Failure::Silent));
            self.blame(&failure, &lease);
            self.ticket.tried.push(lease.replica.slot);
            drop(lease);
            let over = self.record.line.attempts >= MOST_ATTEMPTS || broken >= MOST_BROKEN;
            if over {
                return self.give_up(failure);
            }
            if matches!(failure, Failure::Refused(_)) && self.record.line.attempts > 3 {
                // All seem to be full: don't spin.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            last = Some(failure);
        }
    }

    /// Counts a failure against its replica.
    fn blame(&self, failure: &Failure, lease: &Lease) {
        let metrics = &self.service.metrics;
        let replica = &lease.replica;
        let (reason, ejection) = match failure {
            Failure::Connect(_) => (0, replica.eject(Ejection::Failing).then_some(0)),
            Failure::Refused(response) if response.status() == StatusCode::TOO_MANY_REQUESTS => {
                replica.full(clock::now());
                (1, None)
            }
            Failure::Refused(_) => (1, replica.eject(Ejection::NotReady).then_some(1)),
            Failure::Broken(_) => (2, replica.failed().then_some(0)),
            Failure::Silent => (3, replica.failed().then_some(0)),
        };
        metrics.retries[reason].inc();
        if let Some(ejection) = ejection {
            metrics.ejections[ejection].inc();
            tracing::warn!(service = %self.service.key, replica = %replica.id, reason,
                           "replica ejected");
        }
    }

    async fn attempt(
        &mut self,
        mut lease: Lease,
        waited: f64,
    ) -> Result<Response<Body>, (Failure, Lease)> {
        let replica = Arc::clone(&lease.replica);
        let mut unresponsive = pin!(replica.unresponsive.notified());
        unresponsive.as_mut().enable();
        let limit = tokio::time::sleep(self.timeouts.first_byte);
        let answered = tokio::select! {
            biased;
            answered = self.exchange(&lease, waited) => answered,
            () = unresponsive => Err(Failure::Silent),
            () = limit => Err(Failure::Silent),
        };
        let (answer, connection) = match answered {
            Ok(answered) => answered,
            Err(failure) => return Err((failure, lease)),
        };
        let (mut parts, body) = match answer {
            Answer::Whole(parts, data) => {
                let (prompt, completion) = usage(&data);
                self.learn.from(prompt, completion);
                lease.completed();
                lease.replica.pool.put(connection);
                drop(lease);
                (parts, Body::full(data))
            }
            Answer::Stream(parts, upstream, first, events) => {
                lease.progress(0);
                let body = StreamBody {
                    upstream,
                    connection: Some(connection),
                    lease: Some(lease),
                    learn: self.learn.clone(),
                    events,
                    first: Some(first),
                    record: None,
                    idle_limit: self.timeouts.stream_idle,
                    idle: None,
                    last_frame: clock::now(),
                    ended: false,
                };
                (parts, Body::Stream(Box::new(body)))
            }
        };
        strip_connection_headers(&mut parts.headers);
        Ok(Response::from_parts(parts, body))
    }

    /// Sends, and waits for what makes the answer final: the whole of a short one, the first
    /// event of a stream.
    async fn exchange(&self, lease: &Lease, waited: f64) -> Result<(Answer, Connection), Failure> {
        let pool = &lease.replica.pool;
        let mut connection = pool.get(self.timeouts.connect).await.map_err(failure)?;
        if self.record.line.attempts == 1 {
            let added = clock::now() - self.record.started - self.reading - waited;
            self.service.metrics.added_seconds.observe(added.max(0.0));
        }
        let reused = connection.reused;
        let response = match connection.send(self.request()).await {
            // An idle connection that the replica closed at this moment says nothing of its
            // health.
            Err(SendError::NotSent | SendError::Broken(_)) if reused => {
                connection = pool.open(self.timeouts.connect).await.map_err(failure)?;
                connection.send(self.request()).await
            }
            sent => sent,
        };
        let (parts, mut body) = response.map_err(failure)?.into_parts();
        let broken = |error: hyper::Error| Failure::Broken(error.to_string());
        if matches!(
            parts.status,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS
        ) {
            let body = connection.collect(body, REFUSAL_BYTES).await;
            let body = body.unwrap_or_default();
            return Err(Failure::Refused(Response::from_parts(parts, body)));
        }
        let event_stream = parts
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        if event_stream && parts.status == StatusCode::OK {
            let mut events = Events::default();
            loop {
                let frame = connection.frame(&mut body).await;
                let Some(frame) = frame.transpose().map_err(broken)? else {
                    let why = "the stream ended before its first event";
                    return Err(Failure::Broken(why.into()));
                };
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                if let Some(first) = events.push(data) {
                    let answer = Answer::Stream(parts, body, first, Some(events));
                    return Ok((answer, connection));
                }
            }
        }
        let mut whole = Bytes::new();
        let mut more = BytesMut::new();
        while let Some(frame) = connection.frame(&mut body).await {
            let Ok(data) = frame.map_err(broken)?.into_data() else {
                continue;
            };
            if whole.is_empty() && more.is_empty() {
                whole = data;
                continue;
            }
            if more.is_empty() {
                more.extend_from_slice(&whole);
            }
            more.extend_from_slice(&data);
            if more.len() > BUFFERED {
                let answer = Answer::Stream(parts, body, more.freeze(), None);
                return Ok((answer, connection));
            }
        }
        if !more.is_empty() {
            whole = more.freeze();
        }
        Ok((Answer::Whole(parts, whole), connection))
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        // For a replica, the request's time runs since it came here.
        let waited = milliseconds(clock::now() - self.record.started);
        (request.headers_mut()).insert(QUEUE_MS, (waited as u64).into());
        request
    }

    /// Adds what the router has to say to an answer.
    fn finish(mut self, mut response: Response<Body>) -> Response<Body> {
        let line = &self.record.line;
        let headers = response.headers_mut();
        headers.insert(QUEUE_MS, (line.queue_ms as u64).into());
        if let Some(cold) = line.cold_start_ms {
            headers.insert(COLD_START_MS, (cold as u64).into());
        }
        let replica = line.replica.as_deref().map(HeaderValue::from_str);
        if let Some(Ok(replica)) = replica {
            headers.insert(REPLICA, replica);
        }
        headers.insert(REQUEST_ID, self.request_id.clone());
        self.usages.write(headers);
        self.record.answered(response.status());
        match response.body_mut() {
            Body::Full(_, record) => *record = Some(self.record),
            Body::Stream(body) => body.record = Some(self.record),
            Body::Held(_) => {}
        }
        response
    }

    fn refused(self, refusal: &Refusal, last: Option<Failure>) -> Response<Body> {
        let key = Arc::clone(&self.service.key);
        let error = match refusal {
            Refusal::Busy {
                retry_after,
                waiting,
            } => {
                let message = format!(
                    "Service {key} has {waiting} requests waiting, more than its objectives \
                     allow; try again in {:.0} s.",
                    retry_after.max(1.0).ceil()
                );
                ApiError::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "rate_limit_error",
                    "queue_full",
                    message,
                )
                .retry_after(*retry_after)
            }
            Refusal::NoReplica { waited } => {
                if let Some(last) = last {
                    return self.give_up(last);
                }
                let message = format!("No replica of service {key} was ready after {waited:.0} s.");
                ApiError::unavailable("no_replica", message).retry_after(5.0)
            }
            Refusal::Removed => ApiError::not_found(format!("Service {key} was removed.")),
        };
        let response = answer(&error);
        self.finish(response)
    }

    fn give_up(self, failure: Failure) -> Response<Body> {
        let attempts = self.record.line.attempts;
        let error = match failure {
            Failure::Refused(refusal) => {
                let (mut parts, body) = refusal.into_parts();
                strip_connection_headers(&mut parts.headers);
                return self.finish(Response::from_parts(parts, Body::full(body)));
            }
            Failure::Connect(why) | Failure::Broken(why) => {
                format!("{attempts} attempts failed, the last one: {why}.")
            }
            Failure::Silent => {
                format!("{attempts} attempts failed: the replica didn't answer in time.")
            }
        };
        let response = answer(&ApiError::bad_gateway(error));
        self.finish(response)
    }
}

/// The error as an answer.
#[must_use]
pub fn answer(error: &ApiError) -> Response<Body> {
    let mut response = Response::new(Body::full(error.json()));
    *response.status_mut() = error.status;
    let headers = response.headers_mut();
    let json = HeaderValue::from_static("application/json");
    headers.insert(header::CONTENT_TYPE, json);
    if let Some(seconds) = error.retry_after {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    if error.status == StatusCode::UNAUTHORIZED {
        let bearer = HeaderValue::from_static("Bearer");
        headers.insert(header::WWW_AUTHENTICATE, bearer);
    }
    response
}

/// Headers that concern one connection only (RFC 9110, section 7.6.1).
pub fn strip_connection_headers(headers: &mut HeaderMap) {
    if let Some(listed) = headers.remove(header::CONNECTION) {
        for name in listed.to_str().unwrap_or("").split(',') {
            if let Ok(name) = HeaderName::try_from(name.trim()) {
                headers.remove(name);
            }
        }
    }
    for name in [
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::EXPECT,
    ] {
        headers.remove(name);
    }
}

fn failure(error: SendError) -> Failure {
    match error {
        SendError::Connect { .. } => Failure::Connect(error.to_string()),
        SendError::NotSent | SendError::Broken(_) => Failure::Broken(error.to_string()),
    }
}

fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e3
}
