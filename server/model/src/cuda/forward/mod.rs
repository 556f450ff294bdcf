//! The forward pass on a GPU: one step's kernels, put into a stream. A step has one of two forms, by its
//! rows: `few` and `many`.

mod few;
mod many;

use std::sync::Arc;

use half::f16;
use stoker_kernels::{
    BLOCK_SIZE, Rope,
    cuda::{
        Attention, Buffer, CacheShape, CudaError, FEW_ROWS, FEW_ROWS_QUANTISED, FewOut, FewTile,
        Heads, Kernels, Slice, Stream,
    },
};

use super::{
    Layer, Layout, Matrix, Sizes, Weights,
    product::{self, Scratch},
};
use crate::config::ModelConfig;

/// Blocks of threads that decoding's attention should have for each processor, by splitting
/// contexts.
const ATTENTION_BLOCKS: usize = 2;
/// Parts that any context may be split into, if it is long.
const LEAST_PARTS: usize = 4;
/// Most parts of a context.
const MOST_PARTS: usize = 32;

/// How the kernels are chosen and cut.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Most decoding rows that the weights are streamed for; more go through tiles.
    pub few_rows: usize,
    /// The same of quantised weights.
    pub few_rows_quantised: usize,
    /// Least tokens of a part of a context.
    pub part_tokens: usize,
    /// Cuts of the four products of a layer and the head, for trying them out.
    pub tiles: [Option<FewTile>; 5],
}

impl Tuning {
    /// What is fastest, as measured.
    pub fn best() -> Self {
        Self {
            few_rows: FEW_ROWS,
            few_rows_quantised: FEW_ROWS_QUANTISED,
            part_tokens: 256,
            tiles: [None; 5],
        }
    }
}

/// A model with its KV cache and the room that a step needs.
pub struct Forward {
    kernels: Arc<Kernels>,
    config: ModelConfig,
    weights: Arc<Weights>,
    sizes: Sizes,
    pub tuning: Tuning,
    cache_shape: CacheShape,
    /// All layers' blocks, layer by layer.
    cache: Buffer<f16>,
    rope: Buffer<[f32; 2]>,
    /// Tokens that the last step sampled, by slot.
    previous: Buffer<u32>,
    residual: Buffer<f32>,
    normed: Buffer<f16>,
    qkv: Buffer<f16>,
    queries: Buffer<f16>,
    attention: Buffer<f16>,
    inner: Buffer<f16>,
    sums: Buffer<f32>,
    squares: [Buffer<f32>; 2],
    workspace: Buffer<f32>,
    tickets: Buffer<u32>,
    logits: Buffer<f32>,
    /// The highest of each part of few samples' logits.
    best: Buffer<u64>,
    scratch: Scratch,
}

impl Forward {
    /// Takes all memory that steps will need.
    pub fn new(
        kernels: Arc<Kernels>,
        config: ModelConfig,
        weights: Arc<Weights>,
        sizes: Sizes,
        blocks: usize,
    ) -> Result<Self, CudaError> {
        let gpu = kernels.gpu().clone();
        let shape = config.attention;
        let cache_shape = CacheShape::new(shape, blocks)?;
        let rope = Rope::new(
            sizes.max_model_len,
            config.rotated,
            config.rope_base,
            weights.rope_factors.as_deref(),
        )?;
        let rotations: Vec<[f32; 2]> = rope.rotations().collect();
        let rows = sizes.max_rows;
        let tuning = Tuning::best();
        let decodes = sizes.max_sequences.min(rows);
        let workspace = (1..=decodes)
            .map(|n| cache_shape.workspace_len(n, decode_parts(&kernels, &config, n)))
            .max()
            .unwrap_or(0);
        let squares = FEW_ROWS * Kernels::few_square_parts(config.hidden);
        let of = "a step's activations";
        Ok(Self {
            cache: Buffer::zeroed(
                &gpu,
                "the KV cache",
                config.layers * blocks * CacheShape::block_len(shape),
            )?,
            rope: Buffer::from_slice(&gpu, "rope's table", &rotations)?,
            previous: Buffer::zeroed(&gpu, of, sizes.max_sequences)?,
            residual: Buffer::zeroed(&gpu, of, rows * config.hidden)?,
            normed: Buffer::zeroed(&gpu, of, rows * config.hidden)?,
            qkv: Buffer::zeroed(&gpu, of, rows * shape.qkv_width())?,
            queries: Buffer::zeroed(&gpu, of, rows * shape.out_width())?,
            attention: Buffer::zeroed(&gpu, of, rows * shape.out_width())?,
            inner: Buffer::zeroed(&gpu, of, rows * config.inner)?,
            sums: Buffer::zeroed(
                &gpu,
                of,
                product::most_sums(&kernels, &config, &weights, rows, HALVES_ROWS),
            )?,
            squares: [
                Buffer::zeroed(&gpu, of, squares)?,
                Buffer::zeroed(&gpu, of, squares)?,
            ],
            workspace: Buffer::zeroed(&gpu, of, workspace)?,
            tickets: Buffer::zeroed(&gpu, of, decodes * shape.kv_heads)?,
            logits: Buffer::zeroed(&gpu, of, sizes.max_sequences * config.vocab)?,
            best: Buffer::zeroed(&gpu, of, FEW_ROWS * Kernels::few_best_parts(config.vocab))?,
            scratch: Scratch::new(&gpu, &kernels, &weights, rows)?,
            kernels,
            config,
            weights,
            sizes,
            tuning,
            cache_shape,
        })
    }

