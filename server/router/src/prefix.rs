//! Which replica has seen the beginning of a prompt, and so has it cached perhaps.
//!
//! A prompt's first bytes are hashed at growing lengths (a chain: each hash covers all before
//! it). A table of fixed size maps a hash to the replicas that got such a prompt last. It is a
//! guess: a replica may have evicted the prefix. A wrong one costs a routing choice, no more.

use std::hash::{DefaultHasher, Hasher};

/// Lengths at which a prefix is hashed, in bytes.
const LENGTHS: [usize; 8] = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768];
const WAYS: usize = 4;
/// Of 4 ways each; 16 bytes a way: 512 KiB a service at most.
const SETS: usize = 8192;

/// Identifies a replica in the table.
pub type Slot = u32;

/// Hashes of the first 256, 512, 1024, … bytes of one prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prefix {
    hashes: [u64; LENGTHS.len()],
    count: usize,
}

impl Prefix {
    #[must_use]
    pub fn of(prompt: &[u8]) -> Self {
        let mut prefix = Self::default();
        let mut hasher = DefaultHasher::new();
        let mut from = 0;
        for (hash, length) in prefix.hashes.iter_mut().zip(LENGTHS) {
            let Some(block) = prompt.get(from..length) else {
                break;
            };
            hasher.write(block);
            *hash = hasher.finish();
            prefix.count += 1;
            from = length;
        }
        prefix
    }

    fn longest_first(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        let hashes = &self.hashes[..self.count];
        hashes.iter().copied().zip(LENGTHS).rev()
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Way {
    hash: u64,
    slot: Slot,
    /// Time of the last use; 0 means empty.
    used: u32,
}

/// Hash to replicas; the least recently used way of a set makes room.
#[derive(Debug, Default)]
pub struct PrefixTable {
    sets: Vec<[Way; WAYS]>,
    clock: u32,
}

impl PrefixTable {
    /// Replicas that saw the prompt's beginning, with the bytes they saw, longest first.
    pub fn find(&self, prefix: &Prefix, mut found: impl FnMut(Slot, usize)) {
        if self.sets.is_empty() {
            return;
        }
        for (hash, length) in prefix.longest_first() {
            for way in &self.sets[index(hash)] {
                if way.used != 0 && way.hash == hash {
                    found(way.slot, length);
                }
            }
        }
    }

    /// Notes that a replica gets this prompt.
    pub fn insert(&mut self, prefix: &Prefix, slot: Slot) {
        if prefix.count == 0 {
            return;
        }
        if self.sets.is_empty() {
            self.sets = vec![[Way::default(); WAYS]; SETS];
        }
        self.clock = self.clock.wrapping_add(1).max(1);
        for (hash, _) in prefix.longest_first() {
            let set = &mut self.sets[index(hash)];
            let same = set
                .iter()
                .position(|way| way.hash == hash && way.slot == slot);
            let oldest = || {
                let ages = set.iter().map(|way| match way.used {
                    0 => u32::MAX,
                    used => self.clock.wrapping_sub(used),
                });
                ages.enumerate().max_by_key(|(_, age)| *age)
            };
            let place = same.or_else(|| oldest().map(|(place, _)| place));
            if let Some(way) = place.and_then(|place| set.get_mut(place)) {
                *way = Way {
                    hash,
                    slot,
                    used: self.clock,
                };
            }
        }
    }
}

fn index(hash: u64) -> usize {
    usize::try_from(hash % SETS as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(table: &PrefixTable, prompt: &[u8]) -> Vec<(Slot, usize)> {
        let mut found = Vec::new();
        table.find(&Prefix::of(prompt), |slot, bytes| found.push((slot, bytes)));
        found
    }

    #[test]
    fn finds_the_longest_shared_beginning() {
        let mut table = PrefixTable::default();
        let mut first = vec![b'a'; 1500];
        table.insert(&Prefix::of(&first), 7);
        first[600] = b'b';
        assert_eq!(find(&table, &first), [(7, 512), (7, 256)]);
        table.insert(&Prefix::of(&first), 8);
        let found = find(&table, &first);
        assert_eq!(found[0], (8, 1024));
        assert!(found.contains(&(7, 512)));
        first[0] = b'b';
        assert!(find(&table, &first).is_empty());
    }

    #[test]
    fn short_prompts_leave_no_trace() {
        let mut table = PrefixTable::default();
        table.insert(&Prefix::of(&[b'a'; 255]), 1);
        assert!(table.sets.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_the_newest_stay() {
        let mut table = PrefixTable::default();
        let prompt = |number: u32| {
            let mut prompt = [b' '; 256];
            prompt[..10].copy_from_slice(format!("{number:010}").as_bytes());
            prompt
        };
        for number in 0..100_000 {
            table.insert(&Prefix::of(&prompt(number)), number);
        }
        assert_eq!(table.sets.len(), SETS);
        let kept = (99_000..100_000).filter(|number| !find(&table, &prompt(*number)).is_empty());
        assert!(kept.count() > 990);
    }
}
