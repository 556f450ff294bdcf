//! What governs a fleet: ours, and what people run today by its documented rules and defaults.

mod advised;
mod aibrix;
mod dynamo;
mod fixed;
mod hpa;
mod kpa;
mod kubeai;
mod ours;
mod ray_serve;
mod schedule;
mod window;
mod wva;

pub use advised::Advised;
pub use fixed::Fixed;
pub use ours::Stoker;
pub use schedule::Schedule;

use stoker_autoscaler::Dials;

use crate::fleet::{Action, Policy};

/// Policies to compare with. Each has one parameter to tune, and constant dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// So many replicas.
    Fixed,
    /// Knative's autoscaler: requests in a replica.
    Kpa,
    /// HPA or KEDA on waiting requests a replica.
    HpaWaiting,
    /// HPA or KEDA on running and waiting requests a replica.
    HpaInflight,
    /// Requests a replica, averaged over ten minutes.
    KubeAi,
    /// llm-d's Workload Variant Autoscaler, first analyser: spare KV cache and queue. The parameter
    /// is the queue's threshold plus the share of KV cache to spare (5.1: 5 requests, 0.1).
    WvaV1,
    /// Its second analyser: tokens in use. The parameter is the share of supply to use.
    WvaV2,
    /// AIBrix's APA on the share of KV cache in use.
    AibrixApa,
    /// Dynamo's planner, the loop on load. The parameter is the share of the objectives to use.
    Dynamo,
    /// Ongoing requests a replica, with delays.
    RayServe,
    /// vLLM production-stack: running requests a replica, one replica a minute.
    ProductionStack,
}

impl Peer {
    pub const ALL: [Peer; 11] = [
        Peer::Fixed,
        Peer::Kpa,
        Peer::HpaWaiting,
        Peer::HpaInflight,
        Peer::KubeAi,
        Peer::WvaV1,
        Peer::WvaV2,
        Peer::AibrixApa,
        Peer::Dynamo,
        Peer::RayServe,
        Peer::ProductionStack,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Peer::Fixed => "fixed",
            Peer::Kpa => "kpa",
            Peer::HpaWaiting => "hpa-waiting",
            Peer::HpaInflight => "hpa-inflight",
            Peer::KubeAi => "kubeai",
            Peer::WvaV1 => "wva-v1",
            Peer::WvaV2 => "wva-v2",
            Peer::AibrixApa => "aibrix-apa",
            Peer::Dynamo => "dynamo",
            Peer::RayServe => "ray-serve",
            Peer::ProductionStack => "prod-stack",
        }
    }

    /// The documented default; `None` where there is none (a fixed fleet).
    pub fn default_parameter(self, cap: u32) -> Option<f64> {
        Some(match self {
            Peer::Fixed => return None,
            // container-concurrency-target-default 100 at a utilization of 70 %.
            Peer::Kpa => 70.0,
            // KEDA's recipes for vLLM.
            Peer::HpaWaiting => 5.0,
            // HPA's usual 80 % of what a replica takes.
            Peer::HpaInflight => 0.8 * f64::from(cap),
            Peer::KubeAi => 100.0,
            Peer::WvaV1 => 5.1,
            Peer::WvaV2 => 0.85,
            Peer::AibrixApa => 0.5,
            Peer::Dynamo => 1.0,
            Peer::RayServe => 2.0,
            Peer::ProductionStack => 5.0,
        })
    }

    /// Parameters to try, from the dearest to the cheapest.
    pub fn grid(self) -> &'static [f64] {
        const CONCURRENCY: &[f64] = &[
            1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0,
            15.0, 16.0, 18.0, 20.0,
        ];
        match self {
            Peer::Fixed => &[
                20.0, 18.0, 16.0, 15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0,
                3.0,
            ],
            Peer::Kpa | Peer::HpaInflight | Peer::KubeAi | Peer::RayServe => CONCURRENCY,
            Peer::ProductionStack => CONCURRENCY,
            Peer::HpaWaiting => &[0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
            Peer::WvaV1 => &[
                5.77, 5.75, 5.7, 5.65, 5.6, 5.55, 5.5, 5.4, 5.3, 5.1, 10.75, 10.7, 10.65, 10.6,
                10.55, 10.5, 10.4, 10.3, 10.1,
            ],
            Peer::WvaV2 => &[
                0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85,
            ],
            Peer::AibrixApa => &[0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5],
            Peer::Dynamo => &[
                0.2, 0.25, 0.3, 0.325, 0.35, 0.375, 0.4, 0.425, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0,
            ],
        }
    }

    pub fn policy(self, parameter: f64, dials: Dials) -> Box<dyn Policy> {
        match self {
            Peer::Fixed => Box::new(Fixed::new(parameter as u32, dials)),
            Peer::Kpa => Box::new(kpa::Kpa::new(parameter, dials)),
            Peer::HpaWaiting => Box::new(hpa::Hpa::on_waiting(parameter, dials)),
            Peer::HpaInflight => Box::new(hpa::Hpa::on_inflight(parameter, dials)),
            Peer::ProductionStack => Box::new(hpa::Hpa::production_stack(parameter, dials)),
            Peer::KubeAi => Box::new(kubeai::KubeAi::new(parameter, dials)),
            Peer::WvaV1 => Box::new(wva::V1::new(parameter, dials)),
            Peer::WvaV2 => Box::new(wva::V2::new(parameter, dials)),
            Peer::AibrixApa => Box::new(aibrix::Apa::new(parameter, dials)),
            Peer::Dynamo => Box::new(dynamo::Dynamo::new(parameter, dials)),
            Peer::RayServe => Box::new(ray_serve::RayServe::new(parameter, dials)),
        }
    }
}

/// So many replicas with these dials.
fn action(replicas: u32, dials: Dials) -> Action {
    Action {
        replicas,
        dials,
        overrides: Vec::new(),
        weights: Vec::new(),
    }
}

/// The least whole number of replicas that carries `load`.
fn ceil(load: f64) -> u32 {
    (load - 1e-9).ceil().max(0.0) as u32
}

#[cfg(test)]
mod tests;
