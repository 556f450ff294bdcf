//! The engine's rules, but counting: what a step costs doesn't depend on how many sequences
//! decode in it, so that searching over thousands of runs is possible.
//!
//! It differs from the engine in what hardly ever matters: blocks are of one token, a budget below
//! the number of decoding sequences still lets all of them decode, the law is known instead of
//! fitted, and those that were set back compute their prompts, and lose their seats, as if they
//! hadn't been.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use stoker_autoscaler::Dials;
use stoker_law::{Law, StepShape};

use super::queue::{Queue, Work};
use super::{Device, Gauges, Tally};
use crate::flight::{Ledger, State};
use crate::random::Random;

/// Share of the KV cache that admitting a sequence leaves free.
const HEADROOM: f64 = 0.01;
/// What a scrape says of a law that has been fitted for a while.
const CONFIDENCE: f64 = 0.9;

/// A sequence with a seat.
#[derive(Clone, Copy, Debug)]
struct Seated {
    work: Work,
    computed: u32,
    /// Number of the step that samples its last token, once it decodes.
    ends: u64,
}

/// A step that was put together.
#[derive(Debug, Default)]
struct Step {
    shape: StepShape,
    /// Sequences that decode.
    decodes: u32,
    /// Those whose prompt is complete: first tokens.
    firsts: Vec<u32>,
    lasts: Vec<u32>,
}

pub struct Surrogate {
    law: Law,
    noise: f64,
    saving: f64,
    capacity: u64,
    dials: Dials,
    ahead: bool,
    sets_back: bool,
    random: Random,
    waiting: Queue,
    /// In the order of admission; those that compute their prompt.
    prefilling: VecDeque<Seated>,
    /// In the order of admission.
    decoding: Vec<Seated>,
    /// When decoding sequences end: step number and request.
    ends: BinaryHeap<Reverse<(u64, u32)>>,
    steps: u64,
    /// Tokens in the cache of decoding and of prefilling sequences.
    context: u64,
    prefilled: u64,
    /// The step that runs, and when it ends.
    running: Option<(Step, f64, f64)>,
    planned: Option<Step>,
    spare: Vec<Step>,
    /// Steps that took longer than the strict goal: a running number that requests note when they
    /// start decoding.
    slow_steps: u32,
    last_step: Option<(StepShape, f64)>,
    pub preemptions: u64,
}

impl Surrogate {
    pub fn new(device: &Device, dials: Dials, seed: u64, ahead: bool) -> Self {
        let profile = &device.profile;
        Surrogate {
            law: profile.law,
            noise: profile.noise,
            saving: profile.single_token_saving,
            capacity: profile.kv_capacity_tokens(),
            dials,
            ahead,
            sets_back: device.sets_back,
            random: Random::new(seed),
            waiting: Queue::default(),
            prefilling: VecDeque::new(),
            decoding: Vec::new(),
            ends: BinaryHeap::new(),
            steps: 0,
            context: 0,
            prefilled: 0,
            running: None,
            planned: None,
            spare: Vec::new(),
            slow_steps: 0,
            last_step: None,
            preemptions: 0,
        }
    }

    pub fn add(&mut self, request: u32, ledger: &Ledger, now: f64) -> bool {
        let Some(flight) = ledger.get(request) else {
            return false;
        };
        if u64::from(flight.prompt) + u64::from(flight.output) > self.capacity {
            return false;
        }
        self.waiting.push(Work {
            request,
            tokens: flight.prompt,
            left: flight.output,
            due: if self.sets_back {
                flight.due(&ledger.goals)
            } else {
                f64::INFINITY
            },
            late: false,
        });
        if self.running.is_none() {
            self.start(now);
        }
        true
    }

    pub fn abort(&mut self, request: u32) {
        self.waiting.remove(request);
        if let Some(place) = self
            .prefilling
            .iter()
            .position(|s| s.work.request == request)
            && let Some(gone) = self.prefilling.remove(place)
        {
            self.prefilled -= u64::from(gone.computed);
        }
        if let Some(place) = self.decoding.iter().position(|s| s.work.request == request) {
            let gone = self.decoding.remove(place);
            self.context = self.context.saturating_sub(self.length(&gone));
            self.ends.retain(|Reverse((_, r))| *r != request);
        }
    }

