//! What changed, told once as Kubernetes events.

use kube::Resource;
use kube::runtime::events::{Event, EventType};
use stoker_api::conditions::{self, reasons, types};
use stoker_api::{InferenceService, InferenceServiceStatus};
use tracing::warn;

use super::Context;
use crate::fence::CallError;

/// The API server takes no longer note.
const MAX_NOTE_BYTES: usize = 1024;

/// One event to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub warning: bool,
    pub reason: String,
    pub note: String,
    /// Events of the same reason and action within minutes are one with a count, so an action that
    /// names the outcome keeps different outcomes apart.
    pub action: String,
}

/// What there is to tell about the step from one status to the next.
pub fn changes(
    old: &InferenceServiceStatus,
    new: &InferenceServiceStatus,
    why: Option<String>,
) -> Vec<Told> {
    let mut told = Vec::new();
    if let (Some(before), Some(after)) = (old.desired_replicas, new.desired_replicas)
        && before != after
    {
        let reason = if after > before {
            "ScaledUp"
        } else {
            "ScaledDown"
        };
        let why = why.map_or(String::new(), |why| format!(": {why}"));
        told.push(Told {
            warning: false,
            reason: reason.to_owned(),
            note: format!("replicas {before} -> {after}{why}"),
            action: format!("ScaleTo{after}"),
        });
    }
    for type_ in [
        types::READY,
        types::SCHEDULED,
        types::PROGRESSING,
        types::MODEL_LOADED,
        types::OBJECTIVES_MET,
    ] {
        let Some(after) = conditions::find(&new.conditions, type_) else {
            continue;
        };
        let before = conditions::find(&old.conditions, type_);
        let same = |b: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition| {
            b.status == after.status && b.reason == after.reason
        };
        if before.is_some_and(same) || told.iter().any(|t| t.reason == after.reason) {
            continue;
        }
        let Some(warning) = loudness(type_, &after.status, &after.reason, before.is_some()) else {
            continue;
        };
        told.push(Told {
            warning,
            reason: after.reason.clone(),
            note: after.message.clone(),
            action: format!("Set{type_}{}", after.status),
        });
    }
    told
}

/// Whether a condition's new state is worth an event, and whether it is a warning.
fn loudness(type_: &str, status: &str, reason: &str, known: bool) -> Option<bool> {
    let normal_course = [
        reasons::STARTING,
        reasons::MODEL_LOADING,
        // Told by the condition Ready, with its cause.
        reasons::MODEL_LOAD_FAILED,
        reasons::NO_PODS,
        reasons::ROLLOUT_COMPLETE,
        reasons::ROLLOUT_IN_PROGRESS,
        reasons::NO_TRAFFIC,
        reasons::SCALED_TO_ZERO,
    ];
    if normal_course.contains(&reason) {
        return None;
    }
    match (type_, status) {
        (_, "False") => Some(true),
        (types::READY | types::MODEL_LOADED, "True") => Some(false),
        // Good news only after bad.
        (types::SCHEDULED | types::OBJECTIVES_MET, "True") => known.then_some(false),
        _ => None,
    }
}

/// Events are a courtesy: one that can't be published is logged and forgotten.
pub async fn publish(context: &Context, service: &InferenceService, told: Vec<Told>) {
    let reference = service.object_ref(&());
    for event in told {
        let event = Event {
            type_: match event.warning {
                true => EventType::Warning,
                false => EventType::Normal,
            },
            reason: event.reason,
            note: Some(shorten(event.note)),
            action: event.action,
            secondary: None,
        };
        if let Err(error) = context.recorder.publish(&event, &reference).await {
            let error = CallError::from(error);
            warn!(reason = event.reason, %error, "could not publish an event");
        }
    }
}

fn shorten(mut note: String) -> String {
    if note.len() > MAX_NOTE_BYTES {
        let mut end = MAX_NOTE_BYTES - '…'.len_utf8();
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        note.push('…');
    }
    note
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

    use super::*;

    fn status(desired: i32, conditions: &[(&str, &str, &str)]) -> InferenceServiceStatus {
        let condition = |(type_, status, reason): &(&str, &str, &str)| Condition {
            type_: (*type_).to_owned(),
            status: (*status).to_owned(),
            reason: (*reason).to_owned(),
            message: "why".to_owned(),
            observed_generation: None,
            last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
        };
        InferenceServiceStatus {
            desired_replicas: Some(desired),
            conditions: conditions.iter().map(condition).collect(),
            ..InferenceServiceStatus::default()
        }
    }

    fn reasons_of(old: &InferenceServiceStatus, new: &InferenceServiceStatus) -> Vec<String> {
        changes(old, new, None)
            .into_iter()
            .map(|t| t.reason)
            .collect()
    }

    #[test]
    fn a_start_is_told_by_its_end_only() {
        let nothing = InferenceServiceStatus::default();
        let starting = status(
            1,
            &[
                ("Ready", "False", "Starting"),
                ("Scheduled", "True", "PodsScheduled"),
            ],
        );
        let ready = status(
            1,
            &[
                ("Ready", "True", "ReplicasReady"),
                ("Scheduled", "True", "PodsScheduled"),
            ],
        );
        assert!(reasons_of(&nothing, &starting).is_empty());
        assert_eq!(reasons_of(&starting, &ready), ["ReplicasReady"]);
        assert!(reasons_of(&ready, &ready).is_empty());
    }

    #[test]
    fn trouble_is_told_once_though_several_conditions_show_it() {
        let before = status(1, &[("Ready", "True", "ReplicasReady")]);
        let crash = [
            ("Ready", "False", "CrashLoop"),
            ("Progressing", "False", "CrashLoop"),
        ];
        let after = status(1, &crash);
        let told = changes(&before, &after, None);
        assert_eq!(told.len(), 1);
        assert!(told[0].warning && told[0].reason == "CrashLoop");
    }

    #[test]
    fn scaling_names_the_numbers_and_the_reason() {
        let why = Some("8 requests/s need 3 replicas".to_owned());
        let told = changes(&status(2, &[]), &status(3, &[]), why);
        assert_eq!(
            told[0].note,
            "replicas 2 -> 3: 8 requests/s need 3 replicas"
        );
        assert_eq!(told[0].action, "ScaleTo3");
    }
}
