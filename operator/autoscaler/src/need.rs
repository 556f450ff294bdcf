//! How many replicas load needs: to order, and to keep.

use crate::Scene;
use crate::demand::Demand;
use crate::memory::Memory;
use crate::model::{LEAST_SHARE, ReplicaModel};
use crate::observation::Dials;
use crate::tune::Tuned;

/// Share of a forecast's error that is left when it matters: it is made anew every few seconds while
/// replicas start.
const ERROR_LEFT: f64 = 0.5;
/// Seconds that replicas are to be ready before load comes back.
const SPARE: f64 = 20.0;
/// Ratio of the load that comes back to the trend's forecast that makes it a jump.
const JUMP: f64 = 2.0;
/// Without a law, the share of the cap that may be in use.
const PLANNED_CAP: f64 = 0.7;
/// Share of the misses allowed that replicas ordered for what comes back may be expected to have.
const PATTERN_MISSES: f64 = 0.8;
/// Share of the misses allowed that the replicas left after a scale-down may be expected to have.
const KEPT_MISSES: f64 = 0.6;
/// Seconds that load must have been watched to be known to within what chance does to it, and the
/// standard errors that it may be below what was measured until then.
const KNOWN_AFTER: f64 = 15.0;
const DOUBT: f64 = 2.0;

/// Replicas that the load needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// To order, for when they will have started.
    pub up: u32,
    /// To keep. Never less than `up`.
    pub down: u32,
    /// To keep while so many were needed less than a start ago: what load needs if it rises within a start
    /// as it did in the last hour; `None` where that isn't known.
    pub back: Option<u32>,
    /// To keep for the load of the moment and all that a proven pattern has within the time of a
    /// start.
    pub by_pattern: Option<u32>,
    /// To keep for a burst that may come back.
    pub for_burst: u32,
    /// `up` follows from the requests in flight rather than from their rate.
    pub by_in_flight: bool,
}

/// Without a law the cap in force is what counts.
pub(crate) fn need(scene: &Scene, demand: &Demand, tuned: &Tuned, memory: &mut Memory) -> Need {
    // What is known is a while behind where samples are late.
    let start = memory.starts.next() + scene.census.delay;
    let mut trend = demand.trend;
    if memory.without.forecast {
        trend.slope = 0.0;
    }
    let ahead = trend.ahead(start).max(trend.level);
    memory.history.judge(trend.ahead(start), start);
    let doubt = if memory.history.watched() < KNOWN_AFTER {
        DOUBT * trend.error
    } else {
        0.0
    };
    let foretold = foretold(memory, scene.now);
    // A slow rise is the trend's affair.
    let again = if foretold.again >= JUMP * ahead {
        foretold.again
    } else {
        0.0
    };
    let Some((model, dials, one)) = tuned.known() else {
        return without_law(demand, tuned, memory.misses.derating());
    };
    let fleet = Fleet {
        model,
        dials,
        saturated_rate: one.saturated_rate,
        derating: memory.misses.derating(),
        error: memory.history.error() * ERROR_LEFT,
        most: scene.limits.max_replicas.saturating_mul(2).max(1),
    };
    let lacking = tuned.lacking.max(0.0).ceil() as u32;
    let hint = memory.looks.last().unwrap_or(1).saturating_sub(lacking);
    let needs = |rate: f64, share: f64, hint: u32| match fleet.needs(rate, share, hint) {
        0 => 0,
        n => n.saturating_add(lacking),
    };
    let share = memory.misses.left(fleet.model.allowed());
    let quiet = if demand.idle { 0.0 } else { 1.0 };
    let (ahead, again) = (quiet * ahead, again.max(0.0));
    let up = needs(ahead - doubt, share, hint);
    // What was ordered for a pattern can't be mended in time.
    let up = up.max(needs(again, share * PATTERN_MISSES, hint));
    let down = needs(ahead, share * KEPT_MISSES, up).max(up);
    // What carried a burst that nothing foretold stays while the objective is missed over the last hour or so,
    // until a pattern tells when the next one comes.
    let newest = memory.history.newest();
    let settled = scene.census.settled;
    (memory.burst).note(scene.now, trend, newest, foretold.now, settled);
    let recurs = !memory.without.recurrence;
    let stays = recurs
        && foretold.pattern.is_none()
        && memory.burst.was_short(memory.starts.usual())
        && memory.misses.are_too_many(fleet.model.allowed());
    let for_burst = match stays {
        true => needs(memory.burst.rate, share, down).min(memory.burst.replicas),
        false => 0,
    };
    let rise = if recurs {
        memory.recurrence.rise(memory.starts.slowest())
    } else {
        Some(0.0)
    };
    let back = rise.map(|rise| match rise > 0.0 {
        true => needs(ahead + rise, share, down),
        false => up,
    });
    Need {
        up,
        down,
        back,
        by_pattern: (foretold.pattern)
            .map(|rate| needs(rate.max(ahead), share * KEPT_MISSES, down)),
        for_burst,
        by_in_flight: false,
    }
}

