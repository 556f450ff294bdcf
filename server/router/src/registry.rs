//! All services of a router, and how a request finds its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::broadcast;

use crate::choose::Policy;
use crate::config::Config;
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::monitor;
use crate::record::AccessLog;
use crate::service::{Service, Settings};
use crate::table::{ServiceEntry, Table, TableError};

/// From so many routers on, one sees too little of the load to trust the order of all replicas
/// (examples/routing-policies.rs measures it).
const MANY_ROUTERS: u32 = 4;
/// Wakes that a slow watcher may fall behind.
const WAKES: usize = 256;

/// Shared by all connections.
#[derive(Debug)]
pub struct Router {
    pub config: Config,
    pub metrics: Arc<Metrics>,
    pub log: AccessLog,
    /// Services that got a request while no replica could answer.
    pub wakes: broadcast::Sender<Arc<str>>,
    routes: RwLock<Arc<Routes>>,
    applying: Mutex<()>,
    held_bytes: Arc<AtomicUsize>,
    draining: AtomicBool,
}

/// One state of the table.
#[derive(Debug, Default)]
pub struct Routes {
    /// None until a table came.
    pub version: Option<Version>,
    pub services: Vec<Arc<Service>>,
    by_host: HashMap<String, Arc<Service>>,
    by_model: HashMap<String, Vec<Arc<Service>>>,
}

/// Tables are ordered by the leader's epoch, then by their own version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub epoch: u64,
    pub version: u64,
}

#[derive(Debug, Error)]
pub enum ApplyError {
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(
        "table version {} (epoch {}) is older than version {} (epoch {}), which is in force; \
         send a newer one", new.version, new.epoch, current.version, current.epoch
    )]
    Old { new: Version, current: Version },
}

/// Which services a request may mean.
#[derive(Debug)]
pub enum Found {
    One(Arc<Service>),
    Several(Vec<Arc<Service>>),
    None,
}

/// Counts a request's body while the router holds it.
#[derive(Debug)]
pub struct HeldBytes {
    all: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Relaxed);
    }
}

impl Router {
    #[must_use]
    pub fn new(config: Config, metrics: Metrics, log: AccessLog) -> Arc<Self> {
        Arc::new(Self {
            config,
            metrics: Arc::new(metrics),
            log,
            wakes: broadcast::channel(WAKES).0,
            routes: RwLock::default(),
            applying: Mutex::new(()),
            held_bytes: Arc::default(),
            draining: AtomicBool::new(false),
        })
    }

    #[must_use]
    pub fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes.read())
    }

    /// Puts a table in force: all of it or nothing. Requests that wait or run are kept.
    /// `epoch` None means that nobody signs, so that versions have no order.
    ///
    /// Must be called within a tokio runtime: new replicas are watched from now on.
    ///
    /// # Errors
    /// A table that contradicts itself, or an old one.
    pub fn apply(self: &Arc<Self>, table: &Table, epoch: Option<u64>) -> Result<(), ApplyError> {
        table.check()?;
        let _applying = self.applying.lock();
        let before = self.routes();
        let new = Version {
            epoch: epoch.unwrap_or(0),
            version: table.version,
        };
        if let (Some(current), Some(_)) = (before.version, epoch)
            && new < current
        {
            return Err(ApplyError::Old { new, current });
        }
        let mut routes = Routes {
            version: Some(new),
            ..Routes::default()
        };
        for entry in &table.services {
            let service = self.update(&before, entry, table.routers);
            for host in &entry.hosts {
                let host = host.to_ascii_lowercase();
                routes.by_host.insert(host, Arc::clone(&service));
            }
            for model in &entry.models {
                let services = routes.by_model.entry(model.clone()).or_default();
                services.push(Arc::clone(&service));
            }
            routes.services.push(service);
        }
        let gone: Vec<_> = before
            .services
            .iter()
            .filter(|old| routes.services.iter().all(|new| !Arc::ptr_eq(old, new)))
            .collect();
        *self.routes.write() = Arc::new(routes);
        for service in gone {
            service.close();
            self.metrics.forget(&service.key);
        }
        let version = i64::try_from(table.version).unwrap_or(i64::MAX);
        self.metrics.table_version.set(version);
        Ok(())
    }

    fn update(
        self: &Arc<Self>,
        before: &Routes,
        entry: &ServiceEntry,
        routers: u32,
    ) -> Arc<Service> {
        let key = entry.key();
        let known = before.services.iter().find(|known| *known.key == *key);
        let settings_before = known.map(|known| known.settings());
        let keys_before = settings_before
            .as_ref()
            .and_then(|settings| settings.keys.as_ref());
        let settings = || Settings {
            entry: entry.clone(),
            keys: entry
                .api_keys
                .as_ref()
                .map(|keys| Keys::new(keys, routers, keys_before)),
            policy: if routers >= MANY_ROUTERS {
                Policy::TwoChoices
            } else {
                Policy::Least
            },
        };
        let service = match known {
            Some(known) => Arc::clone(known),
            None => Service::new(settings(), self.metrics.service(&key), self.wakes.clone()),
        };
        for replica in service.update(settings()) {
            let watched = monitor::watch(self.config.clone(), Arc::downgrade(&service), replica);
            tokio::spawn(watched);
        }
        service
    }

    /// Takes note of a body of so many bytes; None when all bodies together would be too much.
    #[must_use]
    pub fn hold(&self, bytes: usize) -> Option<HeldBytes> {
        let held = HeldBytes {
            all: Arc::clone(&self.held_bytes),
            bytes,
        };
        let before = self.held_bytes.fetch_add(bytes, Relaxed);
        (before + bytes <= self.config.max_held_bytes).then_some(held)
    }

    /// Not ready any more; what is here may finish.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Has a table and takes new work.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.routes.read().version.is_some()
    }

    /// Gives waiting requests the room that came about by time passing.
    pub async fn tick(self: Arc<Self>) {
        let mut interval = tokio::time::interval(Duration::from_millis(100));
        loop {
            interval.tick().await;
            for service in &self.routes().services {
                service.refresh();
            }
        }
    }

    /// Sets the gauges, for a scrape.
    pub fn measure(&self) {
        for service in &self.routes().services {
            let load = service.load();
            let set = |gauge: &prometheus::IntGaugeVec, value: i64| {
                gauge.with_label_values(&[&service.key]).set(value);
            };
            let metrics = &self.metrics;
            let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
            set(&metrics.queue_length, count(load.queue_length));
            set(
                &metrics.queued_tokens,
                i64::try_from(load.queued_tokens).unwrap_or(i64::MAX),
            );
            let requests = load.replicas.iter().map(|r| i64::from(r.in_flight())).sum();
            set(&metrics.outstanding_requests, requests);
            let tokens = load.replicas.iter().map(|replica| replica.tokens()).sum();
            set(&metrics.outstanding_tokens, tokens);
            let usable = load.replicas.iter().filter(|r| r.is_usable()).count();
            set(&metrics.usable_replicas, count(usable));
        }
    }
}

