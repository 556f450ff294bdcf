//! The tokenizer that a GGUF file describes: byte-level BPE (`tokenizer.ggml.model` = `gpt2`), or
//! SentencePiece's (`llama`).

use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{
    END_OF_GENERATION, TokenizerError, sentence_piece,
    special::{CONTROL, Part, SpecialTokens, UNKNOWN, USER_DEFINED},
    vocabulary::{Spelling, TokenKind, Vocabulary},
};
use crate::{
    error::LoadError,
    gguf::{GgufFile, metadata_error},
};

/// Words whose tokens are remembered, by each thread that encodes: there may be hundreds.
const CACHED_WORDS: usize = 1000;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3's, but every digit stands alone.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) struct Bpe {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    pub(super) vocabulary: Vocabulary,
}

impl Bpe {
    pub(super) fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let texts: Vec<String> = file
            .strings("tokenizer.ggml.tokens")?
            .into_iter()
            .map(str::to_owned)
            .collect();
        let types = file.u32s("tokenizer.ggml.token_type")?;
        if texts.is_empty() || types.len() != texts.len() {
            return Err(metadata_error(
                "tokenizer.ggml.token_type",
                format!("has {} entries for {} tokens", types.len(), texts.len()),
            ));
        }
        match file.string("tokenizer.ggml.model")? {
            "gpt2" => {
                let pre = file.string_opt("tokenizer.ggml.pre")?.unwrap_or("gpt-2");
                let inner = byte_level(&texts, merges(file)?, pre_tokenizer(pre)?)?;
                Self::new(inner, texts, &types, Spelling::ByteLevel)
            }
            "llama" => {
                let inner = sentence_piece::from_gguf(file, &texts, &types)?;
                Self::new(inner, texts, &types, Spelling::SentencePiece)
            }
            other => Err(metadata_error(
                "tokenizer.ggml.model",
                format!(
                    "is {other:?}; only \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece) \
                     are supported"
                ),
            )),
        }
    }

    fn new(
        inner: tokenizers::Tokenizer,
        texts: Vec<String>,
        types: &[u32],
        spelling: Spelling,
    ) -> Result<Self, LoadError> {
        let special = SpecialTokens::new(&texts, types)?;
        let kind = |kind: &u32| match *kind {
            CONTROL => TokenKind::Control,
            // SentencePiece's mark for what it can't spell stands for nothing.
            UNKNOWN if spelling == Spelling::SentencePiece => TokenKind::Control,
            USER_DEFINED => TokenKind::Verbatim,
            _ => TokenKind::Ordinary,
        };
        let tokens = texts.into_iter().zip(types.iter().map(kind)).collect();
        Ok(Self {
            vocabulary: Vocabulary::new(tokens, spelling)?,
            special,
            inner,
        })
    }

    pub(super) fn end_of_generation_ids(&self) -> Vec<u32> {
        self.special
            .control
            .tokens
            .iter()
            .filter(|(text, _)| END_OF_GENERATION.contains(&text.as_str()))
            .map(|&(_, id)| id)
            .collect()
    }

    pub(super) fn encode(
        &self,
        text: &str,
        parse_special: bool,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let special = if parse_special {
            &self.special.control
        } else {
            &self.special.user_defined
        };
        special.split(text, |part| {
            match part {
                Part::Special(id) => ids.push(id),
                Part::Text(text) => {
                    let encoding = self
                        .inner
                        .encode_fast(text, false)
                        .map_err(|e| TokenizerError::Encode(e.to_string()))?;
                    ids.extend_from_slice(encoding.get_ids());
                }
            }
            Ok(())
        })
    }
}

fn merges(file: &GgufFile) -> Result<Vec<(String, String)>, LoadError> {
    let merge = |merge: &str| {
        merge
            .split_once(' ')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .ok_or_else(|| metadata_error("tokenizer.ggml.merges", format!("has {merge:?}")))
    };
    let merges = file.strings("tokenizer.ggml.merges")?;
    merges.into_iter().map(merge).collect()
}

/// The tokenizer of the text between control tokens.
fn byte_level(
    texts: &[String],
    merges: Vec<(String, String)>,
    pre: PreTokenizer,
) -> Result<tokenizers::Tokenizer, LoadError> {
    let vocab: Vocab = texts.iter().cloned().zip(0..).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre.ignore_merges)
        .cache_capacity(CACHED_WORDS)
        .build()
        .map_err(|e| LoadError::Tokenizer {
            message: e.to_string(),
        })?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre.split));
    Ok(tokenizer)
}

struct PreTokenizer {
    split: PreTokenizerWrapper,
    /// A piece that is a token as it stands is taken whole (Llama 3).
    ignore_merges: bool,
}

