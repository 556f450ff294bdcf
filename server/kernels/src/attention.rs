//! Rope, KV write and attention over paged blocks.
#![allow(unsafe_code)]

use std::ops::Range;

use half::f16;

use crate::{
    error::{KernelError, check},
    kv::{BLOCK_SIZE, KvCache},
    parallel::{Shared, parallel},
    rope::Rope,
    tile::{Isa, LANES, Operands},
    vector,
};

/// Query rows (tokens times the heads that share a KV head) that one task takes: enough to use
/// each loaded key several times, few enough that their scores stay in the cache.
const TASK_ROWS: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    /// A sliding window: a token sees this many positions, its own included; `None`: all.
    pub window: Option<usize>,
}

/// A sequence's part of a step; its rows follow those of the sequence before.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    pub rows: usize,
    /// Position of the first row = tokens of this sequence already in the cache.
    pub start: usize,
    /// Blocks that hold positions `0..start + rows`, in order.
    pub blocks: &'a [u32],
}

impl AttentionShape {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    /// Width of a row of the attention's output.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_size
    }

    /// The first position that the token at `position` sees.
    pub fn first_visible(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Rotates queries and keys, writes keys and values to the cache and attends causally, each row to
/// its sequence's positions up to its own, within the window if the shape has one.
///
/// `qkv` is `[rows, qkv_stride]` (queries, keys, values side by side), `out`
/// `[rows, heads * head_size]`. Attention is scaled by `1 / sqrt(head_size)`.
pub fn rope_attention(
    qkv: &[f32],
    qkv_stride: usize,
    sequences: &[Sequence],
    shape: AttentionShape,
    rope: &Rope,
    cache: &mut KvCache,
    out: &mut [f32],
) -> Result<(), KernelError> {
    validate(qkv, qkv_stride, sequences, shape, rope, cache, out)?;
    write_keys_values(qkv, qkv_stride, sequences, shape, rope, cache);

    let mut tasks = Vec::new();
    let tokens_at_once = (TASK_ROWS / shape.group()).max(1);
    let mut first_row = 0;
    for sequence in sequences {
        for kv_head in 0..shape.kv_heads {
            for token in (0..sequence.rows).step_by(tokens_at_once) {
                tasks.push(Task {
                    sequence: *sequence,
                    kv_head,
                    row: first_row + token,
                    position: sequence.start + token,
                    tokens: tokens_at_once.min(sequence.rows - token),
                });
            }
        }
        first_row += sequence.rows;
    }
    let isa = Isa::detect();
    let context = Context {
        isa,
        qkv,
        qkv_stride,
        shape,
        rope,
        cache,
        out: Shared::new(out),
    };
    parallel(tasks.len(), |i| context.attend(&tasks[i]));
    Ok(())
}

fn validate(
    qkv: &[f32],
    qkv_stride: usize,
    sequences: &[Sequence],
    shape: AttentionShape,
    rope: &Rope,
    cache: &KvCache,
    out: &[f32],
) -> Result<(), KernelError> {
    if shape.kv_heads == 0 || shape.heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return Err(KernelError::Heads {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
        });
    }
    if shape.window == Some(0) {
        return Err(KernelError::EmptyWindow);
    }
    check("KV heads of the cache", cache.kv_heads(), shape.kv_heads)?;
    check("head size of the cache", cache.head_size(), shape.head_size)?;
    let rows: usize = sequences.iter().map(|s| s.rows).sum();
    check("queries, keys and values", qkv.len(), rows * qkv_stride)?;
    check("attention output", out.len(), rows * shape.out_width())?;
    if qkv_stride < shape.qkv_width() {
        check(
            "a row of queries, keys and values",
            qkv_stride,
            shape.qkv_width(),
        )?;
    }
    if rope.rotated() > shape.head_size {
        check("rotated dimensions", rope.rotated(), shape.head_size)?;
    }
    for sequence in sequences {
        let end = sequence.start + sequence.rows;
        if end > rope.positions() {
            return Err(KernelError::Position {
                position: end - 1,
                positions: rope.positions(),
            });
        }
        if end > sequence.blocks.len() * BLOCK_SIZE {
            return Err(KernelError::BlockTable {
                blocks: sequence.blocks.len(),
                position: end - 1,
            });
        }
        let blocks = cache.blocks();
        if let Some(&block) = sequence.blocks.iter().find(|&&b| b as usize >= blocks) {
            return Err(KernelError::Block { block, blocks });
        }
    }
    Ok(())
}

fn write_keys_values(
    qkv: &[f32],
    qkv_stride: usize,
    sequences: &[Sequence],
    shape: AttentionShape,
    rope: &Rope,
    cache: &mut KvCache,
) {
    let size = shape.head_size;
    let tokens = sequences.iter().map(|s| s.rows).sum();
    cache.write(tokens, |head, writer| {
        let mut key = vec![0.0; size];
        let mut rows = qkv.chunks_exact(qkv_stride);
        for sequence in sequences {
            for (position, row) in (sequence.start..).zip(rows.by_ref().take(sequence.rows)) {
                let keys = &row[(shape.heads + head) * size..][..size];
                let value = &row[(shape.heads + shape.kv_heads + head) * size..][..size];
                rope.apply(position, 1.0, keys, &mut key);
                let block = sequence.blocks[position / BLOCK_SIZE];
                writer.put(block, position % BLOCK_SIZE, &key, value);
            }
        }
    });
}

