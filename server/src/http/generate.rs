//! From a checked request to text: what completions and chat completions have in common.

use std::sync::Arc;
use std::time::Duration;

use stoker_engine::AddError;
use stoker_engine::executor::Sampling;
use stoker_model::DecodeStream;

use crate::app::{App, Serving};
use crate::engine::{Generation, NewRequest, SubmitError, Update};
use crate::lifecycle::ActiveRequest;
use crate::openai::completions::Stop;
use crate::openai::error::ApiError;
use crate::openai::sampling::{SamplingFields, check_stops};
use crate::openai::stop::StopMatcher;
use crate::openai::{FinishReason, StreamOptions, Usage, unsupported};

/// Bodies above this size are read and tokenized off the async runtime.
pub const LARGE_BODY: usize = 8 << 10;

/// The fields that both kinds of request have.
pub struct Common {
    pub model: Option<String>,
    pub sampling: SamplingFields,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub ignore_eos: Option<bool>,
    pub priority: Option<i32>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub rest: serde_json::Map<String, serde_json::Value>,
}

/// [`Common`], checked.
pub struct Checked {
    pub sampling: Sampling,
    pub stops: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub priority: i32,
    pub stream: bool,
    pub include_usage: bool,
}

/// A request that is ready for the engine.
pub struct Prepared {
    pub requests: Vec<NewRequest>,
    pub stops: Vec<String>,
    pub stream: bool,
    pub include_usage: bool,
}

impl Common {
    pub fn check(self, app: &App, serving: &Serving) -> Result<Checked, ApiError> {
        if let Some(model) = &self.model
            && **model != *app.model_name
        {
            return Err(ApiError::model_not_found(model, &app.model_name));
        }
        unsupported::check(&self.rest)?;
        let stop_token_ids = self.stop_token_ids.unwrap_or_default();
        check_token_ids(&stop_token_ids, "stop_token_ids", serving)?;
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options is only allowed together with stream: true",
            ));
        }
        Ok(Checked {
            sampling: self.sampling.check(rand::random())?,
            stops: check_stops(self.stop.map(Stop::into_strings).unwrap_or_default())?,
            stop_token_ids,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            priority: self.priority.unwrap_or(0),
            stream,
            include_usage: self.stream_options.is_some_and(|o| o.include_usage),
        })
    }
}

impl Checked {
    /// Joins the settings with the prompts and their limits on new tokens.
    pub fn prepare(self, prompts: Vec<(Vec<u32>, u32)>) -> Prepared {
        let requests = prompts
            .into_iter()
            .enumerate()
            .map(|(index, (prompt, max_tokens))| NewRequest {
                prompt,
                sampling: for_choice(self.sampling, index),
                max_tokens,
                stop_token_ids: self.stop_token_ids.clone(),
                ignore_eos: self.ignore_eos,
                priority: self.priority,
            })
            .collect();
        Prepared {
            requests,
            stops: self.stops,
            stream: self.stream,
            include_usage: self.include_usage,
        }
    }
}

/// Equal prompts of one request get unlike draws.
fn for_choice(sampling: Sampling, index: usize) -> Sampling {
    let greedy = sampling.temperature == 0.0;
    let offset = if greedy { 0 } else { index as u64 };
    Sampling {
        seed: sampling.seed.wrapping_add(offset),
        ..sampling
    }
}

/// Refuses ids that the model doesn't have.
pub fn check_token_ids(ids: &[u32], param: &str, serving: &Serving) -> Result<(), ApiError> {
    let size = serving.tokenizer.vocab_size();
    match ids.iter().position(|id| *id >= size) {
        None => Ok(()),
        Some(at) => Err(ApiError::invalid(
            param,
            format!(
                "{param}: token id {} at index {at} is outside the vocabulary of {size} tokens",
                ids[at]
            ),
        )),
    }
}

/// The limit on new tokens where the request states none: `wanted`, as far as the context goes.
pub fn default_max_tokens(wanted: u32, prompt_tokens: usize, serving: &Serving) -> u32 {
    let room = (serving.max_model_len as usize).saturating_sub(prompt_tokens);
    // A prompt that leaves no room gets 1, so that the engine's context check words the refusal.
    u32::try_from(room).unwrap_or(u32::MAX).min(wanted).max(1)
}

