//! One service's tick.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use stoker_api::conditions::{self, types};
use stoker_api::{InferenceService, ScalingMode};
use stoker_autoscaler::{Decision, Dials, Memory, Phase, decide};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::board::{Outlook, bounds};
use super::keep::{Keeper, Place};
use super::observe::{self, is_ready, is_running};
use super::pods::{PodMemory, Seen, observation};
use super::settle::{Debounced, Lowering, ShownReason};
use super::step::{self, Standing, Step};
use super::{Fleet, Key};
use crate::actuate::{Candidate, DeletionCost, Pushed, Pusher, WireObjectives};
use crate::routing::Routing;
use crate::scrape::{Fetcher, Reading};

/// Seconds that a replica stays out of rotation before it goes, at most.
const LONGEST_PROOF: u64 = 15;
/// How often a stored memory is asked for, a tick each, before the service goes on without.
const RECALLS: u32 = 3;

/// What ticks act with.
pub struct Tools {
    pub fetcher: Fetcher,
    pub pusher: Pusher,
    pub deletion_cost: DeletionCost,
    pub keeper: Keeper,
    /// `None`: this installation has no routers.
    pub routing: Option<Arc<Routing>>,
}

/// What is remembered about a service from tick to tick.
#[derive(Default)]
pub struct Worker {
    memory: Option<Memory>,
    place: Place,
    recalls: u32,
    pods: HashMap<String, PodMemory>,
    reason: ShownReason,
    lowering: Lowering,
    objectives_met: Debounced<Option<bool>>,
}

impl Worker {
    /// One round. Gives the number of replicas to ask for next, and what there is to tell.
    pub async fn tick(
        &mut self,
        service: &InferenceService,
        pods: Vec<Arc<Pod>>,
        desired: u32,
        fleet: Fleet,
        tools: &Tools,
    ) -> (u32, Outlook) {
        let seen = self.look(service, pods, tools).await;
        let now = jiff::Timestamp::now().as_duration().as_secs_f64();
        let queue = tools.routing.as_ref().zip(Key::of(service));
        let queue = queue.and_then(|(routing, key)| routing.queue(&key));
        let observation = observation(&seen, desired, now, queue);
        let objectives = observe::objectives(&service.spec);
        let limits = observe::limits(&service.spec, bounds(service));
        let decision = {
            let memory = self.remember(service, desired, None);
            decide(&observation, &objectives, &limits, memory)
        };
        metrics::counter!("stoker_operator_decisions_total",
            "reason" => format!("{:?}", decision.reason.code))
        .increment(1);
        let wire = WireObjectives::from(&objectives);
        let recommends = service.spec.scaling.mode == ScalingMode::Recommend;
        self.push(&seen, (!recommends).then_some(&decision), wire, tools)
            .await;
        // What is recommended is told, and what the spec says is done.
        let asked = if recommends {
            bounds(service).0
        } else {
            decision.replicas
        };
        let next = self.step(service, &seen, desired, fleet, asked, tools);
        let next = next.await;
        if next != desired {
            info!(from = desired, to = next, reason = ?decision.reason.code, "replicas");
        }
        let mut outlook = self.outlook(&seen, &decision, desired, objectives.good_percent);
        if recommends {
            recommend(&mut outlook, &decision, &seen);
        }
        (next, outlook)
    }

    /// At first, takes up what an operator before this one has learnt. False: whether there is
    /// something isn't known yet, and nothing should be decided.
    pub async fn recall(
        &mut self,
        service: &InferenceService,
        desired: u32,
        keeper: &Keeper,
    ) -> bool {
        if self.memory.is_some() {
            return true;
        }
        let stored = match keeper.read(&mut self.place, service).await {
            Ok(stored) => stored,
            Err(error) => {
                self.recalls += 1;
                warn!(%error, "could not read the scaling memory");
                if self.recalls < RECALLS {
                    return false;
                }
                None
            }
        };
        if stored.is_some() {
            info!("goes on with the scaling memory of the operator before");
        }
        self.remember(service, desired, stored);
        true
    }

    /// Stores what has been learnt, now and then.
    pub async fn keep(&mut self, service: &InferenceService, keeper: &Keeper) {
        if let Some(memory) = &self.memory {
            keeper.write(&mut self.place, service, memory).await;
        }
    }

