//! RMS norm of the rows that a block works on.

use crate::{
    error::{KernelError, check},
    parallel::{Shared, parallel, parts},
    tile::Isa,
    vector,
};

/// Root-mean-square normalisation with a weight an element (<https://arxiv.org/abs/1910.07467>).
#[derive(Clone, Debug)]
pub struct Norm {
    pub weight: Vec<f32>,
    pub epsilon: f32,
}

impl Norm {
    /// Normalises `x` (whole rows of `weight.len()`) into `out`, which is resized to fit.
    #[allow(unsafe_code)]
    pub(crate) fn rows(&self, isa: Isa, x: &[f32], out: &mut Vec<f32>) -> Result<(), KernelError> {
        let width = self.weight.len();
        let rows = x.len() / width.max(1);
        check("input of a norm", x.len(), rows * width)?;
        out.resize(x.len(), 0.0);
        let parts = parts(rows, 16);
        let out = Shared::new(out);
        parallel(parts, |part| {
            for row in rows * part / parts..rows * (part + 1) / parts {
                // SAFETY: `out` has `rows` rows, and each belongs to one part only.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(out.get().add(row * width), width) };
                let x = &x[row * width..(row + 1) * width];
                vector::rms_norm(isa, x, &self.weight, self.epsilon, out);
            }
        });
        Ok(())
    }
}
