//! A small non-linear least-squares solver for the law's five terms: Levenberg-Marquardt with
//! bounds, Huber's loss on the logarithm of predicted over observed time, and a pull towards
//! the prior.

use crate::Law;
use crate::observations::Sample;

pub(crate) const TERMS: usize = 5;
pub(crate) type Vector = [f64; TERMS];
pub(crate) type Matrix = [Vector; TERMS];

/// Residuals beyond this many standard deviations pull with constant force only.
const HUBER: f64 = 1.5;
const ITERATIONS: usize = 25;
/// Relative decrease of the cost at which the solver stops.
const TOLERANCE: f64 = 1e-6;

const LOW: Vector = [0.0; TERMS];
const HIGH: Vector = [f64::MAX, f64::MAX, f64::MAX, f64::MAX, 1.0];

pub(crate) fn terms(law: &Law) -> Vector {
    [
        law.base,
        law.per_kv_token,
        law.per_token,
        law.per_sequence,
        law.hidden,
    ]
}

/// What is to be fitted. Terms are solved for in units of `scale`.
pub(crate) struct Problem<'a> {
    pub samples: &'a [Sample],
    pub scale: Vector,
    /// The prior, and its standard deviation, in units of `scale`.
    pub prior: Vector,
    pub deviation: Vector,
    /// Degrees of freedom of the prior's Student distribution: few let the terms go far from a
    /// prior that doesn't fit, many hold them.
    pub freedom: f64,
}

pub(crate) struct Solution {
    /// Terms in units of `scale`.
    pub x: Vector,
    /// Gauss-Newton's matrix, the inverse of the terms' covariance.
    pub hessian: Matrix,
}

struct Evaluation {
    cost: f64,
    gradient: Vector,
    hessian: Matrix,
}

impl Problem<'_> {
    pub fn law(&self, x: &Vector) -> Law {
        let [base, per_kv_token, per_token, per_sequence, hidden] =
            std::array::from_fn(|term| x[term] * self.scale[term]);
        Law {
            base,
            per_kv_token,
            per_token,
            per_sequence,
            hidden,
        }
    }

    /// Logarithm of predicted over observed time.
    pub fn residual(&self, x: &Vector, sample: &Sample) -> f64 {
        predict(&self.law(x), sample).0.ln() - sample.ln_seconds
    }

    /// The cost at `x` where residuals have standard deviation `sigma`.
    pub fn cost(&self, x: &Vector, sigma: f64) -> f64 {
        self.evaluate(x, sigma).cost
    }

    pub fn minimise(&self, start: Vector, sigma: f64) -> Solution {
        let mut x = start;
        let mut here = self.evaluate(&x, sigma);
        let mut damping = 1e-4;
        for _ in 0..ITERATIONS {
            let mut matrix = here.hessian;
            for (term, row) in matrix.iter_mut().enumerate() {
                row[term] *= 1.0 + damping;
            }
            let step = bounded_step(&matrix, &here.gradient, &x);
            let next: Vector =
                std::array::from_fn(|term| (x[term] + step[term]).clamp(LOW[term], HIGH[term]));
            let there = self.evaluate(&next, sigma);
            if there.cost < here.cost {
                let decrease = here.cost - there.cost;
                x = next;
                here = there;
                damping = (damping * 0.2).max(1e-9);
                if decrease < TOLERANCE * here.cost {
                    break;
                }
            } else if damping > 1e6 {
                break;
            } else {
                damping *= 6.0;
            }
        }
        Solution {
            x,
            hessian: here.hessian,
        }
    }

    fn evaluate(&self, x: &Vector, sigma: f64) -> Evaluation {
        let law = self.law(x);
        let mut cost = 0.0;
        let mut gradient = [0.0; TERMS];
        let mut hessian = [[0.0; TERMS]; TERMS];
        for sample in self.samples {
            let (seconds, slopes) = predict(&law, sample);
            let residual = (seconds.ln() - sample.ln_seconds) / sigma;
            let size = residual.abs();
            // Huber: quadratic near zero, linear beyond.
            let (loss, pull) = if size <= HUBER {
                (0.5 * residual * residual, 1.0)
            } else {
                (HUBER * (size - 0.5 * HUBER), HUBER / size)
            };
            cost += sample.weight * loss;
            let weight = sample.weight * pull;
            let slopes: Vector =
                std::array::from_fn(|term| slopes[term] * self.scale[term] / (seconds * sigma));
            for row in 0..TERMS {
                gradient[row] += weight * residual * slopes[row];
                for column in 0..=row {
                    hessian[row][column] += weight * slopes[row] * slopes[column];
                }
            }
        }
        for row in 0..TERMS {
            let off = (x[row] - self.prior[row]) / self.deviation[row];
            let pull = 1.0 / (1.0 + off * off / self.freedom);
            cost -= 0.5 * self.freedom * pull.ln();
            gradient[row] += pull * off / self.deviation[row];
            hessian[row][row] += pull / (self.deviation[row] * self.deviation[row]);
        }
        for row in 1..TERMS {
            let (above, below) = hessian.split_at_mut(row);
            for (upper, lower) in above.iter_mut().zip(&below[0]) {
                upper[row] = *lower;
            }
        }
        Evaluation {
            cost,
            gradient,
            hessian,
        }
    }
}

