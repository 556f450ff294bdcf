//! The step-time law from sums over steps: what a replica tells that doesn't fit its law itself.

use stoker_law::{Law, StepShape};

use crate::wire::{Counters, Sums};

/// Steps without and with prompts below which nothing is fitted.
const LEAST_DECODES: f64 = 100.0;
const LEAST_PREFILLS: f64 = 20.0;
/// What the guess of how much hides counts, where the steps don't tell: as a time that is off by so much.
const GUESS: f64 = 0.02;
/// Lengths that stand for all.
const POINTS: usize = 16;
/// Budgets of which steps are kept.
const MOST_BUDGETS: usize = 12;
/// Steps with prompts from which on more of them tell little of the mean time, and of its slope: what is
/// off there is the shape assumed of their lengths.
const ENOUGH: f64 = 10.0;
const ENOUGH_FOR_SLOPE: f64 = 100.0;

/// Steps of all replicas, those with prompts by the budget that they were put together under: sums over
/// more than one budget have no law.
#[derive(Default)]
pub struct Steps {
    decodes: Sums,
    prefills: Vec<(u32, Sums)>,
}

impl Steps {
    /// Adds what a replica did since it was looked at before, while the budget stood; one that was
    /// restarted meanwhile counts from nothing.
    pub fn add(&mut self, before: &Counters, now: &Counters, budget: u32) {
        let since = |now: &Sums, before: &Sums| {
            let restarted = now.n < before.n;
            now.less(if restarted { Sums::default() } else { *before })
        };
        let prefills = since(&now.reg_prefill, &before.reg_prefill);
        self.decodes = (self.decodes).plus(since(&now.reg_decode, &before.reg_decode));
        match (self.prefills.iter_mut()).find(|(known, _)| *known == budget) {
            Some((_, sums)) => *sums = sums.plus(prefills),
            None => self.prefills.push((budget, prefills)),
        }
        if self.prefills.len() > MOST_BUDGETS {
            let fewest = (self.prefills.iter().enumerate())
                .filter(|(_, (other, _))| *other != budget)
                .min_by(|(_, a), (_, b)| a.1.n.total_cmp(&b.1.n));
            if let Some((place, _)) = fewest {
                self.prefills.remove(place);
            }
        }
    }

    /// The law behind the steps; `None` while there are too few.
    pub fn law(&self) -> Option<Law> {
        law(&self.decodes, &self.prefills)
    }
}

/// How much slower than `law` says a replica's steps without prompts are; `None` while there are too
/// few.
pub fn slowness(law: &Law, decodes: &Sums) -> Option<f64> {
    let n = decodes.n;
    let expected = (law.base + (1.0 - law.hidden) * law.per_token * decodes.s / n)
        + law.per_kv_token * decodes.k / n
        + law.per_sequence * decodes.s / n;
    (n >= LEAST_DECODES).then(|| decodes.y / n / expected)
}

/// Steps without prompts give the memory-bound terms by least squares. For those with prompts only
/// means and slopes are known, so that the other terms are those with which prompts of that mean
/// and variance take that mean time and show that slope, under one budget and the next.
fn law(decode: &Sums, prefills: &[(u32, Sums)]) -> Option<Law> {
    let regimes: Vec<Regime> = (prefills.iter())
        .filter(|(_, sums)| sums.n >= LEAST_PREFILLS)
        .map(|(budget, sums)| Regime::new(sums, *budget))
        .collect();
    if decode.n < LEAST_DECODES || regimes.is_empty() {
        return None;
    }
    let (base, per_kv_token, beside) = memory_bound(decode)?;
    let with = |hidden: f64, per_token: f64| Law {
        base,
        per_kv_token,
        per_token,
        // A decoding token's share of compute that doesn't hide was counted as the sequence's.
        per_sequence: (beside - (1.0 - hidden) * per_token).max(0.0),
        hidden,
    };
    let dearest = regimes.iter().map(|r| r.seconds / r.tokens.max(1.0));
    let dearest = dearest.fold(0.0, f64::max);
    let candidates = (0..=20).map(|step| {
        let hidden = f64::from(step) / 20.0;
        let (mut low, mut high) = (0.0, dearest);
        for _ in 0..30 {
            let middle = f64::midpoint(low, high);
            let law = with(hidden, middle);
            let off = regimes.iter().map(|r| r.off(&law).0);
            if off.sum::<f64>() < 0.0 {
                low = middle;
            } else {
                high = middle;
            }
        }
        let law = with(hidden, high);
        let off = regimes.iter().map(|r| {
            let (mean, steep) = r.off(&law);
            mean.abs() + steep.abs()
        });
        let guess = GUESS * (hidden - Law::typical(base).hidden).abs();
        (off.sum::<f64>() + guess, law)
    });
    let best = candidates.min_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(best.1)
}

