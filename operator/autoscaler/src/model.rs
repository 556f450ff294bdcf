//! What one replica carries: the step-time law turned into rates and times.
//!
//! With `n` sequences decoding, prompts of mean length `P`, answers of mean length `O` and a step's
//! budget `B`, every step generates `n` tokens, so that `n / O` sequences end in it and `P * n / O`
//! prompt tokens must be computed a step to replace them. Steps that carry prompt work are filled
//! up to the budget, hence the share of steps that do is `phi = (n * P) / (O * (B - n))`, the mean
//! step takes `T = decode + phi * (mixed - decode)`, and the replica serves `n / (O * T)` requests
//! a second. At `phi = 1` all steps are full: `n = O * B / (P + O)` is the most that this budget can
//! keep decoding.
//!
//! Prompts queue for the budget like customers of an M/G/1 queue whose service time `S` is the time
//! that a prompt's chunks take in full steps. A replica alone is busy with them for `rho = rate * S`
//! of the time. In a large fleet whose router sends each request to the replica with the fewest, a
//! replica gets a new one when one of its own has ended; while it computes prompts its steps are
//! long and few end, so that it is spared: it gets `n / (O * mixed)` a second then, and is as busy as
//! `phi` to those who come. A fleet of N lies between: `phi + (rho - phi) / N`.
//!
//! What a replica carries is the rate at which as many requests miss an objective as may: nothing is
//! held back here, since uncertain demand has a margin of its own.

use stoker_law::Law;

use crate::mix::Mix;
use crate::observation::{Dials, ItlOf, Objectives};

/// The same for a replica whose prompts queue without end, as while pods are on their way.
const ITL_SATURATED: f64 = 0.9;
/// Share of the KV memory that the dials may fill on average.
const KV_PLANNED: f64 = 0.9;
/// A replica is worth at least this share of what it serves when saturated, even where the
/// objectives can't be kept: no number of replicas would help, so don't order them all.
pub(crate) const LEAST_SHARE: f64 = 0.25;
/// Halvings of a range of sequences: to within 0.1 %.
pub(crate) const HALVINGS: u32 = 14;

/// What one replica carries with given dials.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Capacity {
    /// Requests a second of which as many miss an objective as may.
    pub rate: f64,
    /// The same however little it is, where `rate` is the least that a replica is worth.
    pub kept_rate: f64,
    /// Requests running or waiting at that rate.
    pub in_flight: f64,
    /// Requests a second when it never lacks work.
    pub saturated_rate: f64,
    /// Whether the objectives are kept at that rate; if not, they can't be.
    pub keeps: bool,
}

/// A replica under a steady load.
struct Operation {
    /// Sequences that decode.
    n: f64,
    rate: f64,
    step: f64,
    decode: f64,
    mixed: f64,
    mixed_share: f64,
}

/// A replica's law with the requests that come and what is wanted for them.
pub(crate) struct ReplicaModel {
    law: Law,
    mix: Mix,
    objectives: Objectives,
    kv_tokens: f64,
    /// Share of requests that may miss.
    misses: f64,
    /// The normal distribution's quantile at that share.
    quantile: f64,
}

impl ReplicaModel {
    /// `law` must be [`usable`].
    pub fn new(law: Law, mix: Mix, objectives: Objectives, kv_capacity_tokens: u64) -> Self {
        let bound = |x: f64, or: f64| if x > 0.0 { x.clamp(1e-6, 1e6) } else { or };
        let good = bound(objectives.good_percent, 99.0).clamp(50.0, 99.99);
        let misses = 1.0 - good / 100.0;
        ReplicaModel {
            law,
            mix: mix.bounded(),
            objectives: Objectives {
                good_percent: good,
                ttft_seconds: bound(objectives.ttft_seconds, 1e6),
                ttft_free_prompt_tokens: bound(objectives.ttft_free_prompt_tokens, 0.0),
                ttft_seconds_per_prompt_token: bound(objectives.ttft_seconds_per_prompt_token, 0.0),
                itl_seconds: bound(objectives.itl_seconds, 1e6),
                itl_of: objectives.itl_of,
            },
            // A replica that doesn't say how much it holds isn't bound by it.
            kv_tokens: if kv_capacity_tokens == 0 {
                f64::INFINITY
            } else {
                kv_capacity_tokens as f64
            },
            misses,
            quantile: upper_quantile(misses),
        }
    }

    /// The figures that decide over dials.
    pub fn about(&self) -> [f64; 6] {
        let (law, mix) = (&self.law, &self.mix);
        [
            law.base,
            law.per_token,
            law.hidden,
            mix.prompt,
            mix.output,
            mix.context,
        ]
    }

