//! A Deployment, a cluster with so many accelerators, clients, and an operator that calls
//! `decide()` every 2 s.

use stoker_autoscaler::{
    Decision, DialRange, Dials, ItlOf, Limits, Memory, Objectives, Observation, Phase,
    Replica as Pod, Sample, decide,
};
use stoker_law::Law;

use crate::replica::{Replica, Request};

pub const PERIOD: f64 = 2.0;
const SLICE: f64 = 0.02;

pub fn t4() -> Law {
    Law {
        base: 28.45e-3,
        per_kv_token: 0.36e-6,
        per_token: 0.27e-3,
        per_sequence: 0.17e-3,
        hidden: 1.0,
    }
}

pub fn h100() -> Law {
    Law {
        base: 2.37e-3,
        per_kv_token: 50e-9,
        per_token: 9e-6,
        per_sequence: 10e-6,
        hidden: 0.85,
    }
}

pub fn objectives() -> Objectives {
    Objectives {
        good_percent: 99.0,
        ttft_seconds: 2.0,
        ttft_free_prompt_tokens: 1000.0,
        ttft_seconds_per_prompt_token: 1e-3,
        itl_seconds: 0.1,
        itl_of: ItlOf::Mean,
    }
}

pub fn limits(max_replicas: u32, stabilization: f64) -> Limits {
    Limits {
        min_replicas: 1,
        idle_seconds: 0.0,
        max_replicas,
        max_num_seqs: DialRange {
            min: 1,
            max: 256,
            initial: 8,
        },
        max_num_batched_tokens: DialRange {
            min: 64,
            max: 8192,
            initial: 2048,
        },
        scale_down_stabilization_seconds: stabilization,
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub enum Clients {
    /// Requests a second, come what may.
    Open(f64),
    /// So many that ask again when they are answered.
    Closed(usize),
}

/// Lengths: fixed, or exponentially distributed around these means.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    pub prompt: f64,
    pub output: f64,
    pub random: bool,
}

/// A decision with what was around it.
#[derive(Clone, Debug)]
pub struct Moment {
    pub ready: u32,
    pub unschedulable: u32,
    pub decision: Decision,
}

/// Says of a time and a replica whether the scrape is lost.
pub type Losses = Box<dyn Fn(f64, &str) -> bool>;

pub struct Fleet {
    pub t: f64,
    pub law: Law,
    pub kv_capacity: u64,
    pub ceilings: Dials,
    pub limits: Limits,
    pub objectives: Objectives,
    pub lengths: Lengths,
    pub start_seconds: f64,
    pub accelerators: u32,
    pub memory: Memory,
    pub replicas: Vec<Replica>,
    pub desired: u32,
    pub history: Vec<Moment>,
    pub lost: Losses,
    next_decision: f64,
    next_arrival: f64,
    clients: usize,
    created: u32,
    random: u64,
}

impl Fleet {
    pub fn new(law: Law, kv_capacity: u64, limits: Limits, lengths: Lengths) -> Self {
        let start = 1_700_000_000.0;
        let mut fleet = Fleet {
            t: start,
            law,
            kv_capacity,
            ceilings: Dials {
                max_num_seqs: 1024,
                max_num_batched_tokens: 8192,
            },
            limits,
            objectives: objectives(),
            lengths,
            start_seconds: 20.0,
            accelerators: u32::MAX,
            memory: Memory::default(),
            replicas: Vec::new(),
            desired: limits.min_replicas,
            history: Vec::new(),
            lost: Box::new(|_, _| false),
            next_decision: start,
            next_arrival: start,
            clients: 0,
            created: 0,
            random: 0x9E37_79B9_7F4A_7C15,
        };
        fleet.reconcile();
        for replica in &mut fleet.replicas {
            replica.scheduled = Some(start);
            replica.ready = Some(start);
        }
        fleet
    }

    pub fn on_t4(max_replicas: u32, stabilization: f64, lengths: Lengths) -> Self {
        Fleet::new(t4(), 69_754, limits(max_replicas, stabilization), lengths)
    }

    /// Lets time pass; `clients` is asked every slice.
    pub fn run(&mut self, seconds: f64, clients: impl Fn(f64) -> Clients) {
        let start = self.t;
        while self.t < start + seconds {
            self.t += SLICE;
            self.pods();
            self.arrive(clients(self.t - start));
            let (t, objectives) = (self.t, self.objectives);
            for replica in &mut self.replicas {
                let ended = replica.run(t, &objectives);
                self.clients = self.clients.saturating_sub(ended);
            }
            self.replicas
                .retain(|r| !(r.draining && r.outstanding() == 0));
            if self.t >= self.next_decision {
                self.next_decision += PERIOD;
                self.decide();
            }
        }
    }

    fn uniform(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn request(&mut self) -> Request {
        let (lengths, arrival) = (self.lengths, self.t);
        let mut length = |mean: f64, random: bool| {
            let factor = if random { -self.uniform().ln() } else { 1.0 };
            (mean * factor).clamp(1.0, 16_000.0) as u32
        };
        Request {
            prompt: length(lengths.prompt, lengths.random),
            output: length(lengths.output, lengths.random),
            arrival,
        }
    }

    fn arrive(&mut self, clients: Clients) {
        match clients {
            Clients::Closed(wanted) => {
                while self.clients < wanted && self.send() {
                    self.clients += 1;
                }
            }
            Clients::Open(rate) => {
                self.next_arrival = self.next_arrival.max(self.t - SLICE);
                while rate > 0.0 && self.next_arrival <= self.t && self.send() {
                    self.next_arrival -= self.uniform().ln() / rate;
                }
            }
        }
    }

    /// To the ready replica with the least outstanding requests.
    fn send(&mut self) -> bool {
        let request = self.request();
        let ready = (self.replicas.iter_mut()).filter(|r| r.ready.is_some() && !r.draining);
        match ready.min_by_key(|r| r.outstanding()) {
            Some(replica) => {
                replica.receive(request);
                true
            }
            None => false,
        }
    }

    /// Scheduler and kubelet.
    fn pods(&mut self) {
        let used = self
            .replicas
            .iter()
            .filter(|r| r.scheduled.is_some())
            .count();
        let mut free = (self.accelerators as usize).saturating_sub(used);
        for replica in &mut self.replicas {
            if replica.scheduled.is_none() && free > 0 {
                free -= 1;
                replica.scheduled = Some(self.t);
            }
            if replica.ready.is_none()
                && (replica.scheduled).is_some_and(|at| self.t - at >= self.start_seconds)
            {
                replica.ready = Some(self.t);
            }
        }
    }

    /// Deployment controller: pods without a node go first, then the youngest.
    fn reconcile(&mut self) {
        loop {
            let alive = self.replicas.iter().filter(|r| !r.draining).count() as u32;
            if alive < self.desired {
                self.created += 1;
                let id = format!("pod-{}", self.created);
                let (t, law) = (self.t, self.law);
                let pod = Replica::new(id, t, law, self.kv_capacity, self.ceilings);
                self.replicas.push(pod);
            } else if alive > self.desired {
                let rank = |r: &Replica| (r.scheduled.is_none(), r.ready.is_none());
                let last = (self.replicas.iter_mut().filter(|r| !r.draining))
                    .enumerate()
                    .max_by_key(|(i, r)| (rank(r), *i));
                if let Some((_, replica)) = last {
                    replica.draining = true;
                }
            } else {
                break;
            }
        }
    }

    pub fn observe(&self) -> Observation {
        let pods = self.replicas.iter().map(|replica| {
            let phase = match (replica.draining, replica.scheduled, replica.ready) {
                (true, ..) => Phase::Draining,
                (_, None, _) => Phase::Unschedulable,
                (_, _, None) => Phase::Starting,
                _ => Phase::Ready,
            };
            let heard = replica.ready.is_some() && !(self.lost)(self.t, &replica.id);
            Pod {
                id: replica.id.clone(),
                phase,
                age_seconds: self.t - replica.created,
                ready_seconds: replica.ready.map_or(0.0, |at| self.t - at),
                sample: heard.then(|| Sample {
                    at: self.t - 0.3,
                    running: replica.running(),
                    waiting: replica.waiting(),
                    waiting_prompt_tokens: replica.waiting_prompt_tokens(),
                    kv_tokens: replica.kv_tokens(),
                    kv_capacity_tokens: replica.kv_capacity,
                    dials: replica.dials,
                    ceilings: replica.ceilings,
                    law: replica.told_law,
                    law_confidence: 0.9,
                    counters: replica.counters.clone(),
                }),
            }
        });
        Observation {
            queue: None,
            now: self.t,
            desired_replicas: self.desired,
            replicas: pods.collect(),
        }
    }

    fn decide(&mut self) {
        let observation = self.observe();
        let decision = decide(
            &observation,
            &self.objectives,
            &self.limits,
            &mut self.memory,
        );
        within(&decision, &self.limits);
        for replica in self.replicas.iter_mut().filter(|r| r.ready.is_some()) {
            replica.dials = *(decision.overrides.get(&replica.id)).unwrap_or(&decision.dials);
        }
        self.desired = decision.replicas;
        self.reconcile();
        let phase = |p: Phase| observation.replicas.iter().filter(|r| r.phase == p).count() as u32;
        self.history.push(Moment {
            ready: phase(Phase::Ready),
            unschedulable: phase(Phase::Unschedulable),
            decision,
        });
    }

    pub fn last(&self) -> &Moment {
        &self.history[self.history.len() - 1]
    }

    /// Good and all requests that ended since the fleet began; those of replicas that are gone
    /// aren't counted.
    pub fn judged(&self) -> (f64, f64) {
        let counters = self.replicas.iter().map(|r| &r.counters);
        counters.fold((0.0, 0.0), |(good, all), c| {
            (good + c.all_met, all + c.all_met + c.all_missed)
        })
    }

    /// Times that the number of replicas turned from growing to shrinking or back.
    pub fn reversals(&self) -> usize {
        turns(self.history.iter().map(|m| m.decision.replicas))
    }

    pub fn moves(&self, of: impl Fn(Dials) -> u32) -> usize {
        let values: Vec<u32> = self.history.iter().map(|m| of(m.decision.dials)).collect();
        values.windows(2).filter(|w| w[0] != w[1]).count()
    }
}

pub fn turns(values: impl Iterator<Item = u32>) -> usize {
    let values: Vec<u32> = values.collect();
    let mut directions: Vec<bool> = (values.windows(2))
        .filter(|w| w[0] != w[1])
        .map(|w| w[1] > w[0])
        .collect();
    directions.dedup();
    directions.len().saturating_sub(1)
}

/// The limits hold.
pub fn within(decision: &Decision, limits: &Limits) {
    let replicas = limits.min_replicas..=limits.max_replicas;
    assert!(replicas.contains(&decision.replicas), "{decision:?}");
    let caps = limits.max_num_seqs.min..=limits.max_num_seqs.max;
    let budgets = limits.max_num_batched_tokens.min..=limits.max_num_batched_tokens.max;
    for dials in decision.overrides.values().chain([&decision.dials]) {
        assert!(caps.contains(&dials.max_num_seqs), "{decision:?}");
        assert!(
            budgets.contains(&dials.max_num_batched_tokens),
            "{decision:?}"
        );
    }
}
