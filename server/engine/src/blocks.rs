//! KV blocks by ownership: a [`Block`] is the right to use one, and dropping it gives it back.
//!
//! Prefix caching would add a reference count a block to the pool, a `Block::share` that raises
//! it, and a hash by which `allocate` finds a block again; tables and scheduler stay as they are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::executor::BlockId;

/// All blocks of an executor.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Arc<FreeList>,
    total: u32,
}

/// Behind a mutex only because blocks, which hold it, move between threads with the engine.
#[derive(Debug)]
struct FreeList(Mutex<Vec<BlockId>>);

impl FreeList {
    fn lock(&self) -> MutexGuard<'_, Vec<BlockId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A block in use.
#[derive(Debug)]
pub(crate) struct Block {
    id: BlockId,
    pool: Arc<FreeList>,
}

impl Block {
    pub fn id(&self) -> BlockId {
        self.id
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.lock().push(self.id);
    }
}

impl BlockPool {
    pub fn new(total: u32) -> Self {
        // Low ids are given out first.
        let free = Arc::new(FreeList(Mutex::new((0..total).rev().collect())));
        Self { free, total }
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
    blocks: Vec<Block>,
    block_size: usize,
}

impl BlockTable {
    pub fn new(block_size: u32) -> Self {
        Self {
            blocks: Vec::new(),
            block_size: block_size.max(1) as usize,
        }
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that `tokens` need beyond those held.
    pub fn missing(&self, tokens: usize) -> usize {
        tokens
            .div_ceil(self.block_size)
            .saturating_sub(self.blocks.len())
    }

    /// Makes room for `tokens`, or changes nothing and returns false if the pool has too few free
    /// blocks.
    pub fn grow(&mut self, tokens: usize, pool: &BlockPool) -> bool {
        let missing = self.missing(tokens);
        if missing == 0 {
            return true;
        }
        let mut free = pool.free.lock();
        let Some(rest) = free.len().checked_sub(missing) else {
            return false;
        };
        self.blocks.extend(free.drain(rest..).rev().map(|id| Block {
            id,
            pool: Arc::clone(&pool.free),
        }));
        true
    }

    /// Ids of the blocks that hold the first `tokens` positions.
    pub fn ids(&self, tokens: usize) -> Vec<BlockId> {
        let needed = tokens.div_ceil(self.block_size);
        self.blocks.iter().take(needed).map(Block::id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_when_their_table_goes() {
        let pool = BlockPool::new(5);
        let mut first = BlockTable::new(4);
        assert!(first.grow(9, &pool));
        assert_eq!(first.ids(9), [0, 1, 2]);
        assert_eq!(first.ids(4), [0]);
        let mut second = BlockTable::new(4);
        assert!(!second.grow(12, &pool), "3 blocks, but 2 are left");
        assert_eq!(second.len(), 0, "all or nothing");
        assert!(second.grow(8, &pool));
        assert_eq!((pool.free(), pool.used(), pool.total()), (0, 5, 5));
        assert!(first.grow(12, &pool), "the third block has room");
        assert!(!first.grow(13, &pool));
        drop(first);
        assert_eq!(pool.free(), 3);
        assert!(second.grow(20, &pool));
        let mut ids = second.ids(20);
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4]);
    }
}
