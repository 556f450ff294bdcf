//! Formats of quantised weights, and packing whole numbers and scales as the kernels read them
//! (quantised.cuh).

use half::f16;

/// Columns of a piece's block: four lanes have a piece of 8 values each.
const BLOCK: usize = 32;
/// Rows of a unit.
pub const EIGHT: usize = 8;

/// How a weight is written down: a whole number of so many bits, times the scale of its group, plus the
/// group's least value where the format has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    bits: usize,
    group: usize,
    least: bool,
}

/// Which columns stand together, by the kernels that unpack them.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Runs,
    /// Of Hopper's kernels.
    Fragments,
}

/// One row's values of a unit: [`Format::unit`] whole numbers, and of each group the scale and the
/// least value. A value is its number times the scale plus the least one; in formats without, its
/// number less [`Format::offset`] times the scale.
#[derive(Clone, Debug)]
pub struct UnitRow {
    pub numbers: Vec<u8>,
    pub scales: Vec<[f16; 2]>,
}

impl Format {
    /// Made of f16 weights.
    pub const INT8: Self = Self::new(8, 128, false);
    pub const INT4: Self = Self::new(4, 128, false);
    /// What GGUF's Q8_0 is kept as.
    pub const INT8_BY_32: Self = Self::new(8, 32, false);
    /// What GGUF's Q4_0, Q4_1 and Q4_K are kept as.
    pub const INT4_BY_32: Self = Self::new(4, 32, true);
    /// What GGUF's Q6_K is kept as.
    pub const INT8_BY_16: Self = Self::new(8, 16, false);

    pub const ALL: [Self; 5] = [
        Self::INT8,
        Self::INT4,
        Self::INT8_BY_32,
        Self::INT4_BY_32,
        Self::INT8_BY_16,
    ];

    const fn new(bits: usize, group: usize, least: bool) -> Self {
        Self { bits, group, least }
    }

    /// Of a whole number.
    pub fn bits(self) -> usize {
        self.bits
    }

    /// Values that share a scale.
    pub fn group(self) -> usize {
        self.group
    }

    /// Whether groups have a least value.
    pub fn has_least(self) -> bool {
        self.least
    }

    /// What a number stands above the one it means, in formats without least values.
    pub fn offset(self) -> u8 {
        match self.least {
            true => 0,
            false => 1 << (self.bits - 1),
        }
    }

    /// Columns of a unit: what eight rows have together.
    pub fn unit(self) -> usize {
        self.group.max(64)
    }

    /// Bytes of a unit, with its scales.
    pub fn unit_bytes(self) -> usize {
        self.values_bytes() + self.unit() / self.group * EIGHT * self.scale_bytes()
    }

    /// Whether a matrix is made of whole units, of whole sixteens of rows.
    pub fn fits(self, rows: usize, cols: usize) -> bool {
        cols.is_multiple_of(self.unit()) && rows.is_multiple_of(16)
    }

    /// As kernels are named.
    pub(super) fn name(self) -> String {
        match self.group {
            128 => self.bits.to_string(),
            group => format!("{}by{group}", self.bits),
        }
    }

    fn values_bytes(self) -> usize {
        self.unit() * self.bits
    }

    fn scale_bytes(self) -> usize {
        match self.least {
            true => 2 * size_of::<f16>(),
            false => size_of::<f16>(),
        }
    }

    /// Room for one row's values.
    pub fn unit_row(self) -> UnitRow {
        UnitRow {
            numbers: vec![0; self.unit()],
            scales: vec![[f16::ZERO; 2]; self.unit() / self.group],
        }
    }

    /// Writes the values of one of a unit's eight rows to the unit's [`Format::unit_bytes`] bytes.
    pub fn pack(self, order: Order, row: usize, values: &UnitRow, unit: &mut [u8]) {
        let (packed, scales) = unit.split_at_mut(self.values_bytes());
        // Of a lane in a piece.
        let width = self.bits;
        for (piece, block) in values.numbers.chunks_exact(BLOCK).enumerate() {
            for t in 0..4 {
                let lane = row * 4 + t;
                let at = (piece / 2 * 32 + lane) * 2 * width + piece % 2 * width;
                let value = |i: usize| {
                    u64::from(match order {
                        Order::Runs => block[8 * t + i],
                        Order::Fragments => block[i / 2 * 8 + 2 * t + i % 2],
                    })
                };
                let word = match self.bits {
                    8 => (0..8).fold(0, |word, i| word | value(i) << (8 * i)),
                    // Neighbours stand half a word apart, so that one mask takes both.
                    _ => (0..8).fold(0, |word, i| word | value(i) << (4 * (i / 2 + i % 2 * 4))),
                };
                packed[at..at + width].copy_from_slice(&word.to_le_bytes()[..width]);
            }
        }
        let bytes = self.scale_bytes();
        for (group, [scale, least]) in values.scales.iter().enumerate() {
            let to = &mut scales[(group * EIGHT + row) * bytes..][..bytes];
            to[..2].copy_from_slice(&scale.to_le_bytes());
            if self.least {
                to[2..].copy_from_slice(&least.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number at a column of a row, as quantised.cuh says where it stands.
    fn number(format: Format, order: Order, unit: &[u8], row: usize, col: usize) -> u8 {
        let (piece, at) = (col / 32, col % 32);
        let (t, i) = match order {
            Order::Runs => (at / 8, at % 8),
            Order::Fragments => (at % 8 / 2, at / 8 * 2 + at % 2),
        };
        let piece_at = (piece / 2 * 32 + row * 4 + t) * 2 * format.bits + piece % 2 * format.bits;
        match format.bits {
            8 => unit[piece_at + i],
            _ => {
                let nibble = i / 2 + i % 2 * 4;
                unit[piece_at + nibble / 2] >> (nibble % 2 * 4) & 15
            }
        }
    }

    #[test]
    fn a_unit_has_every_number_and_scale_at_its_place() {
        for format in Format::ALL {
            for order in [Order::Runs, Order::Fragments] {
                let mut unit = vec![0xff; format.unit_bytes()];
                let most = 1usize << format.bits;
                let rows: Vec<UnitRow> = (0..EIGHT)
                    .map(|row| UnitRow {
                        numbers: (0..format.unit())
                            .map(|col| ((row * 37 + col * 11) % most) as u8)
                            .collect(),
                        scales: (0..format.unit() / format.group)
                            .map(|group| {
                                [0.5, 64.0].map(|by| f16::from_f32((row * 8 + group) as f32 * by))
                            })
                            .collect(),
                    })
                    .collect();
                for (row, values) in rows.iter().enumerate() {
                    format.pack(order, row, values, &mut unit);
                }
                for (row, values) in rows.iter().enumerate() {
                    let found: Vec<u8> = (0..format.unit())
                        .map(|col| number(format, order, &unit, row, col))
                        .collect();
                    assert_eq!(found, values.numbers, "{format:?}, {order:?}, row {row}");
                    for (group, [scale, least]) in values.scales.iter().enumerate() {
                        let bytes = format.scale_bytes();
                        let at = format.values_bytes() + (group * EIGHT + row) * bytes;
                        assert_eq!(unit[at..at + 2], scale.to_le_bytes());
                        if format.least {
                            assert_eq!(unit[at + 2..at + 4], least.to_le_bytes());
                        }
                    }
                }
            }
        }
    }
}
