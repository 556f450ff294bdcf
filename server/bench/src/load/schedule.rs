//! How many virtual users there are at which time.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

/// What a ramp does within a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// Holds the stage's concurrency
    Step,
    /// Goes in a straight line from the concurrency before (0 at first) to the stage's
    Linear,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Stage {
    concurrency: u32,
    duration: Duration,
}

/// Stages of concurrency, as in `10:60s,40:120s`.
#[derive(Clone, Debug, PartialEq)]
pub struct Ramp(Vec<Stage>);

impl Ramp {
    /// Users at `elapsed`; `None` after the end.
    pub fn concurrency(&self, shape: Shape, elapsed: Duration) -> Option<u32> {
        let mut begin = Duration::ZERO;
        let mut before = 0;
        for stage in &self.0 {
            let within = elapsed - begin;
            if within < stage.duration {
                return Some(match shape {
                    Shape::Step => stage.concurrency,
                    Shape::Linear => {
                        let share = within.as_secs_f64() / stage.duration.as_secs_f64();
                        let (from, to) = (f64::from(before), f64::from(stage.concurrency));
                        (from + (to - from) * share).round() as u32
                    }
                });
            }
            begin += stage.duration;
            before = stage.concurrency;
        }
        None
    }

    pub fn most(&self) -> u32 {
        self.0.iter().map(|s| s.concurrency).max().unwrap_or(0)
    }
}

impl FromStr for Ramp {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let stage = |text: &str| {
            let (concurrency, duration) = text
                .split_once(':')
                .with_context(|| format!("{text:?} is not CONCURRENCY:DURATION, such as 10:60s"))?;
            Ok(Stage {
                concurrency: concurrency
                    .trim()
                    .parse()
                    .with_context(|| format!("{concurrency:?} is not a number of users"))?,
                duration: duration_of(duration)?,
            })
        };
        let stages = text.split(',').map(stage).collect::<Result<Vec<_>>>()?;
        Ok(Self(stages))
    }
}

/// A duration such as `90`, `90s`, `1.5m` or `500ms`.
pub fn duration_of(text: &str) -> Result<Duration> {
    let text = text.trim();
    let (number, unit) = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)]
        .into_iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .unwrap_or((text, 1.0));
    let seconds = number.trim().parse::<f64>().map(|n| n * unit);
    match seconds {
        Ok(seconds) if seconds > 0.0 && seconds < 1e7 => Ok(Duration::from_secs_f64(seconds)),
        _ => bail!("{text:?} is not a duration, such as 60s, 500ms or 2m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramps() {
        let ramp: Ramp = "10:60s, 40:2m,0:500ms".parse().unwrap();
        let at = |shape, s| ramp.concurrency(shape, Duration::from_secs_f64(s));
        assert_eq!(at(Shape::Step, 0.0), Some(10));
        assert_eq!(at(Shape::Step, 59.9), Some(10));
        assert_eq!(at(Shape::Step, 60.0), Some(40));
        assert_eq!(at(Shape::Linear, 0.0), Some(0));
        assert_eq!(at(Shape::Linear, 30.0), Some(5));
        assert_eq!(at(Shape::Linear, 120.0), Some(25));
        assert_eq!(at(Shape::Linear, 180.25), Some(20));
        assert_eq!(at(Shape::Step, 180.5), None);
        assert_eq!(ramp.most(), 40);
        for bad in ["", "10", "x:5s", "5:x", "5:-1s", "5:0s", "5:1d"] {
            assert!(bad.parse::<Ramp>().is_err(), "{bad}");
        }
    }
}
