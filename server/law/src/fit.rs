//! The law, learnt from timed steps.

use crate::observations::{Observations, Sample};
use crate::solve::{Problem, Solution, TERMS, Vector, deviations, terms};
use crate::{Law, StepShape};

/// Where a fit starts and to what the terms that the observations can't tell are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prior {
    pub law: Law,
    /// How far the law is to be trusted before anything was observed, 0..=1. At 0 only its
    /// proportions are used, scaled to the first observations.
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

/// Observations before the first fit.
const FIRST: u64 = 4;
/// Observations between fits later on.
const INTERVAL: u64 = 64;
/// Noise of a step's time that is assumed at the least (standard deviation of the logarithm).
const LEAST_SIGMA: f64 = 0.01;
/// Its bounds while there are too few observations to tell noise from a law that doesn't fit yet.
const FEW_SIGMA: (f64, f64) = (0.03, 0.1);
/// Observations that are few.
const FEW: usize = 16;
/// Rounds of fitting and judging the noise anew.
const ROUNDS: usize = 4;

/// Standard deviations of a guessed prior's terms: relative ones, but for `hidden`.
const UNKNOWN: Vector = [2.0, 2.0, 2.0, 2.0, 0.6];
/// The same of a prior that was measured: a sweep of a dozen steps tells base and compute well,
/// the small terms less so.
const KNOWN: Vector = [0.05, 0.25, 0.1, 0.25, 0.1];
/// Confidence from which on a prior counts as measured.
const KNOWN_FROM: f64 = 0.5;

/// An online fit of the law to observed steps: bounded in memory, robust to outliers, forgetting
/// what newer steps contradict. Terms are never negative and `hidden` stays within 0..=1.
#[derive(Clone, Debug)]
pub struct LawFit {
    prior: Prior,
    law: Law,
    confidence: f64,
    observations: Observations,
    /// Kept between fits to spare the allocation.
    samples: Vec<Sample>,
    next_fit: u64,
    fits: u64,
    /// Samples there were when all starts were tried last.
    explored: usize,
}

impl LawFit {
    pub fn new(prior: Prior) -> Self {
        let prior = Prior {
            law: sane(prior.law),
            confidence: prior.confidence.clamp(0.0, 1.0),
        };
        Self {
            prior,
            law: prior.law,
            confidence: prior.confidence,
            observations: Observations::default(),
            samples: Vec::new(),
            next_fit: FIRST,
            fits: 0,
            explored: 0,
        }
    }

    /// Takes in a step's device time, in seconds. Times that aren't positive numbers and steps
    /// without a sequence are ignored.
    pub fn observe(&mut self, shape: StepShape, seconds: f64) {
        if !(seconds.is_finite() && seconds > 0.0) || shape.sequences == 0 || shape.tokens == 0 {
            return;
        }
        self.observations.push(shape, seconds);
        if self.observations.steps() >= self.next_fit {
            self.refit();
        }
    }

    /// Fits to what was observed up to now, without waiting for the next turn.
    pub fn refit(&mut self) {
        if self.observations.steps() == 0 {
            return;
        }
        let mut samples = std::mem::take(&mut self.samples);
        self.observations.collect_into(&mut samples);
        // The more is known, the less a step adds.
        let steps = self.observations.steps();
        self.next_fit = steps + (steps / 8).clamp(FIRST, INTERVAL);
        if self.fits == 0 && self.prior.confidence == 0.0 {
            let factor = typical_ratio(&self.prior.law, &samples);
            self.prior.law = self.prior.law.slowed(factor);
            self.law = self.prior.law;
        }

        let problem = self.problem(&samples);
        let (mut best, mut sigma) = fit_from(&problem, in_units(&self.law, &problem.scale));
        // The cost has local minima where no observation lies on the true side of the knee
        // between memory and compute. So other starts are tried: all when many new shapes were
        // seen, else one in turn.
        let others = other_starts(&problem, &samples);
        let turn = self.fits as usize % (4 * others.len());
        let explore = samples.len() * 4 >= self.explored * 5;
        if explore {
            self.explored = samples.len() + 1;
        }
        for (place, start) in others.iter().enumerate() {
            if !explore && 4 * place != turn {
                continue;
            }
            let (other, other_sigma) = fit_from(&problem, *start);
            let common = sigma.min(other_sigma);
            if problem.cost(&other.x, common) < problem.cost(&best.x, common) {
                (best, sigma) = (other, other_sigma);
            }
        }
        self.law = problem.law(&best.x);
        self.confidence = self.judge(&problem, &best, sigma);
        self.fits += 1;
        self.samples = samples;
    }

    pub fn law(&self) -> Law {
        self.law
    }

    /// How far the law is to be trusted, 0..=1: from how much was observed, how well the shapes
    /// tell each term, and how well the law explains the times.
    pub fn confidence(&self) -> f64 {
        self.confidence
    }