/// Load a period ago, in requests a second at most; nothing where none is known.
#[derive(Clone, Copy, Debug, Default)]
struct Foretold {
    /// About now.
    now: f64,
    /// Until replicas that are ordered now serve for sure: being early costs little.
    again: f64,
    /// Within the time of a start, by a period that load was seen to rise and fall by.
    pattern: Option<f64>,
}

fn foretold(memory: &Memory, now: f64) -> Foretold {
    if memory.without.recurrence {
        return Foretold::default();
    }
    let (hours, days, starts) = (&memory.recurrence, &memory.days, &memory.starts);
    let horizon = starts.surely() + SPARE;
    let pattern = || hours.ahead(now, starts.slowest() + SPARE);
    Foretold {
        now: hours.expected(now).max(days.expected(now)),
        again: hours.ahead(now, horizon).max(days.ahead(now, horizon)),
        pattern: hours.is_proven().then(pattern),
    }
}

fn without_law(demand: &Demand, tuned: &Tuned, derating: f64) -> Need {
    if demand.idle {
        return Need::default();
    }
    let one = PLANNED_CAP * f64::from(tuned.dials.max_num_seqs.max(1)) / derating;
    let up = whole(demand.in_flight_up / one);
    Need {
        up,
        down: whole(demand.in_flight_down / one).max(up),
        back: Some(0),
        by_pattern: None,
        for_burst: 0,
        by_in_flight: true,
    }
}

fn whole(x: f64) -> u32 {
    (x - 1e-9).ceil().max(0.0) as u32
}

/// What is asked of a number of replicas.
struct Fleet<'a> {
    model: &'a ReplicaModel,
    dials: Dials,
    /// Requests a second of one replica that never lacks work.
    saturated_rate: f64,
    /// By how much less a replica carries than the law says.
    derating: f64,
    /// Relative standard error of the forecast.
    error: f64,
    most: u32,
}

/// Nodes and weights of the normal distribution for Gauss and Hermite's quadrature.
const NODES: [(f64, f64); 5] = [
    (0.0, 0.533_333),
    (-1.355_626, 0.222_076),
    (1.355_626, 0.222_076),
    (-2.856_970, 0.011_257),
    (2.856_970, 0.011_257),
];

impl Fleet<'_> {
    /// Share of requests that miss an objective when so many replicas are to carry what is forecast,
    /// over what it may turn out to be.
    fn misses(&self, rate: f64, replicas: u32) -> f64 {
        let each = self.derating * rate / f64::from(replicas);
        let misses = NODES.map(|(z, weight)| {
            let rate = each * (self.error * z).exp();
            weight * self.model.misses_at(rate, self.dials, replicas)
        });
        misses.iter().sum()
    }

    /// The least number of replicas of which no more than `share` of the misses allowed is expected,
    /// or that serve so little each that more of them wouldn't help; looked for from `hint` on.
    fn needs(&self, rate: f64, share: f64, hint: u32) -> u32 {
        if rate <= 0.0 {
            return 0;
        }
        let enough = |replicas: u32| {
            self.derating * rate / f64::from(replicas) <= LEAST_SHARE * self.saturated_rate
                || self.misses(rate, replicas) <= share * self.model.allowed()
        };
        let hint = hint.clamp(1, self.most);
        let (mut fails, mut does, mut stride) = (0, hint, 1);
        if enough(hint) {
            while does > 1 {
                let fewer = does.saturating_sub(stride).max(1);
                if !enough(fewer) {
                    fails = fewer;
                    break;
                }
                (does, stride) = (fewer, stride.saturating_mul(2));
            }
        } else {
            fails = hint;
            loop {
                if fails >= self.most {
                    return self.most;
                }
                does = fails.saturating_add(stride).min(self.most);
                if enough(does) {
                    break;
                }
                (fails, stride) = (does, stride.saturating_mul(2));
            }
        }
        while does - fails > 1 {
            let middle = u32::midpoint(fails, does);
            if enough(middle) {
                does = middle;
            } else {
                fails = middle;
            }
        }
        does
    }
}
