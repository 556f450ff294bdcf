//! llm-d's Workload Variant Autoscaler, every 15 s.

use std::collections::VecDeque;

use stoker_autoscaler::Dials;

use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 15.0;
/// Share of KV cache in use that saturates a replica.
const SATURATED_KV: f64 = 0.80;
/// Places in the queue to spare below which one more is ordered.
const SPARE_QUEUE: f64 = 3.0;

/// First analyser: one more where replicas have too little to spare on average, one less where the
/// rest would have enough. Nothing while pods come.
pub(super) struct V1 {
    queue: f64,
    spare_kv: f64,
    dials: Dials,
}

impl V1 {
    /// `parameter`: the queue's length that saturates a replica, whole, and the share of KV cache to
    /// spare, after the point.
    pub fn new(parameter: f64, dials: Dials) -> Self {
        V1 {
            queue: parameter.floor(),
            spare_kv: parameter.fract(),
            dials,
        }
    }

    /// Whether so much is to spare where a replica has this KV cache in use, and this queue.
    fn spares(&self, kv: f64, queue: f64) -> bool {
        SATURATED_KV - kv >= self.spare_kv && self.queue - queue >= SPARE_QUEUE
    }
}

impl Policy for V1 {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let n = f64::from(view.ready_count());
        if view.starting() || n == 0.0 {
            return action(view.desired, self.dials);
        }
        let kv: f64 = view.ready().map(|(_, gauge)| gauge.kv_use()).sum();
        let queue: u32 = view.ready().map(|(_, gauge)| gauge.waiting).sum();
        let queue = f64::from(queue);
        let replicas = if !self.spares(kv / n, queue / n) {
            view.desired + 1
        } else if n > 1.0 && self.spares(kv / (n - 1.0), queue / (n - 1.0)) {
            view.desired - 1
        } else {
            view.desired
        };
        action(replicas, self.dials)
    }
}

/// Share of the KV cache that counts as capacity.
const USABLE_KV: f64 = 0.8;
/// Requests in a queue that make a replica's use its capacity.
const SATURATED: u32 = 5;
const REMEMBERED: usize = 10;
/// Scale-down leaves this much more room than scale-up asks for.
const DOWN: f64 = 0.70 / 0.85;

/// Second analyser: tokens in use and asked for against the tokens that replicas hold. Nothing while
/// pods come.
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
        if view.starting() || received < 1.0 || finished < 1.0 || kv == 0.0 {
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
        let demand = used + waiting * (input + output);
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
