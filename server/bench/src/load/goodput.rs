//! Which answers met the objectives, as vLLM's serving benchmark names them.

use std::collections::VecDeque;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};

use super::client::Answer;

/// Seconds over which the share of a progress line reaches.
const WINDOW: Duration = Duration::from_secs(10);

/// Limits of a good answer: `ttft:MS` (time to first token) and `tpot:MS` (mean time between the
/// tokens after it), one or both, separated by a comma. `ttft:MS+EACH/FREE` adds `EACH` ms for each
/// prompt token above `FREE`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Goodput {
    ttft: Option<Ttft>,
    tpot: Option<Duration>,
}

/// A limit of the time to first token that may depend on the prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ttft {
    base: Duration,
    each: Duration,
    free_tokens: u64,
}

impl Ttft {
    fn of(&self, prompt_tokens: u64) -> Duration {
        let tokens = prompt_tokens.saturating_sub(self.free_tokens);
        self.base + self.each * u32::try_from(tokens).unwrap_or(u32::MAX)
    }
}

impl FromStr for Ttft {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (base, each, free) = match text.split_once('+') {
            Some((base, rest)) => {
                let (each, free) = rest.split_once('/').context("no /")?;
                (base, each, free)
            }
            None => (text, "0", "0"),
        };
        Ok(Ttft {
            base: Duration::from_millis(base.parse()?),
            each: Duration::from_millis(each.parse()?),
            free_tokens: free.parse()?,
        })
    }
}

impl Goodput {
    pub fn is_met_by(&self, answer: &Answer) -> bool {
        let within = |limit: Option<Duration>, seen: Option<Duration>| {
            limit.is_none_or(|limit| seen.is_some_and(|seen| seen <= limit))
        };
        let ttft = self.ttft.map(|limit| limit.of(answer.prompt_tokens));
        // A single token has no time between tokens.
        within(ttft, answer.ttft) && (answer.tpot.is_none() || within(self.tpot, answer.tpot))
    }
}

impl FromStr for Goodput {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut limits = Self::default();
        for part in text.split(',') {
            let advice = || format!("{part:?} is not a limit, such as ttft:2000 or tpot:100");
            let (name, limit) = part.split_once(':').with_context(advice)?;
            match name {
                "ttft" => limits.ttft = Some(limit.parse().with_context(advice)?),
                "tpot" => {
                    let ms = limit.parse().with_context(advice)?;
                    limits.tpot = Some(Duration::from_millis(ms));
                }
                _ => bail!(advice()),
            }
        }
        Ok(limits)
    }
}

/// Good and other requests, in all and of the last seconds.
#[derive(Default)]
pub struct Tally {
    pub good: u64,
    recent: VecDeque<(Instant, bool)>,
}

impl Tally {
    /// Counts a request that ended; a failed one isn't good.
    pub fn push(&mut self, now: Instant, good: bool) {
        self.good += u64::from(good);
        self.recent.push_back((now, good));
    }

    /// Percent of the requests that ended in the last seconds; `None` when none did.
    pub fn recent_percent(&mut self, now: Instant) -> Option<f64> {
        while let Some((at, _)) = self.recent.front()
            && now.duration_since(*at) > WINDOW
        {
            self.recent.pop_front();
        }
        if self.recent.is_empty() {
            return None;
        }
        let good = self.recent.iter().filter(|(_, good)| *good).count();
        Some((1e4 * good as f64 / self.recent.len() as f64).round() / 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ttft_ms: u64, tpot_ms: Option<u64>) -> Answer {
        Answer {
            ttft: Some(Duration::from_millis(ttft_ms)),
            tpot: tpot_ms.map(Duration::from_millis),
            ..Answer::default()
        }
    }

    #[test]
    fn an_answer_is_good_within_both_limits() {
        let limits: Goodput = "ttft:2000,tpot:100".parse().unwrap();
        assert!(limits.is_met_by(&answer(2000, Some(100))));
        assert!(limits.is_met_by(&answer(10, None)));
        assert!(!limits.is_met_by(&answer(2001, Some(10))));
        assert!(!limits.is_met_by(&answer(10, Some(101))));
        assert!(!limits.is_met_by(&Answer::default()), "never streamed");
    }

    #[test]
    fn a_long_prompt_may_take_longer() {
        let limits: Goodput = "ttft:2000+1/1000".parse().unwrap();
        let with = |ttft_ms, prompt_tokens| Answer {
            prompt_tokens,
            ..answer(ttft_ms, None)
        };
        assert!(limits.is_met_by(&with(2000, 10)));
        assert!(!limits.is_met_by(&with(2001, 1000)));
        assert!(limits.is_met_by(&with(2500, 1500)));
        assert!(!limits.is_met_by(&with(2501, 1500)));
    }

    #[test]
    fn wrong_limits_are_told() {
        for text in [
            "",
            "ttft",
            "ttft:x",
            "e2el:5",
            "ttft:5,",
            "ttft:5+1",
            "tpot:5+1/2",
        ] {
            assert!(text.parse::<Goodput>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn only_the_last_seconds_count() {
        let mut tally = Tally::default();
        let start = Instant::now();
        assert_eq!(tally.recent_percent(start), None);
        tally.push(start, false);
        tally.push(start + Duration::from_secs(8), true);
        tally.push(start + Duration::from_secs(9), false);
        assert_eq!(
            tally.recent_percent(start + Duration::from_secs(9)),
            Some(33.33)
        );
        assert_eq!(
            tally.recent_percent(start + Duration::from_secs(11)),
            Some(50.0)
        );
        assert_eq!(tally.good, 1);
    }
}
