//! One request of a virtual user, and what became of it.

use std::time::{Duration, Instant};

use futures::StreamExt;
use reqwest::{Client, Response, StatusCode, header};
use serde::{Deserialize, Serialize};

use crate::prompts::Prompt;

/// Why a request failed, as counted.
pub type FailureKind = String;

#[derive(Debug)]
pub struct Failure {
    pub kind: FailureKind,
    /// What the server or the connection said.
    pub detail: String,
    /// The server's Retry-After.
    pub retry_after: Option<Duration>,
}

/// An answered request.
#[derive(Debug, Default)]
pub struct Answer {
    pub completion_tokens: u64,
    pub prompt_tokens: u64,
    /// Until the first text; of a streamed answer only.
    pub ttft: Option<Duration>,
    /// Mean time a token after the first; of a streamed answer with more than one.
    pub tpot: Option<Duration>,
}

/// What is told while an answer streams in.
pub trait Listener {
    /// Text has come; `since` is the time since the request or since the text before.
    fn text(&self, first: bool, since: Duration);
}

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Target {
    pub url: String,
    pub model: Option<String>,
    pub stream: bool,
    pub timeout: Duration,
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    prompt: &'a [u32],
    max_tokens: u32,
    temperature: f32,
    ignore_eos: bool,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The parts of a completion or of an event that count.
#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Target {
    /// A client with one keep-alive connection, like a real one.
    pub fn client(&self) -> reqwest::Result<Client> {
        Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(1)
            .tcp_nodelay(true)
            .build()
    }

    /// Sends a request and waits for the whole answer.
    pub async fn send(
        &self,
        client: &Client,
        prompt: &Prompt,
        listener: &impl Listener,
    ) -> Result<Answer, Failure> {
        match tokio::time::timeout(self.timeout, self.exchange(client, prompt, listener)).await {
            Ok(result) => result,
            Err(_) => Err(failure(
                "timeout",
                format!("no whole answer within {} s", self.timeout.as_secs_f64()),
            )),
        }
    }

    async fn exchange(
        &self,
        client: &Client,
        prompt: &Prompt,
        listener: &impl Listener,
    ) -> Result<Answer, Failure> {
        let sent = Instant::now();
        let body = Body {
            model: self.model.as_deref(),
            prompt: &prompt.ids,
            max_tokens: prompt.max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            stream: self.stream,
            stream_options: self.stream.then_some(StreamOptions {
                include_usage: true,
            }),
        };
        let response = client
            .post(&self.url)
            .json(&body)
            .send()
            .await
            .map_err(|e| broken(&e))?;
        if response.status() != StatusCode::OK {
            return Err(refused(response).await);
        }
        if self.stream {
            return read_events(response, sent, listener).await;
        }
        let bytes = response.bytes().await.map_err(|e| broken(&e))?;
        let completion = parse(&bytes)?;
        let usage = completion
            .usage
            .ok_or_else(|| failure("bad_response", "the answer has no usage".into()))?;
        Ok(Answer {
            completion_tokens: usage.completion_tokens,
            prompt_tokens: usage.prompt_tokens,
            ..Answer::default()
        })
    }
}

async fn read_events(
    response: Response,
    sent: Instant,
    listener: &impl Listener,
) -> Result<Answer, Failure> {
    let mut chunks = response.bytes_stream();
    let mut buffer: Vec<u8> = Vec::new();
    let mut last = sent;
    let mut ttft = None;
    let mut texts = 0;
    let mut usage = None;
    let mut done = false;
    while let Some(chunk) = chunks.next().await {
        buffer.extend_from_slice(&chunk.map_err(|e| broken(&e))?);
        let now = Instant::now();
        while let Some(end) = buffer.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let Some(data) = event[..end].strip_prefix(b"data: ") else {
                continue;
            };
            if data == b"[DONE]" {
                done = true;
                continue;
            }
            let completion = parse(data)?;
            if completion.choices.iter().any(|c| !c.text.is_empty()) {
                listener.text(ttft.is_none(), now - last);
                ttft.get_or_insert(now - sent);
                last = now;
                texts += 1;
            }
            usage = completion.usage.or(usage);
        }
    }
    match (done, usage) {
        // A retry that sent again what had come before, for one.
        (true, Some(usage)) if texts > usage.completion_tokens => Err(failure(
            "duplicate_tokens",
            format!("{texts} texts came of {} tokens", usage.completion_tokens),
        )),
        (true, Some(usage)) => Ok(Answer {
            completion_tokens: usage.completion_tokens,
            prompt_tokens: usage.prompt_tokens,
            ttft,
            tpot: ttft
                .zip(u32::try_from(usage.completion_tokens.saturating_sub(1)).ok())
                .filter(|(_, gaps)| *gaps > 0)
                .map(|(ttft, gaps)| (last - sent - ttft) / gaps),
        }),
        (true, None) => Err(failure("bad_response", "the stream has no usage".into())),
        (false, _) => Err(failure(
            "incomplete",
            "the stream ended without [DONE]".into(),
        )),
    }
}

fn parse(bytes: &[u8]) -> Result<Completion, Failure> {
    let completion: Completion =
        serde_json::from_slice(bytes).map_err(|e| failure("bad_response", e.to_string()))?;
    match completion.error {
        Some(error) => Err(failure("stream_error", error.to_string())),
        None => Ok(completion),
    }
}

async fn refused(response: Response) -> Failure {
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let kind = format!("http_{}", response.status().as_u16());
    // The body must be read for the connection to be used again.
    let detail = response.text().await.unwrap_or_default();
    Failure {
        retry_after,
        ..failure(&kind, detail)
    }
}

fn failure(kind: &str, detail: String) -> Failure {
    Failure {
        kind: kind.to_owned(),
        detail,
        retry_after: None,
    }
}

/// A connection that was refused, or that broke.
fn broken(error: &reqwest::Error) -> Failure {
    let mut detail = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        detail.push_str(": ");
        detail.push_str(&cause.to_string());
        source = cause.source();
    }
    let kind = if error.is_connect() {
        "connect"
    } else {
        "disconnected"
    };
    failure(kind, detail)
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
