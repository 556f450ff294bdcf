//! The fit learns the laws of real cards from noisy steps.

use proptest::prelude::*;
use stoker_law::{Law, LawFit, Prior, StepShape};

const T4: Law = Law {
    base: 27.5e-3,
    per_kv_token: 0.36e-6,
    per_token: 0.27e-3,
    per_sequence: 0.2e-3,
    hidden: 1.0,
};
const H100: Law = Law {
    base: 2.37e-3,
    per_kv_token: 50e-9,
    per_token: 9.0e-6,
    per_sequence: 10e-6,
    hidden: 0.85,
};

/// A small repeatable source of random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, most: u32) -> u32 {
        (self.unit() * f64::from(most)) as u32
    }

    /// Noise of `deviation`: the sum of 12 uniforms is close to a normal distribution.
    fn noise(&mut self, deviation: f64) -> f64 {
        let normal = (0..12).map(|_| self.unit()).sum::<f64>() - 6.0;
        (deviation * normal).exp()
    }
}

fn decode(sequences: u32, context: u64) -> StepShape {
    StepShape {
        sequences,
        tokens: sequences,
        kv_tokens: u64::from(sequences) * context,
    }
}

/// A step as a server sees it: some sequences decode, every third step carries a prompt chunk.
fn mixed(random: &mut Random, most_sequences: u32, budget: u32) -> StepShape {
    let sequences = 1 + random.below(most_sequences);
    let mut shape = decode(sequences, 100 + u64::from(random.below(1500)));
    if random.unit() < 0.33 {
        let chunk = 1 + random.below(budget);
        shape.sequences += 1;
        shape.tokens += chunk;
        shape.kv_tokens += u64::from(chunk);
    }
    shape
}

/// Largest relative error over shapes within what `mixed` makes.
fn worst_error(fitted: &Law, truth: &Law, most_sequences: u32, budget: u32) -> f64 {
    let mut worst = 0.0f64;
    for sequences in [1, most_sequences / 4, most_sequences / 2, most_sequences] {
        for context in [150, 700, 1500] {
            for chunk in [0, budget / 8, budget / 3, budget / 2, budget] {
                let mut shape = decode(sequences.max(1), context);
                if chunk > 0 {
                    shape.sequences += 1;
                    shape.tokens += chunk;
                    shape.kv_tokens += u64::from(chunk);
                }
                let error = fitted.step_seconds(shape) / truth.step_seconds(shape) - 1.0;
                worst = worst.max(error.abs());
            }
        }
    }
    worst
}

fn learn(truth: &Law, prior: Prior, steps: usize, seed: u64, cap: u32, budget: u32) -> LawFit {
    let mut random = Random(seed);
    let mut fit = LawFit::new(prior);
    for _ in 0..steps {
        let shape = mixed(&mut random, cap, budget);
        fit.observe(shape, truth.step_seconds(shape) * random.noise(0.03));
    }
    fit
}

#[test]
fn learns_both_cards_from_a_prior_that_knows_nothing() {
    for (truth, cap, budget) in [(T4, 32, 512), (T4, 24, 2048), (H100, 128, 2048)] {
        for seed in 0..8 {
            let fit = learn(&truth, Prior::default(), 300, seed, cap, budget);
            let error = worst_error(&fit.law(), &truth, cap, budget);
            assert!(
                error < 0.06,
                "seed {seed}: off by {error} with {:?}",
                fit.law()
            );
            assert!(fit.confidence() > 0.7, "confidence {}", fit.confidence());
        }
    }
}

#[test]
fn terms_come_out_right_where_the_shapes_tell_them() {
    let fit = learn(&T4, Prior::default(), 2_000, 5, 64, 1024);
    let law = fit.law();
    assert!((law.base / T4.base - 1.0).abs() < 0.05, "{law:?}");
    assert!((law.per_token / T4.per_token - 1.0).abs() < 0.05, "{law:?}");
    assert!(
        (law.per_kv_token / T4.per_kv_token - 1.0).abs() < 0.2,
        "{law:?}"
    );
    assert!(law.hidden > 0.85, "{law:?}");
}

#[test]
fn steady_decoding_leaves_the_other_terms_near_the_prior() {
    // One shape only: base, per_sequence and the rest can't be told apart.
    let calibrated = Prior {
        law: T4,
        confidence: 0.8,
    };
    let slower = T4.slowed(1.1);
    let mut random = Random(3);
    let mut fit = LawFit::new(calibrated);
    for _ in 0..500 {
        let shape = decode(8, 200);
        fit.observe(shape, slower.step_seconds(shape) * random.noise(0.03));
    }
    let law = fit.law();
    let error = law.step_seconds(decode(8, 200)) / slower.step_seconds(decode(8, 200)) - 1.0;
    assert!(
        error.abs() < 0.03,
        "what was observed is predicted: {error}"
    );
    let long = StepShape {
        sequences: 9,
        tokens: 1032,
        kv_tokens: 9_000,
    };
    let error = law.step_seconds(long) / T4.step_seconds(long) - 1.0;
    assert!(
        error.abs() < 0.1,
        "what wasn't stays near the prior: {error}"
    );
    assert!((law.per_token / T4.per_token - 1.0).abs() < 0.1, "{law:?}");
    assert!((law.hidden - 1.0).abs() < 0.1, "{law:?}");
}

