//! AVX2, FMA and F16C: 16 registers of 8 lanes, a panel is two of them.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Operands};

/// 6 rows by one panel fill 12 registers with sums; two hold weights, one the input.
pub(super) const MAX_ROWS: usize = 6;

/// A fused multiply-add takes 4 cycles and two start in each: 8 chains keep the core busy.
pub(super) fn panels_at_once(rows: usize) -> usize {
    match rows {
        1 => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// # Safety
/// As for [`super::Isa::multiply`], for at most `MAX_ROWS` rows and `panels_at_once` panels.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile(rows: usize, panels: &[*const f16], operands: Operands) {
    // SAFETY: passed on from the caller.
    unsafe {
        match (rows, panels) {
            (1, &[a, b, c, d]) => fixed::<1, 4>([a, b, c, d], operands),
            (1, _) => each::<1>(panels, operands),
            (2, &[a, b]) => fixed::<2, 2>([a, b], operands),
            (2, _) => each::<2>(panels, operands),
            (3, &[a, b]) => fixed::<3, 2>([a, b], operands),
            (3, _) => each::<3>(panels, operands),
            (4, _) => each::<4>(panels, operands),
            (5, _) => each::<5>(panels, operands),
            _ => each::<6>(panels, operands),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn each<const R: usize>(panels: &[*const f16], operands: Operands) {
    for (i, &panel) in panels.iter().enumerate() {
        // SAFETY: panel `i` of the caller's, with its own columns of `y`.
        unsafe {
            let y = operands.y.add(i * LANES);
            fixed::<R, 1>([panel], Operands { y, ..operands });
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fixed<const R: usize, const P: usize>(panels: [*const f16; P], operands: Operands) {
    let Operands {
        x,
        x_stride,
        k,
        y,
        y_stride,
        accumulate,
    } = operands;
    let mut sums = [[[_mm256_setzero_ps(); 2]; P]; R];
    // SAFETY: the caller vouches for `k` values a row, `16 k` a panel and `R` rows of `16 P`
    // outputs.
    unsafe {
        if accumulate {
            for (r, row) in sums.iter_mut().enumerate() {
                for (p, sum) in row.iter_mut().enumerate() {
                    let at = y.add(r * y_stride + p * LANES);
                    *sum = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
                }
            }
        }
        for i in 0..k {
            for p in 0..P {
                let at = panels[p].add(i * LANES).cast::<__m128i>();
                let low = _mm256_cvtph_ps(_mm_loadu_si128(at));
                let high = _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)));
                for (r, row) in sums.iter_mut().enumerate() {
                    let value = _mm256_broadcast_ss(&*x.add(r * x_stride + i));
                    row[p][0] = _mm256_fmadd_ps(value, low, row[p][0]);
                    row[p][1] = _mm256_fmadd_ps(value, high, row[p][1]);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (p, sum) in row.iter().enumerate() {
                let at = y.add(r * y_stride + p * LANES);
                _mm256_storeu_ps(at, sum[0]);
                _mm256_storeu_ps(at.add(8), sum[1]);
            }
        }
    }
}
