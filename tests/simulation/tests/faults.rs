//! One test a fault: never below what the load needs, no flapping, and reasons that tell the truth.
//!
//! The load is a day of the recorded mix in 75 minutes, up to what four replicas carry.

use std::path::Path;
use std::sync::OnceLock;

use stoker_simulation::fleet::Point;
use stoker_simulation::policy::Stoker;
use stoker_simulation::{Backend, Fault, Mix, Outcome, Score, Setup, Shape, Trace, simulate};

const ALWAYS: std::ops::Range<f64> = 0.0..1e9;

fn day_up_to(requests_per_second: f64) -> Trace {
    let recorded = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../traces/azure_llm_2023_conv.csv"
    );
    let read = Trace::read(Path::new(recorded));
    assert!(read.is_ok(), "{read:?}");
    let mix = read.map_or(Mix::fixed(1, 1), |trace| Mix::of(&trace));
    Shape::Diurnal.generate(requests_per_second, &mix, 1)
}

fn day() -> &'static Trace {
    static DAY: OnceLock<Trace> = OnceLock::new();
    DAY.get_or_init(|| day_up_to(5.0))
}

/// A fleet of two at first: load is low then.
fn setup(faults: Vec<Fault>) -> Setup {
    Setup {
        faults,
        ..Setup::study()
            .with_backend(Backend::Surrogate)
            .with_replicas(2)
    }
}

fn run(faults: Vec<Fault>) -> Outcome {
    let setup = setup(faults);
    simulate(&setup, day(), &mut Stoker::new(&setup))
}

fn healthy() -> &'static Outcome {
    static HEALTHY: OnceLock<Outcome> = OnceLock::new();
    HEALTHY.get_or_init(|| run(Vec::new()))
}

/// The objective is kept over the day, no five minutes are much worse, the number of replicas hardly
/// turns but where load does, and the day costs at most `dearer` times one without the fault.
fn holds(outcome: &Outcome, dearer: f64) {
    let score = outcome.score;
    println!("{score:?}\nhealthy: {:?}", healthy().score);
    assert!(score.good >= 99.0, "{score:?}");
    assert!(
        worst_stretch(outcome) >= 95.0,
        "{:?}",
        worst_stretch(outcome)
    );
    assert!(
        score.reversals <= healthy().score.reversals + 2,
        "{score:?}"
    );
    let dear = score.replica_hours / healthy().score.replica_hours;
    assert!(dear <= dearer, "{dear} times as dear: {score:?}");
}

/// Least percentage of good requests of any five minutes.
fn worst_stretch(outcome: &Outcome) -> f64 {
    let parts = (0..15).map(|n| {
        let from = 300.0 * f64::from(n);
        Score::part(outcome, from, from + 300.0).good
    });
    parts.fold(100.0, f64::min)
}

/// Reasons that were given within a time.
fn said(outcome: &Outcome, from: f64, to: f64) -> Vec<&str> {
    let inside = |p: &&Point| (from..to).contains(&p.t);
    let points = outcome.timeline.iter().filter(inside);
    points.filter_map(|p| p.reason.as_deref()).collect()
}

fn most(outcome: &Outcome, of: fn(&Point) -> u32) -> u32 {
    outcome.timeline.iter().map(of).max().unwrap_or(0)
}

#[test]
fn without_a_fault_there_is_no_word_of_one() {
    let outcome = healthy();
    holds(outcome, 1.0);
    for reason in said(outcome, 60.0, 4500.0) {
        for word in ["sound", "behind", "any dials", "without a node"] {
            assert!(!reason.contains(word), "{reason}");
        }
    }
}

#[test]
fn half_of_the_scrapes_lost() {
    let outcome = run(vec![Fault::ScrapesLost {
        share: 0.5,
        during: ALWAYS,
    }]);
    holds(&outcome, 1.2);
    // A replica that was heard within 10 s isn't called silent; one that wasn't is.
    let reasons = said(&outcome, 60.0, 4500.0);
    let silent = reasons.iter().filter(|r| r.contains("no sound sample"));
    let share = silent.count() as f64 / reasons.len() as f64;
    assert!((0.01..0.3).contains(&share), "{share}");
}

