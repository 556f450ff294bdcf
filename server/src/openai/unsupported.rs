//! Request fields that this server does not implement: refused where they would change the
//! answer, accepted where their value says "as usual".

use serde_json::{Map, Value};

use super::error::ApiError;

/// Values of a field that leave the answer as it is.
type Neutral = fn(&Value) -> bool;

fn one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn off(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn on(value: &Value) -> bool {
    value.as_bool() == Some(true)
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn no_tool(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

fn plain_text(value: &Value) -> bool {
    value.get("type").and_then(Value::as_str) == Some("text")
}

fn text_only(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|m| m.iter().all(|m| m == "text"))
}

fn never(_: &Value) -> bool {
    false
}

/// Fields of OpenAI's and vLLM's APIs that are refused unless their value is neutral.
const UNSUPPORTED: &[(&str, Neutral)] = &[
    ("n", one),
    ("best_of", one),
    ("logprobs", off),
    ("top_logprobs", zero),
    ("prompt_logprobs", never),
    ("echo", off),
    ("suffix", empty),
    ("logit_bias", empty),
    ("presence_penalty", zero),
    ("frequency_penalty", zero),
    ("repetition_penalty", one),
    ("length_penalty", one),
    ("min_p", zero),
    ("min_tokens", zero),
    ("use_beam_search", off),
    ("bad_words", empty),
    ("allowed_token_ids", never),
    ("include_stop_str_in_output", off),
    ("skip_special_tokens", on),
    ("spaces_between_special_tokens", on),
    ("add_special_tokens", never),
    ("truncate_prompt_tokens", never),
    ("tools", empty),
    ("tool_choice", no_tool),
    ("functions", empty),
    ("function_call", no_tool),
    ("response_format", plain_text),
    ("structured_outputs", never),
    ("guided_json", never),
    ("guided_regex", never),
    ("guided_choice", never),
    ("guided_grammar", never),
    ("modalities", text_only),
    ("audio", never),
    ("prediction", never),
    ("web_search_options", never),
    ("reasoning_effort", never),
    ("verbosity", never),
    ("add_generation_prompt", on),
    ("continue_final_message", off),
    ("chat_template", never),
    ("chat_template_kwargs", empty),
    ("documents", empty),
];

/// Fields that never change the answer: book-keeping on the provider's side.
const IGNORED: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "cache_salt",
    "request_id",
    "parallel_tool_calls",
];

/// Checks the fields of a request that its type does not name. `null` counts as absent.
pub fn check(rest: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in rest {
        if value.is_null() || IGNORED.contains(&name.as_str()) {
            continue;
        }
        match UNSUPPORTED.iter().find(|(known, _)| known == name) {
            Some((_, neutral)) if neutral(value) => {}
            Some(_) => {
                return Err(ApiError::unsupported(
                    name,
                    format!(
                        "{name}: {} is not supported by this server; leave the field out",
                        shown(value)
                    ),
                ));
            }
            None => {
                let mut error = ApiError::invalid(
                    name,
                    format!("unrecognized request argument: {name}; check its spelling"),
                );
                error.detail.code = Some("unknown_parameter");
                return Err(error);
            }
        }
    }
    Ok(())
}

/// A value for an error message, not longer than a line.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.len() > 40 => "this text".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn verdict(fields: Value) -> Result<(), Option<&'static str>> {
        check(fields.as_object().unwrap()).map_err(|e| e.detail.code)
    }

    #[test]
    fn neutral_values_pass_and_others_do_not() {
        assert_eq!(
            verdict(
                json!({"n": 1, "logprobs": null, "tools": [], "tool_choice": "auto",
                "response_format": {"type": "text"}, "user": "u", "presence_penalty": 0})
            ),
            Ok(())
        );
        for bad in [
            json!({"n": 2}),
            json!({"logprobs": 5}),
            json!({"logprobs": true}),
            json!({"tools": [{"type": "function"}]}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"presence_penalty": 0.5}),
            json!({"logit_bias": {"5": 1}}),
        ] {
            assert_eq!(
                verdict(bad.clone()),
                Err(Some("unsupported_parameter")),
                "{bad}"
            );
        }
        assert_eq!(
            verdict(json!({"temprature": 0})),
            Err(Some("unknown_parameter"))
        );
    }
}
