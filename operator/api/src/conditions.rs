//! Types and reasons of conditions, and the one way to set them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Types of conditions. Each is `True` when things are well, save `Progressing`, which is `True`
/// while a rollout is under way.
pub mod types {
    /// The service answers requests, with the current spec: at least one replica of it is ready.
    pub const READY: &str = "Ready";
    /// As many replicas are ready as a rollout may leave: the wanted number less maxUnavailable.
    pub const AVAILABLE: &str = "Available";
    /// Pods are being created, replaced or removed.
    pub const PROGRESSING: &str = "Progressing";
    /// At least one replica has loaded the model.
    pub const MODEL_LOADED: &str = "ModelLoaded";
    /// All pods have found a node.
    pub const SCHEDULED: &str = "Scheduled";
    /// Replicas and dials follow the load.
    pub const SCALING_ACTIVE: &str = "ScalingActive";
    /// goodPercent of the requests met all objectives.
    pub const OBJECTIVES_MET: &str = "ObjectivesMet";
}

/// Reasons of conditions: CamelCase, a closed set that programs may match on.
pub mod reasons {
    // Ready and Available
    pub const REPLICAS_READY: &str = "ReplicasReady";
    pub const NO_READY_REPLICA: &str = "NoReadyReplica";
    pub const NO_REPLICA_ANSWERS: &str = "NoReplicaAnswers";
    pub const SCALED_TO_ZERO: &str = "ScaledToZero";
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// An hf:// source, and the operator knows no hub.
    pub const HUB_NOT_CONFIGURED: &str = "HubNotConfigured";
    pub const NAME_TAKEN: &str = "NameTaken";
    pub const APPLY_FAILED: &str = "ApplyFailed";
    pub const API_KEYS_UNREADABLE: &str = "ApiKeysUnreadable";

    // What keeps a pod from answering
    pub const IMAGE_PULL_FAILED: &str = "ImagePullFailed";
    pub const CRASH_LOOP: &str = "CrashLoop";
    /// The server can't use the node's GPU or its driver, and says what was found and is needed.
    pub const DEVICE_UNUSABLE: &str = "DeviceUnusable";
    pub const OUT_OF_MEMORY: &str = "OutOfMemory";
    pub const CONTAINER_CONFIG_ERROR: &str = "ContainerConfigError";
    pub const VOLUME_NOT_READY: &str = "VolumeNotReady";
    pub const STARTING: &str = "Starting";

    // Progressing
    pub const ROLLOUT_IN_PROGRESS: &str = "RolloutInProgress";
    pub const ROLLOUT_COMPLETE: &str = "RolloutComplete";
    pub const ROLLOUT_STALLED: &str = "RolloutStalled";

    // ModelLoaded
    pub const MODEL_LOADED: &str = "ModelLoaded";
    pub const MODEL_LOADING: &str = "ModelLoading";
    pub const MODEL_LOAD_FAILED: &str = "ModelLoadFailed";

    // Scheduled
    pub const PODS_SCHEDULED: &str = "PodsScheduled";
    pub const NO_PODS: &str = "NoPods";
    pub const WAITING_FOR_ACCELERATOR: &str = "WaitingForAccelerator";
    pub const UNSCHEDULABLE: &str = "Unschedulable";

    // ScalingActive
    pub const STEADY: &str = "Steady";
    pub const NO_DATA: &str = "NoData";
    pub const SCALE_UP: &str = "ScaleUp";
    pub const SCALE_DOWN: &str = "ScaleDown";
    pub const STABILIZING: &str = "Stabilizing";
    pub const AT_MAX_REPLICAS: &str = "AtMaxReplicas";
    pub const DIALS_MOVED: &str = "DialsMoved";
    pub const MANUAL_MODE: &str = "ManualMode";
    pub const RECOMMEND_MODE: &str = "RecommendMode";

    // ObjectivesMet
    pub const OBJECTIVES_MET: &str = "ObjectivesMet";
    pub const OBJECTIVES_MISSED: &str = "ObjectivesMissed";
    pub const NO_TRAFFIC: &str = "NoTraffic";
}

/// The Kubernetes API allows no longer message.
const MAX_MESSAGE_BYTES: usize = 32_768;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    True,
    False,
    Unknown,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::True => "True",
            Status::False => "False",
            Status::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(value: bool) -> Self {
        if value { Status::True } else { Status::False }
    }
}

/// A finding about one generation of an object, not yet dated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// One of [`types`].
    pub type_: &'static str,
    pub status: Status,
    /// One of [`reasons`].
    pub reason: &'static str,
    /// A sentence for people; may be empty.
    pub message: String,
}

impl Finding {
    pub fn new(
        type_: &'static str,
        status: impl Into<Status>,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Finding {
            type_,
            status: status.into(),
            reason,
            message: message.into(),
        }
    }
}

