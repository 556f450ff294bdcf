//! Short-lived tokens for a pod's control port.

use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::{Deserialize, Serialize};

use super::{ControlKey, KeyError};
use crate::lease::Leadership;

const LIFETIME: Duration = Duration::from_secs(60);
const ISSUER: &str = "stoker-operator";

/// What a token states.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The pod's uid: a token is good for one pod only.
    pub sub: String,
    pub iss: String,
    /// Seconds since the Unix epoch.
    pub exp: u64,
    /// Of the lease: a deposed leader's is lower than what the pod has seen.
    pub epoch: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("not the leader (any more): no token was signed")]
    NotLeading,
    #[error("the token could not be signed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// Signs tokens while this process leads.
pub struct Signer {
    key: EncodingKey,
    leadership: Leadership,
}

impl Signer {
    pub fn new(key: &ControlKey, leadership: Leadership) -> Result<Self, KeyError> {
        let key = EncodingKey::from_ed_der(&key.private_der()?);
        Ok(Signer { key, leadership })
    }

    pub fn sign(&self, pod_uid: &str) -> Result<String, TokenError> {
        let epoch = self.leadership.epoch().ok_or(TokenError::NotLeading)?;
        let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0);
        let claims = Claims {
            sub: pod_uid.to_owned(),
            iss: ISSUER.to_owned(),
            exp: now + LIFETIME.as_secs(),
            epoch,
        };
        let header = Header::new(Algorithm::EdDSA);
        Ok(jsonwebtoken::encode(&header, &claims, &self.key)?)
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation};

    use super::*;

    #[test]
    fn a_pod_can_check_it_with_the_public_half() {
        let key = ControlKey::generate().unwrap();
        let signer = Signer::new(&key, Leadership::held(41)).unwrap();
        let token = signer.sign("pod-1").unwrap();
        let public = DecodingKey::from_ed_pem(key.public_pem().as_bytes()).unwrap();
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        let claims = jsonwebtoken::decode::<Claims>(&token, &public, &validation);
        let claims = claims.unwrap().claims;
        assert_eq!((claims.sub.as_str(), claims.epoch), ("pod-1", 41));

        let other = ControlKey::generate().unwrap();
        let wrong = DecodingKey::from_ed_pem(other.public_pem().as_bytes()).unwrap();
        assert!(jsonwebtoken::decode::<Claims>(&token, &wrong, &validation).is_err());
    }

    #[test]
    fn nothing_is_signed_without_the_lease() {
        let key = ControlKey::generate().unwrap();
        let signer = Signer::new(&key, Leadership::none()).unwrap();
        assert!(matches!(signer.sign("pod-1"), Err(TokenError::NotLeading)));
    }
}
