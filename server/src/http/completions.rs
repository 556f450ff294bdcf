//! `POST /v1/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use stoker_model::EncodeOptions;

use super::answer::{AnswerShape, Endpoint, Head};
use super::connection::Accepted;
use super::events::{EventShape, Events};
use super::generate::{self, Answering, Common, Piece, Prepared};
use crate::app::{App, Serving};
use crate::openai::completions::{
    CompletionChoice, CompletionChunk, CompletionRequest, CompletionResponse, Prompt,
};
use crate::openai::error::{ApiError, ErrorBody};
use crate::openai::sampling::{SamplingFields, check_max_tokens};
use crate::openai::{self, Usage};

/// New tokens where the request states no limit, as OpenAI has it.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Continues one or several prompts.
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; with stream: true server-sent events, each a \
            completion with the new text, and [DONE] at the end", body = CompletionResponse),
        (status = 400, description = "A field is wrong or not supported", body = ErrorBody),
        (status = 404, description = "Unknown model", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "The queue is full; see Retry-After", body = ErrorBody),
        (status = 503, description = "Loading or draining; see Retry-After", body = ErrorBody),
    ))]
pub async fn completions(
    State(app): State<Arc<App>>,
    accepted: Accepted,
    body: Body,
) -> Result<Response, ApiError> {
    let endpoint = Endpoint {
        id_prefix: "cmpl",
        prompt_field: "prompt",
        prepare,
        shape: Shape,
    };
    endpoint.answer(app, accepted, body).await
}

fn prepare(app: &App, body: &[u8]) -> Result<Prepared, ApiError> {
    let serving = app.serving()?;
    let request: CompletionRequest = openai::parse(body)?;
    let max_tokens = request
        .max_tokens
        .map(|n| check_max_tokens("max_tokens", n))
        .transpose()?;
    let checked = Common {
        model: request.model,
        sampling: SamplingFields {
            temperature: request.temperature,
            top_p: request.top_p,
            top_k: request.top_k,
            seed: request.seed,
        },
        stop: request.stop,
        stop_token_ids: request.stop_token_ids,
        ignore_eos: request.ignore_eos,
        priority: request.priority,
        stream: request.stream,
        stream_options: request.stream_options,
        rest: request.rest,
    }
    .check(app, serving)?;
    let prompt = request.prompt.ok_or_else(|| {
        ApiError::invalid(
            "prompt",
            "prompt is missing; give text, token ids or a list of either",
        )
    })?;
    let prompts = token_ids(prompt, serving)?
        .into_iter()
        .map(|ids| {
            let limit = max_tokens.unwrap_or_else(|| {
                generate::default_max_tokens(DEFAULT_MAX_TOKENS, ids.len(), serving)
            });
            (ids, limit)
        })
        .collect();
    Ok(checked.prepare(prompts))
}

fn token_ids(prompt: Prompt, serving: &Serving) -> Result<Vec<Vec<u32>>, ApiError> {
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(&text, serving)?],
        Prompt::Texts(texts) => texts
            .iter()
            .map(|text| encode(text, serving))
            .collect::<Result<_, _>>()?,
        Prompt::Tokens(ids) => vec![ids],
        Prompt::TokenLists(lists) => lists,
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::invalid(
            "prompt",
            "the prompt is empty; give at least one token",
        ));
    }
    for ids in &prompts {
        generate::check_token_ids(ids, "prompt", serving)?;
    }
    Ok(prompts)
}

fn encode(text: &str, serving: &Serving) -> Result<Vec<u32>, ApiError> {
    serving
        .tokenizer
        .encode(text, EncodeOptions::COMPLETION)
        .map_err(|e| ApiError::invalid("prompt", e.to_string()))
}

struct Shape(Head);

impl Shape {
    fn event(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionChunk<'_> {
        CompletionChunk {
            id: &self.0.id,
            object: "text_completion",
            created: self.0.created,
            model: &self.0.model,
            choices,
            usage: self.0.with_usage.then_some(usage),
        }
    }
}

impl AnswerShape for Shape {
    type Whole = CompletionResponse;

    async fn collect(self, mut answering: Answering) -> Result<CompletionResponse, ApiError> {
        let mut choices: Vec<CompletionChoice> = (0..answering.choices())
            .map(|index| CompletionChoice {
                index,
                text: String::new(),
                logprobs: None,
                finish_reason: None,
            })
            .collect();
        let mut pieces = Vec::new();
        while answering.next(&mut pieces).await? {
            for piece in pieces.drain(..) {
                let choice = &mut choices[piece.index];
                choice.text.push_str(&piece.text);
                choice.finish_reason = choice.finish_reason.or(piece.finish);
            }
        }
        Ok(CompletionResponse {
            id: self.0.id.to_string(),
            object: "text_completion",
            created: self.0.created,
            model: self.0.model.to_string(),
            choices,
            usage: answering.usage(),
        })
    }
}

impl EventShape for Shape {
    fn opening(&self, _choices: usize, _events: &mut Events) {}

    fn piece(&self, piece: Piece, events: &mut Events) {
        let choice = CompletionChoice {
            index: piece.index,
            text: piece.text,
            logprobs: None,
            finish_reason: piece.finish,
        };
        events.push(&self.event(vec![choice], None));
    }

    fn usage(&self, usage: Usage, events: &mut Events) {
        events.push(&self.event(Vec::new(), Some(usage)));
    }
}
