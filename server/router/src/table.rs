//! The routing table, as the operator pushes it to `PUT /control/v1/table`.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// All services that a router knows. Unknown fields are ignored, so that a newer operator can
/// talk to an older router during an upgrade.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Grows with each change; within one lease epoch an older table is refused.
    pub version: u64,
    /// Router pods that share the load. A key's limits are divided by it.
    #[serde(default = "one")]
    pub routers: u32,
    #[serde(default)]
    pub services: Vec<ServiceEntry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceEntry {
    pub namespace: String,
    pub name: String,
    /// Names that requests may use as `model`.
    #[serde(default)]
    pub models: Vec<String>,
    /// Host names and addresses, without port.
    #[serde(default)]
    pub hosts: Vec<String>,
    #[serde(default)]
    pub replicas: Vec<ReplicaEntry>,
    #[serde(default)]
    pub objectives: Objectives,
    /// How long a request waits while no replica can answer.
    #[serde(default = "default_cold_start_deadline")]
    pub cold_start_deadline_seconds: f64,
    /// Longest wait in the queue while replicas answer; without it what the objective for the
    /// time to first token allows the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_queue_wait_seconds: Option<f64>,
    /// Absent: no key is asked for. Empty: nobody may call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<Vec<ApiKeyEntry>>,
    #[serde(default = "default_max_body_bytes")]
    pub max_body_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaEntry {
    /// The pod's uid.
    pub id: String,
    /// `address:port` of the replica's public port.
    pub address: SocketAddr,
    /// Work that it bears, in that of an ordinary replica; 0 gets no new work and finishes what it
    /// has.
    #[serde(default = "ordinary")]
    pub weight: f64,
    /// False for one that is still starting: it gets work as soon as it says itself that it is ready.
    #[serde(default = "yes")]
    pub ready: bool,
    /// Sequences that run at once. What the replica reports itself goes first.
    #[serde(default = "default_max_num_seqs")]
    pub max_num_seqs: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApiKeyEntry {
    /// Told in logs and metrics instead of the key.
    pub name: String,
    /// Lower-case hexadecimal SHA-256 of the key.
    pub sha256: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Prompt tokens (estimated) and the most that may be generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
}

/// The part of the objectives that bounds the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Objectives {
    pub ttft_ms: f64,
    pub ttft_free_prompt_tokens: f64,
    pub ttft_ms_per_prompt_token: f64,
}

impl Default for Objectives {
    fn default() -> Self {
        Self {
            ttft_ms: 2000.0,
            ttft_free_prompt_tokens: 1000.0,
            ttft_ms_per_prompt_token: 1.0,
        }
    }
}

impl Objectives {
    /// Seconds until the first token that a prompt of this many tokens may take.
    #[must_use]
    pub fn ttft_seconds(&self, prompt_tokens: f64) -> f64 {
        let over = (prompt_tokens - self.ttft_free_prompt_tokens).max(0.0);
        (self.ttft_ms + self.ttft_ms_per_prompt_token * over) / 1000.0
    }
}

#[derive(Debug, Error, PartialEq)]
pub enum TableError {
    #[error("service {0} is in the table twice; list each once")]
    DuplicateService(String),
    #[error("host {host:?} belongs to both {first} and {second}; give it to one")]
    DuplicateHost {
        host: String,
        first: String,
        second: String,
    },
    #[error("replica {id:?} is in service {service} twice; list each once")]
    DuplicateReplica { service: String, id: String },
    #[error("replica {id:?} of service {service} has max_num_seqs 0; it must be at least 1")]
    NoSequences { service: String, id: String },
    #[error("key {key:?} of service {service}: sha256 must be 64 hexadecimal digits")]
    BadHash { service: String, key: String },
    #[error("key {key:?} of service {service} is there twice; names must differ")]
    DuplicateKey { service: String, key: String },
    #[error("key {key:?} of service {service}: a limit of 0 would refuse all; leave the key out")]
    ZeroLimit { service: String, key: String },
    #[error("service {service}: {field} is {value}; it must be a number from 0 up")]
    BadNumber {
        service: String,
        field: &'static str,
        value: f64,
    },
    #[error("routers is 0; it must be at least 1")]
    NoRouters,
}

impl ServiceEntry {
    /// `namespace/name`.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn check(&self) -> Result<(), TableError> {
        let service = self.key();
        let mut ids = HashSet::new();
        for replica in &self.replicas {
            let id = replica.id.clone();
            if !ids.insert(&replica.id) {
                return Err(TableError::DuplicateReplica { service, id });
            }
            if replica.max_num_seqs == 0 {
                return Err(TableError::NoSequences { service, id });
            }
        }
        let mut names = HashSet::new();
        for entry in self.api_keys.iter().flatten() {
            let key = entry.name.clone();
            if !names.insert(&entry.name) {
                return Err(TableError::DuplicateKey { service, key });
            }
            if parse_sha256(&entry.sha256).is_none() {
                return Err(TableError::BadHash { service, key });
            }
            if entry.requests_per_minute == Some(0) || entry.tokens_per_minute == Some(0) {
                return Err(TableError::ZeroLimit { service, key });
            }
        }
        let objectives = &self.objectives;
        let numbers = [
            ("objectives.ttft_ms", objectives.ttft_ms),
            (
                "objectives.ttft_free_prompt_tokens",
                objectives.ttft_free_prompt_tokens,
            ),
            (
                "objectives.ttft_ms_per_prompt_token",
                objectives.ttft_ms_per_prompt_token,
            ),
            (
                "cold_start_deadline_seconds",
                self.cold_start_deadline_seconds,
            ),
            (
                "max_queue_wait_seconds",
                self.max_queue_wait_seconds.unwrap_or(0.0),
            ),
        ];
        let weights = self.replicas.iter().map(|r| ("replicas.weight", r.weight));
        for (field, value) in numbers.into_iter().chain(weights) {
            if !value.is_finite() || value < 0.0 {
                return Err(TableError::BadNumber {
                    service,
                    field,
                    value,
                });
            }
        }
        Ok(())
    }
}

