//! Rope, KV write and attention over paged blocks (decode.cu, prefill.cu, rows.cu).
#![allow(unsafe_code)]

use half::f16;

use super::{
    error::CudaError,
    launch::{Kernels, Shape},
    memory::Slice,
    step::{StepRow, StepSequence, StepTile},
    stream::Stream,
};
use crate::{AttentionShape, BLOCK_SIZE, KernelError};

/// Head sizes that kernels are compiled for.
const HEAD_SIZES: [usize; 3] = [64, 96, 128];
/// Query heads that share a KV head, at most.
const MOST_GROUP: usize = 8;
/// Warps of a block of threads in `decode`, and how many warps there may be for each multiprocessor:
/// more are cut into smaller blocks (as measured).
const DECODE_WARPS: [(usize, usize); 4] = [(8, 8), (4, 12), (2, 16), (1, 16)];
/// Blocks of threads for each multiprocessor from which on warps of `prefill` have 32 rows.
const MANY_BLOCKS: usize = 4;
/// Rows of a block of threads in `prefill`.
const TILE_ROWS: usize = 128;

/// Heads and where their keys and values are.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    pub attention: AttentionShape,
    pub blocks: usize,
}

/// What the kernels of a layer's attention share.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Queries, keys and values of each row, as their projection left them.
    pub qkv: Slice<'a, f16>,
    /// Rows of the step.
    pub rows: usize,
    /// (cosine, sine) of each position and pair.
    pub rope: Slice<'a, [f32; 2]>,
    /// Rotated dimensions of a head.
    pub rotated: usize,
    pub shape: CacheShape,
    /// This layer's blocks: keys and values, as attention.cuh lays them out.
    pub cache: Slice<'a, f16>,
    pub step_rows: Slice<'a, StepRow>,
    pub sequences: Slice<'a, StepSequence>,
    /// Block ids of all sequences.
    pub tables: Slice<'a, u32>,
    /// `[rows, heads * head_size]`.
    pub out: Slice<'a, f16>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QkvParameters {
    values: u64,
    width: i32,
    rope: u64,
    rotated: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ShapeParameters {
    heads: i32,
    kv_heads: i32,
    size: i32,
}

#[repr(C)]
struct DecodeParameters {
    qkv: QkvParameters,
    kv: ShapeParameters,
    cache: u64,
    sequences: u64,
    tables: u64,
    out: u64,
    workspace: u64,
    tickets: u64,
    part_tokens: i32,
    scale: f32,
}

#[repr(C)]
struct RopeParameters {
    qkv: QkvParameters,
    queries: u64,
    rows: u64,
    first: i32,
    kv: ShapeParameters,
    cache: u64,
}

#[repr(C)]
struct PrefillParameters {
    queries: u64,
    kv: ShapeParameters,
    cache: u64,
    sequences: u64,
    tiles: u64,
    tables: u64,
    out: u64,
    scale: f32,
}

fn decode_kernel(size: usize, warps: usize) -> String {
    format!("decode_{size}_w{warps}")
}

pub(crate) fn decode_kernels() -> Vec<(String, u32)> {
    HEAD_SIZES
        .into_iter()
        .flat_map(|size| DECODE_WARPS.map(|(warps, _)| (decode_kernel(size, warps), 0)))
        .collect()
}

pub(crate) fn prefill_kernels(capability: u32) -> Vec<(String, u32)> {
    let kernel = |size, rows| (prefill_kernel(size, rows), prefill_shared(size, capability));
    HEAD_SIZES
        .into_iter()
        .flat_map(|size| [kernel(size, 16), kernel(size, 32)])
        .collect()
}

fn prefill_kernel(size: usize, warp_rows: usize) -> String {
    format!("prefill_{size}_{warp_rows}")
}

/// Bytes of shared memory of `prefill`: twice some blocks' keys and values, and the queries.
fn prefill_shared(size: usize, capability: u32) -> u32 {
    let blocks = if capability >= 80 { 4 } else { 2 };
    ((2 * blocks * 2 * BLOCK_SIZE + TILE_ROWS) * size * size_of::<f16>()) as u32
}

impl CacheShape {
    /// Checks that there are kernels for these heads.
    pub fn new(attention: AttentionShape, blocks: usize) -> Result<Self, CudaError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_size,
            ..
        } = attention;
        if !HEAD_SIZES.contains(&head_size) {
            return Err(CudaError::HeadSize { found: head_size });
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(KernelError::Heads { heads, kv_heads }.into());
        }
        if heads / kv_heads > MOST_GROUP {
            return Err(CudaError::Group {
                found: heads / kv_heads,
                most: MOST_GROUP,
            });
        }
        Ok(Self { attention, blocks })
    }

    fn group(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    /// Values of one layer's block.
    pub fn block_len(attention: AttentionShape) -> usize {
        2 * BLOCK_SIZE * attention.kv_heads * attention.head_size
    }

    /// Tokens of a prompt chunk that one block of threads attends with ([`StepTile`]).
    pub fn tile_tokens(&self) -> usize {
        TILE_ROWS / self.group()
    }

    /// Values of workspace that `decode` needs for so many sequences in so many parts.
    pub fn workspace_len(&self, sequences: usize, parts: usize) -> usize {
        sequences * parts * self.attention.heads * (self.attention.head_size + 2)
    }

    fn parameters(&self) -> ShapeParameters {
        ShapeParameters {
            heads: self.attention.heads as i32,
            kv_heads: self.attention.kv_heads as i32,
            size: self.attention.head_size as i32,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.attention.head_size as f32).sqrt()
    }
}

