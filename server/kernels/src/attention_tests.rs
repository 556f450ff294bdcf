use proptest::prelude::*;

use super::*;
use crate::{
    reference,
    testing::{Random, assert_close},
};

const BASE: f32 = 10_000.0;
const POSITIONS: usize = 200;

fn round(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// A sequence of random queries, keys and values, and what attention gives for each token.
struct Case {
    qkv: Vec<Vec<f32>>,
    expected: Vec<Vec<f32>>,
}

fn case(shape: AttentionShape, tokens: usize, random: &mut Random) -> Case {
    let AttentionShape {
        heads,
        kv_heads,
        head_size,
        ..
    } = shape;
    let qkv: Vec<Vec<f32>> = (0..tokens)
        .map(|_| random.values(shape.qkv_width()))
        .collect();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut expected = Vec::new();
    for (position, row) in qkv.iter().enumerate() {
        let mut row = row.clone();
        let (rotated, value) = row.split_at_mut((heads + kv_heads) * head_size);
        for head in rotated.chunks_mut(head_size) {
            reference::rope(head, position, BASE, None);
        }
        let (query, key) = rotated.split_at(heads * head_size);
        keys.push(key.iter().copied().map(round).collect::<Vec<_>>());
        values.push(value.iter().copied().map(round).collect::<Vec<_>>());
        let seen = shape.first_visible(position)..;
        let (keys, values) = (&keys[seen.clone()], &values[seen]);
        expected.push(reference::attention(query, keys, values, heads, kv_heads));
    }
    Case { qkv, expected }
}

/// Runs cases in steps: `chunks[step][case]` tokens of each. Blocks are dealt out in turn.
fn run(shape: AttentionShape, cases: &[Case], chunks: &[Vec<usize>]) -> Vec<Vec<Vec<f32>>> {
    let rope = Rope::new(POSITIONS, shape.head_size, BASE, None).unwrap();
    let blocks_each = POSITIONS.div_ceil(BLOCK_SIZE);
    let mut cache =
        KvCache::new(cases.len() * blocks_each, shape.kv_heads, shape.head_size).unwrap();
    let tables: Vec<Vec<u32>> = (0..cases.len())
        .map(|c| {
            (0..blocks_each)
                .map(|b| ((b + 1) * cases.len() - 1 - c) as u32)
                .collect()
        })
        .collect();
    let mut done = vec![0; cases.len()];
    let mut outputs = vec![Vec::new(); cases.len()];
    for step in chunks {
        let sequences: Vec<Sequence> = (0..cases.len())
            .map(|c| Sequence {
                rows: step[c],
                start: done[c],
                blocks: &tables[c],
            })
            .collect();
        let qkv: Vec<f32> = cases
            .iter()
            .enumerate()
            .flat_map(|(c, case)| case.qkv[done[c]..done[c] + step[c]].concat())
            .collect();
        let rows: usize = step.iter().sum();
        let mut out = vec![0.0; rows * shape.out_width()];
        let stride = shape.qkv_width();
        rope_attention(&qkv, stride, &sequences, shape, &rope, &mut cache, &mut out).unwrap();
        let mut rows = out.chunks(shape.out_width());
        for (c, &count) in step.iter().enumerate() {
            outputs[c].extend(rows.by_ref().take(count).map(<[f32]>::to_vec));
            done[c] += count;
        }
    }
    outputs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_chunks_of_any_batch_equal_the_reference(
        kv_heads in 1usize..4, group in 1usize..4, panels in 1usize..3, seed: u64,
        window in prop::option::of(1usize..70),
        chunks in prop::collection::vec(prop::collection::vec(0usize..30, 3), 1..6),
    ) {
        let shape = AttentionShape {
            heads: kv_heads * group, kv_heads, head_size: panels * 16, window,
        };
        let mut random = Random(seed);
        let cases: Vec<Case> = (0..3)
            .map(|c| case(shape, chunks.iter().map(|step| step[c]).sum(), &mut random))
            .collect();
        let outputs = run(shape, &cases, &chunks);
        for (case, output) in cases.iter().zip(&outputs) {
            for (found, expected) in output.iter().zip(&case.expected) {
                // Keys are rotated in f64 by the reference: one may round to the f16 next to it.
                assert_close(found, expected, 1e-3);
            }
        }
        // Token by token, alone, gives the same bits.
        for (case, output) in cases.into_iter().zip(outputs) {
            let tokens = case.qkv.len();
            let alone = run(shape, &[case], &vec![vec![1]; tokens]);
            prop_assert_eq!(&alone[0], &output);
        }
    }
}

#[test]
fn what_doesnt_fit_is_refused() {
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 1,
        head_size: 16,
        window: None,
    };
    let rope = Rope::new(40, 16, BASE, None).unwrap();
    let mut cache = KvCache::new(2, 1, 16).unwrap();
    let mut attend = |rows: usize, start: usize, blocks: &[u32], shape: AttentionShape| {
        let qkv = vec![0.0; rows * shape.qkv_width()];
        let mut out = vec![0.0; rows * shape.out_width()];
        let sequence = Sequence {
            rows,
            start,
            blocks,
        };
        let stride = shape.qkv_width();
        rope_attention(
            &qkv,
            stride,
            &[sequence],
            shape,
            &rope,
            &mut cache,
            &mut out,
        )
    };
    assert_eq!(attend(1, 15, &[1], shape), Ok(()));
    assert_eq!(
        attend(2, 15, &[1], shape),
        Err(KernelError::BlockTable {
            blocks: 1,
            position: 16
        })
    );
    assert_eq!(
        attend(1, 0, &[2], shape),
        Err(KernelError::Block {
            block: 2,
            blocks: 2
        })
    );
    assert_eq!(
        attend(1, 40, &[0, 1, 0], shape),
        Err(KernelError::Position {
            position: 40,
            positions: 40
        })
    );
    let uneven = AttentionShape {
        heads: 3,
        kv_heads: 2,
        ..shape
    };
    assert!(matches!(
        attend(1, 0, &[0], uneven),
        Err(KernelError::Heads { .. })
    ));
    let blind = AttentionShape {
        window: Some(0),
        ..shape
    };
    assert_eq!(attend(1, 0, &[0], blind), Err(KernelError::EmptyWindow));
}