struct Task<'a> {
    sequence: Sequence<'a>,
    kv_head: usize,
    /// First row in the step and its position in the sequence.
    row: usize,
    position: usize,
    tokens: usize,
}

struct Context<'a> {
    isa: Isa,
    qkv: &'a [f32],
    qkv_stride: usize,
    shape: AttentionShape,
    rope: &'a Rope,
    cache: &'a KvCache,
    out: Shared<f32>,
}

impl Context<'_> {
    /// Attends with the rows of a task: (token, head of the group), tokens first.
    fn attend(&self, task: &Task) {
        let AttentionShape { head_size, .. } = self.shape;
        let group = self.shape.group();
        let rows = task.tokens * group;
        let length = task.position + task.tokens;
        // Blocks that slid out of the window of all rows are left out; `origin` is the position
        // that the first score stands for.
        let skipped = self.shape.first_visible(task.position) / BLOCK_SIZE;
        let origin = skipped * BLOCK_SIZE;
        let blocks = &task.sequence.blocks[skipped..length.div_ceil(BLOCK_SIZE)];
        let width = blocks.len() * BLOCK_SIZE;

        let queries = self.queries(task);
        let mut scores = vec![0.0; rows * width];
        let keys: Vec<*const f16> = blocks
            .iter()
            .map(|&block| self.cache.keys(task.kv_head, block).as_ptr())
            .collect();
        // SAFETY: `queries` has `rows` rows of `head_size`; a block's keys are a panel of
        // `16 head_size`; `scores` has `rows` rows of 16 a block.
        unsafe {
            self.isa.multiply(
                rows,
                &keys,
                Operands {
                    x: queries.as_ptr(),
                    x_stride: head_size,
                    k: head_size,
                    y: scores.as_mut_ptr(),
                    y_stride: width,
                    accumulate: false,
                },
            );
        }
        let sums: Vec<f32> = scores
            .chunks_exact_mut(width)
            .enumerate()
            .map(|(i, row)| {
                let position = task.position + i / group;
                let seen = self.shape.first_visible(position) - origin..position + 1 - origin;
                softmax_within(self.isa, row, seen)
            })
            .collect();

        let mut values = vec![0.0; rows * head_size];
        let panels_a_block = head_size / LANES;
        let mut panels = Vec::with_capacity(panels_a_block);
        for (i, &block) in blocks.iter().enumerate() {
            let block = self.cache.values(task.kv_head, block);
            panels.clear();
            panels.extend(block.chunks_exact(BLOCK_SIZE * LANES).map(<[f16]>::as_ptr));
            // SAFETY: columns `16 i..16 (i + 1)` of `scores` exist; a panel of values has 16 tokens
            // of 16; `values` has `rows` rows of `head_size`, 16 a panel.
            unsafe {
                self.isa.multiply(
                    rows,
                    &panels,
                    Operands {
                        x: scores.as_ptr().add(i * BLOCK_SIZE),
                        x_stride: width,
                        k: BLOCK_SIZE,
                        y: values.as_mut_ptr(),
                        y_stride: head_size,
                        accumulate: true,
                    },
                );
            }
        }
        for (i, (values, sum)) in values.chunks_exact(head_size).zip(sums).enumerate() {
            let head = task.kv_head * group + i % group;
            let at = (task.row + i / group) * self.shape.out_width() + head * head_size;
            // SAFETY: `out` has a place for each row and head, checked in `validate`, and this task
            // is the only one with these rows and heads.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.get().add(at), head_size) };
            for (out, &value) in out.iter_mut().zip(values) {
                *out = value / sum;
            }
        }
    }

    /// The task's queries, rotated and scaled.
    fn queries(&self, task: &Task) -> Vec<f32> {
        let AttentionShape { head_size, .. } = self.shape;
        let group = self.shape.group();
        let scale = 1.0 / (head_size as f32).sqrt();
        let mut queries = vec![0.0; task.tokens * group * head_size];
        for (i, query) in queries.chunks_exact_mut(head_size).enumerate() {
            let (token, head) = (i / group, task.kv_head * group + i % group);
            let at = (task.row + token) * self.qkv_stride + head * head_size;
            self.rope.apply(
                task.position + token,
                scale,
                &self.qkv[at..at + head_size],
                query,
            );
        }
        queries
    }
}

/// Softmax over a part of a row of scores; zeros elsewhere. Gives the sum. Whole panels before the
/// part don't enter it, so the sum has the same bits wherever the row of scores begins.
fn softmax_within(isa: Isa, scores: &mut [f32], seen: Range<usize>) -> f32 {
    let panel = seen.start / LANES * LANES;
    scores[panel..seen.start].fill(f32::NEG_INFINITY);
    let sum = vector::softmax(isa, &mut scores[panel..], seen.end - panel);
    scores[..seen.start].fill(0.0);
    sum
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
