//! Rows times a weight matrix, and the two blocks that are little more.
#![allow(unsafe_code)]

use half::f16;

use crate::{
    error::{KernelError, check},
    matrix::Matrix,
    norm::Norm,
    parallel::{Shared, parallel, parts},
    tile::{Isa, LANES, Operands},
};

/// Input rows that are multiplied before the next ones are touched take this much of the core's
/// second-level cache.
const ROW_BLOCK_BYTES: usize = 256 << 10;

/// Panels that are worth a task of their own.
const LEAST_PANELS: usize = 4;

/// Norm and query, key and value projections: `out = norm(x) * qkv^T`.
///
/// `x` is `[rows, qkv.cols()]`, `out` `[rows, qkv.out_stride()]`; a row of `qkv`'s output holds
/// all query heads, then all key heads, then all value heads. `scratch` is grown as needed.
pub fn norm_qkv(
    x: &[f32],
    norm: &Norm,
    qkv: &Matrix,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) -> Result<(), KernelError> {
    let isa = Isa::detect();
    norm.rows(isa, x, scratch)?;
    multiply(isa, scratch, qkv, out, false)
}

/// Output projection and residual: `residual += attention * output^T`.
///
/// `attention` is `[rows, output.cols()]`, `residual` `[rows, output.out_stride()]`.
pub fn output_residual(
    attention: &[f32],
    output: &Matrix,
    residual: &mut [f32],
) -> Result<(), KernelError> {
    multiply(Isa::detect(), attention, output, residual, true)
}

/// `y (+)= x * w^T` for all rows of `x`.
pub(crate) fn multiply(
    isa: Isa,
    x: &[f32],
    w: &Matrix,
    y: &mut [f32],
    accumulate: bool,
) -> Result<(), KernelError> {
    let rows = x.len() / w.cols().max(1);
    check("input of a projection", x.len(), rows * w.cols())?;
    check("output of a projection", y.len(), rows * w.out_stride())?;
    let y = Shared::new(y);
    for_panels(w.panels(), |first, count| {
        let panels = Panels::new(w, first, count);
        for (start, len) in row_blocks(rows, w.cols()) {
            // SAFETY: `x` and `y` have `rows` rows, checked above, and these columns of `y` belong
            // to this task alone.
            unsafe {
                let y = y.get().add(start * w.out_stride() + first * LANES);
                panels.multiply(
                    isa,
                    &x[start * w.cols()..],
                    len,
                    y,
                    w.out_stride(),
                    accumulate,
                );
            }
        }
    });
    Ok(())
}

/// Runs `task(first panel, panels)` over all panels, in parallel.
pub(crate) fn for_panels(panels: usize, task: impl Fn(usize, usize) + Sync) {
    let parts = parts(panels, LEAST_PANELS);
    parallel(parts, |part| {
        let (first, end) = (panels * part / parts, panels * (part + 1) / parts);
        task(first, end - first);
    });
}

/// Cuts rows of `cols` inputs into blocks that stay in the cache: (first, rows).
pub(crate) fn row_blocks(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    let fit = ROW_BLOCK_BYTES / (cols.max(1) * size_of::<f32>());
    // A multiple of every instruction set's tile.
    let block = (fit / 12 * 12).max(24);
    (0..rows)
        .step_by(block)
        .map(move |start| (start, block.min(rows - start)))
}

/// Some panels of a matrix.
pub(crate) struct Panels<'a> {
    matrix: &'a Matrix,
    pointers: Vec<*const f16>,
}

impl<'a> Panels<'a> {
    pub(crate) fn new(matrix: &'a Matrix, first: usize, count: usize) -> Self {
        let pointers = (first..first + count)
            .map(|i| matrix.panel(i).as_ptr())
            .collect();
        Self { matrix, pointers }
    }

    /// Multiplies the first `rows` rows of `x` by these panels.
    ///
    /// # Safety
    /// `y` is writable for `rows` rows of `16 panels` values, `y_stride` apart, and nothing else
    /// accesses them meanwhile.
    pub(crate) unsafe fn multiply(
        &self,
        isa: Isa,
        x: &[f32],
        rows: usize,
        y: *mut f32,
        y_stride: usize,
        accumulate: bool,
    ) {
        let cols = self.matrix.cols();
        let x = &x[..rows * cols];
        let operands = Operands {
            x: x.as_ptr(),
            x_stride: cols,
            k: cols,
            y,
            y_stride,
            accumulate,
        };
        // SAFETY: the slice above has `rows` rows of `cols` values, a panel of the matrix has
        // `16 cols`, and the caller vouches for `y`.
        unsafe { isa.multiply(rows, &self.pointers, operands) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        reference,
        testing::{Random, assert_close},
    };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn norm_qkv_equals_the_reference(
            rows in 0usize..70, cols in 1usize..90, outputs in 1usize..200, seed: u64,
        ) {
            let mut random = Random(seed);
            let (qkv, weights) = random.matrix(outputs, cols);
            let x = random.values(rows * cols);
            let norm = Norm { weight: random.values(cols), epsilon: 1e-5 };
            let mut out = vec![0.0; rows * qkv.out_stride()];
            norm_qkv(&x, &norm, &qkv, &mut out, &mut Vec::new()).unwrap();
            for (row, x) in out.chunks(qkv.out_stride()).zip(x.chunks(cols)) {
                let normed = reference::norm(x, &norm.weight, norm.epsilon);
                let expected = reference::matmul(&normed, &weights, outputs, cols);
                assert_close(&row[..outputs], &expected, 2e-5);
            }
        }

        #[test]
        fn output_residual_adds_to_what_was_there(
            rows in 1usize..40, cols in 1usize..90, outputs in 1usize..12, seed: u64,
        ) {
            let outputs = outputs * 16;
            let mut random = Random(seed);
            let (output, weights) = random.matrix(outputs, cols);
            let x = random.values(rows * cols);
            let before = random.values(rows * outputs);
            let mut residual = before.clone();
            output_residual(&x, &output, &mut residual).unwrap();
            for ((row, x), before) in residual.chunks(outputs).zip(x.chunks(cols)).zip(before.chunks(outputs)) {
                let product = reference::matmul(x, &weights, outputs, cols);
                let expected: Vec<f32> = before.iter().zip(product).map(|(b, p)| b + p).collect();
                assert_close(row, &expected, 2e-5);
            }
        }
    }

    #[test]
    fn threads_dont_change_a_bit() {
        let mut random = Random(5);
        let (w, _) = random.matrix(500, 120);
        let x = random.values(37 * 120);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut y = vec![0.0; 37 * w.out_stride()];
            pool.install(|| multiply(Isa::detect(), &x, &w, &mut y, false))
                .unwrap();
            y
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let (w, _) = Random(1).matrix(16, 8);
        let mut y = vec![0.0; 16];
        assert!(output_residual(&[0.0; 9], &w, &mut y).is_err());
        assert!(output_residual(&[0.0; 16], &w, &mut y).is_err());
    }
}
