//! Tokens that are recognised in text before it is cut and merged.

use aho_corasick::{AhoCorasick, MatchKind};

use super::TokenizerError;
use crate::error::LoadError;

/// `tokenizer.ggml.token_type`, from llama.cpp's `llama_token_type`.
pub(super) const UNKNOWN: u32 = 2;
pub(super) const CONTROL: u32 = 3;
pub(super) const USER_DEFINED: u32 = 4;
pub(super) const UNUSED: u32 = 5;
pub(super) const BYTE: u32 = 6;

pub(super) struct SpecialTokens {
    /// Control and user-defined tokens.
    pub(super) control: Matcher,
    /// Only the user-defined ones, which are text wherever they stand.
    pub(super) user_defined: Matcher,
}

pub(super) struct Matcher {
    automaton: AhoCorasick,
    pub(super) tokens: Vec<(String, u32)>,
}

pub(super) enum Part<'a> {
    Special(u32),
    Text(&'a str),
}

impl SpecialTokens {
    pub(super) fn new(texts: &[String], types: &[u32]) -> Result<Self, LoadError> {
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
    pub(super) fn split<'a>(
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
