//! The paged KV cache of one layer.

use half::f16;
use rayon::iter::{ParallelBridge, ParallelIterator};

use crate::{buffer::F16Buffer, error::KernelError, tile::LANES};

/// Tokens a block. A block's keys are one panel of 16 tokens, so this is the panel's width.
pub const BLOCK_SIZE: usize = LANES;

/// Tokens that are worth writing in parallel.
const LEAST_TOKENS: usize = 32;

/// Keys and values of one layer in blocks of [`BLOCK_SIZE`] tokens, which the scheduler hands out.
///
/// For each KV head and block: keys `[head_size, 16 tokens]`, then values
/// `[head_size / 16, 16 tokens, 16]`. Memory is taken from the system when a block is first used.
#[derive(Debug)]
pub struct KvCache {
    kv_heads: usize,
    head_size: usize,
    blocks: usize,
    data: F16Buffer,
}

impl KvCache {
    pub fn new(blocks: usize, kv_heads: usize, head_size: usize) -> Result<Self, KernelError> {
        if head_size == 0 || !head_size.is_multiple_of(LANES) {
            return Err(KernelError::HeadSize { found: head_size });
        }
        Ok(Self {
            kv_heads,
            head_size,
            blocks,
            data: F16Buffer::zeroed(blocks * Self::block_len(kv_heads, head_size)),
        })
    }

    /// Bytes that a block takes.
    pub fn block_bytes(kv_heads: usize, head_size: usize) -> usize {
        Self::block_len(kv_heads, head_size) * size_of::<f16>()
    }

    fn block_len(kv_heads: usize, head_size: usize) -> usize {
        2 * kv_heads * head_size * BLOCK_SIZE
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub(crate) fn head_size(&self) -> usize {
        self.head_size
    }

    /// One head's keys (or values) in a block.
    fn half_len(&self) -> usize {
        self.head_size * BLOCK_SIZE
    }

    pub(crate) fn keys(&self, head: usize, block: u32) -> &[f16] {
        let start = (head * self.blocks + block as usize) * 2 * self.half_len();
        &self.data.as_slice()[start..start + self.half_len()]
    }

    pub(crate) fn values(&self, head: usize, block: u32) -> &[f16] {
        let start = ((head * self.blocks + block as usize) * 2 + 1) * self.half_len();
        &self.data.as_slice()[start..start + self.half_len()]
    }

    /// Writes the keys and values of `tokens` tokens. `write` is called for each head, from several
    /// threads at once if that is worth it, and puts the tokens' values in place.
    pub(crate) fn write(&mut self, tokens: usize, write: impl Fn(usize, &mut HeadWriter) + Sync) {
        let (head_size, half) = (self.head_size, self.half_len());
        let head_len = (self.blocks * 2 * half).max(1);
        let heads = self.data.as_mut_slice().chunks_mut(head_len).enumerate();
        let write = |(head, data): (usize, &mut [f16])| {
            write(head, &mut HeadWriter { head_size, data });
        };
        if tokens < LEAST_TOKENS {
            heads.for_each(write);
        } else {
            heads.par_bridge().for_each(write);
        }
    }
}

/// One head's part of the cache, while a step's tokens are written to it.
pub(crate) struct HeadWriter<'a> {
    head_size: usize,
    data: &'a mut [f16],
}

impl HeadWriter<'_> {
    pub(crate) fn put(&mut self, block: u32, token: usize, key: &[f32], value: &[f32]) {
        let half = self.head_size * BLOCK_SIZE;
        let block = &mut self.data[block as usize * 2 * half..][..2 * half];
        let (keys, values) = block.split_at_mut(half);
        for (lanes, &k) in keys.chunks_exact_mut(LANES).zip(key) {
            lanes[token] = to_f16(k);
        }
        for (panel, v) in values
            .chunks_exact_mut(BLOCK_SIZE * LANES)
            .zip(value.chunks_exact(LANES))
        {
            let row = &mut panel[token * LANES..][..LANES];
            for (out, &v) in row.iter_mut().zip(v) {
                *out = to_f16(v);
            }
        }
    }
}

/// Finite whatever comes in: attention multiplies what stands in unused places by zero.
fn to_f16(value: f32) -> f16 {
    f16::from_f32(value.max(f16::MIN.to_f32()).min(f16::MAX.to_f32()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn tokens_land_in_their_blocks_panels() {
        let mut random = Random(1);
        let (key, value) = (random.values(32), random.values(32));
        let mut cache = KvCache::new(3, 2, 32).unwrap();
        cache.write(1, |head, writer| {
            if head == 1 {
                writer.put(2, 5, &key, &value);
            }
        });
        for d in 0..32 {
            assert_eq!(cache.keys(1, 2)[d * 16 + 5], f16::from_f32(key[d]));
            let at = d / 16 * 256 + 5 * 16 + d % 16;
            assert_eq!(cache.values(1, 2)[at], f16::from_f32(value[d]));
        }
        let written = |head| {
            (0..3)
                .flat_map(|b| cache.keys(head, b))
                .filter(|x| x.to_f32() != 0.0)
                .count()
        };
        assert_eq!((written(0), written(1)), (0, 32));
    }

    #[test]
    fn what_f16_cant_hold_stays_finite() {
        for value in [1e9, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            assert!(to_f16(value).is_finite(), "{value}");
        }
    }

    #[test]
    fn a_head_size_that_isnt_whole_panels_is_refused() {
        assert_eq!(
            KvCache::new(1, 1, 20).unwrap_err(),
            KernelError::HeadSize { found: 20 }
        );
    }
}
