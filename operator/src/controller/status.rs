//! Step 6: the status, computed from what was applied and seen. Pure.

mod findings;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;
use stoker_api::conditions::{Finding, Status, reasons, types};
use stoker_api::{
    DialsStatus, InferenceService, InferenceServiceStatus, LawStatus, LoadStatus, LoadingStatus,
    ScalingMode,
};
use stoker_autoscaler::Load;

use super::Context;
use super::diagnosis::{PodState, diagnose};
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
        findings::ready(facts),
        findings::available(facts),
        findings::progressing(facts),
        findings::model_loaded(facts),
        findings::scheduled(facts),
    ];
    findings.extend(findings::scaling_active(facts));
    findings.extend(findings::objectives_met(facts));
    let status = summary(facts, &findings);
    (findings, status)
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
            .map(|reason| findings::word(facts, reason.code)),
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
    if let Some((percent, eta, _)) = findings::furthest(facts) {
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
