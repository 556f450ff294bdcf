//! A stand-in tokenizer for a device that runs no model.

/// Characters that one token covers at most, its leading white space included. With words of
/// ordinary English this gives about four characters a token, as a real tokenizer does.
const MAX_CHARS: usize = 6;

pub(super) fn encode(text: &str, vocab_size: u32, ids: &mut Vec<u32>) {
    let mut piece = Piece::default();
    let mut in_word = false;
    for c in text.chars() {
        let begins_word = c.is_whitespace() && in_word;
        if piece.chars == MAX_CHARS || begins_word {
            ids.extend(piece.take(vocab_size));
        }
        in_word = !c.is_whitespace();
        piece.push(c);
    }
    ids.extend(piece.take(vocab_size));
}

/// The word of a token: a space and three letters, the same whenever it is asked for.
pub(super) fn word(id: u32) -> [u8; 4] {
    // A bijection on u32, so that near ids give unlike words.
    let mixed = u64::from(id.wrapping_mul(0x9E37_79B1));
    let mut rest = mixed >> 8;
    let mut letter = || {
        let letter = b'a' + (rest % 26) as u8;
        rest /= 26;
        letter
    };
    [b' ', letter(), letter(), letter()]
}

/// A piece of text, kept as its FNV-1a hash.
struct Piece {
    hash: u64,
    chars: usize,
}

impl Default for Piece {
    fn default() -> Self {
        Self {
            hash: 0xCBF2_9CE4_8422_2325,
            chars: 0,
        }
    }
}

impl Piece {
    fn push(&mut self, c: char) {
        self.hash = (self.hash ^ u64::from(u32::from(c))).wrapping_mul(0x0000_0100_0000_01B3);
        self.chars += 1;
    }

    fn take(&mut self, vocab_size: u32) -> Option<u32> {
        let piece = std::mem::take(self);
        (piece.chars > 0).then(|| ((piece.hash >> 16) % u64::from(vocab_size)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::{DecodeStream, EncodeOptions, Tokenizer};

    const TEXT: &str = "The quick brown fox jumps over the lazy dog while a very long international \
                        conference discusses the price of tokens and the length of prompts.";

    #[test]
    fn the_same_text_gives_the_same_ids_within_the_vocabulary() {
        let tokenizer = Tokenizer::simulated(1000);
        let ids = tokenizer.encode(TEXT, EncodeOptions::COMPLETION).unwrap();
        assert_eq!(
            ids,
            tokenizer.encode(TEXT, EncodeOptions::COMPLETION).unwrap()
        );
        assert!(ids.iter().all(|&id| id < 1000));
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert!(distinct.len() > ids.len() / 2, "{ids:?}");
    }

    #[test]
    fn a_token_covers_about_four_characters() {
        let ids = Tokenizer::simulated(128_256)
            .encode(TEXT, EncodeOptions::TEXT)
            .unwrap();
        let ratio = TEXT.len() as f64 / ids.len() as f64;
        assert!((3.5..5.0).contains(&ratio), "{ratio} characters a token");
    }

    #[test]
    fn empty_text_has_no_tokens_and_odd_text_has_some() {
        let tokenizer = Tokenizer::simulated(7);
        assert!(
            tokenizer
                .encode("", EncodeOptions::TEXT)
                .unwrap()
                .is_empty()
        );
        assert_eq!(tokenizer.encode("é", EncodeOptions::TEXT).unwrap().len(), 1);
        assert_eq!(
            tokenizer
                .encode(&" ".repeat(13), EncodeOptions::TEXT)
                .unwrap()
                .len(),
            3
        );
    }

    #[test]
    fn streamed_text_equals_decoded_text() {
        let tokenizer = Arc::new(Tokenizer::simulated(128_256));
        let ids: Vec<u32> = (0..50).map(|i| i * 2567).collect();
        let mut stream = DecodeStream::new(tokenizer.clone());
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        assert_eq!(text, tokenizer.decode(&ids));
        assert_eq!(text.len(), 4 * ids.len());
        assert!(tokenizer.eos_token_ids().is_empty());
    }
}
