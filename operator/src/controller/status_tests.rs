use serde_json::{Value, json};
use stoker_api::conditions;
use stoker_autoscaler::{Dials, Reason, ReasonCode};
use stoker_law::Law;

use super::*;

fn service(spec: Value) -> InferenceService {
    let mut full = json!({"engine": {"device": "cuda"}, "model": {"source": "pvc://models/m.gguf"},
        "resources": {"accelerator": {"resource": "nvidia.com/gpu", "count": 1}}});
    for (key, value) in spec.as_object().unwrap() {
        full[key] = value.clone();
    }
    serde_json::from_value(json!({
        "metadata": {"name": "chat", "namespace": "ns", "uid": "u", "generation": 3}, "spec": full,
    }))
    .unwrap()
}

fn facts(service: &InferenceService, pods: Vec<PodState>) -> Facts<'_> {
    let desired = u32::try_from(pods.len()).unwrap();
    let ready = count(pods.iter().filter(|p| **p == PodState::Answering));
    Facts {
        service,
        problem: None,
        claim: Claim::Usable,
        fleet: Fleet {
            observed: true,
            wanted: desired,
            created: desired,
            updated: desired,
            ready,
        },
        replica_failure: None,
        pods,
        desired,
        outlook: Outlook::default(),
    }
}

fn no_gpu() -> PodState {
    PodState::NoNode {
        words: "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.".to_owned(),
    }
}

fn crashed() -> PodState {
    PodState::Stuck {
        reason: reasons::CRASH_LOOP,
        message: "pod chat-1 ended with exit code 1: no such file".to_owned(),
    }
}

/// Status and reason of a condition.
fn of(facts: &Facts<'_>, type_: &str) -> (&'static str, &'static str) {
    let (findings, _) = assess(facts);
    let finding = findings.iter().find(|f| f.type_ == type_).unwrap();
    (finding.status.as_str(), finding.reason)
}

fn message(facts: &Facts<'_>, type_: &str) -> String {
    let (findings, _) = assess(facts);
    findings
        .iter()
        .find(|f| f.type_ == type_)
        .unwrap()
        .message
        .clone()
}

#[test]
fn ready_needs_an_answer() {
    let service = service(json!({}));
    let well = facts(&service, vec![PodState::Answering]);
    assert_eq!(of(&well, "Ready"), ("True", "ReplicasReady"));
    assert_eq!(of(&well, "Available"), ("True", "ReplicasReady"));
    assert_eq!(of(&well, "Progressing"), ("False", "RolloutComplete"));
    assert_eq!(of(&well, "ModelLoaded"), ("True", "ModelLoaded"));

    let silent = PodState::Silent {
        message: "pod chat-1 does not answer".to_owned(),
    };
    for pods in [
        vec![],
        vec![silent],
        vec![crashed()],
        vec![no_gpu()],
        vec![PodState::Leaving],
    ] {
        let ill = facts(&service, pods);
        assert_eq!(of(&ill, "Ready").0, "False", "{:?}", ill.pods);
        assert_eq!(of(&ill, "Available"), ("False", "NoReadyReplica"));
        let (_, status) = assess(&ill);
        assert_eq!(status.ready_replicas, Some(0));
    }
}

#[test]
fn the_minimum_must_be_ready() {
    let service = service(json!({"scaling": {"minReplicas": 2, "maxReplicas": 4}}));
    let short = facts(&service, vec![PodState::Answering, no_gpu()]);
    assert_eq!(of(&short, "Ready"), ("False", "WaitingForAccelerator"));
    assert_eq!(of(&short, "Available"), ("True", "ReplicasReady"));
    assert!(message(&short, "Ready").starts_with("1 of 2 needed replicas ready: 0/1 nodes"));
}

