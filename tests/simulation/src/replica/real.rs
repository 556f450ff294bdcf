//! stoker-engine, stepped in virtual time.

use stoker_autoscaler::Dials;
use stoker_engine::executor::Sampling;
use stoker_engine::{
    Clock, Engine, EngineConfig, Event, FinishReason, Limits, Profile, Request, RequestId,
    SimulatedExecutor, VirtualClock,
};

use super::{Device, Gauges, Tally};
use crate::flight::{Ledger, State};

const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_p: 1.0,
    top_k: 0,
    seed: 0,
};

pub struct Real {
    engine: Engine<SimulatedExecutor>,
    /// Where the engine stands: ahead of the fleet's time by the step in flight.
    clock: VirtualClock,
    sets_back: bool,
    /// What that step brings.
    events: Vec<Event>,
    busy: bool,
}

impl Real {
    pub fn new(device: &Device, dials: Dials, seed: u64) -> Self {
        let clock = VirtualClock::new();
        let profile = Profile {
            seed,
            ..device.profile.clone()
        };
        let config = EngineConfig {
            max_waiting: usize::MAX,
            law_prior: device.prior,
        };
        let executor = SimulatedExecutor::new(profile, clock.clone());
        Real {
            engine: Engine::new(executor, limits(dials), config),
            clock,
            sets_back: device.sets_back,
            events: Vec::new(),
            busy: false,
        }
    }

    pub fn add(&mut self, request: u32, ledger: &Ledger, now: f64) -> bool {
        let Some(flight) = ledger.get(request) else {
            return false;
        };
        let added = self.engine.add(Request {
            id: RequestId(u64::from(request)),
            prompt: vec![request; flight.prompt as usize],
            sampling: GREEDY,
            max_tokens: flight.output,
            stop_token_ids: Vec::new(),
            ignore_eos: true,
            eos_token_ids: Vec::new(),
            priority: 0,
            arrival: flight.arrival,
            first_token_due: self.sets_back.then(|| flight.due(&ledger.goals)),
        });
        if added.is_ok() && !self.busy {
            self.clock.sleep_until(now);
            self.step();
        }
        added.is_ok()
    }

    pub fn abort(&mut self, request: u32) {
        self.engine.abort(RequestId(u64::from(request)));
    }

    pub fn set_dials(&mut self, dials: Dials) {
        // Dials of 0 are refused by the engine; the policy's bounds exclude them.
        let _ = self.engine.set_limits(limits(dials));
    }

    pub fn next(&self) -> f64 {
        if self.busy {
            self.clock.now()
        } else {
            f64::INFINITY
        }
    }

    /// Lets the engine go on until the step that is oldest in flight has ended.
    fn step(&mut self) {
        let start = self.clock.now();
        self.busy = false;
        // The first call only submits where nothing is in flight, a second one waits.
        for _ in 0..3 {
            if !self.engine.has_work() {
                return;
            }
            match self.engine.step(&self.clock) {
                Ok(events) if self.events.is_empty() => self.events = events,
                Ok(events) => self.events.extend(events),
                // The simulated executor fails only where it is waited for out of order.
                Err(_) => return,
            }
            if self.clock.now() > start {
                self.busy = true;
                return;
            }
        }
    }

    pub fn advance(&mut self, ledger: &mut Ledger, tally: &mut Tally) -> u32 {
        let mut ended = 0;
        let goals = ledger.goals;
        for event in self.events.drain(..) {
            match event {
                Event::Token { id, at, first, .. } => {
                    let Some(flight) = ledger.flights.get_mut(id.0 as usize) else {
                        continue;
                    };
                    tally.generation_tokens += 1;
                    if first {
                        flight.first_token = at;
                        tally.first_token(flight, &goals);
                    } else {
                        let gap = at - flight.last_token;
                        flight.slow_gaps += u32::from(gap > goals.gap);
                        tally.itl.add(gap, 1);
                    }
                    flight.last_token = at;
                }
                Event::Finished {
                    reason: FinishReason::Abort,
                    ..
                } => {}
                Event::Finished { id, .. } => {
                    if let Some(flight) = ledger.flights.get_mut(id.0 as usize) {
                        flight.state = State::Done;
                        tally.finished(flight, &goals);
                        ended += 1;
                    }
                }
            }
        }
        if let Some(step) = self.engine.stats().last_step {
            tally.step(step.shape, step.seconds);
        }
        self.step();
        ended
    }

    pub fn gauges(&self) -> Gauges {
        let stats = self.engine.stats();
        Gauges {
            running: stats.running,
            waiting: stats.waiting,
            kv_tokens: stats.kv_tokens,
            waiting_prompt_tokens: stats.waiting_prompt_tokens,
            law: stats.law,
            law_confidence: stats.law_confidence,
        }
    }

    pub fn preemptions(&self) -> u64 {
        self.engine.stats().preemptions_total
    }
}

fn limits(dials: Dials) -> Limits {
    Limits {
        max_num_seqs: dials.max_num_seqs,
        max_num_batched_tokens: dials.max_num_batched_tokens,
    }
}
