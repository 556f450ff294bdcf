//! From the engine's batch to what the kernels read: one piece of memory, filled by the host and
//! copied before the step.

use std::ops::Range;

use stoker_engine::executor::{InputToken, Row, StepBatch};
use stoker_kernels::{
    BLOCK_SIZE,
    cuda::{
        CudaError, NOWHERE, PREVIOUS, Pinned, Slice, StepRow, StepSample, StepSequence, StepTile,
    },
};

use super::Sizes;

/// Where the parts of a step's description lie in bytes, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Tokens; those of decoding sequences come first.
    pub rows: usize,
    pub sequences: usize,
    /// Sequences with a single row.
    pub decodes: usize,
    pub samples: usize,
    pub tiles: usize,
    /// Block ids of all sequences. In a graph their number is not known: it is the most there
    /// can be.
    pub blocks: usize,
}

impl Layout {
    /// The layout of a graph for `bucket` decoding sequences.
    pub fn of_decodes(bucket: usize, sizes: &Sizes) -> Self {
        Self {
            rows: bucket,
            sequences: bucket,
            decodes: bucket,
            samples: bucket,
            tiles: 0,
            blocks: bucket * sizes.max_model_len.div_ceil(BLOCK_SIZE),
        }
    }

    /// Bytes that the largest step takes.
    pub fn most_bytes(sizes: &Sizes) -> usize {
        Self {
            rows: sizes.max_rows,
            sequences: sizes.max_sequences,
            decodes: 0,
            samples: sizes.max_sequences,
            // A tile has at least 16 tokens but for the last of a sequence.
            tiles: sizes.max_rows / 16 + sizes.max_sequences,
            blocks: sizes.max_sequences * sizes.max_model_len.div_ceil(BLOCK_SIZE),
        }
        .bytes()
    }

    fn sequences_at(&self) -> usize {
        self.rows * size_of::<StepRow>()
    }

    fn samples_at(&self) -> usize {
        self.sequences_at() + self.sequences * size_of::<StepSequence>()
    }

    fn tiles_at(&self) -> usize {
        self.samples_at() + self.samples * size_of::<StepSample>()
    }

    fn blocks_at(&self) -> usize {
        self.tiles_at() + self.tiles * size_of::<StepTile>()
    }

    pub fn bytes(&self) -> usize {
        self.blocks_at() + self.blocks * size_of::<u32>()
    }

    pub fn step_rows<'a>(&self, at: Slice<'a, u8>) -> Result<Slice<'a, StepRow>, CudaError> {
        at.cast(0, self.rows)
    }

    pub fn step_sequences<'a>(
        &self,
        at: Slice<'a, u8>,
    ) -> Result<Slice<'a, StepSequence>, CudaError> {
        at.cast(self.sequences_at(), self.sequences)
    }

    pub fn step_samples<'a>(&self, at: Slice<'a, u8>) -> Result<Slice<'a, StepSample>, CudaError> {
        at.cast(self.samples_at(), self.samples)
    }

    pub fn step_tiles<'a>(&self, at: Slice<'a, u8>) -> Result<Slice<'a, StepTile>, CudaError> {
        at.cast(self.tiles_at(), self.tiles)
    }

    pub fn step_blocks<'a>(&self, at: Slice<'a, u8>) -> Result<Slice<'a, u32>, CudaError> {
        at.cast(self.blocks_at(), self.blocks)
    }
}

/// A batch in the kernels' terms.
#[derive(Debug, Default)]
pub struct Packed {
    rows: Vec<StepRow>,
    sequences: Vec<StepSequence>,
    samples: Vec<StepSample>,
    tiles: Vec<StepTile>,
    blocks: Vec<u32>,
    decodes: usize,
}

/// What a batch may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub sizes: Sizes,
    pub blocks: usize,
    pub vocab: usize,
    /// Tokens of a tile.
    pub tile_tokens: usize,
}

impl Packed {
    /// Takes in a batch. The token of the batch's `i`-th row will be at `results.start + i`.
    pub fn fill(
        &mut self,
        batch: &StepBatch,
        bounds: &Bounds,
        results: Range<usize>,
    ) -> Result<(), String> {
        self.clear();
        check(batch, bounds)?;
        let decodes = |row: &&(usize, &Row)| row.1.tokens.len() == 1;
        let rows: Vec<(usize, &Row)> = batch.rows.iter().enumerate().collect();
        self.decodes = rows.iter().filter(decodes).count();
        let (single, more): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| decodes(&row));
        for (i, row) in single.into_iter().chain(more) {
            self.push(row, bounds, results.start + i);
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.sequences.clear();
        self.samples.clear();
        self.tiles.clear();
        self.blocks.clear();
    }

