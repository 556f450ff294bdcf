//! What routers are told: `PUT /control/v1/table` of docs/router.md, made from the caches. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt;
use kube::runtime::reflector::Store;
use serde::Serialize;
use stoker_api::{InferenceService, ScalingMode, names};

use super::Keyring;
use super::keyring::ApiKey;
use crate::actuate::{DeletionCost, WireObjectives};
use crate::scaling::{self, Board, Key, is_finished, is_ready, is_replica, is_running};
use crate::stores::Stores;

/// How long a request waits while a replica starts: weights of a large model on a new node.
const COLD_START_SECONDS: f64 = 600.0;
/// Of a replica like the rest.
const ORDINARY: f64 = 1.0;
/// Steps in which weights are told.
const WEIGHT_STEPS: f64 = 20.0;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// Grows with each change; a new leader's epoch starts anew.
    pub version: u64,
    routers: u32,
    services: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    namespace: String,
    name: String,
    models: Vec<String>,
    hosts: Vec<String>,
    replicas: Vec<Replica>,
    objectives: WireObjectives,
    cold_start_deadline_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_keys: Option<Vec<ApiKey>>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Replica {
    id: String,
    address: SocketAddr,
    weight: f64,
    /// Whether the kubelet says so; the router looks for itself while it doesn't.
    ready: bool,
    max_num_seqs: u32,
}

impl Table {
    /// The next version, or `None` when nothing changed.
    pub fn after(before: Option<&Table>, routers: u32, services: Vec<Entry>) -> Option<Table> {
        match before {
            Some(old) if old.routers == routers && old.services == services => None,
            _ => Some(Table {
                version: before.map_or(1, |old| old.version + 1),
                routers,
                services,
            }),
        }
    }
}

/// All services that can be read. `None` while API keys that a service asks for have not been read
/// yet, unless that is `late`: then nobody may use it.
pub fn services(
    stores: &Stores,
    addresses: &[Store<Service>],
    keyring: &Keyring,
    board: &Board,
    late: bool,
) -> Option<Vec<Entry>> {
    let mut services = stores.services();
    services.retain(|service| service.metadata.deletion_timestamp.is_none());
    services.sort_by_key(|service| (service.namespace(), service.name_any()));
    let mut names: HashMap<String, u32> = HashMap::new();
    for service in &services {
        *names.entry(service.name_any()).or_default() += 1;
    }
    let pods = stores.pods();
    let mut entries = Vec::with_capacity(services.len());
    for service in &services {
        let Some(key) = Key::of(&**service) else {
            continue;
        };
        let keys = keyring.get(service);
        if service.spec.access.is_some() && keys.is_none() && !late {
            return None;
        }
        let api_keys = service
            .spec
            .access
            .as_ref()
            .map(|_| keys.unwrap_or_default());
        let unique = names.get(&key.name) == Some(&1);
        let ips = cluster_ips(addresses, service, &key);
        let pods = pods.get(&key).into_iter().flatten().map(AsRef::as_ref);
        entries.push(entry(
            service,
            &key,
            pods,
            &board.weights(&key),
            hosts(&key, unique, ips),
            api_keys,
        ));
    }
    Some(entries)
}

fn entry<'a>(
    service: &InferenceService,
    key: &Key,
    pods: impl Iterator<Item = &'a Pod>,
    weights: &BTreeMap<String, f64>,
    hosts: Vec<String>,
    api_keys: Option<Vec<ApiKey>>,
) -> Entry {
    let model = service.spec.model.served_name.clone();
    let cap = service.spec.engine.max_num_seqs.initial;
    // By hand scaled to zero: nobody will start a replica.
    let comes = service.spec.scaling.mode == ScalingMode::Auto || service.spec.replicas > 0;
    let mut replicas: Vec<Replica> = pods
        .filter(|pod| is_replica(pod, &key.name) && !is_finished(pod))
        .filter(|pod| pod.metadata.deletion_timestamp.is_none() && is_running(pod))
        .filter_map(|pod| replica(pod, u32::try_from(cap).unwrap_or(1), weights))
        .collect();
    // The last one is never out of rotation.
    if replicas
        .iter()
        .all(|replica| replica.weight == 0.0 || !replica.ready)
    {
        replicas
            .iter_mut()
            .for_each(|replica| replica.weight = ORDINARY);
    }
    Entry {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        models: vec![model.unwrap_or_else(|| key.name.clone())],
        hosts,
        replicas,
        objectives: WireObjectives::from(&scaling::objectives(&service.spec)),
        cold_start_deadline_seconds: if comes { COLD_START_SECONDS } else { 0.0 },
        api_keys,
    }
}

/// A pod that is marked to go is out of rotation: it finishes what it has.
fn replica(pod: &Pod, cap: u32, weights: &BTreeMap<String, f64>) -> Option<Replica> {
    let ip: IpAddr = pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok()?;
    let id = pod.uid()?;
    let weight = weights.get(&id).copied().unwrap_or(ORDINARY);
    Some(Replica {
        weight: match DeletionCost::is_marked(pod) {
            true => 0.0,
            // In steps, so that what is measured a little differently is no new table.
            false => (weight * WEIGHT_STEPS).round() / WEIGHT_STEPS,
        },
        id,
        address: SocketAddr::new(ip, u16::try_from(names::HTTP_PORT).ok()?),
        ready: is_ready(pod),
        max_num_seqs: cap.max(1),
    })
}

