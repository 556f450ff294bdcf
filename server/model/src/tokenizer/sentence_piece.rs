//! SentencePiece's BPE as GGUF files describe it (`tokenizer.ggml.model` = `llama`): pieces with
//! scores instead of merges. The best-scored pair of neighbours that makes a piece is joined first,
//! so the merges follow from the scores.

use std::collections::HashMap;

use tokenizers::{
    NormalizerWrapper,
    models::bpe::{BPE, Vocab},
    normalizers::{Prepend, Replace, Sequence},
};

use super::special::{BYTE, CONTROL, UNKNOWN, UNUSED};
use crate::{error::LoadError, gguf::GgufFile, gguf::metadata_error};

/// Words whose tokens are remembered, by each thread that encodes.
const CACHED_WORDS: usize = 1000;

const SPACE: &str = "\u{2581}";

/// The tokenizer of the text between control tokens.
pub(super) fn from_gguf(
    file: &GgufFile,
    texts: &[String],
    types: &[u32],
) -> Result<tokenizers::Tokenizer, LoadError> {
    let scores = file.f32s("tokenizer.ggml.scores")?;
    if scores.len() != texts.len() {
        return Err(metadata_error(
            "tokenizer.ggml.scores",
            format!("has {} entries for {} tokens", scores.len(), texts.len()),
        ));
    }
    let prefix = file
        .bool_opt("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    build(texts, types, &scores, prefix)
}

fn build(
    texts: &[String],
    types: &[u32],
    scores: &[f32],
    space_prefix: bool,
) -> Result<tokenizers::Tokenizer, LoadError> {
    let failed = |message: String| LoadError::Tokenizer { message };
    let vocab: Vocab = texts.iter().cloned().zip(0..).collect();
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocab, merges(texts, types, scores))
        .byte_fallback(true)
        .fuse_unk(true)
        .cache_capacity(CACHED_WORDS);
    if let Some(unknown) = types.iter().position(|&kind| kind == UNKNOWN) {
        bpe = bpe.unk_token(texts[unknown].clone());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(bpe.build().map_err(|e| failed(e.to_string()))?);
    let spaces = Replace::new(" ", SPACE).map_err(|e| failed(e.to_string()))?;
    let mut steps = vec![NormalizerWrapper::Replace(spaces)];
    if space_prefix {
        steps.insert(
            0,
            NormalizerWrapper::Prepend(Prepend::new(SPACE.to_owned())),
        );
    }
    tokenizer
        .with_normalizer(Some(NormalizerWrapper::Sequence(Sequence::new(steps))))
        .map_err(|e| failed(e.to_string()))?;
    Ok(tokenizer)
}

/// Every pair of pieces that makes a piece, the best first.
fn merges(texts: &[String], types: &[u32], scores: &[f32]) -> Vec<(String, String)> {
    let ordinary = |id: usize| ![UNKNOWN, CONTROL, UNUSED, BYTE].contains(&types[id]);
    let pieces: HashMap<&str, usize> = texts
        .iter()
        .enumerate()
        .filter(|&(id, _)| ordinary(id))
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    let mut pairs: Vec<(usize, &str, &str)> = pieces
        .iter()
        .flat_map(|(&text, &id)| {
            let cuts = text.char_indices().skip(1).map(|(at, _)| at);
            cuts.map(move |at| (id, &text[..at], &text[at..]))
        })
        .filter(|(_, left, right)| pieces.contains_key(left) && pieces.contains_key(right))
        .collect();
    pairs.sort_by(|a, b| {
        scores[b.0]
            .total_cmp(&scores[a.0])
            .then(a.0.cmp(&b.0))
            .then(a.1.len().cmp(&b.1.len()))
    });
    pairs
        .into_iter()
        .map(|(_, left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(space_prefix: bool) -> tokenizers::Tokenizer {
        let mut tokens = vec![("<unk>".to_owned(), UNKNOWN, 0.0)];
        for byte in 0..=255u8 {
            tokens.push((format!("<0x{byte:02X}>"), BYTE, 0.0));
        }
        for (text, score) in [
            ("\u{2581}", -20.0),
            ("a", -21.0),
            ("b", -22.0),
            ("c", -23.0),
            ("ab", -2.0),
            ("bc", -1.0),
            ("abc", -3.0),
            ("\u{2581}a", -4.0),
            ("\u{2581}abc", -5.0),
        ] {
            tokens.push((text.to_owned(), 1, score));
        }
        let texts: Vec<String> = tokens.iter().map(|t| t.0.clone()).collect();
        let types: Vec<u32> = tokens.iter().map(|t| t.1).collect();
        let scores: Vec<f32> = tokens.iter().map(|t| t.2).collect();
        build(&texts, &types, &scores, space_prefix).unwrap()
    }

    fn pieces(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<String> {
        let encoding = tokenizer.encode(text, false).unwrap();
        encoding.get_tokens().to_vec()
    }

    #[test]
    fn the_best_score_is_joined_first() {
        let plain = tokenizer(false);
        // bc scores best, then a+bc makes abc.
        assert_eq!(pieces(&plain, "abc"), ["abc"]);
        assert_eq!(pieces(&plain, "ab"), ["ab"]);
        assert_eq!(pieces(&plain, "abbc"), ["ab", "bc"]);
        assert_eq!(
            pieces(&tokenizer(true), "abc abc"),
            ["\u{2581}abc", "\u{2581}abc"]
        );
    }

    #[test]
    fn what_no_piece_covers_becomes_bytes() {
        assert_eq!(pieces(&tokenizer(false), "aé"), ["a", "<0xC3>", "<0xA9>"]);
    }
}
