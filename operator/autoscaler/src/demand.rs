//! What is asked of the fleet: how many requests, of what kind, and how they fare.

use crate::decision::Load;
use crate::fleet::{Census, Tracks, Window};
use crate::model::Mix;

/// Seconds: long enough that a few requests a second are a rate, short enough to see a ramp.
const FAST: f64 = 15.0;
const SLOW: f64 = 60.0;
/// Seconds within which requests that wait should be served beside those that come.
const CLEARING: f64 = 30.0;
/// A mix that was known before counts like this many requests.
const KNOWN_BEFORE: f64 = 30.0;
/// A guess counts like this many.
const GUESSED: f64 = 4.0;

#[derive(Clone, Debug)]
pub(crate) struct Demand {
    /// Requests a second that came for sure: a short burst counts by what can't be chance.
    pub rate_up: f64,
    /// The most that may have come.
    pub rate_down: f64,
    /// Requests a second that it takes to clear what waits.
    pub backlog_rate: f64,
    /// Requests running or waiting in the fleet: for sure, and at most.
    pub in_flight_up: f64,
    pub in_flight_down: f64,
    /// The most that one replica had in the last minute.
    pub peak_in_flight: u32,
    /// Nothing runs, waits or came of late.
    pub idle: bool,
    pub mix: Mix,
    /// Whether the mix was measured rather than guessed.
    pub mix_known: bool,
    /// Of the requests that ended in the last minute.
    pub good: f64,
    pub missed: f64,
    pub load: Load,
}

/// `None` before the second sample of any replica.
pub(crate) fn measure(tracks: &Tracks, census: &Census, before: Option<Mix>) -> Option<Demand> {
    let fast = tracks.window(FAST)?;
    let slow = tracks.window(SLOW)?;
    let (mix, mix_known) = mix(&slow, before);
    let rate = |window: &Window| window.received / window.seconds;
    let sure = (fast.received - fast.received.sqrt()).max(0.0) / fast.seconds;

    let ready = census.sampled.len() as f64;
    let waiting = f64::from(census.waiting());
    let waiting_prompts = census.waiting_prompt_tokens() / mix.prompt;
    // A prompt a replica is being computed at any time without anybody waiting.
    let backlog_rate = (waiting.max(waiting_prompts) - ready).max(0.0) / CLEARING;
    let now_in_flight = f64::from(census.running()) + waiting;

    Some(Demand {
        rate_up: rate(&slow).max(sure),
        rate_down: rate(&slow).max(rate(&fast)),
        backlog_rate,
        in_flight_up: (fast.in_flight - fast.in_flight.sqrt()).max(0.0),
        in_flight_down: fast.in_flight.max(now_in_flight),
        peak_in_flight: slow.peak_in_flight,
        idle: now_in_flight == 0.0 && fast.received < 0.5,
        mix,
        mix_known,
        good: slow.met,
        missed: slow.missed,
        load: load(&fast, &slow, census),
    })
}

fn load(fast: &Window, slow: &Window, census: &Census) -> Load {
    let judged = slow.met + slow.missed;
    Load {
        requests_per_second: fast.received / fast.seconds,
        tokens_per_second: fast.generated / fast.seconds,
        good_percent: (judged >= 0.5).then(|| 100.0 * slow.met / judged),
        ttft_p95_seconds: slow.ttft.quantile(0.95),
        itl_p95_seconds: slow.itl.quantile(0.95),
        running: census.running(),
        waiting: census.waiting(),
    }
}

/// The mix of the last minute, drawn to the one known before while few requests have come.
fn mix(slow: &Window, before: Option<Mix>) -> (Mix, bool) {
    let weight = if before.is_some() {
        KNOWN_BEFORE
    } else {
        GUESSED
    };
    let prior = before.unwrap_or(Mix::UNKNOWN);
    let blend = |sum: f64, count: f64, prior: f64| (sum + weight * prior) / (count + weight);

    let prompt = blend(slow.prompt_tokens_received, slow.received, prior.prompt);
    // Tokens of answers that go on count as well: those that have ended are the short ones while
    // load is young. (For exponentially distributed lengths this is the estimate of most likelihood.)
    let ended = slow.finished;
    let output = blend(slow.generated, ended, prior.output);
    let lengths = &slow.prompt_length;
    let counted = lengths.total();
    let variation = lengths
        .squared_variation()
        .unwrap_or(prior.prompt_variation);
    let long = (lengths.quantile(0.95)).unwrap_or(prior.long_prompt * prompt / prior.prompt);
    // Samples of a sequence that runs for a while aren't independent.
    let runs = slow.running_samples / 5.0;
    let context = if slow.running_samples > 0.0 {
        let measured = slow.kv_samples / slow.running_samples;
        let expected = prompt + output / 2.0;
        (runs * measured + 4.0 * expected) / (runs + 4.0)
    } else if before.is_some() {
        prior.context
    } else {
        prompt + output / 2.0
    };
    let mix = Mix {
        prompt,
        prompt_variation: blend(variation * counted, counted, prior.prompt_variation),
        long_prompt: blend(long * counted, counted, prior.long_prompt),
        output,
        context,
    };
    let known = before.is_some() || (slow.received >= 5.0 && ended >= 5.0);
    (mix.bounded(), known)
}
