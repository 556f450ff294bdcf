//! Pods: made, started, drained, gone; and what they cost.

use stoker_autoscaler::{Dials, Phase};

use super::faults::Faults;
use super::view::{Gauge, ReplicaView};
use super::{Setup, alive};
use crate::flight::{Flight, Ledger};
use crate::random::Random;
use crate::replica::{Core, Device, Tally};

pub(super) struct Pod {
    pub id: u32,
    pub phase: Phase,
    pub created: f64,
    /// When it will be, or was.
    pub ready_at: f64,
    core: Option<Core>,
    dials: Dials,
    device: Device,
    tally: Tally,
    nonsense: bool,
    pub outstanding: u32,
    /// Prompt tokens not yet computed and tokens not yet generated of those.
    pub to_do: f64,
    /// Since when it has been out of rotation, to see whether the others can do without it.
    pub on_trial: Option<f64>,
    /// A pod that goes is there until then at least.
    gone_at: f64,
    /// Of an ordinary replica's requests; 0 for none while another is ready.
    pub weight: f64,
    /// Gauges of the last seconds, where they may be told late.
    past: Vec<Gauge>,
}

impl Pod {
    pub fn ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// When something happens in it.
    pub fn next(&self) -> f64 {
        match (&self.core, self.phase) {
            (_, Phase::Draining) if self.outstanding == 0 => self.gone_at,
            (Some(core), _) => core.next(),
            (None, Phase::Starting) => self.ready_at,
            _ => f64::INFINITY,
        }
    }

    /// Requests for its weight, had it one more.
    pub fn load(&self) -> f64 {
        f64::from(self.outstanding + 1) / self.weight.max(f64::MIN_POSITIVE)
    }

    /// Requests that a router sends here at most: the cap and a short buffer.
    pub fn slots(&self) -> u32 {
        let cap = self.dials.max_num_seqs;
        cap.saturating_add((cap / 8).max(1))
    }

    /// Takes a request in; false where its engine refuses it.
    pub fn send(&mut self, request: u32, ledger: &Ledger, now: f64) -> bool {
        let Some(core) = &mut self.core else {
            return false;
        };
        let sent = core.add(request, ledger, now);
        if sent {
            self.outstanding += 1;
            if let Some(flight) = ledger.get(request) {
                self.to_do += flight.tokens();
                self.tally.received(flight);
            }
        }
        sent
    }

    /// Gives up a request that has no token yet, of so many `tokens`.
    pub fn time_out(&mut self, request: u32, tokens: f64) {
        if let Some(core) = &mut self.core {
            core.abort(request);
            self.to_do -= tokens;
            self.tally.timed_out();
            self.outstanding = self.outstanding.saturating_sub(1);
        }
    }

    /// Ends the step in flight. Returns how many requests ended, and the sum of the seconds that they
    /// were here.
    pub fn advance(&mut self, ledger: &mut Ledger) -> (u32, f64) {
        let Some(core) = &mut self.core else {
            return (0, 0.0);
        };
        let progress = |tally: &Tally| (tally.prompt_tokens + tally.generation_tokens) as f64;
        let (before, served) = (progress(&self.tally), self.tally.served_seconds);
        let ended = core.advance(ledger, &mut self.tally);
        self.to_do -= progress(&self.tally) - before;
        self.outstanding = self.outstanding.saturating_sub(ended);
        (ended, self.tally.served_seconds - served)
    }

    pub fn set_dials(&mut self, dials: Dials) {
        if self.dials != dials {
            self.dials = dials;
            if let Some(core) = &mut self.core {
                core.set_dials(dials);
            }
        }
    }

    pub fn reset_counters(&mut self) {
        self.tally = Tally::new(self.device.profile.max_model_len);
    }

    fn gauge(&mut self, now: f64) -> Option<Gauge> {
        let core = self.core.as_ref()?;
        let gauges = core.gauges();
        self.tally.preemptions = core.preemptions();
        let profile = &self.device.profile;
        let mut gauge = Gauge {
            at: now,
            running: gauges.running,
            waiting: gauges.waiting,
            kv_tokens: gauges.kv_tokens,
            kv_capacity: profile.kv_capacity_tokens(),
            waiting_prompt_tokens: gauges.waiting_prompt_tokens,
            dials: self.dials,
            ceilings: Dials {
                max_num_seqs: profile.max_num_seqs,
                max_num_batched_tokens: profile.max_num_batched_tokens,
            },
            law: gauges.law,
            law_confidence: gauges.law_confidence,
            tally: self.tally,
        };
        if self.nonsense {
            gauge.law = gauge.law.slowed(f64::NAN);
            gauge.kv_capacity = 0;
            gauge.tally.ttft.sum = f64::NEG_INFINITY;
            gauge.tally.received = u64::MAX;
        }
        Some(gauge)
    }

    /// What a scrape tells, lost or late as the faults have it.
    pub fn seen(&mut self, now: f64, setup: &Setup, random: &mut Random) -> ReplicaView {
        let faults = setup.faults.as_slice();
        let mut gauge = self.gauge(now);
        if faults.ever_late() {
            self.past.extend(gauge);
            let lateness = faults.lateness(now);
            gauge = (self.past.iter().rev())
                .find(|past| past.at <= now - lateness)
                .copied();
            self.past.retain(|past| now - past.at <= 120.0);
        }
        let share = faults.lost_share(now);
        let lost = share > 0.0 && random.uniform() < share;
        ReplicaView {
            id: self.id,
            phase: self.phase,
            created: self.created,
            ready_at: if self.core.is_some() {
                self.ready_at
            } else {
                f64::INFINITY
            },
            gauge: gauge.filter(|_| !lost),
        }
    }