    fn push(&mut self, row: &Row, bounds: &Bounds, out: usize) {
        let sequence = self.sequences.len() as u32;
        let first = self.rows.len() as u32;
        let end = row.start as usize + row.tokens.len();
        for (token, position) in row.tokens.iter().zip(row.start..) {
            self.rows.push(StepRow {
                token: match token {
                    InputToken::Known(id) => *id,
                    InputToken::FromPreviousStep => PREVIOUS | row.slot,
                },
                position,
                block: row.blocks[position as usize / BLOCK_SIZE],
                sequence,
            });
        }
        self.sequences.push(StepSequence {
            first_row: first,
            rows: row.tokens.len() as u32,
            start: row.start,
            table: self.blocks.len() as u32,
        });
        self.blocks.extend(&row.blocks[..end.div_ceil(BLOCK_SIZE)]);
        if row.tokens.len() > 1 {
            let firsts = (0..row.tokens.len()).step_by(bounds.tile_tokens);
            self.tiles.extend(firsts.map(|first| StepTile {
                sequence,
                first: first as u32,
            }));
        }
        if let Some(sampling) = row.sample {
            self.samples.push(StepSample {
                row: self.rows.len() as u32 - 1,
                slot: row.slot,
                out: out as u32,
                top_k: sampling.top_k,
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                seed: sampling.seed,
                position: end as u64,
            });
        }
    }

    /// Whether a graph of decoding sequences does it.
    pub fn only_decodes(&self) -> bool {
        self.decodes == self.sequences.len()
    }

    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Fills up to a graph's batch with places that aren't taken, and gives each sequence a sample.
    pub fn pad(&mut self, bucket: usize) {
        let mut samples = Vec::with_capacity(bucket);
        let mut asked = self.samples.iter().peekable();
        for row in 0..bucket as u32 {
            samples.push(match asked.next_if(|sample| sample.row == row) {
                Some(sample) => *sample,
                None => StepSample {
                    row,
                    out: NOWHERE,
                    ..StepSample::default()
                },
            });
        }
        self.samples = samples;
        self.rows.resize(bucket, StepRow::default());
        self.sequences.resize(bucket, StepSequence::default());
        self.decodes = bucket;
    }

    pub fn layout(&self) -> Layout {
        Layout {
            rows: self.rows.len(),
            sequences: self.sequences.len(),
            decodes: self.decodes,
            samples: self.samples.len(),
            tiles: self.tiles.len(),
            blocks: self.blocks.len(),
        }
    }

    /// Puts it into pinned memory, and gives its bytes.
    pub fn write(&self, to: &mut Pinned<u8>) -> Result<usize, CudaError> {
        let layout = self.layout();
        to.put(0, &self.rows)?;
        to.put(layout.sequences_at(), &self.sequences)?;
        to.put(layout.samples_at(), &self.samples)?;
        to.put(layout.tiles_at(), &self.tiles)?;
        to.put(layout.blocks_at(), &self.blocks)?;
        Ok(layout.bytes())
    }
}

