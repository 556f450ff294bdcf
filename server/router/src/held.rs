//! An event stream that begins before a replica exists: comments keep the connection alive.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use hyper::Response;
use tokio::time::Sleep;

use crate::body::Body;
use crate::clock;
use crate::error::event;
use crate::record::Outcome;

pub type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// Heartbeats until the answer comes, then the answer.
pub struct HeldBody {
    state: State,
    since: f64,
    interval: Duration,
    next: Pin<Box<Sleep>>,
}

enum State {
    Waiting(Answer),
    Streaming(Box<Body>),
    Ended,
}

impl fmt::Debug for HeldBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldBody").finish_non_exhaustive()
    }
}

impl HeldBody {
    #[must_use]
    pub fn new(answer: Answer, since: f64, interval: Duration) -> Self {
        Self {
            state: State::Waiting(answer),
            since,
            interval,
            // The first comment goes at once.
            next: Box::pin(tokio::time::sleep(Duration::ZERO)),
        }
    }

    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut self.state {
            State::Waiting(answer) => {
                if let Poll::Ready(response) = answer.as_mut().poll(context) {
                    let comment = format!(": waited {:.1} s\n\n", clock::now() - self.since);
                    return self.answered(response, comment);
                }
                if self.next.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                let next = tokio::time::Instant::now() + self.interval;
                self.next.as_mut().reset(next);
                // Registers the timer: nothing else would wake us.
                let _ = self.next.as_mut().poll(context);
                let waited = clock::now() - self.since;
                let comment = format!(": waiting for a replica, {waited:.1} s so far\n\n");
                Poll::Ready(Some(Ok(Frame::data(comment.into()))))
            }
            State::Streaming(body) => http_body::Body::poll_frame(Pin::new(body), context),
            State::Ended => Poll::Ready(None),
        }
    }

    fn answered(
        &mut self,
        response: Response<Body>,
        comment: String,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let (_, body) = response.into_parts();
        let data = match body {
            // The status went out long ago: an error becomes an event.
            Body::Full(error, record) => {
                self.state = State::Ended;
                if let Some(mut record) = record {
                    record.line.outcome = Outcome::Complete;
                }
                event(&error)
            }
            body => {
                self.state = State::Streaming(Box::new(body));
                comment.into()
            }
        };
        Poll::Ready(Some(Ok(Frame::data(data))))
    }
}