/// How text is cut before the merges, by `tokenizer.ggml.pre`; the definitions are those of
/// llama.cpp's llama-vocab.cpp.
fn pre_tokenizer(name: &str) -> Result<PreTokenizer, LoadError> {
    let gpt2 = || PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true));
    let split = match name {
        "gpt-2" | "default" => gpt2(),
        // Every digit stands alone, then GPT-2's expression.
        "smollm" => PreTokenizerWrapper::Sequence(Sequence::new(vec![
            PreTokenizerWrapper::Digits(Digits::new(true)),
            gpt2(),
        ])),
        "llama-bpe" => regex_split(LLAMA3_SPLIT)?,
        "qwen2" => regex_split(QWEN2_SPLIT)?,
        other => {
            return Err(metadata_error(
                "tokenizer.ggml.pre",
                format!("is {other:?}; supported: gpt-2, smollm, llama-bpe, qwen2"),
            ));
        }
    };
    Ok(PreTokenizer {
        split,
        ignore_merges: name == "llama-bpe",
    })
}

fn regex_split(expression: &str) -> Result<PreTokenizerWrapper, LoadError> {
    let split = Split::new(
        SplitPattern::Regex(expression.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(|e| LoadError::Tokenizer {
        message: e.to_string(),
    })?;
    Ok(PreTokenizerWrapper::Sequence(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)),
    ])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::vocabulary::byte_of_char, *};

    /// All bytes, a few merges, a control and a user-defined token.
    fn small(pre: &str) -> Bpe {
        let mut chars: Vec<(u8, char)> = byte_of_char().into_iter().map(|(c, b)| (b, c)).collect();
        chars.sort_unstable();
        let mut texts: Vec<String> = chars.iter().map(|(_, c)| c.to_string()).collect();
        let mut types = vec![1; 256];
        let merges = [("a", "b"), ("1", "2"), ("Ġ", "ab"), ("Ġ", "Ġ")];
        for (a, b) in merges {
            texts.push(format!("{a}{b}"));
            types.push(1);
        }
        texts.extend(["<|im_end|>".into(), "[x y]".into()]);
        types.extend([CONTROL, USER_DEFINED]);
        let merges = merges.map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec();
        let inner = byte_level(&texts, merges, pre_tokenizer(pre).unwrap()).unwrap();
        Bpe::new(inner, texts, &types, Spelling::ByteLevel).unwrap()
    }

    fn encode(bpe: &Bpe, text: &str, parse_special: bool) -> Vec<String> {
        let mut ids = Vec::new();
        bpe.encode(text, parse_special, &mut ids).unwrap();
        ids.iter()
            .map(|&id| bpe.vocabulary.text(id).unwrap().to_owned())
            .collect()
    }

    #[test]
    fn digits_stand_alone_for_smollm_and_qwen2_only() {
        assert_eq!(encode(&small("smollm"), "12 ab", true), ["1", "2", "Ġab"]);
        assert_eq!(encode(&small("gpt-2"), "12 ab", true), ["12", "Ġab"]);
        assert_eq!(encode(&small("llama-bpe"), "12 ab", true), ["12", "Ġab"]);
        assert_eq!(encode(&small("qwen2"), "12 ab", true), ["1", "2", "Ġab"]);
    }

    #[test]
    fn control_tokens_are_read_only_when_asked_for() {
        let bpe = small("smollm");
        assert_eq!(
            encode(&bpe, "ab<|im_end|>ab", true),
            ["ab", "<|im_end|>", "ab"]
        );
        assert!(encode(&bpe, "ab<|im_end|>ab", false).len() > 3);
        assert_eq!(encode(&bpe, "ab[x y]", false), ["ab", "[x y]"]);
        assert_eq!(bpe.end_of_generation_ids(), [260]);
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_named() {
        let error = pre_tokenizer("tekken").err().unwrap().to_string();
        assert!(
            error.contains("tokenizer.ggml.pre: is \"tekken\"; supported"),
            "{error}"
        );
    }

    #[test]
    fn control_tokens_and_unknown_ids_have_no_bytes() {
        let bpe = small("smollm");
        assert_eq!(bpe.vocabulary.bytes(0), [0]);
        assert_eq!(bpe.vocabulary.bytes(260), b"");
        assert_eq!(bpe.vocabulary.bytes(261), b"[x y]");
        assert_eq!(bpe.vocabulary.bytes(9999), b"");
    }

    proptest! {
        #[test]
        fn the_bytes_of_a_texts_tokens_are_the_text(text in "(\\PC|[ab12 \\n\\t])*") {
            for pre in ["smollm", "llama-bpe", "qwen2"] {
                let bpe = small(pre);
                let mut ids = Vec::new();
                bpe.encode(&text, false, &mut ids).unwrap();
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| bpe.vocabulary.bytes(id).to_vec()).collect();
                prop_assert_eq!(String::from_utf8(bytes).unwrap(), text.clone());
            }
        }
    }
}
