//! NVIDIA Dynamo's planner, its loop on load: every 5 s it fits the time of an iteration to the
//! prompt and KV tokens in it; one more replica when every engine is predicted to exceed the
//! objectives, one less when the rest would stay within 80 % of them. Gaps between tokens are
//! predicted with the prompt tokens that the fleet's iterations have had of late.

use std::collections::{BTreeMap, VecDeque};

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
/// Looks over which the fleet's prompt tokens an iteration are averaged.
const LOOKS: usize = 12;

/// Of the iterations between two looks, the mean one.
#[derive(Clone, Copy, Debug)]
struct Iteration {
    prompt: f64,
    kv: f64,
    seconds: f64,
}

/// Sums over a replica's iterations so far, or over some.
#[derive(Clone, Copy, Debug, Default)]
struct Iterations {
    count: f64,
    prompt: f64,
    kv: f64,
    seconds: f64,
}

impl Iterations {
    fn of(gauge: &Gauge) -> Self {
        let (decodes, prefills) = (gauge.tally.decodes, gauge.tally.prefills);
        Iterations {
            count: decodes.n + prefills.n,
            prompt: decodes.p + prefills.p,
            kv: decodes.k + prefills.k,
            seconds: decodes.y + prefills.y,
        }
    }

    fn since(&self, before: &Self) -> Self {
        Iterations {
            count: self.count - before.count,
            prompt: self.prompt - before.prompt,
            kv: self.kv - before.kv,
            seconds: self.seconds - before.seconds,
        }
    }

    /// `None` where there were none.
    fn mean(&self) -> Option<Iteration> {
        (self.count >= 1.0).then(|| Iteration {
            prompt: self.prompt / self.count,
            kv: self.kv / self.count,
            seconds: self.seconds / self.count,
        })
    }
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
    /// By replica, as of the last look.
    last: BTreeMap<u32, Iterations>,
    /// Iterations and prompt tokens in them between looks, of the whole fleet.
    recent: VecDeque<(f64, f64)>,
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
            last: BTreeMap::new(),
            recent: VecDeque::new(),
        }
    }

    fn learn(&mut self, view: &View) {
        let mut fleet = (0.0, 0.0);
        for (replica, gauge) in view.ready() {
            let now = Iterations::of(gauge);
            let before = self.last.insert(replica.id, now).unwrap_or_default();
            let new = now.since(&before);
            fleet.0 += new.count;
            fleet.1 += new.prompt;
            let place = (BUCKETS as f64 * gauge.kv_use()) as usize;
            if let Some(mean) = new.mean()
                && let Some(bucket) = self.seen.get_mut(place.min(BUCKETS - 1))
            {
                bucket.push_back(mean);
                if bucket.len() > KEPT / BUCKETS {
                    bucket.pop_front();
                }
            }
        }
        self.recent.push_back(fleet);
        if self.recent.len() > LOOKS {
            self.recent.pop_front();
        }
    }

    /// Prompt tokens in an iteration of late.
    fn prompt_tokens(&self) -> f64 {
        let count: f64 = self.recent.iter().map(|(count, _)| count).sum();
        let prompt: f64 = self.recent.iter().map(|(_, prompt)| prompt).sum();
        prompt / count.max(1.0)
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
        (ttft, line.seconds(self.prompt_tokens() * factor, kv))
    }
}

impl Policy for Dynamo {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let keep = action(view.desired, self.dials);
        self.learn(view);
        let gauges: Vec<Gauge> = view.ready().map(|(_, gauge)| *gauge).collect();
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