/// Names and addresses under which clients reach the service. The name alone belongs to it where no
/// other namespace has a service of that name.
fn hosts(key: &Key, unique: bool, ips: Vec<String>) -> Vec<String> {
    let Key { namespace, name } = key;
    let mut hosts = vec![
        format!("{name}.{namespace}"),
        format!("{name}.{namespace}.svc"),
        format!("{name}.{namespace}.svc.cluster.local"),
    ];
    if unique {
        hosts.push(name.clone());
    }
    hosts.extend(ips);
    hosts
}

/// Addresses of the Service, if it is this object's.
fn cluster_ips(addresses: &[Store<Service>], owner: &InferenceService, key: &Key) -> Vec<String> {
    let at = kube::runtime::reflector::ObjectRef::new(&key.name).within(&key.namespace);
    let found = addresses.iter().find_map(|store| store.get(&at));
    let owned = found.filter(|service| {
        let owners = service.owner_references().iter();
        owners.clone().any(|o| Some(&o.uid) == owner.uid().as_ref())
    });
    let spec = owned.as_ref().and_then(|service| service.spec.as_ref());
    let ips = spec.and_then(|spec| spec.cluster_ips.clone());
    ips.unwrap_or_default()
        .into_iter()
        .filter(|ip| ip.parse::<IpAddr>().is_ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value) -> InferenceService {
        serde_json::from_value(json!({
            "metadata": {"name": "chat", "namespace": "ns", "uid": "u"}, "spec": spec,
        }))
        .unwrap()
    }

    fn pod(uid: &str, ready: &str, annotations: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": uid, "uid": uid, "annotations": annotations,
                "labels": {"pod-template-hash": "h"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "chat-h",
                                     "uid": "r", "controller": true}]},
            "status": {"podIP": "198.18.0.7", "conditions": [{"type": "Ready", "status": ready}],
                "containerStatuses": [{"name": "server", "image": "i", "imageID": "i", "ready": true,
                    "restartCount": 0, "state": {"running": {}}}]},
        }))
        .unwrap()
    }

    fn made(spec: Value, pods: &[Pod]) -> Value {
        made_with(spec, pods, &[])
    }

    fn made_with(spec: Value, pods: &[Pod], weights: &[(&str, f64)]) -> Value {
        let key = Key {
            namespace: "ns".to_owned(),
            name: "chat".to_owned(),
        };
        let hosts = hosts(&key, true, vec!["198.19.0.1".to_owned()]);
        let weights = weights
            .iter()
            .map(|(id, weight)| ((*id).to_owned(), *weight));
        let weights = weights.collect();
        let pods = pods.iter();
        serde_json::to_value(entry(&service(spec), &key, pods, &weights, hosts, None)).unwrap()
    }

    #[test]
    fn a_table_tells_names_replicas_and_who_is_out_of_rotation() {
        let spec = json!({"engine": {"device": "cpu", "maxNumSeqs": {"min": 1, "max": 64, "initial": 24}},
            "model": {"servedName": "smol"}});
        let marked = json!({"controller.kubernetes.io/pod-deletion-cost": "-1000"});
        let pods = [
            pod("a", "True", json!({})),
            pod("b", "True", marked.clone()),
            pod("c", "False", json!({})),
        ];
        let entry = made(spec.clone(), &pods);
        let replica = |id: &str, weight: f64, ready: bool| {
            json!({"id": id, "address": "198.18.0.7:8000",
            "weight": weight, "ready": ready, "max_num_seqs": 24})
        };
        assert_eq!(
            entry["replicas"],
            json!([
                replica("a", 1.0, true),
                replica("b", 0.0, true),
                replica("c", 1.0, false)
            ])
        );
        assert_eq!(entry["models"], json!(["smol"]));
        assert_eq!(
            entry["hosts"],
            json!([
                "chat.ns",
                "chat.ns.svc",
                "chat.ns.svc.cluster.local",
                "chat",
                "198.19.0.1"
            ])
        );
        let alone = made(spec, &[pod("b", "True", marked)]);
        assert_eq!(alone["replicas"], json!([replica("b", 1.0, true)]));
    }

    #[test]
    fn a_slow_replica_gets_its_part_and_a_hopeless_one_nothing() {
        let spec = json!({"engine": {"device": "cpu"}});
        let pods = ["a", "b", "c"].map(|id| pod(id, "True", json!({})));
        let weights = |entry: Value| -> Vec<f64> {
            let replicas = entry["replicas"].as_array().unwrap();
            replicas
                .iter()
                .map(|r| r["weight"].as_f64().unwrap())
                .collect()
        };
        let slow = [("b", 0.333), ("c", 0.0)];
        assert_eq!(
            weights(made_with(spec.clone(), &pods, &slow)),
            [1.0, 0.35, 0.0]
        );
        let all = [("a", 0.0), ("b", 0.0), ("c", 0.0)];
        assert_eq!(weights(made_with(spec, &pods, &all)), [1.0, 1.0, 1.0]);
    }

    #[test]
    fn nobody_waits_for_replicas_that_will_not_come() {
        let engine = json!({"device": "cpu"});
        let manual = json!({"engine": engine, "replicas": 0, "scaling": {"mode": "Manual"}});
        assert_eq!(made(manual, &[])["cold_start_deadline_seconds"], 0.0);
        let asleep = json!({"engine": engine, "scaling": {"minReplicas": 0}});
        assert_eq!(made(asleep, &[])["cold_start_deadline_seconds"], 600.0);
    }

    #[test]
    fn a_version_is_a_change() {
        let first = Table::after(None, 2, Vec::new()).unwrap();
        assert_eq!((first.version, first.routers), (1, 2));
        assert_eq!(Table::after(Some(&first), 2, Vec::new()), None);
        assert_eq!(
            Table::after(Some(&first), 1, Vec::new()).unwrap().version,
            2
        );
    }
}
