//! API keys of services, out of their Secrets: only digests are kept and passed on.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, ResourceExt};
use serde::Serialize;
use sha2::{Digest, Sha256};
use stoker_api::conditions::reasons;
use stoker_api::{Access, InferenceService};

use crate::controller::Problem;
use crate::fence::CallError;

/// A key as routers know it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ApiKey {
    /// Of the entry in the Secret.
    name: String,
    sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_minute: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_minute: Option<u32>,
}

/// By uid of the service: keys as they were read last.
#[derive(Default)]
pub struct Keyring(Mutex<HashMap<String, Vec<ApiKey>>>);

impl Keyring {
    pub fn get(&self, service: &InferenceService) -> Option<Vec<ApiKey>> {
        self.lock().get(&service.uid()?).cloned()
    }

    /// `None`: the service asks for no keys any more.
    pub fn set(&self, uid: String, keys: Option<Vec<ApiKey>>) {
        match keys {
            Some(keys) => self.lock().insert(uid, keys),
            None => self.lock().remove(&uid),
        };
    }

    /// Drops the keys of services that are gone.
    pub fn retain(&self, alive: &HashSet<String>) {
        self.lock().retain(|uid, _| alive.contains(uid));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<ApiKey>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the Secret that a service names; `None` where it names none, a problem where it can't be had.
pub async fn read(
    client: &Client,
    service: &InferenceService,
) -> Result<Result<Option<Vec<ApiKey>>, Problem>, CallError> {
    let Some(access) = &service.spec.access else {
        return Ok(Ok(None));
    };
    let namespace = service.namespace().unwrap_or_default();
    let api: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    let name = &access.api_key_secret;
    let problem = |message| Problem {
        reason: reasons::API_KEYS_UNREADABLE,
        message,
    };
    match api.get_opt(name).await {
        Ok(Some(secret)) => Ok(Ok(Some(keys(&secret, access)))),
        Ok(None) => Ok(Err(problem(format!(
            "Secret {name} of access.apiKeySecret does not exist in this namespace: create it, such as by \
             kubectl create secret generic {name} --from-literal=team-a=KEY"
        )))),
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(Err(problem(format!(
            "the operator may not read Secret {name} of access.apiKeySecret: install the chart with \
             router.apiKeys=true"
        )))),
        Err(error) => Err(error.into()),
    }
}

fn keys(secret: &Secret, access: &Access) -> Vec<ApiKey> {
    let limit = |n: Option<i32>| n.and_then(|n| u32::try_from(n).ok());
    let entries = secret.data.iter().flatten();
    entries
        // An empty key would be a service for everyone.
        .filter(|(_, value)| !value.0.trim_ascii().is_empty())
        .map(|(name, value)| {
            let own = access.per_key.iter().find(|limits| limits.name == *name);
            let requests = own.map_or(access.requests_per_minute, |own| own.requests_per_minute);
            let tokens = own.map_or(access.tokens_per_minute, |own| own.tokens_per_minute);
            ApiKey {
                name: name.clone(),
                // A line feed at the end is what `--from-file` leaves there.
                sha256: hex(&Sha256::digest(value.0.trim_ascii())),
                requests_per_minute: limit(requests),
                tokens_per_minute: limit(tokens),
            }
        })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_become_digests_with_their_limits() {
        let secret: Secret = serde_json::from_value(json!({"data": {
            "team-a": "c2VjcmV0Cg==", "team-b": "b3RoZXI=", "empty": "Cg=="}}))
        .unwrap();
        let access: Access =
            serde_json::from_value(json!({"apiKeySecret": "keys", "requestsPerMinute": 60,
            "perKey": [{"name": "team-b", "tokensPerMinute": 1000}]}))
            .unwrap();
        let keys = serde_json::to_value(keys(&secret, &access)).unwrap();
        assert_eq!(
            keys,
            json!([
                {"name": "team-a", "requests_per_minute": 60,
                 "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"},
                {"name": "team-b", "tokens_per_minute": 1000,
                 "sha256": hex(&Sha256::digest("other"))},
            ])
        );
    }
}
