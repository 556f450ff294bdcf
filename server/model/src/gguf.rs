//! A GGUF file (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): metadata by key, and
//! tensors dequantised a few rows at a time.
//!
//! Tensor bytes are read at their offsets (see [`crate::tensor`]).

use std::{
    fs::File,
    io::{BufReader, Read, Seek},
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::quantized::gguf_file::{Content, Value};
use half::f16;

use crate::{
    error::LoadError,
    tensor::{self, TensorHandle},
};

pub struct GgufFile {
    path: PathBuf,
    file: File,
    content: Content,
}

impl GgufFile {
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let open_error = |source| LoadError::Open {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(open_error)?;
        if file.metadata().map_err(open_error)?.is_dir() {
            return Err(open_error(std::io::ErrorKind::IsADirectory.into()));
        }
        let mut magic = Vec::new();
        (&mut file)
            .take(4)
            .read_to_end(&mut magic)
            .map_err(open_error)?;
        if magic != b"GGUF" {
            return Err(LoadError::NotGguf {
                path: path.to_owned(),
                found: String::from_utf8_lossy(&magic).into_owned(),
            });
        }
        file.rewind().map_err(open_error)?;
        let content = read_header(&file).map_err(|message| LoadError::Format {
            path: path.to_owned(),
            message,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            content,
        })
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.content.tensor_infos.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Finds a tensor and checks its shape: `[rows, cols]`, or `[cols]` for a vector.
    pub fn tensor(&self, name: &str, expected: &[usize]) -> Result<TensorHandle, LoadError> {
        let info = self
            .content
            .tensor_infos
            .get(name)
            .ok_or_else(|| LoadError::MissingTensor { name: name.into() })?;
        let found = info.shape.dims();
        if found != expected {
            return Err(LoadError::TensorShape {
                name: name.into(),
                found: found.to_vec(),
                expected: expected.to_vec(),
            });
        }
        let offset = self.content.tensor_data_offset.saturating_add(info.offset);
        TensorHandle::new(name, expected, info.ggml_dtype, 0, offset)
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        let infos = self.content.tensor_infos.values();
        infos.map(|info| info.shape.elem_count() as u64).sum()
    }

    /// Reads and dequantises some rows.
    pub fn rows(&self, tensor: &TensorHandle, rows: Range<usize>) -> Result<Vec<f32>, LoadError> {
        tensor::read_rows(&self.file, tensor, rows)
            .map_err(|message| self.tensor_error(tensor, message))
    }

    /// Reads some rows as they are, into room for exactly these.
    pub fn bytes(
        &self,
        tensor: &TensorHandle,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        tensor::read_bytes(&self.file, tensor, rows, out)
            .map_err(|message| self.tensor_error(tensor, message))
    }

    /// [`Self::rows`] as f16.
    pub fn halves(
        &self,
        tensor: &TensorHandle,
        rows: Range<usize>,
        out: &mut [f16],
    ) -> Result<(), LoadError> {
        tensor::read_halves(&self.file, tensor, rows, out)
            .map_err(|message| self.tensor_error(tensor, message))
    }

    fn tensor_error(&self, tensor: &TensorHandle, message: String) -> LoadError {
        LoadError::Format {
            path: self.path.clone(),
            message: format!("tensor {}: {message}", tensor.name),
        }
    }

    fn get(&self, key: &str) -> Result<&Value, LoadError> {
        self.content
            .metadata
            .get(key)
            .ok_or_else(|| metadata_error(key, "is missing"))
    }

    pub fn string(&self, key: &str) -> Result<&str, LoadError> {
        self.string_opt(key)?
            .ok_or_else(|| metadata_error(key, "is missing"))
    }

    pub fn string_opt(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong_type(key, other, "a string")),
        }
    }

    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(wrong_type(key, other, "a bool")),
        }
    }

    pub fn u32(&self, key: &str) -> Result<u32, LoadError> {
        as_u32(key, self.get(key)?)
    }

    pub fn u32_opt(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let value = self.content.metadata.get(key);
        value.map(|value| as_u32(key, value)).transpose()
    }

    pub fn f32_opt(&self, key: &str) -> Result<Option<f32>, LoadError> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(Value::F32(x)) => Ok(Some(*x)),
            Some(Value::F64(x)) => Ok(Some(*x as f32)),
            Some(other) => Err(wrong_type(key, other, "a float")),
        }
    }

    /// The strings of an array, in order.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, LoadError> {
        self.array(key)?
            .iter()
            .map(|value| match value {
                Value::String(s) => Ok(s.as_str()),
                other => Err(wrong_type(key, other, "an array of strings")),
            })
            .collect()
    }

    /// The numbers of an array, in order.
    pub fn u32s(&self, key: &str) -> Result<Vec<u32>, LoadError> {
        self.array(key)?
            .iter()
            .map(|value| as_u32(key, value))
            .collect()
    }

    /// The floats of an array, in order.
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, LoadError> {
        self.array(key)?
            .iter()
            .map(|value| match value {
                Value::F32(x) => Ok(*x),
                other => Err(wrong_type(key, other, "an array of floats")),
            })
            .collect()
    }

    fn array(&self, key: &str) -> Result<&[Value], LoadError> {
        match self.get(key)? {
            Value::Array(values) => Ok(values),
            other => Err(wrong_type(key, other, "an array")),
        }
    }
}

fn read_header(file: &File) -> Result<Content, String> {
    // candle checks lengths and types, but divides by an alignment of 0.
    std::panic::catch_unwind(|| Content::read(&mut BufReader::new(file)))
        .map_err(|_| "its header makes no sense".to_owned())?
        .map_err(|e| e.to_string())
}

pub(crate) fn metadata_error(key: &str, problem: impl Into<String>) -> LoadError {
    LoadError::Metadata {
        key: key.into(),
        problem: problem.into(),
    }
}

fn wrong_type(key: &str, found: &Value, wanted: &str) -> LoadError {
    metadata_error(key, format!("is {:?}, not {wanted}", found.value_type()))
}

fn as_u32(key: &str, value: &Value) -> Result<u32, LoadError> {
    let number = match value {
        Value::U8(x) => i128::from(*x),
        Value::I8(x) => i128::from(*x),
        Value::U16(x) => i128::from(*x),
        Value::I16(x) => i128::from(*x),
        Value::U32(x) => i128::from(*x),
        Value::I32(x) => i128::from(*x),
        Value::U64(x) => i128::from(*x),
        Value::I64(x) => i128::from(*x),
        other => return Err(wrong_type(key, other, "an integer")),
    };
    u32::try_from(number).map_err(|_| metadata_error(key, format!("is {number}, outside u32")))
}
