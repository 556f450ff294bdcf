//! The tokenizer of a Hugging Face checkpoint: tokenizer.json, with tokenizer_config.json for what
//! begins and ends a text.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::DecoderWrapper;

use super::{
    END_OF_GENERATION, TokenizerError,
    vocabulary::{Spelling, TokenKind, Vocabulary},
};
use crate::{
    config::{HuggingFaceConfig, token_ids},
    error::LoadError,
};

pub const TOKENIZER: &str = "tokenizer.json";
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// Words whose tokens are remembered, by each thread that encodes: there may be hundreds.
const CACHED_WORDS: usize = 1000;

pub(super) struct HuggingFaceTokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, but for control tokens being text; made when it is first needed.
    without_control: OnceLock<Box<tokenizers::Tokenizer>>,
    pub(super) vocabulary: Vocabulary,
}

/// What begins and ends texts.
pub(super) struct Ends {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Whether a text begins with `bos`.
    pub(super) add_bos: bool,
    pub(super) eos_token_ids: Vec<u32>,
}

/// tokenizer_config.json, as far as it matters here.
#[derive(Default, Deserialize)]
struct Config {
    bos_token: Option<Special>,
    eos_token: Option<Special>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Token { content: String },
}

impl Special {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

impl HuggingFaceTokenizer {
    pub(super) fn read(
        folder: &Path,
        config: &HuggingFaceConfig,
    ) -> Result<(Self, Ends), LoadError> {
        let path = folder.join(TOKENIZER);
        if !path.is_file() {
            return Err(LoadError::NoModel {
                path: folder.to_owned(),
                problem: format!(
                    "there is no {TOKENIZER}; older checkpoints with tokenizer.model only need to \
                     be saved again by transformers, or converted to GGUF"
                ),
            });
        }
        let bytes = read(&path)?;
        let failed = |message: String| LoadError::File {
            path: path.clone(),
            message,
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| failed(e.to_string()))?;
        // Some files carry the settings of their training.
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|e| failed(e.to_string()))?;
        let mut model = inner.get_model().clone();
        model.resize_cache(CACHED_WORDS);
        inner.with_model(model);
        let spelling = spelling(inner.get_decoder()).ok_or_else(|| {
            failed("its decoder is neither byte-level nor SentencePiece's".to_owned())
        })?;

        let added = inner.get_added_tokens_decoder();
        let known = u32::try_from(inner.get_vocab_size(true)).unwrap_or(u32::MAX);
        let tokens = (0..config.vocab_size().max(known))
            .map(|id| match (added.get(&id), inner.id_to_token(id)) {
                (Some(token), _) if token.special => (token.content.clone(), TokenKind::Control),
                (Some(token), _) => (token.content.clone(), TokenKind::Verbatim),
                (None, Some(text)) => (text, TokenKind::Ordinary),
                // The embedding has more rows than there are tokens.
                (None, None) => (String::new(), TokenKind::Control),
            })
            .take(config.vocab_size() as usize)
            .collect();
        if known > config.vocab_size() {
            tracing::warn!(
                tokens = known,
                vocab_size = config.vocab_size(),
                "the tokenizer has more tokens than the model; those it doesn't know are refused"
            );
        }
        let tokenizer = Self {
            vocabulary: Vocabulary::new(tokens, spelling)?,
            without_control: OnceLock::new(),
            inner,
        };
        let ends = tokenizer.ends(folder, config)?;
        Ok((tokenizer, ends))
    }

    fn ends(&self, folder: &Path, config: &HuggingFaceConfig) -> Result<Ends, LoadError> {
        let texts: Config = optional_json(folder.join(TOKENIZER_CONFIG))?.unwrap_or_default();
        let generation: Value =
            optional_json(folder.join(GENERATION_CONFIG))?.unwrap_or(Value::Null);
        let size = self.vocabulary.len();
        let id = |special: &Option<Special>| {
            let id = self.inner.token_to_id(special.as_ref()?.text());
            id.filter(|&id| id < size)
        };
        let eos = id(&texts.eos_token);
        let mut eos_token_ids = token_ids(generation.get("eos_token_id"));
        eos_token_ids.extend(config.eos_token_ids());
        eos_token_ids.extend(eos);
        let added = self.inner.get_added_tokens_decoder();
        let ends = added.iter().filter(|(_, token)| {
            token.special && END_OF_GENERATION.contains(&token.content.as_str())
        });
        eos_token_ids.extend(ends.map(|(&id, _)| id));
        eos_token_ids.retain(|&id| id < size);
        // The post-processor says what a text begins with.
        let encode = |special: bool| {
            let encoding =
                self.inner
                    .encode_fast("a", special)
                    .map_err(|e| LoadError::Tokenizer {
                        message: e.to_string(),
                    })?;
            Ok::<_, LoadError>(encoding.get_ids().first().copied())
        };
        let (with, without) = (encode(true)?, encode(false)?);
        let first = with.filter(|_| with != without);
        let bos = id(&texts.bos_token).or(first);
        Ok(Ends {
            bos,
            eos,
            add_bos: first.is_some() && first == bos,
            eos_token_ids,
        })
    }

    pub(super) fn encode(
        &self,
        text: &str,
        parse_special: bool,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let tokenizer = match parse_special {
            true => &self.inner,
            false => self.without_control.get_or_init(|| {
                let mut tokenizer = self.inner.clone();
                tokenizer.set_encode_special_tokens(true);
                Box::new(tokenizer)
            }),
        };
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|e| TokenizerError::Encode(e.to_string()))?;
        let size = self.vocabulary.len();
        match encoding.get_ids().iter().find(|&&id| id >= size) {
            Some(id) => Err(TokenizerError::Encode(format!(
                "token {id} is outside the model's vocabulary of {size}"
            ))),
            None => {
                ids.extend_from_slice(encoding.get_ids());
                Ok(())
            }
        }
    }
}

fn spelling(decoder: Option<&DecoderWrapper>) -> Option<Spelling> {
    match decoder? {
        DecoderWrapper::ByteLevel(_) => Some(Spelling::ByteLevel),
        DecoderWrapper::ByteFallback(_) | DecoderWrapper::Metaspace(_) => {
            Some(Spelling::SentencePiece)
        }
        DecoderWrapper::Sequence(parts) => parts
            .get_decoders()
            .iter()
            .find_map(|part| spelling(Some(part))),
        _ => None,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Open {
        path: path.to_owned(),
        source,
    })
}

/// A JSON file, where there is one.
pub(crate) fn optional_json<T: serde::de::DeserializeOwned>(
    path: PathBuf,
) -> Result<Option<T>, LoadError> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_slice(&read(&path)?)
        .map(Some)
        .map_err(|e| LoadError::File {
            message: e.to_string(),
            path,
        })
}
