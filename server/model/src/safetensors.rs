//! A folder as Hugging Face's hub has it: config.json and weights in one or several safetensors
//! files (<https://github.com/huggingface/safetensors>), listed in model.safetensors.index.json.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;
use half::f16;
use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;

use crate::{
    error::LoadError,
    tensor::{self, TensorHandle},
};

pub const CONFIG: &str = "config.json";
pub const INDEX: &str = "model.safetensors.index.json";
pub const SINGLE: &str = "model.safetensors";

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Tensor names by GGUF's name for them; those of a layer without `blk.<layer>.` and
/// `model.layers.<layer>.`.
const NAMES: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];
const LAYER_NAMES: [(&str, &str); 14] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

/// A file's name for the tensor that GGUF calls `name`, where it has one.
fn translate(name: &str) -> Option<String> {
    let find = |table: &[(&str, &'static str)], name: &str| {
        table
            .iter()
            .find(|(ours, _)| *ours == name)
            .map(|(_, theirs)| *theirs)
    };
    match name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
    {
        Some((layer, part)) => {
            find(&LAYER_NAMES, part).map(|part| format!("model.layers.{layer}.{part}"))
        }
        None => find(&NAMES, name).map(str::to_owned),
    }
}

pub struct SafetensorsFolder {
    folder: PathBuf,
    files: Vec<Shard>,
    /// Which file holds a tensor, by its name there.
    places: HashMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the tensors' bytes begin.
    data: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl SafetensorsFolder {
    pub fn open(folder: &Path) -> Result<Self, LoadError> {
        let names = weight_files(folder)?;
        let files = names
            .iter()
            .map(|name| Shard::open(folder.join(name)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut places = HashMap::new();
        for (i, shard) in files.iter().enumerate() {
            for name in shard.header.offset_keys() {
                if places.insert(name.clone(), i).is_some() {
                    return Err(shard.error(format!("tensor {name} is in another file, too")));
                }
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            files,
            places,
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        translate(name).is_some_and(|name| self.places.contains_key(&name))
    }

    /// Finds the tensor that GGUF calls `name` and checks its shape: `[rows, cols]`, or `[cols]`
    /// for a vector.
    pub fn tensor(&self, name: &str, expected: &[usize]) -> Result<TensorHandle, LoadError> {
        let missing = || LoadError::MissingTensor { name: name.into() };
        let name = translate(name).ok_or_else(missing)?;
        let missing = || LoadError::MissingTensor { name: name.clone() };
        let &file = self.places.get(&name).ok_or_else(missing)?;
        let shard = self.files.get(file).ok_or_else(missing)?;
        let info = shard.header.info(&name).ok_or_else(missing)?;
        if info.shape != expected {
            return Err(LoadError::TensorShape {
                name,
                found: info.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        let dtype = match info.dtype {
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            Dtype::F32 => GgmlDType::F32,
            other => {
                return Err(LoadError::TensorType {
                    name,
                    found: format!("{other:?}"),
                });
            }
        };
        let offset = shard.data + info.data_offsets.0 as u64;
        TensorHandle::new(&name, expected, dtype, file, offset)
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.places
            .iter()
            .filter_map(|(name, &file)| self.files.get(file)?.header.info(name))
            .map(|info| info.shape.iter().product::<usize>() as u64)
            .sum()
    }

    /// Reads some rows.
    pub fn rows(&self, tensor: &TensorHandle, rows: Range<usize>) -> Result<Vec<f32>, LoadError> {
        let shard = self.shard_of(tensor)?;
        tensor::read_rows(&shard.file, tensor, rows)
            .map_err(|message| shard.error(format!("tensor {}: {message}", tensor.name)))
    }

    /// Reads some rows as they are, into room for exactly these.
    pub fn bytes(
        &self,
        tensor: &TensorHandle,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        let shard = self.shard_of(tensor)?;
        tensor::read_bytes(&shard.file, tensor, rows, out)
            .map_err(|message| shard.error(format!("tensor {}: {message}", tensor.name)))
    }

    /// [`Self::rows`] as f16.
    pub fn halves(
        &self,
        tensor: &TensorHandle,
        rows: Range<usize>,
        out: &mut [f16],
    ) -> Result<(), LoadError> {
        let shard = self.shard_of(tensor)?;
        tensor::read_halves(&shard.file, tensor, rows, out)
            .map_err(|message| shard.error(format!("tensor {}: {message}", tensor.name)))
    }

    fn shard_of(&self, tensor: &TensorHandle) -> Result<&Shard, LoadError> {
        self.files
            .get(tensor.file)
            .ok_or_else(|| LoadError::MissingTensor {
                name: tensor.name.clone(),
            })
    }
}

/// Names of the files with weights, in order.
fn weight_files(folder: &Path) -> Result<Vec<String>, LoadError> {
    let index = folder.join(INDEX);
    if !index.is_file() {
        if !folder.join(SINGLE).is_file() {
            return Err(LoadError::NoModel {
                path: folder.to_owned(),
                problem: format!("there is no {SINGLE} and no {INDEX}"),
            });
        }
        return Ok(vec![SINGLE.to_owned()]);
    }
    let text = std::fs::read(&index).map_err(|source| LoadError::Open {
        path: index.clone(),
        source,
    })?;
    weight_files_of_index(&text).map_err(|message| LoadError::File {
        path: index,
        message,
    })
}

/// Names of the files that a model.safetensors.index.json lists, in order; an error says what is
/// wrong with it.
pub fn weight_files_of_index(text: &[u8]) -> Result<Vec<String>, String> {
    let index: Index = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() {
        return Err("it lists no tensors".to_owned());
    }
    // The names come from somewhere else and become paths.
    match names
        .iter()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        Some(name) => Err(format!("it names {name:?}, which isn't a file beside it")),
        None => Ok(names.into_iter().collect()),
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, LoadError> {
        let open_error = |source| LoadError::Open {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(open_error)?;
        let size = file.metadata().map_err(open_error)?.len();
        match read_header(&file, size) {
            Ok((header, data)) => Ok(Self {
                path,
                file,
                header,
                data,
            }),
            Err(message) => Err(LoadError::File { path, message }),
        }
    }

    fn error(&self, message: String) -> LoadError {
        LoadError::File {
            path: self.path.clone(),
            message,
        }
    }
}

/// The header, and where the data after it begins. A file of another length than its header says
/// was cut, so that is noticed before any tensor is read.
fn read_header(file: &File, size: u64) -> Result<(Metadata, u64), String> {
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(|e| format!("the header's length: {e}"))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length + 8 > size {
        return Err(format!(
            "it isn't a safetensors file, or cut: a header of {length} bytes in a file of {size}"
        ));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8)
        .map_err(|e| format!("the header: {e}"))?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|e| format!("the header: {e}"))?;
    let data = 8 + length;
    let expected = data + header.data_len() as u64;
    if expected != size {
        return Err(format!(
            "it has {size} bytes where its header says {expected}"
        ));
    }
    Ok((header, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated() {
        let name = |ours| translate(ours).unwrap_or_default();
        assert_eq!(name("token_embd.weight"), "model.embed_tokens.weight");
        assert_eq!(
            name("blk.12.attn_k.bias"),
            "model.layers.12.self_attn.k_proj.bias"
        );
        assert_eq!(translate("rope_freqs.weight"), None);
        assert_eq!(translate("blk.0.token_embd.weight"), None);
    }

    #[test]
    fn an_index_that_leaves_its_folder_is_refused() {
        for name in ["../x.safetensors", "/etc/passwd", "a/b", ".hidden"] {
            let index = serde_json::json!({"weight_map": {"a": name}}).to_string();
            let error = weight_files_of_index(index.as_bytes()).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
        let index = br#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#;
        assert_eq!(
            weight_files_of_index(index).unwrap(),
            ["1.safetensors", "2.safetensors"]
        );
        assert!(weight_files_of_index(b"{\"weight_map\": {}}").is_err());
    }
}