impl Attention<'_> {
    fn qkv(&self) -> Result<QkvParameters, CudaError> {
        let width = self.shape.attention.qkv_width();
        Ok(QkvParameters {
            values: self
                .qkv
                .at_least("queries, keys and values", self.rows * width)?,
            width: width as i32,
            rope: self.rope.pointer(),
            rotated: self.rotated as i32,
        })
    }

    fn cache(&self) -> Result<u64, CudaError> {
        let len = CacheShape::block_len(self.shape.attention) * self.shape.blocks;
        self.cache.at_least("KV cache", len)
    }

    fn out(&self) -> Result<u64, CudaError> {
        let width = self.shape.attention.out_width();
        self.out.at_least("attention output", self.rows * width)
    }
}

impl Kernels {
    /// Attention of sequences with one row each, the step's first ones: rotates, writes the new key
    /// and value, attends. `parts`: into how many a context may be split; a part has at least
    /// `part_tokens`. `workspace` holds [`CacheShape::workspace_len`] values, `tickets` a zero for
    /// each sequence and KV head.
    pub fn decode(
        &self,
        stream: &Stream,
        a: &Attention,
        sequences: usize,
        (parts, part_tokens): (usize, usize),
        workspace: Slice<f32>,
        tickets: Slice<u32>,
    ) -> Result<(), CudaError> {
        let shape = a.shape.attention;
        let p = DecodeParameters {
            qkv: a.qkv()?,
            kv: a.shape.parameters(),
            cache: a.cache()?,
            sequences: a.sequences.at_least("sequences of a step", sequences)?,
            tables: a.tables.pointer(),
            out: a.out()?,
            workspace: workspace.at_least("workspace", a.shape.workspace_len(sequences, parts))?,
            tickets: tickets.at_least("tickets", sequences * shape.kv_heads)?,
            part_tokens: part_tokens.max(1) as i32,
            scale: a.shape.scale(),
        };
        // Few blocks of threads: more warps for each, to have a context read sooner.
        let blocks = sequences * shape.kv_heads;
        let processors = self.gpu().processors() as usize;
        let (warps, _) = DECODE_WARPS
            .into_iter()
            .find(|(warps, resident)| blocks * warps <= resident * processors)
            .unwrap_or((1, 0));
        let kernel = self.kernel(&decode_kernel(shape.head_size, warps))?;
        let each = 2 * MOST_GROUP + a.shape.group() * (shape.head_size + 4);
        let launch = Shape {
            grid: [shape.kv_heads as u32, sequences as u32, parts as u32],
            threads: 32 * warps as u32,
            shared: (warps * each * size_of::<f32>()) as u32,
            early: true,
        };
        // SAFETY: sizes were checked above; positions and block ids are the caller's to check.
        unsafe { self.launch(stream, kernel, launch, &p) }
    }

    /// Rotates the queries of the rows from `first` on into `queries` (`[rows, heads * head_size]`)
    /// and writes their keys and values.
    pub fn rope(
        &self,
        stream: &Stream,
        a: &Attention,
        first: usize,
        queries: Slice<f16>,
    ) -> Result<(), CudaError> {
        let p = RopeParameters {
            qkv: a.qkv()?,
            queries: queries.at_least("rotated queries", a.rows * a.shape.attention.out_width())?,
            rows: a.step_rows.at_least("rows of a step", a.rows)?,
            first: first as i32,
            kv: a.shape.parameters(),
            cache: a.cache()?,
        };
        let kernel = self.kernel("rope_rows")?;
        let launch = Shape {
            grid: [a.rows.saturating_sub(first) as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: true,
        };
        // SAFETY: as in `decode`.
        unsafe { self.launch(stream, kernel, launch, &p) }
    }

    /// Attention of prompt chunks, whose queries were rotated and whose keys and values written.
    /// Each tile names [`CacheShape::tile_tokens`] tokens of a sequence.
    pub fn prefill(
        &self,
        stream: &Stream,
        a: &Attention,
        queries: Slice<f16>,
        tiles: Slice<StepTile>,
    ) -> Result<(), CudaError> {
        let shape = a.shape.attention;
        let p = PrefillParameters {
            queries: queries.at_least("rotated queries", a.rows * shape.out_width())?,
            kv: a.shape.parameters(),
            cache: a.cache()?,
            sequences: a.sequences.pointer(),
            tiles: tiles.pointer(),
            tables: a.tables.pointer(),
            out: a.out()?,
            scale: a.shape.scale(),
        };
        // Rows of a warp: many where there are blocks of threads for several rounds.
        let blocks = shape.kv_heads * tiles.len();
        let many = blocks >= MANY_BLOCKS * self.gpu().processors() as usize;
        let warp_rows = if many { 32 } else { 16 };
        let kernel = self.kernel(&prefill_kernel(shape.head_size, warp_rows))?;
        let launch = Shape {
            grid: [shape.kv_heads as u32, tiles.len() as u32, 1],
            threads: (32 * TILE_ROWS / warp_rows) as u32,
            shared: prefill_shared(shape.head_size, self.gpu().capability()),
            early: true,
        };
        // SAFETY: as in `decode`.
        unsafe { self.launch(stream, kernel, launch, &p) }
    }
}
