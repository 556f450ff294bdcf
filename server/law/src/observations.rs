//! A bounded memory of timed steps, spread over the shapes that were seen.

use crate::StepShape;

/// Shapes are told apart by the powers of two of their three numbers.
const CELLS: usize = 96;
/// The newest steps that each cell keeps.
const PER_CELL: usize = 6;
/// Steps after which an observation counts half.
const HALF_LIFE: f64 = 2048.0;
/// What an observation counts at the least: until newer ones of its cell replace it, old
/// knowledge of a shape is better than none.
const LEAST_WEIGHT: f64 = 0.05;

/// A timed step as the solver takes it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub sequences: f64,
    pub tokens: f64,
    pub kv_tokens: f64,
    pub ln_seconds: f64,
    pub weight: f64,
}

#[derive(Clone, Debug)]
struct Cell {
    key: (u32, u32, u32),
    /// Step number and observation, as a ring.
    ring: [(u64, Sample); PER_CELL],
    len: usize,
    next: usize,
}

impl Cell {
    fn new(key: (u32, u32, u32)) -> Self {
        Self {
            key,
            ring: [(0, Sample::default()); PER_CELL],
            len: 0,
            next: 0,
        }
    }

    fn push(&mut self, step: u64, sample: Sample) {
        if let Some(place) = self.ring.get_mut(self.next) {
            *place = (step, sample);
        }
        self.next = (self.next + 1) % PER_CELL;
        self.len = (self.len + 1).min(PER_CELL);
    }

    fn newest(&self) -> u64 {
        self.ring.iter().map(|(step, _)| *step).max().unwrap_or(0)
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Observations {
    cells: Vec<Cell>,
    steps: u64,
}

impl Observations {
    /// Steps observed so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn push(&mut self, shape: StepShape, seconds: f64) {
        self.steps += 1;
        let sample = Sample {
            sequences: f64::from(shape.sequences),
            tokens: f64::from(shape.tokens),
            kv_tokens: shape.kv_tokens as f64,
            ln_seconds: seconds.ln(),
            weight: 1.0,
        };
        let prompt = shape.tokens.saturating_sub(shape.sequences);
        let key = (
            shape.sequences.checked_ilog2().map_or(0, |log| log + 1),
            prompt.checked_ilog2().map_or(0, |log| log + 1),
            shape.kv_tokens.checked_ilog2().map_or(0, |log| log + 1),
        );
        let place = match self.cells.iter().position(|cell| cell.key == key) {
            Some(place) => place,
            None if self.cells.len() < CELLS => {
                self.cells.push(Cell::new(key));
                self.cells.len() - 1
            }
            // The shape not seen for longest gives way.
            None => {
                let oldest = (0..self.cells.len())
                    .min_by_key(|&place| self.cells.get(place).map_or(0, Cell::newest))
                    .unwrap_or(0);
                if let Some(cell) = self.cells.get_mut(oldest) {
                    *cell = Cell::new(key);
                }
                oldest
            }
        };
        let step = self.steps;
        if let Some(cell) = self.cells.get_mut(place) {
            cell.push(step, sample);
        }
    }

    /// Writes all kept observations, weighted by age, into `samples`.
    pub fn collect_into(&self, samples: &mut Vec<Sample>) {
        samples.clear();
        for cell in &self.cells {
            for (step, sample) in cell.ring.iter().take(cell.len) {
                let age = (self.steps - step) as f64;
                samples.push(Sample {
                    weight: (-age / HALF_LIFE).exp2().max(LEAST_WEIGHT),
                    ..*sample
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_keeps_the_newest_of_every_recent_shape() {
        let mut observations = Observations::default();
        let rare = StepShape {
            sequences: 1,
            tokens: 3000,
            kv_tokens: 3000,
        };
        observations.push(rare, 0.5);
        let usual = StepShape {
            sequences: 8,
            tokens: 8,
            kv_tokens: 1000,
        };
        for step in 0..10_000 {
            observations.push(usual, 0.01 + f64::from(step) * 1e-6);
        }
        let mut samples = Vec::new();
        observations.collect_into(&mut samples);
        assert_eq!(samples.len(), 1 + PER_CELL);
        let rare_kept = samples.iter().find(|sample| sample.tokens == 3000.0);
        assert_eq!(
            rare_kept.map(|sample| sample.weight),
            Some(LEAST_WEIGHT),
            "the rare shape is remembered, at the least weight"
        );
        let newest = (0.01f64 + 9_999.0 * 1e-6).ln();
        assert!(samples.iter().any(|sample| sample.ln_seconds == newest));

        for sequences in 0..12 {
            for tokens in 0..12 {
                for kv in 0..20 {
                    let shape = StepShape {
                        sequences: 1 << sequences,
                        tokens: (1 << sequences) + (1 << tokens),
                        kv_tokens: 1 << kv,
                    };
                    for _ in 0..10 {
                        observations.push(shape, 0.1);
                    }
                }
            }
        }
        observations.collect_into(&mut samples);
        assert_eq!(samples.len(), CELLS * PER_CELL);
    }
}
