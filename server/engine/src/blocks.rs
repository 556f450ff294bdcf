//! KV blocks by ownership: a [`BlockTable`] owns the blocks of a sequence, and dropping it gives
//! them back.
//!
//! Prefix caching would add to the pool a count of owners a block (raised when a second table
//! takes it in, lowered by `Drop`) and a hash by which a block is found again; what is between
//! `grow` and `Drop`, and the scheduler, would stay as they are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::executor::BlockId;

/// All blocks of an executor.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Arc<FreeList>,
    total: u32,
    block_size: usize,
}

/// Behind a mutex only because tables, which hold it, move between threads with the engine.
#[derive(Debug)]
struct FreeList(Mutex<Vec<BlockId>>);

impl FreeList {
    fn lock(&self) -> MutexGuard<'_, Vec<BlockId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockPool {
    pub fn new(total: u32, block_size: u32) -> Self {
        // Low ids are given out first.
        let free = Arc::new(FreeList(Mutex::new((0..total).rev().collect())));
        Self {
            free,
            total,
            block_size: block_size.max(1) as usize,
        }
    }

    /// A table without blocks.
    pub fn table(&self) -> BlockTable {
        BlockTable {
            ids: Vec::new(),
            free: Arc::clone(&self.free),
            block_size: self.block_size,
        }
    }

    pub fn total(&self) -> u32 {
        self.total
    }

    pub fn free(&self) -> usize {
        self.free.lock().len()
    }

    pub fn used(&self) -> u32 {
        self.total.saturating_sub(self.free() as u32)
    }
}

/// The blocks of one sequence, in the order of its positions.
#[derive(Debug)]
pub(crate) struct BlockTable {
    ids: Vec<BlockId>,
    free: Arc<FreeList>,
    block_size: usize,
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.free.lock().extend(self.ids.drain(..).rev());
        }
    }
}

impl BlockTable {
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Blocks that `tokens` need beyond those held.
    pub fn missing(&self, tokens: usize) -> usize {
        tokens
            .div_ceil(self.block_size)
            .saturating_sub(self.ids.len())
    }

    /// Makes room for `tokens`, or changes nothing and returns false if too few blocks are free.
    pub fn grow(&mut self, tokens: usize) -> bool {
        let missing = self.missing(tokens);
        if missing == 0 {
            return true;
        }
        let mut free = self.free.lock();
        let Some(rest) = free.len().checked_sub(missing) else {
            return false;
        };
        self.ids.extend(free.drain(rest..).rev());
        true
    }

    /// Ids of the blocks that hold the first `tokens` positions.
    pub fn ids(&self, tokens: usize) -> &[BlockId] {
        let needed = tokens.div_ceil(self.block_size);
        self.ids.get(..needed).unwrap_or(&self.ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_when_their_table_goes() {
        let pool = BlockPool::new(5, 4);
        let mut first = pool.table();
        assert!(first.grow(9));
        assert_eq!(first.ids(9), [0, 1, 2]);
        assert_eq!(first.ids(4), [0]);
        let mut second = pool.table();
        assert!(!second.grow(12), "3 blocks, but 2 are left");
        assert_eq!(second.len(), 0, "all or nothing");
        assert!(second.grow(8));
        assert_eq!((pool.free(), pool.used(), pool.total()), (0, 5, 5));
        assert!(first.grow(12), "the third block has room");
        assert!(!first.grow(13));
        drop(first);
        assert_eq!(pool.free(), 3);
        assert!(second.grow(20));
        let mut ids = second.ids(20).to_vec();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4]);
    }
}
