//! The kind of requests that come.

use serde::{Deserialize, Serialize};

/// Lengths of requests, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Mix {
    /// Mean prompt.
    pub prompt: f64,
    /// Squared coefficient of variation of the prompts.
    pub prompt_variation: f64,
    /// Mean answer.
    pub output: f64,
    /// Squared coefficient of variation of the answers.
    pub output_variation: f64,
    /// Answers in the middle of the [`SHARES`] of the requests.
    pub outputs: [f64; 8],
    /// Mean cached tokens of a running sequence.
    pub context: f64,
}

impl Default for Mix {
    fn default() -> Self {
        Mix::UNKNOWN
    }
}

/// Normal quantiles in the middle of each eighth of the probability.
const EIGHTHS: [f64; 8] = [
    -1.5341, -0.8871, -0.4888, -0.1573, 0.1573, 0.4888, 0.8871, 1.5341,
];

impl Mix {
    /// A guess for a service that hasn't seen a request yet: a chat with some history.
    pub const UNKNOWN: Mix = Mix {
        prompt: 512.0,
        prompt_variation: 1.0,
        output: 128.0,
        output_variation: 0.5,
        outputs: [23.8, 35.5, 47.9, 64.6, 88.9, 122.8, 169.1, 261.3],
        context: 576.0,
    };

    /// Answers of which so many are shorter: what [`Mix::outputs`] are quantiles at.
    pub fn output_quantiles() -> [f64; 8] {
        let mut below = 0.0;
        SHARES.map(|share| {
            below += share;
            below - 0.5 * share
        })
    }

    /// `share` (0..=1) of the way to another mix.
    pub fn towards(self, other: Mix, share: f64) -> Mix {
        let towards = |from: f64, to: f64| from + share * (to - from);
        Mix {
            prompt: towards(self.prompt, other.prompt),
            prompt_variation: towards(self.prompt_variation, other.prompt_variation),
            output: towards(self.output, other.output),
            output_variation: towards(self.output_variation, other.output_variation),
            outputs: std::array::from_fn(|i| towards(self.outputs[i], other.outputs[i])),
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
            output,
            output_variation: bound(self.output_variation, 0.0, 9.0, 0.5),
            outputs: self.outputs.map(|tokens| bound(tokens, 1.0, 1e7, output)),
            context: bound(self.context, 1.0, 1e8, prompt + output / 2.0),
        }
    }

    /// Eight prompts that stand for an eighth of the requests each.
    pub fn prompts(&self) -> [f64; 8] {
        eighths(self.prompt, self.prompt_variation)
    }

    /// Answers with the shares of the requests that they stand for.
    pub fn answers(&self) -> impl Iterator<Item = (f64, f64)> {
        self.outputs.into_iter().zip(SHARES)
    }
}

/// Shares of the requests that are told apart by the length of their answers. The shortest ones bear
/// the least delay.
const SHARES: [f64; 8] = [0.02, 0.05, 0.08, 0.15, 0.2, 0.2, 0.15, 0.15];

/// Lengths of text are about log-normally distributed; the mean is kept.
fn eighths(mean: f64, variation: f64) -> [f64; 8] {
    let sigma = variation.max(0.0).ln_1p().sqrt();
    let raw = EIGHTHS.map(|z| (sigma * z).exp());
    let scale = 8.0 * mean / raw.iter().sum::<f64>();
    raw.map(|x| x * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_stand_for_all_requests() {
        assert!((SHARES.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let quantiles = Mix::output_quantiles();
        assert!((quantiles[0] - 0.01).abs() < 1e-12 && (quantiles[7] - 0.925).abs() < 1e-12);
    }

    #[test]
    fn eighths_keep_the_mean_and_spread_with_the_variation() {
        let mean = |x: [f64; 8]| x.iter().sum::<f64>() / 8.0;
        let alike = eighths(100.0, 0.0);
        assert!(alike.iter().all(|x| (x - 100.0).abs() < 1e-9));
        let spread = eighths(100.0, 1.0);
        assert!((mean(spread) - 100.0).abs() < 1e-9);
        assert!(spread[0] < 30.0 && spread[7] > 230.0, "{spread:?}");
    }
}
