//! Final norm, language-model head and sampling.

use rayon::prelude::*;

use crate::{
    error::{KernelError, check},
    gemm::multiply,
    matrix::Matrix,
    norm::Norm,
    sampling::{SamplingParams, sample},
    tile::Isa,
};

/// Rows whose logits are in memory at once.
const LOGIT_ROWS: usize = 32;

/// A row of the step whose next token is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    pub row: usize,
    pub sampling: SamplingParams,
}

/// Norm and head of some rows: their logits, `[rows.len(), head.out_stride()]`, of which the first
/// `head.rows()` count.
///
/// `x` holds all rows of the step, `[_, head.cols()]`.
pub fn norm_head(
    x: &[f32],
    rows: &[usize],
    norm: &Norm,
    head: &Matrix,
    scratch: &mut Vec<f32>,
) -> Result<Vec<f32>, KernelError> {
    let isa = Isa::detect();
    let width = head.cols();
    let total = x.len() / width.max(1);
    check("input of the head", x.len(), total * width)?;
    let mut picked = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        let values = x
            .get(row * width..(row + 1) * width)
            .ok_or(KernelError::Row { row, rows: total })?;
        picked.extend_from_slice(values);
    }
    norm.rows(isa, &picked, scratch)?;
    let mut logits = vec![0.0; rows.len() * head.out_stride()];
    multiply(isa, scratch, head, &mut logits, false)?;
    Ok(logits)
}

/// Norm, head and sampling: the next token of each picked row.
pub fn norm_head_sample(
    x: &[f32],
    picks: &[Pick],
    norm: &Norm,
    head: &Matrix,
    scratch: &mut Vec<f32>,
) -> Result<Vec<u32>, KernelError> {
    let mut tokens = Vec::with_capacity(picks.len());
    for picks in picks.chunks(LOGIT_ROWS) {
        let rows: Vec<usize> = picks.iter().map(|pick| pick.row).collect();
        let logits = norm_head(x, &rows, norm, head, scratch)?;
        let sampled: Result<Vec<u32>, KernelError> = logits
            .par_chunks_exact(head.out_stride().max(1))
            .zip(picks)
            .map(|(logits, pick)| sample(&logits[..head.rows()], &pick.sampling))
            .collect();
        tokens.extend(sampled?);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        reference,
        testing::{Random, assert_close},
    };

    const GREEDY: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
        position: 0,
    };

    #[test]
    fn logits_equal_the_reference_and_greedy_takes_the_highest() {
        let mut random = Random(3);
        let (vocab, width) = (213, 48);
        let (head, weights) = random.matrix(vocab, width);
        let norm = Norm {
            weight: random.values(width),
            epsilon: 1e-5,
        };
        let x = random.values(80 * width);
        let rows: Vec<usize> = (0..80).rev().step_by(2).collect();
        let logits = norm_head(&x, &rows, &norm, &head, &mut Vec::new()).unwrap();
        let picks: Vec<Pick> = rows
            .iter()
            .map(|&row| Pick {
                row,
                sampling: GREEDY,
            })
            .collect();
        let tokens = norm_head_sample(&x, &picks, &norm, &head, &mut Vec::new()).unwrap();
        for ((found, &row), token) in logits.chunks(head.out_stride()).zip(&rows).zip(tokens) {
            let x = &x[row * width..(row + 1) * width];
            let normed = reference::norm(x, &norm.weight, norm.epsilon);
            let expected = reference::matmul(&normed, &weights, vocab, width);
            assert_close(&found[..vocab], &expected, 2e-5);
            let highest = found[..vocab].iter().copied().fold(f32::MIN, f32::max);
            assert_eq!(found[token as usize], highest);
        }
    }

    #[test]
    fn a_row_that_isnt_there_is_an_error() {
        let (head, _) = Random(1).matrix(16, 16);
        let norm = Norm {
            weight: vec![1.0; 16],
            epsilon: 1e-5,
        };
        let result = norm_head(&[0.0; 32], &[2], &norm, &head, &mut Vec::new());
        assert_eq!(result, Err(KernelError::Row { row: 2, rows: 2 }));
    }
}
