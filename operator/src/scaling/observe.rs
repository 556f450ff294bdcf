//! Pods and readings as the policy's observation.

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use stoker_api::{InferenceServiceSpec, ItlStatistic, ScalingMode, names};
use stoker_autoscaler::{DialRange, ItlOf, Limits, Objectives, Phase};

/// Whether the kubelet says that the pod takes requests.
pub fn is_ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && is_true(pod, "Ready")
}

/// Whether the server's container runs: one that doesn't has nobody to ask.
pub fn is_running(pod: &Pod) -> bool {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_ref());
    statuses.into_iter().flatten().any(|status| {
        let state = status.state.as_ref();
        status.name == names::SERVER_CONTAINER && state.is_some_and(|s| s.running.is_some())
    })
}

/// Whether the pod has ended for good, as an evicted one has: its ReplicaSet has replaced it.
pub fn is_finished(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// Whether the pod is one of the service's own: made by the ReplicaSet of its Deployment. Anyone who
/// may create pods can give one our label.
pub fn is_replica(pod: &Pod, service: &str) -> bool {
    let Some(hash) = pod.labels().get("pod-template-hash") else {
        return false;
    };
    let replica_set = format!("{service}-{hash}");
    let owners = pod.owner_references();
    owners
        .iter()
        .any(|o| o.controller == Some(true) && o.kind == "ReplicaSet" && o.name == replica_set)
}

/// `was_ready`: the pod has been ready before, since its container last started.
pub fn phase(pod: &Pod, was_ready: bool) -> Phase {
    if pod.metadata.deletion_timestamp.is_some() {
        Phase::Draining
    } else if is_true(pod, "Ready") {
        Phase::Ready
    } else if condition(pod, "PodScheduled")
        .is_some_and(|c| c.status == "False" && c.reason.as_deref() == Some("Unschedulable"))
    {
        Phase::Unschedulable
    } else if was_ready {
        Phase::Draining
    } else {
        Phase::Starting
    }
}

pub fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Seconds since the pod was created, and since it became ready (0 while it isn't).
pub fn ages(pod: &Pod, now: f64) -> (f64, f64) {
    let since = |time: Option<&Time>| {
        time.map_or(0.0, |t| (now - t.0.as_duration().as_secs_f64()).max(0.0))
    };
    let ready = condition(pod, "Ready").filter(|_| is_ready(pod));
    (
        since(pod.metadata.creation_timestamp.as_ref()),
        since(ready.and_then(|c| c.last_transition_time.as_ref())),
    )
}

fn is_true(pod: &Pod, type_: &str) -> bool {
    condition(pod, type_).is_some_and(|condition| condition.status == "True")
}

pub fn objectives(spec: &InferenceServiceSpec) -> Objectives {
    let ttft = &spec.objectives.time_to_first_token;
    let itl = &spec.objectives.inter_token_latency;
    Objectives {
        good_percent: f64::from(spec.objectives.good_percent),
        ttft_seconds: f64::from(ttft.milliseconds) / 1e3,
        ttft_free_prompt_tokens: f64::from(ttft.free_prompt_tokens),
        ttft_seconds_per_prompt_token: ttft.milliseconds_per_prompt_token / 1e3,
        itl_seconds: f64::from(itl.milliseconds) / 1e3,
        itl_of: match itl.of {
            ItlStatistic::Mean => ItlOf::Mean,
            ItlStatistic::P95 => ItlOf::P95,
        },
    }
}

/// `bounds` are those of the Deployment; what is only recommended goes by the limits of mode Auto.
pub fn limits(spec: &InferenceServiceSpec, bounds: (u32, u32)) -> Limits {
    let count = |n: i32| u32::try_from(n).unwrap_or(0);
    let (lower, upper) = match spec.scaling.mode {
        ScalingMode::Recommend => {
            let lower = count(spec.scaling.min_replicas);
            (lower, count(spec.scaling.max_replicas).max(lower))
        }
        ScalingMode::Auto | ScalingMode::Manual => bounds,
    };
    let range = |min, max, initial| DialRange {
        min: count(min),
        max: count(max),
        initial: count(initial),
    };
    let (cap, budget) = (spec.engine.max_num_seqs, spec.engine.max_num_batched_tokens);
    Limits {
        min_replicas: lower,
        max_replicas: upper,
        idle_seconds: f64::from(spec.scaling.idle_seconds),
        max_num_seqs: range(cap.min, cap.max, cap.initial),
        max_num_batched_tokens: range(budget.min, budget.max, budget.initial),
        scale_down_stabilization_seconds: f64::from(spec.scaling.scale_down_stabilization_seconds),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(conditions: Value, metadata: Value) -> Pod {
        serde_json::from_value(json!({"metadata": metadata, "status": {"conditions": conditions}}))
            .unwrap()
    }

    #[test]
    fn phases() {
        let ready = json!([{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:01:00Z"}]);
        let not_ready = json!([{"type": "Ready", "status": "False"}]);
        let nowhere =
            json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]);
        let created = json!({"creationTimestamp": "2026-01-01T00:00:00Z"});
        let leaving = json!({"deletionTimestamp": "2026-01-01T00:02:00Z"});
        assert_eq!(
            phase(&pod(ready.clone(), created.clone()), false),
            Phase::Ready
        );
        assert_eq!(phase(&pod(ready.clone(), leaving), true), Phase::Draining);
        assert_eq!(
            phase(&pod(not_ready.clone(), created.clone()), false),
            Phase::Starting
        );
        assert_eq!(
            phase(&pod(not_ready, created.clone()), true),
            Phase::Draining
        );
        assert_eq!(
            phase(&pod(nowhere, created.clone()), false),
            Phase::Unschedulable
        );
        let (age, ready_for) = ages(&pod(ready, created), 1_767_225_690.0);
        assert_eq!((age, ready_for), (90.0, 30.0));
    }

    #[test]
    fn only_pods_of_our_replica_sets_are_replicas() {
        let owned = |set: &str| {
            pod(
                json!([]),
                json!({"labels": {"pod-template-hash": "5f"}, "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": set, "uid": "u", "controller": true}]}),
            )
        };
        assert!(is_replica(&owned("chat-5f"), "chat"));
        assert!(!is_replica(&owned("other-5f"), "chat"));
        assert!(!is_replica(
            &pod(json!([]), json!({"labels": {"pod-template-hash": "5f"}})),
            "chat"
        ));
    }
}
