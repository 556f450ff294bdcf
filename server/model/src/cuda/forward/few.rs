//! A step of few decoding sequences: weights are streamed, norms are folded into the products.

use stoker_kernels::cuda::{CudaError, FewIn, FewOut, Slice, Squares, Stream};

use super::{Forward, Layout, Matrix};

impl Forward {
    /// A step of few decoding sequences. Gives the parts in which the highest logits are known.
    pub(super) fn few(
        &self,
        stream: &Stream,
        layout: &Layout,
        step: Slice<u8>,
    ) -> Result<usize, CudaError> {
        let rows = layout.rows;
        let [qkv, output, gate_up, down, head] = self.tuning.tiles;
        let epsilon = self.config.norm_epsilon;
        let mut input = FewIn {
            x: self.normed.all(),
            squares: None,
            epsilon,
        };
        let plain = |x| FewIn {
            x,
            squares: None,
            epsilon,
        };
        let normed = |place: usize, parts| FewIn {
            x: self.normed.all(),
            squares: Some(Squares {
                values: self.squares[place].all(),
                parts,
            }),
            epsilon,
        };
        for (i, layer) in self.weights.layers.iter().enumerate() {
            let product =
                |input, w: &Matrix, out, tile| self.kernels.few(stream, rows, input, w, out, tile);
            product(input, &layer.qkv, FewOut::F16(self.qkv.all()), qkv)?;
            stream.mark("qkv")?;
            self.finish_heads(stream, rows, layer)?;
            self.decode(stream, layout, step, i)?;
            stream.mark("attention")?;
            let residual = |next_norm, place: usize| FewOut::Residual {
                residual: self.residual.all(),
                next_norm,
                next: self.normed.all(),
                squares: self.squares[place].all(),
            };
            let parts = product(
                plain(self.attention.all()),
                &layer.output,
                residual(layer.ffn_norm.all(), 0),
                output,
            )?;
            stream.mark("output")?;
            product(
                normed(0, parts),
                &layer.gate_up,
                FewOut::GateUp(self.inner.all()),
                gate_up,
            )?;
            stream.mark("gate_up")?;
            let parts = product(
                plain(self.inner.all()),
                &layer.down,
                residual(self.norm_after(i), 1),
                down,
            )?;
            stream.mark("down")?;
            input = normed(1, parts);
        }
        let parts = self.kernels.few(
            stream,
            rows,
            input,
            self.weights.head(),
            self.few_logits(),
            head,
        )?;
        stream.mark("head")?;
        Ok(parts)
    }
}
