//! The Ed25519 key that signs control tokens: one Secret in the operator's namespace, made once.

use std::collections::BTreeMap;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;
use stoker_api::names;

use crate::fence::CallError;

const SECRET: &str = names::CONTROL_KEY_SECRET;
const PRIVATE: &str = names::PRIVATE_KEY;
const PUBLIC: &str = names::PUBLIC_KEY;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("secret {SECRET}: {0}")]
    Api(CallError),
    #[error(
        "secret {SECRET} has no usable Ed25519 key under {PRIVATE}: {0}; delete the secret and \
             restart the operator to have a new key made"
    )]
    Unusable(String),
    #[error("a new Ed25519 key could not be encoded: {0}")]
    Encode(String),
}

/// The private key and the public half that pods hold.
pub struct ControlKey {
    signing: SigningKey,
    public_pem: String,
}

impl ControlKey {
    /// Reads the key, or makes it where there is none yet. Two operators that start at once end up
    /// with the same key: the API server lets only one create the Secret.
    pub async fn load_or_create(api: &Api<Secret>) -> Result<Self, KeyError> {
        if let Some(secret) = api.get_opt(SECRET).await.map_err(api_error)? {
            return Self::from_secret(&secret);
        }
        let fresh = Self::generate()?;
        match api.create(&PostParams::default(), &fresh.secret()?).await {
            Ok(_) => Ok(fresh),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Self::from_secret(&api.get(SECRET).await.map_err(api_error)?)
            }
            Err(error) => Err(api_error(error)),
        }
    }

    pub fn generate() -> Result<Self, KeyError> {
        Self::from_signing(SigningKey::from_bytes(&rand::random()))
    }

    /// SubjectPublicKeyInfo in PEM.
    pub fn public_pem(&self) -> &str {
        &self.public_pem
    }

    /// PKCS #8 in DER.
    pub(super) fn private_der(&self) -> Result<Vec<u8>, KeyError> {
        let der = self.signing.to_pkcs8_der().map_err(encode)?;
        Ok(der.as_bytes().to_vec())
    }

    fn from_signing(signing: SigningKey) -> Result<Self, KeyError> {
        let public = signing.verifying_key();
        let public_pem = public.to_public_key_pem(LineEnding::LF).map_err(encode)?;
        Ok(ControlKey {
            signing,
            public_pem,
        })
    }

    /// The public half is derived, so that the two can't disagree.
    fn from_secret(secret: &Secret) -> Result<Self, KeyError> {
        let data = secret.data.as_ref().and_then(|data| data.get(PRIVATE));
        let bytes = data.ok_or_else(|| KeyError::Unusable("there is no such key".to_owned()))?;
        let pem = std::str::from_utf8(&bytes.0).map_err(unusable)?;
        Self::from_signing(SigningKey::from_pkcs8_pem(pem).map_err(unusable)?)
    }

    fn secret(&self) -> Result<Secret, KeyError> {
        let private = self.signing.to_pkcs8_pem(LineEnding::LF).map_err(encode)?;
        let entry = |name: &str, pem: &str| (name.to_owned(), ByteString(pem.as_bytes().to_vec()));
        Ok(Secret {
            metadata: ObjectMeta {
                name: Some(SECRET.to_owned()),
                labels: Some(BTreeMap::from([(
                    "app.kubernetes.io/managed-by".to_owned(),
                    names::FIELD_MANAGER.to_owned(),
                )])),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([
                entry(PRIVATE, &private),
                entry(PUBLIC, &self.public_pem),
            ])),
            ..Secret::default()
        })
    }
}

fn api_error(error: kube::Error) -> KeyError {
    KeyError::Api(error.into())
}

fn encode(error: impl std::fmt::Display) -> KeyError {
    KeyError::Encode(error.to_string())
}

fn unusable(error: impl std::fmt::Display) -> KeyError {
    KeyError::Unusable(error.to_string())
}

#[cfg(test)]
mod tests {
    use axum::http::Method;
    use serde_json::json;

    use super::*;
    use crate::testing::{answer, mock_client, refusal};

    #[tokio::test]
    async fn two_operators_at_once_share_the_key_that_was_first() {
        let (client, mut server) = mock_client();
        let first = ControlKey::generate().unwrap();
        let stored = serde_json::to_value(first.secret().unwrap()).unwrap();
        let loading = tokio::spawn(async move {
            ControlKey::load_or_create(&Api::namespaced(client, "ns")).await
        });
        let (_, respond) = server.next_request().await.unwrap();
        respond.send_response(refusal(404, "NotFound", "no secret"));
        let (request, respond) = server.next_request().await.unwrap();
        assert_eq!(request.method(), Method::POST);
        respond.send_response(refusal(409, "AlreadyExists", "there is one"));
        let (_, respond) = server.next_request().await.unwrap();
        respond.send_response(answer(200, &stored));
        let loaded = loading.await.unwrap().unwrap();
        assert_eq!(loaded.public_pem(), first.public_pem());
        assert!(
            loaded
                .public_pem()
                .starts_with("-----BEGIN PUBLIC KEY-----")
        );
    }

    #[test]
    fn a_broken_secret_is_refused_with_the_way_out() {
        let secret: Secret =
            serde_json::from_value(json!({"data": {"private.pem": "bm90IGEga2V5"}})).unwrap();
        let message = ControlKey::from_secret(&secret).err().unwrap().to_string();
        assert!(message.contains("delete the secret"), "{message}");
    }
}
