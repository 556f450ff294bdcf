//! Choosing tokens (sample.cu).
#![allow(unsafe_code)]

use super::{
    error::CudaError,
    launch::{Kernels, Shape},
    memory::Slice,
    step::StepSample,
    stream::Stream,
};

#[repr(C)]
struct Parameters {
    logits: u64,
    best: u64,
    parts: i32,
    samples: u64,
    previous: u64,
    out: u64,
    vocab: i32,
}

impl Kernels {
    /// Chooses a token for each sample from its logits (`[samples, vocab]`), writes it to `out` and
    /// keeps it in `previous` by its slot. `best`: the highest of each of so many parts of each
    /// sample's logits, where they are known ([`super::FewOut::Logits`]). A sample whose logits hold no number gives `u32::MAX`.
    /// The draw is the CPU's: the same seed and position choose the same place in the distribution.
    #[allow(clippy::too_many_arguments)]
    pub fn choose(
        &self,
        stream: &Stream,
        logits: Slice<f32>,
        best: Option<(Slice<u64>, usize)>,
        vocab: usize,
        samples: Slice<StepSample>,
        previous: Slice<u32>,
        out: Slice<u32>,
    ) -> Result<(), CudaError> {
        let (best, parts) = match best {
            Some((values, parts)) => (
                values.at_least("highest logits", samples.len() * parts)?,
                parts,
            ),
            None => (0, 0),
        };
        let p = Parameters {
            logits: logits.at_least("logits", samples.len() * vocab)?,
            best,
            parts: parts as i32,
            samples: samples.pointer(),
            previous: previous.pointer(),
            out: out.pointer(),
            vocab: vocab as i32,
        };
        let shape = Shape {
            grid: [samples.len() as u32, 1, 1],
            threads: 1024,
            shared: 0,
            early: true,
        };
        // SAFETY: sizes were checked above; slots and places in `out` are the caller's to check.
        unsafe { self.launch(stream, self.kernel("choose")?, shape, &p) }
    }
}
