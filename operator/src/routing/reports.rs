//! What routers said last about the requests that wait there.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use stoker_autoscaler::Queue;
use tokio::time::Instant;

use crate::scaling::Key;

/// A report that is older than this says nothing any more; one comes each second.
const FRESH: Duration = Duration::from_secs(5);

/// A line of `GET /control/v1/watch`.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Line {
    Queues { services: Vec<ServiceQueue> },
    Wake { namespace: String, name: String },
}

#[derive(Debug, Deserialize)]
pub struct ServiceQueue {
    namespace: String,
    name: String,
    queue_length: u32,
    oldest_age_seconds: f64,
    queued_prompt_tokens: u64,
    outstanding_requests: u32,
    idle_seconds: f64,
}

#[derive(Default)]
pub struct Reports(Mutex<HashMap<String, Report>>);

struct Report {
    at: Instant,
    services: HashMap<Key, Queue>,
}

impl Reports {
    pub fn keep(&self, router: &str, services: Vec<ServiceQueue>) {
        let services = services.into_iter().map(|service| {
            let queue = Queue {
                requests: service.queue_length,
                prompt_tokens: service.queued_prompt_tokens,
                oldest_age_seconds: service.oldest_age_seconds,
                outstanding_requests: service.outstanding_requests,
                idle_seconds: service.idle_seconds,
            };
            let (namespace, name) = (service.namespace, service.name);
            (Key { namespace, name }, queue)
        });
        let report = Report {
            at: Instant::now(),
            services: services.collect(),
        };
        self.lock().insert(router.to_owned(), report);
    }

    /// A request waits there, whatever the last report said.
    pub fn woken(&self, router: &str, key: &Key) {
        if let Some(report) = self.lock().get_mut(router) {
            let queue = report.services.entry(key.clone()).or_default();
            queue.requests = queue.requests.max(1);
            queue.idle_seconds = 0.0;
        }
    }

    pub fn forget(&self, router: &str) {
        self.lock().remove(router);
    }

    /// The sum over these routers; `None` without any, or when one has no fresh report of it.
    pub fn queue(&self, key: &Key, routers: impl Iterator<Item = String>) -> Option<Queue> {
        let reports = self.lock();
        let mut sum: Option<Queue> = None;
        for router in routers {
            let report = reports.get(&router).filter(|r| r.at.elapsed() < FRESH)?;
            let one = report.services.get(key)?;
            sum = Some(match sum {
                None => *one,
                Some(sum) => Queue {
                    requests: sum.requests.saturating_add(one.requests),
                    prompt_tokens: sum.prompt_tokens.saturating_add(one.prompt_tokens),
                    oldest_age_seconds: sum.oldest_age_seconds.max(one.oldest_age_seconds),
                    outstanding_requests: sum
                        .outstanding_requests
                        .saturating_add(one.outstanding_requests),
                    idle_seconds: sum.idle_seconds.min(one.idle_seconds),
                },
            });
        }
        sum
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Report>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key {
            namespace: "ns".to_owned(),
            name: "chat".to_owned(),
        }
    }

    fn report(reports: &Reports, router: &str, queue_length: u32, idle: f64) {
        let line = format!(
            r#"{{"event": "queues", "version": 3, "services": [{{"namespace": "ns", "name": "chat",
                "queue_length": {queue_length}, "oldest_age_seconds": 2.5, "queued_prompt_tokens": 70,
                "queued_tokens": 99, "outstanding_requests": 4, "outstanding_tokens": -1,
                "idle_seconds": {idle}, "usable": true, "replicas": []}}]}}"#
        );
        let Line::Queues { services } = serde_json::from_str(&line).unwrap() else {
            panic!("not a report");
        };
        reports.keep(router, services);
    }

    #[tokio::test(start_paused = true)]
    async fn routers_add_up_and_must_all_speak() {
        let reports = Reports::default();
        let both = || ["a".to_owned(), "b".to_owned()].into_iter();
        report(&reports, "a", 3, 0.5);
        assert_eq!(reports.queue(&key(), both()), None, "b is silent");
        report(&reports, "b", 2, 9.0);
        let sum = reports.queue(&key(), both()).unwrap();
        assert_eq!((sum.requests, sum.prompt_tokens), (5, 140));
        assert_eq!((sum.outstanding_requests, sum.idle_seconds), (8, 0.5));
        assert_eq!(reports.queue(&key(), std::iter::empty()), None);
        tokio::time::advance(FRESH).await;
        assert_eq!(reports.queue(&key(), both()), None, "old");
    }

    #[tokio::test]
    async fn a_wake_counts_before_the_next_report() {
        let line = r#"{"event": "wake", "namespace": "ns", "name": "chat"}"#;
        assert!(matches!(serde_json::from_str(line), Ok(Line::Wake { .. })));
        let reports = Reports::default();
        report(&reports, "a", 0, 700.0);
        reports.woken("a", &key());
        let queue = reports.queue(&key(), ["a".to_owned()].into_iter()).unwrap();
        assert_eq!((queue.requests, queue.idle_seconds), (1, 0.0));
    }
}
