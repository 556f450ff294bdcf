//! The sampling fields that completions and chat completions share, checked.

use stoker_engine::executor::Sampling;

use super::error::ApiError;

/// Most stop strings that a request may give, as OpenAI has it.
pub const MAX_STOPS: usize = 4;

/// Sampling fields as they came in.
#[derive(Clone, Copy, Debug, Default)]
pub struct SamplingFields {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub seed: Option<i64>,
}

impl SamplingFields {
    /// Checks the ranges and fills in OpenAI's defaults. `random_seed` serves requests that give
    /// no seed.
    pub fn check(self, random_seed: u64) -> Result<Sampling, ApiError> {
        let temperature = self.temperature.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(ApiError::invalid(
                "temperature",
                format!("temperature must be between 0 and 2, not {temperature}"),
            ));
        }
        let top_p = self.top_p.unwrap_or(1.0);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(ApiError::invalid(
                "top_p",
                format!("top_p must be above 0 and at most 1, not {top_p}"),
            ));
        }
        let top_k = match self.top_k.unwrap_or(0) {
            // vLLM's two ways to say "no limit".
            -1 | 0 => 0,
            k => u32::try_from(k).map_err(|_| {
                ApiError::invalid(
                    "top_k",
                    format!("top_k must be 1 or more, or 0 or -1 for no limit, not {k}"),
                )
            })?,
        };
        Ok(Sampling {
            temperature: temperature as f32,
            // A value that rounds to 0 in f32 would leave no token to choose from.
            top_p: (top_p as f32).max(f32::MIN_POSITIVE),
            top_k,
            seed: match self.seed {
                Some(seed) => seed.cast_unsigned(),
                // Nothing is drawn; a fixed seed keeps equal requests equal on every device.
                None if temperature == 0.0 => 0,
                None => random_seed,
            },
        })
    }
}

/// Checks a limit on new tokens.
pub fn check_max_tokens(param: &'static str, value: i64) -> Result<u32, ApiError> {
    if value < 1 {
        return Err(ApiError::invalid(
            param,
            format!("{param} must be at least 1, not {value}"),
        ));
    }
    // More than u32 holds is more than any context holds; the context check words the refusal.
    Ok(u32::try_from(value).unwrap_or(u32::MAX))
}

/// Checks the stop strings.
pub fn check_stops(stops: Vec<String>) -> Result<Vec<String>, ApiError> {
    if stops.len() > MAX_STOPS {
        return Err(ApiError::invalid(
            "stop",
            format!("stop takes up to {MAX_STOPS} strings, not {}", stops.len()),
        ));
    }
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::invalid(
            "stop",
            "a stop string must not be empty; leave stop out instead",
        ));
    }
    Ok(stops)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_ranges() {
        let s = SamplingFields::default().check(7).unwrap();
        assert_eq!((s.temperature, s.top_p, s.top_k, s.seed), (1.0, 1.0, 0, 7));
        let greedy = SamplingFields {
            temperature: Some(0.0),
            ..SamplingFields::default()
        };
        assert_eq!(greedy.check(7).unwrap().seed, 0);
        let with = |f: fn(&mut SamplingFields)| {
            let mut fields = SamplingFields::default();
            f(&mut fields);
            fields.check(0)
        };
        assert!(with(|f| f.temperature = Some(2.0001)).is_err());
        assert!(with(|f| f.temperature = Some(f64::NAN)).is_err());
        assert!(with(|f| f.top_p = Some(0.0)).is_err());
        assert!(with(|f| f.top_p = Some(f64::NAN)).is_err());
        assert!(with(|f| f.top_k = Some(-2)).is_err());
        assert!(with(|f| f.top_k = Some(1 << 40)).is_err());
        assert_eq!(with(|f| f.top_k = Some(-1)).unwrap().top_k, 0);
        assert!(with(|f| f.top_p = Some(1e-300)).unwrap().top_p > 0.0);
        assert_eq!(with(|f| f.seed = Some(-1)).unwrap().seed, u64::MAX);
    }

    #[test]
    fn limits_and_stops() {
        assert!(check_max_tokens("max_tokens", 0).is_err());
        assert!(check_max_tokens("max_tokens", -5).is_err());
        assert_eq!(check_max_tokens("max_tokens", i64::MAX).unwrap(), u32::MAX);
        assert!(check_stops(vec!["a".into(); 5]).is_err());
        assert!(check_stops(vec![String::new()]).is_err());
        assert_eq!(check_stops(vec!["a".into(); 4]).unwrap().len(), 4);
    }
}