    /// Starts serving.
    pub fn start(&mut self, setup: &Setup) {
        let seed = Random::of(setup.seed, "noise").bits() ^ (u64::from(self.id) << 20);
        self.core = Some(Core::new(setup.backend, &self.device, self.dials, seed));
        self.phase = Phase::Ready;
    }
}

/// All pods of the service, and the nodes under them.
pub(super) struct Pods {
    pub list: Vec<Pod>,
    warm: u32,
    made: u32,
    /// When the last one that goes is gone at the soonest.
    last_gone: f64,
    /// Replica-seconds of pods that are gone.
    paid: f64,
}

impl Pods {
    pub fn new(setup: &Setup) -> Self {
        let mut pods = Pods {
            list: Vec::new(),
            warm: setup.starts.warm_nodes,
            made: 0,
            last_gone: 0.0,
            paid: 0.0,
        };
        for _ in 0..setup.replicas {
            pods.make(setup, setup.dials, 0.0);
        }
        // These were there before.
        pods.warm = setup.starts.warm_nodes;
        for pod in &mut pods.list {
            pod.ready_at = 0.0;
            pod.start(setup);
        }
        pods
    }

    fn make(&mut self, setup: &Setup, dials: Dials, now: f64) {
        let nth = self.made;
        self.made += 1;
        let slowness = setup.faults.slowness(nth);
        let mut pod = Pod {
            id: nth,
            phase: Phase::Unschedulable,
            created: now,
            ready_at: f64::INFINITY,
            core: None,
            dials,
            device: setup.device.slowed(slowness),
            tally: Tally::new(setup.device.profile.max_model_len),
            nonsense: setup.faults.nonsense(nth),
            outstanding: 0,
            to_do: 0.0,
            on_trial: None,
            gone_at: 0.0,
            weight: 1.0,
            past: Vec::new(),
        };
        schedule(&mut pod, &mut self.warm, setup, now);
        self.list.push(pod);
    }

    /// Finds nodes for the pods that have none.
    pub fn schedule(&mut self, setup: &Setup, now: f64) {
        for pod in &mut self.list {
            if pod.phase == Phase::Unschedulable {
                schedule(pod, &mut self.warm, setup, now);
            }
        }
    }

    /// The Deployment's controller.
    pub fn scale(&mut self, desired: u32, setup: &Setup, dials: Dials, now: f64) {
        loop {
            let alive = self.list.iter().filter(|p| alive(p.phase)).count() as u32;
            if alive < desired {
                self.make(setup, dials, now);
            } else if alive > desired {
                // Those that don't serve yet go first, then the one with the least to finish.
                let victims = self.list.iter_mut().filter(|p| alive_pod(p));
                let victim = victims.max_by_key(|p| {
                    let order = match p.phase {
                        Phase::Unschedulable => 2,
                        Phase::Starting => 1,
                        _ => 0,
                    };
                    let idle = std::cmp::Reverse(p.outstanding);
                    (order, p.on_trial.is_some(), idle, p.id)
                });
                match victim {
                    Some(pod) => {
                        if pod.ready() {
                            self.last_gone = self.last_gone.max(now) + setup.leave_seconds;
                            pod.gone_at = self.last_gone;
                        }
                        pod.phase = Phase::Draining;
                    }
                    None => return,
                }
            } else {
                break;
            }
        }
        self.bury(setup, now);
    }

    /// Lets pods go that have nothing to finish.
    pub fn bury(&mut self, setup: &Setup, now: f64) {
        let (paid, warm) = (&mut self.paid, &mut self.warm);
        self.list.retain(|pod| {
            let gone = pod.phase == Phase::Draining && pod.outstanding == 0 && pod.gone_at <= now;
            if gone {
                *paid += now - pod.created;
                if pod.ready_at.is_finite() {
                    *warm = (*warm + 1).min(setup.starts.warm_nodes);
                }
            }
            !gone
        });
    }

    /// A pod dies with all that is in it; its node stays.
    pub fn kill(&mut self, place: usize, setup: &Setup, now: f64) -> Option<u32> {
        if place >= self.list.len() {
            return None;
        }
        let pod = self.list.remove(place);
        self.paid += now - pod.created;
        self.warm = (self.warm + 1).min(setup.starts.warm_nodes);
        Some(pod.id)
    }

    pub fn get_mut(&mut self, id: u32) -> Option<&mut Pod> {
        let place = self.list.binary_search_by_key(&id, |pod| pod.id).ok()?;
        self.list.get_mut(place)
    }

    pub fn seconds(&self, now: f64) -> f64 {
        let living = self.list.iter().map(|pod| now - pod.created);
        self.paid + living.sum::<f64>()
    }
}

fn alive_pod(pod: &Pod) -> bool {
    alive(pod.phase)
}

fn schedule(pod: &mut Pod, warm: &mut u32, setup: &Setup, now: f64) {
    let starts = &setup.starts;
    let seconds = if *warm > 0 {
        *warm -= 1;
        starts.warm_seconds
    } else if setup.faults.nodes_from(now).is_none() {
        starts.cold_seconds
    } else {
        return;
    };
    pod.phase = Phase::Starting;
    pod.ready_at = now + seconds;
}

/// Whether a request that its replica lost can be sent again: nothing of it was delivered.
pub(super) fn untouched(flight: &Flight) -> bool {
    flight.first_token.is_nan()
}
