//! The routers: which there are, what they are told, and what they report.
//!
//! Every 250 ms the table of all services is made anew from the watches' caches; when it changed,
//! each router gets it on its control port. A router's stream of reports tells how many requests
//! wait there, which `decide()` reads as demand, and wakes a service that sleeps at zero replicas.

mod keyring;
mod link;
mod reports;
mod table;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt;
use kube::runtime::reflector::Store;
use stoker_autoscaler::Queue;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};

pub use keyring::{Keyring, read as read_keys};
pub use link::Caller;
pub use table::Table;

use crate::scaling::{Board, Key, is_ready};
use crate::stores::Stores;
use reports::Reports;

const TICK: Duration = Duration::from_millis(250);
/// After a start, keys that have not been read yet hold the first table back for at most so long.
const KEYS_DUE: Duration = Duration::from_secs(15);

/// What the rest of the operator knows of the routers.
pub struct Routing {
    /// The routers' pods.
    pods: Store<Pod>,
    pub keyring: Keyring,
    reports: Reports,
}

impl Routing {
    pub fn new(pods: Store<Pod>) -> Self {
        Routing {
            pods,
            keyring: Keyring::default(),
            reports: Reports::default(),
        }
    }

    /// Where clients' connections should go: the routers that are ready.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let pods = self.pods.state();
        let mut ready: Vec<IpAddr> = pods
            .iter()
            .filter(|pod| is_ready(pod))
            .filter_map(|pod| address(pod))
            .collect();
        ready.sort_unstable();
        ready
    }

    /// What waits for a service in all routers together; `None` while one of them doesn't tell.
    pub fn queue(&self, key: &Key) -> Option<Queue> {
        let pods = self.pods.state();
        let ready = pods.iter().filter(|pod| is_ready(pod));
        self.reports.queue(key, ready.filter_map(|pod| pod.uid()))
    }
}

/// Keeps all routers informed. Runs until it is dropped.
pub async fn run(
    routing: Arc<Routing>,
    stores: Stores,
    addresses: Vec<Store<Service>>,
    board: Arc<Board>,
    caller: Arc<Caller>,
) {
    // A table of half of what there is would send requests away.
    stores.listed().await;
    for store in &addresses {
        let _ = store.wait_until_ready().await;
    }
    let begun = Instant::now();
    let (table, told) = watch::channel(None);
    let mut links: HashMap<String, JoinHandle<()>> = HashMap::new();
    let mut at: Vec<IpAddr> = Vec::new();
    let mut ticker = tokio::time::interval(TICK);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticker.tick().await;
        let routers: BTreeMap<String, IpAddr> = running(&routing.pods);
        links.retain(|uid, link| {
            let stays = routers.contains_key(uid);
            if !stays {
                link.abort();
                routing.reports.forget(uid);
            }
            stays
        });
        for (uid, address) in &routers {
            links.entry(uid.clone()).or_insert_with(|| {
                info!(router = uid, %address, "router found");
                let link = link::Link {
                    uid: uid.clone(),
                    address: *address,
                    caller: Arc::clone(&caller),
                    routing: Arc::clone(&routing),
                    board: Arc::clone(&board),
                };
                tokio::spawn(link.keep(told.clone()))
            });
        }

        // Services lead to the routers that are ready: tell their reconcilers when that changes.
        let ready = routing.addresses();
        if ready != at && !ready.is_empty() {
            for service in stores.services() {
                Key::of(&*service)
                    .into_iter()
                    .for_each(|key| board.wake(key));
            }
            at = ready;
        }

        metrics::gauge!("stoker_operator_routers").set(routers.len() as f64);
        let late = begun.elapsed() >= KEYS_DUE;
        let services = table::services(&stores, &addresses, &routing.keyring, &board, late);
        let Some(services) = services else {
            continue;
        };
        // Each grants this part of what a key may ask for a minute.
        let routers = u32::try_from(routers.len().max(1)).unwrap_or(u32::MAX);
        table.send_if_modified(|table: &mut Option<Arc<Table>>| {
            let next = Table::after(table.as_deref(), routers, services);
            let changed = next.is_some();
            if let Some(next) = next {
                *table = Some(Arc::new(next));
            }
            changed
        });
    }
}

/// By uid: routers that may be told something, ready or not. One becomes ready by having a table.
fn running(pods: &Store<Pod>) -> BTreeMap<String, IpAddr> {
    let pods = pods.state();
    pods.iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .filter(|pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"))
        .filter_map(|pod| Some((pod.uid()?, address(pod)?)))
        .collect()
}

fn address(pod: &Pod) -> Option<IpAddr> {
    let ip = pod.status.as_ref()?.pod_ip.as_deref()?;
    match ip.parse() {
        Ok(ip) => Some(ip),
        Err(_) => {
            warn!(ip, "a pod has an address that is none");
            None
        }
    }
}
