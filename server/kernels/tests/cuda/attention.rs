use half::f16;
use stoker_kernels::{
    AttentionShape, KvCache, Rope, Sequence,
    cuda::{Attention, Buffer, CacheShape, StepRow, StepSequence, StepTile},
    rope_attention,
};

use crate::support::{Device, Errors, Random, device, floats};

const BASE: f32 = 10_000.0;

/// A step's sequences: rows, and tokens that are there already.
type Parts = Vec<(usize, usize)>;

struct Both<'a> {
    d: &'a Device,
    shape: AttentionShape,
    cache_shape: CacheShape,
    rope: Rope,
    rotated: usize,
    rope_table: Buffer<[f32; 2]>,
    cpu: KvCache,
    gpu: Buffer<f16>,
    workspace: Buffer<f32>,
    tickets: Buffer<u32>,
}

const BLOCKS: usize = 400;
const POSITIONS: usize = 3000;

impl<'a> Both<'a> {
    fn new(d: &'a Device, shape: AttentionShape, rotated: usize) -> Self {
        let rope = Rope::new(POSITIONS, rotated, BASE, None).unwrap();
        let table: Vec<[f32; 2]> = rope.rotations().collect();
        let cache_shape = CacheShape::new(shape, BLOCKS).unwrap();
        Self {
            d,
            shape,
            cache_shape,
            rotated,
            rope_table: d.buffer(&table),
            rope,
            cpu: KvCache::new(BLOCKS, shape.kv_heads, shape.head_size).unwrap(),
            gpu: d.buffer(&vec![f16::ZERO; BLOCKS * CacheShape::block_len(shape)]),
            workspace: d.poisoned_f32(cache_shape.workspace_len(16, 16)),
            tickets: d.buffer(&[0; 2048]),
        }
    }

    /// One step on both; single rows through `decode`, others through `rope` and `prefill`.
    fn step(
        &mut self,
        errors: &mut Errors,
        random: &mut Random,
        parts: &Parts,
        tables: &[Vec<u32>],
        split: (usize, usize),
    ) {
        let what = format!("{:?}, {parts:?}, {split:?}", self.shape);
        let (d, width, size) = (self.d, self.shape.qkv_width(), self.shape.out_width());
        let rows: usize = parts.iter().map(|p| p.0).sum();
        let qkv = random.halves(rows * width);
        let mut expected = vec![0.0; rows * size];
        let sequences: Vec<Sequence> = parts
            .iter()
            .zip(tables)
            .map(|(&(rows, start), blocks)| Sequence {
                rows,
                start,
                blocks,
            })
            .collect();
        rope_attention(
            &floats(&qkv),
            width,
            &sequences,
            self.shape,
            &self.rope,
            &mut self.cpu,
            &mut expected,
        )
        .unwrap();

        let (mut step_rows, mut step_sequences, mut ids, mut tiles) =
            (vec![], vec![], vec![], vec![]);
        let decodes = parts.iter().take_while(|p| p.0 == 1).count();
        for (i, (&(rows, start), blocks)) in parts.iter().zip(tables).enumerate() {
            step_sequences.push(StepSequence {
                first_row: step_rows.len() as u32,
                rows: rows as u32,
                start: start as u32,
                table: ids.len() as u32,
            });
            for position in start..start + rows {
                step_rows.push(StepRow {
                    token: 0,
                    position: position as u32,
                    block: blocks[position / 16],
                    sequence: i as u32,
                });
            }
            if i >= decodes {
                tiles.extend(
                    (0..rows)
                        .step_by(self.cache_shape.tile_tokens())
                        .map(|first| StepTile {
                            sequence: i as u32,
                            first: first as u32,
                        }),
                );
            }
            ids.extend(&blocks[..(start + rows).div_ceil(16)]);
        }
        let halves = d.buffer(&qkv);
        let (step_rows, step_sequences, ids, tiles) = (
            d.buffer(&step_rows),
            d.buffer(&step_sequences),
            d.buffer(&ids),
            d.buffer(&tiles),
        );
        let out = d.poisoned(rows * size);
        let queries = d.poisoned(rows * size);
        let a = Attention {
            qkv: halves.all(),
            rows,
            rope: self.rope_table.all(),
            rotated: self.rotated,
            shape: self.cache_shape,
            cache: self.gpu.all(),
            step_rows: step_rows.all(),
            sequences: step_sequences.all(),
            tables: ids.all(),
            out: out.all(),
        };
        let k = &d.kernels;
        if decodes < parts.len() {
            k.rope(&d.stream, &a, decodes, queries.all()).unwrap();
        }
        if decodes > 0 {
            k.decode(
                &d.stream,
                &a,
                decodes,
                split,
                self.workspace.all(),
                self.tickets.all(),
            )
            .unwrap();
        }
        if decodes < parts.len() {
            k.prefill(&d.stream, &a, queries.all(), tiles.all())
                .unwrap();
        }
        errors.compare(
            &what,
            &floats(&out.all().read().unwrap()),
            &expected,
            0.3,
            5e-3,
        );
        assert!(
            self.tickets.all().read().unwrap().iter().all(|&t| t == 0),
            "{what}: tickets"
        );
    }
}

