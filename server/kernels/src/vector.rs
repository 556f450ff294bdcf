//! Element-wise work on rows: plain loops over 16 lanes that the compiler turns into vector code,
//! compiled once more for AVX2. Both give the same bits: nothing here is fused or reordered.
#![allow(unsafe_code)]

use crate::tile::{Isa, LANES};

/// `gate = silu(gate) * up`, where `silu(g) = g / (1 + exp(-g))`.
pub(crate) fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: this machine has AVX2 (see `Isa`).
        return unsafe { avx2::silu_mul(gate, up) };
    }
    silu_mul_lanes(gate, up);
}

/// Turns `scores[..len]` into `exp(score - max)` and the rest into zeros; gives the sum. The
/// length of `scores` must be a multiple of 16.
pub(crate) fn softmax(isa: Isa, scores: &mut [f32], len: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: this machine has AVX2 (see `Isa`).
        return unsafe { avx2::softmax(scores, len) };
    }
    softmax_lanes(scores, len)
}

/// `out = x / sqrt(mean(x^2) + epsilon) * weight`.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: this machine has AVX2 (see `Isa`).
        return unsafe { avx2::rms_norm(x, weight, epsilon, out) };
    }
    rms_norm_lanes(x, weight, epsilon, out);
}

/// `out = exp((x - max) * scale)`.
pub(crate) fn exp_scaled(isa: Isa, x: &[f32], max: f32, scale: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: this machine has AVX2 (see `Isa`).
        return unsafe { avx2::exp_scaled(x, max, scale, out) };
    }
    exp_scaled_lanes(x, max, scale, out);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    #[target_feature(enable = "avx2")]
    pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
        super::silu_mul_lanes(gate, up);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn softmax(scores: &mut [f32], len: usize) -> f32 {
        super::softmax_lanes(scores, len)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        super::rms_norm_lanes(x, weight, epsilon, out);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn exp_scaled(x: &[f32], max: f32, scale: f32, out: &mut [f32]) {
        super::exp_scaled_lanes(x, max, scale, out);
    }
}

#[inline(always)]
fn silu_mul_lanes(gate: &mut [f32], up: &[f32]) {
    for (g, &u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

#[inline(always)]
fn softmax_lanes(scores: &mut [f32], len: usize) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = scores[..len].as_chunks::<LANES>();
    for chunk in whole {
        for (m, &s) in max.iter_mut().zip(chunk) {
            *m = if s > *m { s } else { *m };
        }
    }
    let max = rest
        .iter()
        .chain(&max)
        .fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    let padded = len.next_multiple_of(LANES).min(scores.len());
    for s in &mut scores[..padded] {
        *s = exp(*s - max);
    }
    scores[len..].fill(0.0);
    let mut sums = [0.0; LANES];
    for chunk in scores[..padded].as_chunks::<LANES>().0 {
        for (sum, &s) in sums.iter_mut().zip(chunk) {
            *sum += s;
        }
    }
    sums.iter().sum()
}

#[inline(always)]
fn rms_norm_lanes(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut sums = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (sum, &v) in sums.iter_mut().zip(chunk) {
            *sum += v * v;
        }
    }
    let squares = sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    let scale = 1.0 / (squares / x.len() as f32 + epsilon).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

#[inline(always)]
fn exp_scaled_lanes(x: &[f32], max: f32, scale: f32, out: &mut [f32]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = exp((v - max) * scale);
    }
}

/// `exp` to 2 units in the last place within -87..=88, held at the ends outside: the polynomial of
/// Cephes' expf on the remainder of a division by ln 2, without a branch.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding this rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2^n, built from its exponent bits.
    p * f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3F80_0000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};

    #[test]
    fn exp_is_exact_to_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst}");
        assert!(exp(1e9).is_finite() && exp(-1e9) > 0.0 && exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn silu_equals_its_definition_and_holds_at_extremes() {
        let mut random = Random(1);
        let mut gate: Vec<f32> = random.values(100).iter().map(|x| x * 20.0).collect();
        gate.extend([-1e4, 1e4, 0.0]);
        let up = random.values(gate.len());
        let expected: Vec<f32> = gate
            .iter()
            .zip(&up)
            .map(|(&g, &u)| crate::reference::silu(g) * u)
            .collect();
        for isa in Isa::available() {
            let mut found = gate.clone();
            silu_mul(isa, &mut found, &up);
            assert_close(&found, &expected, 1e-6);
        }
    }

    #[test]
    fn softmax_ignores_what_stands_past_its_length() {
        let mut random = Random(2);
        for len in [1, 15, 16, 17, 47, 48] {
            let values = random.values(48);
            let max = values[..len].iter().copied().fold(f32::MIN, f32::max);
            let expected: Vec<f32> = (0..48)
                .map(|i| {
                    if i < len {
                        (values[i] - max).exp()
                    } else {
                        0.0
                    }
                })
                .collect();
            for isa in Isa::available() {
                let mut found = values.clone();
                found[len..].fill(f32::MAX);
                let sum = softmax(isa, &mut found, len);
                assert_close(&found, &expected, 1e-6);
                assert_close(&[sum], &[expected.iter().sum()], 1e-6);
            }
        }
    }

    #[test]
    fn norm_equals_the_reference_on_any_length() {
        let mut random = Random(3);
        for len in [1, 16, 50, 576] {
            let (x, weight) = (random.values(len), random.values(len));
            let expected = crate::reference::norm(&x, &weight, 1e-5);
            for isa in Isa::available() {
                let mut found = vec![0.0; len];
                rms_norm(isa, &x, &weight, 1e-5, &mut found);
                assert_close(&found, &expected, 1e-5);
            }
        }
    }
}
