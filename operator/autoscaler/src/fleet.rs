//! From cumulative counters of replicas that come, go, restart and stay silent to what happened
//! within a window of time. Nothing is extrapolated: what no sample tells didn't happen.

use std::collections::{BTreeMap, VecDeque};

use crate::census::Told;
use crate::history::Arrivals;
use crate::observation::{Counters, Histogram, Observation, Phase, Replica, Sample};

/// Seconds without anything new from a replica after which it is silent.
const SILENT: f64 = 10.0;
/// Seconds that a sample may be behind and still tell something.
const OLDEST: f64 = 60.0;
/// Seconds of history that are kept.
const KEPT: f64 = 75.0;
/// Seconds in which every sample is kept; before that one every [`COARSE`] seconds.
const FINE: f64 = 20.0;
const COARSE: f64 = 10.0;
/// Seconds since a replica became ready in which all that it counts is new.
const YOUNG: f64 = 15.0;

/// A sample that tells something of the present.
fn of_late(replica: &Replica, now: f64) -> Option<&Sample> {
    let sample = replica.sample.as_ref()?;
    ((-SILENT..=OLDEST).contains(&(now - sample.at)) && sound(&sample.counters)).then_some(sample)
}

/// A replica that reports nonsense is as good as silent.
fn sound(counters: &Counters) -> bool {
    scalars(counters)
        .iter()
        .all(|x| x.is_finite() && (0.0..=1e15).contains(x))
        && [
            &counters.ttft,
            &counters.itl,
            &counters.prompt_length,
            &counters.generation_length,
        ]
        .iter()
        .all(|h| h.is_sound())
}

fn scalars(c: &Counters) -> [f64; 12] {
    [
        c.requests_received,
        c.prompt_tokens_received,
        c.prompt_tokens,
        c.generation_tokens,
        c.requests_finished,
        c.preemptions,
        c.all_met,
        c.all_missed,
        c.ttft_met,
        c.ttft_missed,
        c.itl_met,
        c.itl_missed,
    ]
}

/// What was counted within a window.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    /// Its length, or less where history is shorter.
    pub seconds: f64,
    pub received: f64,
    pub prompt_tokens_received: f64,
    pub generated: f64,
    pub finished: f64,
    pub met: f64,
    pub missed: f64,
    pub ttft: Histogram,
    pub itl: Histogram,
    pub prompt_length: Histogram,
    pub generation_length: Histogram,
    /// Requests running or waiting, averaged over time and summed over replicas.
    pub in_flight: f64,
    /// The most that one replica had.
    pub peak_in_flight: u32,
    /// Sums over samples.
    pub running_samples: f64,
    pub kv_samples: f64,
}

#[derive(Clone, Debug, PartialEq)]
struct Snapshot {
    at: f64,
    counters: Counters,
    running: u32,
    in_flight: u32,
    /// The most in flight since the snapshot before.
    peak: u32,
    kv_tokens: u64,
}

/// A replica's recent snapshots, oldest first.
#[derive(Clone, Debug, PartialEq)]
struct Track {
    snapshots: VecDeque<Snapshot>,
    told: Told,
    /// When something new was heard last.
    heard_at: f64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tracks(BTreeMap<String, Track>);

impl Tracks {
    /// Takes in what is new, forgets what is too old to matter, and returns the requests that came
    /// since the samples before.
    pub fn observe(&mut self, observation: &Observation, now: f64) -> Vec<Arrivals> {
        let mut come = Vec::new();
        let replicas = observation.replicas.iter();
        let ready = replicas.filter(|r| r.phase == Phase::Ready).count();
        for replica in &observation.replicas {
            let share = match replica.phase {
                Phase::Ready => 1.0 / ready as f64,
                // It gets no requests any more.
                Phase::Draining => 0.0,
                Phase::Starting | Phase::Unschedulable => continue,
            };
            let Some(sample) = of_late(replica, now) else {
                continue;
            };
            let track = self.0.entry(replica.id.clone()).or_insert_with(|| {
                if (0.0..YOUNG).contains(&replica.ready_seconds) {
                    // All that a new replica has got came since it was ready.
                    come.push(Arrivals {
                        from: (now - replica.ready_seconds).min(sample.at - 1.0),
                        to: sample.at,
                        requests: sample.counters.requests_received,
                        share,
                    });
                }
                Track {
                    snapshots: VecDeque::new(),
                    told: Told::of(sample),
                    heard_at: now,
                }
            });
            if (track.snapshots.back()).is_some_and(|last| sample.at <= last.at) {
                continue;
            }
            come.extend(push(&mut track.snapshots, sample, share));
            (track.told, track.heard_at) = (Told::of(sample), now);
        }
        self.0.retain(|_, track| {
            thin(&mut track.snapshots);
            now - track.told.at <= KEPT
        });
        come
    }

