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
//! Prompts queue for the budget like customers of an M/G/1 queue whose service time is the time
//! that a prompt's chunks take in full steps.

use serde::{Deserialize, Serialize};
use stoker_law::Law;

use crate::observation::{Dials, ItlOf, Objectives};

/// Share of the inter-token objective that a planned load may use: the rest is for noise, for the
/// law's error and for requests that meet a worse mix than the mean.
const ITL_PLANNED: f64 = 0.85;
/// The same for a replica whose prompts queue without end, as while pods are on their way.
const ITL_SATURATED: f64 = 0.9;
/// Share of the KV memory that the dials may fill on average.
const KV_PLANNED: f64 = 0.9;
/// A replica is worth at least this share of what it serves when saturated, even where the
/// objectives can't be kept: no number of replicas would help, so don't order them all.
const LEAST_SHARE: f64 = 0.25;

/// The kind of requests that come, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Mix {
    /// Mean prompt.
    pub prompt: f64,
    /// Squared coefficient of variation of the prompts.
    pub prompt_variation: f64,
    /// 95th percentile of the prompts.
    pub long_prompt: f64,
    /// Mean answer.
    pub output: f64,
    /// Mean cached tokens of a running sequence.
    pub context: f64,
}

impl Mix {
    /// A guess for a service that hasn't seen a request yet: a chat with some history.
    pub const UNKNOWN: Mix = Mix {
        prompt: 512.0,
        prompt_variation: 1.0,
        long_prompt: 1536.0,
        output: 128.0,
        context: 576.0,
    };

    /// `share` (0..=1) of the way to another mix.
    pub fn towards(self, other: Mix, share: f64) -> Mix {
        let towards = |from: f64, to: f64| from + share * (to - from);
        Mix {
            prompt: towards(self.prompt, other.prompt),
            prompt_variation: towards(self.prompt_variation, other.prompt_variation),
            long_prompt: towards(self.long_prompt, other.long_prompt),
            output: towards(self.output, other.output),
            context: towards(self.context, other.context),
        }
        .bounded()
    }

    /// The same with every figure in a range that the model can use.
    pub fn bounded(self) -> Mix {
        let bound = |x: f64, low: f64, high: f64, or: f64| {
            if x.is_finite() {
                x.max(low).min(high)
            } else {
                or
            }
        };
        let prompt = bound(self.prompt, 1.0, 1e7, Mix::UNKNOWN.prompt);
        let output = bound(self.output, 1.0, 1e7, Mix::UNKNOWN.output);
        Mix {
            prompt,
            prompt_variation: bound(self.prompt_variation, 0.0, 9.0, 1.0),
            long_prompt: bound(self.long_prompt, prompt, 1e8, prompt),
            output,
            context: bound(self.context, 1.0, 1e8, prompt + output / 2.0),
        }
    }
}

/// What one replica carries with given dials.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Capacity {
    /// Requests a second within the objectives.
    pub rate: f64,
    /// Requests running or waiting at that rate.
    pub in_flight: f64,
    /// Requests a second when it never lacks work.
    pub saturated_rate: f64,
}

/// A replica under a steady load.
struct Operation {
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