#[test]
fn samples_30_s_late() {
    let outcome = run(vec![Fault::ScrapesLate {
        seconds: 30.0,
        during: ALWAYS,
    }]);
    holds(&outcome, 1.2);
    let reasons = said(&outcome, 120.0, 4500.0);
    let told = reasons.iter().filter(|r| r.contains("30 s behind"));
    assert!(told.count() * 10 > reasons.len() * 9, "{reasons:?}");
}

#[test]
fn a_replica_three_times_slower() {
    let outcome = run(vec![Fault::Slow {
        nth: 1,
        factor: 3.0,
    }]);
    // One replica is paid for and of little use.
    holds(&outcome, 1.5);
    let reasons = said(&outcome, 120.0, 600.0);
    assert!(
        reasons.iter().any(|r| r.contains("any dials")),
        "{reasons:?}"
    );
}

#[test]
fn the_operator_restarted_every_minute() {
    let faults = vec![Fault::Restarts { every: 60.0 }];
    // Where no memory can be stored, the object's status tells how things stood. Load is never watched
    // for long enough to scale down, which is dear, but safe.
    let outcome = run(faults.clone());
    holds(&outcome, 2.5);
    assert_eq!(outcome.score.reversals, 0);
    // With what is stored once a minute it goes on, but for the time that nobody watched, which counts
    // neither for patience nor for how long replicas are kept that load may want back: as long as the
    // slowest start may take, which the few starts that it sees tell only roughly.
    let setup = setup(faults);
    let mut stored = Stoker::new(&setup).with_stored_memory();
    holds(&simulate(&setup, day(), &mut stored), 1.35);
}

#[test]
fn nodes_never_come() {
    // More than the two first replicas and two more on warm nodes carry.
    let day = day_up_to(9.0);
    let alone = setup(vec![Fault::NoNodes { during: ALWAYS }]);
    let outcome = simulate(&alone, &day, &mut Stoker::new(&alone));
    assert_eq!(most(&outcome, |p| p.ready), 4);
    assert!(outcome.score.reversals <= 4, "{:?}", outcome.score);
    // What can be done with four is done: as good as a fleet of four all day.
    let four = setup(Vec::new()).with_replicas(4);
    let mut held = Stoker::new(&four).with_replicas_held(4);
    let (ours, theirs) = (
        outcome.score.good,
        simulate(&four, &day, &mut held).score.good,
    );
    println!("{ours} % good, {theirs} with four all day");
    assert!(ours >= theirs - 1.0, "{ours} of {theirs}");
    // Whenever pods have found no node for a minute, the reason says so.
    let stuck = |points: &[Point]| points.iter().all(|p| p.pods > p.ready && p.ready == 4);
    let mut told = 0;
    for minute in outcome.timeline.windows(6).filter(|points| stuck(points)) {
        let reason = minute[5].reason.as_deref().unwrap();
        assert!(reason.contains("without a node"), "{reason}");
        told += 1;
    }
    assert!(told > 60, "{told}");
}

#[test]
fn the_api_server_refuses_writes_for_two_minutes() {
    // From when the last replica for the peak would be ordered.
    let peak = most(healthy(), |p| p.desired);
    let raise = healthy()
        .timeline
        .iter()
        .find(|p| p.desired == peak)
        .unwrap()
        .t
        - 10.0;
    let refused = raise..raise + 120.0;
    let outcome = run(vec![Fault::WritesRefused {
        during: refused.clone(),
    }]);
    holds(&outcome, 1.2);
    let points = outcome.timeline.iter().filter(|p| refused.contains(&p.t));
    let asked: Vec<u32> = points.map(|p| p.desired).collect();
    assert!(asked.windows(2).all(|w| w[0] == w[1]), "{asked:?}");
    let after = outcome.timeline.iter().find(|p| p.t >= refused.end + 10.0);
    assert!(after.unwrap().desired > asked[0]);
}

#[test]
fn counters_reset() {
    let times = [600.0, 1500.0, 2250.0, 2251.0, 3600.0];
    let outcome = run(times.map(|at| Fault::CountersReset { at }).to_vec());
    holds(&outcome, 1.1);
}

#[test]
fn a_replica_that_reports_nonsense() {
    let outcome = run(vec![Fault::Nonsense { nth: 0 }]);
    // Nothing is scaled down while one can't be heard.
    holds(&outcome, 1.7);
    let reasons = said(&outcome, 60.0, 4500.0);
    for reason in &reasons {
        assert!(reason.contains("gave no sound sample"), "{reason}");
    }
}
