use thiserror::Error;

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KernelError {
    #[error("{what} has {found} elements where {expected} are needed")]
    Shape {
        what: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("head size {found} isn't supported: it must be a positive multiple of 16")]
    HeadSize { found: usize },
    #[error("{heads} attention heads can't share {kv_heads} KV heads evenly")]
    Heads { heads: usize, kv_heads: usize },
    #[error("a sliding window of 0 positions leaves a token nothing to see")]
    EmptyWindow,
    #[error("block {block} is outside the KV cache of {blocks} blocks")]
    Block { block: u32, blocks: usize },
    #[error("{blocks} blocks don't hold position {position}")]
    BlockTable { blocks: usize, position: usize },
    #[error("position {position} is outside the rope table of {positions} positions")]
    Position { position: usize, positions: usize },
    #[error("row {row} is outside the matrix of {rows} rows")]
    Row { row: usize, rows: usize },
    #[error("no logit of the {vocab} is a number: the weights are damaged")]
    NotANumber { vocab: usize },
}

/// Fails unless a slice has the length that the other arguments imply.
pub(crate) fn check(what: &'static str, found: usize, expected: usize) -> Result<(), KernelError> {
    if found == expected {
        return Ok(());
    }
    Err(KernelError::Shape {
        what,
        found,
        expected,
    })
}
