//! A step of more rows, or with prompt chunks: products in tiles, and kernels between them.

use half::f16;
use stoker_kernels::cuda::{CudaError, FewIn, ManyOut, NormRows, Slice, Stream};

use super::{
    super::product::{self, Becomes, Cut},
    Forward, HALVES_ROWS, Layout, Matrix,
};

impl Forward {
    /// A step of more rows, or with prompt chunks. Gives what `few` does.
    pub(super) fn many(
        &self,
        stream: &Stream,
        layout: &Layout,
        step: Slice<u8>,
    ) -> Result<usize, CudaError> {
        let k = &self.kernels;
        let rows = layout.rows;
        let epsilon = self.config.norm_epsilon;
        let sums_of = |x, w: &Matrix| {
            let out = ManyOut::Sums(self.sums.all());
            self.product(stream, rows, x, w, out, Becomes::Parts)
        };
        let norm = |parts, weights, samples| {
            k.norm(
                stream,
                &NormRows {
                    residual: self.residual.all(),
                    sums: self.sums.all(),
                    parts,
                    rows,
                    samples,
                    weights,
                    epsilon,
                    out: self.normed.all(),
                },
            )
        };
        let last = self.weights.layers.len() - 1;
        for (i, layer) in self.weights.layers.iter().enumerate() {
            let x = self.normed.all();
            if rows > HALVES_ROWS {
                let out = ManyOut::F16(self.qkv.all());
                self.product(stream, rows, x, &layer.qkv, out, Becomes::F16)?;
            } else {
                let parts = sums_of(x, &layer.qkv)?;
                let count = rows * layer.qkv.rows();
                k.sum(stream, self.sums.all(), parts, self.qkv.all(), count)?;
            }
            stream.mark("qkv")?;
            self.finish_heads(stream, rows, layer)?;
            self.chunks(stream, layout, step, i)?;
            stream.mark("attention")?;
            let parts = sums_of(self.attention.all(), &layer.output)?;
            stream.mark("output")?;
            norm(parts, layer.ffn_norm.all(), None)?;
            stream.mark("norms")?;
            let out = ManyOut::GateUp(self.inner.all());
            let x = self.normed.all();
            self.product(stream, rows, x, &layer.gate_up, out, Becomes::GateUp)?;
            stream.mark("gate_up")?;
            let parts = sums_of(self.inner.all(), &layer.down)?;
            stream.mark("down")?;
            let samples = match i == last {
                true => Some(layout.step_samples(step)?),
                false => None,
            };
            norm(parts, self.norm_after(i), samples)?;
            stream.mark("norms")?;
        }
        let parts = self.head(stream, layout.samples)?;
        stream.mark("head")?;
        Ok(parts)
    }

    /// A product of many rows; gives the parts that its sums are in.
    fn product(
        &self,
        stream: &Stream,
        rows: usize,
        x: Slice<f16>,
        w: &Matrix,
        out: ManyOut,
        becomes: Becomes,
    ) -> Result<usize, CudaError> {
        let size = (w.rows(), w.cols(), w.format());
        let cut = Cut::of(&self.kernels, size, rows, becomes);
        let scratch = &self.scratch;
        product::many(&self.kernels, stream, scratch, (rows, x), w, out, cut)?;
        Ok(cut.parts())
    }

    /// Attention of all sequences: decoding ones first, then prompt chunks.
    fn chunks(
        &self,
        stream: &Stream,
        layout: &Layout,
        step: Slice<u8>,
        layer: usize,
    ) -> Result<(), CudaError> {
        if layout.tiles > 0 {
            let attention = self.attention_of(layout, step, layer)?;
            let queries = self.queries.all();
            self.kernels
                .rope(stream, &attention, layout.decodes, queries)?;
            self.decode(stream, layout, step, layer)?;
            let tiles = layout.step_tiles(step)?;
            return self.kernels.prefill(stream, &attention, queries, tiles);
        }
        self.decode(stream, layout, step, layer)
    }

    /// Logits of the samples' rows, which are normed one after the other.
    fn head(&self, stream: &Stream, samples: usize) -> Result<usize, CudaError> {
        let w = self.weights.head();
        let x = self.normed.all();
        if samples == 0 {
            return Ok(0);
        }
        if samples <= self.few_rows() {
            let input = FewIn {
                x,
                squares: None,
                epsilon: self.config.norm_epsilon,
            };
            let (out, tile) = (self.few_logits(), self.tuning.tiles[4]);
            return self.kernels.few(stream, samples, input, w, out, tile);
        }
        let out = ManyOut::Sums(self.logits.all());
        self.product(stream, samples, x, w, out, Becomes::Sums)?;
        Ok(0)
    }
}