/// Seconds of a step and their derivatives by the law's terms.
fn predict(law: &Law, sample: &Sample) -> (f64, Vector) {
    let memory = law.base + law.per_kv_token * sample.kv_tokens;
    let compute = law.per_token * sample.tokens;
    let exposed = 1.0 - law.hidden;
    let (of_memory, of_compute) = if memory >= compute {
        (1.0, exposed)
    } else {
        (exposed, 1.0)
    };
    let seconds = of_memory * memory + of_compute * compute + law.per_sequence * sample.sequences;
    let slopes = [
        of_memory,
        of_memory * sample.kv_tokens,
        of_compute * sample.tokens,
        sample.sequences,
        -memory.min(compute),
    ];
    (seconds.max(1e-9), slopes)
}

/// The step that minimises the quadratic model without leaving the bounds: terms that would leave
/// are held at their bound, the worst first, and the others solved for again.
fn bounded_step(matrix: &Matrix, gradient: &Vector, x: &Vector) -> Vector {
    let mut held: [Option<f64>; TERMS] = [None; TERMS];
    for _ in 0..=TERMS {
        let mut reduced = *matrix;
        let mut right: Vector = std::array::from_fn(|row| -gradient[row]);
        for (term, step) in held.iter().enumerate() {
            let Some(step) = *step else { continue };
            for row in 0..TERMS {
                right[row] -= matrix[row][term] * step;
                reduced[row][term] = 0.0;
                reduced[term][row] = 0.0;
            }
            reduced[term][term] = 1.0;
        }
        for (term, step) in held.iter().enumerate() {
            if let Some(step) = *step {
                right[term] = step;
            }
        }
        let Some(factor) = cholesky(&reduced) else {
            return [0.0; TERMS];
        };
        let step = solve(&factor, right);
        let overshoot = |term: usize| {
            let to = x[term] + step[term];
            (LOW[term] - to).max(to - HIGH[term])
        };
        let worst = (0..TERMS)
            .filter(|&term| held[term].is_none() && overshoot(term) > 1e-12)
            .max_by(|&a, &b| overshoot(a).total_cmp(&overshoot(b)));
        let Some(term) = worst else { return step };
        let bound = if step[term] < 0.0 {
            LOW[term]
        } else {
            HIGH[term]
        };
        held[term] = Some(bound - x[term]);
    }
    [0.0; TERMS]
}

/// Standard deviation of each term, from the inverse of the solution's matrix.
pub(crate) fn deviations(hessian: &Matrix) -> Option<Vector> {
    let factor = cholesky(hessian)?;
    Some(std::array::from_fn(|term| {
        let mut unit = [0.0; TERMS];
        unit[term] = 1.0;
        solve(&factor, unit)[term].max(0.0).sqrt()
    }))
}

