//! AVX-512F: 32 registers of 16 lanes, a panel is one of them.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Operands};

/// 12 rows by two panels fill 24 registers with sums.
pub(super) const MAX_ROWS: usize = 12;

pub(super) fn panels_at_once(rows: usize) -> usize {
    if rows <= 2 { 4 } else { 2 }
}

/// # Safety
/// As for [`super::Isa::multiply`], for at most `MAX_ROWS` rows and `panels_at_once` panels.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile(rows: usize, panels: &[*const f16], operands: Operands) {
    // SAFETY: passed on from the caller.
    unsafe {
        match (rows, panels) {
            (1, &[a, b, c, d]) => fixed::<1, 4>([a, b, c, d], operands),
            (2, &[a, b, c, d]) => fixed::<2, 4>([a, b, c, d], operands),
            (1, _) => each::<1>(panels, operands),
            (2, _) => each::<2>(panels, operands),
            (3, _) => pairs::<3>(panels, operands),
            (4, _) => pairs::<4>(panels, operands),
            (5, _) => pairs::<5>(panels, operands),
            (6, _) => pairs::<6>(panels, operands),
            (7, _) => pairs::<7>(panels, operands),
            (8, _) => pairs::<8>(panels, operands),
            (9, _) => pairs::<9>(panels, operands),
            (10, _) => pairs::<10>(panels, operands),
            (11, _) => pairs::<11>(panels, operands),
            _ => pairs::<12>(panels, operands),
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn pairs<const R: usize>(panels: &[*const f16], operands: Operands) {
    // SAFETY: passed on from the caller.
    unsafe {
        match panels {
            &[a, b] => fixed::<R, 2>([a, b], operands),
            _ => each::<R>(panels, operands),
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn each<const R: usize>(panels: &[*const f16], operands: Operands) {
    for (i, &panel) in panels.iter().enumerate() {
        // SAFETY: panel `i` of the caller's, with its own columns of `y`.
        unsafe {
            let y = operands.y.add(i * LANES);
            fixed::<R, 1>([panel], Operands { y, ..operands });
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn fixed<const R: usize, const P: usize>(panels: [*const f16; P], operands: Operands) {
    let Operands {
        x,
        x_stride,
        k,
        y,
        y_stride,
        accumulate,
    } = operands;
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    // SAFETY: the caller vouches for `k` values a row, `16 k` a panel and `R` rows of `16 P`
    // outputs.
    unsafe {
        if accumulate {
            for (r, row) in sums.iter_mut().enumerate() {
                for (p, sum) in row.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(y.add(r * y_stride + p * LANES));
                }
            }
        }
        for i in 0..k {
            let mut weights = [_mm512_setzero_ps(); P];
            for (weight, panel) in weights.iter_mut().zip(panels) {
                let at = panel.add(i * LANES).cast::<__m256i>();
                *weight = _mm512_cvtph_ps(_mm256_loadu_si256(at));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*x.add(r * x_stride + i));
                for (sum, &weight) in row.iter_mut().zip(&weights) {
                    *sum = _mm512_fmadd_ps(value, weight, *sum);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (p, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(y.add(r * y_stride + p * LANES), *sum);
            }
        }
    }
}
