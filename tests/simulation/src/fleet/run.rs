//! The loop over events.

use std::collections::VecDeque;

use stoker_autoscaler::{Dials, Phase};

use super::faults::{Fault, Faults};
use super::pods::{Pods, untouched};
use super::routing::Connection;
use super::view::View;
use super::{Action, Policy, Routing, Setup, TAIL};
use crate::flight::{Ledger, State};
use crate::random::Random;
use crate::score::Score;
use crate::trace::Trace;

/// Seconds between two points of the timeline.
const GRAIN: f64 = 10.0;

/// The fleet at one moment.
#[derive(Clone, Debug)]
pub struct Point {
    pub t: f64,
    pub desired: u32,
    pub ready: u32,
    /// Pods that exist, on their way and draining ones included.
    pub pods: u32,
    pub dials: Dials,
    pub running: u32,
    pub waiting: u32,
    /// Of the last change since the point before, or else of the moment.
    pub reason: Option<String>,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub score: Score,
    pub timeline: Vec<Point>,
    pub ledger: Ledger,
}

/// Runs a trace through a fleet that a policy governs. The same arguments give the same outcome.
pub fn simulate(setup: &Setup, trace: &Trace, policy: &mut dyn Policy) -> Outcome {
    let mut fleet = Fleet::new(setup, trace);
    fleet.run(policy);
    let Fleet {
        ledger,
        timeline,
        hours,
        changes,
        reversals,
        ..
    } = fleet;
    Outcome {
        score: Score::new(&ledger, hours, changes, reversals),
        timeline,
        ledger,
    }
}

pub(super) struct Fleet<'a> {
    pub setup: &'a Setup,
    duration: f64,
    pub now: f64,
    pub ledger: Ledger,
    pub pods: Pods,
    /// When something happens in each pod, in the list's order.
    next: Vec<f64>,
    pub next_arrival: usize,
    /// The first request that may still time out.
    next_timeout: usize,
    /// What waits in front of the replicas, in order.
    pub held: VecDeque<u32>,
    /// Requests that were sent or are held and aren't done with.
    pub open: u32,
    pub connections: Vec<Connection>,
    pub turn: usize,
    /// How long an answer takes its replica, as a router learns it; 0 before the first one.
    pub duration_of_answers: f64,
    pub desired: u32,
    dials: Dials,
    pub random: Random,
    timeline: Vec<Point>,
    hours: f64,
    changes: u32,
    reversals: u32,
    /// Whether the last change was upwards.
    direction: Option<bool>,
    /// Why the last change was made, until it is noted.
    changed: Option<String>,
}

impl<'a> Fleet<'a> {
    fn new(setup: &'a Setup, trace: &Trace) -> Self {
        let pods = Pods::new(setup);
        let mut fleet = Fleet {
            setup,
            duration: trace.duration,
            now: 0.0,
            ledger: Ledger::new(trace, setup.goals),
            next: Vec::new(),
            pods,
            next_arrival: 0,
            next_timeout: 0,
            held: VecDeque::new(),
            open: 0,
            connections: Vec::new(),
            turn: 0,
            duration_of_answers: 0.0,
            desired: setup.replicas,
            dials: setup.dials,
            random: Random::of(setup.seed, "fleet"),
            timeline: Vec::new(),
            hours: 0.0,
            changes: 0,
            reversals: 0,
            direction: None,
            changed: None,
        };
        fleet.refresh();
        fleet
    }

