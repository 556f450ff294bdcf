//! A model's sizes, from the metadata of its file.

use stoker_kernels::AttentionShape;

use crate::{
    architecture::{Architecture, find},
    error::LoadError,
    gguf::{GgufFile, metadata_error},
};

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
    pub norm_epsilon: f32,
}

impl ModelConfig {
    pub fn from_gguf(file: &GgufFile, vocab: u32) -> Result<Self, LoadError> {
        let architecture = find(file.string("general.architecture")?)?;
        let key = |name: &str| format!("{}.{name}", architecture.name);
        let size = |name: &str| -> Result<usize, LoadError> {
            match file.u32(&key(name))? {
                0 => Err(metadata_error(&key(name), "is 0")),
                size => Ok(size as usize),
            }
        };
        let hidden = size("embedding_length")?;
        let inner = size("feed_forward_length")?;
        let heads = size("attention.head_count")?;
        let kv_heads = match file.u32_opt(&key("attention.head_count_kv"))? {
            Some(count) => count as usize,
            None => heads,
        };
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(metadata_error(
                &key("attention.head_count_kv"),
                format!("is {kv_heads}, which {heads} heads can't share evenly"),
            ));
        }
        let head_size = match file.u32_opt(&key("attention.key_length"))? {
            Some(length) => length as usize,
            None => hidden / heads,
        };
        for (name, value) in [
            ("embedding_length", hidden),
            ("feed_forward_length", inner),
            ("attention.key_length", head_size),
        ] {
            if value == 0 || value % 16 != 0 {
                return Err(metadata_error(
                    &key(name),
                    format!("is {value}; only positive multiples of 16 are supported"),
                ));
            }
        }
        if let Some(length) = file.u32_opt(&key("attention.value_length"))?
            && length as usize != head_size
        {
            return Err(metadata_error(
                &key("attention.value_length"),
                format!("is {length}; only the size of the keys ({head_size}) is supported"),
            ));
        }
        let rotated = match file.u32_opt(&key("rope.dimension_count"))? {
            Some(count) => count as usize,
            None => head_size,
        };
        if rotated > head_size || rotated % 2 != 0 {
            return Err(metadata_error(
                &key("rope.dimension_count"),
                format!("is {rotated}; it must be even and at most the head size {head_size}"),
            ));
        }
        if let Some(kind) = file.string_opt(&key("rope.scaling.type"))?
            && kind != "none"
        {
            return Err(metadata_error(
                &key("rope.scaling.type"),
                format!("is {kind:?}; only \"none\" and rope_freqs.weight are supported"),
            ));
        }
        if let Some(experts) = file.u32_opt(&key("expert_count"))?
            && experts > 0
        {
            return Err(metadata_error(
                &key("expert_count"),
                format!("is {experts}; mixtures of experts aren't supported"),
            ));
        }
        let context_length = file.u32(&key("context_length"))?;
        if context_length == 0 {
            return Err(metadata_error(&key("context_length"), "is 0"));
        }
        Ok(Self {
            architecture,
            layers: size("block_count")?,
            hidden,
            inner,
            attention: AttentionShape {
                heads,
                kv_heads,
                head_size,
            },
            vocab: vocab as usize,
            context_length,
            rotated,
            rope_base: file.f32_opt(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            norm_epsilon: file
                .f32_opt(&key("attention.layer_norm_rms_epsilon"))?
                .ok_or_else(|| {
                    metadata_error(&key("attention.layer_norm_rms_epsilon"), "is missing")
                })?,
        })
    }
}
