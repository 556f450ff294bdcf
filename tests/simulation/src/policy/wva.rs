//! llm-d's Workload Variant Autoscaler, every 15 s.

use std::collections::VecDeque;

use stoker_autoscaler::Dials;

use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 15.0;
/// Spare share of KV cache and spare places in the queue below which one more is ordered.
const SPARE_KV: f64 = 0.10;
const SPARE_QUEUE: f64 = 3.0;

/// First analyser: one more where the replicas that aren't saturated have too little to spare, one
/// less where the rest would have enough. Nothing while pods come or go.
pub(super) struct V1 {
    queue: f64,
    kv: f64,
    dials: Dials,
}

impl V1 {
    /// `parameter`: the queue's threshold, whole, and the KV cache's, after the point.
    pub fn new(parameter: f64, dials: Dials) -> Self {
        V1 {
            queue: parameter.floor(),
            kv: parameter.fract(),
            dials,
        }
    }
}

impl Policy for V1 {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let keep = action(view.desired, self.dials);
        let ready = view.ready_count();
        if ready != view.desired || view.replicas.len() as u32 != ready {
            return keep;
        }
        let (mut kv, mut queue, mut sane) = (0.0, 0.0, 0.0);
        for (_, gauge) in view.ready() {
            let waiting = f64::from(gauge.waiting);
            if gauge.kv_use() < self.kv && waiting < self.queue {
                kv += gauge.kv_use();
                queue += waiting;
                sane += 1.0;
            }
        }
        // The queue's threshold may be below what is to be spared of it.
        let spare_queue = SPARE_QUEUE.min(0.6 * self.queue);
        if sane == 0.0 || self.kv - kv / sane < SPARE_KV || self.queue - queue / sane < spare_queue
        {
            return action(view.desired + 1, self.dials);
        }
        // What the unsaturated ones do, done by one less of them.
        let share = sane / (sane - 1.0).max(1.0);
        let left_kv = self.kv - kv / sane * share;
        let left_queue = self.queue - queue / sane * share;
        if sane > 1.0 && left_kv >= SPARE_KV && left_queue >= spare_queue {
            return action(view.desired - 1, self.dials);
        }
        keep
    }
}

/// Share of the KV cache that counts as capacity.
const USABLE_KV: f64 = 0.8;
/// Requests in a queue that make a replica's use its capacity.
const SATURATED: u32 = 5;
const REMEMBERED: usize = 10;
/// Scale-down leaves this much more room than scale-up asks for.
const DOWN: f64 = 0.70 / 0.85;

/// Second analyser: tokens in use and asked for against the tokens that replicas hold.
pub(super) struct V2 {
    up: f64,
    dials: Dials,
    /// Tokens in use when replicas had a queue.
    saturated: VecDeque<f64>,
}

impl V2 {
    pub fn new(up: f64, dials: Dials) -> Self {
        V2 {
            up,
            dials,
            saturated: VecDeque::new(),
        }
    }
}

impl Policy for V2 {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let (mut received, mut prompts, mut generated, mut finished) = (0.0, 0.0, 0.0, 0.0);
        let (mut kv, mut used, mut waiting) = (0.0, 0.0, f64::from(view.held));
        for (_, gauge) in view.ready() {
            received += gauge.tally.received as f64;
            prompts += gauge.tally.prompt_tokens_received as f64;
            finished += gauge.tally.generation_length.count() as f64;
            generated += gauge.tally.generation_length.sum;
            kv = gauge.kv_capacity as f64;
            used += gauge.kv_tokens as f64;
            waiting += f64::from(gauge.waiting);
            if gauge.waiting >= SATURATED {
                self.saturated.push_back(gauge.kv_tokens as f64);
            }
        }
        while self.saturated.len() > REMEMBERED {
            self.saturated.pop_front();
        }
        if received < 1.0 || finished < 1.0 || kv == 0.0 {
            return action(view.desired, self.dials);
        }
        let (input, output) = (prompts / received, generated / finished);
        let computed = if self.saturated.is_empty() {
            let batch = f64::from(self.dials.max_num_batched_tokens) * output / (input + output);
            batch.min(f64::from(self.dials.max_num_seqs)) * (input + output / 2.0)
        } else {
            self.saturated.iter().sum::<f64>() / self.saturated.len() as f64
        };
        let one = computed.min(USABLE_KV * kv).max(1.0);
        let supply = one * f64::from(view.desired);
        let demand = used + waiting * input;
        let required = demand / self.up - supply;
        let spare = supply - demand / (self.up * DOWN);
        let replicas = if required > 0.0 {
            view.desired + ceil(required / one)
        } else if spare >= one {
            view.desired - ((spare / one) as u32).min(view.desired - 1)
        } else {
            view.desired
        };
        action(replicas, self.dials)
    }
}