#[test]
fn a_rollout_may_take_one_away_from_a_service_that_was_ready() {
    let mut service = service(json!({"scaling": {"mode": "Manual"}, "replicas": 3}));
    let starting = || PodState::Starting {
        message: "pod chat-3 runs and is not ready yet".to_owned(),
    };
    let pods = || vec![PodState::Answering, PodState::Answering, starting()];
    assert_eq!(of(&facts(&service, pods()), "Ready"), ("False", "Starting"));

    let ready = Finding::new(types::READY, true, reasons::REPLICAS_READY, "");
    let mut status = InferenceServiceStatus::default();
    let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH);
    conditions::set_condition(&mut status.conditions, &ready, None, &now);
    service.status = Some(status);
    assert_eq!(of(&facts(&service, pods()), "Ready").0, "True");
    let two_away = vec![PodState::Answering, starting(), starting()];
    assert_eq!(of(&facts(&service, two_away), "Ready").0, "False");
    let crashing = vec![PodState::Answering, PodState::Answering, crashed()];
    assert_eq!(
        of(&facts(&service, crashing), "Ready"),
        ("False", "CrashLoop")
    );
}

#[test]
fn a_full_cluster_says_that_the_dials_carry_on() {
    let service = service(json!({}));
    let full = facts(&service, vec![PodState::Answering, no_gpu(), no_gpu()]);
    assert_eq!(of(&full, "Ready"), ("True", "ReplicasReady"));
    assert_eq!(of(&full, "Scheduled"), ("False", "WaitingForAccelerator"));
    let words = message(&full, "Scheduled");
    assert!(words.contains("2 of 3 pods without a node"), "{words}");
    assert!(words.contains("Insufficient nvidia.com/gpu"), "{words}");
    assert!(
        words.contains("dials of 1 ready replica carry the load"),
        "{words}"
    );
    assert_eq!(of(&full, "Progressing"), ("True", "RolloutInProgress"));
    assert_eq!(
        assess(&full).1.reason.as_deref(),
        Some("WaitingForAccelerator")
    );
}

#[test]
fn the_worst_trouble_is_named() {
    let service = service(json!({}));
    let crash = facts(&service, vec![crashed(), no_gpu()]);
    assert_eq!(of(&crash, "Ready"), ("False", "CrashLoop"));
    assert!(message(&crash, "Ready").contains("no such file"));
    assert_eq!(of(&crash, "ModelLoaded"), ("False", "ModelLoadFailed"));
    assert_eq!(of(&crash, "Progressing"), ("False", "CrashLoop"));

    let mut no_claim = facts(&service, vec![no_gpu()]);
    no_claim.claim = Claim::Missing("models".to_owned());
    assert_eq!(of(&no_claim, "Ready"), ("False", "VolumeNotReady"));
    assert!(message(&no_claim, "Ready").contains("PersistentVolumeClaim models"));

    let mut elsewhere = facts(
        &service,
        vec![PodState::NoNode {
            words: "0/1 nodes are available: 1 node(s) didn't match".to_owned(),
        }],
    );
    elsewhere.outlook.reason = Some(Reason {
        code: ReasonCode::WaitingForAccelerator,
        message: String::new(),
    });
    assert_eq!(of(&elsewhere, "ScalingActive"), ("True", "Unschedulable"));

    let mut quota = facts(&service, vec![]);
    quota.desired = 1;
    quota.replica_failure = Some("pods \"chat-1\" is forbidden: exceeded quota".to_owned());
    assert_eq!(of(&quota, "Progressing"), ("False", "RolloutStalled"));
    assert!(message(&quota, "Ready").contains("exceeded quota"));
}

/// A new template that crashes while the old pods serve: the service is ready, and it says so.
#[test]
fn a_bad_rollout_shows_while_the_old_pods_serve() {
    let service = service(json!({}));
    let mut facts = facts(&service, vec![PodState::Answering, crashed()]);
    facts.fleet.updated = 1;
    assert_eq!(of(&facts, "Ready"), ("True", "ReplicasReady"));
    assert_eq!(of(&facts, "Progressing"), ("False", "CrashLoop"));
    assert_eq!(assess(&facts).1.reason.as_deref(), Some("CrashLoop"));
}

#[test]
fn loading_shows_the_furthest_replica() {
    let service = service(json!({}));
    let loading = |percent| PodState::Loading {
        percent,
        eta_seconds: Some(100 - percent),
        message: format!("pod p has loaded {percent} % of the model"),
    };
    let facts = facts(&service, vec![loading(20), loading(60)]);
    assert_eq!(of(&facts, "ModelLoaded"), ("False", "ModelLoading"));
    let status = assess(&facts).1.loading.unwrap();
    assert_eq!(
        (status.phase.as_str(), status.percent),
        ("Loading", Some(60))
    );
    assert_eq!(status.eta_seconds, Some(40));
}