    fn run(&mut self, policy: &mut dyn Policy) {
        let end = self.duration + TAIL;
        let period = policy.period().max(0.1);
        let restarts = self.setup.faults.restarts();
        let mut tick: f64 = 0.0;
        let mut point: f64 = 0.0;
        let mut restart = restarts.unwrap_or(f64::INFINITY);
        let mut faults: Vec<&Fault> = (self.setup.faults.iter())
            .filter(|f| matches!(f, Fault::Dies { .. } | Fault::CountersReset { .. }))
            .collect();
        faults.sort_by(|a, b| moment(b).total_cmp(&moment(a)));
        loop {
            let (place, step) =
                (self.next.iter().enumerate()).fold((0, f64::INFINITY), |best, (place, &t)| {
                    if t < best.1 { (place, t) } else { best }
                });
            let arrival = (self.ledger.flights.get(self.next_arrival))
                .map_or(f64::INFINITY, |flight| flight.arrival);
            let timeout = self.timeout();
            let late = self.patience();
            let fault = faults.last().map_or(f64::INFINITY, |fault| moment(fault));
            let other = arrival.min(timeout).min(fault).min(late);
            let ticks = tick.min(point).min(restart);
            let now = step.min(other).min(ticks);
            if now >= end && self.settled(now) {
                break;
            }
            self.now = now;
            // Pods first, so that whoever looks at this moment sees what is done by then.
            if step <= other && step <= ticks {
                self.advance(place);
            } else if arrival <= timeout.min(fault).min(late).min(ticks) {
                let request = self.next_arrival as u32;
                self.next_arrival += 1;
                self.route(request);
            } else if late <= timeout.min(fault).min(ticks) {
                self.refuse_late();
            } else if timeout <= fault.min(ticks) {
                self.time_out();
            } else if fault <= ticks {
                if let Some(fault) = faults.pop() {
                    self.suffer(fault);
                }
            } else if restart <= tick.min(point) {
                policy.restart();
                restart += restarts.unwrap_or(f64::INFINITY);
            } else if tick <= point {
                tick += period;
                if now < end {
                    self.decide(policy);
                }
            } else {
                self.note(policy);
                point += GRAIN;
            }
        }
        if self.hours == 0.0 {
            self.hours = self.pods.seconds(end) / 3600.0;
        }
    }

    /// At the end: counts the cost once; true when all requests are done with.
    fn settled(&mut self, now: f64) -> bool {
        if self.hours == 0.0 {
            self.hours = self.pods.seconds(self.duration + TAIL) / 3600.0;
        }
        now > self.duration + 1200.0 || self.open == 0
    }

    fn refresh(&mut self) {
        self.next.clear();
        self.next
            .extend(self.pods.list.iter().map(|pod| pod.next()));
    }

    pub(super) fn refresh_one(&mut self, place: usize) {
        if let (Some(next), Some(pod)) = (self.next.get_mut(place), self.pods.list.get(place)) {
            *next = pod.next();
        }
    }

    fn advance(&mut self, place: usize) {
        let Some(pod) = self.pods.list.get_mut(place) else {
            return;
        };
        if pod.phase == Phase::Starting {
            pod.start(self.setup);
            self.refresh_one(place);
            if self.setup.routing == Routing::Router {
                self.pump();
            } else {
                for request in std::mem::take(&mut self.held) {
                    self.route(request);
                }
            }
            return;
        }
        let leaves = pod.phase == Phase::Draining;
        let mut ended = 0;
        if !leaves || pod.outstanding > 0 {
            let seconds;
            (ended, seconds) = pod.advance(&mut self.ledger);
            self.open -= ended;
            if ended > 0 {
                self.learn_duration(seconds / f64::from(ended));
            }
        }
        let empty = (self.pods.list.get(place)).is_some_and(|pod| pod.outstanding == 0);
        if leaves && empty {
            self.pods.bury(self.setup, self.now);
            self.pods.schedule(self.setup, self.now);
            self.refresh();
        } else {
            self.refresh_one(place);
        }
        if ended > 0 {
            self.pump();
        }
    }

    /// When the next client loses patience.
    fn timeout(&mut self) -> f64 {
        while let Some(flight) = self.ledger.flights.get(self.next_timeout) {
            let waits = matches!(flight.state, State::Held | State::Sent(_));
            if flight.state == State::Ahead {
                return f64::INFINITY;
            }
            if waits && flight.first_token.is_nan() {
                return flight.arrival + self.setup.goals.timeout;
            }
            self.next_timeout += 1;
        }
        f64::INFINITY
    }

    fn time_out(&mut self) {
        let request = self.next_timeout as u32;
        self.next_timeout += 1;
        let Some(flight) = self.ledger.get_mut(request) else {
            return;
        };
        let tokens = flight.tokens();
        let state = std::mem::replace(&mut flight.state, State::TimedOut);
        self.open -= 1;
        match state {
            State::Sent(id) => {
                if let Some(pod) = self.pods.get_mut(id) {
                    pod.time_out(request, tokens);
                }
                self.pods.bury(self.setup, self.now);
                self.refresh();
                self.pump();
            }
            _ => self.held.retain(|held| *held != request),
        }
    }

