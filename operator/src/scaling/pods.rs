//! A service's pods: what each said this time, and what is remembered of it.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use stoker_api::names;
use stoker_autoscaler::{Observation, Phase, Queue, Replica, Sample};
use tokio::time::Instant;

use super::board::PodOutlook;
use super::observe::{self, is_ready};
use super::settle::SILENCE;
use crate::actuate::{DeletionCost, Pushed};
use crate::scrape::{FetchError, Reading};

/// What is remembered about a pod.
#[derive(Default)]
pub(super) struct PodMemory {
    /// Of the container: what follows is about this start of it.
    pub restarts: i32,
    pub was_ready: bool,
    pub pushed: Option<Pushed>,
    pub push_failing: bool,
    /// The last answer, or the first question while there was none.
    pub heard: Option<Instant>,
    /// When it was first seen with the mark of the pod that goes first.
    pub marked: Option<Instant>,
}

/// A pod with what it said this time.
pub(super) struct Seen {
    pub pod: Arc<Pod>,
    pub uid: String,
    pub address: Option<IpAddr>,
    pub phase: Phase,
    pub reading: Option<Result<Reading, FetchError>>,
}

impl Seen {
    pub fn sample(&self) -> Option<&Sample> {
        self.answer()?.sample.as_ref().ok()
    }

    pub fn answer(&self) -> Option<&Reading> {
        self.reading.as_ref()?.as_ref().ok()
    }

    /// What there is to tell about it.
    pub fn outlook(&self, memory: Option<&PodMemory>, now: Instant) -> PodOutlook {
        let answer = self.answer();
        let heard = memory.and_then(|memory| memory.heard);
        let quiet = heard.is_some_and(|at| now.duration_since(at) >= SILENCE);
        let error = match &self.reading {
            Some(Err(error)) => error.to_string(),
            _ => "it has no address".to_owned(),
        };
        let percent = |ratio: f64| (ratio.clamp(0.0, 1.0) * 100.0).floor() as i32;
        let progress = answer.and_then(|a| a.loading_progress);
        let eta = answer.and_then(|a| a.loading_eta_seconds);
        PodOutlook {
            loading_percent: progress.map(percent),
            loading_eta_seconds: eta
                .filter(|_| progress < Some(1.0))
                .map(|s| s.ceil() as i32),
            silent: (quiet && answer.is_none()).then_some(error),
        }
    }
}

impl PodMemory {
    /// Takes in what it said; sets its phase.
    pub fn note(&mut self, seen: &mut Seen, now: Instant) {
        let restarts = restarts(&seen.pod);
        if restarts != self.restarts {
            *self = PodMemory {
                restarts,
                ..PodMemory::default()
            };
        }
        if seen.answer().is_some() || self.heard.is_none() {
            self.heard = Some(now);
        }
        // An operator that was just started recognises a replica that is loaded and leaving.
        let leaving = seen.answer().is_some_and(|a| a.draining);
        self.marked = match DeletionCost::is_marked(&seen.pod) {
            true => self.marked.or(Some(now)),
            false => None,
        };
        self.was_ready |= is_ready(&seen.pod) || leaving;
        seen.phase = observe::phase(&seen.pod, self.was_ready);
    }
}

/// What the policy is told.
pub(super) fn observation(
    seen: &[Seen],
    desired: u32,
    now: f64,
    queue: Option<Queue>,
) -> Observation {
    let replica = |seen: &Seen| {
        let (age_seconds, ready_seconds) = observe::ages(&seen.pod, now);
        Replica {
            id: seen.uid.clone(),
            phase: seen.phase,
            age_seconds,
            ready_seconds,
            sample: seen.sample().cloned(),
        }
    };
    Observation {
        now,
        desired_replicas: desired,
        replicas: seen.iter().map(replica).collect(),
        queue,
    }
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_ref());
    let server = |status: &&k8s_openapi::api::core::v1::ContainerStatus| {
        status.name == names::SERVER_CONTAINER
    };
    statuses
        .into_iter()
        .flatten()
        .find(server)
        .map_or(0, |status| status.restart_count)
}
