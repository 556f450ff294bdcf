//! How a model stretches rope beyond the lengths it was trained on first.

/// What divides rope's frequencies. A GGUF file may hold the divisors themselves
/// (`rope_freqs.weight`), which then take the place of these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency by the same number (<https://arxiv.org/abs/2306.15595>).
    Linear {
        factor: f32,
    },
    /// Llama 3.1's: low frequencies by `factor`, high ones by nothing, those between by something
    /// between.
    Llama3 {
        factor: f32,
        low_frequency_factor: f32,
        high_frequency_factor: f32,
        original_context: u32,
    },
}

impl RopeScaling {
    /// The divisor of each of the `rotated / 2` pairs' frequencies; `None`: all 1.
    ///
    /// As `_compute_llama3_parameters` of Hugging Face's transformers (modeling_rope_utils.py).
    pub fn factors(&self, base: f32, rotated: usize) -> Option<Vec<f32>> {
        let pairs = rotated / 2;
        match *self {
            Self::None => None,
            Self::Linear { factor } => Some(vec![factor; pairs]),
            Self::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_context,
            } => {
                let (low, high) = (
                    f64::from(low_frequency_factor),
                    f64::from(high_frequency_factor),
                );
                let factor = f64::from(factor);
                let divisor = |pair: usize| {
                    let frequency = f64::from(base).powf(-2.0 * pair as f64 / rotated as f64);
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    // Turns of this pair within the original context.
                    let turns = f64::from(original_context) / wavelength;
                    if turns > high {
                        1.0
                    } else if turns < low {
                        factor
                    } else {
                        let smooth = (turns - low) / (high - low);
                        1.0 / ((1.0 - smooth) / factor + smooth)
                    }
                };
                Some((0..pairs).map(|pair| divisor(pair) as f32).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.2 3B: 128 dimensions, base 500000, factor 32.
    const LLAMA_3_2: RopeScaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_context: 8192,
    };

    #[test]
    fn llama_3_divides_low_frequencies_only() {
        let factors = LLAMA_3_2.factors(500_000.0, 128).unwrap();
        assert_eq!(factors.len(), 64);
        // Wavelength of pair i: 2 pi 500000^(i / 64). It passes 8192 / 4 = 2048 between pairs 28
        // and 29, and 8192 between 34 and 35.
        assert!(factors[..=28].iter().all(|&f| f == 1.0), "{factors:?}");
        assert!(factors[29] > 1.0 && factors[34] < 32.0, "{factors:?}");
        assert!(factors[35..].iter().all(|&f| f == 32.0), "{factors:?}");
        assert!(factors.is_sorted());
    }

    #[test]
    fn linear_divides_all_alike_and_none_nothing() {
        let linear = RopeScaling::Linear { factor: 2.5 };
        assert_eq!(linear.factors(10_000.0, 6), Some(vec![2.5; 3]));
        assert_eq!(RopeScaling::None.factors(10_000.0, 6), None);
    }
}
