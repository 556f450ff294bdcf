//! Chat templates: a conversation becomes the prompt text that the model was trained on.

use std::{path::Path, time::SystemTime};

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    error::LoadError,
    tokenizer::{TOKENIZER_CONFIG, optional_json},
};

/// One message of a conversation, its content already flattened to text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or whatever else the model's template knows.
    pub role: String,
    pub content: String,
}

#[derive(Debug, Error)]
pub enum ChatError {
    #[error(
        "the model file has no chat template; use /v1/completions, or a file with tokenizer.chat_template"
    )]
    NoTemplate,
    /// The template refused the conversation (`raise_exception`) or can't render it.
    #[error("the model's chat template rejects these messages: {0}")]
    Rejected(String),
}

/// A parsed chat template. Rendering is pure: the time comes from the caller.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    bos_token: String,
    eos_token: String,
}

/// The file of a Hugging Face checkpoint with nothing but the template.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

const NAME: &str = "chat";
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl ChatTemplate {
    /// Parses a template in Jinja as Hugging Face's transformers read it (trimmed and stripped
    /// blocks, Python's string methods, `raise_exception`, `strftime_now`, `tojson`).
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, LoadError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| LoadError::ChatTemplate {
                message: describe(&e),
            })?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| LoadError::ChatTemplate {
                message: describe(&e),
            })?;
        Ok(Self {
            environment: Some(environment),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// The plain ChatML format, for the simulated device, which has no file to take one from.
    pub fn chatml() -> Result<Self, LoadError> {
        Self::new(CHATML, "<|im_start|>", "<|im_end|>")
    }

    /// The source of the template in the folder of a Hugging Face checkpoint: chat_template.jinja,
    /// or else the (default) `chat_template` of tokenizer_config.json.
    pub(crate) fn of_folder(folder: &Path) -> Result<Option<String>, LoadError> {
        let jinja = folder.join(CHAT_TEMPLATE);
        if jinja.is_file() {
            return match std::fs::read_to_string(&jinja) {
                Ok(source) => Ok(Some(source)),
                Err(source) => Err(LoadError::Open {
                    path: jinja,
                    source,
                }),
            };
        }
        let config: serde_json::Value =
            optional_json(folder.join(TOKENIZER_CONFIG))?.unwrap_or_default();
        Ok(match config.get("chat_template") {
            Some(serde_json::Value::String(source)) => Some(source.clone()),
            // [{name, template}, ...]
            Some(serde_json::Value::Array(named)) => named
                .iter()
                .find(|item| item["name"] == "default")
                .and_then(|item| item["template"].as_str())
                .map(str::to_owned),
            _ => None,
        })
    }

    /// For a model whose file has no template: every render fails with [`ChatError::NoTemplate`].
    pub fn missing() -> Self {
        Self {
            environment: None,
            bos_token: String::new(),
            eos_token: String::new(),
        }
    }

    /// Renders the prompt that asks the model for the assistant's next message. Encode it with
    /// [`EncodeOptions::CHAT`](crate::EncodeOptions::CHAT).
    ///
    /// `now` is what `strftime_now` formats, in UTC.
    pub fn render(&self, messages: &[ChatMessage], now: SystemTime) -> Result<String, ChatError> {
        let environment = self.environment.as_ref().ok_or(ChatError::NoTemplate)?;
        let strftime_now = Value::from_function(move |format: &str| strftime(now, format));
        environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages => Serde(messages.to_vec()),
                    add_generation_prompt => true,
                    bos_token => self.bos_token.as_str(),
                    eos_token => self.eos_token.as_str(),
                    strftime_now,
                })
            })
            .map_err(|e| ChatError::Rejected(describe(&e)))
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime(now: SystemTime, format: &str) -> Result<String, Error> {
    let time = jiff::Timestamp::try_from(now)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?
        .to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// Plain JSON as transformers gives it: minijinja's own filter escapes for HTML.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // transformers also takes ensure_ascii, separators and sort_keys; only the layout differs.
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let Some(indent) = indent else {
        return serde_json::to_string(&value).map_err(failed);
    };
    let spaces = " ".repeat(indent.min(16));
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    value.serialize(&mut serializer).map_err(failed)?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// The error's own words, without the template's text around them.
fn describe(error: &Error) -> String {
    match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("{detail} (template line {line})"),
        (Some(detail), None) => detail.to_owned(),
        (None, _) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage {
            role: role.into(),
            content: content.into(),
        }
    }

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, ChatError> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        ChatTemplate::new(source, "<s>", "</s>")
            .unwrap()
            .render(messages, now)
    }

    #[test]
    fn chatml_wraps_every_message_and_opens_the_answer() {
        let text = ChatTemplate::chatml()
            .unwrap()
            .render(
                &[message("system", "Be brief."), message("user", "Hi")],
                SystemTime::now(),
            )
            .unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work_as_in_transformers() {
        let source = "{%- for m in messages %}\n    {% if m.role.startswith('us') %}\n{{ bos_token + m['content'].strip() }}|\n    {% endif %}\n{% endfor %}";
        assert_eq!(
            render(source, &[message("user", "  x ")]).unwrap(),
            "<s>x|\n"
        );
    }

    #[test]
    fn a_template_can_refuse_a_conversation_with_its_own_words() {
        let error = render(
            "{{ raise_exception('roles must alternate') }}",
            &[message("user", "x")],
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the model's chat template rejects these messages: roles must alternate (template line 1)"
        );
    }

    #[test]
    fn strftime_now_formats_the_callers_time() {
        assert_eq!(
            render("{{ strftime_now('%d %b %Y') }}", &[]).unwrap(),
            "14 Nov 2023"
        );
    }

    #[test]
    fn tojson_is_not_escaped_for_html() {
        assert_eq!(
            render(
                "{{ messages[0].content | tojson }}",
                &[message("user", "<a> & 'b'")]
            )
            .unwrap(),
            "\"<a> & 'b'\""
        );
        assert_eq!(
            render("{{ {'a': 1} | tojson(indent=4) }}", &[]).unwrap(),
            "{\n    \"a\": 1\n}"
        );
    }

    #[test]
    fn a_broken_template_is_named_at_load() {
        let error = ChatTemplate::new("{% for %}", "", "").unwrap_err();
        assert!(
            error.to_string().contains("tokenizer.chat_template"),
            "{error}"
        );
    }

    #[test]
    fn a_model_without_a_template_says_so() {
        let error = ChatTemplate::missing()
            .render(&[], SystemTime::now())
            .unwrap_err();
        assert!(matches!(error, ChatError::NoTemplate));
    }
}