/// Everything that a kernel would follow blindly.
fn check(batch: &StepBatch, bounds: &Bounds) -> Result<(), String> {
    let sizes = &bounds.sizes;
    let tokens: usize = batch.rows.iter().map(|row| row.tokens.len()).sum();
    if batch.rows.len() > sizes.max_sequences || tokens > sizes.max_rows {
        return Err(format!(
            "a step of {} sequences and {tokens} tokens is more than {} and {}, what was set up for",
            batch.rows.len(),
            sizes.max_sequences,
            sizes.max_rows
        ));
    }
    for row in &batch.rows {
        let slot = row.slot;
        let end = row.start as usize + row.tokens.len();
        if row.tokens.is_empty() {
            return Err(format!("slot {slot} has a row without tokens"));
        }
        if slot as usize >= sizes.max_sequences {
            return Err(format!("slot {slot} is outside {}", sizes.max_sequences));
        }
        if end > sizes.max_model_len {
            return Err(format!(
                "slot {slot} ends at {end}, past {}",
                sizes.max_model_len
            ));
        }
        if row.blocks.len() * BLOCK_SIZE < end {
            return Err(format!(
                "slot {slot}: {} blocks don't hold {end} tokens",
                row.blocks.len()
            ));
        }
        if let Some(block) = row.blocks.iter().find(|&&b| b as usize >= bounds.blocks) {
            return Err(format!(
                "slot {slot}: block {block} is outside the KV cache of {}",
                bounds.blocks
            ));
        }
        let outside = row.tokens.iter().find_map(|token| match token {
            InputToken::Known(id) if *id as usize >= bounds.vocab => Some(id),
            _ => None,
        });
        if let Some(id) = outside {
            return Err(format!(
                "token {id} is outside the vocabulary of {}",
                bounds.vocab
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoker_engine::executor::Sampling;

    const BOUNDS: Bounds = Bounds {
        sizes: Sizes {
            max_model_len: 100,
            max_sequences: 8,
            max_rows: 64,
        },
        blocks: 20,
        vocab: 50,
        tile_tokens: 10,
    };

    fn row(slot: u32, start: u32, tokens: usize, sampled: bool) -> Row {
        let blocks = (start as usize + tokens).div_ceil(BLOCK_SIZE);
        Row {
            slot,
            tokens: vec![InputToken::Known(7); tokens],
            start,
            blocks: (0..blocks as u32).map(|b| (b + slot) % 20).collect(),
            sample: sampled.then_some(Sampling {
                temperature: 0.5,
                top_p: 0.9,
                top_k: 3,
                seed: 11,
            }),
        }
    }

    #[test]
    fn single_rows_come_first_and_tokens_find_their_way_back() {
        let mut decode = row(3, 17, 1, true);
        decode.tokens = vec![InputToken::FromPreviousStep];
        let batch = StepBatch {
            rows: vec![row(1, 0, 25, false), decode, row(2, 30, 3, true)],
        };
        let mut packed = Packed::default();
        packed.fill(&batch, &BOUNDS, 100..108).unwrap();
        let layout = packed.layout();
        assert_eq!((layout.rows, layout.sequences, layout.decodes), (29, 3, 1));
        assert!(!packed.only_decodes());
        assert_eq!(packed.rows[0].token, PREVIOUS | 3);
        assert_eq!((packed.rows[0].position, packed.rows[0].block), (17, 4));
        let firsts: Vec<u32> = packed.sequences.iter().map(|s| s.first_row).collect();
        assert_eq!(firsts, [0, 1, 26]);
        let tiles: Vec<(u32, u32)> = packed.tiles.iter().map(|t| (t.sequence, t.first)).collect();
        assert_eq!(tiles, [(1, 0), (1, 10), (1, 20), (2, 0)]);
        let samples: Vec<_> = packed
            .samples
            .iter()
            .map(|s| (s.row, s.slot, s.out, s.position))
            .collect();
        assert_eq!(samples, [(0, 3, 101, 18), (28, 2, 102, 33)]);
        assert_eq!(
            packed.blocks[packed.sequences[2].table as usize..],
            [2, 3, 4]
        );
        assert!(Layout::most_bytes(&BOUNDS.sizes) >= layout.bytes());
    }

    #[test]
    fn a_graphs_batch_is_filled_up() {
        let batch = StepBatch {
            rows: vec![row(0, 5, 1, true), row(1, 6, 1, false), row(2, 7, 1, true)],
        };
        let mut packed = Packed::default();
        packed.fill(&batch, &BOUNDS, 0..8).unwrap();
        assert!(packed.only_decodes());
        packed.pad(5);
        let outs: Vec<u32> = packed.samples.iter().map(|s| s.out).collect();
        assert_eq!(outs, [0, NOWHERE, 2, NOWHERE, NOWHERE]);
        assert_eq!(packed.sequences[3].rows, 0);
        let graph = Layout::of_decodes(5, &BOUNDS.sizes);
        let layout = packed.layout();
        assert_eq!(
            (layout.blocks_at(), layout.samples_at()),
            (graph.blocks_at(), graph.samples_at())
        );
        assert!(layout.bytes() <= graph.bytes());
    }

    #[test]
    fn what_a_kernel_would_follow_blindly_is_refused() {
        let mut far = row(0, 0, 1, true);
        far.blocks = vec![20];
        let mut short = row(0, 16, 1, true);
        short.blocks.pop();
        let mut token = row(0, 0, 1, true);
        token.tokens = vec![InputToken::Known(50)];
        for (bad, word) in [
            (far, "block 20"),
            (short, "don't hold"),
            (token, "token 50"),
            (row(8, 0, 1, true), "slot 8"),
            (row(0, 99, 2, true), "ends at 101"),
            (row(0, 0, 65, true), "65 tokens"),
            (row(0, 0, 0, true), "without tokens"),
        ] {
            let batch = StepBatch { rows: vec![bad] };
            let error = Packed::default().fill(&batch, &BOUNDS, 0..8).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
