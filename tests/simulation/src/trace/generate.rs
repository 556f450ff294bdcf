//! Traces made from a mix of requests and a shape of load over time.

use super::{Request, Trace};
use crate::random::Random;

/// Lengths of requests to draw from.
#[derive(Clone, Debug)]
pub struct Mix {
    lengths: Vec<(u32, u32)>,
}

impl Mix {
    /// The requests of a trace, whatever came when.
    pub fn of(trace: &Trace) -> Self {
        let requests = trace.requests.iter();
        Mix {
            lengths: requests.map(|r| (r.prompt, r.output)).collect(),
        }
    }

    /// All requests alike.
    pub fn fixed(prompt: u32, output: u32) -> Self {
        Mix {
            lengths: vec![(prompt.max(1), output.max(1))],
        }
    }

    /// Prompts and outputs to draw from.
    pub(super) fn drawn(lengths: Vec<(u32, u32)>) -> Self {
        Mix { lengths }
    }

    /// The same mix with other lengths: prompts and outputs times a factor each.
    pub fn scaled(&self, prompts: f64, outputs: f64) -> Self {
        let scale = |n: u32, factor: f64| (f64::from(n) * factor).round().max(1.0) as u32;
        let lengths = self.lengths.iter();
        Mix {
            lengths: lengths
                .map(|&(prompt, output)| (scale(prompt, prompts), scale(output, outputs)))
                .collect(),
        }
    }

    fn draw(&self, random: &mut Random) -> (u32, u32) {
        let place = random.below(self.lengths.len());
        self.lengths.get(place).copied().unwrap_or((1, 1))
    }
}

/// Load over time. Requests arrive at random (a Poisson process) at the rate of the moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// A constant rate.
    Steady,
    /// A base rate, then at once five times as much, then the base again.
    Step,
    /// A base rate with 60 s of six times as much, after a third and after two thirds of the hour.
    Spike,
    /// From a fifth of the peak to the peak at a constant pace.
    Ramp,
    /// One wave.
    Diurnal,
    /// Slow rises that end at once; five of them.
    Sawtooth,
    /// Five minutes of load, ten minutes of nothing; four times.
    OnOff,
    /// Waves of eight minutes, between a fifth of the peak and the peak.
    Swing,
    /// A constant rate; half-way, prompts become three times as long and answers half as long.
    MixShift,
}

impl Shape {
    pub const ALL: [Shape; 9] = [
        Shape::Steady,
        Shape::Step,
        Shape::Spike,
        Shape::Ramp,
        Shape::Diurnal,
        Shape::Sawtooth,
        Shape::OnOff,
        Shape::Swing,
        Shape::MixShift,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Shape::Steady => "steady",
            Shape::Step => "step",
            Shape::Spike => "spike",
            Shape::Ramp => "ramp",
            Shape::Diurnal => "diurnal",
            Shape::Sawtooth => "sawtooth",
            Shape::OnOff => "onoff",
            Shape::Swing => "swing",
            Shape::MixShift => "mixshift",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }

    /// Seconds.
    pub fn duration(self) -> f64 {
        match self {
            Shape::Diurnal | Shape::Sawtooth => 4500.0,
            _ => 3600.0,
        }
    }

    /// Share of the peak rate at time `t`.
    pub fn level(self, t: f64) -> f64 {
        let duration = self.duration();
        match self {
            Shape::Steady | Shape::MixShift => 0.7,
            Shape::Step if (1200.0..2700.0).contains(&t) => 1.0,
            Shape::Step => 0.2,
            Shape::Spike if t >= 1200.0 && t % 1200.0 < 60.0 => 1.0,
            Shape::Spike => 1.0 / 6.0,
            Shape::Ramp => 0.2 + 0.8 * t / duration,
            Shape::Diurnal => 0.57 - 0.43 * (std::f64::consts::TAU * t / duration).cos(),
            Shape::Swing => 0.6 - 0.4 * (std::f64::consts::TAU * t / 480.0).cos(),
            Shape::Sawtooth => 0.2 + 0.8 * (t % 900.0) / 900.0,
            Shape::OnOff if (t % 900.0) < 300.0 => 1.0,
            Shape::OnOff => 0.0,
        }
    }

    /// When load jumps for the first time out of what is there.
    pub fn jump(self) -> Option<f64> {
        match self {
            Shape::Step | Shape::Spike => Some(1200.0),
            _ => None,
        }
    }