    /// Seconds of a step with `sequences` of the mean context that computes `tokens`.
    pub fn step_seconds(&self, sequences: f64, tokens: f64) -> f64 {
        let law = &self.law;
        let memory = law.base + law.per_kv_token * sequences * self.mix.context;
        let compute = law.per_token * tokens;
        memory.max(compute)
            + (1.0 - law.hidden) * memory.min(compute)
            + law.per_sequence * sequences
    }

    /// The largest cap that keeps the inter-token objective with this budget however many
    /// requests wait, that KV memory carries, and that the budget can feed with prompts; 0 where
    /// not even one sequence does.
    pub fn cap(&self, budget: u32, max: u32) -> u32 {
        let (mut keeps, mut fails) = (0, u64::from(max.min(budget.saturating_sub(1))) + 1);
        while keeps + 1 < fails {
            let middle = u64::midpoint(keeps, fails);
            let cap = middle as f64;
            if self.saturated_itl(cap, budget) <= ITL_SATURATED * self.objectives.itl_seconds
                && cap * self.mix.context <= KV_PLANNED * self.kv_tokens
            {
                keeps = middle;
            } else {
                fails = middle;
            }
        }
        // More sequences than the budget feeds would only hold KV memory while they wait for it.
        let fed = self.fed(budget).ceil();
        (keeps as f64).min(fed) as u32
    }

    /// Whether both dials together keep the inter-token objective, without any margin, and fit
    /// into KV memory.
    pub fn keeps(&self, dials: Dials) -> bool {
        let cap = f64::from(dials.max_num_seqs).min(self.fed(dials.max_num_batched_tokens));
        self.saturated_itl(cap, dials.max_num_batched_tokens) <= self.objectives.itl_seconds
            && cap * self.mix.context <= self.kv_tokens
    }

    /// What a replica of a fleet of `fleet` carries with these dials; `None` where it can't serve at
    /// all.
    pub fn capacity(&self, dials: Dials, fleet: u32) -> Option<Capacity> {
        self.capacity_within(dials, fleet, HALVINGS)
    }

    /// The same, as exactly as so many halvings of the range make it.
    pub fn capacity_within(&self, dials: Dials, fleet: u32, halvings: u32) -> Option<Capacity> {
        let most = self.most(dials);
        let saturated = self.operation(most, dials.max_num_batched_tokens)?;
        let (mut keeps, mut fails) = (0.0, most);
        for _ in 0..halvings {
            let n = f64::midpoint(keeps, fails);
            let operation = self.operation(n, dials.max_num_batched_tokens);
            if operation.is_some_and(|o| self.missed(&o, dials, fleet) <= self.misses) {
                keeps = n;
            } else {
                fails = n;
            }
        }
        let least = LEAST_SHARE * saturated.rate;
        let within = self.operation(keeps, dials.max_num_batched_tokens);
        let kept_rate = within.as_ref().map_or(0.0, |operation| operation.rate);
        let within = within.filter(|operation| operation.rate > least);
        let (rate, in_flight) = match &within {
            Some(operation) => {
                let prompt = self.prompt_seconds(operation, dials.max_num_batched_tokens);
                let busy = busy(operation, prompt, f64::from(fleet));
                let wait = busy * self.queued(prompt, busy);
                (operation.rate, keeps + operation.rate * (prompt + wait))
            }
            None => (least, LEAST_SHARE * most),
        };
        let capacity = Capacity {
            rate,
            kept_rate,
            in_flight: in_flight.max(1.0),
            saturated_rate: saturated.rate,
            keeps: within.is_some(),
        };
        (capacity.rate.is_finite() && capacity.rate > 0.0).then_some(capacity)
    }

    /// Share of requests that miss an objective when each of `fleet` replicas gets `rate` requests
    /// a second; 1 where that is more than it can serve.
    pub fn misses_at(&self, rate: f64, dials: Dials, fleet: u32) -> f64 {
        if rate <= 0.0 {
            return 0.0;
        }
        let budget = dials.max_num_batched_tokens;
        let (mut below, mut above) = (0.0, self.most(dials));
        if self.operation(above, budget).is_none_or(|o| o.rate <= rate) {
            return 1.0;
        }
        for _ in 0..HALVINGS {
            let n = f64::midpoint(below, above);
            if self.operation(n, budget).is_some_and(|o| o.rate < rate) {
                below = n;
            } else {
                above = n;
            }
        }
        (self.operation(above, budget)).map_or(1.0, |o| self.missed(&o, dials, fleet))
    }