/// Steps with prompts under one budget: their means, and how their time goes with the prompt tokens.
struct Regime {
    seconds: f64,
    sequences: f64,
    kv_tokens: f64,
    tokens: f64,
    slope: f64,
    /// Standard deviation of the prompt tokens.
    deviation: f64,
    /// Lengths, and the share of the steps that each stands for.
    prompts: [(f64, f64); POINTS],
    /// What the mean and the slope count.
    weights: (f64, f64),
}

impl Regime {
    fn new(sums: &Sums, budget: u32) -> Self {
        let n = sums.n;
        let (y, p) = (sums.y / n, sums.p / n);
        let variance = (sums.pp / n - p * p).max(0.0);
        Regime {
            seconds: y,
            sequences: sums.s / n,
            kv_tokens: sums.k / n,
            tokens: p,
            slope: (sums.yp / n - y * p) / variance.max(1e-9),
            deviation: variance.sqrt(),
            prompts: prompts(p, variance, (f64::from(budget) - sums.s / n).max(1.0)),
            weights: (n / (n + ENOUGH), n / (n + ENOUGH_FOR_SLOPE)),
        }
    }

    /// By how much a law's mean time is off, and its time for prompts a standard deviation longer for its
    /// slope, relative to the mean time that was measured and as much as each counts.
    fn off(&self, law: &Law) -> (f64, f64) {
        let seconds = |p: f64| {
            law.step_seconds(StepShape {
                sequences: self.sequences as u32,
                tokens: (self.sequences + p) as u32,
                kv_tokens: self.kv_tokens as u64,
            })
        };
        let steps = self.prompts.map(|(p, share)| (p, seconds(p), share));
        let mean = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
            steps.iter().map(|&(p, y, share)| share * of(p, y)).sum()
        };
        let (y, p) = (mean(&|_, y| y), mean(&|p, _| p));
        let product = mean(&|other, time| (other - p) * (time - y));
        let square = mean(&|other, _| (other - p).powi(2));
        let slope = product / f64::max(square, 1e-9);
        let steep = (slope - self.slope) * self.deviation;
        let (of_mean, of_slope) = self.weights;
        (
            of_mean * (y / self.seconds - 1.0),
            of_slope * steep / self.seconds,
        )
    }
}

/// Prompt tokens of steps, each with the share of steps that it stands for: long prompts fill step after step
/// up to what the budget leaves, and what is left of them, like prompts that are shorter, spreads evenly;
/// both so that mean and variance are what was measured.
fn prompts(mean: f64, variance: f64, room: f64) -> [(f64, f64); POINTS] {
    let mean = mean.min(room);
    let rest = |full: f64| {
        let middle = ((mean - full * room) / (1.0 - full)).clamp(0.0, room);
        (middle, 2.0 * middle.min(room - middle))
    };
    let spread = |full: f64| {
        let (middle, width) = rest(full);
        let square = middle * middle + width * width / 12.0;
        full * room * room + (1.0 - full) * square - mean * mean
    };
    let (mut low, mut high) = (0.0, 0.999 * mean / room);
    for _ in 0..30 {
        let full = f64::midpoint(low, high);
        if spread(full) < variance {
            low = full;
        } else {
            high = full;
        }
    }
    let (middle, width) = rest(low);
    let width = width.min((12.0 * variance / (1.0 - low)).sqrt());
    std::array::from_fn(|i| match i {
        0 => (room, low),
        _ => {
            let others = (POINTS - 1) as f64;
            let place = (i as f64 - 0.5) / others;
            (middle + width * (place - 0.5), (1.0 - low) / others)
        }
    })
}

