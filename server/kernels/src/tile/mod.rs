//! The one matrix kernel: a few rows of f32 times f16 panels of 16 outputs.
//!
//! `y[r][16 p + lane] (+)= sum over k of x[r][k] * panel[p][16 k + lane]`, each sum one chain in
//! the order of k. Weights, keys (a block of 16 tokens) and values (16 of the head's dimensions)
//! are all such panels.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::f16;

/// Outputs a panel.
pub(crate) const LANES: usize = 16;

/// An instruction set that this machine has. Only `detect` and `available` make one, which is what
/// makes the kernels' use of it sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Where a tile reads its rows and puts its results.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    /// Input rows of `k` values, `x_stride` apart.
    pub x: *const f32,
    pub x_stride: usize,
    pub k: usize,
    /// Output rows, `y_stride` apart; a panel's 16 values lie beside those of the panel before.
    pub y: *mut f32,
    pub y_stride: usize,
    /// Add to what stands in `y` instead of overwriting it.
    pub accumulate: bool,
}

impl Isa {
    /// The best one.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                if is_x86_feature_detected!("avx512f") {
                    return Self(Kind::Avx512);
                }
                return Self(Kind::Avx2);
            }
        }
        Self(Kind::Portable)
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let mut all = vec![Self(Kind::Portable)];
        #[cfg(target_arch = "x86_64")]
        match Self::detect().0 {
            Kind::Avx512 => all.extend([Self(Kind::Avx2), Self(Kind::Avx512)]),
            Kind::Avx2 => all.push(Self(Kind::Avx2)),
            Kind::Portable => {}
        }
        all
    }

    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }

    pub(crate) fn has_avx2(self) -> bool {
        self.0 != Kind::Portable
    }

    /// Rows that fit the registers.
    fn max_rows(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512::MAX_ROWS,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2::MAX_ROWS,
            Kind::Portable => portable::MAX_ROWS,
        }
    }

    /// Panels to take at once, so that few rows still make enough independent chains.
    fn panels_at_once(self, rows: usize) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512::panels_at_once(rows),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2::panels_at_once(rows),
            Kind::Portable => 1,
        }
    }

    /// Multiplies any number of rows by any number of panels.
    ///
    /// # Safety
    /// Every panel is readable for `16 k` values, `x` for `rows` rows of `k` values and `y`
    /// writable for `rows` rows of `16 panels.len()` values, at their strides; nothing else
    /// accesses those of `y` meanwhile.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn multiply(self, rows: usize, panels: &[*const f16], operands: Operands) {
        if rows == 0 {
            return;
        }
        let tiles = rows.div_ceil(self.max_rows());
        let (least, larger) = (rows / tiles, rows % tiles);
        let at_once = self.panels_at_once(rows.div_ceil(tiles));
        for (i, group) in panels.chunks(at_once).enumerate() {
            let mut row = 0;
            for tile in 0..tiles {
                let count = least + usize::from(tile < larger);
                // SAFETY: rows `row..row + count` and the group's columns lie within what the
                // caller vouches for; this machine has the instruction set (see `Isa`).
                unsafe {
                    let at = Operands {
                        x: operands.x.add(row * operands.x_stride),
                        y: operands
                            .y
                            .add(row * operands.y_stride + i * at_once * LANES),
                        ..operands
                    };
                    match self.0 {
                        #[cfg(target_arch = "x86_64")]
                        Kind::Avx512 => avx512::tile(count, group, at),
                        #[cfg(target_arch = "x86_64")]
                        Kind::Avx2 => avx2::tile(count, group, at),
                        Kind::Portable => portable::tile(count, group, at),
                    }
                }
                row += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Random;

    fn run(isa: Isa, rows: usize, panels: usize, k: usize, accumulate: bool) -> Vec<f32> {
        let mut random = Random(7);
        let weights: Vec<f16> = random
            .values(panels * k * LANES)
            .into_iter()
            .map(f16::from_f32)
            .collect();
        let x: Vec<f32> = random.values(rows * (k + 3));
        let stride = panels * LANES + 5;
        let mut y: Vec<f32> = random.values(rows * stride);
        let pointers: Vec<*const f16> = (0..panels)
            .map(|p| weights[p * k * LANES..].as_ptr())
            .collect();
        let operands = Operands {
            x: x.as_ptr(),
            x_stride: k + 3,
            k,
            y: y.as_mut_ptr(),
            y_stride: stride,
            accumulate,
        };
        // SAFETY: the vectors have the sizes that `operands` says.
        #[allow(unsafe_code)]
        unsafe {
            isa.multiply(rows, &pointers, operands);
        }
        y
    }

    fn expected(rows: usize, panels: usize, k: usize, accumulate: bool) -> Vec<f64> {
        let mut random = Random(7);
        let weights = random.values(panels * k * LANES);
        let x = random.values(rows * (k + 3));
        let stride = panels * LANES + 5;
        let y = random.values(rows * stride);
        (0..rows * stride)
            .map(|i| {
                let (r, c) = (i / stride, i % stride);
                if c >= panels * LANES {
                    return f64::from(y[i]);
                }
                let panel = &weights[c / LANES * k * LANES..];
                let sum: f64 = (0..k)
                    .map(|j| {
                        let w = f16::from_f32(panel[j * LANES + c % LANES]).to_f64();
                        f64::from(x[r * (k + 3) + j]) * w
                    })
                    .sum();
                sum + if accumulate { f64::from(y[i]) } else { 0.0 }
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_instruction_set_multiplies_any_shape(
            rows in 1usize..30, panels in 1usize..10, k in 1usize..70, accumulate: bool,
        ) {
            let expected = expected(rows, panels, k, accumulate);
            for isa in Isa::available() {
                let found = run(isa, rows, panels, k, accumulate);
                for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                    prop_assert!((f64::from(*f) - e).abs() < 1e-4, "{isa:?} at {i}: {f} for {e}");
                }
            }
        }

        #[test]
        fn a_row_doesnt_depend_on_its_neighbours(rows in 2usize..30, k in 1usize..70) {
            for isa in Isa::available() {
                let together = run(isa, rows, 3, k, false);
                let alone = run(isa, 1, 3, k, false);
                prop_assert_eq!(&together[..3 * LANES], &alone[..3 * LANES]);
            }
        }
    }

    #[test]
    fn avx2_and_avx512_agree_to_the_bit() {
        let vector: Vec<Vec<f32>> = Isa::available()
            .into_iter()
            .filter(|isa| isa.has_avx2())
            .map(|isa| run(isa, 13, 5, 300, false))
            .collect();
        assert!(vector.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
