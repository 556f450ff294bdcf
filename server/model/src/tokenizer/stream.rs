//! Text out of tokens while they are generated. A token may end in the middle of a character, so
//! bytes wait until the character is whole.

use std::sync::Arc;

use super::Tokenizer;

/// Decodes one sequence, token by token. What it gives out, put together, equals
/// [`Tokenizer::decode`] of all the tokens.
#[derive(Debug)]
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    pending: Utf8Stream,
}

impl DecodeStream {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            pending: Utf8Stream::default(),
        }
    }

    /// The text that this token completes: empty for a control token and for the first part of a
    /// character.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        let pending = &mut self.pending;
        self.tokenizer
            .with_bytes(id, |bytes| pending.push(bytes, &mut text));
        text
    }

    /// What is left at the end: U+FFFD for a character that never became whole.
    pub fn finish(self) -> String {
        let mut text = String::new();
        self.pending.finish(&mut text);
        text
    }
}

/// Cuts a stream of bytes into valid UTF-8, with U+FFFD where it isn't.
#[derive(Debug, Default)]
pub(super) struct Utf8Stream {
    /// The beginning of a character: at most 3 bytes between two pushes.
    partial: Vec<u8>,
}

impl Utf8Stream {
    pub(super) fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.partial.extend_from_slice(bytes);
        let mut done = 0;
        let mut chunks = self.partial.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let is_last = chunks.peek().is_none();
            if is_last && may_become_valid(chunk.invalid()) {
                break;
            }
            if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                done += chunk.invalid().len();
            }
        }
        self.partial.drain(..done);
    }

    pub(super) fn finish(self, text: &mut String) {
        if !self.partial.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Whether more bytes can complete this end of the input.
fn may_become_valid(end: &[u8]) -> bool {
    std::str::from_utf8(end).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(pieces: &[&[u8]]) -> Vec<String> {
        let mut stream = Utf8Stream::default();
        let mut out: Vec<String> = pieces
            .iter()
            .map(|piece| {
                let mut text = String::new();
                stream.push(piece, &mut text);
                text
            })
            .collect();
        let mut text = String::new();
        stream.finish(&mut text);
        out.push(text);
        out
    }

    #[test]
    fn a_character_is_given_out_when_it_is_whole() {
        assert_eq!(
            stream(&[b"a\xF0\x9F", b"\x98", b"\x80b"]),
            ["a", "", "\u{1F600}b", ""]
        );
    }

    #[test]
    fn broken_bytes_become_replacement_characters_at_once() {
        assert_eq!(
            stream(&[b"\xFFa", b"\xE2\x82", b"x"]),
            ["\u{FFFD}a", "", "\u{FFFD}x", ""]
        );
    }

    #[test]
    fn an_unfinished_character_is_replaced_at_the_end() {
        assert_eq!(stream(&[b"ok\xE2\x82"]), ["ok", "\u{FFFD}"]);
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_gives_the_same_text(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..=0xBF, 0xE0u8..=0xF7], 0..40),
            cuts in prop::collection::vec(0usize..40, 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(stream(&pieces).concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn text_comes_through_unchanged(text in "\\PC*", size in 1usize..5) {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            prop_assert_eq!(stream(&pieces).concat(), text);
        }
    }
}
