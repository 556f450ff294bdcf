//! Answers as server-sent events.

use std::convert::Infallible;
use std::io::Write;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde::Serialize;

use super::generate::{Answering, Piece};
use crate::openai::Usage;
use crate::openai::error::ApiError;

/// How the events of one kind of answer look.
pub trait EventShape: Send + 'static {
    /// Events before the first text.
    fn opening(&self, choices: usize, events: &mut Events);
    fn piece(&self, piece: Piece, events: &mut Events);
    fn usage(&self, usage: Usage, events: &mut Events);
}

/// Events written one after the other into one buffer.
#[derive(Default)]
pub struct Events(Vec<u8>);

impl Events {
    pub fn push(&mut self, event: &impl Serialize) {
        let begin = self.0.len();
        self.0.extend_from_slice(b"data: ");
        match serde_json::to_writer(&mut self.0, event) {
            Ok(()) => self.0.extend_from_slice(b"\n\n"),
            Err(error) => {
                // None of our types can fail to serialize; a half-written event must not go out.
                tracing::error!(%error, "event");
                self.0.truncate(begin);
            }
        }
    }

    fn done(&mut self) {
        // Writing to a vector can't fail.
        let _ = self.0.write_all(b"data: [DONE]\n\n");
    }
}

enum Stage {
    Opening,
    Text,
    Ended,
}

struct Stream<S> {
    stage: Stage,
    answering: Option<Answering>,
    shape: S,
    include_usage: bool,
    pieces: Vec<Piece>,
}

/// The response that streams an answer. All tokens that are there when the socket takes more go
/// out together.
pub fn respond<S: EventShape>(answering: Answering, shape: S, include_usage: bool) -> Response {
    let stream = Stream {
        stage: Stage::Opening,
        answering: Some(answering),
        shape,
        include_usage,
        pieces: Vec::new(),
    };
    let body = futures::stream::unfold(stream, |mut stream| async move {
        let bytes = stream.next().await?;
        Some((Ok::<_, Infallible>(bytes), stream))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx hold events back otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<S: EventShape> Stream<S> {
    async fn next(&mut self) -> Option<Bytes> {
        let mut events = Events::default();
        loop {
            let answering = self.answering.as_mut()?;
            match self.stage {
                Stage::Opening => {
                    self.shape.opening(answering.choices(), &mut events);
                    self.stage = Stage::Text;
                }
                Stage::Text => match answering.next(&mut self.pieces).await {
                    Ok(true) => {
                        for piece in self.pieces.drain(..) {
                            self.shape.piece(piece, &mut events);
                        }
                    }
                    Ok(false) => {
                        if self.include_usage {
                            self.shape.usage(answering.usage(), &mut events);
                        }
                        events.done();
                        self.stage = Stage::Ended;
                    }
                    Err(error) => {
                        events.push(&ApiError::body(error));
                        self.stage = Stage::Ended;
                    }
                },
                Stage::Ended => return None,
            }
            if !events.0.is_empty() {
                return Some(events.0.into());
            }
        }
    }
}
