//! NVIDIA Dynamo's planner, its loop on load: every 5 s it fits the time of an iteration to the
//! prompt and KV tokens in it; one more replica when every engine is predicted to exceed the
//! objectives, one less when the rest would stay within 80 % of them.

use std::collections::VecDeque;

use stoker_autoscaler::Dials;

use super::action;
use crate::fleet::{Action, Gauge, Policy, View};
use crate::flight::Goals;

const PERIOD: f64 = 5.0;
const LEAST: usize = 5;
const KEPT: usize = 64;
/// Observations are spread over so many buckets of KV tokens.
const BUCKETS: usize = 16;
const DOWN: f64 = 0.8;

#[derive(Clone, Copy, Debug)]
struct Iteration {
    prompt: f64,
    kv: f64,
    seconds: f64,
}

/// seconds = base + per_prompt * prompt + per_kv * kv
#[derive(Clone, Copy, Debug)]
struct Line {
    base: f64,
    per_prompt: f64,
    per_kv: f64,
}

impl Line {
    fn seconds(&self, prompt: f64, kv: f64) -> f64 {
        self.base + self.per_prompt * prompt + self.per_kv * kv
    }
}

pub(super) struct Dynamo {
    ttft: f64,
    itl: f64,
    dials: Dials,
    seen: [VecDeque<Iteration>; BUCKETS],
}

impl Dynamo {
    /// `share` of the objectives that may be used.
    pub fn new(share: f64, dials: Dials) -> Self {
        let goals = Goals::default();
        Dynamo {
            ttft: share * goals.ttft,
            itl: share * goals.itl,
            dials,
            seen: Default::default(),
        }
    }

    fn learn(&mut self, gauge: &Gauge) {
        // Iterations are told when they happen: an idle engine tells none.
        let Some((shape, seconds)) = gauge.last_step.filter(|_| gauge.outstanding() > 0) else {
            return;
        };
        let place = (BUCKETS as f64 * gauge.kv_use()) as usize;
        if let Some(bucket) = self.seen.get_mut(place.min(BUCKETS - 1)) {
            bucket.push_back(Iteration {
                prompt: f64::from(shape.tokens.saturating_sub(shape.sequences)),
                kv: shape.kv_tokens as f64,
                seconds,
            });
            if bucket.len() > KEPT / BUCKETS {
                bucket.pop_front();
            }
        }
    }

    /// Least squares; `None` with too few observations or a slope below zero.
    fn fit(&self) -> Option<Line> {
        let seen: Vec<&Iteration> = self.seen.iter().flatten().collect();
        if seen.len() < LEAST {
            return None;
        }
        let n = seen.len() as f64;
        let mean = |of: fn(&Iteration) -> f64| seen.iter().map(|i| of(i)).sum::<f64>() / n;
        let (p, k, y) = (mean(|i| i.prompt), mean(|i| i.kv), mean(|i| i.seconds));
        let (mut pp, mut pk, mut kk, mut py, mut ky) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for i in seen {
            let (dp, dk, dy) = (i.prompt - p, i.kv - k, i.seconds - y);
            pp += dp * dp;
            pk += dp * dk;
            kk += dk * dk;
            py += dp * dy;
            ky += dk * dy;
        }
        let determinant = pp * kk - pk * pk;
        let (per_prompt, per_kv) = if determinant > 1e-6 * pp * kk {
            (
                (py * kk - ky * pk) / determinant,
                (ky * pp - py * pk) / determinant,
            )
        } else if kk > 0.0 {
            (0.0, ky / kk)
        } else {
            (0.0, 0.0)
        };
        (per_prompt >= 0.0 && per_kv >= 0.0).then_some(Line {
            base: y - per_prompt * p - per_kv * k,
            per_prompt,
            per_kv,
        })
    }

    /// Predicted time to first token of a request that comes now, and gap between tokens, with
    /// `factor` times the load.
    fn predict(&self, line: &Line, gauge: &Gauge, input: f64, factor: f64) -> (f64, f64) {
        let kv = gauge.kv_tokens as f64 * factor;
        let queued = gauge.waiting_prompt_tokens as f64 * factor + input;
        let budget = f64::from(self.dials.max_num_batched_tokens);
        let iterations = (queued / budget).ceil().max(1.0);
        let ttft = iterations * line.seconds(queued / iterations, kv);
        let in_step = (gauge.waiting_prompt_tokens as f64 * factor).min(budget);
        (ttft, line.seconds(in_step, kv))
    }
}

impl Policy for Dynamo {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let keep = action(view.desired, self.dials);
        let gauges: Vec<Gauge> = view.ready().map(|(_, gauge)| *gauge).collect();
        for gauge in &gauges {
            self.learn(gauge);
        }
        let n = gauges.len() as f64;
        // Nothing while pods come or go.
        if gauges.is_empty() || gauges.len() as u32 != view.desired {
            return keep;
        }
        let Some(line) = self.fit() else {
            return keep;
        };
        let received: f64 = gauges.iter().map(|g| g.tally.received as f64).sum();
        let prompts = gauges.iter().map(|g| g.tally.prompt_tokens_received as f64);
        let input = prompts.sum::<f64>() / received.max(1.0);
        let exceeds = |gauge: &Gauge, factor: f64, share: f64| {
            let (ttft, itl) = self.predict(&line, gauge, input, factor);
            ttft > share * self.ttft || itl > share * self.itl
        };
        if gauges.iter().all(|gauge| exceeds(gauge, 1.0, 1.0)) {
            return action(view.desired + 1, self.dials);
        }
        let factor = n / (n - 1.0).max(1.0);
        if n > 1.0 && !gauges.iter().any(|gauge| exceeds(gauge, factor, DOWN)) {
            return action(view.desired - 1, self.dials);
        }
        keep
    }
}
