//! Hugging Face's config.json.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::{ModelConfig, RopeScaling, SizeNames, Sizes};
use crate::{
    architecture::{PairOrder, find_class},
    error::LoadError,
};

const NAMES: SizeNames = SizeNames {
    hidden: "hidden_size",
    inner: "intermediate_size",
    kv_heads: "num_key_value_heads",
    head_size: "head_dim",
    rotated: "partial_rotary_factor",
    context_length: "max_position_embeddings",
};

/// config.json as the file has it.
#[derive(Debug)]
pub struct HuggingFaceConfig {
    path: PathBuf,
    fields: Fields,
}

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default)]
    architectures: Vec<String>,
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: u32,
    max_position_embeddings: u32,
    rms_norm_eps: f32,
    hidden_act: Option<String>,
    rope_theta: Option<f32>,
    /// Where transformers 4 puts the scaling.
    rope_scaling: Option<Rope>,
    /// Where transformers 5 puts base and scaling.
    rope_parameters: Option<Rope>,
    partial_rotary_factor: Option<f32>,
    sliding_window: Option<usize>,
    /// Qwen: whether `sliding_window` counts.
    use_sliding_window: Option<bool>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    mlp_bias: bool,
    attention_bias: Option<bool>,
    quantization_config: Option<Value>,
    /// One token or several.
    eos_token_id: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<u32>,
}

impl HuggingFaceConfig {
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let text = std::fs::read(path).map_err(|source| LoadError::Open {
            path: path.to_owned(),
            source,
        })?;
        let fields = serde_json::from_slice(&text).map_err(|e| LoadError::File {
            path: path.to_owned(),
            message: e.to_string(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            fields,
        })
    }

    /// Rows of the embedding; every token id is below it.
    pub fn vocab_size(&self) -> u32 {
        self.fields.vocab_size
    }

    /// Whether the head is the embedding, so that the files may hold it once.
    pub fn is_tied(&self) -> bool {
        self.fields.tie_word_embeddings
    }

    pub fn eos_token_ids(&self) -> Vec<u32> {
        token_ids(self.fields.eos_token_id.as_ref())
    }

    fn error(&self, key: &str, problem: impl Into<String>) -> LoadError {
        LoadError::Setting {
            path: self.path.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    pub fn model_config(&self) -> Result<ModelConfig, LoadError> {
        let fields = &self.fields;
        let class = fields.architectures.first().map_or("", String::as_str);
        let architecture = find_class(class)?;
        for (key, size) in [
            ("num_hidden_layers", fields.num_hidden_layers),
            ("num_attention_heads", fields.num_attention_heads),
            ("vocab_size", fields.vocab_size as usize),
        ] {
            if size == 0 {
                return Err(self.error(key, "is 0"));
            }
        }
        self.check_unsupported(architecture.options.qkv_bias)?;
        let heads = fields.num_attention_heads;
        let head_size = fields.head_dim.unwrap_or(fields.hidden_size / heads);
        let rotary = fields.partial_rotary_factor.unwrap_or(1.0);
        let sizes = Sizes {
            layers: fields.num_hidden_layers,
            hidden: fields.hidden_size,
            inner: fields.intermediate_size,
            heads,
            kv_heads: fields.num_key_value_heads.unwrap_or(heads),
            head_size,
            rotated: (head_size as f32 * rotary) as usize,
            window: match fields.use_sliding_window {
                Some(false) => None,
                _ => fields.sliding_window,
            },
            context_length: fields.max_position_embeddings,
        };
        sizes
            .check(&NAMES)
            .map_err(|(key, problem)| self.error(key, problem))?;
        let rope = fields.rope_parameters.as_ref();
        let base = rope.and_then(|rope| rope.rope_theta).or(fields.rope_theta);
        Ok(ModelConfig {
            architecture,
            layers: sizes.layers,
            hidden: sizes.hidden,
            inner: sizes.inner,
            attention: sizes.attention(),
            vocab: fields.vocab_size as usize,
            context_length: sizes.context_length,
            rotated: sizes.rotated,
            rope_base: base.unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(rope.or(fields.rope_scaling.as_ref()))?,
            norm_epsilon: fields.rms_norm_eps,
            pairs: PairOrder::Halves,
        })
    }

    /// Refuses what would be computed wrongly.
    fn check_unsupported(&self, has_qkv_bias: bool) -> Result<(), LoadError> {
        let fields = &self.fields;
        if let Some(activation) = fields.hidden_act.as_deref()
            && activation != "silu"
        {
            let problem = format!("is {activation:?}; only \"silu\" is supported");
            return Err(self.error("hidden_act", problem));
        }
        if fields.quantization_config.is_some() {
            let problem = "is set; quantised checkpoints are supported as GGUF only: take the \
                           checkpoint in bf16 or f16, or a GGUF file";
            return Err(self.error("quantization_config", problem));
        }
        if fields.mlp_bias {
            return Err(self.error("mlp_bias", "is true, which isn't supported"));
        }
        if fields.attention_bias == Some(true) && !has_qkv_bias {
            return Err(self.error("attention_bias", "is true, which isn't supported"));
        }
        if fields.use_sliding_window == Some(true) {
            let problem = "is true; a window in some layers only isn't supported";
            return Err(self.error("use_sliding_window", problem));
        }
        Ok(())
    }

    fn rope_scaling(&self, rope: Option<&Rope>) -> Result<RopeScaling, LoadError> {
        let Some(rope) = rope else {
            return Ok(RopeScaling::None);
        };
        let positive = |key: &str, value: Option<f32>| match value {
            Some(value) if value > 0.0 && value.is_finite() => Ok(value),
            Some(value) => Err(self.error(key, format!("is {value}"))),
            None => Err(self.error(key, "is missing from the rope scaling")),
        };
        match rope.rope_type.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: positive("factor", rope.factor)?,
            }),
            Some("llama3") => {
                let (low, high) = (
                    positive("low_freq_factor", rope.low_freq_factor)?,
                    positive("high_freq_factor", rope.high_freq_factor)?,
                );
                if low >= high {
                    let problem = format!("is {low}, not below high_freq_factor {high}");
                    return Err(self.error("low_freq_factor", problem));
                }
                Ok(RopeScaling::Llama3 {
                    factor: positive("factor", rope.factor)?,
                    low_frequency_factor: low,
                    high_frequency_factor: high,
                    original_context: rope.original_max_position_embeddings.ok_or_else(|| {
                        self.error("original_max_position_embeddings", "is missing")
                    })?,
                })
            }
            Some(kind) => Err(self.error(
                "rope_type",
                format!("is {kind:?}; only default, linear and llama3 are supported"),
            )),
        }
    }
}

/// Token ids that JSON states as one number or as a list of them.
pub(crate) fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(values)) => values.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}
