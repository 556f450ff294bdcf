//! Writes the status when there is something to say, and tells changes as events.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use stoker_api::conditions::{self, Finding, Status, reasons, types};
use stoker_api::{InferenceService, InferenceServiceStatus, ScalingMode, names};
use tracing::warn;

use super::status::{Facts, assess};
use super::{Context, events, lock};
use crate::fence::CallError;
use crate::scaling::Outlook;
use crate::stores::Guarded;

/// Measured figures are written this often.
const CALM: Duration = Duration::from_secs(30);
/// Dials, loading percent, a load that moves and the words of a failure are written this often at most.
const SOON: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
#[error("could not write the status: {0}")]
pub struct StatusError(CallError);

/// By uid: the status that was written last. The watch may not have echoed it yet.
pub type Statuses = Mutex<HashMap<String, Written>>;

#[derive(Clone, Debug)]
pub struct Written {
    status: InferenceServiceStatus,
    at: Instant,
}

/// When a changed status should be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    Same,
    Calm,
    Soon,
    Now,
}

/// Assesses the facts and writes what changed. Gives whether all is as it should be.
pub async fn status(
    context: &Context,
    service: &InferenceService,
    facts: &Facts<'_>,
) -> Result<bool, StatusError> {
    let (old, age) = last(context, service);
    let (findings, mut new) = assess(facts);
    new.conditions = dated(&old.conditions, &findings, service.metadata.generation);
    let due = match urgency(&old, &new) {
        Urgency::Same => false,
        Urgency::Calm => age >= CALM,
        Urgency::Soon => age >= SOON,
        Urgency::Now => true,
    };
    if due {
        write(context, service, &new).await?;
        let told = events::changes(&old, &new, why(service, &facts.outlook));
        events::publish(context, service, told).await;
    }
    let well = conditions::is_true(&new.conditions, types::READY)
        && !conditions::is_true(&new.conditions, types::PROGRESSING);
    Ok(well)
}

/// Writes the wanted number of replicas alone, when it is another than before.
pub async fn desired(
    context: &Context,
    service: &InferenceService,
    desired: u32,
) -> Result<(), StatusError> {
    let (old, _) = last(context, service);
    let desired = i32::try_from(desired).unwrap_or(i32::MAX);
    if old.desired_replicas == Some(desired) {
        return Ok(());
    }
    let new = InferenceServiceStatus {
        desired_replicas: Some(desired),
        conditions: dated(&old.conditions, &[], None),
        ..old.clone()
    };
    write(context, service, &new).await?;
    let outlook = crate::scaling::Key::of(service).map(|key| context.board.outlook(&key));
    let told = events::changes(&old, &new, outlook.and_then(|o| why(service, &o)));
    events::publish(context, service, told).await;
    Ok(())
}

/// Why the number of replicas changed.
fn why(service: &InferenceService, outlook: &Outlook) -> Option<String> {
    match service.spec.scaling.mode {
        ScalingMode::Auto => outlook.reason.as_ref().map(|reason| reason.message.clone()),
        ScalingMode::Manual | ScalingMode::Recommend => {
            Some(format!("spec.replicas is {}", service.spec.replicas))
        }
    }
}

/// Says of an object that can't be read that it can't.
pub async fn unreadable(
    context: &Context,
    object: &Guarded,
    error: &str,
) -> Result<(), StatusError> {
    let name = object.name_any();
    let uid = object.uid().unwrap_or_default();
    if lock(&context.unreadable)
        .get(&uid)
        .is_some_and(|told| told == error)
    {
        return Ok(());
    }
    let finding = Finding::new(
        types::READY,
        Status::False,
        reasons::INVALID_SPEC,
        format!(
            "the object does not fit this operator's version of the API and is left alone: {error}"
        ),
    );
    warn!(name, error, "an InferenceService can't be read");
    let conditions = dated(&[], &[finding], object.meta().generation);
    let body = json!({
        "apiVersion": InferenceService::api_version(&()),
        "kind": InferenceService::kind(&()),
        "metadata": {"name": name},
        "status": {"conditions": conditions, "reason": reasons::INVALID_SPEC},
    });
    let namespace = object.namespace().unwrap_or_default();
    let api: Api<Guarded> = Api::namespaced(context.client.clone(), &namespace);
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    api.patch_status(&name, &params, &Patch::Apply(body))
        .await
        .map_err(|error| StatusError(error.into()))?;
    lock(&context.unreadable).insert(uid, error.to_owned());
    Ok(())
}

