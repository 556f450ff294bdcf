//! Where the scaling loop and the reconciler meet.
//!
//! The reconciler says how many replicas there are and what became of the Deployment; the loop says
//! how many there should be and what it saw. Each wakes the other by changing it here.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::apps::v1::Deployment;
use kube::{Resource, ResourceExt};
use stoker_api::{InferenceService, ScalingMode};
use stoker_autoscaler::{Dials, Load, Reason};
use stoker_law::Law;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Fleet;

/// Namespace and name of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn of<K: Resource>(object: &K) -> Option<Self> {
        Some(Key {
            namespace: object.meta().namespace.clone()?,
            name: object.meta().name.clone()?,
        })
    }
}

/// What the loop knows about a service after a tick.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outlook {
    /// Dials that the fleet is told to use.
    pub dials: Option<Dials>,
    pub load: Option<Load>,
    /// The best known law and how sure it is, 0 to 1.
    pub law: Option<(Law, f64)>,
    /// The policy's reason, held for some seconds so that it can be read.
    pub reason: Option<Reason>,
    /// Whether enough requests met their objectives; `None` without traffic.
    pub objectives_met: Option<bool>,
    /// By uid.
    pub pods: BTreeMap<String, PodOutlook>,
    /// Work that replicas unlike the rest bear, in that of an ordinary one, by uid.
    pub weights: BTreeMap<String, f64>,
}

/// What the loop knows about a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodOutlook {
    /// Loading progress in percent.
    pub loading_percent: Option<i32>,
    pub loading_eta_seconds: Option<i32>,
    /// A replica that doesn't answer the operator's scrapes any more, and what came instead.
    pub silent: Option<String>,
}

#[derive(Debug)]
struct Entry {
    uid: String,
    desired: u32,
    /// Whether a request may start the first replica: not where replicas are set by hand.
    rouses: bool,
    fleet: Fleet,
    outlook: Outlook,
}

pub struct Board {
    entries: Mutex<HashMap<Key, Entry>>,
    wake: UnboundedSender<Key>,
}

impl Board {
    /// The receiver names services whose reconciler has something new to tell.
    pub fn new() -> (Self, UnboundedReceiver<Key>) {
        let (wake, woken) = unbounded_channel();
        let entries = Mutex::default();
        (Board { entries, wake }, woken)
    }

    /// How many replicas to ask the Deployment for.
    ///
    /// The first call after a start takes up what was asked for before: the status says it, else the
    /// Deployment. A new service that may sleep has a replica at first, so that what is wrong with it
    /// shows now and not at the first request. Too few replicas are raised to the lower bound at once; too many are for the loop
    /// to take away, one by one.
    pub fn desired(&self, service: &InferenceService, live: Option<&Deployment>) -> u32 {
        let (Some(key), Some(uid)) = (Key::of(service), service.uid()) else {
            return 0;
        };
        let (lower, upper) = bounds(service);
        let mut entries = self.lock();
        if entries.get(&key).is_none_or(|entry| entry.uid != uid) {
            let status = service.status.as_ref().and_then(|s| s.desired_replicas);
            let spec = live.and_then(|d| d.spec.as_ref()).and_then(|s| s.replicas);
            let known = status.or(spec).and_then(|n| u32::try_from(n).ok());
            let entry = Entry {
                uid,
                desired: known.unwrap_or(lower.max(1)).clamp(lower, upper.max(lower)),
                rouses: false,
                fleet: Fleet::default(),
                outlook: Outlook::default(),
            };
            entries.insert(key.clone(), entry);
        }
        match entries.get_mut(&key) {
            Some(entry) => {
                entry.desired = entry.desired.max(lower);
                entry.rouses = service.spec.scaling.mode == ScalingMode::Auto;
                entry.desired
            }
            None => lower,
        }
    }

    /// Takes note of the Deployment as it was applied or seen.
    pub fn deployed(&self, key: &Key, deployment: &Deployment) {
        if let Some(entry) = self.lock().get_mut(key) {
            entry.fleet = Fleet::of(deployment);
        }
    }

    pub fn outlook(&self, key: &Key) -> Outlook {
        let entries = self.lock();
        let entry = entries.get(key);
        entry.map(|e| e.outlook.clone()).unwrap_or_default()
    }