    fn problem<'a>(&self, samples: &'a [Sample]) -> Problem<'a> {
        let law = &self.prior.law;
        // The unit of a term is its prior, but not so small that it couldn't grow.
        let scale = [
            law.base.max(1e-6),
            law.per_kv_token.max(law.base * 1e-7).max(1e-13),
            law.per_token.max(law.base * 1e-4).max(1e-10),
            law.per_sequence.max(law.base * 1e-4).max(1e-10),
            1.0,
        ];
        let trust = self.prior.confidence;
        let known = (trust / KNOWN_FROM).min(1.0);
        Problem {
            samples,
            scale,
            prior: in_units(law, &scale),
            deviation: std::array::from_fn(|term| {
                UNKNOWN[term] * (1.0 - known) + KNOWN[term] * known
            }),
            // From Cauchy's distribution for a guess to nearly a normal one.
            freedom: (1.0 - trust).max(0.1).powi(-2),
        }
    }

    fn judge(&self, problem: &Problem, solution: &Solution, sigma: f64) -> f64 {
        let Some(after) = deviations(&solution.hessian) else {
            return self.confidence;
        };
        // How much narrower than a guess's each term's distribution has become.
        let told: f64 = (0..TERMS)
            .map(|term| 1.0 - (after[term] / UNKNOWN[term]).min(1.0))
            .sum::<f64>()
            / TERMS as f64;
        let explained = 1.0 / (1.0 + (sigma / 0.2).powi(2));
        let weight: f64 = problem.samples.iter().map(|sample| sample.weight).sum();
        let number = weight / (weight + 4.0);
        let trust = self.prior.confidence;
        (trust + number * (told * explained - trust)).clamp(0.0, 1.0)
    }
}

/// Fits from a start, judging the noise by what is left and fitting again until that settles.
fn fit_from(problem: &Problem, start: Vector) -> (Solution, f64) {
    let mut sigma = noise(problem, &start);
    let mut solution = problem.minimise(start, sigma);
    for _ in 1..ROUNDS {
        let left = noise(problem, &solution.x);
        if (left / sigma - 1.0).abs() < 0.1 {
            break;
        }
        sigma = left;
        solution = problem.minimise(solution.x, sigma);
    }
    (solution, sigma)
}

/// Standard deviation of the residuals, from their median (outliers don't move it).
fn noise(problem: &Problem, x: &Vector) -> f64 {
    let mut sizes: Vec<f64> = problem
        .samples
        .iter()
        .map(|sample| problem.residual(x, sample).abs())
        .collect();
    let few = sizes.len() < FEW;
    let sigma = 1.4826 * median(&mut sizes);
    if few {
        sigma.clamp(FEW_SIGMA.0, FEW_SIGMA.1)
    } else {
        sigma.max(LEAST_SIGMA)
    }
}

/// How much slower the observed steps were than `law` says.
fn typical_ratio(law: &Law, samples: &[Sample]) -> f64 {
    let mut logs: Vec<f64> = samples
        .iter()
        .map(|sample| {
            let shape = StepShape {
                sequences: sample.sequences as u32,
                tokens: sample.tokens as u32,
                kv_tokens: sample.kv_tokens as u64,
            };
            sample.ln_seconds - law.step_seconds(shape).max(1e-9).ln()
        })
        .collect();
    median(&mut logs).exp()
}

fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// Starts on either side of the knee: compute as slow as the fastest token seen allows, hidden
/// fully, half and not at all; and the prior.
fn other_starts(problem: &Problem, samples: &[Sample]) -> [Vector; 4] {
    let fastest = |of: fn(&Sample) -> f64| {
        samples
            .iter()
            .map(|sample| sample.ln_seconds.exp() / of(sample).max(1.0))
            .fold(f64::INFINITY, f64::min)
    };
    let per_token = fastest(|sample| sample.tokens);
    let base = fastest(|_| 1.0);
    let start = |hidden: f64| {
        let mut x = problem.prior;
        x[0] = base / problem.scale[0];
        x[2] = per_token / problem.scale[2];
        x[4] = hidden;
        x
    };
    [start(1.0), start(0.5), start(0.0), problem.prior]
}

fn in_units(law: &Law, scale: &Vector) -> Vector {
    let terms = terms(law);
    std::array::from_fn(|term| terms[term] / scale[term])
}

/// The law with terms that are finite and not negative.
fn sane(law: Law) -> Law {
    let positive = |term: f64| if term.is_finite() { term.max(0.0) } else { 0.0 };
    Law {
        base: positive(law.base),
        per_kv_token: positive(law.per_kv_token),
        per_token: positive(law.per_token),
        per_sequence: positive(law.per_sequence),
        hidden: positive(law.hidden).min(1.0),
    }
}
