//! A model's sizes and choices, from the metadata of its file.

mod gguf;
mod hugging_face;
mod rope;

use stoker_kernels::AttentionShape;

pub use hugging_face::HuggingFaceConfig;
pub(crate) use hugging_face::token_ids;
pub use rope::RopeScaling;

use crate::architecture::{Architecture, PairOrder};

#[derive(Clone, Copy, Debug)]
pub struct ModelConfig {
    pub architecture: &'static Architecture,
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward network.
    pub inner: usize,
    pub attention: AttentionShape,
    pub vocab: usize,
    /// The longest sequence that the model was made for.
    pub context_length: u32,
    /// Dimensions of a head that rope rotates.
    pub rotated: usize,
    pub rope_base: f32,
    pub rope_scaling: RopeScaling,
    pub norm_epsilon: f32,
    /// How the file orders the rows of queries and keys.
    pub pairs: PairOrder,
}

/// What a config says, before it is checked. `E` makes an error out of a key and what is wrong
/// with it.
struct Sizes {
    layers: usize,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    rotated: usize,
    window: Option<usize>,
    context_length: u32,
}

/// The names of [`Sizes`] in a file, for messages.
struct SizeNames {
    hidden: &'static str,
    inner: &'static str,
    kv_heads: &'static str,
    head_size: &'static str,
    rotated: &'static str,
    context_length: &'static str,
}

impl Sizes {
    /// Checks what backends rely on; an error is the name of the size and what is wrong with it.
    fn check(&self, names: &SizeNames) -> Result<(), (&'static str, String)> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let problem = format!(
                "is {}, which {} heads can't share evenly",
                self.kv_heads, self.heads
            );
            return Err((names.kv_heads, problem));
        }
        for (name, value) in [
            (names.hidden, self.hidden),
            (names.inner, self.inner),
            (names.head_size, self.head_size),
        ] {
            if value == 0 || value % 16 != 0 {
                let problem = format!("is {value}; only positive multiples of 16 are supported");
                return Err((name, problem));
            }
        }
        if self.rotated > self.head_size || !self.rotated.is_multiple_of(2) {
            let problem = format!(
                "is {}; it must be even and at most the head size {}",
                self.rotated, self.head_size
            );
            return Err((names.rotated, problem));
        }
        if self.context_length == 0 {
            return Err((names.context_length, "is 0".to_owned()));
        }
        Ok(())
    }

    fn attention(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_size: self.head_size,
            // A window over the whole context hides nothing.
            window: self
                .window
                .filter(|&window| window > 0 && window < self.context_length as usize),
        }
    }
}
