//! The conditions of the status, each from what was applied and seen. Pure.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use stoker_api::ScalingMode;
use stoker_api::conditions::{self, Finding, Status, reasons, types};
use stoker_autoscaler::{Load, ReasonCode};

use super::{Facts, PodState, count, counted, floor, round};
use crate::controller::diagnosis::no_node_reason;
use crate::scaling;

pub(super) fn ready(facts: &Facts<'_>) -> Finding {
    let (lower, _) = scaling::bounds(facts.service);
    let answering = facts.answering();
    let no = |reason, message| Finding::new(types::READY, Status::False, reason, message);
    if let Some(problem) = &facts.problem {
        return no(problem.reason, problem.message.clone());
    }
    if facts.desired == 0 && lower == 0 {
        let sleeps = facts.service.spec.scaling.mode == ScalingMode::Auto;
        let (reason, message) = (reasons::SCALED_TO_ZERO, scaled_to_zero(facts).to_owned());
        return Finding::new(types::READY, sleeps, reason, message);
    }
    let lower = lower.max(1);
    if answering >= needed(facts, lower) {
        let message = format!("{answering} of {} ready", counted(facts.desired, "replica"));
        return Finding::new(types::READY, Status::True, reasons::REPLICAS_READY, message);
    }
    let (reason, message) = facts.trouble().unwrap_or_else(|| {
        let message = "pods are being created".to_owned();
        (reasons::STARTING, message)
    });
    match answering {
        0 => no(reason, message),
        _ => no(
            reason,
            format!("{answering} of {lower} needed replicas ready: {message}"),
        ),
    }
}

/// Replicas without which the service isn't ready. One that is ready stays so while as many are away
/// as a rollout may take away: a change of the template must page nobody.
fn needed(facts: &Facts<'_>, lower: u32) -> u32 {
    let conditions = facts.service.status.as_ref().map(|s| &s.conditions[..]);
    let was_ready = conditions.is_some_and(|c| conditions::is_true(c, types::READY));
    match was_ready && progressing(facts).status == Status::True {
        true => lower.saturating_sub(max_unavailable(facts)).max(1),
        false => lower,
    }
}

/// As the Deployment controller counts it: percentages round down, but where no pod may be surplus
/// one must be allowed to be missing.
fn max_unavailable(facts: &Facts<'_>) -> u32 {
    let rollout = &facts.service.spec.rollout;
    let no_surge = match &rollout.max_surge {
        IntOrString::Int(count) => *count == 0,
        IntOrString::String(text) => text == "0%",
    };
    let count = match &rollout.max_unavailable {
        IntOrString::Int(count) => u32::try_from(*count).unwrap_or(0),
        IntOrString::String(text) => {
            let percent = text.trim_end_matches('%').parse::<u32>().unwrap_or(0);
            facts.desired.saturating_mul(percent) / 100
        }
    };
    count.max(u32::from(no_surge))
}

pub(super) fn available(facts: &Facts<'_>) -> Finding {
    let answering = facts.answering();
    let finding = |status, reason, message| Finding::new(types::AVAILABLE, status, reason, message);
    match answering {
        0 if facts.desired == 0 && scaling::bounds(facts.service).0 == 0 => {
            let message = scaled_to_zero(facts).to_owned();
            finding(Status::False, reasons::SCALED_TO_ZERO, message)
        }
        0 => {
            let message = "no replica answers requests".to_owned();
            finding(Status::False, reasons::NO_READY_REPLICA, message)
        }
        n => {
            let message = format!("{n} of {} answering", counted(facts.desired, "replica"));
            finding(Status::True, reasons::REPLICAS_READY, message)
        }
    }
}

