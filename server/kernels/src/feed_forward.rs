//! The gated feed-forward network.
#![allow(unsafe_code)]

use crate::{
    error::{KernelError, check},
    gemm::{Panels, for_panels, multiply, row_blocks},
    matrix::Matrix,
    norm::Norm,
    parallel::Shared,
    tile::{Isa, LANES},
    vector,
};

/// Norm, gate and up projections and their product:
/// `out = silu(norm(x) * gate^T) . (norm(x) * up^T)`.
///
/// `x` is `[rows, gate.cols()]`, `out` `[rows, gate.out_stride()]`; `gate` and `up` have the same
/// shape. `scratch` is grown as needed.
pub fn norm_gate_up(
    x: &[f32],
    norm: &Norm,
    gate: &Matrix,
    up: &Matrix,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) -> Result<(), KernelError> {
    let isa = Isa::detect();
    let (cols, stride) = (gate.cols(), gate.out_stride());
    check("rows of the up projection", up.rows(), gate.rows())?;
    check("columns of the up projection", up.cols(), cols)?;
    norm.rows(isa, x, scratch)?;
    let normed: &[f32] = scratch;
    let rows = normed.len() / cols.max(1);
    check("input of gate and up", normed.len(), rows * cols)?;
    check("output of gate and up", out.len(), rows * stride)?;
    let out = Shared::new(out);
    for_panels(gate.panels(), |first, count| {
        let (gate, up) = (
            Panels::new(gate, first, count),
            Panels::new(up, first, count),
        );
        let width = count * LANES;
        let mut ups = Vec::new();
        for (start, len) in row_blocks(rows, cols) {
            ups.resize(len * width, 0.0);
            let x = &normed[start * cols..];
            // SAFETY: `ups` was just made `len` rows of `width`; `out` has `rows` rows of `stride`,
            // and these columns of it belong to this task alone.
            unsafe {
                up.multiply(isa, x, len, ups.as_mut_ptr(), width, false);
                let gates = out.get().add(start * stride + first * LANES);
                gate.multiply(isa, x, len, gates, stride, false);
                for (row, up) in ups.chunks_exact(width).enumerate() {
                    let gate = std::slice::from_raw_parts_mut(gates.add(row * stride), width);
                    vector::silu_mul(isa, gate, up);
                }
            }
        }
    });
    Ok(())
}

/// Down projection and residual: `residual += hidden * down^T`.
///
/// `hidden` is `[rows, down.cols()]`, `residual` `[rows, down.out_stride()]`.
pub fn down_residual(
    hidden: &[f32],
    down: &Matrix,
    residual: &mut [f32],
) -> Result<(), KernelError> {
    multiply(Isa::detect(), hidden, down, residual, true)
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
        fn the_network_equals_the_reference(
            rows in 0usize..40, cols in 1usize..6, inner in 1usize..12, seed: u64,
        ) {
            let (cols, inner) = (cols * 16, inner * 16);
            let mut random = Random(seed);
            let (gate, gate_values) = random.matrix(inner, cols);
            let (up, up_values) = random.matrix(inner, cols);
            let (down, down_values) = random.matrix(cols, inner);
            let norm = Norm { weight: random.values(cols), epsilon: 1e-5 };
            let x = random.values(rows * cols);

            let mut hidden = vec![0.0; rows * inner];
            norm_gate_up(&x, &norm, &gate, &up, &mut hidden, &mut Vec::new()).unwrap();
            let mut residual = x.clone();
            down_residual(&hidden, &down, &mut residual).unwrap();

            for (i, x) in x.chunks(cols).enumerate() {
                let normed = reference::norm(x, &norm.weight, norm.epsilon);
                let expected = reference::gated(
                    &reference::matmul(&normed, &gate_values, inner, cols),
                    &reference::matmul(&normed, &up_values, inner, cols),
                );
                assert_close(&hidden[i * inner..(i + 1) * inner], &expected, 1e-4);
                let product = reference::matmul(&expected, &down_values, cols, inner);
                let expected: Vec<f32> = x.iter().zip(product).map(|(x, p)| x + p).collect();
                assert_close(&residual[i * cols..(i + 1) * cols], &expected, 3e-4);
            }
        }
    }

    #[test]
    fn gate_and_up_must_have_one_shape() {
        let mut random = Random(1);
        let (gate, up) = (random.matrix(32, 16).0, random.matrix(16, 16).0);
        let norm = Norm {
            weight: vec![1.0; 16],
            epsilon: 1e-5,
        };
        let result = norm_gate_up(
            &[0.0; 16],
            &norm,
            &gate,
            &up,
            &mut [0.0; 32],
            &mut Vec::new(),
        );
        assert!(matches!(
            result,
            Err(KernelError::Shape {
                found: 16,
                expected: 32,
                ..
            })
        ));
    }
}
