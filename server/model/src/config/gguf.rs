//! The config in a GGUF file's metadata.

use super::{ModelConfig, RopeScaling, SizeNames, Sizes};
use crate::{
    architecture::find,
    error::LoadError,
    gguf::{GgufFile, metadata_error},
};

const NAMES: SizeNames = SizeNames {
    hidden: "embedding_length",
    inner: "feed_forward_length",
    kv_heads: "attention.head_count_kv",
    head_size: "attention.key_length",
    rotated: "rope.dimension_count",
    context_length: "context_length",
};

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
        let optional = |name: &str| -> Result<Option<usize>, LoadError> {
            Ok(file.u32_opt(&key(name))?.map(|size| size as usize))
        };
        let hidden = size(NAMES.hidden)?;
        let heads = size("attention.head_count")?;
        let head_size = optional(NAMES.head_size)?.unwrap_or(hidden / heads);
        let sizes = Sizes {
            layers: size("block_count")?,
            hidden,
            inner: size(NAMES.inner)?,
            heads,
            kv_heads: optional(NAMES.kv_heads)?.unwrap_or(heads),
            head_size,
            rotated: optional(NAMES.rotated)?.unwrap_or(head_size),
            window: optional("attention.sliding_window")?,
            context_length: file.u32(&key(NAMES.context_length))?,
        };
        sizes
            .check(&NAMES)
            .map_err(|(name, problem)| metadata_error(&key(name), problem))?;
        if let Some(length) = optional("attention.value_length")?
            && length != head_size
        {
            return Err(metadata_error(
                &key("attention.value_length"),
                format!("is {length}; only the size of the keys ({head_size}) is supported"),
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
        Ok(Self {
            architecture,
            layers: sizes.layers,
            hidden,
            inner: sizes.inner,
            attention: sizes.attention(),
            vocab: vocab as usize,
            context_length: sizes.context_length,
            rotated: sizes.rotated,
            rope_base: file.f32_opt(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: rope_scaling(file, &key)?,
            norm_epsilon: file
                .f32_opt(&key("attention.layer_norm_rms_epsilon"))?
                .ok_or_else(|| {
                    metadata_error(&key("attention.layer_norm_rms_epsilon"), "is missing")
                })?,
            pairs: architecture.gguf_pairs,
        })
    }
}

fn rope_scaling(file: &GgufFile, key: &dyn Fn(&str) -> String) -> Result<RopeScaling, LoadError> {
    match file.string_opt(&key("rope.scaling.type"))? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => {
            let name = key("rope.scaling.factor");
            match file.f32_opt(&name)? {
                Some(factor) if factor > 0.0 => Ok(RopeScaling::Linear { factor }),
                Some(factor) => Err(metadata_error(&name, format!("is {factor}"))),
                None => Err(metadata_error(&name, "is missing")),
            }
        }
        Some(kind) => Err(metadata_error(
            &key("rope.scaling.type"),
            format!("is {kind:?}; only \"none\", \"linear\" and rope_freqs.weight are supported"),
        )),
    }
}
