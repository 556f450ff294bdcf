//! What a request must reach to count as good: limits on time to first token and on inter-token
//! latency.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

/// The objectives of a service, as the operator hands them over.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Objectives {
    /// Milliseconds within which the first token of a short prompt must come.
    pub ttft_ms: f64,
    /// Prompt tokens that `ttft_ms` covers.
    pub ttft_free_prompt_tokens: f64,
    /// Milliseconds granted for each prompt token above `ttft_free_prompt_tokens`.
    pub ttft_ms_per_prompt_token: f64,
    /// Milliseconds that a request's gap between tokens may take.
    pub itl_ms: f64,
    /// Which gap of a request is meant.
    pub itl_of: ItlOf,
}

/// The statistic over a request's gaps between tokens that `itl_ms` limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ItlOf {
    Mean,
    P95,
}

impl Default for Objectives {
    fn default() -> Self {
        Self {
            ttft_ms: 2000.0,
            ttft_free_prompt_tokens: 1000.0,
            ttft_ms_per_prompt_token: 1.0,
            itl_ms: 100.0,
            itl_of: ItlOf::Mean,
        }
    }
}

#[derive(Debug, Error, PartialEq)]
pub enum ObjectivesError {
    #[error("objectives: {0}")]
    Json(String),
    #[error("objectives: {field} must be a number above 0, not {value}")]
    NotPositive { field: &'static str, value: f64 },
    #[error("objectives: {field} must be 0 or more, not {value}")]
    Negative { field: &'static str, value: f64 },
}

impl Objectives {
    /// Reads and checks objectives from JSON; absent fields take their defaults.
    pub fn from_json(text: &str) -> Result<Self, ObjectivesError> {
        let objectives: Self =
            serde_json::from_str(text).map_err(|e| ObjectivesError::Json(e.to_string()))?;
        objectives.validate()?;
        Ok(objectives)
    }

    /// Refuses limits that no request could meet.
    pub fn validate(&self) -> Result<(), ObjectivesError> {
        for (field, value) in [("ttft_ms", self.ttft_ms), ("itl_ms", self.itl_ms)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ObjectivesError::NotPositive { field, value });
            }
        }
        for (field, value) in [
            ("ttft_free_prompt_tokens", self.ttft_free_prompt_tokens),
            ("ttft_ms_per_prompt_token", self.ttft_ms_per_prompt_token),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ObjectivesError::Negative { field, value });
            }
        }
        Ok(())
    }

    /// Seconds within which a prompt of this length must have its first token.
    pub fn ttft_limit(&self, prompt_tokens: u32) -> f64 {
        let charged = (f64::from(prompt_tokens) - self.ttft_free_prompt_tokens).max(0.0);
        (self.ttft_ms + self.ttft_ms_per_prompt_token * charged) / 1000.0
    }

    /// Whether a request with these gaps between tokens (seconds) meets the objective. A request
    /// of one token has no gap and meets it. Reorders `gaps`.
    pub fn meets_itl(&self, gaps: &mut [f32]) -> bool {
        if gaps.is_empty() {
            return true;
        }
        let measured = match self.itl_of {
            ItlOf::Mean => gaps.iter().map(|g| f64::from(*g)).sum::<f64>() / gaps.len() as f64,
            ItlOf::P95 => {
                // Nearest rank: the smallest gap that at least 95 % of the gaps don't exceed.
                let rank = (gaps.len() * 95).div_ceil(100) - 1;
                f64::from(*gaps.select_nth_unstable_by(rank, f32::total_cmp).1)
            }
        };
        measured <= self.itl_ms / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_prompt_gets_more_time() {
        let objectives = Objectives::default();
        assert_eq!(objectives.ttft_limit(1000), 2.0);
        assert_eq!(objectives.ttft_limit(3000), 4.0);
    }

    #[test]
    fn mean_and_p95_judge_one_slow_gap_differently() {
        let mut gaps = vec![0.05f32; 19];
        gaps.push(0.8);
        let mut objectives = Objectives::default();
        assert!(objectives.meets_itl(&mut gaps), "mean 87.5 ms");
        objectives.itl_of = ItlOf::P95;
        assert!(
            objectives.meets_itl(&mut gaps),
            "the 19th of 20 gaps is 50 ms"
        );
        gaps.push(0.8);
        assert!(
            !objectives.meets_itl(&mut gaps),
            "the 20th of 21 gaps is 800 ms"
        );
        assert!(objectives.meets_itl(&mut []));
    }

    #[test]
    fn json_is_checked() {
        let o = Objectives::from_json(
            r#"{"itl_ms": 50, "itl_of": "p95", "ttft_free_prompt_tokens": 1000.0}"#,
        )
        .unwrap();
        assert_eq!((o.itl_ms, o.itl_of, o.ttft_ms), (50.0, ItlOf::P95, 2000.0));
        for bad in [
            r#"{"itl_ms": 0}"#,
            r#"{"ttft_ms": -1}"#,
            r#"{"ttft_ms_per_prompt_token": -0.1}"#,
            r#"{"ttft_free_prompt_tokens": -1}"#,
            r#"{"itl": 5}"#,
            r#"{"itl_of": "p99"}"#,
            "5",
        ] {
            assert!(Objectives::from_json(bad).is_err(), "{bad}");
        }
    }
}
