//! One sentence with its numbers, for a person who was woken up.

use crate::Scene;
use crate::decision::{Reason, ReasonCode};
use crate::demand::Demand;
use crate::model::Capacity;
use crate::need::Need;
use crate::observation::Dials;
use crate::replicas::Plan;

/// What a sentence may be about.
pub(crate) struct Facts<'a> {
    pub scene: &'a Scene<'a>,
    pub capacity: Option<Capacity>,
    pub need: Need,
    pub derating: f64,
    pub dials: Dials,
    /// The dials before, where they moved.
    pub moved_from: Option<Dials>,
    /// No dials keep the inter-token objective: seconds of the smallest step, and the objective.
    pub hopeless: Option<(f64, f64)>,
    /// Replicas that can't keep the objectives, while others can.
    pub too_slow: u32,
    /// Budget that one replica is tried with.
    pub tried: Option<u32>,
}

/// Seconds by which samples may be behind without a word.
const BEHIND: f64 = 10.0;

impl Facts<'_> {
    /// Nothing is known of the load.
    pub fn no_data(&self) -> Reason {
        let census = &self.scene.census;
        if census.ready() == 0 && census.unschedulable > 0 {
            let message = format!(
                "No replica is ready: {} without a node that has room for it, {} starting.",
                replicas(census.unschedulable),
                census.starting
            );
            return reason(ReasonCode::WaitingForAccelerator, message);
        }
        let message = if census.ready() == 0 {
            format!("No replica is ready yet: {} starting.", census.starting)
        } else if census.heard.is_empty() {
            format!(
                "None of {} ready {} has given a sound sample within 10 s: everything stays as it is.",
                census.ready(),
                if census.ready() == 1 {
                    "replica"
                } else {
                    "replicas"
                }
            )
        } else {
            "Two samples of a replica are needed to know the load: replicas stay as they are."
                .to_owned()
        };
        match self.moved_from {
            Some(from) => reason(ReasonCode::DialsMoved, self.moved(from)),
            None => reason(ReasonCode::NoData, message),
        }
    }

    pub fn of(&self, plan: Plan, demand: &Demand) -> Reason {
        let census = &self.scene.census;
        let (code, mut message) = match plan {
            Plan::Raise { from, to } => (
                ReasonCode::ScaleUp,
                format!(
                    "From {from} to {}: {}{}{}.",
                    replicas(to),
                    self.load(demand),
                    self.one_carries(),
                    self.for_misses()
                ),
            ),
            Plan::Lower {
                from,
                to,
                seconds,
                again,
            } => (
                ReasonCode::ScaleDown,
                format!(
                    "From {from} to {}: {} has needed no more for {seconds} s{}{}.",
                    replicas(to),
                    self.load(demand),
                    if again { ", as a period ago" } else { "" },
                    self.one_carries()
                ),
            ),
            Plan::GiveUp { from, to } => (
                ReasonCode::ScaleDown,
                format!(
                    "From {from} to {}: {}; the others came too late for a burst that is over{}.",
                    replicas(to),
                    self.load(demand),
                    self.one_carries()
                ),
            ),
            Plan::KeepForBurst(n) => (
                ReasonCode::Stabilizing,
                format!(
                    "{} would do for {}, {n} are kept: load jumped to what they carry, objectives were \
                     missed, and it may do so again.",
                    replicas(self.need.down.max(self.scene.limits.min_replicas).max(1)),
                    self.load(demand)
                ),
            ),
            Plan::KeepUnschedulable(_) => (
                ReasonCode::WaitingForAccelerator,
                format!(
                    "{} without a node that has room for it: {} ready and the dials \
                     ({}) carry {} alone; {} needed.",
                    replicas(census.unschedulable),
                    replicas(census.ready()),
                    dials(self.dials),
                    self.load(demand),
                    self.need.up
                ),
            ),
            Plan::KeepAtMax(at) => (
                ReasonCode::AtMaxReplicas,
                format!(
                    "{} needs {}, but maxReplicas is {at}: the dials ({}) carry the rest{}.",
                    self.load(demand),
                    replicas(self.need.up),
                    dials(self.dials),
                    self.one_carries()
                ),
            ),
            Plan::KeepStabilizing {
                replicas: n,
                seconds_left,
            } => (
                ReasonCode::Stabilizing,
                format!(
                    "{} would do for {}, {n} are kept for {seconds_left} s more.",
                    replicas(self.need.down.max(self.scene.limits.min_replicas).max(1)),
                    self.load(demand)
                ),
            ),
            Plan::Keep(n) => match self.moved_from {
                Some(from) => (ReasonCode::DialsMoved, self.moved(from)),
                None => (
                    ReasonCode::Steady,
                    format!(
                        "{} {} {}{}{}.",
                        ready_of(census.ready(), n),
                        if n == 1 { "carries" } else { "carry" },
                        self.load(demand),
                        self.one_carries(),
                        self.for_misses()
                    ),
                ),
            },
        };
        if census.unschedulable > 0 && code != ReasonCode::WaitingForAccelerator {
            message.push_str(&format!(
                " {} without a node that has room for it.",
                replicas(census.unschedulable)
            ));
        }
        if census.silent > 0 {
            message.push_str(&format!(
                " {} of {} ready gave no sound sample within 10 s: as much load is taken to be \
                 there as elsewhere, and nothing is scaled down meanwhile.",
                census.silent,
                census.ready()
            ));
        }
        if census.delay > BEHIND {
            message.push_str(&format!(
                " Samples are {:.0} s behind: load is forecast from there.",
                census.delay
            ));
        }
        if self.too_slow > 0 {
            message.push_str(&format!(
                " {} of {} ready can't keep the objectives with any dials: requests should go \
                 elsewhere.",
                self.too_slow,
                census.ready()
            ));
        }
        if let Some(budget) = self.tried {
            message.push_str(&format!(
                " Steps are too much alike to tell a law: one replica tries a budget of {budget}."
            ));
        }
        if let Some((smallest, objective)) = self.hopeless {
            message.push_str(&format!(
                " One sequence alone takes {:.0} ms a token, the objective is {:.0} ms: no dials \
                 can keep it.",
                smallest * 1e3,
                objective * 1e3
            ));
        }
        Reason { code, message }
    }

    fn load(&self, demand: &Demand) -> String {
        let mix = demand.mix;
        let mut text = format!("{} requests/s", rate(demand.load.requests_per_second));
        if !demand.idle && demand.mix_known {
            text.push_str(&format!(" of {:.0} + {:.0} tokens", mix.prompt, mix.output));
        }
        let load = demand.load;
        if load.waiting > 0 {
            text.push_str(&format!(
                ", {} running and {} waiting",
                load.running, load.waiting
            ));
        } else if self.need.by_in_flight {
            text.push_str(&format!(", {} running", load.running));
        }
        text
    }

    fn one_carries(&self) -> String {
        match self.capacity {
            Some(one) if self.need.by_in_flight => format!(
                "; one carries {:.0} at a time within its objectives",
                one.in_flight
            ),
            Some(one) => format!("; one carries {}/s within its objectives", rate(one.rate)),
            None => "; no replica's step-time law is trusted yet".to_owned(),
        }
    }

    fn for_misses(&self) -> String {
        let less = 100.0 * (1.0 - 1.0 / self.derating);
        if less < 1.0 {
            return String::new();
        }
        format!("; taken as {less:.0} % less for objectives missed against the prediction")
    }

    fn moved(&self, from: Dials) -> String {
        let context = (self.scene.demand.as_ref()).map_or(String::new(), |demand| {
            format!(" at {:.0} tokens of context", demand.mix.context)
        });
        format!(
            "The step-time law allows {}{context} (before: {}).",
            dials(self.dials),
            dials(from)
        )
    }
}

fn reason(code: ReasonCode, message: String) -> Reason {
    Reason { code, message }
}

/// Those that carry load.
fn ready_of(ready: u32, asked: u32) -> String {
    if ready < asked {
        format!("{ready} ready of {}", replicas(asked))
    } else {
        replicas(asked)
    }
}

fn replicas(n: u32) -> String {
    match n {
        1 => "1 replica".to_owned(),
        n => format!("{n} replicas"),
    }
}

fn dials(dials: Dials) -> String {
    format!(
        "cap {}, budget {}",
        dials.max_num_seqs, dials.max_num_batched_tokens
    )
}

/// Three significant figures.
fn rate(x: f64) -> String {
    match x {
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}
