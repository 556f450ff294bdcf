//! Bodies of `/v1/chat/completions`.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::completions::Stop;
use super::error::ApiError;
use super::{FinishReason, StreamOptions, Usage};

/// A request for the next message of a conversation. Fields of OpenAI's API that are not listed
/// here are refused when they would change the answer.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The served model's name; may be left out.
    pub model: Option<String>,
    pub messages: Option<Vec<ChatMessage>>,
    /// Most new tokens; the rest of the context when absent.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<i64>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    pub max_tokens: Option<i64>,
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Sample among this many likeliest tokens; 0 or -1: no limit.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// The same seed gives the same tokens.
    pub seed: Option<i64>,
    /// Up to 4 strings that end the answer; the answer doesn't contain them.
    pub stop: Option<Stop>,
    /// Token ids that end the answer, beside the model's own.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Go on after the model's end token, up to the limit.
    pub ignore_eos: Option<bool>,
    /// Lower runs first (as in vLLM); 0 when absent.
    pub priority: Option<i32>,
    /// Answer with server-sent events.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Map<String, Value>,
}

/// A message of the conversation so far.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    pub content: Option<Content>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Map<String, Value>,
}

/// A message's text, whole or in parts.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a message; only those of type `text` are supported.
#[derive(Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ContentPart {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

/// Roles that chat templates know.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

impl ChatMessage {
    /// The role and the text for the chat template. `index` is for error messages.
    pub fn into_text(self, index: usize) -> Result<(String, String), ApiError> {
        let param = format!("messages[{index}]");
        if !ROLES.contains(&self.role.as_str()) {
            return Err(ApiError::invalid(
                format!("{param}.role"),
                format!(
                    "role must be one of {}, not {:?}",
                    ROLES.join(", "),
                    self.role
                ),
            ));
        }
        for name in ["tool_calls", "function_call", "audio"] {
            let empty = |v: &Value| v.is_null() || v.as_array().is_some_and(Vec::is_empty);
            if self.rest.get(name).is_some_and(|v| !empty(v)) {
                return Err(ApiError::unsupported(
                    format!("{param}.{name}"),
                    format!("{name} in a message is not supported by this server"),
                ));
            }
        }
        let text = match self.content {
            None => {
                return Err(ApiError::invalid(
                    format!("{param}.content"),
                    "content must be a string or a list of text parts",
                ));
            }
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => join_parts(parts, &param)?,
        };
        // OpenAI renamed the role; templates know the old name.
        let role = match self.role.as_str() {
            "developer" => "system".to_owned(),
            _ => self.role,
        };
        Ok((role, text))
    }
}

fn join_parts(parts: Vec<ContentPart>, param: &str) -> Result<String, ApiError> {
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        match (part.kind.as_str(), part.text) {
            ("text", Some(piece)) => text.push_str(&piece),
            ("text", None) => {
                return Err(ApiError::invalid(
                    format!("{param}.content[{index}].text"),
                    "a part of type text needs its text",
                ));
            }
            (kind, _) => {
                return Err(ApiError::unsupported(
                    format!("{param}.content[{index}].type"),
                    format!("parts of type {kind:?} are not supported; this model reads text"),
                ));
            }
        }
    }
    Ok(text)
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatResponse {
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    /// Always null: not supported.
    pub logprobs: Option<()>,
    pub finish_reason: Option<FinishReason>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    pub content: String,
}

/// One event of a streamed chat answer.
#[derive(Debug, Serialize)]
pub struct ChatChunk<'a> {
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<ChatChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: Delta,
    /// Always null: not supported.
    pub logprobs: Option<()>,
    pub finish_reason: Option<FinishReason>,
}

/// What an event adds to the message.
#[derive(Debug, Default, Serialize)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Content::Parts)
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(json: &str) -> Result<(String, String), String> {
        let message: ChatMessage = serde_json::from_str(json).map_err(|e| e.to_string())?;
        message
            .into_text(3)
            .map_err(|e| e.detail.param.unwrap_or_default())
    }

    #[test]
    fn text_parts_are_joined() {
        let json =
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#;
        assert_eq!(text(json), Ok(("user".into(), "ab".into())));
    }

    #[test]
    fn what_is_not_text_is_refused_by_name() {
        let cases = [
            (r#"{"role":"king","content":"a"}"#, "messages[3].role"),
            (r#"{"role":"user"}"#, "messages[3].content"),
            (r#"{"role":"user","content":null}"#, "messages[3].content"),
            (
                r#"{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}"#,
                "messages[3].content[0].type",
            ),
            (
                r#"{"role":"assistant","content":"","tool_calls":[{"id":"1"}]}"#,
                "messages[3].tool_calls",
            ),
        ];
        for (json, param) in cases {
            assert_eq!(text(json), Err(param.into()), "{json}");
        }
        assert!(text(r#"{"role":"user","content":5}"#).is_err());
    }
}
