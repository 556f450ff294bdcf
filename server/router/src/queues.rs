//! What the operator reads as demand: the queues, now and each second.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;

use crate::clock;
use crate::registry::Router;
use crate::replica::Replica;

/// One report of all services.
#[derive(Clone, Debug, Serialize)]
pub struct Queues {
    /// "queues"; a wake has "wake".
    pub event: &'static str,
    /// Of the table in force.
    pub version: Option<u64>,
    pub services: Vec<ServiceQueue>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ServiceQueue {
    pub namespace: String,
    pub name: String,
    pub queue_length: usize,
    /// Of the request that has waited longest.
    pub oldest_age_seconds: f64,
    /// Prompt tokens (estimated) of the waiting requests.
    pub queued_prompt_tokens: u64,
    /// Prompt and answer tokens (estimated) of the waiting requests.
    pub queued_tokens: u64,
    /// Requests at replicas.
    pub outstanding_requests: u64,
    /// Tokens still to do of those, estimated.
    pub outstanding_tokens: i64,
    /// Arrived since this router knows the service, whatever became of them.
    pub requests_total: u64,
    /// Arrived since the last report of the same stream.
    pub requests_per_second: f64,
    /// Since the last request came.
    pub idle_seconds: f64,
    /// Some replica in the rotation is healthy.
    pub usable: bool,
    pub replicas: Vec<ReplicaLoad>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ReplicaLoad {
    pub id: String,
    pub outstanding_requests: u32,
    pub outstanding_tokens: i64,
    pub ejected: bool,
    pub weight: f64,
}

/// A service without a replica has its first request.
#[derive(Clone, Debug, Serialize)]
pub struct Wake {
    pub event: &'static str,
    pub namespace: String,
    pub name: String,
}

impl Wake {
    #[must_use]
    pub fn new(key: &str) -> Self {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        Self {
            event: "wake",
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

/// Makes reports, and remembers the one before for the rates.
#[derive(Debug, Default)]
pub struct Reporter {
    before: HashMap<Arc<str>, u64>,
    at: f64,
}

impl Reporter {
    #[must_use]
    pub fn report(&mut self, router: &Router) -> Queues {
        let now = clock::now();
        let seconds = now - std::mem::replace(&mut self.at, now);
        let mut after = HashMap::new();
        let routes = router.routes();
        let mut services = Vec::with_capacity(routes.services.len());
        for service in &routes.services {
            let load = service.load();
            let before = self.before.get(&service.key).copied();
            let fresh = load.arrivals - before.unwrap_or(load.arrivals).min(load.arrivals);
            after.insert(Arc::clone(&service.key), load.arrivals);
            let (namespace, name) = service.key.split_once('/').unwrap_or(("", &service.key));
            let in_flight = |replica: &Arc<Replica>| u64::from(replica.in_flight());
            services.push(ServiceQueue {
                namespace: namespace.into(),
                name: name.into(),
                queue_length: load.queue_length,
                oldest_age_seconds: load.oldest_age_seconds,
                queued_prompt_tokens: load.queued_prompt_tokens,
                queued_tokens: load.queued_tokens,
                outstanding_requests: load.replicas.iter().map(in_flight).sum(),
                outstanding_tokens: load.replicas.iter().map(|r| r.tokens()).sum(),
                requests_total: load.arrivals,
                requests_per_second: fresh as f64 / seconds.max(0.001),
                idle_seconds: load.idle_seconds,
                usable: load.usable,
                replicas: load
                    .replicas
                    .iter()
                    .map(|replica| ReplicaLoad {
                        id: replica.id.clone(),
                        outstanding_requests: replica.in_flight(),
                        outstanding_tokens: replica.tokens(),
                        ejected: replica.is_ejected(),
                        weight: replica.weight(),
                    })
                    .collect(),
            });
        }
        self.before = after;
        Queues {
            event: "queues",
            version: routes.version.map(|version| version.version),
            services,
        }
    }
}
