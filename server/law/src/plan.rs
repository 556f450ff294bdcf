//! The law turned round: what fits into a wanted time.

use crate::{Law, StepShape};

/// What a replica decodes while a prompt is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunningLoad {
    /// Decoding sequences.
    pub sequences: u32,
    /// Their cached tokens, summed.
    pub kv_tokens: u64,
}

impl Law {
    /// The most sequences that may decode at once, with `mean_context` cached tokens each, so
    /// that a step which also computes `prompt_tokens` of some prompt takes at most `seconds`.
    /// 0 where not even one does.
    pub fn max_sequences(&self, seconds: f64, mean_context: f64, prompt_tokens: u32) -> u32 {
        largest(|sequences| {
            let kv_tokens = f64::from(sequences) * mean_context.max(0.0);
            let shape = StepShape {
                sequences,
                tokens: sequences.saturating_add(prompt_tokens),
                kv_tokens: kv_tokens as u64,
            };
            self.step_seconds(shape) <= seconds
        })
    }

    /// The most tokens (decoding ones included) that a step with the given load may compute and
    /// take at most `seconds`. Less than `load.sequences` (or 0) where decoding alone takes
    /// longer.
    pub fn max_batched_tokens(&self, seconds: f64, load: RunningLoad) -> u32 {
        largest(|tokens| {
            let shape = StepShape {
                sequences: load.sequences,
                tokens,
                kv_tokens: load.kv_tokens,
            };
            self.step_seconds(shape) <= seconds
        })
    }

    /// Seconds until a prompt of `prompt_tokens` is computed, that is until its first token, when
    /// `queued_tokens` of other prompts go before it, every step computes at most `budget`
    /// tokens and `load` decodes on. Infinite where decoding leaves no token of the budget.
    pub fn prompt_seconds(
        &self,
        prompt_tokens: u32,
        queued_tokens: u64,
        budget: u32,
        load: RunningLoad,
    ) -> f64 {
        let total = queued_tokens.saturating_add(u64::from(prompt_tokens));
        if total == 0 {
            return 0.0;
        }
        let chunk = budget.saturating_sub(load.sequences);
        if chunk == 0 {
            return f64::INFINITY;
        }
        // The prompt's own cached tokens grow from chunk to chunk; the mean stands for them.
        let kv_tokens = load.kv_tokens.saturating_add(u64::from(prompt_tokens / 2));
        let step = |prompt: u32| {
            self.step_seconds(StepShape {
                sequences: load.sequences.saturating_add(1),
                tokens: load.sequences.saturating_add(prompt),
                kv_tokens,
            })
        };
        let full_steps = total / u64::from(chunk);
        let rest = (total % u64::from(chunk)) as u32;
        let rest_seconds = if rest > 0 { step(rest) } else { 0.0 };
        full_steps as f64 * step(chunk) + rest_seconds
    }
}

/// The largest number that `fits`, 0 if none does; `fits` must hold up to some number only.
fn largest(fits: impl Fn(u32) -> bool) -> u32 {
    if fits(u32::MAX) {
        return u32::MAX;
    }
    // Invariant: `low` fits (or is 0), `high` doesn't.
    let (mut low, mut high) = (0, u32::MAX);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const T4: Law = Law {
        base: 27.5e-3,
        per_kv_token: 0.36e-6,
        per_token: 0.27e-3,
        per_sequence: 0.2e-3,
        hidden: 1.0,
    };

    #[test]
    fn t4_fits_the_budget_that_hides_behind_the_weights() {
        // 27.5 ms of weights hide 101 tokens; 8 sequences cost 1.6 ms.
        let load = RunningLoad {
            sequences: 8,
            kv_tokens: 0,
        };
        assert_eq!(T4.max_batched_tokens(27.5e-3 + 1.6e-3 + 1e-9, load), 101);
        // 100 ms: (100 - 1.6) / 0.27 = 364.4
        assert_eq!(T4.max_batched_tokens(0.1, load), 364);
        // 29 ms is less than the weights and the sequences take.
        assert_eq!(T4.max_batched_tokens(0.029, load), 0);
    }

    #[test]
    fn t4_sequences_for_a_step_time() {
        // 27.5 ms + n * (1000 * 0.36 us + 0.2 ms) <= 50 ms: n = 40.
        assert_eq!(T4.max_sequences(0.05, 1000.0, 0), 40);
        // A chunk that exceeds the time leaves no room at all.
        assert_eq!(T4.max_sequences(0.05, 1000.0, 288), 0);
        assert_eq!(T4.max_sequences(0.01, 1000.0, 0), 0);
    }

    #[test]
    fn prompt_time_adds_up_its_chunks() {
        let load = RunningLoad {
            sequences: 8,
            kv_tokens: 8_000,
        };
        let chunk = T4.step_seconds(StepShape {
            sequences: 9,
            tokens: 288,
            kv_tokens: 8_500,
        });
        let rest = T4.step_seconds(StepShape {
            sequences: 9,
            tokens: 8 + 440,
            kv_tokens: 8_500,
        });
        // 1,000 + 120 tokens in chunks of 280: exactly 4.
        let time = T4.prompt_seconds(1_000, 120, 288, load);
        assert!((time - 4.0 * chunk).abs() < 1e-12);
        // In chunks of 680: one, and 440 left.
        let time = T4.prompt_seconds(1_000, 120, 688, load);
        let full = T4.step_seconds(StepShape {
            sequences: 9,
            tokens: 688,
            kv_tokens: 8_500,
        });
        assert!((time - full - rest).abs() < 1e-12);
        assert_eq!(T4.prompt_seconds(0, 0, 288, load), 0.0);
        assert_eq!(T4.prompt_seconds(10, 0, 8, load), f64::INFINITY);
    }

    #[test]
    fn a_law_of_zeros_fits_anything() {
        let zeros = Law::typical(0.0);
        assert_eq!(zeros.max_sequences(0.1, 1000.0, 100), u32::MAX);
        assert_eq!(
            zeros.max_batched_tokens(0.1, RunningLoad::default()),
            u32::MAX
        );
    }

    proptest! {
        /// What is returned fits; one more doesn't.
        #[test]
        fn inverses_are_exact(
            base in 1e-4..0.1f64, kv in 0.0..1e-6f64, token in 1e-7..1e-3f64,
            sequence in 1e-6..1e-3f64, hidden in 0.0..=1.0f64, seconds in 1e-4..1.0f64,
            context in 0.0..8_000f64, prompt in 0u32..4_000, running in 0u32..300,
        ) {
            let law = Law {
                base, per_kv_token: kv, per_token: token, per_sequence: sequence, hidden,
            };
            let time = |sequences: u32| law.step_seconds(StepShape {
                sequences,
                tokens: sequences + prompt,
                kv_tokens: (f64::from(sequences) * context) as u64,
            });
            let most = law.max_sequences(seconds, context, prompt);
            prop_assert!(most == 0 || time(most) <= seconds);
            prop_assert!(time(most + 1) > seconds);

            let load = RunningLoad { sequences: running, kv_tokens: 1_000 };
            let time = |tokens| law.step_seconds(StepShape {
                sequences: running, tokens, kv_tokens: 1_000,
            });
            let most = law.max_batched_tokens(seconds, load);
            prop_assert!(most == 0 || time(most) <= seconds);
            prop_assert!(most == u32::MAX || time(most + 1) > seconds);
        }
    }
}
