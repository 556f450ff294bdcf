//! A tensor's place in a file, and reading it a few rows at a time.
//!
//! Bytes are read at their offsets rather than mapped: each is needed once, and a volume that goes
//! away then is an error instead of a SIGBUS.

use std::{borrow::Cow, fs::File, ops::Range, os::unix::fs::FileExt};

use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::error::LoadError;

/// Where a tensor lies: a row-major matrix, or a vector as one row.
#[derive(Clone, Debug)]
pub struct TensorHandle {
    /// As its file calls it.
    pub name: String,
    pub rows: usize,
    pub cols: usize,
    pub(crate) dtype: GgmlDType,
    /// Which of the checkpoint's files holds it.
    pub(crate) file: usize,
    offset: u64,
    pub(crate) row_bytes: usize,
    heads: Option<HalvedHeads>,
}

/// Rows (of a vector: elements) in groups of a head's, the pairs that rope rotates half a head
/// apart.
#[derive(Clone, Copy, Debug)]
struct HalvedHeads {
    size: usize,
    rotated: usize,
}

impl TensorHandle {
    /// `shape` is `[rows, cols]`, or `[cols]` of a vector.
    pub(crate) fn new(
        name: &str,
        shape: &[usize],
        dtype: GgmlDType,
        file: usize,
        offset: u64,
    ) -> Result<Self, LoadError> {
        let cols = shape.last().copied().unwrap_or(0);
        let rows = shape.iter().product::<usize>() / cols.max(1);
        if !cols.is_multiple_of(dtype.block_size()) {
            return Err(LoadError::TensorType {
                name: name.into(),
                found: format!(
                    "{dtype:?} with {cols} columns (not a multiple of {})",
                    dtype.block_size()
                ),
            });
        }
        Ok(Self {
            name: name.into(),
            rows,
            cols,
            dtype,
            file,
            offset,
            row_bytes: cols / dtype.block_size() * dtype.type_size(),
            heads: None,
        })
    }

    /// The same tensor, of which reading puts the pairs that rope rotates side by side. Its rows (or
    /// a vector's elements) are those of whole heads of `size`, the first `rotated` dimensions in
    /// two halves.
    pub fn from_halves(mut self, size: usize, rotated: usize) -> Self {
        self.heads = Some(HalvedHeads { size, rotated });
        self
    }
}

impl HalvedHeads {
    /// The rows of the heads that some rows belong to, of `all`.
    fn whole(self, rows: &Range<usize>, all: usize) -> Range<usize> {
        rows.start / self.size * self.size..rows.end.next_multiple_of(self.size).min(all)
    }

    /// Where the element that belongs at `index` stands in the file.
    fn source(self, index: usize) -> usize {
        let (head, dimension) = (index / self.size, index % self.size);
        if dimension >= self.rotated {
            return index;
        }
        head * self.size + dimension % 2 * (self.rotated / 2) + dimension / 2
    }
}

/// Reads some rows as the file has them, into room for exactly these.
pub(crate) fn read_bytes(
    file: &File,
    tensor: &TensorHandle,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<(), String> {
    let read = |rows: Range<usize>, out: &mut [u8]| {
        let offset = (rows.start * tensor.row_bytes) as u64;
        let offset = tensor.offset.saturating_add(offset);
        file.read_exact_at(out, offset)
            .map_err(|e| format!("{} bytes at {offset}: {e}", out.len()))
    };
    let Some(heads) = tensor.heads.filter(|_| tensor.rows > 1) else {
        return read(rows, out);
    };
    let whole = heads.whole(&rows, tensor.rows);
    let mut bytes = vec![0; whole.len() * tensor.row_bytes];
    read(whole.clone(), &mut bytes)?;
    for (row, out) in rows.zip(out.chunks_exact_mut(tensor.row_bytes)) {
        let at = (heads.source(row) - whole.start) * tensor.row_bytes;
        out.copy_from_slice(&bytes[at..at + tensor.row_bytes]);
    }
    Ok(())
}

/// Reads and dequantises some rows; an error says what is wrong with them.
pub(crate) fn read_rows(
    file: &File,
    tensor: &TensorHandle,
    rows: Range<usize>,
) -> Result<Vec<f32>, String> {
    let mut bytes = vec![0; rows.len() * tensor.row_bytes];
    read_bytes(file, tensor, rows.clone(), &mut bytes)?;
    let values: Vec<f32> = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, tensor.dtype)
        .and_then(|storage| QTensor::new(storage, (rows.len(), tensor.cols)))
        .and_then(|q| q.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1())
        .map_err(|e| e.to_string())?;
    Ok(match tensor.heads.filter(|_| tensor.rows == 1) {
        Some(heads) => (0..values.len()).map(|i| values[heads.source(i)]).collect(),
        None => values,
    })
}

