//! What some architectures do to queries, keys and values before rope: a bias on all of them
//! (Qwen2), a norm of each head of queries and keys (Qwen3).
#![allow(unsafe_code)]

use crate::{
    attention::AttentionShape,
    error::{KernelError, check},
    norm::Norm,
    parallel::{Shared, parallel, parts},
    tile::Isa,
    vector,
};

/// Rows that are worth a task of their own.
const LEAST_ROWS: usize = 16;

/// Adds `bias` to the first `bias.len()` values of every row of `qkv`, `[rows, stride]`.
pub fn add_bias(qkv: &mut [f32], stride: usize, bias: &[f32]) -> Result<(), KernelError> {
    if bias.len() > stride {
        check("bias", bias.len(), stride)?;
    }
    for_rows(qkv, stride, |row| {
        row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    })
}

/// Root-mean-square norm of every head of queries and keys by itself, in place.
///
/// `qkv` is `[rows, stride]` as [`norm_qkv`](crate::norm_qkv) leaves it; `query` and `key` have
/// `head_size` weights, in the order of a head's dimensions.
pub fn norm_heads(
    qkv: &mut [f32],
    stride: usize,
    shape: AttentionShape,
    query: &Norm,
    key: &Norm,
) -> Result<(), KernelError> {
    let size = shape.head_size;
    check("weights of the query norm", query.weight.len(), size)?;
    check("weights of the key norm", key.weight.len(), size)?;
    if stride < shape.qkv_width() {
        check(
            "a row of queries, keys and values",
            stride,
            shape.qkv_width(),
        )?;
    }
    let isa = Isa::detect();
    for_rows(qkv, stride, |row| {
        let mut normed = vec![0.0; size];
        let heads = row
            .chunks_exact_mut(size)
            .take(shape.heads + shape.kv_heads);
        for (i, head) in heads.enumerate() {
            let norm = if i < shape.heads { query } else { key };
            vector::rms_norm(isa, head, &norm.weight, norm.epsilon, &mut normed);
            head.copy_from_slice(&normed);
        }
    })
}

/// Runs `work` on every row of `[rows, stride]`, in parallel where there are many.
fn for_rows(
    rows: &mut [f32],
    stride: usize,
    work: impl Fn(&mut [f32]) + Sync,
) -> Result<(), KernelError> {
    let count = rows.len() / stride.max(1);
    check("queries, keys and values", rows.len(), count * stride)?;
    let parts = parts(count, LEAST_ROWS);
    let rows = Shared::new(rows);
    parallel(parts, |part| {
        for row in count * part / parts..count * (part + 1) / parts {
            // SAFETY: there are `count` rows of `stride` values, checked above, and each belongs to
            // one part only.
            work(unsafe { std::slice::from_raw_parts_mut(rows.get().add(row * stride), stride) });
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        reference,
        testing::{Random, assert_close},
    };

    const SHAPE: AttentionShape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_size: 16,
        window: None,
    };

    #[test]
    fn heads_are_normed_one_by_one_and_values_are_left_alone() {
        let mut random = Random(1);
        let norm = |random: &mut Random| Norm {
            weight: random.values(16),
            epsilon: 1e-6,
        };
        let (query, key) = (norm(&mut random), norm(&mut random));
        for rows in [0, 1, 3, 70] {
            let stride = SHAPE.qkv_width() + 16;
            let before = random.values(rows * stride);
            let mut found = before.clone();
            norm_heads(&mut found, stride, SHAPE, &query, &key).unwrap();
            for (found, before) in found.chunks(stride).zip(before.chunks(stride)) {
                for head in 0..6 {
                    let weight = if head < 4 { &query.weight } else { &key.weight };
                    let expected = reference::norm(&before[head * 16..][..16], weight, 1e-6);
                    assert_close(&found[head * 16..][..16], &expected, 1e-6);
                }
                assert_eq!(found[6 * 16..], before[6 * 16..]);
            }
        }
    }

    #[test]
    fn a_bias_is_added_to_every_row_and_not_past_its_end() {
        let mut qkv: Vec<f32> = (0..40 * 8).map(|i| i as f32).collect();
        add_bias(&mut qkv, 8, &[1.0, -2.0, 0.5]).unwrap();
        for (i, row) in qkv.chunks(8).enumerate() {
            let at = |c: usize| (i * 8 + c) as f32;
            assert_eq!(row[..4], [at(0) + 1.0, at(1) - 2.0, at(2) + 0.5, at(3)]);
        }
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let norm = |len| Norm {
            weight: vec![1.0; len],
            epsilon: 1e-6,
        };
        let mut qkv = vec![0.0; SHAPE.qkv_width()];
        let stride = qkv.len();
        assert!(norm_heads(&mut qkv, stride, SHAPE, &norm(15), &norm(16)).is_err());
        assert!(norm_heads(&mut qkv, stride - 1, SHAPE, &norm(16), &norm(16)).is_err());
        assert!(add_bias(&mut qkv, stride, &vec![0.0; stride + 1]).is_err());
        assert!(add_bias(&mut qkv, stride - 1, &[0.0]).is_err());
    }
}