    /// At first, what was stored, or else what the status tells: an operator that was restarted
    /// neither resets dials nor scales down before it has watched for a while, nor forgets whether
    /// objectives were met.
    fn remember(
        &mut self,
        service: &InferenceService,
        desired: u32,
        stored: Option<Memory>,
    ) -> &mut Memory {
        let status = service.status.as_ref();
        if self.memory.is_none() {
            let conditions = status.map_or(&[][..], |status| &status.conditions);
            let met = conditions::find(conditions, types::OBJECTIVES_MET);
            self.objectives_met = Debounced::new(met.and_then(|met| match met.status.as_str() {
                "True" => Some(true),
                "False" => Some(false),
                _ => None,
            }));
        }
        self.memory.get_or_insert_with(|| {
            let dials = status.and_then(|s| s.dials).and_then(dials);
            match stored {
                Some(memory) => memory.restored(desired, dials),
                None => {
                    let now = jiff::Timestamp::now().as_duration().as_secs_f64();
                    Memory::seeded(desired, dials, now)
                }
            }
        })
    }

    /// Scrapes all pods that have an address, not-ready ones too: they tell how far loading is.
    async fn look(
        &mut self,
        service: &InferenceService,
        pods: Vec<Arc<Pod>>,
        tools: &Tools,
    ) -> Vec<Seen> {
        let name = service.name_any();
        let ours = pods
            .into_iter()
            .filter(|pod| observe::is_replica(pod, &name) && !observe::is_finished(pod));
        let mut seen = join_all(ours.map(|pod| async move {
            let address = pod.status.as_ref().and_then(|s| s.pod_ip.as_deref());
            let address: Option<IpAddr> = address.and_then(|ip| ip.parse().ok());
            let reading = match address.filter(|_| is_running(&pod)) {
                Some(ip) => Some(tools.fetcher.fetch(ip).await),
                None => None,
            };
            Seen {
                uid: pod.uid().unwrap_or_default(),
                address,
                phase: Phase::Starting,
                reading,
                pod,
            }
        }))
        .await;
        self.pods
            .retain(|uid, _| seen.iter().any(|s| s.uid == *uid));
        let now = Instant::now();
        for pod in &mut seen {
            let memory = self.pods.entry(pod.uid.clone()).or_default();
            memory.note(pod, now);
            let result = match &pod.reading {
                Some(Ok(_)) => "ok",
                Some(Err(error)) => {
                    debug!(pod = pod.pod.name_any(), %error, "scrape failed");
                    "error"
                }
                None => continue,
            };
            metrics::counter!("stoker_operator_scrapes_total", "result" => result).increment(1);
        }
        seen
    }

    /// Tells each replica its dials and objectives where they differ from what it has; without a
    /// decision its dials stay.
    async fn push(
        &mut self,
        seen: &[Seen],
        decision: Option<&Decision>,
        objectives: WireObjectives,
        tools: &Tools,
    ) {
        let mut due = Vec::new();
        for pod in seen {
            let (Some(address), Some(sample)) = (pod.address, pod.sample()) else {
                continue;
            };
            let loaded = pod.answer().is_some_and(Reading::loaded);
            if pod.phase == Phase::Draining || !loaded {
                continue;
            }
            let dials = match decision {
                Some(decision) => *(decision.overrides.get(&pod.uid)).unwrap_or(&decision.dials),
                None => sample.dials,
            };
            let wanted = Pushed {
                dials: within(dials, sample.ceilings),
                objectives,
            };
            let pushed = self.pods.get(&pod.uid).and_then(|memory| memory.pushed);
            if sample.dials != wanted.dials || pushed.map(|p| p.objectives) != Some(objectives) {
                due.push((pod, address, wanted));
            }
        }
        let pushes = due.iter().map(|(pod, address, wanted)| async move {
            tools.pusher.push(*address, &pod.uid, *wanted).await
        });
        let results = join_all(pushes).await;
        for ((pod, _, wanted), result) in due.into_iter().zip(results) {
            let Some(memory) = self.pods.get_mut(&pod.uid) else {
                continue;
            };
            let name = pod.pod.name_any();
            let outcome = match result {
                Ok(()) => {
                    debug!(pod = name, dials = ?wanted.dials, "pushed limits");
                    memory.pushed = Some(wanted);
                    memory.push_failing = false;
                    "ok"
                }
                Err(error) => {
                    // Tried again every tick; told once.
                    if !std::mem::replace(&mut memory.push_failing, true) {
                        warn!(pod = name, %error, "could not push limits");
                    }
                    memory.pushed = None;
                    "error"
                }
            };
            metrics::counter!("stoker_operator_pushes_total", "result" => outcome).increment(1);
        }
    }

