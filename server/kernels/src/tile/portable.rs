//! Plain Rust, for machines without a kernel of their own.
#![allow(unsafe_code)]

use half::{f16, slice::HalfFloatSliceExt};

use super::{LANES, Operands};

pub(super) const MAX_ROWS: usize = 4;

/// Columns that are turned into f32 at once.
const COLUMNS: usize = 32;

/// # Safety
/// As for [`super::Isa::multiply`].
pub(super) unsafe fn tile(rows: usize, panels: &[*const f16], operands: Operands) {
    let k = operands.k;
    for (p, &panel) in panels.iter().enumerate() {
        // SAFETY: the caller vouches for `16 k` values a panel, `k` a row and 16 outputs a row and
        // panel; the outputs of this panel are borrowed by nothing else.
        unsafe {
            let panel = std::slice::from_raw_parts(panel, k * LANES);
            let out = |r: usize| operands.y.add(r * operands.y_stride + p * LANES);
            let mut sums = [[0.0f32; LANES]; MAX_ROWS];
            if operands.accumulate {
                for (r, sum) in sums.iter_mut().enumerate().take(rows) {
                    sum.copy_from_slice(std::slice::from_raw_parts(out(r), LANES));
                }
            }
            let mut weights = [0.0f32; COLUMNS * LANES];
            for (first, part) in (0..k).step_by(COLUMNS).zip(panel.chunks(COLUMNS * LANES)) {
                let weights = &mut weights[..part.len()];
                part.convert_to_f32_slice(weights);
                for (r, sum) in sums.iter_mut().enumerate().take(rows) {
                    let x = operands.x.add(r * operands.x_stride + first);
                    let x = std::slice::from_raw_parts(x, part.len() / LANES);
                    for (&value, lanes) in x.iter().zip(weights.chunks_exact(LANES)) {
                        for (s, &w) in sum.iter_mut().zip(lanes) {
                            *s = multiply_add(value, w, *s);
                        }
                    }
                }
            }
            for (r, sum) in sums.iter().enumerate().take(rows) {
                std::slice::from_raw_parts_mut(out(r), LANES).copy_from_slice(sum);
            }
        }
    }
}

/// Fused where the instruction is part of the base instruction set; elsewhere a call to libm.
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(target_arch = "aarch64") {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}
