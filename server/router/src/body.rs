//! Bodies of answers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

use crate::clock;
use crate::error::{ApiError, event};
use crate::held::HeldBody;
use crate::lease::Lease;
use crate::record::{Outcome, Record};
use crate::service::Service;
use crate::sse::Events;
use crate::upstream::Connection;

/// Body of an answer to a client.
#[derive(Debug)]
pub enum Body {
    Full(Bytes, Option<Box<Record>>),
    Stream(Box<StreamBody>),
    Held(Box<HeldBody>),
}

impl Body {
    #[must_use]
    pub fn full(data: impl Into<Bytes>) -> Self {
        Self::Full(data.into(), None)
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Full(data, record) => {
                if let Some(mut record) = record.take() {
                    record.line.outcome = Outcome::Complete;
                    record.line.response_bytes = data.len() as u64;
                }
                let data = std::mem::take(data);
                Poll::Ready((!data.is_empty()).then(|| Ok(Frame::data(data))))
            }
            Self::Stream(body) => body.poll(context),
            Self::Held(body) => body.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        // A record has to be told first.
        matches!(self, Self::Full(data, None) if data.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(data, _) => SizeHint::with_exact(data.len() as u64),
            _ => SizeHint::default(),
        }
    }
}

/// What an answer teaches about its request.
#[derive(Clone, Debug)]
pub struct Learn {
    pub service: Arc<Service>,
    pub prompt_bytes: usize,
    pub max_tokens: Option<u64>,
}

impl Learn {
    pub fn from(&self, prompt: Option<u64>, completion: Option<u64>) {
        if let Some(tokens) = prompt {
            self.service
                .estimates
                .learn_prompt(self.prompt_bytes, tokens);
        }
        if let Some(tokens) = completion {
            self.service.estimates.learn_output(self.max_tokens, tokens);
        }
    }
}

/// A replica's answer on its way to the client. Dropping it closes the connection to the
/// replica, which so learns that the client is gone.
#[derive(Debug)]
pub struct StreamBody {
    pub upstream: Incoming,
    pub connection: Option<Connection>,
    pub lease: Option<Lease>,
    pub learn: Learn,
    /// None: not an event stream; passed on as it comes.
    pub events: Option<Events>,
    /// Came already.
    pub first: Option<Bytes>,
    pub record: Option<Box<Record>>,
    pub idle_limit: Duration,
    pub idle: Option<Pin<Box<Sleep>>>,
    pub last_frame: f64,
    pub ended: bool,
}

impl StreamBody {
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(first) = self.first.take() {
            self.passed(&first);
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        loop {
            let polled = match &mut self.connection {
                Some(connection) => connection.poll_data(&mut self.upstream, context),
                None => return Poll::Ready(None),
            };
            let Poll::Ready(data) = polled else {
                return self.poll_idle(context);
            };
            self.last_frame = clock::now();
            match data {
                Some(Ok(data)) => {
                    let data = match &mut self.events {
                        Some(events) => events.push(data),
                        None => Some(data),
                    };
                    if let Some(data) = data {
                        self.passed(&data);
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                // All events came, only the last chunk's end did not: the client lacks nothing.
                Some(Err(_)) if self.events.as_ref().is_some_and(Events::is_complete) => {
                    self.connection = None;
                    self.complete();
                    return Poll::Ready(None);
                }
                Some(Err(error)) => return self.broken(&error.to_string()),
                None => {
                    if self.events.as_ref().is_none_or(Events::is_complete) {
                        self.complete();
                        return Poll::Ready(None);
                    }
                    return self.broken("it ended the stream before the answer was complete");
                }
            }
        }
    }

    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let idle = self
            .idle
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(self.idle_limit)));
        loop {
            ready!(idle.as_mut().poll(context));
            let until = self.last_frame + self.idle_limit.as_secs_f64();
            if until > clock::now() {
                idle.as_mut().reset(clock::instant(until));
                continue;
            }
            let message = format!("it sent nothing for {} s", self.idle_limit.as_secs());
            return self.broken(&message);
        }
    }

    fn passed(&mut self, data: &Bytes) {
        let events = self.events.as_ref().map_or(0, |events| events.count);
        if let Some(record) = &mut self.record {
            record.line.response_bytes += data.len() as u64;
            let fresh = events - record.line.events;
            record.line.events = events;
            if let Some(lease) = &mut self.lease {
                lease.progress(fresh);
            }
        }
    }

    fn complete(&mut self) {
        self.ended = true;
        if let Some(events) = &self.events {
            let (prompt, completion) = events.usage();
            // Without a usage: about one token an event.
            self.learn.from(prompt, completion.or(Some(events.count)));
        }
        if let Some(lease) = self.lease.take() {
            lease.completed();
            if let Some(connection) = self.connection.take() {
                lease.replica.pool.put(connection);
            }
        }
        if let Some(mut record) = self.record.take() {
            record.line.outcome = Outcome::Complete;
        }
    }

    /// The replica is gone in the middle of the answer.
    fn broken(&mut self, why: &str) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.ended = true;
        self.connection = None;
        self.learn.service.metrics.broken_streams.inc();
        if let Some(mut record) = self.record.take() {
            record.line.outcome = Outcome::ReplicaGone;
        }
        let Some(lease) = self.lease.take() else {
            return Poll::Ready(None);
        };
        if lease.replica.failed() {
            self.learn.service.metrics.ejections[0].inc();
        }
        let message = format!(
            "The replica failed in the middle of the answer ({why}). What came is right but \
             incomplete; send the request again."
        );
        if self.events.is_some() {
            let error = ApiError::bad_gateway(message).json();
            return Poll::Ready(Some(Ok(Frame::data(event(&error)))));
        }
        // Cuts the connection: a body of known length or chunks without an end.
        Poll::Ready(Some(Err(io::Error::other(message))))
    }
}