/// Seconds of an empty step, of a cached token and of a sequence.
fn memory_bound(sums: &Sums) -> Option<(f64, f64, f64)> {
    let n = sums.n;
    let (y, s, k) = (sums.y / n, sums.s / n, sums.k / n);
    let (ss, kk, sk) = (
        sums.ss / n - s * s,
        sums.kk / n - k * k,
        sums.sk / n - s * k,
    );
    let (ys, yk) = (sums.ys / n - y * s, sums.yk / n - y * k);
    let determinant = ss * kk - sk * sk;
    let (mut per_kv, mut per_sequence) = (0.0, 0.0);
    if determinant > 1e-4 * ss * kk && determinant > 0.0 {
        per_kv = (yk * ss - ys * sk) / determinant;
        per_sequence = (ys * kk - yk * sk) / determinant;
    }
    // Where sequences and their tokens can't be told apart, one of them stands for both.
    if per_kv <= 0.0 && ss > 0.0 {
        (per_kv, per_sequence) = (0.0, (ys / ss).max(0.0));
    } else if per_sequence < 0.0 {
        (per_kv, per_sequence) = ((yk / kk).max(0.0), 0.0);
    }
    let base = y - per_kv * k - per_sequence * s;
    (base.is_finite() && base > 0.0).then_some((base, per_kv, per_sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn study_t4(hidden: f64) -> Law {
        Law {
            base: 27.5e-3,
            per_kv_token: 0.36e-6,
            per_token: 0.27e-3,
            per_sequence: 0.2e-3,
            hidden,
        }
    }

    /// Sums over steps of a law: every third has a part of a prompt.
    fn steps(law: &Law, budget: u32, mean_prompt: f64, n: u32) -> (Sums, Sums) {
        let (mut decode, mut prefill) = (Sums::default(), Sums::default());
        let mut random = 1u64;
        let mut uniform = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            ((random >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        for step in 0..n {
            let s = 1.0 + (20.0 * uniform()).floor();
            let k = (s * (700.0 + 900.0 * uniform())).floor();
            let prompt = (-mean_prompt * uniform().ln())
                .clamp(1.0, f64::from(budget) - s)
                .floor();
            let (p, sums) = if step % 3 == 0 {
                (prompt, &mut prefill)
            } else {
                (0.0, &mut decode)
            };
            let shape = StepShape {
                sequences: s as u32,
                tokens: (s + p) as u32,
                kv_tokens: k as u64,
            };
            let y = law.step_seconds(shape) * (1.0 + 0.06 * (uniform() - 0.5));
            sums.n += 1.0;
            sums.y += y;
            sums.s += s;
            sums.k += k;
            sums.p += p;
            sums.ss += s * s;
            sums.sk += s * k;
            sums.kk += k * k;
            sums.pp += p * p;
            sums.ys += y * s;
            sums.yk += y * k;
            sums.yp += y * p;
        }
        (decode, prefill)
    }

    #[test]
    fn finds_the_law_behind_the_sums() {
        for hidden in [1.0, 0.7, 0.0] {
            for budget in [256, 2048] {
                let truth = study_t4(hidden);
                let (decode, prefill) = steps(&truth, budget, 1100.0, 6000);
                let law = law(&decode, &[(budget, prefill)]).unwrap();
                for (sequences, tokens) in [(4, 4), (16, 16), (12, 256), (12, 512), (12, 2048)] {
                    let shape = StepShape {
                        sequences,
                        tokens,
                        kv_tokens: 1200 * u64::from(sequences),
                    };
                    let off = law.step_seconds(shape) / truth.step_seconds(shape) - 1.0;
                    // Far beyond the budget that was seen it extrapolates.
                    let seen = tokens <= budget;
                    let tolerance = if seen { 0.12 } else { 0.35 };
                    assert!(
                        off.abs() < tolerance,
                        "{truth:?} at {budget}: {law:?}: {off}"
                    );
                }
            }
        }
    }

    /// Nearly all steps with prompts are as large as the budget allows, so that what they show is one time; a
    /// few of the first ones were larger.
    #[test]
    fn a_few_steps_under_another_budget_tell_what_hides() {
        for hidden in [1.0, 0.5, 0.0] {
            let truth = study_t4(hidden);
            let (mut decode, mut regimes) = (Sums::default(), Vec::new());
            for (budget, n) in [(2048, 66), (256, 20_000), (224, 50_000)] {
                let (more, prefill) = steps(&truth, budget, 12_000.0, n);
                decode = decode.plus(more);
                regimes.push((budget, prefill));
            }
            let law = law(&decode, &regimes).unwrap();
            assert!((law.hidden - hidden).abs() <= 0.15, "{truth:?}: {law:?}");
            let off = law.per_token / truth.per_token - 1.0;
            assert!(off.abs() < 0.05, "{truth:?}: {law:?}");
        }
    }

    #[test]
    fn steps_count_for_the_budget_that_they_were_made_under() {
        let truth = study_t4(1.0);
        let (mut seen, mut all) = (Steps::default(), Counters::default());
        for budget in [160, 2048, 224, 352] {
            let before = all.clone();
            let (decode, prefill) = steps(&truth, budget, 1100.0, 6000);
            all.reg_decode = all.reg_decode.plus(decode);
            all.reg_prefill = all.reg_prefill.plus(prefill);
            seen.add(&before, &all, budget);
        }
        let law = seen.law().unwrap();
        assert!(law.hidden >= 0.9, "{law:?}");
        assert!(
            (law.per_token / truth.per_token - 1.0).abs() < 0.05,
            "{law:?}"
        );
        let (decode, _) = steps(&truth.slowed(2.0), 352, 1100.0, 6000);
        let slow = slowness(&law, &decode).unwrap();
        assert!((slow - 2.0).abs() < 0.1, "{slow}");
        // A restart counts from nothing.
        let n = seen.decodes.n;
        seen.add(&all, &Counters::default(), 352);
        assert_eq!(seen.decodes.n, n);
    }

    #[test]
    fn a_few_steps_are_no_law() {
        assert_eq!(law(&Sums::default(), &[(256, Sums::default())]), None);
    }
}