    /// Share of requests that may miss.
    pub fn allowed(&self) -> f64 {
        self.misses
    }

    /// The most sequences that decode at once with these dials.
    fn most(&self, dials: Dials) -> f64 {
        f64::from(dials.max_num_seqs).min(0.999 * self.fed(dials.max_num_batched_tokens))
    }

    /// The most sequences that this budget keeps decoding.
    fn fed(&self, budget: u32) -> f64 {
        self.mix.output * f64::from(budget) / (self.mix.prompt + self.mix.output)
    }

    /// With `n` sequences decoding; `None` where that takes more prompts than the budget has room
    /// for.
    fn operation(&self, n: f64, budget: u32) -> Option<Operation> {
        let room = f64::from(budget) - n;
        if n <= 0.0 || room <= 0.0 {
            return None;
        }
        let decode = self.step_seconds(n, n);
        let mixed = self.step_seconds(n, f64::from(budget));
        let mixed_share = n * self.mix.prompt / (self.mix.output * room);
        let step = decode + mixed_share * (mixed - decode);
        (mixed_share < 1.0 && step > 0.0).then(|| Operation {
            n,
            rate: n / (self.mix.output * step),
            step,
            decode,
            mixed,
            mixed_share,
        })
    }

    /// Share of requests that miss an objective in a fleet of `fleet`: the mean of a replica that has
    /// more sequences than usual and one that has fewer.
    fn missed(&self, operation: &Operation, dials: Dials, fleet: u32) -> f64 {
        let budget = dials.max_num_batched_tokens;
        let fleet = f64::from(fleet.max(1));
        let spread = (operation.n / fleet).sqrt();
        let missed = [1.0, -1.0].map(|side| {
            let n = (operation.n + side * spread).min(0.999 * self.fed(budget));
            let Some(there) = self.operation(n.max(0.1 * operation.n), budget) else {
                return 1.0;
            };
            let there = Operation {
                rate: operation.rate,
                ..there
            };
            let late = self.late_prompts(&there, dials, fleet);
            1.0 - (1.0 - late) * (1.0 - self.slow_answers(&there, budget, fleet))
        });
        f64::midpoint(missed[0], missed[1])
    }

    /// Share of requests whose tokens come too slowly.
    ///
    /// A request of O tokens takes O times a decoding step, and what the prompts take that came while
    /// it waited for its first token or come meanwhile. Alone, a replica gets them at its rate, over a
    /// time that they make longer themselves: the request is late if those within the time it may
    /// take are more than that time has room for. In a large fleet they come as its sequences end, so
    /// many a step.
    fn slow_answers(&self, operation: &Operation, budget: u32, fleet: f64) -> f64 {
        let Operation { n, rate, .. } = *operation;
        let goal = self.objectives.itl_seconds;
        if operation.mixed <= goal {
            return 0.0;
        }
        if self.objectives.itl_of == ItlOf::P95 {
            return 1.0;
        }
        let room = goal - operation.decode;
        if room <= 0.0 {
            return 1.0;
        }
        let stall = self.mix.prompt * (operation.mixed - operation.decode).max(0.0)
            / (f64::from(budget) - n).max(1.0);
        let square = stall * stall * (1.0 + self.mix.prompt_variation);
        let prompt = self.prompt_seconds(operation, budget);
        let busy = busy(operation, prompt, fleet);
        let behind = rate * (prompt + busy * self.queued(prompt, busy));
        let spared = operation.step / operation.mixed;
        let late = self.mix.answers().map(|(output, share)| {
            let beyond = |prompts: f64| {
                let (mean, variance) = (prompts * stall, prompts * square);
                share * gamma_tail(room * output, mean, variance)
            };
            let alone = beyond(behind + rate * goal * output);
            let among = beyond(spared * behind + n * output / self.mix.output);
            among + (alone - among) / fleet
        });
        late.sum()
    }

    /// The same while `cap` sequences run and more wait.
    fn saturated_itl(&self, cap: f64, budget: u32) -> f64 {
        let room = f64::from(budget) - cap;
        if room <= 0.0 {
            return f64::INFINITY;
        }
        let decode = self.step_seconds(cap, cap);
        let mixed = self.step_seconds(cap, f64::from(budget)).max(decode);
        match self.objectives.itl_of {
            ItlOf::Mean => {
                let share = (cap * self.mix.prompt / (self.mix.output * room)).min(1.0);
                let met = share + self.quantile * (share / self.mix.output).sqrt();
                decode + met.min(1.0) * (mixed - decode)
            }
            ItlOf::P95 => mixed,
        }
    }

