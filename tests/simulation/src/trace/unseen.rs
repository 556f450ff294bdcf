//! Kinds of traffic unlike the recorded trace's: all but one drawn from what is written here.

use super::{Mix, Shape, Trace};
use crate::random::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unseen {
    /// An editor that completes code: long prompts, a line or two for an answer, over one wave.
    CodeCompletion,
    /// A chat that carries whole documents along: very long prompts, over one wave.
    LongChat,
    /// The recorded trace's requests, eight minutes up and down.
    UpAndDown,
    /// A classifier: requests that are all alike, and a word or two for an answer, over one wave.
    Classifier,
}

/// Requests to draw from.
const DRAWN: usize = 20_000;

impl Unseen {
    pub const ALL: [Unseen; 4] = [
        Unseen::CodeCompletion,
        Unseen::LongChat,
        Unseen::UpAndDown,
        Unseen::Classifier,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Unseen::CodeCompletion => "code-completion",
            Unseen::LongChat => "long-chat",
            Unseen::UpAndDown => "up-and-down",
            Unseen::Classifier => "classifier",
        }
    }

    /// `recorded` gives the requests of [`Unseen::UpAndDown`].
    pub fn generate(self, recorded: &Mix, seed: u64) -> Trace {
        let mut random = Random::of(seed, self.name());
        // Medians, and standard deviations of logarithms.
        let mut drawn = |prompt: (f64, f64), output: (f64, f64)| {
            let mut length = |(median, sigma): (f64, f64), most: f64| {
                let factor = (sigma * random.normal()).exp();
                (median * factor).clamp(1.0, most) as u32
            };
            let lengths = (0..DRAWN).map(|_| (length(prompt, 16_000.0), length(output, 2_000.0)));
            Mix::drawn(lengths.collect())
        };
        let (shape, peak, mix) = match self {
            Unseen::CodeCompletion => (Shape::Diurnal, 5.0, drawn((1800.0, 0.7), (20.0, 0.8))),
            Unseen::LongChat => (Shape::Diurnal, 1.5, drawn((5000.0, 0.7), (200.0, 0.7))),
            Unseen::UpAndDown => (Shape::Swing, 7.0, recorded.clone()),
            Unseen::Classifier => (Shape::Diurnal, 7.0, Mix::fixed(2000, 4)),
        };
        Trace {
            name: self.name().into(),
            ..shape.generate(peak, &mix, seed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_are_what_they_say() {
        let recorded = Mix::fixed(1000, 200);
        for kind in Unseen::ALL {
            let trace = kind.generate(&recorded, 1);
            assert_eq!(trace, kind.generate(&recorded, 1));
            let n = trace.requests.len() as f64;
            let prompts: u64 = trace.requests.iter().map(|r| u64::from(r.prompt)).sum();
            let outputs: u64 = trace.requests.iter().map(|r| u64::from(r.output)).sum();
            let (prompt, output) = (prompts as f64 / n, outputs as f64 / n);
            match kind {
                Unseen::CodeCompletion => assert!(prompt > 1800.0 && output < 40.0),
                Unseen::LongChat => assert!(prompt > 5000.0 && output > 200.0),
                Unseen::UpAndDown => assert_eq!((prompt, output), (1000.0, 200.0)),
                Unseen::Classifier => assert_eq!((prompt, output), (2000.0, 4.0)),
            }
        }
    }
}
