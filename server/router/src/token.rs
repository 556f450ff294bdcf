//! Who may use the control port: the operator that leads, by short-lived signed tokens.

use std::path::PathBuf;
use std::time::SystemTime;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use parking_lot::Mutex;
use serde::Deserialize;
use thiserror::Error;

const ISSUER: &str = "stoker-operator";

#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    epoch: u64,
}

#[derive(Debug, Error)]
pub enum TokenError {
    #[error("no token; send one as \"Authorization: Bearer TOKEN\"")]
    Missing,
    #[error("the control key {path} can't be read: {why}; it must be an Ed25519 public key in PEM")]
    Key { path: PathBuf, why: String },
    #[error("the token is not valid: {0}")]
    Invalid(#[from] jsonwebtoken::errors::Error),
    #[error("the token is for pod {0:?}, which this is not")]
    OtherPod(String),
    #[error("the token's epoch {got} is older than {seen}: its signer no longer leads")]
    OldEpoch { got: u64, seen: u64 },
}

/// Checks tokens; remembers the highest epoch.
#[derive(Debug)]
pub struct Gate {
    path: PathBuf,
    pod_uid: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    epoch: u64,
    key: Option<(SystemTime, DecodingKey)>,
}

impl Gate {
    /// `epoch`: the highest that was seen before a restart.
    #[must_use]
    pub fn new(path: PathBuf, pod_uid: String, epoch: u64) -> Self {
        let state = State { epoch, key: None };
        Self {
            path,
            pod_uid,
            state: Mutex::new(state),
        }
    }

    /// The token's epoch.
    ///
    /// # Errors
    /// Why the token is not good.
    pub fn check(&self, headers: &HeaderMap) -> Result<u64, TokenError> {
        let header = headers.get(AUTHORIZATION);
        let token = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let token = token.ok_or(TokenError::Missing)?;
        let mut state = self.state.lock();
        let key = self.key(&mut state)?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "iss", "sub"]);
        validation.leeway = 5;
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation)?.claims;
        if claims.sub != self.pod_uid {
            return Err(TokenError::OtherPod(claims.sub));
        }
        if claims.epoch < state.epoch {
            return Err(TokenError::OldEpoch {
                got: claims.epoch,
                seen: state.epoch,
            });
        }
        state.epoch = claims.epoch;
        Ok(claims.epoch)
    }

    /// The key; read again when its file changed.
    fn key(&self, state: &mut State) -> Result<DecodingKey, TokenError> {
        let error = |why: String| TokenError::Key {
            path: self.path.clone(),
            why,
        };
        let modified = std::fs::metadata(&self.path).and_then(|file| file.modified());
        let modified = modified.map_err(|why| error(why.to_string()))?;
        if let Some((known, key)) = &state.key
            && *known == modified
        {
            return Ok(key.clone());
        }
        let pem = std::fs::read(&self.path).map_err(|why| error(why.to_string()))?;
        let key = DecodingKey::from_ed_pem(&pem).map_err(|why| error(why.to_string()))?;
        state.key = Some((modified, key.clone()));
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use ed25519_dalek::pkcs8::EncodePrivateKey;
    use ed25519_dalek::pkcs8::spki::EncodePublicKey;
    use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
    use hyper::header::HeaderValue;
    use jsonwebtoken::{EncodingKey, Header};
    use serde_json::{Value, json};

    use super::*;

    fn token(key: &SigningKey, claims: &Value) -> HeaderMap {
        let der = key.to_pkcs8_der().unwrap();
        let key = EncodingKey::from_ed_der(der.as_bytes());
        let token = jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), claims, &key).unwrap();
        let value = HeaderValue::try_from(format!("Bearer {token}")).unwrap();
        HeaderMap::from_iter([(AUTHORIZATION, value)])
    }

    fn claims(sub: &str, seconds: i64, epoch: u64) -> Value {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let exp = now.unwrap().as_secs() as i64 + seconds;
        json!({"sub": sub, "exp": exp, "epoch": epoch, "iss": ISSUER})
    }

    #[test]
    fn only_the_leader_gets_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("public.pem");
        let key = SigningKey::from_bytes(&[7; 32]);
        let pem = |key: &SigningKey| {
            key.verifying_key()
                .to_public_key_pem(LineEnding::LF)
                .unwrap()
        };
        std::fs::write(&path, pem(&key)).unwrap();
        let gate = Gate::new(path.clone(), "pod-1".into(), 4);
        assert!(matches!(
            gate.check(&HeaderMap::new()),
            Err(TokenError::Missing)
        ));
        let check = |claims: &Value| gate.check(&token(&key, claims));
        assert_eq!(check(&claims("pod-1", 60, 4)).unwrap(), 4);
        assert!(matches!(
            check(&claims("pod-2", 60, 9)),
            Err(TokenError::OtherPod(_))
        ));
        assert!(matches!(
            check(&claims("pod-1", -60, 9)),
            Err(TokenError::Invalid(_))
        ));
        assert_eq!(check(&claims("pod-1", 60, 6)).unwrap(), 6);
        let old = check(&claims("pod-1", 60, 5)).unwrap_err();
        assert!(matches!(old, TokenError::OldEpoch { got: 5, seen: 6 }));
        let mut other = claims("pod-1", 60, 7);
        other["iss"] = json!("someone");
        assert!(check(&other).is_err());

        let new = SigningKey::from_bytes(&[8; 32]);
        assert!(gate.check(&token(&new, &claims("pod-1", 60, 7))).is_err());
        std::fs::write(&path, pem(&new)).unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(later).unwrap();
        assert_eq!(
            gate.check(&token(&new, &claims("pod-1", 60, 7))).unwrap(),
            7
        );
    }
}