    async fn step(
        &self,
        service: &InferenceService,
        seen: &[Seen],
        desired: u32,
        fleet: Fleet,
        asked: u32,
        tools: &Tools,
    ) -> u32 {
        let standing = self.standing(seen);
        let proof = match tools.routing {
            Some(_) => proof_seconds(service),
            None => 0,
        };
        let step = step::next(desired, asked, fleet, &standing, proof);
        let Some(Key { namespace, .. }) = Key::of(service) else {
            return desired;
        };
        let marked = match &step {
            Step::Mark(victim) => Some(victim.uid.as_str()),
            // The marked pod is about to go.
            Step::To(n) if *n < desired => return *n,
            _ => None,
        };
        for pod in &standing.ready {
            let wanted = marked == Some(pod.uid.as_str());
            // While fewer are wanted, a mark stays until its pod is gone.
            let marked = pod.marked_seconds.is_some();
            if marked == wanted || (marked && asked < desired) {
                continue;
            }
            let cost = &tools.deletion_cost;
            let marking = cost.set(&namespace, &pod.name, &pod.uid, wanted).await;
            if let Err(error) = marking {
                warn!(pod = pod.name, %error, "could not mark the pod that goes first");
            }
        }
        match step {
            Step::To(n) => n,
            Step::Mark(_) | Step::Stay => desired,
        }
    }

    fn standing(&self, seen: &[Seen]) -> Standing {
        let mut standing = Standing::default();
        let now = jiff::Timestamp::now().as_duration().as_secs_f64();
        for pod in seen {
            if pod.pod.metadata.deletion_timestamp.is_some() {
                standing.terminating += 1;
            } else if is_ready(&pod.pod) {
                let marked = self.pods.get(&pod.uid).and_then(|memory| memory.marked);
                standing.ready.push(Candidate {
                    uid: pod.uid.clone(),
                    name: pod.pod.name_any(),
                    marked_seconds: marked.map(|at| at.elapsed().as_secs()),
                    requests: pod.sample().map(|s| s.running.saturating_add(s.waiting)),
                    ready_seconds: observe::ages(&pod.pod, now).1 as u64,
                });
            } else {
                standing.not_ready += 1;
            }
        }
        standing
    }

    fn outlook(&mut self, seen: &[Seen], decision: &Decision, desired: u32, goal: f64) -> Outlook {
        let now = Instant::now();
        let good = decision.load.and_then(|load| load.good_percent);
        let met = good.map(|percent| percent >= goal);
        let ceiling = seen.iter().filter_map(Seen::sample).map(|s| s.ceilings);
        let reason = self.lowering.reason(decision, desired);
        let law = seen.iter().filter_map(Seen::sample);
        let law = law.max_by(|a, b| a.law_confidence.total_cmp(&b.law_confidence));
        Outlook {
            dials: Some(ceiling.fold(decision.dials, within)),
            load: decision.load,
            law: law.map(|sample| (sample.law, sample.law_confidence)),
            reason: self.reason.update(reason, now),
            objectives_met: self.objectives_met.update(met, now),
            pods: seen
                .iter()
                .map(|pod| (pod.uid.clone(), pod.outlook(self.pods.get(&pod.uid), now)))
                .collect(),
            weights: decision.weights.clone(),
        }
    }
}

/// Tells what would be done, and the dials that are in force.
fn recommend(outlook: &mut Outlook, decision: &Decision, seen: &[Seen]) {
    let Dials {
        max_num_seqs,
        max_num_batched_tokens,
    } = decision.dials;
    outlook.weights.clear();
    let mut in_force = seen.iter().filter_map(Seen::sample).map(|s| s.dials);
    outlook.dials = in_force.next_back();
    if let Some(reason) = &mut outlook.reason {
        reason.message = format!(
            "Recommended: {} replicas, cap {max_num_seqs}, budget {max_num_batched_tokens}. {}",
            decision.replicas, reason.message
        );
    }
}

/// How long a replica is out of rotation before it goes: long enough for misses to show, in
/// proportion to the pace that the owner set.
fn proof_seconds(service: &InferenceService) -> u64 {
    let stabilization = service.spec.scaling.scale_down_stabilization_seconds;
    u64::try_from(stabilization / 2)
        .unwrap_or(0)
        .min(LONGEST_PROOF)
}

fn within(dials: Dials, ceilings: Dials) -> Dials {
    // A ceiling of 0 is one that isn't known yet.
    let cut = |dial: u32, ceiling: u32| {
        if ceiling == 0 {
            dial
        } else {
            dial.min(ceiling)
        }
    };
    Dials {
        max_num_seqs: cut(dials.max_num_seqs, ceilings.max_num_seqs),
        max_num_batched_tokens: cut(
            dials.max_num_batched_tokens,
            ceilings.max_num_batched_tokens,
        ),
    }
}

fn dials(status: stoker_api::DialsStatus) -> Option<Dials> {
    let positive = |n: i32| u32::try_from(n).ok().filter(|n| *n > 0);
    Some(Dials {
        max_num_seqs: positive(status.max_num_seqs)?,
        max_num_batched_tokens: positive(status.max_num_batched_tokens)?,
    })
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
