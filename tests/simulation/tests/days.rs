//! Load that jumps once a day at the same time.

use stoker_simulation::policy::Stoker;
use stoker_simulation::trace::Request;
use stoker_simulation::{Backend, Score, Setup, Trace, simulate};

const HOUR: f64 = 3600.0;
const DAY: f64 = 24.0 * HOUR;

/// A request every four seconds, and for twenty minutes from nine o'clock on twenty times as many.
fn office(until: f64) -> Trace {
    let mut requests = Vec::new();
    let mut t = 0.0;
    while t < until {
        let nine = (9.0 * HOUR..9.0 * HOUR + 1200.0).contains(&(t % DAY));
        requests.push(Request {
            arrival: t,
            prompt: 1000,
            output: 200,
        });
        t += if nine { 0.2 } else { 4.0 };
    }
    Trace::new("office", requests)
}

#[test]
fn what_came_yesterday_at_nine_is_met_today_at_nine() {
    let setup = Setup::study()
        .with_backend(Backend::Surrogate)
        .with_replicas(1);
    let outcome = simulate(&setup, &office(DAY + 10.0 * HOUR), &mut Stoker::new(&setup));
    let nine = |day: f64| {
        let from = day * DAY + 9.0 * HOUR;
        Score::part(&outcome, from, from + 600.0).good
    };
    assert!(nine(0.0) < 95.0, "nobody could know: {}", nine(0.0));
    assert!(nine(1.0) >= 99.0, "{}", nine(1.0));
    let ready = |t: f64| outcome.timeline.iter().find(|p| p.t >= t).map(|p| p.ready);
    let night = DAY + 8.0 * HOUR;
    assert_eq!(ready(night), Some(1), "an hour before");
}
