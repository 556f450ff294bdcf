//! A worker against a replica that is an HTTP server in this process.

use std::sync::Mutex;

use axum::extract::State;
use axum::{Json, Router, routing::get, routing::patch};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::*;
use crate::actuate::{ControlKey, Signer};
use crate::lease::Leadership;
use crate::testing::{mock_client, recorder};

const METRICS: &str = include_str!("../../tests/data/scaling_metrics.txt");

/// A replica whose dials follow what is pushed.
#[derive(Default)]
struct StandIn {
    dials: Option<(u64, u64)>,
    pushes: Vec<Value>,
    loading: Option<f64>,
}

type Shared = Arc<Mutex<StandIn>>;

async fn metrics_of(State(stand_in): State<Shared>) -> String {
    let stand_in = stand_in.lock().unwrap();
    if let Some(progress) = stand_in.loading {
        return format!(
            "stoker:loading_progress_ratio {progress}\nstoker:loading_eta_seconds 30\n"
        );
    }
    let (cap, budget) = stand_in.dials.unwrap_or((8, 512));
    METRICS
        .replace(
            "stoker:max_num_seqs{model_name=\"smollm2\",engine=\"0\"} 8",
            &format!("stoker:max_num_seqs{{engine=\"0\"}} {cap}"),
        )
        .replace(
            "stoker:max_num_batched_tokens{model_name=\"smollm2\",engine=\"0\"} 512",
            &format!("stoker:max_num_batched_tokens{{engine=\"0\"}} {budget}"),
        )
}

async fn take(State(stand_in): State<Shared>, Json(body): Json<Value>) {
    let mut stand_in = stand_in.lock().unwrap();
    stand_in.dials = body["max_num_seqs"]
        .as_u64()
        .zip(body["max_num_batched_tokens"].as_u64());
    stand_in.pushes.push(body);
}

async fn replica() -> (Shared, Tools) {
    let stand_in = Shared::default();
    let router = Router::new()
        .route("/metrics", get(metrics_of))
        .route("/control/v1/limits", patch(take))
        .with_state(Arc::clone(&stand_in));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let key = ControlKey::generate().unwrap();
    let signer = Signer::new(&key, Leadership::held(1)).unwrap();
    let tools = Tools {
        fetcher: Fetcher::new(port).unwrap(),
        pusher: Pusher::new(port, signer).unwrap(),
        deletion_cost: DeletionCost::new(mock_client().0),
        keeper: Keeper::new(mock_client().0, recorder(mock_client().0)),
        routing: None,
    };
    (stand_in, tools)
}

fn service(initial: (u32, u32), status: Value) -> InferenceService {
    serde_json::from_value(json!({
        "metadata": {"name": "chat", "namespace": "ns", "uid": "u"},
        "spec": {"engine": {"device": "cpu",
            "maxNumSeqs": {"min": 1, "max": 512, "initial": initial.0},
            "maxNumBatchedTokens": {"min": 64, "max": 16384, "initial": initial.1}}},
        "status": status,
    }))
    .unwrap()
}

fn pod(ready: bool, restarts: i32) -> Arc<Pod> {
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": "chat-5f-x", "uid": "pod-1", "labels": {"pod-template-hash": "5f"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "chat-5f",
                    "uid": "r", "controller": true}]},
            "status": {"podIP": "127.0.0.1",
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
                "containerStatuses": [{"name": "server", "image": "i", "imageID": "", "ready": ready,
                    "restartCount": restarts, "state": {"running": {}}}]},
        }))
        .unwrap(),
    )
}

fn fleet() -> Fleet {
    Fleet {
        observed: true,
        wanted: 1,
        created: 1,
        updated: 1,
        ready: 1,
    }
}

#[tokio::test]
async fn a_replica_is_told_once_and_again_after_a_restart() {
    let (stand_in, tools) = replica().await;
    let service = service((16, 1024), json!({}));
    let mut worker = Worker::default();
    for _ in 0..3 {
        worker
            .tick(&service, vec![pod(true, 0)], 1, fleet(), &tools)
            .await;
    }
    {
        let mut stand_in = stand_in.lock().unwrap();
        assert_eq!(stand_in.pushes.len(), 1, "{:?}", stand_in.pushes);
        assert_eq!(stand_in.pushes[0]["objectives"]["ttft_ms"], 2000.0);
        // The container starts anew: dials and objectives are those of its command line.
        stand_in.dials = None;
    }
    worker
        .tick(&service, vec![pod(true, 1)], 1, fleet(), &tools)
        .await;
    assert_eq!(stand_in.lock().unwrap().pushes.len(), 2);
}

#[tokio::test]
async fn dials_never_exceed_what_the_replica_accepts() {
    let (stand_in, tools) = replica().await;
    // The replica's ceilings are 256 and 8192.
    let service = service((400, 16_000), json!({}));
    let mut worker = Worker::default();
    for _ in 0..2 {
        worker
            .tick(&service, vec![pod(true, 0)], 1, fleet(), &tools)
            .await;
    }
    let stand_in = stand_in.lock().unwrap();
    assert!(
        stand_in.pushes.len() <= 1,
        "a cut dial is no difference: {:?}",
        stand_in.pushes
    );
    let (cap, budget) = stand_in.dials.unwrap();
    assert!(cap <= 256 && budget <= 8192, "{cap} {budget}");
}