    /// How much of the work each replica is to get, where that differs from the rest.
    pub fn weights(&self, key: &Key) -> BTreeMap<String, f64> {
        let entries = self.lock();
        let entry = entries.get(key);
        entry.map(|e| e.outlook.weights.clone()).unwrap_or_default()
    }

    /// Replicas asked for and the Deployment's state; `None` before the first reconcile.
    pub fn current(&self, key: &Key, uid: &str) -> Option<(u32, Fleet)> {
        let entries = self.lock();
        let entry = entries.get(key).filter(|entry| entry.uid == uid)?;
        Some((entry.desired, entry.fleet))
    }

    /// The outcome of a tick that began with `before` replicas asked for. Where the reconciler has
    /// raised the number meanwhile, its number stays.
    pub fn publish(&self, key: &Key, uid: &str, before: u32, next: u32, outlook: Outlook) {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(key).filter(|entry| entry.uid == uid) else {
            return;
        };
        let mut news = entry.outlook.headline() != outlook.headline();
        entry.outlook = outlook;
        if entry.desired == before && next != before {
            entry.desired = next;
            news = true;
        }
        if news {
            self.wake(key.clone());
        }
    }

    /// A request waits for a service that may be asleep: it gets a replica without waiting for the
    /// loop's next tick.
    pub fn rouse(&self, key: &Key) {
        if let Some(entry) = self.lock().get_mut(key)
            && entry.desired == 0
            && entry.rouses
        {
            entry.desired = 1;
            self.wake(key.clone());
        }
    }

    /// Has the service reconciled.
    pub fn wake(&self, key: Key) {
        // Closed only while the process ends.
        let _ = self.wake.send(key);
    }