    /// What a replica said last, if that was of late.
    pub fn told(&self, id: &str, now: f64) -> Option<Told> {
        let track = self.0.get(id)?;
        let of_late = now - track.heard_at <= SILENT && now - track.told.at <= OLDEST;
        of_late.then_some(track.told)
    }

    fn snapshots(&self) -> impl Iterator<Item = &VecDeque<Snapshot>> {
        self.0.values().map(|track| &track.snapshots)
    }

    /// What happened in the `seconds` before the newest sample; `None` while no replica has been
    /// sampled twice.
    pub fn window(&self, seconds: f64) -> Option<Window> {
        let ends = self.snapshots().filter_map(|track| Some(track.back()?.at));
        let newest = ends.reduce(f64::max)?;
        let starts = self.snapshots().filter_map(|track| Some(track.front()?.at));
        let oldest = starts.reduce(f64::min)?;
        if newest - oldest < 1.0 {
            return None;
        }
        let mut window = Window {
            seconds: seconds.min(newest - oldest),
            ..Window::default()
        };
        for track in self.snapshots() {
            // Scrapes of one round don't fall on the same instant, and some are lost.
            let last = track.back().map_or(newest, |last| last.at);
            let end = if newest - last <= SILENT {
                last
            } else {
                newest
            };
            add(&mut window, track, end - seconds, end);
        }
        Some(window)
    }
}

/// Adds a sample that is newer than the last one, and returns what came between them.
fn push(track: &mut VecDeque<Snapshot>, sample: &Sample, share: f64) -> Option<Arrivals> {
    let in_flight = sample.running.saturating_add(sample.waiting);
    let snapshot = Snapshot {
        at: sample.at,
        counters: sample.counters.clone(),
        running: sample.running,
        in_flight,
        peak: in_flight,
        kv_tokens: sample.kv_tokens,
    };
    if let Some(last) = track.back() {
        let (before, after) = (scalars(&last.counters), scalars(&snapshot.counters));
        if before.iter().zip(&after).any(|(b, a)| a < b) {
            // The process restarted: what it counts now happened since the last sample.
            let restarted = Snapshot {
                at: last.at,
                counters: Counters::default(),
                ..snapshot.clone()
            };
            track.clear();
            track.push_back(restarted);
        }
    }
    let come = track.back().map(|last| Arrivals {
        from: last.at,
        to: snapshot.at,
        requests: snapshot.counters.requests_received - last.counters.requests_received,
        share,
    });
    track.push_back(snapshot);
    come
}

/// Keeps every snapshot of the last [`FINE`] seconds and one every [`COARSE`] seconds before that.
fn thin(track: &mut VecDeque<Snapshot>) {
    let Some(newest) = track.back().map(|last| last.at) else {
        return;
    };
    while track.get(1).is_some_and(|next| newest - next.at > KEPT) {
        track.pop_front();
    }
    let mut i = 1;
    while i + 1 < track.len() && newest - track[i].at > FINE {
        if track[i + 1].at - track[i - 1].at <= COARSE {
            track[i + 1].peak = track[i + 1].peak.max(track[i].peak);
            track.remove(i);
        } else {
            i += 1;
        }
    }
}

/// Adds what a replica counted from `start` to `end`; an interval that sticks out counts by its
/// share.
fn add(window: &mut Window, track: &VecDeque<Snapshot>, start: f64, end: f64) {
    let mut in_flight = 0.0;
    for (before, after) in track.iter().zip(track.iter().skip(1)) {
        let length = after.at - before.at;
        let inside = after.at.min(end) - before.at.max(start);
        if inside <= 0.0 || length <= 0.0 {
            continue;
        }
        let share = (inside / length).min(1.0);
        let (b, a) = (&before.counters, &after.counters);
        window.received += share * (a.requests_received - b.requests_received);
        window.prompt_tokens_received +=
            share * (a.prompt_tokens_received - b.prompt_tokens_received);
        window.generated += share * (a.generation_tokens - b.generation_tokens);
        window.finished += share * (a.requests_finished - b.requests_finished);
        window.met += share * (a.all_met - b.all_met);
        window.missed += share * (a.all_missed - b.all_missed);
        in_flight += inside * f64::from(after.in_flight);
        window.peak_in_flight = window.peak_in_flight.max(after.peak);
        window.running_samples += f64::from(after.running);
        window.kv_samples += after.kv_tokens as f64;
    }
    window.in_flight += in_flight / (end - start).min(window.seconds).max(1e-9);
    // Histograms aren't split: they are counted from the first snapshot within the window.
    let first = track.iter().find(|s| s.at >= start - 0.5);
    if let (Some(first), Some(last)) = (first, track.back()) {
        let (b, a) = (&first.counters, &last.counters);
        window.ttft.add(&a.ttft.since(&b.ttft));
        window.itl.add(&a.itl.since(&b.itl));
        (window.prompt_length).add(&a.prompt_length.since(&b.prompt_length));
        (window.generation_length).add(&a.generation_length.since(&b.generation_length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::census::Census;
    use crate::observation::Dials;
    use stoker_law::Law;

    fn replica(id: &str, at: f64, received: f64) -> Replica {
        let dials = Dials {
            max_num_seqs: 8,
            max_num_batched_tokens: 2048,
        };
        let counters = Counters {
            requests_received: received,
            ..Counters::default()
        };
        Replica {
            id: id.into(),
            phase: Phase::Ready,
            age_seconds: 100.0,
            ready_seconds: 50.0,
            sample: Some(Sample {
                at,
                running: 2,
                waiting: 1,
                waiting_prompt_tokens: 0,
                kv_tokens: 100,
                kv_capacity_tokens: 1000,
                dials,
                ceilings: dials,
                law: Law {
                    base: 0.01,
                    per_kv_token: 0.0,
                    per_token: 0.0,
                    per_sequence: 0.0,
                    hidden: 1.0,
                },
                law_confidence: 1.0,
                counters,
            }),
        }
    }

    fn feed(tracks: &mut Tracks, now: f64, replicas: Vec<Replica>) {
        let observation = Observation {
            queue: None,
            now,
            desired_replicas: 1,
            replicas,
        };
        tracks.observe(&observation, now);
    }

    #[test]
    fn a_steady_rate_is_found_in_every_window_also_after_thinning() {
        let mut tracks = Tracks::default();
        for i in 0..100 {
            let t = f64::from(i) * 2.0;
            feed(&mut tracks, t, vec![replica("a", t, 5.0 * t)]);
        }
        for seconds in [10.0, 15.0, 60.0] {
            let window = tracks.window(seconds).unwrap();
            assert!((window.received / window.seconds - 5.0).abs() < 1e-9);
            assert!((window.in_flight - 3.0).abs() < 1e-9);
        }
        assert!(tracks.0["a"].snapshots.len() < 22, "{:?}", tracks.0["a"]);
    }

    #[test]
    fn a_restart_counts_from_zero_and_never_negative() {
        let mut tracks = Tracks::default();
        feed(&mut tracks, 0.0, vec![replica("a", 0.0, 1000.0)]);
        feed(&mut tracks, 2.0, vec![replica("a", 2.0, 1010.0)]);
        feed(&mut tracks, 4.0, vec![replica("a", 4.0, 6.0)]);
        feed(&mut tracks, 6.0, vec![replica("a", 6.0, 16.0)]);
        let window = tracks.window(60.0).unwrap();
        assert!((window.received - 16.0).abs() < 1e-9, "{}", window.received);
    }

    #[test]
    fn replicas_may_come_and_go() {
        let mut tracks = Tracks::default();
        for i in 0..=30 {
            let t = f64::from(i) * 2.0;
            // `a` serves 4/s for 30 s, then `b` takes over, which counts from its first sample.
            let mut replicas = Vec::new();
            if t <= 30.0 {
                replicas.push(replica("a", t, 500.0 + 4.0 * t));
            }
            if t >= 30.0 {
                replicas.push(replica("b", t, 4.0 * (t - 30.0)));
            }
            feed(&mut tracks, t, replicas);
        }
        let slow = tracks.window(60.0).unwrap();
        assert!((slow.received / slow.seconds - 4.0).abs() < 1e-9);
        let fast = tracks.window(15.0).unwrap();
        assert!((fast.received / fast.seconds - 4.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_missed_is_counted_when_it_is_told_and_never_made_up() {
        let mut tracks = Tracks::default();
        for i in 0..=5 {
            let t = f64::from(i) * 2.0;
            feed(&mut tracks, t, vec![replica("a", t, t), replica("b", t, t)]);
        }
        for i in 6..=14 {
            let t = f64::from(i) * 2.0;
            let mut silent = replica("b", t, t);
            silent.sample = None;
            feed(&mut tracks, t, vec![replica("a", t, t), silent]);
        }
        let during = tracks.window(10.0).unwrap();
        assert!((during.received / during.seconds - 1.0).abs() < 1e-9);
        feed(
            &mut tracks,
            30.0,
            vec![replica("a", 30.0, 30.0), replica("b", 30.0, 30.0)],
        );
        let after = tracks.window(10.0).unwrap();
        assert!((after.received / after.seconds - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_replica_is_silent_when_nothing_sound_or_new_was_heard_for_10_s() {
        let mut nonsense = replica("n", 100.0, f64::NAN);
        nonsense.ready_seconds = 1.0;
        let observation = |now: f64, late: f64| Observation {
            queue: None,
            now,
            desired_replicas: 4,
            replicas: vec![
                replica("old", 30.0, 1.0),
                nonsense.clone(),
                replica("late", late, 1.0),
                replica("good", now, 1.0),
            ],
        };
        let mut tracks = Tracks::default();
        let mut census = |now: f64, late: f64| {
            let seen = observation(now, late);
            tracks.observe(&seen, now);
            let census = Census::new(&seen, &tracks, now);
            let ids = census.heard.iter().map(|(id, _)| (*id).to_owned());
            (
                ids.collect::<Vec<_>>().join(" "),
                census.silent,
                census.delay,
            )
        };
        assert_eq!(census(100.0, 75.0), ("late good".into(), 2, 25.0));
        // Late, but going on.
        assert_eq!(census(104.0, 79.0), ("late good".into(), 2, 25.0));
        assert_eq!(census(114.0, 79.0), ("late good".into(), 2, 35.0));
        assert_eq!(census(115.0, 79.0), ("good".into(), 3, 0.0));
    }

    #[test]
    fn a_lost_scrape_is_made_up_for_by_the_next() {
        let mut tracks = Tracks::default();
        let mut history = crate::history::History::default();
        for i in 0..60 {
            let t = f64::from(i) * 2.0;
            let (mut a, mut b) = (replica("a", t, 2.0 * t), replica("b", t, 2.0 * t));
            if i % 3 != 0 {
                a.sample = None;
            }
            if i % 2 != 0 {
                b.sample = None;
            }
            let observation = Observation {
                queue: None,
                now: t,
                desired_replicas: 2,
                replicas: vec![a, b],
            };
            let come = tracks.observe(&observation, t);
            let census = Census::new(&observation, &tracks, t);
            assert!(census.complete());
            history.note(&come, t - census.delay);
            if i > 10 {
                let level = history.trend().unwrap().level;
                assert!((level - 4.0).abs() < 1e-6, "{level} at {t}");
            }
        }
    }
}
