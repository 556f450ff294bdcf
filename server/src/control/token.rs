//! Signed tokens: who may turn this replica's dials.
//!
//! The operator signs each request for one pod (`sub` is the pod's UID), for a minute (`exp`), as
//! the leader of one lease (`epoch` counts its transitions). A deposed leader's tokens are
//! refused from the moment its successor has spoken.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use axum::http::HeaderValue;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use serde::Deserialize;
use thiserror::Error;

use crate::openai::error::ApiError;

/// The issuer that tokens must name.
const ISSUER: &str = "stoker-operator";

#[derive(Debug, Error)]
pub enum KeyError {
    #[error("--control-key {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("--control-key {path}: not a PEM file with an Ed25519 public key: {message}")]
    Parse { path: PathBuf, message: String },
}

#[derive(Debug, Deserialize)]
struct Claims {
    /// Transitions of the operator's lease when its leader was elected. The other claims are
    /// checked by `Validation`.
    epoch: Option<u64>,
}

/// Checks tokens against the key file, which is read again for each of them: the kubelet swaps a
/// ConfigMap's files without notice, and control requests are few.
pub struct TokenVerifier {
    key_path: PathBuf,
    subject: String,
    /// Highest epoch seen.
    epoch: Mutex<Option<u64>>,
}

impl TokenVerifier {
    /// Fails when the key file can't be used now.
    pub fn new(key_path: PathBuf, subject: String) -> Result<Self, KeyError> {
        let verifier = Self {
            key_path,
            subject,
            epoch: Mutex::new(None),
        };
        let pem = std::fs::read(&verifier.key_path).map_err(|e| verifier.unreadable(e))?;
        verifier.parse(&pem)?;
        Ok(verifier)
    }

    pub fn epoch(&self) -> Option<u64> {
        *self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks an Authorization header.
    pub async fn verify(&self, authorization: Option<&HeaderValue>) -> Result<(), ApiError> {
        let token = authorization
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .ok_or_else(|| {
                ApiError::unauthorized(
                    "this port wants a token signed by the operator: Authorization: Bearer <JWT>",
                )
            })?;
        let pem = tokio::fs::read(&self.key_path)
            .await
            .map_err(|e| ApiError::internal(self.unreadable(e).to_string()))?;
        let key = self
            .parse(&pem)
            .map_err(|e| ApiError::internal(e.to_string()))?;
        self.check(token, &key)
    }

    fn check(&self, token: &str, key: &DecodingKey) -> Result<(), ApiError> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "iss", "sub"]);
        validation.sub = Some(self.subject.clone());
        validation.leeway = 0;
        let epoch = decode::<Claims>(token, key, &validation)
            .map_err(|error| self.refusal(&error))?
            .claims
            .epoch
            .ok_or_else(|| ApiError::forbidden("the token has no claim epoch"))?;
        let mut highest = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match *highest {
            Some(seen) if epoch < seen => Err(ApiError::forbidden(format!(
                "the token is from lease epoch {epoch}, but epoch {seen} has spoken already; its \
                 leader was deposed"
            ))),
            _ => {
                *highest = Some(epoch);
                Ok(())
            }
        }
    }

    /// What is wrong with who the token is for is told (403); what is no token of ours is not
    /// looked into (401).
    fn refusal(&self, error: &jsonwebtoken::errors::Error) -> ApiError {
        match error.kind() {
            ErrorKind::ExpiredSignature => ApiError::forbidden("the token has expired"),
            ErrorKind::InvalidSubject => ApiError::forbidden(format!(
                "the token is not for this pod, whose uid is {}",
                self.subject
            )),
            ErrorKind::InvalidIssuer => {
                ApiError::forbidden(format!("the token's issuer is not {ISSUER}"))
            }
            ErrorKind::MissingRequiredClaim(claim) => {
                ApiError::forbidden(format!("the token has no claim {claim}"))
            }
            ErrorKind::InvalidSignature => ApiError::unauthorized(
                "the token's signature does not fit this replica's public key",
            ),
            _ => ApiError::unauthorized(format!("the token can't be read: {error}")),
        }
    }

    fn parse(&self, pem: &[u8]) -> Result<DecodingKey, KeyError> {
        DecodingKey::from_ed_pem(pem).map_err(|e| KeyError::Parse {
            path: self.key_path.clone(),
            message: e.to_string(),
        })
    }

    fn unreadable(&self, source: std::io::Error) -> KeyError {
        KeyError::Read {
            path: self.key_path.clone(),
            source,
        }
    }
}