    /// Seconds that a mean prompt's chunks take.
    fn prompt_seconds(&self, operation: &Operation, budget: u32) -> f64 {
        self.mix.prompt * operation.mixed / (f64::from(budget) - operation.n)
    }

    /// Mean seconds that a prompt waits for others, if it waits.
    fn queued(&self, prompt: f64, busy: f64) -> f64 {
        let residual = prompt * (1.0 + self.mix.prompt_variation) / 2.0;
        residual / (1.0 - busy)
    }

    /// Share of requests whose first token comes too late.
    fn late_prompts(&self, operation: &Operation, dials: Dials, fleet: f64) -> f64 {
        let goals = &self.objectives;
        let prompt = self.prompt_seconds(operation, dials.max_num_batched_tokens);
        let busy = busy(operation, prompt, fleet);
        let queued = self.queued(prompt, busy);
        // What is left of the step that runs, a long one more likely than a short one; and the step
        // that was put together meanwhile.
        let (share, mixed, decode) = (operation.mixed_share, operation.mixed, operation.decode);
        let square = share * mixed * mixed + (1.0 - share) * decode * decode;
        let overhead = 0.5 * square / operation.step + operation.step;
        let slack = |tokens: f64| {
            let above = (tokens - goals.ttft_free_prompt_tokens).max(0.0);
            goals.ttft_seconds + goals.ttft_seconds_per_prompt_token * above
                - prompt * tokens / self.mix.prompt
                - overhead
        };
        // Who finds all seats taken waits for answers to end.
        let seats = f64::from(dials.max_num_seqs).min(0.95 * self.kv_tokens / self.mix.context);
        let spread = (operation.n / fleet).sqrt().max(0.5);
        let late = self.mix.prompts().map(|tokens| {
            let slack = slack(tokens);
            let ends = operation.rate * slack.max(0.0);
            let in_time = if slack > 0.0 {
                1.0 - busy * (-slack / queued).exp()
            } else {
                0.0
            };
            let seated = 1.0 - upper_tail((seats + ends - operation.n) / spread);
            1.0 - in_time * seated
        });
        late.iter().sum::<f64>() / late.len() as f64
    }
}

/// How busy a replica of a fleet of so many is with prompts, in the eyes of those that come.
fn busy(operation: &Operation, prompt: f64, fleet: f64) -> f64 {
    let alone = operation.rate * prompt;
    let spared = operation.mixed_share;
    (spared + (alone - spared) / fleet.max(1.0)).clamp(0.0, 0.999)
}

/// Whether a law's terms can be reckoned with.
pub(crate) fn usable(law: &Law) -> bool {
    let term = |x: f64, low: f64, high: f64| x.is_finite() && x >= low && x <= high;
    term(law.base, 1e-6, 60.0)
        && term(law.per_kv_token, 0.0, 1.0)
        && term(law.per_token, 0.0, 10.0)
        && term(law.per_sequence, 0.0, 10.0)
        && term(law.hidden, 0.0, 1.0)
}

/// Probability that a normal variable exceeds `z`, to within 1e-7: Abramowitz and Stegun, Handbook
/// of Mathematical Functions, 26.2.17.
fn upper_tail(z: f64) -> f64 {
    let x = z.abs();
    let t = 1.0 / (1.0 + 0.231_641_9 * x);
    let poly = t
        * (0.319_381_53
            + t * (-0.356_563_782
                + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = poly * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    if z >= 0.0 { tail } else { 1.0 - tail }
}

/// Probability that a gamma distributed variable exceeds `x`: Wilson and Hilferty's cube root.
fn gamma_tail(x: f64, mean: f64, variance: f64) -> f64 {
    if mean <= 0.0 || variance <= 0.0 {
        return if x < mean { 1.0 } else { 0.0 };
    }
    if x > mean && (x - mean) * (x - mean) > 100.0 * variance {
        return 0.0;
    }
    let ninth = variance / (9.0 * mean * mean);
    upper_tail(((x / mean).max(0.0).cbrt() - (1.0 - ninth)) / ninth.sqrt())
}

/// z such that a normal variable exceeds it with probability `p` (0 < p <= 0.5), to within 5e-4:
/// Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23.
fn upper_quantile(p: f64) -> f64 {
    let t = (-2.0 * p.clamp(1e-9, 0.5).ln()).sqrt();
    t - (2.515_517 + 0.802_853 * t + 0.010_328 * t * t)
        / (1.0 + 1.432_788 * t + 0.189_269 * t * t + 0.001_308 * t * t * t)
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
