//! Bodies of `/v1/completions`.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{FinishReason, StreamOptions, Usage};

/// A request for completions. Fields of OpenAI's API that are not listed here are refused when
/// they would change the answer.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// The served model's name; may be left out.
    pub model: Option<String>,
    /// Text, token ids, or a list of either; each prompt gets a choice of its own.
    pub prompt: Option<Prompt>,
    /// Most new tokens; 16 when absent.
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
    /// Go on after the model's end token, up to `max_tokens`.
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

/// One or several prompts.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// One or several stop strings.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Several(Vec<String>),
}

impl Stop {
    pub fn into_strings(self) -> Vec<String> {
        match self {
            Self::One(stop) => vec![stop],
            Self::Several(stops) => stops,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionResponse {
    pub id: String,
    /// `text_completion`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    pub model: String,
    pub choices: Vec<CompletionChoice>,
    pub usage: Usage,
}

/// One event of a streamed answer.
#[derive(Debug, Serialize)]
pub struct CompletionChunk<'a> {
    pub id: &'a str,
    /// `text_completion`
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    /// Always null: not supported.
    pub logprobs: Option<()>,
    pub finish_reason: Option<FinishReason>,
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;
        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Stop, A::Error> {
                let mut stops = Vec::new();
                while let Some(stop) = seq.next_element()? {
                    stops.push(stop);
                }
                Ok(Stop::Several(stops))
            }
        }
        deserializer.deserialize_any(StopVisitor)
    }
}

/// An element of a prompt list.
enum PromptItem {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = PromptItem;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(text))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<PromptItem, E> {
                u32::try_from(id)
                    .map(PromptItem::Token)
                    .map_err(|_| E::custom(format!("token id {id} is too large")))
            }

            fn visit_i64<E: de::Error>(self, id: i64) -> Result<PromptItem, E> {
                Err(E::custom(format!("token id {id} is negative")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<PromptItem, A::Error> {
                Vec::<u32>::deserialize(de::value::SeqAccessDeserializer::new(seq))
                    .map(PromptItem::Tokens)
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids or a list of lists")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                let mut prompt = match seq.next_element()? {
                    None => return Ok(Prompt::Texts(Vec::new())),
                    Some(PromptItem::Text(text)) => Prompt::Texts(vec![text]),
                    Some(PromptItem::Token(id)) => Prompt::Tokens(vec![id]),
                    Some(PromptItem::Tokens(ids)) => Prompt::TokenLists(vec![ids]),
                };
                while let Some(item) = seq.next_element()? {
                    match (&mut prompt, item) {
                        (Prompt::Texts(all), PromptItem::Text(text)) => all.push(text),
                        (Prompt::Tokens(all), PromptItem::Token(id)) => all.push(id),
                        (Prompt::TokenLists(all), PromptItem::Tokens(ids)) => all.push(ids),
                        _ => {
                            return Err(de::Error::custom(
                                "a list mixes strings, token ids and lists; use one kind",
                            ));
                        }
                    }
                }
                Ok(prompt)
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_every_kind() {
        let parse = |s: &str| serde_json::from_str::<Prompt>(s).map_err(|e| e.to_string());
        assert_eq!(parse(r#""a""#), Ok(Prompt::Text("a".into())));
        assert_eq!(
            parse(r#"["a","b"]"#),
            Ok(Prompt::Texts(vec!["a".into(), "b".into()]))
        );
        assert_eq!(parse("[1,2]"), Ok(Prompt::Tokens(vec![1, 2])));
        assert_eq!(
            parse("[[1],[2,3]]"),
            Ok(Prompt::TokenLists(vec![vec![1], vec![2, 3]]))
        );
        for (bad, word) in [
            ("[1,\"a\"]", "mixes"),
            ("[-1]", "negative"),
            ("[4294967296]", "too large"),
            ("[1.5]", "invalid type"),
            ("5", "invalid type"),
            ("{}", "invalid type"),
            ("[[\"a\"]]", "invalid type"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