    /// Drops what is known about an object that is gone. Always `false`.
    pub fn forget(&self, key: &Key, uid: &str) -> bool {
        let mut entries = self.lock();
        if entries.get(key).is_some_and(|entry| entry.uid == uid) {
            entries.remove(key);
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outlook {
    /// What is worth a reconcile; the rest waits for the next one.
    fn headline(&self) -> impl PartialEq + use<> {
        (
            self.reason.as_ref().map(|reason| reason.code),
            self.objectives_met,
            self.dials,
            self.pods
                .iter()
                .map(|(uid, pod)| (uid.clone(), pod.loading_percent, pod.silent.is_some()))
                .collect::<Vec<_>>(),
        )
    }
}

/// Fewest and most replicas that the spec allows.
pub fn bounds(service: &InferenceService) -> (u32, u32) {
    let count = |n: i32| u32::try_from(n).unwrap_or(0);
    let spec = &service.spec;
    match spec.scaling.mode {
        ScalingMode::Auto => {
            let lower = count(spec.scaling.min_replicas);
            (lower, count(spec.scaling.max_replicas).max(lower))
        }
        ScalingMode::Manual | ScalingMode::Recommend => {
            (count(spec.replicas), count(spec.replicas))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(scaling: Value, status: Value) -> InferenceService {
        serde_json::from_value(json!({
            "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService",
            "metadata": {"name": "s", "namespace": "ns", "uid": "u"},
            "spec": {"engine": {"device": "cpu"}, "scaling": scaling, "replicas": 1},
            "status": status,
        }))
        .unwrap()
    }

    fn deployment(replicas: i32) -> Deployment {
        serde_json::from_value(
            json!({"spec": {"replicas": replicas, "selector": {}, "template": {}}}),
        )
        .unwrap()
    }

    fn key() -> Key {
        Key {
            namespace: "ns".to_owned(),
            name: "s".to_owned(),
        }
    }

    /// kill -9 in the middle of a ramp: the new operator asks for what was asked for.
    #[test]
    fn a_restart_takes_up_what_was_asked_for() {
        let scaling = json!({"minReplicas": 1, "maxReplicas": 4});
        let board = Board::new().0;
        let with_status = service(scaling.clone(), json!({"desiredReplicas": 3}));
        assert_eq!(board.desired(&with_status, Some(&deployment(2))), 3);
        let board = Board::new().0;
        let lost_status = service(scaling.clone(), json!({}));
        assert_eq!(board.desired(&lost_status, Some(&deployment(4))), 4);
        let board = Board::new().0;
        assert_eq!(board.desired(&lost_status, None), 1);
    }

    #[test]
    fn a_raised_minimum_holds_at_once_and_a_lowered_maximum_is_left_to_the_loop() {
        let (board, _woken) = Board::new();
        let at_three = service(json!({}), json!({"desiredReplicas": 3}));
        assert_eq!(board.desired(&at_three, None), 3);
        let lowered = service(json!({"minReplicas": 1, "maxReplicas": 2}), json!({}));
        assert_eq!(board.desired(&lowered, None), 3);
        board.publish(&key(), "u", 3, 2, Outlook::default());
        assert_eq!(board.desired(&lowered, None), 2);
        let raised = service(json!({"minReplicas": 4, "maxReplicas": 4}), json!({}));
        assert_eq!(board.desired(&raised, None), 4);
    }

    #[test]
    fn a_new_service_that_may_sleep_begins_awake() {
        let (board, _woken) = Board::new();
        let new = service(json!({"minReplicas": 0}), json!({}));
        assert_eq!(board.desired(&new, None), 1);
        let (board, _woken) = Board::new();
        assert_eq!(board.desired(&new, Some(&deployment(0))), 0, "it slept");
        let (board, _woken) = Board::new();
        let mut by_hand = service(json!({"mode": "Manual"}), json!({}));
        by_hand.spec.replicas = 0;
        assert_eq!(board.desired(&by_hand, None), 0);
    }

    #[test]
    fn a_request_rouses_a_sleeping_service_only() {
        let (board, mut woken) = Board::new();
        board.desired(
            &service(json!({"minReplicas": 0}), json!({"desiredReplicas": 0})),
            None,
        );
        board.rouse(&key());
        assert_eq!(board.current(&key(), "u").map(|(n, _)| n), Some(1));
        assert_eq!(woken.try_recv().unwrap(), key());
        board.rouse(&key());
        assert!(woken.try_recv().is_err(), "it is awake");

        let (board, _woken) = Board::new();
        let mut by_hand = service(json!({"mode": "Manual"}), json!({"desiredReplicas": 0}));
        by_hand.spec.replicas = 0;
        board.desired(&by_hand, None);
        board.rouse(&key());
        assert_eq!(board.current(&key(), "u").map(|(n, _)| n), Some(0));
    }

    #[test]
    fn a_decision_from_before_a_raise_does_not_undo_it() {
        let (board, mut woken) = Board::new();
        board.desired(&service(json!({}), json!({"desiredReplicas": 3})), None);
        let (before, _) = board.current(&key(), "u").unwrap();
        let raised = service(json!({"minReplicas": 4, "maxReplicas": 4}), json!({}));
        board.desired(&raised, None);
        board.publish(&key(), "u", before, 2, Outlook::default());
        assert_eq!(board.desired(&raised, None), 4);
        assert!(woken.try_recv().is_err(), "nothing changed");
    }

    #[test]
    fn a_new_object_of_the_same_name_inherits_nothing() {
        let (board, _woken) = Board::new();
        board.desired(&service(json!({}), json!({"desiredReplicas": 3})), None);
        let mut other = service(json!({}), json!({}));
        other.metadata.uid = Some("v".to_owned());
        assert_eq!(board.desired(&other, None), 1);
        assert_eq!(board.current(&key(), "u"), None);
        board.forget(&key(), "u");
        assert!(board.current(&key(), "v").is_some());
    }

    #[test]
    fn the_reconciler_wakes_for_news_only() {
        let (board, mut woken) = Board::new();
        board.desired(&service(json!({}), json!({})), None);
        let quiet = Outlook {
            load: Some(Load::default()),
            ..Outlook::default()
        };
        board.publish(&key(), "u", 1, 1, quiet.clone());
        assert!(woken.try_recv().is_err());
        let met = Outlook {
            objectives_met: Some(true),
            ..quiet
        };
        board.publish(&key(), "u", 1, 1, met);
        assert_eq!(woken.try_recv().unwrap(), key());
    }
}
