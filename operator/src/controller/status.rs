//! Step 6: the status, computed from what was applied and seen. Pure.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use stoker_api::conditions::{self, Finding, Status, reasons, types};
use stoker_api::{
    DialsStatus, InferenceService, InferenceServiceStatus, LawStatus, LoadStatus, LoadingStatus,
    ScalingMode,
};
use stoker_autoscaler::{Load, ReasonCode};

use super::Context;
use super::diagnosis::{PodState, diagnose, no_node_reason};
use super::read::{Claim, Observed};
use super::validate::Problem;
use crate::resources;
use crate::scaling::{self, Fleet, Key, Outlook};

/// All that the status is made of.
pub struct Facts<'a> {
    pub service: &'a InferenceService,
    pub problem: Option<Problem>,
    pub claim: Claim,
    pub fleet: Fleet,
    /// Why the ReplicaSet can't create pods.
    pub replica_failure: Option<String>,
    pub pods: Vec<PodState>,
    pub desired: u32,
    pub outlook: Outlook,
}

impl<'a> Facts<'a> {
    pub fn new(
        service: &'a InferenceService,
        observed: &Observed,
        context: &Context,
        desired: u32,
    ) -> Self {
        let outlook = Key::of(service).map(|key| context.board.outlook(&key));
        let outlook = outlook.unwrap_or_default();
        let name = service.name_any();
        let now = Timestamp::now();
        let replicas = observed.pods.iter();
        let replicas =
            replicas.filter(|p| scaling::is_replica(p, &name) && !scaling::is_finished(p));
        let of = |pod: &k8s_openapi::api::core::v1::Pod| {
            let uid = pod.uid().unwrap_or_default();
            diagnose(pod, outlook.pods.get(&uid), now)
        };
        let facts = Facts {
            service,
            problem: None,
            claim: observed.claim.clone(),
            fleet: Fleet::default(),
            replica_failure: None,
            pods: replicas.map(|pod| of(pod)).collect(),
            desired,
            outlook,
        };
        match &observed.deployment {
            Some(deployment) => facts.applied(deployment),
            None => facts,
        }
    }

    pub fn applied(mut self, deployment: &Deployment) -> Self {
        self.fleet = Fleet::of(deployment);
        let status = deployment.status.as_ref();
        let conditions = status.and_then(|status| status.conditions.as_ref());
        let failure = conditions
            .into_iter()
            .flatten()
            .find(|c| c.type_ == "ReplicaFailure" && c.status == "True");
        self.replica_failure = failure.and_then(|c| c.message.clone());
        self
    }

    pub fn with(mut self, problem: Problem) -> Self {
        self.problem = Some(problem);
        self
    }

    fn answering(&self) -> u32 {
        count(self.pods.iter().filter(|p| **p == PodState::Answering))
    }

    fn accelerator(&self) -> Option<&str> {
        let accelerator = self.service.spec.resources.accelerator.as_ref();
        accelerator.map(|accelerator| accelerator.resource.as_str())
    }

    /// What most needs doing about replicas that don't answer.
    fn trouble(&self) -> Option<(&'static str, String)> {
        let volume = match &self.claim {
            Claim::Missing(name) => Some(format!(
                "PersistentVolumeClaim {name} of model.source does not exist in this namespace: create it"
            )),
            Claim::Lost(name) => Some(format!(
                "PersistentVolumeClaim {name} of model.source has lost its volume"
            )),
            Claim::NotNeeded | Claim::Usable => None,
        };
        if let Some(message) = volume {
            return Some((reasons::VOLUME_NOT_READY, message));
        }
        let worst = self.pods.iter().max();
        match &self.replica_failure {
            Some(failure) if !matches!(worst, Some(PodState::Stuck { .. })) => {
                Some((reasons::ROLLOUT_STALLED, failure.clone()))
            }
            _ => worst?.trouble(self.accelerator()),
        }
    }

    fn stuck(&self) -> Option<(&'static str, String)> {
        let (reason, message) = self.trouble()?;
        let waiting = [
            reasons::STARTING,
            reasons::MODEL_LOADING,
            reasons::WAITING_FOR_ACCELERATOR,
            reasons::UNSCHEDULABLE,
        ];
        (!waiting.contains(&reason)).then_some((reason, message))
    }
}

