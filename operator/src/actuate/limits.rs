//! Pushes dials and objectives to a replica's control port.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_autoscaler::{Dials, ItlOf, Objectives};

use super::Signer;
use super::token::TokenError;
use crate::http::{self, PodError};

const DEADLINE: Duration = Duration::from_secs(1);

/// Objectives as the server reads them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireObjectives {
    pub ttft_ms: f64,
    pub ttft_free_prompt_tokens: f64,
    pub ttft_ms_per_prompt_token: f64,
    pub itl_ms: f64,
    pub itl_of: WireItlOf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireItlOf {
    Mean,
    P95,
}

impl From<&Objectives> for WireObjectives {
    fn from(objectives: &Objectives) -> Self {
        WireObjectives {
            ttft_ms: milliseconds(objectives.ttft_seconds),
            ttft_free_prompt_tokens: objectives.ttft_free_prompt_tokens,
            ttft_ms_per_prompt_token: milliseconds(objectives.ttft_seconds_per_prompt_token),
            itl_ms: milliseconds(objectives.itl_seconds),
            itl_of: match objectives.itl_of {
                ItlOf::Mean => WireItlOf::Mean,
                ItlOf::P95 => WireItlOf::P95,
            },
        }
    }
}

/// To the microsecond: 0.1 s is 100 ms, not 100.00000000000001.
fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e3
}

#[derive(Debug, Serialize)]
struct Body {
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    objectives: WireObjectives,
}

/// What a replica was told to use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pushed {
    pub dials: Dials,
    pub objectives: WireObjectives,
}

#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("control port: {0}")]
    Pod(#[from] PodError),
}

pub struct Pusher {
    http: reqwest::Client,
    port: u16,
    signer: Signer,
}

impl Pusher {
    /// `port`: of the replica's control listener.
    pub fn new(port: u16, signer: Signer) -> Result<Self, reqwest::Error> {
        let http = http::client(DEADLINE).timeout(DEADLINE).build()?;
        Ok(Pusher { http, port, signer })
    }

    pub async fn push(
        &self,
        address: IpAddr,
        pod_uid: &str,
        wanted: Pushed,
    ) -> Result<(), PushError> {
        let token = self.signer.sign(pod_uid)?;
        let at = SocketAddr::new(address, self.port);
        let body = Body {
            max_num_seqs: wanted.dials.max_num_seqs,
            max_num_batched_tokens: wanted.dials.max_num_batched_tokens,
            objectives: wanted.objectives,
        };
        let response = self
            .http
            .patch(format!("http://{at}/control/v1/limits"))
            .bearer_auth(token)
            .json(&body)
            .send()
            .await;
        http::accepted(response).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::State;
    use axum::http::{HeaderMap, StatusCode};
    use axum::{Json, Router, routing::patch};
    use serde_json::{Value, json};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;
    use crate::actuate::ControlKey;
    use crate::lease::Leadership;

    type Seen = mpsc::UnboundedSender<(String, Value)>;

    async fn replica(answer: StatusCode) -> (SocketAddr, mpsc::UnboundedReceiver<(String, Value)>) {
        let (seen, received) = mpsc::unbounded_channel();
        let handler = move |State(seen): State<Seen>, headers: HeaderMap, Json(body)| async move {
            let token = headers["authorization"].to_str().unwrap().to_owned();
            seen.send((token, body)).unwrap();
            (answer, "why")
        };
        let router = Router::new().route("/control/v1/limits", patch(handler));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let router = router.with_state(seen);
        tokio::spawn(async move { axum::serve(listener, router).await });
        (at, received)
    }

    fn pusher(port: u16) -> Pusher {
        let key = ControlKey::generate().unwrap();
        Pusher::new(port, Signer::new(&key, Leadership::held(1)).unwrap()).unwrap()
    }

    fn wanted() -> Pushed {
        Pushed {
            dials: Dials {
                max_num_seqs: 12,
                max_num_batched_tokens: 300,
            },
            objectives: WireObjectives::from(&Objectives {
                good_percent: 99.0,
                ttft_seconds: 2.0,
                ttft_free_prompt_tokens: 1000.0,
                ttft_seconds_per_prompt_token: 0.001,
                itl_seconds: 0.1,
                itl_of: ItlOf::P95,
            }),
        }
    }

    #[tokio::test]
    async fn sends_dials_and_objectives_with_a_token() {
        let (at, mut seen) = replica(StatusCode::OK).await;
        pusher(at.port())
            .push(at.ip(), "pod", wanted())
            .await
            .unwrap();
        let (token, body) = seen.recv().await.unwrap();
        assert!(token.starts_with("Bearer ey"), "{token}");
        assert_eq!(
            body,
            json!({"max_num_seqs": 12, "max_num_batched_tokens": 300, "objectives": {
                "ttft_ms": 2000.0, "ttft_free_prompt_tokens": 1000.0,
                "ttft_ms_per_prompt_token": 1.0, "itl_ms": 100.0, "itl_of": "p95"}})
        );
    }

    #[tokio::test]
    async fn a_refusal_carries_the_replicas_words() {
        let (at, _seen) = replica(StatusCode::FORBIDDEN).await;
        let error = pusher(at.port()).push(at.ip(), "pod", wanted()).await;
        assert_eq!(
            error.unwrap_err().to_string(),
            "control port: refused with status 403: why"
        );
    }
}
