//! The state of one request in the engine.

use crate::blocks::BlockTable;
use crate::executor::{InputToken, Row, Slot};
use crate::request::{Event, FinishReason, Request, RequestId, Timing};

/// The order in which sequences are served: by priority, then those that can be in time, then first
/// come, first served. It is unique, so it also names a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub priority: i32,
    /// Whether it was set back: see [`crate::Request::first_token_due`].
    pub late: bool,
    pub order: u64,
}

/// What a running sequence occupies.
#[derive(Debug)]
pub(crate) struct Seat {
    pub slot: Slot,
    pub blocks: BlockTable,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub rank: Rank,
    request: Request,
    /// The prompt, then the generated tokens that are known.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens that steps in flight sample: they follow `tokens`, but aren't known yet.
    pending: usize,
    /// Tokens whose KV is in the cache once all submitted steps are done.
    pub computed: usize,
    /// Tokens that the step being built computes.
    pub planned: usize,
    pub seat: Option<Seat>,
    /// The last step that this sequence was part of.
    pub last_step: u64,
    pub preemptions: u32,
    pub timing: Timing,
}

impl Sequence {
    pub fn new(mut request: Request, order: u64) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        Self {
            rank: Rank {
                priority: request.priority,
                late: false,
                order,
            },
            prompt_len: tokens.len(),
            tokens,
            pending: 0,
            computed: 0,
            planned: 0,
            seat: None,
            last_step: 0,
            preemptions: 0,
            timing: Timing {
                arrival: request.arrival,
                first_scheduled: None,
                first_token: None,
                last_token: None,
            },
            request,
        }
    }

    pub fn id(&self) -> RequestId {
        self.request.id
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// All tokens, those in flight included.
    pub fn total(&self) -> usize {
        self.tokens.len() + self.pending
    }

    pub fn to_compute(&self) -> usize {
        self.total() - self.computed
    }

    pub fn has_pending(&self) -> bool {
        self.pending > 0
    }

    /// Whether a first token at this time would be too late. Not so once it is out or on its way.
    pub fn misses_due(&self, first_token: f64) -> bool {
        let expected = self.timing.first_token.is_none() && !self.has_pending();
        expected && (self.request.first_token_due).is_some_and(|due| first_token > due)
    }

    /// Whether all tokens that may be generated are generated or in flight.
    pub fn all_sampled(&self) -> bool {
        self.total() - self.prompt_len >= self.request.max_tokens as usize
    }

    /// Builds the planned row and counts it as computed. `None` if nothing is planned.
    pub fn take_row(&mut self, step: u64) -> Option<Row> {
        let planned = std::mem::take(&mut self.planned);
        let seat = self.seat.as_ref().filter(|_| planned > 0)?;
        let start = self.computed;
        let end = start + planned;
        let tokens = (start..end)
            .map(|position| match self.tokens.get(position) {
                Some(&token) => InputToken::Known(token),
                None => InputToken::FromPreviousStep,
            })
            .collect();
        let sampled = end == self.total();
        let row = Row {
            slot: seat.slot,
            tokens,
            start: start as u32,
            blocks: seat.blocks.ids(end).to_vec(),
            sample: sampled.then_some(self.request.sampling),
        };
        self.computed = end;
        self.pending += usize::from(sampled);
        self.last_step = step;
        Some(row)
    }

    /// Gives up the KV cache; everything known is to be computed again.
    pub fn preempt(&mut self) -> Option<Seat> {
        self.preemptions += 1;
        self.computed = 0;
        self.planned = 0;
        self.seat.take()
    }

    /// Takes in a sampled token: its event, and why the sequence ends, if it does.
    pub fn append(&mut self, token: u32, at: f64) -> (Event, Option<FinishReason>) {
        self.pending = self.pending.saturating_sub(1);
        self.tokens.push(token);
        let first = self.timing.first_token.is_none();
        if first {
            self.timing.first_token = Some(at);
        }
        self.timing.last_token = Some(at);
        let request = &self.request;
        let stops = request.stop_token_ids.contains(&token)
            || (!request.ignore_eos && request.eos_token_ids.contains(&token));
        let reason = if stops {
            Some(FinishReason::Stop)
        } else if self.generated() >= request.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        let event = Event::Token {
            id: request.id,
            token,
            at,
            first,
        };
        (event, reason)
    }

    fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_len) as u32
    }

    pub fn finished(&self, reason: FinishReason, at: f64) -> Event {
        Event::Finished {
            id: self.id(),
            reason,
            at,
            prompt_tokens: self.prompt_len as u32,
            generated_tokens: self.generated(),
            preemptions: self.preemptions,
            timing: self.timing,
        }
    }
}
