use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

pub(crate) fn settings() -> Settings {
    Settings {
        server_image: "stoker/server:0.1.0".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        control_public_pem: "-----BEGIN PUBLIC KEY-----\n".to_owned(),
        hub_endpoint: None,
        model_cache_host_path: None,
    }
}

fn owned(spec: Value, replicas: u32) -> Owned {
    owned_with(spec, replicas, &settings())
}

fn owned_with(spec: Value, replicas: u32, settings: &Settings) -> Owned {
    let spec: InferenceServiceSpec = serde_json::from_value(spec).unwrap();
    let blueprint = Blueprint {
        name: "smollm2",
        namespace: "chat",
        uid: "0b1c-uid",
        source: spec.model.parse_source().unwrap(),
        spec: &spec,
        settings,
        replicas,
        routers: None,
    };
    build(&blueprint)
}

fn yaml(owned: &Owned) -> String {
    let documents = [
        serde_saphyr::to_string(&owned.service_account),
        serde_saphyr::to_string(&owned.config_map),
        serde_saphyr::to_string(&owned.service),
        serde_saphyr::to_string(&owned.disruption_budget),
        serde_saphyr::to_string(&owned.deployment),
    ];
    documents.map(Result::unwrap).join("---\n")
}

#[test]
fn a_model_on_a_claim() {
    let owned = owned(
        json!({
            "model": {"source": "pvc://models/smollm2/model.gguf"},
            "engine": {"device": "cpu"},
            "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
        }),
        1,
    );
    insta::assert_snapshot!(yaml(&owned));
}

#[test]
fn everything_a_pod_may_be_given() {
    let owned = owned(
        json!({
            "model": {"source": "file:///models/m.gguf", "servedName": "org/m", "dtype": "int8"},
            "engine": {
                "device": "cuda", "maxModelLen": 8192, "memoryUtilization": 0.85,
                "maxNumSeqs": {"min": 2, "max": 64, "initial": 16},
                "extraArgs": ["--drain-timeout-seconds=30", "--max-waiting=64"],
            },
            "resources": {"accelerator": {"resource": "nvidia.com/gpu", "count": 2}},
            "rollout": {"maxSurge": "25%", "maxUnavailable": 0},
            "pod": {
                "image": "registry.example/server:1", "labels": {"team": "a"}, "annotations": {"note": "b"},
                "imagePullSecrets": [{"name": "pull"}], "env": [{"name": "RUST_LOG", "value": "debug"}],
                "nodeSelector": {"zone": "z"}, "tolerations": [{"key": "spot", "operator": "Exists"}],
                "priorityClassName": "high", "runtimeClassName": "nvidia",
                "volumes": [{"name": "models", "hostPath": {"path": "/srv/models"}}],
                "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": true}],
            },
        }),
        3,
    );
    insta::assert_snapshot!(yaml(&owned));
}

#[test]
fn a_gated_model_of_a_hub_in_the_nodes_cache() {
    let settings = Settings {
        hub_endpoint: Some("https://hub.example".to_owned()),
        model_cache_host_path: Some("/var/cache/stoker".to_owned()),
        ..settings()
    };
    let spec = json!({
        "model": {"source": "hf://org/name@v1", "secretRef": {"name": "hub-token"}},
        "engine": {"device": "cpu"},
    });
    insta::assert_snapshot!(yaml(&owned_with(spec, 1, &settings)));
}

#[test]
fn a_file_of_a_web_server_goes_with_its_pod() {
    let spec = json!({
        "model": {"source": "https://files.example/m.gguf"},
        "engine": {"device": "cpu"},
    });
    let pod = owned(spec, 1)
        .deployment
        .spec
        .unwrap()
        .template
        .spec
        .unwrap();
    let args = pod.containers[0].args.clone().unwrap();
    assert!(args.contains(&"--model=https://files.example/m.gguf".to_owned()));
    assert!(args.contains(&"--model-cache=/var/lib/stoker/cache".to_owned()));
    assert!(!args.iter().any(|arg| arg.starts_with("--hub-endpoint")));
    assert_eq!(pod.init_containers, None);
    let volumes = pod.volumes.unwrap();
    let cache = volumes.iter().find(|v| v.name == "stoker-cache").unwrap();
    assert!(cache.empty_dir.is_some() && cache.host_path.is_none());
}

