//! What is asked of the fleet: how many requests, of what kind, and how they fare.

use crate::census::Census;
use crate::decision::Load;
use crate::fleet::{Tracks, Window};
use crate::history::{History, Trend};
use crate::mix::Mix;
use crate::observation::Histogram;

/// Seconds: long enough that a few requests a second are a rate, short enough to see a change.
const FAST: f64 = 15.0;
const SLOW: f64 = 60.0;
/// A mix that was known before counts like this many requests.
const KNOWN_BEFORE: f64 = 30.0;
/// A guess counts like this many.
const GUESSED: f64 = 4.0;
/// Standard errors by which the mix of the last minute may differ from the one known before to be
/// the same one.
const SAME_MIX: f64 = 3.0;

#[derive(Clone, Debug)]
pub(crate) struct Demand {
    /// Requests a second: now, and where they go.
    pub trend: Trend,
    /// Requests running or waiting in the fleet: for sure, and at most.
    pub in_flight_up: f64,
    pub in_flight_down: f64,
    /// The most that one replica had in the last minute.
    pub peak_in_flight: u32,
    /// Nothing runs, waits or came of late.
    pub idle: bool,
    /// What decisions go by.
    pub mix: Mix,
    /// The mix of the last minute.
    pub fresh_mix: Mix,
    /// Whether the mix was measured rather than guessed.
    pub mix_known: bool,
    /// Of the requests that ended in the last minute.
    pub good: f64,
    pub missed: f64,
    pub load: Load,
}

/// `None` before the second sample of any replica.
pub(crate) fn measure(
    tracks: &Tracks,
    history: &History,
    census: &Census,
    before: Option<Mix>,
) -> Option<Demand> {
    let fast = tracks.window(FAST)?;
    let slow = tracks.window(SLOW)?;
    let (mix, mix_known) = mix(&slow, before);
    let trend = history.trend()?;
    let waiting = f64::from(census.waiting());
    let now_in_flight = f64::from(census.running()) + waiting;

    Some(Demand {
        trend,
        in_flight_up: (fast.in_flight - fast.in_flight.sqrt()).max(0.0),
        in_flight_down: fast.in_flight.max(now_in_flight),
        peak_in_flight: slow.peak_in_flight,
        idle: now_in_flight == 0.0 && fast.received < 0.5,
        mix,
        fresh_mix: fresh_mix(&slow, before),
        mix_known,
        good: slow.met,
        missed: slow.missed,
        load: load(&fast, &slow, census),
    })
}

fn load(fast: &Window, slow: &Window, census: &Census) -> Load {
    let judged = slow.met + slow.missed;
    // Who is silent is taken to do as much as the others.
    let all = f64::from(census.ready()) / f64::from(census.heard()).max(1.0);
    Load {
        requests_per_second: all * fast.received / fast.seconds,
        tokens_per_second: all * fast.generated / fast.seconds,
        good_percent: (judged >= 0.5).then(|| 100.0 * slow.met / judged),
        ttft_p95_seconds: slow.ttft.quantile(0.95),
        itl_p95_seconds: slow.itl.quantile(0.95),
        running: census.running(),
        waiting: census.waiting(),
    }
}

/// The mix known before while the last minute's may be the same, else the last minute's.
fn mix(slow: &Window, before: Option<Mix>) -> (Mix, bool) {
    let fresh = fresh_mix(slow, before);
    let known = before.is_some() || (slow.received >= 5.0 && slow.finished >= 5.0);
    let Some(before) = before else {
        return (fresh, known);
    };
    let same = |now: f64, was: f64, variation: f64, n: f64| {
        let chance = (variation.max(0.1) / n.max(1.0)).sqrt();
        (now / was - 1.0).abs() <= SAME_MIX * chance
    };
    let prompts = same(
        fresh.prompt,
        before.prompt,
        before.prompt_variation,
        slow.received,
    );
    let outputs = same(
        fresh.output,
        before.output,
        before.output_variation,
        slow.finished,
    );
    let mix = if prompts && outputs { before } else { fresh };
    (mix, known)
}

/// The mix of the last minute, drawn to the one known before while few requests have come.
fn fresh_mix(slow: &Window, before: Option<Mix>) -> Mix {
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
    let output = blend(slow.generated, slow.finished, prior.output);
    let variation = |lengths: &Histogram, prior: f64| {
        let counted = lengths.total();
        let variation = lengths.squared_variation().unwrap_or(prior);
        blend(variation * counted, counted, prior)
    };
    let answers = slow.generation_length.total();
    let quantiles = Mix::output_quantiles();
    let outputs = std::array::from_fn(|i| {
        let measured = slow.generation_length.quantile(quantiles[i]);
        blend(answers * measured.unwrap_or(0.0), answers, prior.outputs[i])
    });
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
    Mix {
        prompt,
        prompt_variation: variation(&slow.prompt_length, prior.prompt_variation),
        output,
        output_variation: variation(&slow.generation_length, prior.output_variation),
        outputs,
        context,
    }
    .bounded()
}
