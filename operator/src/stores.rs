//! What the watches have seen, for the namespaces that the operator looks after.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::Store;
use kube::runtime::utils::Backoff;
use stoker_api::{InferenceService, names};
use tokio::sync::watch;

use crate::scaling::Key;

/// An object that can't be read costs itself, not the watch.
pub type Guarded = DeserializeGuard<InferenceService>;

/// The caches of one watched namespace, or of all.
#[derive(Clone)]
pub struct Scope {
    /// `None`: all namespaces.
    pub namespace: Option<String>,
    pub services: Store<Guarded>,
    /// Whether all services have been listed. (The store's own wait is for one: its controller.)
    pub listed: watch::Receiver<bool>,
    pub pods: Store<Pod>,
}

#[derive(Clone)]
pub struct Stores(Arc<Vec<Scope>>);

impl Stores {
    pub fn new(scopes: Vec<Scope>) -> Self {
        Stores(Arc::new(scopes))
    }

    /// Until everything has been listed once. Ends early only while the process ends.
    pub async fn listed(&self) {
        for scope in self.0.iter() {
            let _ = scope.listed.clone().wait_for(|listed| *listed).await;
            let _ = scope.pods.wait_until_ready().await;
        }
    }

    /// All objects that can be read.
    pub fn services(&self) -> Vec<Arc<InferenceService>> {
        let scopes = self.0.iter().flat_map(|scope| scope.services.state());
        scopes
            .filter_map(|service| service.0.as_ref().ok().cloned().map(Arc::new))
            .collect()
    }

    /// Pods by the service whose label they carry, in one pass over the caches.
    pub fn pods(&self) -> HashMap<Key, Vec<Arc<Pod>>> {
        let mut pods: HashMap<Key, Vec<Arc<Pod>>> = HashMap::new();
        for pod in self.0.iter().flat_map(|scope| scope.pods.state()) {
            let namespace = pod.metadata.namespace.clone();
            let name = pod.labels().get(names::SERVICE_LABEL).cloned();
            if let (Some(namespace), Some(name)) = (namespace, name) {
                pods.entry(Key { namespace, name }).or_default().push(pod);
            }
        }
        let by_name = |a: &Arc<Pod>, b: &Arc<Pod>| a.metadata.name.cmp(&b.metadata.name);
        pods.values_mut().for_each(|pods| pods.sort_by(by_name));
        pods
    }

    /// Pods that carry one service's label, by name.
    pub fn pods_of(&self, key: &Key) -> Vec<Arc<Pod>> {
        let ours = |pod: &Pod| {
            pod.metadata.namespace.as_ref() == Some(&key.namespace)
                && pod.labels().get(names::SERVICE_LABEL) == Some(&key.name)
        };
        let covers = |scope: &&Scope| match &scope.namespace {
            Some(namespace) => *namespace == key.namespace,
            None => true,
        };
        let scopes = self.0.iter().filter(covers);
        let mut pods: Vec<Arc<Pod>> = scopes.flat_map(|s| s.pods.state_filter(ours)).collect();
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        pods
    }
}

/// When to try a watch again that broke. kube's own default goes up to 30 s; decisions rest on the
/// watches, so here it is 5 s.
#[derive(Clone, Debug, Default)]
pub struct WatchRetry {
    failures: u32,
}

impl Iterator for WatchRetry {
    type Item = Duration;
    fn next(&mut self) -> Option<Duration> {
        let delay = Duration::from_millis(250).saturating_mul(1 << self.failures.min(8));
        self.failures += 1;
        Some(delay.min(Duration::from_secs(5)))
    }
}

impl Backoff for WatchRetry {
    fn reset(&mut self) {
        self.failures = 0;
    }
}