#[test]
fn confidence_grows_with_spread_and_falls_with_noise() {
    let mut narrow = LawFit::new(Prior::default());
    let mut noisy = LawFit::new(Prior::default());
    let mut random = Random(9);
    assert_eq!(narrow.confidence(), 0.0);
    for _ in 0..400 {
        let shape = decode(8, 200);
        narrow.observe(shape, T4.step_seconds(shape) * random.noise(0.03));
        let shape = mixed(&mut random, 32, 512);
        noisy.observe(shape, T4.step_seconds(shape) * random.noise(0.5));
    }
    let wide = learn(&T4, Prior::default(), 400, 1, 32, 512);
    assert!(narrow.confidence() < 0.7, "{}", narrow.confidence());
    assert!(noisy.confidence() < 0.5, "{}", noisy.confidence());
    assert!(wide.confidence() > narrow.confidence());
    let early = learn(&T4, Prior::default(), 5, 1, 32, 512);
    assert!(early.confidence() < 0.5, "{}", early.confidence());
}

#[test]
fn outliers_move_little() {
    let mut random = Random(17);
    let mut fit = LawFit::new(Prior::default());
    for _ in 0..600 {
        let shape = mixed(&mut random, 32, 512);
        let hiccup = if random.unit() < 0.05 { 8.0 } else { 1.0 };
        fit.observe(shape, T4.step_seconds(shape) * random.noise(0.03) * hiccup);
    }
    let error = worst_error(&fit.law(), &T4, 32, 512);
    assert!(error < 0.08, "off by {error}: {:?}", fit.law());
}

#[test]
fn follows_a_card_that_slows_down() {
    let calibrated = Prior {
        law: T4,
        confidence: 0.9,
    };
    for prior in [Prior::default(), calibrated] {
        let mut random = Random(23);
        let mut fit = learn(&T4, prior, 3_000, 4, 32, 512);
        let throttled = T4.slowed(1.4);
        for _ in 0..1_500 {
            let shape = mixed(&mut random, 32, 512);
            fit.observe(shape, throttled.step_seconds(shape) * random.noise(0.03));
        }
        let error = worst_error(&fit.law(), &throttled, 32, 512);
        assert!(error < 0.06, "off by {error}: {:?}", fit.law());
    }
}

#[test]
fn a_measured_prior_holds_what_a_burst_of_prompts_cannot_tell() {
    // Long chunks only: compute-bound, so that the base hardly shows.
    for seed in 0..8 {
        let calibrated = Prior {
            law: T4,
            confidence: 0.6,
        };
        let mut random = Random(seed);
        let mut fit = LawFit::new(calibrated);
        for _ in 0..50 {
            let mut shape = decode(1 + random.below(40), 300);
            shape.sequences += 4;
            shape.tokens += 600 + random.below(1000);
            fit.observe(shape, T4.step_seconds(shape) * random.noise(0.03));
        }
        let error = worst_error(&fit.law(), &T4, 48, 2048);
        assert!(error < 0.1, "off by {error}: {:?}", fit.law());
    }
}

#[test]
fn nonsense_is_ignored() {
    let mut fit = LawFit::new(Prior::default());
    let before = fit.law();
    for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        for _ in 0..20 {
            fit.observe(decode(4, 100), seconds);
            fit.observe(StepShape::default(), 0.1);
        }
    }
    fit.refit();
    assert_eq!(fit.law(), before);
    let broken = LawFit::new(Prior {
        law: Law {
            base: f64::NAN,
            per_kv_token: -1.0,
            per_token: f64::INFINITY,
            per_sequence: 0.0,
            hidden: 7.0,
        },
        confidence: 2.0,
    });
    assert_eq!(broken.law().base, 0.0);
    assert_eq!(broken.law().hidden, 1.0);
    assert_eq!(broken.confidence(), 1.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever the times, terms stay in their bounds and finite; on a real law the prediction
    /// within the observed range comes out right.
    #[test]
    fn terms_stay_in_bounds(
        base in 1e-3..0.1f64, kv in 0.0..1e-4f64, token in 1e-3..0.05f64,
        sequence in 0.0..0.02f64, hidden in 0.0..=1.0f64, seed in any::<u64>(),
    ) {
        let truth = Law {
            base,
            per_kv_token: base * kv * 0.5,
            per_token: base * token,
            per_sequence: base * sequence,
            hidden,
        };
        let fit = learn(&truth, Prior::default(), 500, seed, 48, 1024);
        let law = fit.law();
        for term in [law.base, law.per_kv_token, law.per_token, law.per_sequence, law.hidden] {
            prop_assert!(term.is_finite() && term >= 0.0, "{law:?}");
        }
        prop_assert!(law.hidden <= 1.0);
        prop_assert!((0.0..=1.0).contains(&fit.confidence()));
        let error = worst_error(&law, &truth, 48, 1024);
        prop_assert!(error < 0.1, "off by {error}: {law:?} for {truth:?}");

        let mut random = Random(seed);
        let mut wild = LawFit::new(Prior::default());
        for _ in 0..200 {
            let shape = mixed(&mut random, 48, 1024);
            wild.observe(shape, (random.unit() * 40.0 - 20.0).exp());
        }
        let law = wild.law();
        for term in [law.base, law.per_kv_token, law.per_token, law.per_sequence, law.hidden] {
            prop_assert!(term.is_finite() && term >= 0.0, "{law:?}");
        }
        prop_assert!(law.hidden <= 1.0);
    }
}
