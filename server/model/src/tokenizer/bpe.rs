//! Byte-level BPE as GGUF files describe it (`tokenizer.ggml.model` = `gpt2`).

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, MatchKind};
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

use super::TokenizerError;
use crate::{
    error::LoadError,
    gguf::{GgufFile, metadata_error},
};

/// `tokenizer.ggml.token_type`, from llama.cpp's `llama_token_type`.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

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

/// Words whose tokens are remembered, by each thread that encodes: there may be hundreds.
const CACHED_WORDS: usize = 1000;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) struct Bpe {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    texts: Vec<String>,
    /// The bytes of all tokens end to end; token `i` has `ends[i - 1]..ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Bpe {
    pub(super) fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let model = file.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(metadata_error(
                "tokenizer.ggml.model",
                format!("is {model:?}; only \"gpt2\" (byte-level BPE) is supported"),
            ));
        }
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
        let merges = file
            .strings("tokenizer.ggml.merges")?
            .into_iter()
            .map(|merge| {
                merge
                    .split_once(' ')
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .ok_or_else(|| {
                        metadata_error("tokenizer.ggml.merges", format!("has {merge:?}"))
                    })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let pre = pre_tokenizer(file.string_opt("tokenizer.ggml.pre")?.unwrap_or("gpt-2"))?;
        Self::new(texts, &types, merges, pre)
    }

    fn new(
        texts: Vec<String>,
        types: &[u32],
        merges: Vec<(String, String)>,
        pre: PreTokenizer,
    ) -> Result<Self, LoadError> {
        let failed = |message: String| LoadError::Tokenizer { message };
        let vocab: Vocab = texts.iter().cloned().zip(0..).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre.ignore_merges)
            .cache_capacity(CACHED_WORDS)
            .build()
            .map_err(|e| failed(e.to_string()))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(pre.split));

        let to_byte = byte_of_char();
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(texts.len());
        for (text, &kind) in texts.iter().zip(types) {
            match kind {
                CONTROL => {}
                USER_DEFINED => bytes.extend_from_slice(text.as_bytes()),
                _ => text.chars().for_each(|c| match to_byte.get(&c) {
                    Some(&byte) => bytes.push(byte),
                    None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }),
            }
            ends.push(
                u32::try_from(bytes.len())
                    .map_err(|_| failed("the vocabulary's text is over 4 GiB".into()))?,
            );
        }
        Ok(Self {
            special: SpecialTokens::new(&texts, types)?,
            inner,
            texts,
            bytes,
            ends,
        })
    }

    pub(super) fn vocab_size(&self) -> u32 {
        self.ends.len() as u32
    }

    pub(super) fn token_text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
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

    /// The bytes that a token stands for; none for control tokens and unknown ids.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else {
            return &[];
        };
        let start = (id as usize).checked_sub(1).map_or(0, |i| self.ends[i]);
        &self.bytes[start as usize..end as usize]
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
        "llama-bpe" => {
            let split = Split::new(
                SplitPattern::Regex(LLAMA3_SPLIT.into()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|e| LoadError::Tokenizer {
                message: e.to_string(),
            })?;
            PreTokenizerWrapper::Sequence(Sequence::new(vec![
                PreTokenizerWrapper::Split(split),
                PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)),
            ]))
        }
        other => {
            return Err(metadata_error(
                "tokenizer.ggml.pre",
                format!("is {other:?}; supported: gpt-2, smollm, llama-bpe"),
            ));
        }
    };
    Ok(PreTokenizer {
        split,
        ignore_merges: name == "llama-bpe",
    })
}

/// GPT-2's printable stand-ins for bytes, read backwards
/// (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>).
fn byte_of_char() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255u8).filter(|&b| !printable(b));
    (0..=255u8)
        .filter(|&b| printable(b))
        .map(|b| (char::from(b), b))
        .chain(('\u{100}'..).zip(others))
        .collect()
}

/// Tokens that are recognised in text before it is cut and merged.
struct SpecialTokens {
    /// Control and user-defined tokens.
    control: Matcher,
    /// Only the user-defined ones, which are text wherever they stand.
    user_defined: Matcher,
}

struct Matcher {
    automaton: AhoCorasick,
    tokens: Vec<(String, u32)>,
}

enum Part<'a> {
    Special(u32),
    Text(&'a str),
}

impl SpecialTokens {
    fn new(texts: &[String], types: &[u32]) -> Result<Self, LoadError> {
        let matcher = |wanted: &[u32]| -> Result<Matcher, LoadError> {
            let tokens: Vec<(String, u32)> = texts
                .iter()
                .cloned()
                .zip(0..)
                .zip(types)
                .filter(|((text, _), kind)| !text.is_empty() && wanted.contains(kind))
                .map(|(token, _)| token)
                .collect();
            let automaton = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(|(text, _)| text))
                .map_err(|e| LoadError::Tokenizer {
                    message: e.to_string(),
                })?;
            Ok(Matcher { automaton, tokens })
        };
        Ok(Self {
            control: matcher(&[CONTROL, USER_DEFINED])?,
            user_defined: matcher(&[USER_DEFINED])?,
        })
    }
}

impl Matcher {
    fn split<'a>(
        &self,
        text: &'a str,
        mut part: impl FnMut(Part<'a>) -> Result<(), TokenizerError>,
    ) -> Result<(), TokenizerError> {
        let mut done = 0;
        for found in self.automaton.find_iter(text) {
            if found.start() > done {
                part(Part::Text(&text[done..found.start()]))?;
            }
            part(Part::Special(self.tokens[found.pattern().as_usize()].1))?;
            done = found.end();
        }
        if done < text.len() {
            part(Part::Text(&text[done..]))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        Bpe::new(texts, &types, merges, pre_tokenizer(pre).unwrap()).unwrap()
    }

    fn encode(bpe: &Bpe, text: &str, parse_special: bool) -> Vec<String> {
        let mut ids = Vec::new();
        bpe.encode(text, parse_special, &mut ids).unwrap();
        ids.iter()
            .map(|&id| bpe.texts[id as usize].clone())
            .collect()
    }

    #[test]
    fn digits_stand_alone_for_smollm_only() {
        assert_eq!(encode(&small("smollm"), "12 ab", true), ["1", "2", "Ġab"]);
        assert_eq!(encode(&small("gpt-2"), "12 ab", true), ["12", "Ġab"]);
        assert_eq!(encode(&small("llama-bpe"), "12 ab", true), ["12", "Ġab"]);
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
        assert_eq!(bpe.bytes(0), [0]);
        assert_eq!(bpe.bytes(260), b"");
        assert_eq!(bpe.bytes(261), b"[x y]");
        assert_eq!(bpe.bytes(9999), b"");
    }

    proptest! {
        #[test]
        fn the_bytes_of_a_texts_tokens_are_the_text(text in "(\\PC|[ab12 \\n\\t])*") {
            for pre in ["smollm", "llama-bpe"] {
                let bpe = small(pre);
                let mut ids = Vec::new();
                bpe.encode(&text, false, &mut ids).unwrap();
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| bpe.bytes(id).to_vec()).collect();
                prop_assert_eq!(String::from_utf8(bytes).unwrap(), text.clone());
            }
        }
    }
}
