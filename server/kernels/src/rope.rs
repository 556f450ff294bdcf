//! Rotary position embedding (<https://arxiv.org/abs/2104.09864>).

use crate::error::{KernelError, check};

/// The rotation of every position, worked out beforehand.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Rotated dimensions of a head, in pairs; the ones after them stay as they are.
    rotated: usize,
    positions: usize,
    /// (cosine, sine) of a pair, `[positions, rotated / 2]`.
    rotations: Vec<(f32, f32)>,
}

impl Rope {
    /// Pair `i` turns by `position / base^(2 i / rotated)`, divided by its factor where there are
    /// any (Llama 3's long-context scaling, `rope_freqs.weight` in GGUF).
    pub fn new(
        positions: usize,
        rotated: usize,
        base: f32,
        factors: Option<&[f32]>,
    ) -> Result<Self, KernelError> {
        let pairs = rotated / 2;
        check("rotated dimensions", rotated, pairs * 2)?;
        if let Some(factors) = factors {
            check("rope factors", factors.len(), pairs)?;
        }
        let frequencies: Vec<f64> = (0..pairs)
            .map(|i| {
                let factor = factors.map_or(1.0, |f| f64::from(f[i]));
                f64::from(base).powf(-2.0 * i as f64 / rotated as f64) / factor
            })
            .collect();
        let rotations = (0..positions)
            .flat_map(|position| {
                frequencies.iter().map(move |frequency| {
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    (cos as f32, sin as f32)
                })
            })
            .collect();
        Ok(Self {
            rotated,
            positions,
            rotations,
        })
    }

    /// (cosine, sine) of each pair, `[positions, rotated / 2]`.
    pub fn rotations(&self) -> impl Iterator<Item = [f32; 2]> + '_ {
        self.rotations.iter().map(|&(cos, sin)| [cos, sin])
    }

    pub(crate) fn rotated(&self) -> usize {
        self.rotated
    }

    pub(crate) fn positions(&self) -> usize {
        self.positions
    }

    /// Rotates a head whose pairs lie side by side, GGUF's order for Llama, and scales it.
    pub(crate) fn apply(&self, position: usize, scale: f32, head: &[f32], out: &mut [f32]) {
        let pairs = self.rotated / 2;
        let rotations = &self.rotations[position * pairs..(position + 1) * pairs];
        let (turned, kept) = out.split_at_mut(self.rotated);
        let inputs = head.as_chunks::<2>().0;
        for ((out, &[a, b]), &(cos, sin)) in turned
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(inputs)
            .zip(rotations)
        {
            *out = [(a * cos - b * sin) * scale, (a * sin + b * cos) * scale];
        }
        for (out, &value) in kept.iter_mut().zip(&head[self.rotated..]) {
            *out = value * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        reference,
        testing::{Random, assert_close},
    };

    #[test]
    fn equals_the_reference_with_and_without_factors() {
        let mut random = Random(1);
        let factors: Vec<f32> = random.values(8).iter().map(|x| x + 2.0).collect();
        for factors in [None, Some(factors.as_slice())] {
            let rope = Rope::new(100, 16, 10_000.0, factors).unwrap();
            for position in [0, 1, 99] {
                let head = random.values(20);
                let mut found = vec![0.0; 20];
                rope.apply(position, 1.0, &head, &mut found);
                let mut expected = head;
                reference::rope(&mut expected[..16], position, 10_000.0, factors);
                assert_close(&found, &expected, 1e-5);
            }
        }
    }
}