    /// What a replica carries with these dials; `None` where it can't serve at all.
    pub fn capacity(&self, dials: Dials) -> Option<Capacity> {
        let budget = dials.max_num_batched_tokens;
        let cap = f64::from(dials.max_num_seqs);
        let most = cap.min(0.999 * self.fed(budget));
        let saturated = self.operation(most, budget)?;
        let (mut keeps, mut fails) = (0.0, most);
        for _ in 0..40 {
            let n = f64::midpoint(keeps, fails);
            if self.within_objectives(n, budget, cap) {
                keeps = n;
            } else {
                fails = n;
            }
        }
        let least = LEAST_SHARE * saturated.rate;
        let within = (self.operation(keeps, budget)).filter(|operation| operation.rate > least);
        let (rate, in_flight) = match within {
            Some(operation) => {
                let prompt = self.prompt_seconds(&operation, keeps, budget);
                let wait = self.busy(&operation, prompt) * self.queued(&operation, prompt);
                (operation.rate, keeps + operation.rate * (prompt + wait))
            }
            None => (least, LEAST_SHARE * most),
        };
        let capacity = Capacity {
            rate,
            in_flight: in_flight.max(1.0),
            saturated_rate: saturated.rate,
        };
        (capacity.rate.is_finite() && capacity.rate > 0.0).then_some(capacity)
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
            rate: n / (self.mix.output * step),
            step,
            decode,
            mixed,
            mixed_share,
        })
    }

    fn within_objectives(&self, n: f64, budget: u32, cap: f64) -> bool {
        let Some(operation) = self.operation(n, budget) else {
            return false;
        };
        let peak = n + self.quantile * n.sqrt();
        peak <= cap
            && peak * self.mix.context <= 0.95 * self.kv_tokens
            && self.itl(n, budget, operation.mixed_share)
                <= ITL_PLANNED * self.objectives.itl_seconds
            && self.late_prompts(&operation, n, budget) <= self.misses
    }

    /// The figure that the inter-token objective is about, for the worst of the requests that must
    /// keep it, where `mixed_share` of the steps carry prompt work.
    fn itl(&self, n: f64, budget: u32, mixed_share: f64) -> f64 {
        let n = n + n.sqrt();
        let decode = self.step_seconds(n, n);
        let mixed = self.step_seconds(n, f64::from(budget)).max(decode);
        match self.objectives.itl_of {
            // A request of O gaps meets about O * share mixed steps, short ones more by chance.
            ItlOf::Mean => {
                let met = mixed_share + self.quantile * (mixed_share / self.mix.output).sqrt();
                decode + met.min(1.0) * (mixed - decode)
            }
            ItlOf::P95 => mixed,
        }
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
    fn prompt_seconds(&self, operation: &Operation, n: f64, budget: u32) -> f64 {
        self.mix.prompt * operation.mixed / (f64::from(budget) - n)
    }

    /// Share of time in which prompts are being computed.
    fn busy(&self, operation: &Operation, prompt: f64) -> f64 {
        (operation.rate * prompt).min(0.999)
    }

    /// Mean seconds that a prompt waits for others, if it waits.
    fn queued(&self, operation: &Operation, prompt: f64) -> f64 {
        let residual = prompt * (1.0 + self.mix.prompt_variation) / 2.0;
        residual / (1.0 - self.busy(operation, prompt))
    }

    /// Share of requests whose first token comes too late.
    fn late_prompts(&self, operation: &Operation, n: f64, budget: u32) -> f64 {
        let goals = &self.objectives;
        let prompt = self.prompt_seconds(operation, n, budget);
        let slack = |tokens: f64| {
            let above = (tokens - goals.ttft_free_prompt_tokens).max(0.0);
            goals.ttft_seconds + goals.ttft_seconds_per_prompt_token * above
                - prompt * tokens / self.mix.prompt
                - operation.step
                - 0.5 * operation.decode
        };
        let slack = slack(self.mix.prompt).min(slack(self.mix.long_prompt));
        if slack <= 0.0 {
            return 1.0;
        }
        self.busy(operation, prompt) * (-slack / self.queued(operation, prompt)).exp()
    }
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

/// z such that a normal variable exceeds it with probability `p` (0 < p <= 0.5), to within 5e-4:
/// Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23.
fn upper_quantile(p: f64) -> f64 {
    let t = (-2.0 * p.clamp(1e-9, 0.5).ln()).sqrt();
    t - (2.515_517 + 0.802_853 * t + 0.010_328 * t * t)
        / (1.0 + 1.432_788 * t + 0.189_269 * t * t + 0.001_308 * t * t * t)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dials::{best, ranges};
    use crate::observation::{DialRange, Limits};

    fn objectives(itl_of: ItlOf) -> Objectives {
        Objectives {
            good_percent: 99.0,
            ttft_seconds: 2.0,
            ttft_free_prompt_tokens: 1000.0,
            ttft_seconds_per_prompt_token: 1e-3,
            itl_seconds: 0.1,
            itl_of,
        }
    }

    fn mix(prompt: f64, output: f64, prompt_variation: f64) -> Mix {
        Mix {
            prompt,
            prompt_variation,
            long_prompt: prompt * (1.0 + 2.0 * prompt_variation.sqrt()),
            output,
            context: prompt + output / 2.0,
        }
    }

    /// The simulated devices: law, KV tokens, ceilings.
    fn t4() -> (Law, u64) {
        let law = Law {
            base: 28.45e-3,
            per_kv_token: 0.36e-6,
            per_token: 0.27e-3,
            per_sequence: 0.17e-3,
            hidden: 1.0,
        };
        (law, 69_754)
    }

    fn h100() -> (Law, u64) {
        let law = Law {
            base: 2.37e-3,
            per_kv_token: 50e-9,
            per_token: 9e-6,
            per_sequence: 10e-6,
            hidden: 0.85,
        };
        (law, 571_986)
    }

    fn pick((law, kv): (Law, u64), mix: Mix, itl_of: ItlOf) -> (Dials, Capacity) {
        let range = |max| DialRange {
            min: 1,
            max,
            initial: 8,
        };
        let limits = Limits {
            min_replicas: 1,
            idle_seconds: 0.0,
            max_replicas: 4,
            max_num_seqs: range(1024),
            max_num_batched_tokens: range(8192),
            scale_down_stabilization_seconds: 300.0,
        };
        let unbound = Dials {
            max_num_seqs: 0,
            max_num_batched_tokens: 0,
        };
        let model = ReplicaModel::new(law, mix, objectives(itl_of), kv);
        let choice = best(&model, ranges(&limits, unbound), unbound).unwrap();
        assert!(model.keeps(choice.dials));
        (choice.dials, choice.capacity)
    }

    #[test]
    fn a_t4_with_1000_token_prompts_gets_what_the_study_found() {
        for variation in [0.0, 1.0] {
            let (dials, one) = pick(t4(), mix(1000.0, 130.0, variation), ItlOf::Mean);
            let budget = dials.max_num_batched_tokens;
            assert!((224..=320).contains(&budget), "{dials:?}");
            assert!((24..=40).contains(&dials.max_num_seqs), "{dials:?}");
            assert!((0.9..2.2).contains(&one.rate), "{one:?}");
            assert!(one.saturated_rate > one.rate);
        }
    }

    #[test]
    fn without_hiding_a_larger_budget_is_worth_its_stalls() {
        let (law, kv) = t4();
        let law = Law { hidden: 0.0, ..law };
        let (dials, _) = pick((law, kv), mix(1000.0, 130.0, 1.0), ItlOf::Mean);
        assert!(dials.max_num_batched_tokens >= 768, "{dials:?}");
    }

    #[test]
    fn the_strict_objective_bounds_every_step() {
        for (prompt, output) in [(200.0, 100.0), (1000.0, 130.0), (4000.0, 300.0)] {
            for device in [t4(), h100()] {
                let mix = mix(prompt, output, 1.0);
                let (dials, _) = pick(device, mix, ItlOf::P95);
                let model = ReplicaModel::new(device.0, mix, objectives(ItlOf::P95), device.1);
                let full = model.step_seconds(
                    f64::from(dials.max_num_seqs),
                    f64::from(dials.max_num_batched_tokens),
                );
                assert!(full <= 0.1, "{dials:?}: {full}");
            }
        }
    }

    #[test]
    fn larger_devices_get_larger_caps_and_carry_more() {
        for (prompt, output) in [(200.0, 100.0), (1000.0, 130.0), (4000.0, 300.0)] {
            let mix = mix(prompt, output, 1.0);
            let (small, one) = pick(t4(), mix, ItlOf::Mean);
            let (large, other) = pick(h100(), mix, ItlOf::Mean);
            println!("{prompt} + {output}: T4 {small:?} {one:?}; H100 {large:?} {other:?}");
            assert!(large.max_num_seqs > 2 * small.max_num_seqs);
            assert!(other.rate > 10.0 * one.rate);
        }
    }

    #[test]
    fn kv_memory_bounds_the_cap() {
        let (law, _) = t4();
        let mix = mix(1000.0, 1000.0, 0.0);
        let model = ReplicaModel::new(law, mix, objectives(ItlOf::Mean), 15_000);
        assert_eq!(model.cap(512, 256), 9);
        assert_eq!(model.cap(512, 4), 4);
    }

    #[test]
    fn an_objective_below_the_base_is_hopeless_and_says_so() {
        let (law, kv) = t4();
        let hard = Objectives {
            itl_seconds: 0.02,
            ..objectives(ItlOf::Mean)
        };
        let model = ReplicaModel::new(law, mix(200.0, 100.0, 0.0), hard, kv);
        assert_eq!(model.cap(288, 256), 0);
    }

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (p, z) in [(0.5, 0.0), (0.05, 1.645), (0.01, 2.326), (0.001, 3.090)] {
            assert!((upper_quantile(p) - z).abs() < 1e-3, "{p}");
        }
    }
}
