//! Step 5: server-side apply of what a service owns.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use futures::try_join;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use stoker_api::conditions::reasons;
use stoker_api::names;

use super::read::Observed;
use super::validate::Problem;
use super::{Context, lock};
use crate::resources::Owned;

#[derive(Debug, thiserror::Error)]
#[error("could not apply {kind} {name}: {source}")]
pub struct ApplyError {
    kind: String,
    name: String,
    source: Box<kube::Error>,
}

impl ApplyError {
    /// What to tell the object's owner: a refusal that trying again doesn't cure. A conflict, an
    /// overloaded or absent API server and a namespace on its way out pass by themselves.
    pub fn problem(&self) -> Option<Problem> {
        let kube::Error::Api(status) = self.source.as_ref() else {
            return None;
        };
        let passes = !(400..500).contains(&status.code)
            || matches!(status.code, 401 | 408 | 409 | 429)
            || status.message.contains("is being terminated");
        (!passes).then(|| Problem {
            reason: reasons::APPLY_FAILED,
            message: format!(
                "the API server refused {} {}: {}",
                self.kind, self.name, status.message
            ),
        })
    }
}

/// What the status is built from.
#[derive(Debug)]
pub struct Applied {
    pub deployment: Deployment,
}

/// By uid of the service and kind: what was applied last, and the version that came of it. An object
/// that still is that version needs no write.
pub type AppliedBefore = Mutex<HashMap<(String, String), (u64, String)>>;

/// The Deployment comes last: its pods need the others.
pub async fn apply(
    context: &Context,
    uid: &str,
    owned: &Owned,
    observed: &Observed,
) -> Result<Applied, ApplyError> {
    try_join!(
        one(
            context,
            uid,
            &owned.service_account,
            observed.service_account.as_ref()
        ),
        one(
            context,
            uid,
            &owned.config_map,
            observed.config_map.as_ref()
        ),
        one(context, uid, &owned.service, observed.service.as_ref()),
        one(
            context,
            uid,
            &owned.disruption_budget,
            observed.disruption_budget.as_ref()
        ),
    )?;
    let live = observed.deployment.as_ref();
    let deployment = one(context, uid, &owned.deployment, live).await?;
    Ok(Applied { deployment })
}

async fn one<K>(context: &Context, uid: &str, wanted: &K, live: Option<&K>) -> Result<K, ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned,
{
    let kind = K::kind(&()).into_owned();
    let slot = (uid.to_owned(), kind.clone());
    let digest = digest(wanted);
    if let (Some(live), Some(digest)) = (live, digest)
        && lock(&context.applied).get(&slot)
            == live.resource_version().map(|v| (digest, v)).as_ref()
    {
        return Ok(live.clone());
    }
    let namespace = wanted.namespace().unwrap_or_default();
    let api: Api<K> = Api::namespaced(context.client.clone(), &namespace);
    // Force: a field that we own is ours. Fields that we don't state stay as others set them.
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    let name = wanted.name_any();
    let applied = api.patch(&name, &params, &Patch::Apply(wanted)).await;
    let applied = applied.map_err(|source| ApplyError {
        kind,
        name,
        source: Box::new(source),
    })?;
    if let (Some(digest), Some(version)) = (digest, applied.resource_version()) {
        lock(&context.applied).insert(slot, (digest, version));
    }
    Ok(applied)
}

fn digest(object: &impl Serialize) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    serde_json::to_vec(object).ok()?.hash(&mut hasher);
    Some(hasher.finish())
}