/// Steps of four sequences: the rows of each, and into how many parts of how many tokens contexts are
/// split.
fn steps(errors: &mut Errors, both: &mut Both, steps: &[([usize; 4], (usize, usize))]) {
    let shape = both.shape;
    let mut random = Random((shape.heads * shape.head_size) as u64);
    // Blocks in no order, a table for each of four sequences.
    let mut blocks: Vec<u32> = (0..BLOCKS as u32).collect();
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, random.below(i + 1));
    }
    let tables: Vec<Vec<u32>> = blocks.chunks_exact(100).map(<[u32]>::to_vec).collect();
    let mut starts = [0; 4];
    for &(rows, split) in steps {
        // Single rows first.
        let mut order: Vec<usize> = (0..4).filter(|&i| rows[i] > 0).collect();
        order.sort_by_key(|&i| rows[i] > 1);
        let parts: Parts = order.iter().map(|&i| (rows[i], starts[i])).collect();
        let tables: Vec<Vec<u32>> = order.iter().map(|&i| tables[i].clone()).collect();
        both.step(errors, &mut random, &parts, &tables, split);
        for i in order {
            starts[i] += rows[i];
        }
    }
}

#[test]
fn attention_of_all_shapes() {
    let Some(d) = device("attention_of_all_shapes") else {
        return;
    };
    let mut errors = Errors::default();
    for (heads, kv_heads, head_size, rotated) in [
        (9, 3, 64, 64),
        (24, 8, 128, 128),
        (6, 6, 96, 96),
        (8, 1, 64, 32),
        (14, 2, 64, 64),
        (7, 1, 128, 128),
    ] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_size,
            window: None,
        };
        let mut both = Both::new(&d, shape, rotated);
        let mut all = vec![
            ([1, 1, 0, 0], (1, 64)),
            ([0, 1, 37, 130], (1, 64)),
            ([1, 300, 1, 2], (4, 32)),
            ([1, 1, 1, 1], (1, 64)),
            ([1, 1, 1, 1], (16, 32)),
            ([1, 1, 600, 17], (8, 64)),
        ];
        all.extend((0..20).map(|i| ([1; 4], [(1, 1), (2, 16), (16, 64)][i % 3])));
        all.extend([([900, 1, 1, 129], (16, 128)), ([1; 4], (16, 128))]);
        steps(&mut errors, &mut both, &all);
    }
    errors.finish("attention_of_all_shapes");
}

/// So many heads that few warps, or one, attend for each.
#[test]
fn attention_of_many_heads() {
    let Some(d) = device("attention_of_many_heads") else {
        return;
    };
    let mut errors = Errors::default();
    for (heads, kv_heads, head_size) in [(300, 150, 64), (150, 150, 128), (270, 270, 96)] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_size,
            window: None,
        };
        let mut both = Both::new(&d, shape, head_size);
        let all = [
            ([40, 33, 5, 70], (1, 64)),
            ([1, 1, 1, 1], (1, 64)),
            ([1, 1, 0, 1], (4, 16)),
            ([0, 0, 1, 1], (1, 64)),
            ([0, 0, 1, 0], (2, 16)),
            ([1, 1, 1, 1], (3, 32)),
        ];
        steps(&mut errors, &mut both, &all);
    }
    errors.finish("attention_of_many_heads");
}