fn scaled_to_zero(facts: &Facts<'_>) -> &'static str {
    match facts.service.spec.scaling.mode {
        ScalingMode::Auto => "asleep at 0 replicas: the next request starts one and waits for it",
        ScalingMode::Recommend | ScalingMode::Manual => {
            "replicas is 0 and scaling.mode is not Auto: raise replicas to serve requests"
        }
    }
}

pub(super) fn progressing(facts: &Facts<'_>) -> Finding {
    let finding =
        |status, reason, message| Finding::new(types::PROGRESSING, status, reason, message);
    if let Some(problem) = &facts.problem {
        return finding(Status::False, problem.reason, problem.message.clone());
    }
    let Facts { fleet, desired, .. } = facts;
    let leaving = count(facts.pods.iter().filter(|p| **p == PodState::Leaving));
    if fleet.settled() && fleet.wanted == *desired && fleet.ready == *desired && leaving == 0 {
        let message = format!("{} on the current template", counted(*desired, "replica"));
        return finding(Status::False, reasons::ROLLOUT_COMPLETE, message);
    }
    let mut message = format!(
        "{} of {} on the current template, {} ready",
        fleet.updated.min(*desired),
        counted(*desired, "replica"),
        fleet.ready
    );
    if leaving > 0 {
        message.push_str(&format!(", {leaving} finishing requests before going"));
    }
    if let Some((reason, trouble)) = facts.stuck() {
        return finding(Status::False, reason, format!("{message}; {trouble}"));
    }
    finding(Status::True, reasons::ROLLOUT_IN_PROGRESS, message)
}

pub(super) fn model_loaded(facts: &Facts<'_>) -> Finding {
    let finding =
        |status, reason, message| Finding::new(types::MODEL_LOADED, status, reason, message);
    let answering = facts.answering();
    if answering > 0 {
        let message = format!("loaded by {}", counted(answering, "replica"));
        return finding(Status::True, reasons::MODEL_LOADED, message);
    }
    if let Some((_, _, message)) = furthest(facts) {
        return finding(Status::False, reasons::MODEL_LOADING, message);
    }
    match facts.pods.iter().max() {
        Some(PodState::Stuck { reason, message })
            if [
                reasons::CRASH_LOOP,
                reasons::DEVICE_UNUSABLE,
                reasons::OUT_OF_MEMORY,
            ]
            .contains(reason) =>
        {
            finding(Status::False, reasons::MODEL_LOAD_FAILED, message.clone())
        }
        None | Some(PodState::Leaving) => {
            let message = "there are no pods".to_owned();
            finding(Status::Unknown, reasons::NO_PODS, message)
        }
        Some(_) => {
            let message = "no replica has begun to load the model".to_owned();
            finding(Status::False, reasons::STARTING, message)
        }
    }
}

/// The loading replica that is furthest.
pub(super) fn furthest(facts: &Facts<'_>) -> Option<(i32, Option<i32>, String)> {
    let loading = facts.pods.iter().filter_map(|pod| match pod {
        PodState::Loading {
            percent,
            eta_seconds,
            message,
        } => Some((*percent, *eta_seconds, message.clone())),
        _ => None,
    });
    loading.max_by_key(|(percent, ..)| *percent)
}

pub(super) fn scheduled(facts: &Facts<'_>) -> Finding {
    let finding = |status, reason, message| Finding::new(types::SCHEDULED, status, reason, message);
    let here = facts.pods.iter().filter(|p| **p != PodState::Leaving);
    let total = count(here.clone());
    let waiting: Vec<&str> = here
        .filter_map(|pod| match pod {
            PodState::NoNode { words } => Some(words.as_str()),
            _ => None,
        })
        .collect();
    match waiting.first() {
        None if total == 0 => {
            let message = "there are no pods".to_owned();
            finding(Status::Unknown, reasons::NO_PODS, message)
        }
        None => {
            let message = format!("{} on nodes", counted(total, "pod"));
            finding(Status::True, reasons::PODS_SCHEDULED, message)
        }
        Some(words) => {
            let reason = no_node_reason(words, facts.accelerator());
            let mut message = format!(
                "{} of {} without a node: {words}",
                waiting.len(),
                counted(total, "pod")
            );
            match facts.answering() {
                0 => {}
                n => message.push_str(&format!(
                    " Meanwhile the dials of {} carry the load.",
                    counted(n, "ready replica")
                )),
            }
            finding(Status::False, reason, message)
        }
    }
}

/// `None` before the loop knows anything: then the condition stays as it was.
pub(super) fn scaling_active(facts: &Facts<'_>) -> Option<Finding> {
    let reason = facts.outlook.reason.as_ref()?;
    if facts.service.spec.scaling.mode == ScalingMode::Recommend {
        let message = format!(
            "scaling.mode is Recommend: nothing is changed. {}",
            reason.message
        );
        let recommend = reasons::RECOMMEND_MODE;
        return Some(Finding::new(
            types::SCALING_ACTIVE,
            false,
            recommend,
            message,
        ));
    }
    if facts.service.spec.scaling.mode == ScalingMode::Manual {
        let message = "scaling.mode is Manual: replicas stay as spec.replicas says, only the dials \
                       follow the load";
        let manual = reasons::MANUAL_MODE;
        return Some(Finding::new(types::SCALING_ACTIVE, false, manual, message));
    }
    Some(Finding::new(
        types::SCALING_ACTIVE,
        reason.code != ReasonCode::NoData,
        word(facts, reason.code),
        reason.message.clone(),
    ))
}

pub(super) fn word(facts: &Facts<'_>, code: ReasonCode) -> &'static str {
    // The policy knows that pods have no node; the scheduler's words say what they lack.
    let lacks_other = || {
        facts.pods.iter().any(|pod| match pod {
            PodState::NoNode { words } => {
                no_node_reason(words, facts.accelerator()) == reasons::UNSCHEDULABLE
            }
            _ => false,
        })
    };
    match code {
        ReasonCode::WaitingForAccelerator if lacks_other() => reasons::UNSCHEDULABLE,
        ReasonCode::Steady => reasons::STEADY,
        ReasonCode::NoData => reasons::NO_DATA,
        ReasonCode::ScaleUp => reasons::SCALE_UP,
        ReasonCode::ScaleDown => reasons::SCALE_DOWN,
        ReasonCode::Stabilizing => reasons::STABILIZING,
        ReasonCode::AtMaxReplicas => reasons::AT_MAX_REPLICAS,
        ReasonCode::WaitingForAccelerator => reasons::WAITING_FOR_ACCELERATOR,
        ReasonCode::DialsMoved => reasons::DIALS_MOVED,
        ReasonCode::ScaledToZero => reasons::SCALED_TO_ZERO,
    }
}

pub(super) fn objectives_met(facts: &Facts<'_>) -> Option<Finding> {
    facts.outlook.reason.as_ref()?;
    let goal = facts.service.spec.objectives.good_percent;
    let finding = |status, reason, message| {
        Some(Finding::new(types::OBJECTIVES_MET, status, reason, message))
    };
    let share = |load: Load| {
        let good = load.good_percent.map_or(0, floor);
        let seconds =
            |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{} ms", round(s * 1e3)));
        format!(
            "{good} % of requests met all objectives, {goal} % should; time to first token p95 {}, \
             inter-token latency p95 {}",
            seconds(load.ttft_p95_seconds),
            seconds(load.itl_p95_seconds)
        )
    };
    let message = facts
        .outlook
        .load
        .filter(|l| l.good_percent.is_some())
        .map(share);
    let message = message.unwrap_or_default();
    match facts.outlook.objectives_met {
        Some(true) => finding(Status::True, reasons::OBJECTIVES_MET, message),
        Some(false) => finding(Status::False, reasons::OBJECTIVES_MISSED, message),
        None => {
            let message = "no request finished lately".to_owned();
            finding(Status::Unknown, reasons::NO_TRAFFIC, message)
        }
    }
}