#[tokio::test]
async fn a_restarted_operator_keeps_the_dials_of_the_status() {
    let (stand_in, tools) = replica().await;
    stand_in.lock().unwrap().dials = Some((20, 700));
    let status = json!({"desiredReplicas": 1, "dials": {"maxNumSeqs": 20, "maxNumBatchedTokens": 700},
        "conditions": [{"type": "ObjectivesMet", "status": "True", "reason": "ObjectivesMet",
            "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    let service = service((8, 512), status);
    let mut worker = Worker::default();
    let (_, outlook) = worker
        .tick(&service, vec![pod(true, 0)], 1, fleet(), &tools)
        .await;
    let stand_in = stand_in.lock().unwrap();
    assert_eq!(stand_in.dials, Some((20, 700)));
    assert_eq!(outlook.dials.map(|d| d.max_num_seqs), Some(20));
    assert_eq!(outlook.objectives_met, Some(true));
}

#[tokio::test]
async fn a_loading_replica_tells_how_far_it_is_and_gets_no_dials() {
    let (stand_in, tools) = replica().await;
    stand_in.lock().unwrap().loading = Some(0.42);
    let service = service((16, 1024), json!({}));
    let mut worker = Worker::default();
    let (next, outlook) = worker
        .tick(&service, vec![pod(false, 0)], 1, fleet(), &tools)
        .await;
    assert_eq!(next, 1);
    let pod = &outlook.pods["pod-1"];
    assert_eq!(
        (pod.loading_percent, pod.loading_eta_seconds),
        (Some(42), Some(30))
    );
    assert!(stand_in.lock().unwrap().pushes.is_empty());
}

#[tokio::test]
async fn what_is_only_recommended_moves_neither_dials_nor_replicas() {
    let (stand_in, tools) = replica().await;
    let mut service = service((16, 1024), json!({}));
    service.spec.scaling.mode = ScalingMode::Recommend;
    // In mode Auto two would be asked for at once, with the initial dials.
    service.spec.scaling.min_replicas = 2;
    let mut worker = Worker::default();
    for _ in 0..3 {
        let (next, outlook) = worker
            .tick(&service, vec![pod(true, 0)], 1, fleet(), &tools)
            .await;
        assert_eq!(next, 1);
        assert_eq!(outlook.dials.map(|d| d.max_num_seqs), Some(8));
    }
    {
        // The objectives are told, or nothing could be counted.
        let stand_in = stand_in.lock().unwrap();
        assert_eq!(stand_in.dials, Some((8, 512)), "{:?}", stand_in.pushes);
        assert_eq!(stand_in.pushes.len(), 1, "{:?}", stand_in.pushes);
    }
    service.spec.replicas = 3;
    let tick = worker.tick(&service, vec![pod(true, 0)], 1, fleet(), &tools);
    assert_eq!(tick.await.0, 3);
}

#[tokio::test]
async fn lost_samples_change_nothing() {
    let key = ControlKey::generate().unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let tools = Tools {
        fetcher: Fetcher::new(nobody.port()).unwrap(),
        pusher: Pusher::new(
            nobody.port(),
            Signer::new(&key, Leadership::held(1)).unwrap(),
        )
        .unwrap(),
        deletion_cost: DeletionCost::new(mock_client().0),
        keeper: Keeper::new(mock_client().0, recorder(mock_client().0)),
        routing: None,
    };
    let service = service((8, 512), json!({"desiredReplicas": 3}));
    let mut worker = Worker::default();
    let three = Fleet {
        wanted: 3,
        created: 3,
        updated: 3,
        ready: 3,
        observed: true,
    };
    for _ in 0..3 {
        let (next, _) = worker
            .tick(&service, vec![pod(true, 0)], 3, three, &tools)
            .await;
        assert_eq!(next, 3);
    }
}

/// Seconds of CPU that this thread has used.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    // After the name in parentheses: state is the first field, utime and stime the 12th and 13th, in
    // hundredths of a second.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let ticks = |place: usize| fields[place].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

/// `cargo test --release --workspace --bin stoker-operator a_thousand -- --nocapture` prints it;
/// machines that run tests are shared, so nothing is asserted of time.
#[tokio::test]
async fn a_round_of_a_thousand_services_of_five_replicas() {
    const SERVICES: usize = 1000;
    let (_, tools) = replica().await;
    let service = service((16, 1024), json!({}));
    let five = Fleet {
        wanted: 5,
        created: 5,
        updated: 5,
        ready: 5,
        observed: true,
    };
    let mut fleet: Vec<(Worker, Vec<Arc<Pod>>)> = (0..SERVICES)
        .map(|n| {
            let pods = (0..5).map(|i| {
                let mut pod = (*pod(true, 0)).clone();
                pod.metadata.uid = Some(format!("pod-{n}-{i}"));
                Arc::new(pod)
            });
            (Worker::default(), pods.collect())
        })
        .collect();
    // The first rounds push dials and open connections.
    let mut rounds = Vec::new();
    for _ in 0..5 {
        let start = cpu_seconds();
        for (worker, pods) in &mut fleet {
            let tick = worker.tick(&service, pods.clone(), 5, five, &tools);
            let (next, _) = tick.await;
            assert!(next <= 5);
        }
        rounds.push(cpu_seconds() - start);
    }
    println!(
        "scraping, reading and deciding for {SERVICES} services of 5 replicas: {:.2} s of one core a \
         round, with the 5,000 answers of the replicas (every 2 s there is one)",
        rounds[4]
    );
}
