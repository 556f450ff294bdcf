//! The law, learnt from timed steps.

use crate::{Law, StepShape};

/// Where a fit starts and to what the terms that the observations can't tell are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prior {
    pub law: Law,
    /// How far the law is to be trusted before anything was observed, 0..=1.
    pub confidence: f64,
}

impl Default for Prior {
    fn default() -> Self {
        Self {
            law: Law::typical(0.03),
            confidence: 0.0,
        }
    }
}

/// An online fit of the law to observed steps.
#[derive(Clone, Debug)]
pub struct LawFit {
    prior: Prior,
}

impl LawFit {
    pub fn new(prior: Prior) -> Self {
        Self { prior }
    }

    /// Takes in a step's device time, in seconds.
    pub fn observe(&mut self, shape: StepShape, seconds: f64) {
        let _ = (shape, seconds);
    }

    pub fn law(&self) -> Law {
        self.prior.law
    }

    /// 0..=1.
    pub fn confidence(&self) -> f64 {
        self.prior.confidence
    }
}