/// A list that is applied must not name a variable twice.
#[test]
fn a_persons_own_hub_and_token_come_first() {
    let settings = Settings {
        hub_endpoint: Some("https://hub.example".to_owned()),
        ..settings()
    };
    let spec = json!({
        "model": {"source": "hf://org/name", "secretRef": {"name": "hub-token", "key": "t"}},
        "engine": {"device": "cpu"},
        "pod": {"env": [{"name": "HF_ENDPOINT", "value": "https://mirror.example"},
            {"name": "HF_TOKEN", "value": "x"}]},
    });
    let pod = owned_with(spec, 1, &settings)
        .deployment
        .spec
        .unwrap()
        .template
        .spec
        .unwrap();
    let server = &pod.containers[0];
    assert!(
        !server
            .args
            .iter()
            .flatten()
            .any(|arg| arg.starts_with("--hub-endpoint"))
    );
    let names: Vec<&str> = server
        .env
        .iter()
        .flatten()
        .map(|e| e.name.as_str())
        .collect();
    assert_eq!(names, ["POD_UID", "HF_ENDPOINT", "HF_TOKEN"]);
}

#[test]
fn the_simulated_device_reads_no_model() {
    let owned = owned(
        json!({"engine": {"device": "simulated", "simulatedProfile": "t4"}}),
        2,
    );
    let pod = owned.deployment.spec.unwrap().template.spec.unwrap();
    let args = pod.containers[0].args.clone().unwrap();
    assert!(args.contains(&"--device=simulated".to_owned()));
    assert!(args.contains(&"--simulated-profile=t4".to_owned()));
    assert!(!args.iter().any(|arg| arg.starts_with("--model=")));
    assert_eq!(pod.volumes.unwrap().len(), 1);
}

#[test]
fn behind_the_router_a_service_selects_nothing() {
    let spec: InferenceServiceSpec =
        serde_json::from_value(json!({"engine": {"device": "simulated"}})).unwrap();
    let blueprint = Blueprint {
        name: "smollm2",
        namespace: "chat",
        uid: "0b1c-uid",
        source: None,
        spec: &spec,
        settings: &settings(),
        replicas: 1,
        routers: Some(vec![
            "198.18.0.4".parse().unwrap(),
            "fd00::1".parse().unwrap(),
        ]),
    };
    let owned = build(&blueprint);
    assert_eq!(owned.service.spec.unwrap().selector, None);
    let slice = owned.endpoint_slice.unwrap();
    assert_eq!(slice.metadata.name.as_deref(), Some("smollm2-router"));
    assert_eq!(
        slice.metadata.labels.unwrap()["kubernetes.io/service-name"],
        "smollm2"
    );
    assert_eq!(slice.address_type, "IPv4");
    assert_eq!(slice.endpoints.len(), 1);
    assert_eq!(slice.endpoints[0].addresses, ["198.18.0.4"]);
    assert_eq!(slice.ports.unwrap()[0].port, Some(8000));
}

fn any_spec() -> impl Strategy<Value = Value> {
    let text = "[a-z]{1,8}";
    (
        proptest::collection::btree_map(text, text, 0..5),
        proptest::collection::vec(("[A-Z]{1,6}", text), 0..5),
        proptest::option::of(1_i32..9),
        1_i32..64,
        any::<bool>(),
    )
        .prop_map(|(labels, env, gpus, seqs, claim)| {
            let env: Vec<Value> = env.iter().map(|(n, v)| json!({"name": n, "value": v})).collect();
            let source = if claim { "pvc://claim/m.gguf" } else { "file:///m.gguf" };
            json!({
                "model": {"source": source},
                "engine": {"device": "cpu", "maxNumSeqs": {"initial": seqs}},
                "resources": gpus.map_or(json!({}), |count| json!({"accelerator": {"count": count}})),
                "pod": {"labels": labels, "annotations": labels, "env": env},
            })
        })
}

proptest! {
    /// Idempotence begins here: what is applied twice must be the same bytes.
    #[test]
    fn the_same_input_gives_the_same_bytes(spec in any_spec(), replicas in 0_u32..1000) {
        prop_assert_eq!(yaml(&owned(spec.clone(), replicas)), yaml(&owned(spec, replicas)));
    }

    /// Scaling must never roll the fleet.
    #[test]
    fn replicas_are_no_part_of_the_template(spec in any_spec(), a in 0_u32..9, b in 0_u32..9) {
        let template = |replicas| owned(spec.clone(), replicas).deployment.spec.unwrap().template;
        prop_assert_eq!(template(a), template(b));
    }

    /// Selectors are immutable and must find the pods, whatever labels the pods get.
    #[test]
    fn every_selector_finds_the_pods(spec in any_spec()) {
        let owned = owned(spec, 1);
        let deployment = owned.deployment.spec.unwrap();
        let labels = deployment.template.metadata.unwrap().labels.unwrap();
        let service = owned.service.spec.unwrap().selector.unwrap();
        let budget = owned.disruption_budget.spec.unwrap().selector.unwrap().match_labels.unwrap();
        for selector in [deployment.selector.match_labels.unwrap(), service, budget] {
            prop_assert!(selector.iter().all(|(k, v)| labels.get(k) == Some(v)));
        }
    }
}
