//! A replica that follows its law step by step: continuous batching, chunked prefill, first come
//! first served.

use std::collections::VecDeque;

use stoker_autoscaler::{Counters, Dials, Histogram, Objectives};
use stoker_law::{Law, StepShape};

#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub arrival: f64,
    pub prompt: u32,
    pub output: u32,
}

struct Sequence {
    request: Request,
    computed: u32,
    generated: u32,
    first_token: f64,
}

pub struct Replica {
    pub id: String,
    pub created: f64,
    /// `None` while no node has room for it.
    pub scheduled: Option<f64>,
    pub ready: Option<f64>,
    pub draining: bool,
    pub law: Law,
    /// What it says its law is.
    pub told_law: Law,
    pub kv_capacity: u64,
    pub ceilings: Dials,
    pub dials: Dials,
    pub counters: Counters,
    waiting: VecDeque<Request>,
    running: Vec<Sequence>,
    busy_until: f64,
}

fn histogram(bounds: &[f64]) -> Histogram {
    let bounds = bounds.iter().chain([&f64::INFINITY]);
    Histogram {
        buckets: bounds.map(|b| (*b, 0.0)).collect(),
        sum: 0.0,
        count: 0.0,
    }
}

fn count(histogram: &mut Histogram, value: f64) {
    for bucket in &mut histogram.buckets {
        if value <= bucket.0 {
            bucket.1 += 1.0;
        }
    }
    histogram.sum += value;
    histogram.count += 1.0;
}

pub fn empty_counters() -> Counters {
    let seconds = [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0,
    ];
    let lengths = [
        1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    ];
    Counters {
        ttft: histogram(&seconds),
        itl: histogram(&seconds),
        prompt_length: histogram(&lengths),
        generation_length: histogram(&lengths),
        ..Counters::default()
    }
}

impl Replica {
    pub fn new(id: String, created: f64, law: Law, kv_capacity: u64, ceilings: Dials) -> Self {
        Replica {
            id,
            created,
            scheduled: None,
            ready: None,
            draining: false,
            law,
            told_law: law,
            kv_capacity,
            ceilings,
            dials: Dials {
                max_num_seqs: 8,
                max_num_batched_tokens: 2048,
            },
            counters: empty_counters(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            busy_until: 0.0,
        }
    }

    pub fn receive(&mut self, request: Request) {
        self.counters.requests_received += 1.0;
        self.counters.prompt_tokens_received += f64::from(request.prompt);
        self.waiting.push_back(request);
    }

    pub fn running(&self) -> u32 {
        self.running.len() as u32
    }

    pub fn waiting(&self) -> u32 {
        self.waiting.len() as u32
    }

    pub fn outstanding(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    pub fn waiting_prompt_tokens(&self) -> u64 {
        let waiting = self.waiting.iter().map(|r| u64::from(r.prompt));
        let running = (self.running.iter()).map(|s| u64::from(s.request.prompt - s.computed));
        waiting.sum::<u64>() + running.sum::<u64>()
    }

    pub fn kv_tokens(&self) -> u64 {
        (self.running.iter())
            .map(|s| u64::from(s.computed + s.generated))
            .sum()
    }

    /// Everything that was in it is lost, and so are its counts.
    pub fn restart(&mut self) -> usize {
        let lost = self.outstanding();
        self.waiting.clear();
        self.running.clear();
        self.counters = empty_counters();
        lost
    }

    /// Runs the steps that start before `until`, and returns how many requests ended.
    pub fn run(&mut self, until: f64, objectives: &Objectives) -> usize {
        let mut ended = 0;
        while self.busy_until < until && self.outstanding() > 0 {
            let start = self.busy_until.max(until - 0.02);
            self.admit();
            ended += self.step(start, objectives);
        }
        ended
    }

    fn admit(&mut self) {
        let mut reserved: u64 = (self.running.iter())
            .map(|s| u64::from(s.request.prompt + s.request.output))
            .sum();
        while let Some(next) = self.waiting.front() {
            let needed = u64::from(next.prompt + next.output);
            let full = self.running.len() >= self.dials.max_num_seqs as usize;
            if full || (reserved + needed > self.kv_capacity && !self.running.is_empty()) {
                break;
            }
            reserved += needed;
            if let Some(request) = self.waiting.pop_front() {
                self.running.push(Sequence {
                    request,
                    computed: 0,
                    generated: 0,
                    first_token: 0.0,
                });
            }
        }
    }

    fn step(&mut self, start: f64, objectives: &Objectives) -> usize {
        let decoding = (self.running.iter()).filter(|s| s.generated > 0).count() as u32;
        let mut room = self.dials.max_num_batched_tokens.saturating_sub(decoding);
        let mut tokens = decoding;
        let mut sequences = decoding;
        for sequence in self.running.iter_mut().filter(|s| s.generated == 0) {
            let chunk = (sequence.request.prompt - sequence.computed).min(room);
            if chunk == 0 {
                continue;
            }
            sequence.computed += chunk;
            room -= chunk;
            tokens += chunk;
            sequences += 1;
        }
        let shape = StepShape {
            sequences,
            tokens,
            kv_tokens: self.kv_tokens(),
        };
        let end = start + self.law.step_seconds(shape).max(1e-4);
        self.busy_until = end;
        self.counters.prompt_tokens += f64::from(tokens - decoding);

        let counters = &mut self.counters;
        let mut ended = 0;
        self.running.retain_mut(|sequence| {
            let request = sequence.request;
            if sequence.computed < request.prompt {
                return true;
            }
            sequence.generated += 1;
            counters.generation_tokens += 1.0;
            if sequence.generated == 1 {
                sequence.first_token = end;
            } else {
                count(&mut counters.itl, end - start);
            }
            if sequence.generated < request.output {
                return true;
            }
            ended += 1;
            finish(counters, sequence, end, objectives);
            false
        });
        ended
    }
}

fn finish(counters: &mut Counters, sequence: &Sequence, end: f64, objectives: &Objectives) {
    let request = sequence.request;
    let ttft = sequence.first_token - request.arrival;
    let gaps = f64::from(request.output - 1).max(1.0);
    let itl = (end - sequence.first_token) / gaps;
    let above = (f64::from(request.prompt) - objectives.ttft_free_prompt_tokens).max(0.0);
    let ttft_met =
        ttft <= objectives.ttft_seconds + objectives.ttft_seconds_per_prompt_token * above;
    let itl_met = itl <= objectives.itl_seconds;
    let add = |met: bool, yes: &mut f64, no: &mut f64| *(if met { yes } else { no }) += 1.0;
    counters.requests_finished += 1.0;
    add(ttft_met, &mut counters.ttft_met, &mut counters.ttft_missed);
    add(itl_met, &mut counters.itl_met, &mut counters.itl_missed);
    add(
        ttft_met && itl_met,
        &mut counters.all_met,
        &mut counters.all_missed,
    );
    count(&mut counters.ttft, ttft);
    count(&mut counters.prompt_length, f64::from(request.prompt));
    count(&mut counters.generation_length, f64::from(request.output));
}