/// Hands a prepared request to the engine. `param` is the field that holds the prompt; `waited` is how
/// long the request had been on its way.
pub async fn start(
    serving: &Serving,
    prepared: Prepared,
    param: &'static str,
    waited: Duration,
    active: ActiveRequest,
) -> Result<Answering, ApiError> {
    let Prepared {
        requests, stops, ..
    } = prepared;
    if requests.len() > serving.max_waiting {
        return Err(ApiError::invalid(
            param,
            format!(
                "{} prompts are more than the {} requests that may wait here; send them in \
                 several requests",
                requests.len(),
                serving.max_waiting
            ),
        ));
    }
    let prompt_tokens = requests.iter().map(|r| r.prompt.len() as u64).sum();
    let choices = requests
        .iter()
        .map(|request| {
            let mut ends = request.stop_token_ids.clone();
            if !request.ignore_eos {
                ends.extend_from_slice(serving.tokenizer.eos_token_ids());
            }
            Choice {
                decode: Some(DecodeStream::new(serving.tokenizer.clone())),
                stops: StopMatcher::new(stops.clone()),
                ends,
                tokens: 0,
            }
        })
        .collect::<Vec<_>>();
    let generation = serving
        .engine
        .submit(requests, waited)
        .await
        .map_err(|error| refusal(error, param))?;
    Ok(Answering {
        open: choices.len(),
        choices,
        generation,
        updates: Vec::new(),
        prompt_tokens,
        _active: active,
    })
}

fn refusal(error: SubmitError, param: &'static str) -> ApiError {
    match error {
        SubmitError::QueueFull {
            waiting,
            retry_after,
        } => ApiError::queue_full(waiting, retry_after),
        SubmitError::Gone => ApiError::internal("the engine has failed; this replica will restart"),
        SubmitError::Refused { index, error } => {
            let message = match index {
                0 => error.to_string(),
                _ => format!("prompt {index}: {error}"),
            };
            match error {
                AddError::PromptTooLong { .. } | AddError::NeverFits { .. } => {
                    ApiError::context_length(param, message)
                }
                AddError::EmptyPrompt => ApiError::invalid(param, message),
                AddError::NothingToGenerate => ApiError::invalid("max_tokens", message),
                AddError::QueueFull { .. } | AddError::DuplicateId(_) => {
                    ApiError::internal(message)
                }
            }
        }
    }
}

/// An answer under way. Dropping it ends the work on it.
pub struct Answering {
    generation: Generation,
    choices: Vec<Choice>,
    /// Choices that are not finished.
    open: usize,
    updates: Vec<(usize, Update)>,
    prompt_tokens: u64,
    _active: ActiveRequest,
}

/// A piece of a choice's text.
#[derive(Debug, PartialEq)]
pub struct Piece {
    pub index: usize,
    pub text: String,
    pub finish: Option<FinishReason>,
}

struct Choice {
    /// `None` once the choice is finished.
    decode: Option<DecodeStream>,
    stops: StopMatcher,
    /// Tokens that end the answer and give no text.
    ends: Vec<u32>,
    tokens: u64,
}

impl Answering {
    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// Waits for more text and appends it to `pieces`. False at the end.
    pub async fn next(&mut self, pieces: &mut Vec<Piece>) -> Result<bool, ApiError> {
        if self.open == 0 {
            return Ok(false);
        }
        let mut updates = std::mem::take(&mut self.updates);
        if !self.generation.next(&mut updates).await {
            return Err(ApiError::internal(
                "the engine failed while it was answering; this replica will restart",
            ));
        }
        for (index, update) in updates.drain(..) {
            let Some(choice) = self.choices.get_mut(index) else {
                continue;
            };
            let Some(piece) = choice.update(index, update) else {
                continue;
            };
            if piece.finish.is_some() {
                self.open -= 1;
                // Where a stop string was found the engine doesn't know yet; else this does nothing.
                self.generation.stop(index);
            }
            pieces.push(piece);
        }
        self.updates = updates;
        Ok(true)
    }

    pub fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.tokens).sum();
        Usage::new(self.prompt_tokens, completion)
    }
}

impl Choice {
    fn update(&mut self, index: usize, update: Update) -> Option<Piece> {
        let decode = self.decode.as_mut()?;
        match update {
            Update::Token(token) => {
                self.tokens += 1;
                if self.ends.contains(&token) {
                    return None;
                }
                let matched = self.stops.push(&decode.push(token));
                if matched.stopped {
                    self.decode = None;
                } else if matched.text.is_empty() {
                    return None;
                }
                Some(Piece {
                    index,
                    text: matched.text,
                    finish: matched.stopped.then_some(FinishReason::Stop),
                })
            }
            Update::Finished { reason } => {
                let rest = self.decode.take().map(DecodeStream::finish);
                let mut matched = self.stops.push(&rest.unwrap_or_default());
                if !matched.stopped {
                    matched.text.push_str(&self.stops.finish());
                }
                let reason = if matched.stopped {
                    FinishReason::Stop
                } else {
                    reason
                };
                Some(Piece {
                    index,
                    text: matched.text,
                    finish: Some(reason),
                })
            }
        }
    }
}

/// Runs `work` where it can take its time when the body is large.
pub async fn off_runtime<T: Send + 'static>(
    large: bool,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if !large {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!(
            "reading the request failed: {error}"
        ))),
    }
}

/// A new identifier such as `cmpl-0123…`.
pub fn new_id(prefix: &str) -> Arc<str> {
    format!("{prefix}-{:032x}", rand::random::<u128>()).into()
}