    /// A trace of this shape whose highest rate is `peak` requests a second.
    pub fn generate(self, peak: f64, mix: &Mix, seed: u64) -> Trace {
        let mut random = Random::of(seed, self.name());
        let duration = self.duration();
        let shifted = mix.scaled(3.0, 0.5);
        let mut requests = Vec::new();
        let mut t = 0.0;
        loop {
            // Thinning: candidates at the peak rate, kept with the level of their moment.
            t += random.exponential(1.0 / peak.max(1e-9));
            if t >= duration {
                break;
            }
            let kept = random.uniform() < self.level(t);
            let late = self == Shape::MixShift && t >= duration / 2.0;
            let mix = if late { &shifted } else { mix };
            let (prompt, output) = mix.draw(&mut random);
            if kept {
                requests.push(Request {
                    arrival: t,
                    prompt,
                    output,
                });
            }
        }
        Trace {
            name: self.name().into(),
            requests,
            duration,
        }
    }

    /// The peak rate, in requests of the recorded trace's mix a second, at which the reference study's
    /// peers do as its tables A to C say: it doesn't tell how its traces were made.
    pub fn study_peak(self) -> f64 {
        match self {
            Shape::Step => 7.2,
            Shape::Spike => 12.8,
            Shape::OnOff => 6.2,
            Shape::Diurnal => 7.6,
            Shape::Sawtooth => 7.8,
            _ => 6.8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn per_minute(trace: &Trace) -> Vec<f64> {
        let mut counts = vec![0.0; (trace.duration / 60.0).ceil() as usize];
        for request in &trace.requests {
            counts[(request.arrival / 60.0) as usize] += 1.0 / 60.0;
        }
        counts
    }

    #[test]
    fn shapes_have_their_levels_and_are_repeatable() {
        let mix = Mix::fixed(100, 10);
        for shape in Shape::ALL {
            let trace = shape.generate(20.0, &mix, 1);
            assert_eq!(trace, shape.generate(20.0, &mix, 1));
            assert_ne!(trace, shape.generate(20.0, &mix, 2));
            assert!(trace.requests.is_sorted_by(|a, b| a.arrival <= b.arrival));
            for (minute, rate) in per_minute(&trace).into_iter().enumerate() {
                let t = minute as f64 * 60.0;
                let expected = 20.0 * (shape.level(t + 1.0) + shape.level(t + 59.0)) / 2.0;
                let deviation = (expected / 60.0f64).sqrt().max(0.1);
                let off = (rate - expected) / deviation;
                assert!(
                    off.abs() < 4.5,
                    "{shape:?} minute {minute}: {rate} for {expected}"
                );
            }
        }
    }

    #[test]
    fn steps_spikes_and_pauses_are_of_their_size() {
        let mix = Mix::fixed(1, 1);
        let step = per_minute(&Shape::Step.generate(20.0, &mix, 3));
        let mean = |rates: &[f64]| rates.iter().sum::<f64>() / rates.len() as f64;
        let ratio = mean(&step[20..45]) / mean(&step[..20]);
        assert!((ratio / 5.0 - 1.0).abs() < 0.1, "{ratio}");
        let spike = per_minute(&Shape::Spike.generate(60.0, &mix, 3));
        let ratio = spike[20] / mean(&spike[..20]);
        assert!((ratio / 6.0 - 1.0).abs() < 0.1, "{ratio}");
        assert!(Shape::OnOff.generate(5.0, &mix, 3).longest_pause() >= 600.0);
    }

    #[test]
    fn a_shifted_mix_has_other_lengths() {
        let trace = Shape::MixShift.generate(5.0, &Mix::fixed(100, 10), 1);
        let last = trace.requests.last().unwrap();
        assert_eq!((last.prompt, last.output), (300, 5));
        assert_eq!(trace.requests[0].prompt, 100);
    }

    #[test]
    fn a_trace_can_be_repeated_thickened_and_cut() {
        let trace = Shape::Steady.generate(2.0, &Mix::fixed(1, 1), 1);
        let n = trace.requests.len();
        let twice = trace.repeated(2);
        assert_eq!(twice.requests.len(), 2 * n);
        assert_eq!(
            twice.requests[n].arrival,
            trace.requests[0].arrival + 3600.0
        );
        assert!(twice.requests.is_sorted_by(|a, b| a.arrival <= b.arrival));
        assert_eq!(trace.thickened(3).requests.len(), 3 * n);
        assert!(trace.first(60.0).requests.len() < n / 10);
    }
}
