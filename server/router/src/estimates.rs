//! What a request costs, learnt from what answers say: no tokenizer here.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Weight of a new observation.
const ALPHA: f64 = 0.05;

/// A moving average that many threads update; a lost update does no harm.
#[derive(Debug)]
pub struct Average(AtomicU32);

impl Average {
    #[must_use]
    pub fn new(value: f64) -> Self {
        Self(AtomicU32::new((value as f32).to_bits()))
    }

    #[must_use]
    pub fn get(&self) -> f64 {
        f64::from(f32::from_bits(self.0.load(Relaxed)))
    }

    pub fn set(&self, value: f64) {
        self.0.store((value as f32).to_bits(), Relaxed);
    }

    pub fn observe(&self, value: f64) {
        let old = self.get();
        let new = old + ALPHA * (value - old);
        if new.is_finite() {
            self.set(new);
        }
    }
}

/// Averages of one service.
#[derive(Debug)]
pub struct Estimates {
    /// Of the prompt as it stands in the JSON body.
    tokens_per_byte: Average,
    /// Tokens of an answer.
    output: Average,
    /// Share of max_tokens that answers use.
    output_share: Average,
}

impl Default for Estimates {
    fn default() -> Self {
        Self {
            tokens_per_byte: Average::new(0.25),
            output: Average::new(256.0),
            output_share: Average::new(1.0),
        }
    }
}

impl Estimates {
    #[must_use]
    pub fn prompt_tokens(&self, bytes: usize) -> f64 {
        (bytes as f64 * self.tokens_per_byte.get()).max(1.0)
    }

    #[must_use]
    pub fn output_tokens(&self, max_tokens: Option<u64>) -> f64 {
        match max_tokens {
            Some(most) => (most as f64 * self.output_share.get()).max(1.0),
            None => self.output.get().max(1.0),
        }
    }

    #[must_use]
    pub fn mean_output(&self) -> f64 {
        self.output.get()
    }

    /// An answer said how many tokens its prompt had.
    pub fn learn_prompt(&self, bytes: usize, tokens: u64) {
        if bytes > 0 {
            let ratio = tokens as f64 / bytes as f64;
            self.tokens_per_byte.observe(ratio.clamp(0.01, 1.0));
        }
    }

    /// An answer ended after so many tokens.
    pub fn learn_output(&self, max_tokens: Option<u64>, tokens: u64) {
        self.output.observe(tokens as f64);
        if let Some(most) = max_tokens {
            let share = tokens as f64 / most.max(1) as f64;
            self.output_share.observe(share.clamp(0.0, 1.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_from_answers() {
        let estimates = Estimates::default();
        for _ in 0..200 {
            estimates.learn_prompt(1000, 400);
            estimates.learn_output(Some(100), 50);
        }
        assert!((estimates.prompt_tokens(500) - 200.0).abs() < 2.0);
        assert!((estimates.output_tokens(Some(10)) - 5.0).abs() < 0.1);
        assert!((estimates.output_tokens(None) - 50.0).abs() < 1.0);
    }
}
