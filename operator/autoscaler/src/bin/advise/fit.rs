//! The step-time law from sums over steps: what a replica tells that doesn't fit its law itself.

use stoker_law::{Law, StepShape};

use crate::wire::Sums;

/// Steps without and with prompts below which nothing is fitted.
const LEAST_DECODES: f64 = 100.0;
const LEAST_PREFILLS: f64 = 20.0;
/// Normal quantiles in the middle of each eighth of the probability.
const EIGHTHS: [f64; 8] = [
    -1.5341, -0.8871, -0.4888, -0.1573, 0.1573, 0.4888, 0.8871, 1.5341,
];

/// `None` while there are too few steps.
///
/// Steps without prompts give the memory-bound terms by least squares. For those with prompts only
/// means and slopes are known, so that the other terms are those with which prompts of that mean
/// and variance take that mean time and show that slope.
pub fn law(decode: &Sums, prefill: &Sums, budget: u32) -> Option<Law> {
    if decode.n < LEAST_DECODES || prefill.n < LEAST_PREFILLS {
        return None;
    }
    let (base, per_kv_token, beside) = memory_bound(decode)?;
    let n = prefill.n;
    let (y, s, k, p) = (prefill.y / n, prefill.s / n, prefill.k / n, prefill.p / n);
    let variance = (prefill.pp / n - p * p).max(0.0);
    let slope = (prefill.yp / n - y * p) / variance.max(1e-9);
    let prompts = prompts(p, variance, f64::from(budget));

    let predicted = |law: &Law| {
        let seconds = prompts.map(|p| {
            law.step_seconds(StepShape {
                sequences: s as u32,
                tokens: (s + p) as u32,
                kv_tokens: k as u64,
            })
        });
        let mean = seconds.iter().sum::<f64>() / 8.0;
        let center = prompts.iter().sum::<f64>() / 8.0;
        let (product, square) = (seconds.iter().zip(&prompts)).fold((0.0, 0.0), |sum, (y, p)| {
            let off = p - center;
            (sum.0 + off * (y - mean), sum.1 + off * off)
        });
        (mean, product / f64::max(square, 1e-9))
    };
    let with = |hidden: f64, per_token: f64| Law {
        base,
        per_kv_token,
        per_token,
        // A decoding token's share of compute that doesn't hide was counted as the sequence's.
        per_sequence: (beside - (1.0 - hidden) * per_token).max(0.0),
        hidden,
    };
    let candidates = (0..=20).map(|step| {
        let hidden = f64::from(step) / 20.0;
        let (mut low, mut high) = (0.0, y / p.max(1.0));
        for _ in 0..30 {
            let middle = f64::midpoint(low, high);
            if predicted(&with(hidden, middle)).0 < y {
                low = middle;
            } else {
                high = middle;
            }
        }
        let law = with(hidden, high);
        let (mean, steep) = predicted(&law);
        let off = (mean / y - 1.0).abs() + (steep - slope).abs() / slope.abs().max(1e-9);
        (off, law)
    });
    let best = candidates.min_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(best.1)
}

/// Prompt tokens of a step that stand for an eighth of the steps each: log-normally distributed, up
/// to the budget.
fn prompts(mean: f64, variance: f64, budget: f64) -> [f64; 8] {
    let sigma = (variance / (mean * mean).max(1e-9)).ln_1p().sqrt();
    let mut lengths = EIGHTHS.map(|z| (sigma * z).exp());
    // What the budget cuts off is made up for by the rest.
    for _ in 0..4 {
        let scale = 8.0 * mean / lengths.iter().sum::<f64>().max(1e-9);
        lengths = lengths.map(|x| (x * scale).min(budget.max(1.0)));
    }
    lengths
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

    /// Sums over steps of a law, with prompts of many lengths.
    fn steps(law: &Law, budget: u32) -> (Sums, Sums) {
        let (mut decode, mut prefill) = (Sums::default(), Sums::default());
        let mut random = 1u64;
        let mut uniform = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            ((random >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        for step in 0..6000 {
            let s = 1.0 + (20.0 * uniform()).floor();
            let k = (s * (700.0 + 900.0 * uniform())).floor();
            let prompt = (-1100.0 * uniform().ln())
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
                let truth = Law {
                    base: 27.5e-3,
                    per_kv_token: 0.36e-6,
                    per_token: 0.27e-3,
                    per_sequence: 0.2e-3,
                    hidden,
                };
                let (decode, prefill) = steps(&truth, budget);
                let law = law(&decode, &prefill, budget).unwrap();
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

    #[test]
    fn a_few_steps_are_no_law() {
        assert_eq!(law(&Sums::default(), &Sums::default(), 256), None);
    }
}