    /// Bytes that a block takes over all layers.
    pub fn block_bytes(config: &ModelConfig) -> u64 {
        (config.layers * CacheShape::block_len(config.attention) * size_of::<f16>()) as u64
    }

    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    pub fn cache_shape(&self) -> &CacheShape {
        &self.cache_shape
    }

    /// The last step's logits, `[samples, vocab]`.
    pub fn logits(&self) -> Slice<'_, f32> {
        self.logits.all()
    }

    /// Puts a step into the stream: its description is at `step`, the tokens go to `out`.
    pub fn run(
        &self,
        stream: &Stream,
        layout: &Layout,
        step: Slice<u8>,
        out: Slice<u32>,
    ) -> Result<(), CudaError> {
        let samples = layout.step_samples(step)?;
        let few = layout.decodes == layout.rows
            && layout.samples == layout.rows
            && layout.rows <= self.few_rows();
        self.embed(stream, layout, step)?;
        stream.mark("embedding")?;
        let parts = match few {
            true => self.few(stream, layout, step)?,
            false => self.many(stream, layout, step)?,
        };
        self.kernels.choose(
            stream,
            self.logits.all(),
            (parts > 0).then_some((self.best.all(), parts)),
            self.config.vocab,
            samples,
            self.previous.all(),
            out,
        )?;
        stream.mark("sampling")
    }

    /// Most rows that weights are streamed for.
    fn few_rows(&self) -> usize {
        match self.weights.is_quantised() {
            true => self.tuning.few_rows_quantised.min(FEW_ROWS_QUANTISED),
            false => self.tuning.few_rows.min(self.kernels.few_rows()),
        }
    }

    fn embed(&self, stream: &Stream, layout: &Layout, step: Slice<u8>) -> Result<(), CudaError> {
        let rows = layout.step_rows(step)?;
        let (previous, residual) = (self.previous.all(), self.residual.all());
        let norm = self.weights.layers[0].attention_norm.all();
        let normed = self.normed.all();
        let (k, epsilon) = (&self.kernels, self.config.norm_epsilon);
        match &self.weights.embedding {
            Matrix::F16(table) => k.embed(
                stream, rows, previous, table, residual, norm, normed, epsilon,
            ),
            Matrix::Quantised(table) => k.embed_quantised(
                stream, rows, previous, table, residual, norm, normed, epsilon,
            ),
        }
    }

    /// What an architecture does to queries, keys and values before rope.
    fn finish_heads(&self, stream: &Stream, rows: usize, layer: &Layer) -> Result<(), CudaError> {
        if layer.qkv_bias.is_none() && layer.head_norms.is_none() {
            return Ok(());
        }
        let heads = Heads {
            bias: layer.qkv_bias.as_ref().map(Buffer::all),
            norms: layer
                .head_norms
                .as_ref()
                .map(|[query, key]| [query.all(), key.all()]),
            epsilon: self.config.norm_epsilon,
        };
        let shape = self.config.attention;
        self.kernels
            .finish_heads(stream, rows, shape, self.qkv.all(), heads)
    }

    /// Weights of the norm that follows layer `layer`.
    fn norm_after(&self, layer: usize) -> Slice<'_, f32> {
        match self.weights.layers.get(layer + 1) {
            Some(next) => next.attention_norm.all(),
            None => self.weights.output_norm.all(),
        }
    }

    fn few_logits(&self) -> FewOut<'_> {
        FewOut::Logits {
            logits: self.logits.all(),
            best: self.best.all(),
        }
    }

    fn decode(
        &self,
        stream: &Stream,
        layout: &Layout,
        step: Slice<u8>,
        layer: usize,
    ) -> Result<(), CudaError> {
        let parts = decode_parts(&self.kernels, &self.config, layout.decodes);
        self.kernels.decode(
            stream,
            &self.attention_of(layout, step, layer)?,
            layout.decodes,
            (parts, self.tuning.part_tokens),
            self.workspace.all(),
            self.tickets.all(),
        )
    }

    fn attention_of<'a>(
        &'a self,
        layout: &Layout,
        step: Slice<'a, u8>,
        layer: usize,
    ) -> Result<Attention<'a>, CudaError> {
        let blocks = self.cache_shape.blocks * CacheShape::block_len(self.config.attention);
        Ok(Attention {
            qkv: self.qkv.all(),
            rows: layout.rows,
            rope: self.rope.all(),
            rotated: self.config.rotated,
            shape: self.cache_shape,
            cache: self.cache.slice(layer * blocks..(layer + 1) * blocks)?,
            step_rows: layout.step_rows(step)?,
            sequences: layout.step_sequences(step)?,
            tables: layout.step_blocks(step)?,
            out: self.attention.all(),
        })
    }
}

/// Most rows for which the product of queries, keys and values is made in parts.
const HALVES_ROWS: usize = 384;

/// Parts that contexts may be split into in a step of so many decoding sequences.
fn decode_parts(kernels: &Kernels, config: &ModelConfig, sequences: usize) -> usize {
    let blocks = config.attention.kv_heads * sequences.max(1);
    let wanted = ATTENTION_BLOCKS * kernels.gpu().processors() as usize;
    (wanted / blocks).clamp(LEAST_PARTS, MOST_PARTS)
}

/// Blocks that a sequence of so many tokens takes.
pub(super) fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}
