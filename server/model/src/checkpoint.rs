//! A model's files, whatever their format: config, tensors, tokenizer and chat template.
//!
//! Tensors go by GGUF's names in every format (see [`crate::architecture::TensorNames`]).

use std::{ops::Range, path::Path};

use half::f16;

use crate::{
    chat::ChatTemplate,
    config::{HuggingFaceConfig, ModelConfig},
    error::LoadError,
    gguf::GgufFile,
    safetensors::{CONFIG, SafetensorsFolder},
    tensor::TensorHandle,
    tokenizer::Tokenizer,
};

pub enum Checkpoint {
    Gguf(Box<GgufFile>),
    HuggingFace(Box<HuggingFaceFolder>),
}

/// A folder of the hub: config.json, safetensors, tokenizer.json.
pub struct HuggingFaceFolder {
    config: HuggingFaceConfig,
    weights: SafetensorsFolder,
}

impl Checkpoint {
    /// Opens a GGUF file, or a folder with config.json and safetensors.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if !path.is_dir() {
            return Ok(Self::Gguf(Box::new(GgufFile::open(path)?)));
        }
        let config = path.join(CONFIG);
        if !config.is_file() {
            return Err(LoadError::NoModel {
                path: path.to_owned(),
                problem: format!(
                    "it is a directory without {CONFIG}; give a GGUF file, or the folder of a \
                     Hugging Face checkpoint"
                ),
            });
        }
        Ok(Self::HuggingFace(Box::new(HuggingFaceFolder {
            config: HuggingFaceConfig::read(&config)?,
            weights: SafetensorsFolder::open(path)?,
        })))
    }

    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        match self {
            Self::Gguf(file) => Tokenizer::from_gguf(file),
            Self::HuggingFace(folder) => {
                Tokenizer::from_hugging_face(folder.weights.folder(), &folder.config)
            }
        }
    }

    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<ChatTemplate, LoadError> {
        let source = match self {
            Self::Gguf(file) => file
                .string_opt("tokenizer.chat_template")?
                .map(str::to_owned),
            Self::HuggingFace(folder) => ChatTemplate::of_folder(folder.weights.folder())?,
        };
        match source {
            Some(source) => ChatTemplate::new(
                &source,
                tokenizer.bos_token().unwrap_or_default(),
                tokenizer.eos_token().unwrap_or_default(),
            ),
            None => Ok(ChatTemplate::missing()),
        }
    }

    pub fn config(&self, tokenizer: &Tokenizer) -> Result<ModelConfig, LoadError> {
        match self {
            Self::Gguf(file) => ModelConfig::from_gguf(file, tokenizer.vocab_size()),
            Self::HuggingFace(folder) => folder.config.model_config(),
        }
    }

    /// What the model is called by its file, if anything.
    pub fn name(&self) -> Result<Option<String>, LoadError> {
        match self {
            Self::Gguf(file) => Ok(file.string_opt("general.name")?.map(str::to_owned)),
            Self::HuggingFace(_) => Ok(None),
        }
    }

    /// Whether the head is the embedding, even where the files hold a copy of it.
    pub fn is_tied(&self) -> bool {
        match self {
            Self::Gguf(_) => false,
            Self::HuggingFace(folder) => folder.config.is_tied(),
        }
    }

    /// Whether a head that isn't in the files is the embedding.
    pub fn may_be_tied(&self) -> bool {
        match self {
            Self::Gguf(_) => true,
            Self::HuggingFace(folder) => folder.config.is_tied(),
        }
    }

    /// Whether a tensor that no block uses may be left out without a change to the answers.
    pub fn is_superfluous(&self, name: &str) -> bool {
        match self {
            Self::Gguf(_) => false,
            // A copy of the embedding, and rope's frequencies, which old converters saved.
            Self::HuggingFace(folder) => {
                name.ends_with(".rotary_emb.inv_freq")
                    || (name == "lm_head.weight" && folder.config.is_tied())
            }
        }
    }

    /// Names as the files have them, in no order.
    pub fn tensor_names(&self) -> Vec<&str> {
        match self {
            Self::Gguf(file) => file.tensor_names().collect(),
            Self::HuggingFace(folder) => folder.weights.tensor_names().collect(),
        }
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        match self {
            Self::Gguf(file) => file.has_tensor(name),
            Self::HuggingFace(folder) => folder.weights.has_tensor(name),
        }
    }

    /// Finds a tensor and checks its shape: `[rows, cols]`, or `[cols]` for a vector.
    pub fn tensor(&self, name: &str, expected: &[usize]) -> Result<TensorHandle, LoadError> {
        match self {
            Self::Gguf(file) => file.tensor(name, expected),
            Self::HuggingFace(folder) => folder.weights.tensor(name, expected),
        }
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        match self {
            Self::Gguf(file) => file.parameters(),
            Self::HuggingFace(folder) => folder.weights.parameters(),
        }
    }

    /// Reads and dequantises some rows. May be called from several threads at once.
    pub fn rows(&self, tensor: &TensorHandle, rows: Range<usize>) -> Result<Vec<f32>, LoadError> {
        match self {
            Self::Gguf(file) => file.rows(tensor, rows),
            Self::HuggingFace(folder) => folder.weights.rows(tensor, rows),
        }
    }

    /// Reads some rows as the files have them, into room for exactly these.
    pub fn bytes(
        &self,
        tensor: &TensorHandle,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        match self {
            Self::Gguf(file) => file.bytes(tensor, rows, out),
            Self::HuggingFace(folder) => folder.weights.bytes(tensor, rows, out),
        }
    }

    /// [`Self::rows`] as f16, into room for exactly these rows. What f16 can't hold becomes an infinity.
    pub fn halves(
        &self,
        tensor: &TensorHandle,
        rows: Range<usize>,
        out: &mut [f16],
    ) -> Result<(), LoadError> {
        match self {
            Self::Gguf(file) => file.halves(tensor, rows, out),
            Self::HuggingFace(folder) => folder.weights.halves(tensor, rows, out),
        }
    }
}
