//! Memory for f16 values at the start of a cache line.

use half::{f16, slice::HalfBitsSliceExt};

const ALIGN_BYTES: usize = 64;

/// Zeroed f16 values, aligned to 64 bytes. The operating system gives the pages on first use, so a
/// large buffer costs nothing until it is filled.
#[derive(Debug)]
pub(crate) struct F16Buffer {
    bits: Vec<u16>,
    start: usize,
    len: usize,
}

impl F16Buffer {
    pub(crate) fn zeroed(len: usize) -> Self {
        let slack = ALIGN_BYTES / size_of::<u16>();
        // Zeros of a primitive type are what the allocator hands out without writing them.
        let bits = vec![0u16; len + slack];
        let misaligned = bits.as_ptr().addr() % ALIGN_BYTES;
        let start = (ALIGN_BYTES - misaligned) % ALIGN_BYTES / size_of::<u16>();
        Self { bits, start, len }
    }

    pub(crate) fn as_slice(&self) -> &[f16] {
        self.bits[self.start..self.start + self.len].reinterpret_cast()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f16] {
        self.bits[self.start..self.start + self.len].reinterpret_cast_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_a_cache_line_and_is_zero() {
        for len in [0, 1, 31, 4096] {
            let mut buffer = F16Buffer::zeroed(len);
            assert_eq!(buffer.as_slice().as_ptr().addr() % ALIGN_BYTES, 0);
            assert_eq!(buffer.as_slice(), vec![f16::ZERO; len]);
            assert_eq!(buffer.as_mut_slice().len(), len);
        }
    }
}
