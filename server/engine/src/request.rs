//! What goes into the engine and what comes out of it.

use thiserror::Error;

use crate::executor::Sampling;

/// Chosen by the caller, unique among the requests that are in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// The two dials. Both can be changed at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Tokens computed in one step: one a decoding sequence, the rest for prompt chunks.
    pub max_num_batched_tokens: u32,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub id: RequestId,
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    /// Most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// Tokens that end the sequence, whatever `ignore_eos` says.
    pub stop_token_ids: Vec<u32>,
    /// Goes on past `eos_token_ids`.
    pub ignore_eos: bool,
    pub eos_token_ids: Vec<u32>,
    /// Lower runs first, as in vLLM; first come, first served among equals that can be in time.
    pub priority: i32,
    /// When the request came, on the clock that is passed to [`crate::Engine::step`]; reported
    /// back in [`Timing`].
    pub arrival: f64,
    /// When the first token is to be out, on the same clock: a request that waits and can't be in
    /// time any more lets those go first that can. `None`: it is in time whenever it comes.
    pub first_token_due: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop or end-of-sequence token was sampled.
    Stop,
    /// `max_tokens` were generated.
    Length,
    Abort,
}

/// Times of a request on the engine's clock, in seconds; `None` for what never happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    pub arrival: f64,
    /// When its first tokens were scheduled.
    pub first_scheduled: Option<f64>,
    pub first_token: Option<f64>,
    pub last_token: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// A generated token. The one that stops a sequence is reported (and counted) like any other.
    Token {
        id: RequestId,
        token: u32,
        at: f64,
        first: bool,
    },
    /// The last event of a request.
    Finished {
        id: RequestId,
        reason: FinishReason,
        at: f64,
        prompt_tokens: u32,
        generated_tokens: u32,
        /// How often its KV blocks were taken away and computed again.
        preemptions: u32,
        timing: Timing,
    },
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddError {
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt,
    #[error("max_tokens is 0; ask for at least one token")]
    NothingToGenerate,
    #[error(
        "the prompt has {prompt} tokens and max_tokens is {max_tokens}, together more than this \
         model's context of {max_model_len} tokens; shorten the prompt or lower max_tokens"
    )]
    PromptTooLong {
        prompt: usize,
        max_tokens: u32,
        max_model_len: u32,
    },
    #[error(
        "the prompt has {prompt} tokens and max_tokens is {max_tokens}, together more than the \
         {kv_capacity_tokens} tokens that this replica's KV cache holds; shorten the prompt or \
         lower max_tokens"
    )]
    NeverFits {
        prompt: usize,
        max_tokens: u32,
        kv_capacity_tokens: u64,
    },
    #[error("{waiting} requests are waiting already, the most this replica takes; try again later")]
    QueueFull { waiting: usize },
    #[error("request {0:?} is in the engine already; choose another id")]
    DuplicateId(RequestId),
}

/// Why dials were not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LimitsError {
    #[error("{dial} is 0; it must be at least 1")]
    Zero { dial: &'static str },
}
