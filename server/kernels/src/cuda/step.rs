//! A step's description as the kernels read it (common.cuh).

/// Set in a row's token where the token is the one that the step before sampled for a slot.
pub const PREVIOUS: u32 = 0x8000_0000;
/// In a sample's `out`: a place of a graph's batch that isn't taken.
pub const NOWHERE: u32 = u32::MAX;

/// A token of the step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepRow {
    /// Its id, or [`PREVIOUS`] with a slot.
    pub token: u32,
    pub position: u32,
    /// KV block that holds the position.
    pub block: u32,
    /// Index into the step's sequences.
    pub sequence: u32,
}

/// A sequence's part of the step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSequence {
    pub first_row: u32,
    /// 0: a place of a graph's batch that isn't taken.
    pub rows: u32,
    /// Position of the first row.
    pub start: u32,
    /// Where its block ids begin among the step's.
    pub table: u32,
}

/// A row whose next token is wanted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepSample {
    pub row: u32,
    /// Where the token is kept for the next step.
    pub slot: u32,
    /// Where the token goes among the step's results, or [`NOWHERE`].
    pub out: u32,
    pub top_k: u32,
    pub temperature: f32,
    pub top_p: f32,
    pub seed: u64,
    pub position: u64,
}

/// Tokens of a prompt chunk that attend together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTile {
    pub sequence: u32,
    /// Counted from the sequence's first row.
    pub first: u32,
}