/// [`read_rows`] of a matrix as f16, into `out`, which has room for exactly these rows. What f16 can't
/// hold becomes an infinity.
pub(crate) fn read_halves(
    file: &File,
    tensor: &TensorHandle,
    rows: Range<usize>,
    out: &mut [f16],
) -> Result<(), String> {
    let convert: fn([u8; 2]) -> f16 = match tensor.dtype {
        GgmlDType::F16 => f16::from_le_bytes,
        GgmlDType::BF16 => |bytes| f16::from_f32(bf16::from_le_bytes(bytes).to_f32()),
        _ => {
            out.convert_from_f32_slice(&read_rows(file, tensor, rows)?);
            return Ok(());
        }
    };
    let mut bytes = vec![0; rows.len() * tensor.row_bytes];
    read_bytes(file, tensor, rows, &mut bytes)?;
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = convert(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file_of(values: &[f32]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for value in values {
            file.write_all(&value.to_le_bytes()).unwrap();
        }
        file
    }

    /// Two heads of 6 dimensions, of which 4 rotate, 2 columns.
    #[test]
    fn halves_of_a_head_are_interleaved_in_any_range_of_rows() {
        let values: Vec<f32> = (0..24)
            .map(|i| (i / 2) as f32 + 0.5 * (i % 2) as f32)
            .collect();
        let file = file_of(&values);
        let tensor = TensorHandle::new("q", &[12, 2], GgmlDType::F32, 0, 0)
            .unwrap()
            .from_halves(6, 4);
        let order = [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11];
        for start in 0..12 {
            for end in start + 1..=12 {
                let expected: Vec<f32> = order[start..end]
                    .iter()
                    .flat_map(|&row| [row as f32, row as f32 + 0.5])
                    .collect();
                assert_eq!(read_rows(&file, &tensor, start..end).unwrap(), expected);
                let mut halves = vec![f16::ZERO; expected.len()];
                read_halves(&file, &tensor, start..end, &mut halves).unwrap();
                assert_eq!(halves.to_f32_vec(), expected);
            }
        }
    }

    #[test]
    fn halves_come_from_any_type_and_overflow_to_infinity() {
        let values = [1.5, -0.25, 60000.0, 1e5];
        let bytes = |write: &dyn Fn(f32) -> Vec<u8>| {
            let mut file = tempfile::tempfile().unwrap();
            for value in values {
                file.write_all(&write(value)).unwrap();
            }
            file
        };
        for (dtype, file) in [
            (GgmlDType::F32, file_of(&values)),
            (
                GgmlDType::F16,
                bytes(&|v| f16::from_f32(v).to_le_bytes().into()),
            ),
            (
                GgmlDType::BF16,
                bytes(&|v| bf16::from_f32(v).to_le_bytes().into()),
            ),
        ] {
            let tensor = TensorHandle::new("w", &[2, 2], dtype, 0, 0).unwrap();
            let mut halves = vec![f16::NAN; 4];
            read_halves(&file, &tensor, 0..2, &mut halves).unwrap();
            assert_eq!(halves[..2], [f16::from_f32(1.5), f16::from_f32(-0.25)]);
            assert!((halves[2].to_f32() - 60000.0).abs() < 200.0, "{dtype:?}");
            assert!(halves[3].is_infinite(), "{dtype:?}");
        }
    }

    #[test]
    fn a_vector_is_reordered_by_its_elements() {
        let file = file_of(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let bias = TensorHandle::new("b", &[8], GgmlDType::F32, 0, 0)
            .unwrap()
            .from_halves(4, 4);
        assert_eq!(
            read_rows(&file, &bias, 0..1).unwrap(),
            [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
        );
    }
}