impl Table {
    /// Says what makes the table unusable as a whole: nothing of it is applied then.
    pub fn check(&self) -> Result<(), TableError> {
        if self.routers == 0 {
            return Err(TableError::NoRouters);
        }
        let mut hosts: HashMap<String, String> = HashMap::new();
        let mut services = HashSet::new();
        for service in &self.services {
            let key = service.key();
            if !services.insert(key.clone()) {
                return Err(TableError::DuplicateService(key));
            }
            service.check()?;
            for host in &service.hosts {
                let host = host.to_ascii_lowercase();
                match hosts.insert(host.clone(), key.clone()) {
                    Some(first) if first != key => {
                        return Err(TableError::DuplicateHost {
                            host,
                            first,
                            second: key,
                        });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The 32 bytes of a hexadecimal SHA-256, or None.
#[must_use]
pub fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    let mut bytes = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(bytes)
}

fn one() -> u32 {
    1
}

fn ordinary() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

fn default_max_num_seqs() -> u32 {
    8
}

fn default_cold_start_deadline() -> f64 {
    300.0
}

fn default_max_body_bytes() -> u64 {
    4 << 20
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Table {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_small_table_gets_its_defaults() {
        let table = parse(
            r#"{"version": 3, "future": true, "services": [{"namespace": "a", "name": "b",
                "replicas": [{"id": "u", "address": "198.18.1.5:8000"}]}]}"#,
        );
        table.check().unwrap();
        let service = &table.services[0];
        assert_eq!((service.replicas[0].weight, table.routers), (1.0, 1));
        assert!(service.api_keys.is_none());
        assert!((service.objectives.ttft_seconds(3000.0) - 4.0).abs() < 1e-9);
        assert!((service.objectives.ttft_seconds(10.0) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_wrong_table_says_what_is_wrong() {
        let cases = [
            (
                r#"{"version":1,"services":[{"namespace":"a","name":"b"},{"namespace":"a","name":"b"}]}"#,
                "a/b is in the table twice",
            ),
            (
                r#"{"version":1,"services":[{"namespace":"a","name":"b","hosts":["X"]},
                   {"namespace":"a","name":"c","hosts":["x"]}]}"#,
                "host \"x\" belongs to both a/b and a/c",
            ),
            (
                r#"{"version":1,"services":[{"namespace":"a","name":"b",
                   "api_keys":[{"name":"k","sha256":"abc"}]}]}"#,
                "64 hexadecimal digits",
            ),
            (
                r#"{"version":1,"services":[{"namespace":"a","name":"b","replicas":[
                   {"id":"u","address":"198.18.0.1:1"},{"id":"u","address":"198.18.0.2:1"}]}]}"#,
                "replica \"u\" is in service a/b twice",
            ),
            (r#"{"version":1,"routers":0}"#, "at least 1"),
        ];
        for (text, message) in cases {
            let error = parse(text).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