    pub fn set_dials(&mut self, dials: Dials) {
        self.dials = dials;
    }

    pub fn next(&self) -> f64 {
        self.running.as_ref().map_or(f64::INFINITY, |step| step.1)
    }

    /// Cached tokens of a decoding sequence.
    fn length(&self, sequence: &Seated) -> u64 {
        let to_come = sequence.ends.saturating_sub(self.steps);
        u64::from(sequence.work.tokens)
            + (u64::from(sequence.work.left).saturating_sub(to_come + 1))
    }

    fn start(&mut self, now: f64) {
        let Some(step) = self.planned.take().or_else(|| self.plan(now)) else {
            return;
        };
        let noise = (self.noise * self.random.normal()).exp();
        let saving = if step.shape.tokens == 1 {
            self.saving
        } else {
            0.0
        };
        let seconds = (self.law.step_seconds(step.shape) - saving) * noise;
        self.running = Some((step, now + seconds, seconds));
        if self.ahead {
            self.planned = self.plan(now);
        }
    }

    /// Puts the next step together and counts its tokens as computed.
    fn plan(&mut self, now: f64) -> Option<Step> {
        // Decodes first, and room for their tokens.
        let mut preempted = false;
        while self.context + self.prefilled + self.decoding.len() as u64 > self.capacity {
            if !self.preempt() {
                break;
            }
            preempted = true;
        }
        let decodes = self.decoding.len() as u32;
        let mut room = self.dials.max_num_batched_tokens.saturating_sub(decodes);
        if decodes == 0 && self.prefilling.is_empty() && self.waiting.len() == 0 {
            return None;
        }
        self.set_back_late(now, room);
        let mut step = self.spare.pop().unwrap_or_default();
        step.firsts.clear();
        step.lasts.clear();
        self.steps += 1;
        self.context += u64::from(decodes);
        let mut shape = StepShape {
            sequences: decodes,
            tokens: decodes,
            kv_tokens: self.context,
        };
        step.decodes = decodes;
        while let Some(&Reverse((ends, request))) = self.ends.peek() {
            if ends > self.steps {
                break;
            }
            self.ends.pop();
            step.lasts.push(request);
        }

        // Chunks of prompts that were begun, then of new ones.
        let mut place = 0;
        loop {
            if room == 0 {
                break;
            }
            if place >= self.prefilling.len() && (preempted || !self.admit()) {
                break;
            }
            let Some(sequence) = self.prefilling.get_mut(place) else {
                break;
            };
            let chunk = (sequence.work.tokens - sequence.computed).min(room);
            sequence.computed += chunk;
            room -= chunk;
            self.prefilled += u64::from(chunk);
            shape.sequences += 1;
            shape.tokens += chunk;
            shape.kv_tokens += u64::from(sequence.computed);
            place += 1;
        }
        // Whoever gets a last token keeps the seat until this step was put together.
        if !step.lasts.is_empty() {
            let lasts = &step.lasts;
            let mut gone = 0;
            self.decoding.retain(|s| {
                let ends = s.ends <= self.steps && lasts.contains(&s.work.request);
                if ends {
                    gone += u64::from(s.work.tokens) + u64::from(s.work.left) - 1;
                }
                !ends
            });
            self.context = self.context.saturating_sub(gone);
        }
        // Complete prompts decode from the next step on.
        while let Some(Seated { work, computed, .. }) = self.prefilling.front().copied() {
            if computed < work.tokens {
                break;
            }
            self.prefilling.pop_front();
            self.prefilled -= u64::from(work.tokens);
            step.firsts.push(work.request);
            if work.left <= 1 {
                step.lasts.push(work.request);
                continue;
            }
            let ends = self.steps + u64::from(work.left) - 1;
            self.context += u64::from(work.tokens);
            self.ends.push(Reverse((ends, work.request)));
            self.decoding.push(Seated {
                work,
                computed,
                ends,
            });
        }
        step.shape = shape;
        if shape.sequences == 0 {
            // Nothing fits yet.
            self.spare.push(step);
            return None;
        }
        Some(step)
    }

