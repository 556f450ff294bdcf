//! Step 5: server-side apply of what a service owns.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures::join;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stoker_api::conditions::reasons;
use stoker_api::names;
use tracing::warn;

use super::read::Observed;
use super::validate::Problem;
use super::{Context, endpoints, lock};
use crate::fence::CallError;
use crate::resources::Owned;

#[derive(Debug, thiserror::Error)]
#[error("could not apply {kind} {name}: {source}")]
pub struct ApplyError {
    kind: String,
    name: String,
    source: CallError,
}

impl ApplyError {
    pub fn new(kind: &str, object: &impl ResourceExt, source: CallError) -> Self {
        ApplyError {
            kind: kind.to_owned(),
            name: object.name_any(),
            source,
        }
    }

    /// What to tell the object's owner: a refusal that trying again doesn't cure. A conflict, an
    /// overloaded or absent API server and a namespace on its way out pass by themselves.
    pub fn problem(&self) -> Option<Problem> {
        let status = self.source.refusal()?;
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

/// By uid of the service and kind: what was applied last.
pub type AppliedBefore = Mutex<HashMap<(String, String), Before>>;

/// Corrections of others' changes in a row, less than [`PEACE`] apart, that make a fight.
const FIGHT: u32 = 5;
const PEACE: Duration = Duration::from_secs(60);
/// Who fights writes this often at most.
const TRUCE: Duration = Duration::from_secs(10);

/// What was applied last, and the version that came of it: an object that still is that version
/// needs no write.
#[derive(Clone, Debug)]
pub struct Before {
    digest: u64,
    version: String,
    at: Instant,
    corrections: u32,
}

impl Before {
    /// Something else keeps changing what we own back, and it was set right just now.
    fn fights(&self) -> bool {
        self.corrections >= FIGHT && self.at.elapsed() < TRUCE
    }

    /// The next record, `drifted` when the apply changed an object that had been right before.
    fn next(before: Option<Before>, digest: u64, version: String, drifted: bool) -> Before {
        let recent = before.filter(|b| b.digest == digest && b.at.elapsed() < PEACE);
        let corrections = recent.map_or(0, |before| before.corrections);
        Before {
            digest,
            version,
            at: Instant::now(),
            corrections: corrections + u32::from(drifted),
        }
    }
}

/// Applies all, the Deployment last: its pods need the others. One that fails doesn't keep the rest
/// from being applied: a Service that is refused must not keep a fleet from growing.
pub async fn apply(
    context: &Context,
    uid: &str,
    owned: &Owned,
    observed: &Observed,
) -> (Option<Deployment>, Result<(), ApplyError>) {
    let Observed {
        service_account,
        config_map,
        service,
        disruption_budget,
        deployment,
        ..
    } = observed;
    let (a, b, c, d, e) = join!(
        one(
            context,
            uid,
            &owned.service_account,
            service_account.as_ref()
        ),
        one(context, uid, &owned.config_map, config_map.as_ref()),
        one(context, uid, &owned.service, service.as_ref()),
        endpoints::lead(context, uid, owned, observed),
        one(
            context,
            uid,
            &owned.disruption_budget,
            disruption_budget.as_ref()
        ),
    );
    let others = a
        .map(drop)
        .and(b.map(drop))
        .and(c.map(drop))
        .and(d)
        .and(e.map(drop));
    match one(context, uid, &owned.deployment, deployment.as_ref()).await {
        Ok(deployment) => (Some(deployment), others),
        Err(error) => (None, others.and(Err(error))),
    }
}

/// Applies one object, unless it stands as it was applied before.
pub async fn one<K>(
    context: &Context,
    uid: &str,
    wanted: &K,
    live: Option<&K>,
) -> Result<K, ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned,
{
    let kind = K::kind(&()).into_owned();
    let name = wanted.name_any();
    let slot = (uid.to_owned(), kind.clone());
    let digest = digest(wanted);
    let before = lock(&context.applied).get(&slot).cloned();
    let before = before.filter(|before| before.digest == digest);
    let seen = live.and_then(ResourceExt::resource_version);
    if let (Some(live), Some(before)) = (live, &before)
        && (seen.as_ref() == Some(&before.version) || before.fights())
    {
        return Ok(live.clone());
    }
    let namespace = wanted.namespace().unwrap_or_default();
    let api: Api<K> = Api::namespaced(context.client.clone(), &namespace);
    // Force: a field that we own is ours. Fields that we don't state stay as others set them.
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    let failed = |source: CallError| ApplyError {
        kind: kind.clone(),
        name: name.clone(),
        source,
    };
    let apply = || async {
        let applied = api.patch(&name, &params, &Patch::Apply(wanted)).await;
        applied.map_err(CallError::from)
    };
    let applied = match apply().await {
        Err(refused) if live.is_some() && is_invalid(&refused) => match repair(wanted) {
            Some(patch) => {
                let params = PatchParams {
                    field_manager: params.field_manager.clone(),
                    ..PatchParams::default()
                };
                let repaired = api.patch(&name, &params, &Patch::Strategic(patch)).await;
                repaired.map_err(|error| failed(error.into()))?;
                apply().await
            }
            None => Err(refused),
        },
        result => result,
    };
    let applied = applied.map_err(failed)?;
    if let Some(version) = applied.resource_version() {
        // An apply that sets nothing right leaves the version as it was.
        let drifted = before.is_some() && seen.is_some() && seen.as_ref() != Some(&version);
        let next = Before::next(before, digest, version, drifted);
        if next.corrections == FIGHT && drifted {
            warn!(
                kind,
                name,
                "something else keeps changing what this operator owns; is another stoker-operator \
                 running?"
            );
        }
        lock(&context.applied).insert(slot, next);
    }
    Ok(applied)
}

/// Where someone has changed a port's number, an apply would add ours beside theirs under the same
/// name, which is invalid: numbers are the keys of such lists. Ports are all ours, so the whole list
/// is put back first.
fn repair(wanted: &impl Serialize) -> Option<Value> {
    let wanted = serde_json::to_value(wanted).ok()?;
    let replaced = |ports: &Value| {
        let mut list = vec![json!({"$patch": "replace"})];
        list.extend(ports.as_array().into_iter().flatten().cloned());
        json!(list)
    };
    if let Some(ports) = wanted.pointer("/spec/ports") {
        return Some(json!({"spec": {"ports": replaced(ports)}}));
    }
    let server = wanted.pointer("/spec/template/spec/containers/0")?;
    let container = json!({"name": server["name"], "ports": replaced(&server["ports"])});
    Some(json!({"spec": {"template": {"spec": {"containers": [container]}}}}))
}

fn is_invalid(error: &CallError) -> bool {
    error.refusal().is_some_and(|status| status.code == 422)
}

/// 0 for what can't be written as JSON, which no Kubernetes object is.
fn digest(object: &impl Serialize) -> u64 {
    let mut hasher = DefaultHasher::new();
    let bytes = serde_json::to_vec(object).unwrap_or_default();
    bytes.hash(&mut hasher);
    hasher.finish()
}