    fn suffer(&mut self, fault: &Fault) {
        match fault {
            Fault::CountersReset { .. } => {
                for pod in &mut self.pods.list {
                    pod.reset_counters();
                }
            }
            Fault::Dies { .. } => {
                let ready = (self.pods.list.iter().enumerate()).filter(|(_, pod)| pod.ready());
                let ready: Vec<usize> = ready.map(|(place, _)| place).collect();
                let Some(&place) = ready.get(self.random.below(ready.len())) else {
                    return;
                };
                let Some(id) = self.pods.kill(place, self.setup, self.now) else {
                    return;
                };
                self.pods
                    .scale(self.desired, self.setup, self.dials, self.now);
                self.refresh();
                let lost = (self.ledger.flights.iter_mut().enumerate())
                    .filter(|(_, flight)| flight.state == State::Sent(id));
                let mut again = Vec::new();
                for (request, flight) in lost {
                    flight.state = State::Failed;
                    self.open -= 1;
                    if untouched(flight) {
                        again.push(request as u32);
                    }
                }
                for request in again {
                    self.route(request);
                }
            }
            _ => {}
        }
    }

    fn view(&mut self) -> View {
        let queue = self.queue();
        let (now, setup, random) = (self.now, self.setup, &mut self.random);
        let pods = self.pods.list.iter_mut();
        View {
            now,
            desired: self.desired,
            dials: self.dials,
            min_replicas: setup.min_replicas,
            max_replicas: setup.max_replicas,
            held: self.held.len() as u32,
            queue,
            replicas: pods.map(|pod| pod.seen(now, setup, random)).collect(),
        }
    }

    fn decide(&mut self, policy: &mut dyn Policy) {
        self.pods.schedule(self.setup, self.now);
        let view = self.view();
        let Action {
            replicas,
            dials,
            overrides,
            weights,
        } = policy.decide(&view);
        if dials != self.dials {
            self.changed = policy.reason();
        }
        self.dials = dials;
        let (min, max) = (self.setup.min_replicas, self.setup.max_replicas);
        let mut replicas = self.after_trial(replicas.clamp(min, max));
        for pod in &mut self.pods.list {
            let own = overrides.iter().find(|(id, _)| *id == pod.id);
            pod.set_dials(own.map_or(dials, |(_, dials)| *dials));
            let weight = weights.iter().find(|(id, _)| *id == pod.id);
            pod.weight = match pod.on_trial {
                Some(_) => 0.0,
                None => weight.map_or(1.0, |(_, weight)| *weight),
            };
        }
        if self.now < self.setup.settling {
            replicas = replicas.max(self.desired);
        }
        if replicas != self.desired && !self.setup.faults.writes_refused(self.now) {
            let upwards = replicas > self.desired;
            self.changes += 1;
            self.reversals += u32::from(self.direction.is_some_and(|before| before != upwards));
            self.direction = Some(upwards);
            self.desired = replicas;
            self.changed = policy.reason();
            self.pods.scale(replicas, self.setup, dials, self.now);
        }
        self.refresh();
        self.pump();
    }

    fn note(&mut self, policy: &dyn Policy) {
        if self.now > self.duration + TAIL {
            return;
        }
        let (mut running, mut waiting) = (0, self.held.len() as u32);
        for pod in &self.pods.list {
            let cap = self.dials.max_num_seqs;
            running += pod.outstanding.min(cap);
            waiting += pod.outstanding.saturating_sub(cap);
        }
        self.timeline.push(Point {
            t: self.now,
            desired: self.desired,
            ready: self.pods.list.iter().filter(|pod| pod.ready()).count() as u32,
            pods: self.pods.list.len() as u32,
            dials: self.dials,
            running,
            waiting,
            reason: self.changed.take().or_else(|| policy.reason()),
        });
    }
}

fn moment(fault: &Fault) -> f64 {
    match fault {
        Fault::Dies { at } | Fault::CountersReset { at } => *at,
        _ => f64::INFINITY,
    }
}