/// Brings one condition up to date and says whether anything about it changed.
///
/// By the Kubernetes API conventions `lastTransitionTime` moves only when `status` does; a new
/// condition gets `now`. Other conditions, also those of unknown types, are left alone.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    finding: &Finding,
    generation: Option<i64>,
    now: &Time,
) -> bool {
    let mut new = Condition {
        type_: finding.type_.to_owned(),
        status: finding.status.as_str().to_owned(),
        reason: finding.reason.to_owned(),
        message: shorten(&finding.message),
        observed_generation: generation,
        last_transition_time: now.clone(),
    };
    match conditions.iter_mut().find(|c| c.type_ == finding.type_) {
        None => {
            conditions.push(new);
            true
        }
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = old.last_transition_time.clone();
            }
            let changed = *old != new;
            *old = new;
            changed
        }
    }
}

/// The condition of this type, when there is one.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// Whether the condition is there and `True`.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "True")
}

fn shorten(message: &str) -> String {
    if message.len() <= MAX_MESSAGE_BYTES {
        return message.to_owned();
    }
    let mut end = MAX_MESSAGE_BYTES - '…'.len_utf8();
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &message[..end])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Time {
        Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap())
    }

    fn ready(status: impl Into<Status>, message: &str) -> Finding {
        Finding::new(types::READY, status, reasons::REPLICAS_READY, message)
    }

    #[test]
    fn a_new_condition_is_dated_now() {
        let mut conditions = Vec::new();
        assert!(set_condition(
            &mut conditions,
            &ready(true, "2 of 2"),
            Some(3),
            &at(10)
        ));
        let condition = find(&conditions, types::READY).unwrap();
        assert_eq!(condition.last_transition_time, at(10));
        assert_eq!(condition.observed_generation, Some(3));
        assert!(is_true(&conditions, types::READY));
        assert!(!is_true(&conditions, types::AVAILABLE));
    }

    #[test]
    fn the_date_moves_with_the_status_only() {
        let mut conditions = Vec::new();
        set_condition(&mut conditions, &ready(true, "2 of 2"), Some(3), &at(10));
        assert!(!set_condition(
            &mut conditions,
            &ready(true, "2 of 2"),
            Some(3),
            &at(20)
        ));
        assert!(set_condition(
            &mut conditions,
            &ready(true, "1 of 2"),
            Some(4),
            &at(30)
        ));
        assert_eq!(conditions[0].last_transition_time, at(10));
        assert_eq!(conditions[0].message, "1 of 2");
        assert_eq!(conditions[0].observed_generation, Some(4));
        assert!(set_condition(
            &mut conditions,
            &ready(Status::Unknown, ""),
            Some(4),
            &at(40)
        ));
        assert_eq!(conditions[0].last_transition_time, at(40));
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn an_overlong_message_is_cut_between_characters() {
        let mut conditions = Vec::new();
        let message = "é".repeat(MAX_MESSAGE_BYTES);
        set_condition(&mut conditions, &ready(false, &message), None, &at(1));
        assert!(conditions[0].message.len() <= MAX_MESSAGE_BYTES);
        assert!(conditions[0].message.ends_with("é…"));
    }

    proptest! {
        /// Whatever is found in whatever order: one condition a type, dated by its last change of
        /// status, and a second telling of the same changes nothing.
        #[test]
        fn conditions_tell_the_last_finding(
            findings in prop::collection::vec((0..3usize, 0..3usize, "[a-z]{0,3}"), 1..40)
        ) {
            const TYPES: [&str; 3] = [types::READY, types::AVAILABLE, types::SCHEDULED];
            const STATUSES: [Status; 3] = [Status::True, Status::False, Status::Unknown];
            let mut conditions = Vec::new();
            let mut expected = [None::<(Status, i64, String)>, None, None];
            for (second, (type_, status, message)) in (0..).zip(findings) {
                let status = STATUSES[status];
                let finding = Finding::new(TYPES[type_], status, reasons::STEADY, message.as_str());
                let since = match &expected[type_] {
                    Some((before, since, _)) if *before == status => *since,
                    _ => second,
                };
                let before = conditions.clone();
                let changed = set_condition(&mut conditions, &finding, Some(1), &at(second));
                prop_assert_eq!(changed, before != conditions);
                prop_assert!(!set_condition(&mut conditions, &finding, Some(1), &at(second + 100)));
                expected[type_] = Some((status, since, message));
            }
            for (type_, expected) in TYPES.iter().zip(expected) {
                let found = find(&conditions, type_)
                    .map(|c| (c.status.clone(), c.last_transition_time.clone(), c.message.clone()));
                let expected = expected
                    .map(|(status, since, message)| (status.as_str().to_owned(), at(since), message));
                prop_assert_eq!(found, expected);
            }
        }
    }
}
