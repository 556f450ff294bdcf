//! The scaling loop: every 2 s, for each service, scrape -> observe -> decide -> push -> publish.
//!
//! Services are independent: one that is slow or broken never holds up another's tick.

mod board;
mod fleet;
mod keep;
mod observe;
mod pods;
mod settle;
mod step;
mod worker;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use stoker_api::InferenceService;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tracing::Instrument;

pub use board::{Board, Key, Outlook, PodOutlook, bounds};
pub use fleet::Fleet;
pub use keep::Keeper;
pub use observe::{condition, is_finished, is_ready, is_replica, is_running, objectives};
pub use worker::Tools;

use crate::stores::Stores;
use worker::Worker;

const TICK: Duration = Duration::from_secs(2);
/// Services whose ticks may run at the same time.
const CONCURRENCY: usize = 32;

/// Runs until cancelled by being dropped.
pub async fn run(stores: Stores, board: Arc<Board>, tools: Arc<Tools>) {
    let mut workers: HashMap<String, (Key, Arc<Mutex<Worker>>)> = HashMap::new();
    let permits = Arc::new(Semaphore::new(CONCURRENCY));
    let mut ticks = JoinSet::new();
    let mut ticker = tokio::time::interval(TICK);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticker.tick().await;
        while ticks.try_join_next().is_some() {}
        let services = stores.services();
        metrics::gauge!("stoker_operator_services").set(services.len() as f64);
        let alive: HashSet<String> = services.iter().filter_map(|s| s.uid()).collect();
        workers.retain(|uid, (key, _)| alive.contains(uid) || board.forget(key, uid));
        let mut pods = stores.pods();
        for service in services {
            let (Some(uid), Some(key)) = (service.uid(), Key::of(&*service)) else {
                continue;
            };
            if service.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let (_, worker) = workers
                .entry(uid)
                .or_insert_with(|| (key.clone(), Arc::default()));
            // Its last tick still runs: this one is left out.
            let Ok(mut worker) = Arc::clone(worker).try_lock_owned() else {
                continue;
            };
            let (board, tools) = (Arc::clone(&board), Arc::clone(&tools));
            let permits = Arc::clone(&permits);
            let pods = pods.remove(&key).unwrap_or_default();
            let span = tracing::info_span!("scale", namespace = key.namespace, name = key.name);
            let tick = async move {
                let permit = permits.acquire().await;
                tick(&mut worker, &service, &key, pods, &board, &tools).await;
                // A slow API server holds up this service's next tick, and no other's.
                drop(permit);
                worker.keep(&service, &tools.keeper).await;
            };
            ticks.spawn(tick.instrument(span));
        }
    }
}

async fn tick(
    worker: &mut Worker,
    service: &InferenceService,
    key: &Key,
    pods: Vec<Arc<k8s_openapi::api::core::v1::Pod>>,
    board: &Board,
    tools: &Tools,
) {
    let uid = service.uid().unwrap_or_default();
    // Until the first reconcile has said how many replicas there are, there is nothing to decide.
    let Some((desired, fleet)) = board.current(key, &uid) else {
        return;
    };
    if !worker.recall(service, desired, &tools.keeper).await {
        return;
    }
    let (next, outlook) = worker.tick(service, pods, desired, fleet, tools).await;
    board.publish(key, &uid, desired, next, outlook);
}
