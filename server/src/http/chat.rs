//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use stoker_model::EncodeOptions;

use super::answer::{AnswerShape, Endpoint, Head};
use super::connection::Accepted;
use super::events::{EventShape, Events};
use super::generate::{self, Answering, Common, Piece, Prepared};
use crate::app::{App, Serving};
use crate::openai::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatMessage, ChatRequest,
    ChatResponse, Delta,
};
use crate::openai::error::{ApiError, ErrorBody};
use crate::openai::sampling::{SamplingFields, check_max_tokens};
use crate::openai::{self, Usage};

/// Answers the last message of a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with stream: true server-sent events of \
            chat.completion.chunk objects, and [DONE] at the end", body = ChatResponse),
        (status = 400, description = "A field is wrong or not supported", body = ErrorBody),
        (status = 404, description = "Unknown model", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "The queue is full; see Retry-After", body = ErrorBody),
        (status = 503, description = "Loading or draining; see Retry-After", body = ErrorBody),
    ))]
pub async fn chat_completions(
    State(app): State<Arc<App>>,
    accepted: Accepted,
    body: Body,
) -> Result<Response, ApiError> {
    let endpoint = Endpoint {
        id_prefix: "chatcmpl",
        prompt_field: "messages",
        prepare,
        shape: Shape,
    };
    endpoint.answer(app, accepted, body).await
}

fn prepare(app: &App, body: &[u8]) -> Result<Prepared, ApiError> {
    let serving = app.serving()?;
    let request: ChatRequest = openai::parse(body)?;
    let max_tokens = match (request.max_completion_tokens, request.max_tokens) {
        (Some(n), _) => Some(check_max_tokens("max_completion_tokens", n)?),
        (None, Some(n)) => Some(check_max_tokens("max_tokens", n)?),
        (None, None) => None,
    };
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
    let messages = request.messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages must hold at least one message",
        ));
    }
    let prompt = prompt_ids(messages, serving)?;
    let limit = max_tokens.unwrap_or_else(|| {
        let wanted = serving.default_chat_tokens.unwrap_or(u32::MAX);
        generate::default_max_tokens(wanted, prompt.len(), serving)
    });
    Ok(checked.prepare(vec![(prompt, limit)]))
}

fn prompt_ids(messages: Vec<ChatMessage>, serving: &Serving) -> Result<Vec<u32>, ApiError> {
    let invalid = |message: String| ApiError::invalid("messages", message);
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| {
            let (role, content) = message.into_text(index)?;
            Ok(stoker_model::ChatMessage { role, content })
        })
        .collect::<Result<Vec<_>, ApiError>>()?;
    let text = serving
        .chat_template
        .render(&messages, SystemTime::now())
        .map_err(|e| invalid(e.to_string()))?;
    serving
        .tokenizer
        .encode(&text, EncodeOptions::CHAT)
        .map_err(|e| invalid(e.to_string()))
}

struct Shape(Head);

impl Shape {
    fn event(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk<'_> {
        ChatChunk {
            id: &self.0.id,
            object: "chat.completion.chunk",
            created: self.0.created,
            model: &self.0.model,
            choices,
            usage: self.0.with_usage.then_some(usage),
        }
    }

    fn choice(&self, index: usize, delta: Delta) -> ChatChunkChoice {
        ChatChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
        }
    }
}

impl AnswerShape for Shape {
    type Whole = ChatResponse;

    async fn collect(self, mut answering: Answering) -> Result<ChatResponse, ApiError> {
        let mut content = String::new();
        let mut finish_reason = None;
        let mut pieces = Vec::new();
        while answering.next(&mut pieces).await? {
            for piece in pieces.drain(..) {
                content.push_str(&piece.text);
                finish_reason = finish_reason.or(piece.finish);
            }
        }
        Ok(ChatResponse {
            id: self.0.id.to_string(),
            object: "chat.completion",
            created: self.0.created,
            model: self.0.model.to_string(),
            choices: vec![ChatChoice {
                index: 0,
                message: AssistantMessage {
                    role: "assistant",
                    content,
                },
                logprobs: None,
                finish_reason,
            }],
            usage: answering.usage(),
        })
    }
}

impl EventShape for Shape {
    fn opening(&self, choices: usize, events: &mut Events) {
        for index in 0..choices {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            events.push(&self.event(vec![self.choice(index, delta)], None));
        }
    }

    fn piece(&self, piece: Piece, events: &mut Events) {
        let delta = Delta {
            role: None,
            content: (!piece.text.is_empty()).then_some(piece.text),
        };
        let mut choice = self.choice(piece.index, delta);
        choice.finish_reason = piece.finish;
        events.push(&self.event(vec![choice], None));
    }

    fn usage(&self, usage: Usage, events: &mut Events) {
        events.push(&self.event(Vec::new(), Some(usage)));
    }
}
