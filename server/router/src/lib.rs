//! A streaming proxy in front of the replicas of all services of a cluster.
//!
//! A request's way: `listener` -> `proxy` (which service, may it, what does it ask for) ->
//! `forward` (wait for room, try, try elsewhere) -> `service` (queue, choice) -> `upstream`
//! (connections) -> `body` (whole events on their way back).

pub mod args;
pub mod body;
pub mod choose;
pub mod clock;
pub mod config;
pub mod control;
pub mod error;
pub mod estimates;
pub mod forward;
pub mod held;
pub mod keys;
pub mod lease;
pub mod listener;
mod local;
pub mod metrics;
pub mod monitor;
pub mod prefix;
pub mod proxy;
pub mod queue;
pub mod queues;
pub mod record;
pub mod registry;
pub mod replica;
pub mod run;
pub mod saved;
pub mod scan;
pub mod service;
pub mod sse;
pub mod table;
pub mod tls;
pub mod token;
pub mod upstream;
pub mod workers;
