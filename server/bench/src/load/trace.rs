//! Requests of a log, each at its own time: an open loop.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::schedule::duration_of;
use crate::prompts::Kind;

/// A line in the format of Azure's public traces.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "TIMESTAMP")]
    timestamp: String,
    #[serde(rename = "ContextTokens")]
    prompt_tokens: u32,
    #[serde(rename = "GeneratedTokens")]
    generated_tokens: u32,
}

/// A request to send.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// Since the start.
    pub at: Duration,
    pub kind: Kind,
}

/// The requests of a log in the order of their times, which begin with `window` and pass `speed`
/// times as fast.
pub fn read(path: &Path, window: &Range<Duration>, speed: f64) -> Result<Vec<Arrival>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text, window, speed).with_context(|| format!("in {}", path.display()))
}

fn parse(text: &str, window: &Range<Duration>, speed: f64) -> Result<Vec<Arrival>> {
    ensure!(
        speed.is_finite() && speed > 0.0,
        "a trace can't pass {speed} times as fast"
    );
    let mut requests = Vec::new();
    for (number, line) in csv::Reader::from_reader(text.as_bytes())
        .deserialize()
        .enumerate()
    {
        let line: Line = line?;
        let seconds = seconds(&line.timestamp)
            .with_context(|| format!("request {}: {:?} is no time", number + 1, line.timestamp))?;
        requests.push((seconds, line));
    }
    let Some(begin) = requests.iter().map(|(s, _)| *s).reduce(f64::min) else {
        bail!("it has no requests");
    };
    let (from, to) = (window.start.as_secs_f64(), window.end.as_secs_f64());
    let inside = requests.into_iter().filter_map(|(seconds, line)| {
        let at = seconds - begin;
        (from <= at && at < to).then(|| Arrival {
            at: Duration::from_secs_f64((at - from) / speed),
            // Such logs have requests of no token; one is computed at least.
            kind: Kind {
                prompt_tokens: line.prompt_tokens.max(1),
                max_tokens: line.generated_tokens.max(1),
                weight: 1.0,
            },
        })
    });
    let mut arrivals: Vec<Arrival> = inside.collect();
    ensure!(!arrivals.is_empty(), "it has no requests in that window");
    arrivals.sort_by_key(|arrival| arrival.at);
    Ok(arrivals)
}

/// Seconds on a clock without a zone, as in `2023-11-16 18:15:46.6805900`, or a plain number.
fn seconds(text: &str) -> Result<f64> {
    if let Ok(seconds) = text.parse::<f64>() {
        ensure!(seconds.is_finite());
        return Ok(seconds);
    }
    let time: jiff::civil::DateTime = text.parse()?;
    let since = time - jiff::civil::DateTime::ZERO;
    Ok(since.total((jiff::Unit::Second, jiff::civil::Date::ZERO))?)
}

/// A part of a trace, as in `600s..900s`.
pub fn window(text: &str) -> Result<Range<Duration>> {
    let Some((from, to)) = text.split_once("..") else {
        bail!("{text:?} is not a window, such as 600s..900s");
    };
    let window = duration_of(from)?..duration_of(to)?;
    ensure!(!window.is_empty(), "{text:?} is an empty window");
    Ok(window)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
        2023-11-30 23:59:59.5,100,7\n\
        2023-12-01 00:00:03.5,300,9\n\
        2023-12-01 00:00:01.2500000,200,0\n";

    fn all() -> Range<Duration> {
        Duration::ZERO..Duration::MAX
    }

    #[test]
    fn requests_come_in_order_and_faster_if_wanted() {
        let arrivals = parse(LOG, &all(), 2.0).unwrap();
        let told: Vec<(u128, u32, u32)> = arrivals
            .iter()
            .map(|a| (a.at.as_millis(), a.kind.prompt_tokens, a.kind.max_tokens))
            .collect();
        assert_eq!(told, [(0, 100, 7), (875, 200, 1), (2000, 300, 9)]);
    }

    #[test]
    fn a_window_begins_at_its_own_start() {
        let arrivals = parse(LOG, &window("1s..3.5s").unwrap(), 1.0).unwrap();
        assert_eq!(arrivals.len(), 1);
        assert_eq!(arrivals[0].at, Duration::from_millis(750));
        assert!(window("3s..3s").is_err() && window("3s").is_err());
    }

    #[test]
    fn what_is_wrong_is_told() {
        let error = |text: &str| format!("{:#}", parse(text, &all(), 1.0).unwrap_err());
        assert!(error("a,b\n1,2\n").contains("TIMESTAMP"));
        assert!(error("TIMESTAMP,ContextTokens,GeneratedTokens\n").contains("no requests"));
        let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        assert!(error(&format!("{header}yesterday,2,3\n")).contains("yesterday"));
        assert!(error(&format!("{header}1,many,3\n")).contains("invalid digit"));
        assert!(parse(LOG, &window("60s..61s").unwrap(), 1.0).is_err());
        assert!(parse(LOG, &all(), 0.0).is_err());
    }
}
