//! Text to token ids and back.

mod bpe;
mod hugging_face;
mod sentence_piece;
mod simulated;
mod special;
mod stream;
mod vocabulary;

use std::path::Path;

use thiserror::Error;

pub(crate) use hugging_face::optional_json;
pub use hugging_face::{GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG};
pub use stream::DecodeStream;

use crate::{config::HuggingFaceConfig, error::LoadError, gguf::GgufFile};
use bpe::Bpe;
use hugging_face::HuggingFaceTokenizer;
use vocabulary::Vocabulary;

/// Control tokens that end a generation whatever `eos_token_id` says, as in llama.cpp.
const END_OF_GENERATION: [&str; 7] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<EOT>",
];

#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error("the text can't be tokenized: {0}")]
    Encode(String),
}

/// How text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Begin with the model's BOS token, if its file asks for one.
    pub add_bos: bool,
    /// Read `<|im_start|>` and its like as the control tokens they name, not as text.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A prompt of `/v1/completions`.
    pub const COMPLETION: Self = Self {
        add_bos: true,
        parse_special: true,
    };
    /// A prompt made by a chat template, which writes the BOS token itself where one is needed.
    pub const CHAT: Self = Self {
        add_bos: false,
        parse_special: true,
    };
    /// Text that must not become a control token.
    pub const TEXT: Self = Self {
        add_bos: false,
        parse_special: false,
    };
}

/// A model's tokenizer, or the simulated device's. Shared between threads by `Arc`.
pub struct Tokenizer {
    kind: Kind,
    vocab_size: u32,
    eos_token_ids: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

enum Kind {
    Bpe(Box<Bpe>),
    HuggingFace(Box<HuggingFaceTokenizer>),
    Simulated,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes under `tokenizer.ggml.*`.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let bpe = Bpe::from_gguf(file)?;
        let vocab_size = bpe.vocabulary.len();
        let id = |key: &str| -> Result<Option<u32>, LoadError> {
            match file.u32_opt(key)? {
                Some(id) if id >= vocab_size => Err(crate::gguf::metadata_error(
                    key,
                    format!("is {id}, outside the vocabulary of {vocab_size}"),
                )),
                id => Ok(id),
            }
        };
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let mut eos_token_ids: Vec<u32> = eos.into_iter().collect();
        eos_token_ids.extend(id("tokenizer.ggml.eot_token_id")?);
        eos_token_ids.extend(id("tokenizer.ggml.eom_token_id")?);
        eos_token_ids.extend(bpe.end_of_generation_ids());
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        Ok(Self {
            kind: Kind::Bpe(Box::new(bpe)),
            vocab_size,
            eos_token_ids,
            bos,
            eos,
            // SentencePiece's texts begin with BOS unless the file says otherwise, as in llama.cpp.
            add_bos: file
                .bool_opt("tokenizer.ggml.add_bos_token")?
                .unwrap_or(file.string("tokenizer.ggml.model")? == "llama"),
        })
    }

    /// Reads tokenizer.json and what stands beside it in the folder of a Hugging Face checkpoint.
    pub fn from_hugging_face(folder: &Path, config: &HuggingFaceConfig) -> Result<Self, LoadError> {
        let (tokenizer, mut ends) = HuggingFaceTokenizer::read(folder, config)?;
        ends.eos_token_ids.sort_unstable();
        ends.eos_token_ids.dedup();
        Ok(Self {
            vocab_size: tokenizer.vocabulary.len(),
            kind: Kind::HuggingFace(Box::new(tokenizer)),
            eos_token_ids: ends.eos_token_ids,
            bos: ends.bos,
            eos: ends.eos,
            add_bos: ends.add_bos,
        })
    }

    /// A tokenizer without a model: the same text always gives the same ids, about one for four
    /// characters, and every id has a short word of its own. Nothing ends a generation but its
    /// length, and decoding doesn't give the encoded text back.
    pub fn simulated(vocab_size: u32) -> Self {
        Self {
            kind: Kind::Simulated,
            vocab_size: vocab_size.max(1),
            eos_token_ids: Vec::new(),
            bos: None,
            eos: None,
            add_bos: false,
        }
    }

    /// Token ids of a text. Takes milliseconds for long texts: call it off the async runtime.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        if options.add_bos && self.add_bos {
            ids.extend(self.bos);
        }
        match &self.kind {
            Kind::Bpe(bpe) => bpe.encode(text, options.parse_special, &mut ids)?,
            Kind::HuggingFace(inner) => inner.encode(text, options.parse_special, &mut ids)?,
            Kind::Simulated => simulated::encode(text, self.vocab_size, &mut ids),
        }
        Ok(ids)
    }

    /// The text of ids that stand together; control tokens give none, bytes that aren't UTF-8 give
    /// U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = stream::Utf8Stream::default();
        let mut text = String::new();
        for &id in ids {
            self.with_bytes(id, |bytes| stream.push(bytes, &mut text));
        }
        stream.finish(&mut text);
        text
    }

    /// Number of ids; every valid id is below it.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Every token that ends a generation, in ascending order.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The BOS token as text, which chat templates may write.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.and_then(|id| self.token_text(id))
    }

    /// The EOS token as text, which chat templates may write.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.and_then(|id| self.token_text(id))
    }

    fn vocabulary(&self) -> Option<&Vocabulary> {
        match &self.kind {
            Kind::Bpe(bpe) => Some(&bpe.vocabulary),
            Kind::HuggingFace(inner) => Some(&inner.vocabulary),
            Kind::Simulated => None,
        }
    }

    fn token_text(&self, id: u32) -> Option<&str> {
        self.vocabulary()?.text(id)
    }

    /// Passes on the bytes that a token stands for; none for control tokens and unknown ids.
    fn with_bytes(&self, id: u32, f: impl FnOnce(&[u8])) {
        match self.vocabulary() {
            Some(vocabulary) => f(vocabulary.bytes(id)),
            None => f(&simulated::word(id)),
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("eos_token_ids", &self.eos_token_ids)
            .finish_non_exhaustive()
    }
}