impl Routes {
    /// By host name or address, as a Host header gives it.
    #[must_use]
    pub fn by_host(&self, host: &str) -> Option<&Arc<Service>> {
        let name = without_port(host).trim_end_matches('.');
        if let Some(service) = self.by_host.get(name) {
            return Some(service);
        }
        let upper = name.bytes().any(|byte| byte.is_ascii_uppercase());
        upper.then(|| self.by_host.get(&name.to_ascii_lowercase()))?
    }

    #[must_use]
    pub fn by_model(&self, model: &str) -> Found {
        match self.by_model.get(model).map(Vec::as_slice) {
            Some([one]) => Found::One(Arc::clone(one)),
            Some(several) => Found::Several(several.to_vec()),
            None => Found::None,
        }
    }

    /// All models, for an error that says what there is.
    #[must_use]
    pub fn models(&self) -> Vec<&str> {
        let mut models: Vec<_> = self.by_model.keys().map(String::as_str).collect();
        models.sort_unstable();
        models
    }
}

fn without_port(host: &str) -> &str {
    if let Some(inner) = host.strip_prefix('[') {
        return inner.split_once(']').map_or(host, |(address, _)| address);
    }
    host.split_once(':').map_or(host, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router() -> Arc<Router> {
        Router::new(Config::default(), Metrics::new().unwrap(), AccessLog::off())
    }

    fn table(version: u64, services: &str) -> Table {
        let text = format!("{{\"version\":{version},\"services\":[{services}]}}");
        serde_json::from_str(&text).unwrap()
    }

    const A: &str =
        r#"{"namespace":"ns","name":"a","models":["m","x"],"hosts":["a.ns","198.18.0.9"]}"#;
    const B: &str = r#"{"namespace":"ns","name":"b","models":["m"],"hosts":["b.ns"]}"#;

    #[tokio::test]
    async fn a_request_finds_its_service() {
        let router = router();
        assert!(!router.is_ready());
        router.apply(&table(1, &format!("{A},{B}")), None).unwrap();
        assert!(router.is_ready());
        let routes = router.routes();
        for host in ["a.ns", "A.NS:80", "198.18.0.9:8000", "a.ns."] {
            assert_eq!(&*routes.by_host(host).unwrap().key, "ns/a", "{host}");
        }
        assert!(routes.by_host("c.ns").is_none());
        assert!(matches!(routes.by_model("x"), Found::One(_)));
        assert!(matches!(routes.by_model("m"), Found::Several(_)));
        assert!(matches!(routes.by_model("y"), Found::None));
        assert_eq!(without_port("[::1]:80"), "::1");
    }

    #[tokio::test]
    async fn tables_have_an_order_within_epochs() {
        let router = router();
        router.apply(&table(5, A), Some(3)).unwrap();
        let old = router.apply(&table(4, A), Some(3)).unwrap_err();
        assert!(old.to_string().contains("older than version 5"), "{old}");
        router.apply(&table(5, A), Some(3)).unwrap();
        router.apply(&table(1, B), Some(4)).unwrap();
        assert!(router.apply(&table(9, A), Some(3)).is_err());
        assert!(router.routes().by_host("a.ns").is_none());
    }

    #[tokio::test]
    async fn a_service_that_stays_keeps_its_state() {
        let router = router();
        router.apply(&table(1, A), None).unwrap();
        let before = Arc::clone(router.routes().by_host("a.ns").unwrap());
        router.apply(&table(2, &format!("{B},{A}")), None).unwrap();
        let after = Arc::clone(router.routes().by_host("a.ns").unwrap());
        assert!(Arc::ptr_eq(&before, &after));
    }

    #[test]
    fn held_bytes_are_bounded_and_given_back() {
        let config = Config {
            max_held_bytes: 100,
            ..Config::default()
        };
        let router = Router::new(config, Metrics::new().unwrap(), AccessLog::off());
        let first = router.hold(60).unwrap();
        assert!(router.hold(60).is_none());
        drop(first);
        assert!(router.hold(100).is_some());
    }
}
