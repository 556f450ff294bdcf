//! Calls to pods by their address.

use std::time::Duration;

use reqwest::{Client, ClientBuilder, Response};

/// Of what a pod says when it refuses, this much goes into a message.
const LONGEST_MESSAGE: usize = 300;

#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("no answer: {0}")]
    Transport(String),
    #[error("refused with status {status}: {message}")]
    Refused { status: u16, message: String },
}

impl From<reqwest::Error> for PodError {
    /// The innermost cause: `error sending request for url (…)` alone says nothing.
    fn from(error: reqwest::Error) -> Self {
        let mut cause: &dyn std::error::Error = &error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        PodError::Transport(match error.is_timeout() {
            true => "timed out".to_owned(),
            false => cause.to_string(),
        })
    }
}

/// A client that reaches pods directly. `connect_timeout` bounds the connection only: calls set
/// what they wait for the answer.
pub fn client(connect_timeout: Duration) -> ClientBuilder {
    Client::builder()
        .connect_timeout(connect_timeout)
        // A proxy meant for the outside must not get in between.
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
}

/// A response of success, or the pod's words.
pub async fn accepted(response: Result<Response, reqwest::Error>) -> Result<Response, PodError> {
    let response = response?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let text = response.text().await.unwrap_or_default();
    Err(PodError::Refused {
        status: status.as_u16(),
        message: text.chars().take(LONGEST_MESSAGE).collect(),
    })
}