#[test]
fn manual_mode_and_zero() {
    let manual = json!({"scaling": {"mode": "Manual"}, "replicas": 0});
    let service = service(manual);
    let mut facts = facts(&service, vec![]);
    facts.outlook.reason = Some(Reason {
        code: ReasonCode::NoData,
        message: String::new(),
    });
    assert_eq!(of(&facts, "Ready"), ("False", "ScaledToZero"));
    assert_eq!(of(&facts, "ScalingActive"), ("False", "ManualMode"));
    assert_eq!(of(&facts, "Progressing"), ("False", "RolloutComplete"));
}

#[test]
fn what_is_recommended_is_told_in_the_condition() {
    let service = service(json!({"scaling": {"mode": "Recommend"}, "replicas": 2}));
    let mut facts = facts(&service, vec![PodState::Answering]);
    facts.outlook.reason = Some(Reason {
        code: ReasonCode::ScaleUp,
        message: "Recommended: 3 replicas".to_owned(),
    });
    assert_eq!(of(&facts, "ScalingActive"), ("False", "RecommendMode"));
}

#[test]
fn figures_are_rounded_and_never_flatter() {
    let service = service(json!({}));
    let mut facts = facts(&service, vec![PodState::Answering]);
    facts.outlook = Outlook {
        dials: Some(Dials {
            max_num_seqs: 24,
            max_num_batched_tokens: 640,
        }),
        load: Some(Load {
            requests_per_second: 2.5,
            tokens_per_second: f64::NAN,
            good_percent: Some(98.99),
            ttft_p95_seconds: Some(1.2345),
            itl_p95_seconds: None,
            running: 3,
            waiting: 0,
        }),
        law: Some((
            Law {
                base: 0.0275,
                per_kv_token: 3.6e-7,
                per_token: 2.7e-4,
                per_sequence: 2e-4,
                hidden: 1.0,
            },
            0.876,
        )),
        objectives_met: Some(false),
        reason: Some(Reason {
            code: ReasonCode::AtMaxReplicas,
            message: "4 replicas are the most".to_owned(),
        }),
        ..Outlook::default()
    };
    let (findings, status) = assess(&facts);
    let load = status.load.unwrap();
    assert_eq!((load.requests_per_second, load.tokens_per_second), (3, 0));
    assert_eq!(
        (load.good_percent, load.ttft_p95_ms),
        (Some(98), Some(1235))
    );
    let law = status.law.unwrap();
    assert_eq!(
        (law.base_microseconds, law.per_kv_token_nanoseconds),
        (27_500, 360)
    );
    assert_eq!((law.hidden_percent, law.confidence_percent), (100, 88));
    assert_eq!(status.reason.as_deref(), Some("AtMaxReplicas"));
    let met = findings
        .iter()
        .find(|f| f.type_ == "ObjectivesMet")
        .unwrap();
    assert_eq!(
        (met.status.as_str(), met.reason),
        ("False", "ObjectivesMissed")
    );
    assert!(
        met.message
            .starts_with("98 % of requests met all objectives, 99 % should")
    );
}

/// Before the loop knows anything about load, what the status said stands.
#[test]
fn a_restarted_operator_claims_nothing_at_first() {
    let mut service = service(json!({}));
    let load = LoadStatus {
        running: 40,
        ..LoadStatus::default()
    };
    service.status = Some(InferenceServiceStatus {
        load: Some(load.clone()),
        reason: Some("AtMaxReplicas".to_owned()),
        ..InferenceServiceStatus::default()
    });
    let (findings, status) = assess(&facts(&service, vec![PodState::Answering]));
    let types: Vec<&str> = findings.iter().map(|f| f.type_).collect();
    assert_eq!(
        types,
        [
            "Ready",
            "Available",
            "Progressing",
            "ModelLoaded",
            "Scheduled"
        ]
    );
    assert_eq!(status.load, Some(load));
    assert_eq!(status.reason.as_deref(), Some("AtMaxReplicas"));
}