/// Lower triangle L with L * L^T = `matrix`; `None` if the matrix isn't positive definite.
fn cholesky(matrix: &Matrix) -> Option<Matrix> {
    let mut lower = [[0.0; TERMS]; TERMS];
    for row in 0..TERMS {
        for column in 0..=row {
            let done: f64 = (0..column).map(|k| lower[row][k] * lower[column][k]).sum();
            let left = matrix[row][column] - done;
            if row == column {
                if left <= 0.0 || !left.is_finite() {
                    return None;
                }
                lower[row][row] = left.sqrt();
            } else {
                lower[row][column] = left / lower[column][column];
            }
        }
    }
    Some(lower)
}

/// Solves L * L^T * x = `right`.
fn solve(lower: &Matrix, right: Vector) -> Vector {
    let mut x = right;
    for row in 0..TERMS {
        let done: f64 = (0..row).map(|k| lower[row][k] * x[k]).sum();
        x[row] = (x[row] - done) / lower[row][row];
    }
    for row in (0..TERMS).rev() {
        let done: f64 = (row + 1..TERMS).map(|k| lower[k][row] * x[k]).sum();
        x[row] = (x[row] - done) / lower[row][row];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cholesky_solves_and_refuses() {
        let mut matrix = [[0.0; TERMS]; TERMS];
        for (row, line) in matrix.iter_mut().enumerate() {
            for (column, value) in line.iter_mut().enumerate() {
                *value = 1.0 / (1.0 + row.abs_diff(column) as f64);
            }
            line[row] += 1.0;
        }
        let wanted = [1.0, -2.0, 3.0, 0.5, 4.0];
        let right: Vector =
            std::array::from_fn(|row| (0..TERMS).map(|k| matrix[row][k] * wanted[k]).sum());
        let factor = cholesky(&matrix).unwrap();
        let solved = solve(&factor, right);
        for term in 0..TERMS {
            assert!((solved[term] - wanted[term]).abs() < 1e-12);
        }
        matrix[2][2] = -1.0;
        assert!(cholesky(&matrix).is_none());
    }

    #[test]
    fn bounded_step_stays_inside_and_solves_for_the_rest() {
        // Two coupled terms: unconstrained, the first would go to -1.
        let mut matrix = [[0.0; TERMS]; TERMS];
        for (term, row) in matrix.iter_mut().enumerate() {
            row[term] = 1.0;
        }
        matrix[0][1] = 0.5;
        matrix[1][0] = 0.5;
        let x = [0.5, 0.5, 0.5, 0.5, 0.5];
        let gradient = [1.5, -1.0, 0.0, 0.0, -3.0];
        let step = bounded_step(&matrix, &gradient, &x);
        assert_eq!(step[0], -0.5, "held at zero");
        assert!((step[1] - 1.25).abs() < 1e-12, "1.0 + 0.5 * 0.5");
        assert_eq!(step[4], 0.5, "hidden is held at one");
    }

    #[test]
    fn slopes_are_the_derivatives() {
        let sample = |tokens| Sample {
            sequences: 5.0,
            tokens,
            kv_tokens: 3000.0,
            ln_seconds: 0.0,
            weight: 1.0,
        };
        let at = [0.03, 4e-7, 2e-4, 3e-4, 0.7];
        let law = |terms: Vector| Law {
            base: terms[0],
            per_kv_token: terms[1],
            per_token: terms[2],
            per_sequence: terms[3],
            hidden: terms[4],
        };
        for tokens in [20.0, 900.0] {
            let (seconds, slopes) = predict(&law(at), &sample(tokens));
            for term in 0..TERMS {
                let mut moved = at;
                moved[term] *= 1.0 + 1e-6;
                let slope = (predict(&law(moved), &sample(tokens)).0 - seconds) / (at[term] * 1e-6);
                assert!((slope - slopes[term]).abs() <= 1e-5 * slopes[term].abs().max(1e-9));
            }
        }
    }
}