/// The status as it was written last, and for how long it has stood.
fn last(context: &Context, service: &InferenceService) -> (InferenceServiceStatus, Duration) {
    let uid = service.uid().unwrap_or_default();
    let seen = || service.status.clone().unwrap_or_default();
    match lock(&context.statuses).get(&uid) {
        // The watch has had time to echo it: what is there now is what counts, whoever wrote it.
        Some(written) if written.at.elapsed() >= SOON => (seen(), written.at.elapsed()),
        Some(written) => (written.status.clone(), written.at.elapsed()),
        None => (seen(), Duration::MAX),
    }
}

async fn write(
    context: &Context,
    service: &InferenceService,
    status: &InferenceServiceStatus,
) -> Result<(), StatusError> {
    let name = service.name_any();
    let uid = service.uid().unwrap_or_default();
    let body = json!({
        "apiVersion": InferenceService::api_version(&()),
        "kind": InferenceService::kind(&()),
        // The uid keeps the status of a deleted object from landing on its successor.
        "metadata": {"name": name, "uid": uid},
        "status": status,
    });
    let namespace = service.namespace().unwrap_or_default();
    // Guarded: what comes back need not be readable for the write to have succeeded.
    let api: Api<Guarded> = Api::namespaced(context.client.clone(), &namespace);
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    api.patch_status(&name, &params, &Patch::Apply(body))
        .await
        .map_err(|error| StatusError(error.into()))?;
    metrics::counter!("stoker_operator_status_writes_total").increment(1);
    let written = Written {
        status: status.clone(),
        at: Instant::now(),
    };
    let mut statuses = lock(&context.statuses);
    if statuses.insert(uid, written).is_none() {
        context.forget_gone(&mut statuses);
    }
    Ok(())
}

/// Our conditions, dated. Others' conditions are theirs to apply.
fn dated(old: &[Condition], findings: &[Finding], generation: Option<i64>) -> Vec<Condition> {
    const OURS: [&str; 7] = [
        types::READY,
        types::AVAILABLE,
        types::PROGRESSING,
        types::MODEL_LOADED,
        types::SCHEDULED,
        types::SCALING_ACTIVE,
        types::OBJECTIVES_MET,
    ];
    let ours = |condition: &&Condition| OURS.contains(&condition.type_.as_str());
    let mut conditions: Vec<Condition> = old.iter().filter(ours).cloned().collect();
    let now = Time(Timestamp::now());
    for finding in findings {
        conditions::set_condition(&mut conditions, finding, generation, &now);
    }
    let place = |condition: &Condition| OURS.iter().position(|type_| *type_ == condition.type_);
    conditions.sort_by_key(place);
    conditions
}

fn urgency(old: &InferenceServiceStatus, new: &InferenceServiceStatus) -> Urgency {
    let heads = |status: &InferenceServiceStatus| {
        let conditions: Vec<_> = status
            .conditions
            .iter()
            .map(|c| {
                (
                    c.type_.clone(),
                    c.status.clone(),
                    c.reason.clone(),
                    c.observed_generation,
                )
            })
            .collect();
        (
            conditions,
            status.observed_generation,
            status.desired_replicas,
            status.replicas,
            status.ready_replicas,
            status.selector.clone(),
            status.endpoint.clone(),
            status.reason.clone(),
            status.loading.as_ref().map(|loading| loading.phase.clone()),
        )
    };
    let ready_words = |status: &InferenceServiceStatus| {
        let ready = conditions::find(&status.conditions, types::READY);
        ready.map(|condition| condition.message.clone())
    };
    let percent = |status: &InferenceServiceStatus| status.loading.as_ref().and_then(|l| l.percent);
    if heads(old) != heads(new) {
        Urgency::Now
    } else if old.dials != new.dials
        || percent(old) != percent(new)
        || ready_words(old) != ready_words(new)
        || load_moved(old, new)
    {
        Urgency::Soon
    } else if old != new {
        Urgency::Calm
    } else {
        Urgency::Same
    }
}

/// Whether the number of requests in the fleet is another by more than a quarter: whoever watches a
/// ramp wants to see it, and a steady load stays quiet.
fn load_moved(old: &InferenceServiceStatus, new: &InferenceServiceStatus) -> bool {
    let requests = |status: &InferenceServiceStatus| {
        let load = status.load.as_ref();
        load.map_or(0, |load| load.running.saturating_add(load.waiting))
    };
    let (before, now) = (requests(old), requests(new));
    before.abs_diff(now) > before.max(now).unsigned_abs() / 4 + 1
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