/// `1 replica`, `2 replicas`.
fn counted(n: u32, noun: &str) -> String {
    match n {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

/// Conditions without dates, and the status without conditions.
pub fn assess(facts: &Facts<'_>) -> (Vec<Finding>, InferenceServiceStatus) {
    let mut findings = vec![
        ready(facts),
        available(facts),
        progressing(facts),
        model_loaded(facts),
        scheduled(facts),
    ];
    findings.extend(scaling_active(facts));
    findings.extend(objectives_met(facts));
    let status = summary(facts, &findings);
    (findings, status)
}

fn ready(facts: &Facts<'_>) -> Finding {
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

fn available(facts: &Facts<'_>) -> Finding {
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

fn progressing(facts: &Facts<'_>) -> Finding {
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

fn model_loaded(facts: &Facts<'_>) -> Finding {
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
fn furthest(facts: &Facts<'_>) -> Option<(i32, Option<i32>, String)> {
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

fn scheduled(facts: &Facts<'_>) -> Finding {
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
fn scaling_active(facts: &Facts<'_>) -> Option<Finding> {
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

fn word(facts: &Facts<'_>, code: ReasonCode) -> &'static str {
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

fn objectives_met(facts: &Facts<'_>) -> Option<Finding> {
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

fn summary(facts: &Facts<'_>, findings: &[Finding]) -> InferenceServiceStatus {
    let name = facts.service.name_any();
    let namespace = facts.service.namespace().unwrap_or_default();
    let old = facts.service.status.as_ref();
    let present = facts.pods.iter().filter(|p| **p != PodState::Leaving);
    InferenceServiceStatus {
        observed_generation: facts.service.metadata.generation,
        conditions: Vec::new(),
        desired_replicas: Some(int(facts.desired)),
        replicas: Some(int(count(present))),
        ready_replicas: Some(int(facts.answering())),
        selector: Some(resources::selector_text(&name)),
        endpoint: Some(resources::endpoint(&name, &namespace)),
        dials: match facts.outlook.dials {
            Some(dials) => Some(DialsStatus {
                max_num_seqs: int(dials.max_num_seqs),
                max_num_batched_tokens: int(dials.max_num_batched_tokens),
            }),
            // Here and below: not known yet, so a restarted operator keeps what was known.
            None => old.and_then(|status| status.dials),
        },
        loading: loading(facts),
        load: match facts.outlook.reason {
            Some(_) => facts.outlook.load.map(load_status),
            None => old.and_then(|status| status.load.clone()),
        },
        law: match facts.outlook.reason {
            Some(_) => facts.outlook.law.map(law_status),
            None => old.and_then(|status| status.law.clone()),
        },
        reason: headline(facts, findings).or_else(|| old.and_then(|o| o.reason.clone())),
    }
}

/// The one word of the REASON column: what a person should look at first.
fn headline(facts: &Facts<'_>, findings: &[Finding]) -> Option<String> {
    let failing = |type_: &str| {
        let bad = |f: &&Finding| {
            f.type_ == type_ && f.status == Status::False && f.reason != reasons::ROLLOUT_COMPLETE
        };
        findings.iter().find(bad).map(|finding| finding.reason)
    };
    let pressing = failing(types::READY)
        .or_else(|| failing(types::SCHEDULED))
        .or_else(|| failing(types::PROGRESSING));
    let scaling = || match facts.service.spec.scaling.mode {
        ScalingMode::Manual => Some(reasons::MANUAL_MODE),
        ScalingMode::Recommend => Some(reasons::RECOMMEND_MODE),
        ScalingMode::Auto => facts
            .outlook
            .reason
            .as_ref()
            .map(|reason| word(facts, reason.code)),
    };
    pressing.or_else(scaling).map(str::to_owned)
}

fn loading(facts: &Facts<'_>) -> Option<LoadingStatus> {
    let phase = |phase: &str, percent, eta_seconds| {
        Some(LoadingStatus {
            phase: phase.to_owned(),
            percent,
            eta_seconds,
        })
    };
    if facts.answering() > 0 {
        return phase("Ready", Some(100), None);
    }
    if let Some((percent, eta, _)) = furthest(facts) {
        return phase("Loading", Some(percent), eta);
    }
    let pods = facts.pods.iter().any(|p| *p != PodState::Leaving);
    if pods {
        phase("Pending", None, None)
    } else {
        None
    }
}

fn load_status(load: Load) -> LoadStatus {
    let ms = |seconds: Option<f64>| seconds.map(|s| round(s * 1e3));
    LoadStatus {
        requests_per_second: round(load.requests_per_second),
        tokens_per_second: round(load.tokens_per_second),
        // Down, so that 98.9 doesn't read as a goal of 99 that was met.
        good_percent: load.good_percent.map(|percent| floor(percent).min(100)),
        ttft_p95_ms: ms(load.ttft_p95_seconds),
        itl_p95_ms: ms(load.itl_p95_seconds),
        running: int(load.running),
        waiting: int(load.waiting),
    }
}

fn law_status((law, confidence): (stoker_law::Law, f64)) -> LawStatus {
    let percent = |ratio: f64| round(ratio * 100.0).min(100);
    LawStatus {
        base_microseconds: round(law.base * 1e6),
        per_kv_token_nanoseconds: round(law.per_kv_token * 1e9),
        per_token_nanoseconds: round(law.per_token * 1e9),
        per_sequence_microseconds: round(law.per_sequence * 1e6),
        hidden_percent: percent(law.hidden),
        confidence_percent: percent(confidence),
    }
}

/// Never negative; what isn't a number is 0: the CRD takes nothing else.
fn round(value: f64) -> i32 {
    value.round().max(0.0) as i32
}

fn floor(value: f64) -> i32 {
    value.floor().max(0.0) as i32
}

fn int(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
