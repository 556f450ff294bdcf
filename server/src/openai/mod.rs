//! OpenAI's API: bodies, checks and errors. No HTTP handling and no engine here.

pub mod chat;
pub mod completions;
pub mod error;
pub mod sampling;
pub mod stop;
pub mod unsupported;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use error::ApiError;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model's end token, or a stop string or token of the request.
    Stop,
    /// The limit on new tokens.
    Length,
    /// The server gave up the request, for example when its time to drain was over.
    Abort,
}

/// Token counts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
}

impl Usage {
    pub fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Send the token counts in an event of their own before the end.
    #[serde(default)]
    pub include_usage: bool,
}

/// The models that this server serves: one.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`
    pub object: &'static str,
    pub data: Vec<Model>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Model {
    pub id: String,
    /// `model`
    pub object: &'static str,
    /// Unix seconds of the start of this server.
    pub created: u64,
    pub owned_by: &'static str,
    /// Most tokens of prompt and answer together.
    pub max_model_len: u32,
}

/// Reads a JSON body, naming the field at fault in the error.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(body).map_err(|e| {
        ApiError::bad_request(format!(
            "the body is not valid UTF-8 at byte {}",
            e.valid_up_to()
        ))
    })?;
    if text.trim().is_empty() {
        return Err(ApiError::bad_request(
            "the body is empty; send a JSON object",
        ));
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner();
        if inner.is_data() && path != "." {
            ApiError::invalid(path.clone(), format!("{path}: {inner}"))
        } else {
            ApiError::bad_request(format!("the body is not what is expected: {inner}"))
        }
    })?;
    json.end().map_err(|e| {
        ApiError::bad_request(format!("the body goes on after the JSON object: {e}"))
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::completions::CompletionRequest;
    use super::*;

    #[test]
    fn errors_name_the_field() {
        let fault = |body: &[u8]| {
            let error = parse::<CompletionRequest>(body).err().map(|e| e.detail);
            error.map(|d| (d.param, d.message))
        };
        let (param, message) = fault(br#"{"prompt":"a","temperature":"hot"}"#).unwrap();
        assert_eq!(param.as_deref(), Some("temperature"));
        assert!(message.contains("hot"), "{message}");
        let (param, _) = fault(br#"{"prompt":["a",5]}"#).unwrap();
        assert_eq!(param.as_deref(), Some("prompt"));
        assert_eq!(fault(b"{\"prompt\": \"a").unwrap().0, None);
        assert!(fault(b"{\"prompt\":\"\xff\"}").unwrap().1.contains("UTF-8"));
        assert!(fault(b"{}{}").unwrap().1.contains("goes on"));
        assert!(fault(b" ").unwrap().1.contains("empty"));
        let deep = format!("{{\"x\":{}{}}}", "[".repeat(500), "]".repeat(500));
        assert!(
            fault(deep.as_bytes())
                .unwrap()
                .1
                .contains("recursion limit")
        );
        assert!(fault(br#"{"prompt":"a","max_tokens":5}"#).is_none());
    }
}
