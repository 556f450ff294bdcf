//! What tokens look like, and the bytes they stand for.

use std::collections::HashMap;

use crate::error::LoadError;

/// How ordinary tokens spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Every byte as a printable character (GPT-2, Llama 3, Qwen).
    ByteLevel,
    /// Text with U+2581 for a space, and `<0x0A>` for a byte that isn't in any token (Llama 2,
    /// Mistral).
    SentencePiece,
}

/// How a token is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Stands for no text.
    Control,
    /// Stands for its own text as it is.
    Verbatim,
    Ordinary,
}

/// All tokens by id.
pub(super) struct Vocabulary {
    texts: Vec<String>,
    /// The bytes of all tokens end to end; token `i` has `ends[i - 1]..ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Vocabulary {
    pub(super) fn new(
        tokens: Vec<(String, TokenKind)>,
        spelling: Spelling,
    ) -> Result<Self, LoadError> {
        let to_byte = byte_of_char();
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(tokens.len());
        for (text, kind) in &tokens {
            match (kind, spelling) {
                (TokenKind::Control, _) => {}
                (TokenKind::Verbatim, _) => bytes.extend_from_slice(text.as_bytes()),
                (TokenKind::Ordinary, Spelling::ByteLevel) => {
                    for c in text.chars() {
                        match to_byte.get(&c) {
                            Some(&byte) => bytes.push(byte),
                            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                        }
                    }
                }
                (TokenKind::Ordinary, Spelling::SentencePiece) => match byte_token(text) {
                    Some(byte) => bytes.push(byte),
                    None => bytes.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
                },
            }
            ends.push(
                u32::try_from(bytes.len()).map_err(|_| LoadError::Tokenizer {
                    message: "the vocabulary's text is over 4 GiB".into(),
                })?,
            );
        }
        Ok(Self {
            texts: tokens.into_iter().map(|(text, _)| text).collect(),
            bytes,
            ends,
        })
    }

    pub(super) fn len(&self) -> u32 {
        self.ends.len() as u32
    }

    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// The bytes that a token stands for; none for control tokens and unknown ids.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else {
            return &[];
        };
        let start = (id as usize).checked_sub(1).map_or(0, |i| self.ends[i]);
        &self.bytes[start as usize..end as usize]
    }
}

/// The byte of a token such as `<0x0A>`.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// GPT-2's printable stand-ins for bytes, read backwards
/// (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>).
pub(super) fn byte_of_char() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255u8).filter(|&b| !printable(b));
    (0..=255u8)
        .filter(|&b| printable(b))
        .map(|b| (char::from(b), b))
        .chain(('\u{100}'..).zip(others))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentence_piece_spells_spaces_and_bytes() {
        let tokens = [
            ("<s>", TokenKind::Control),
            ("<0x0A>", TokenKind::Ordinary),
            ("<0xE9>", TokenKind::Ordinary),
            ("\u{2581}a\u{2581}b", TokenKind::Ordinary),
            ("\u{2581}", TokenKind::Verbatim),
            ("<0xZZ>", TokenKind::Ordinary),
        ];
        let tokens = tokens.map(|(text, kind)| (text.to_owned(), kind)).to_vec();
        let vocabulary = Vocabulary::new(tokens, Spelling::SentencePiece).unwrap();
        let bytes: Vec<&[u8]> = (0..7).map(|id| vocabulary.bytes(id)).collect();
        let expected: [&[u8]; 7] = [
            b"",
            b"\n",
            b"\xE9",
            b" a b",
            "\u{2581}".as_bytes(),
            b"<0xZZ>",
            b"",
        ];
        assert_eq!(bytes, expected);
    }
}