    /// As the engine does it: see its `Request::first_token_due`.
    fn set_back_late(&mut self, now: f64, room: u32) {
        let begun = self.prefilling.iter();
        let ahead: u32 = begun.map(|s| s.work.tokens - s.computed).sum();
        let step_seconds = self.last_step.map_or(0.0, |(_, seconds)| seconds);
        self.waiting.set_back(|work| {
            let steps = 1 + (ahead + work.tokens).div_ceil(room.max(1));
            now + f64::from(steps) * step_seconds
        });
    }

    fn admit(&mut self) -> bool {
        let seats = self.decoding.len() + self.prefilling.len();
        if seats >= self.dials.max_num_seqs as usize {
            return false;
        }
        let Some(first) = self.waiting.first() else {
            return false;
        };
        let headroom = if seats == 0 {
            0
        } else {
            (self.capacity as f64 * HEADROOM) as u64
        };
        let begun = self.prefilling.iter();
        let begun: u64 = begun.map(|s| u64::from(s.work.tokens)).sum();
        if self.context + begun + u64::from(first.tokens) + headroom > self.capacity {
            return false;
        }
        let Some(work) = self.waiting.pop() else {
            return false;
        };
        self.prefilling.push_back(Seated {
            work,
            computed: 0,
            ends: u64::MAX,
        });
        true
    }

    /// Sends the sequence that was admitted last back to the queue.
    fn preempt(&mut self) -> bool {
        self.preemptions += 1;
        if let Some(last) = self.prefilling.pop_back() {
            self.prefilled -= u64::from(last.computed);
            self.waiting.put_back(last.work);
            return true;
        }
        let Some(last) = self.decoding.pop() else {
            return false;
        };
        let cached = self.length(&last);
        self.context = self.context.saturating_sub(cached);
        let work = last.work;
        self.ends.retain(|Reverse((_, r))| *r != work.request);
        // All but the newest generated token was in the cache.
        let generated = (cached - u64::from(work.tokens)) as u32 + 1;
        self.waiting.put_back(Work {
            tokens: work.tokens + generated,
            left: work.left - generated,
            // Its first token is long out.
            due: f64::INFINITY,
            ..work
        });
        true
    }

    pub fn advance(&mut self, ledger: &mut Ledger, tally: &mut Tally) -> u32 {
        let Some((step, at, seconds)) = self.running.take() else {
            return 0;
        };
        let goals = ledger.goals;
        let slow = seconds > goals.gap;
        self.slow_steps += u32::from(slow);
        self.last_step = Some((step.shape, seconds));
        tally.step(step.shape, seconds);
        tally.generation_tokens += u64::from(step.decodes) + step.firsts.len() as u64;
        tally.itl.add(seconds, u64::from(step.decodes));
        for &request in &step.firsts {
            let Some(flight) = ledger.get_mut(request) else {
                continue;
            };
            if !matches!(flight.state, State::Sent(_)) {
                continue;
            }
            // After a preemption the first token is long out; the gap was a slow one.
            if flight.first_token.is_nan() {
                flight.first_token = at;
                flight.slow_gaps = self.slow_steps;
                tally.first_token(flight, &goals);
            } else if !slow {
                flight.slow_gaps = flight.slow_gaps.wrapping_sub(1);
            }
        }
        let mut ended = 0;
        for &request in &step.lasts {
            let Some(flight) = ledger.get_mut(request) else {
                continue;
            };
            if !matches!(flight.state, State::Sent(_)) {
                continue;
            }
            flight.last_token = at;
            flight.slow_gaps = self.slow_steps.wrapping_sub(flight.slow_gaps);
            flight.state = State::Done;
            tally.finished(flight, &goals);
            ended += 1;
        }
        self.spare.push(step);
        self.start(at);
        ended
    }

    pub fn gauges(&self) -> Gauges {
        let begun = self.prefilling.iter();
        let begun: u64 = begun.map(|s| u64::from(s.work.tokens - s.computed)).sum();
        Gauges {
            running: (self.decoding.len() + self.prefilling.len()) as u32,
            waiting: self.waiting.len() as u32,
            kv_tokens: self.context + self.prefilled,
            waiting_prompt_tokens: self.waiting.tokens() + begun,
            law: self.law,
            law_confidence: CONFIDENCE,
        }
    }
}
