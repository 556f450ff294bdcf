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
/// Rows of a block of threads in `prefill`.
const TILE_ROWS: usize = 128;
/// Bytes of shared memory of `prefill` for each value of a head's size.
const PREFILL_SHARED: usize = 2 * 4 * 2 * BLOCK_SIZE * size_of::<f16>();

/// Heads and where their keys and values are.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    pub attention: AttentionShape,
    pub blocks: usize,
}

/// Queries, keys and values as their projection left them.
#[derive(Clone, Copy, Debug)]
pub enum Qkv<'a> {
    /// `[rows, width]`.
    F16(Slice<'a, f16>),
    /// To be summed: `[parts, rows, width]`.
    Sums {
        values: Slice<'a, f32>,
        parts: usize,
    },
}

/// What the kernels of a layer's attention share.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    pub qkv: Qkv<'a>,
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
pub(crate) struct QkvParameters {
    f16: u64,
    partials: u64,
    parts: i32,
    part_stride: u64,
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
    rows: u64,
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

pub(crate) fn decode_kernels() -> Vec<(String, u32)> {
    HEAD_SIZES
        .into_iter()
        .flat_map(|size| [4, 8].map(|warps| (format!("decode_{size}_w{warps}"), 0)))
        .collect()
}

pub(crate) fn prefill_kernels() -> Vec<(String, u32)> {
    HEAD_SIZES
        .map(|size| (format!("prefill_{size}"), (PREFILL_SHARED * size) as u32))
        .into()
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

impl Qkv<'_> {
    /// Checked for so many rows of `width`, and not to be rotated.
    pub(crate) fn parameters(&self, rows: usize, width: usize) -> Result<QkvParameters, CudaError> {
        let (mut f16, mut partials, mut count) = (0, 0, 0);
        match *self {
            Self::F16(values) => f16 = values.at_least("queries, keys and values", rows * width)?,
            Self::Sums { values, parts } => {
                partials = values.at_least("queries, keys and values", parts * rows * width)?;
                count = parts as i32;
            }
        }
        Ok(QkvParameters {
            f16,
            partials,
            parts: count,
            part_stride: (rows * width) as u64,
            width: width as i32,
            rope: 0,
            rotated: 0,
        })
    }
}

impl Attention<'_> {
    fn qkv(&self) -> Result<QkvParameters, CudaError> {
        let width = self.shape.attention.qkv_width();
        Ok(QkvParameters {
            rope: self.rope.pointer(),
            rotated: self.rotated as i32,
            ..self.qkv.parameters(self.rows, width)?
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
            rows: a.step_rows.at_least("rows of a step", sequences)?,
            sequences: a.sequences.at_least("sequences of a step", sequences)?,
            tables: a.tables.pointer(),
            out: a.out()?,
            workspace: workspace.at_least("workspace", a.shape.workspace_len(sequences, parts))?,
            tickets: tickets.at_least("tickets", sequences * shape.kv_heads)?,
            part_tokens: part_tokens.max(1) as i32,
            scale: a.shape.scale(),
        };
        // Few blocks of threads: more warps for each, to have a context read sooner.
        let few = sequences * shape.kv_heads <= self.gpu().processors() as usize;
        let warps = if few { 8 } else { 4 };
        let kernel = self.kernel(&format!("decode_{}_w{warps}", shape.head_size))?;
        let launch = Shape {
            grid: [shape.kv_heads as u32, sequences as u32, parts as u32],
            threads: 32 * warps,
            shared: 0,
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
        let kernel = self.kernel(&format!("prefill_{}", shape.head_size))?;
        let launch = Shape {
            grid: [shape.kv_heads as u32, tiles.len() as u32, 1],
            threads: 256,
            shared: (PREFILL_SHARED * shape.head_size) as u32,
            early: true,
        };
        // SAFETY: as in `decode`.
        unsafe { self.launch(stream, kernel, launch, &p) }
    }
}
