//! The forward pass: one step's rows through all layers.

use stoker_kernels::{
    KernelError, KvCache, Pick, Rope, Sequence, add_bias, down_residual, norm_gate_up, norm_head,
    norm_head_sample, norm_heads, norm_qkv, output_residual, rope_attention,
};
use thiserror::Error;

use super::weights::Weights;
use crate::{architecture::Block, config::ModelConfig};

#[derive(Debug, Error)]
pub enum ForwardError {
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token { token: u32, vocab: usize },
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// A sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Tokens to compute; the first stands at position `start`.
    pub tokens: &'a [u32],
    pub start: usize,
    /// Blocks that hold positions `0..start + tokens.len()`, in order.
    pub blocks: &'a [u32],
}

/// A model with its KV cache. [`run`](Self::run) computes a step; [`sample`](Self::sample) and
/// [`logits`](Self::logits) read its rows, which are the inputs' tokens one after the other.
#[derive(Debug)]
pub struct Forward {
    config: ModelConfig,
    weights: Weights,
    rope: Rope,
    /// One for each layer.
    caches: Vec<KvCache>,
    /// Activations, kept between steps for their memory: `[rows, width]` each.
    residual: Vec<f32>,
    qkv: Vec<f32>,
    attention: Vec<f32>,
    inner: Vec<f32>,
    scratch: Vec<f32>,
}

impl Forward {
    pub fn new(
        config: ModelConfig,
        weights: Weights,
        max_model_len: usize,
        blocks: usize,
    ) -> Result<Self, KernelError> {
        let shape = config.attention;
        let rope = Rope::new(
            max_model_len,
            config.rotated,
            config.rope_base,
            weights.rope_factors.as_deref(),
        )?;
        let caches = (0..config.layers)
            .map(|_| KvCache::new(blocks, shape.kv_heads, shape.head_size))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            config,
            weights,
            rope,
            caches,
            residual: Vec::new(),
            qkv: Vec::new(),
            attention: Vec::new(),
            inner: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// f32 values that a row of a step takes in the activations.
    pub fn values_per_row(config: &ModelConfig) -> usize {
        let shape = config.attention;
        2 * config.hidden + shape.qkv_width() + shape.out_width() + config.inner
    }

    /// Computes all tokens of the inputs and writes their keys and values to the cache. On an error
    /// the step has no result, and what its sequences hold in the cache is undefined.
    pub fn run(&mut self, inputs: &[Input]) -> Result<(), ForwardError> {
        self.embed(inputs)?;
        let rows = self.residual.len() / self.config.hidden;
        let sequences: Vec<Sequence> = inputs
            .iter()
            .map(|input| Sequence {
                rows: input.tokens.len(),
                start: input.start,
                blocks: input.blocks,
            })
            .collect();
        for layer in 0..self.config.layers {
            for &block in self.config.architecture.layer {
                self.block(block, layer, rows, &sequences)?;
            }
        }
        Ok(())
    }

    fn block(
        &mut self,
        block: Block,
        index: usize,
        rows: usize,
        sequences: &[Sequence],
    ) -> Result<(), KernelError> {
        let layer = &self.weights.layers[index];
        let shape = self.config.attention;
        match block {
            Block::NormQkv => {
                let stride = layer.qkv.out_stride();
                self.qkv.resize(rows * stride, 0.0);
                norm_qkv(
                    &self.residual,
                    &layer.attention_norm,
                    &layer.qkv,
                    &mut self.qkv,
                    &mut self.scratch,
                )?;
                if let Some(bias) = &layer.qkv_bias {
                    add_bias(&mut self.qkv, stride, bias)?;
                }
                if let Some(norms) = &layer.head_norms {
                    norm_heads(&mut self.qkv, stride, shape, &norms.query, &norms.key)?;
                }
                Ok(())
            }
            Block::RopeAttention => {
                self.attention.resize(rows * shape.out_width(), 0.0);
                rope_attention(
                    &self.qkv,
                    layer.qkv.out_stride(),
                    sequences,
                    shape,
                    &self.rope,
                    &mut self.caches[index],
                    &mut self.attention,
                )
            }
            Block::OutputResidual => {
                output_residual(&self.attention, &layer.output, &mut self.residual)
            }
            Block::NormGateUp => {
                self.inner.resize(rows * layer.gate.out_stride(), 0.0);
                norm_gate_up(
                    &self.residual,
                    &layer.ffn_norm,
                    &layer.gate,
                    &layer.up,
                    &mut self.inner,
                    &mut self.scratch,
                )
            }
            Block::DownResidual => down_residual(&self.inner, &layer.down, &mut self.residual),
        }
    }

    fn embed(&mut self, inputs: &[Input]) -> Result<(), ForwardError> {
        let rows: usize = inputs.iter().map(|input| input.tokens.len()).sum();
        self.residual.resize(rows * self.config.hidden, 0.0);
        let tokens = inputs.iter().flat_map(|input| input.tokens);
        for (row, &token) in self
            .residual
            .chunks_exact_mut(self.config.hidden)
            .zip(tokens)
        {
            self.weights
                .embedding
                .read_row(token as usize, row)
                .map_err(|_| ForwardError::Token {
                    token,
                    vocab: self.config.vocab,
                })?;
        }
        Ok(())
    }

    /// The next token of some rows of the last step.
    pub fn sample(&mut self, picks: &[Pick]) -> Result<Vec<u32>, ForwardError> {
        Ok(norm_head_sample(
            &self.residual,
            picks,
            &self.weights.output_norm,
            self.weights.head(),
            &mut self.scratch,
        )?)
    }

    /// The logits of some rows of the last step, `vocab` each.
    pub fn logits(&mut self, rows: &[usize]) -> Result<Vec<Vec<f32>>, ForwardError> {
        let head = self.weights.head();
        let logits = norm_head(
            &self.residual,
            rows,
            &self.weights.output_norm,
            head,
            &mut self.scratch,
        )?;
        Ok(logits
            .chunks_exact(head.out_stride())
            .map(|row| row[..self.config.vocab].to_vec())
            .collect())
    }
}
