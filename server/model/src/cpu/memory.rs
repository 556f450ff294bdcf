//! How much memory the KV cache may take.

use std::{fs, path::Path};

use stoker_kernels::{BLOCK_SIZE, KvCache};

use crate::{
    config::ModelConfig,
    cpu::Forward,
    error::LoadError,
    load::{KvMemory, LoadOptions},
};

/// Logits of the rows that are sampled at once, and their weights while sampling.
const LOGIT_ROWS: u64 = 64;

/// Bytes of keys and values that a block takes over all layers.
pub(super) fn block_bytes(config: &ModelConfig) -> u64 {
    let shape = config.attention;
    (config.layers * KvCache::block_bytes(shape.kv_heads, shape.head_size)) as u64
}

/// Blocks of the KV cache: what the memory holds, but no more than sequences can use.
pub(super) fn blocks(
    config: &ModelConfig,
    max_model_len: u32,
    options: &LoadOptions,
) -> Result<u32, LoadError> {
    let budget = match options.kv_memory {
        KvMemory::Bytes(bytes) => bytes,
        KvMemory::Utilization(share) if share > 0.0 && share <= 1.0 => {
            memory_budget(share).saturating_sub(activation_bytes(config, options))
        }
        KvMemory::Utilization(share) => {
            return Err(LoadError::Option {
                name: "gpu-memory-utilization",
                value: share.to_string(),
                expected: "above 0 and at most 1",
            });
        }
    };
    let block_bytes = block_bytes(config);
    let per_sequence = u64::from(max_model_len).div_ceil(BLOCK_SIZE as u64);
    let fit = budget / block_bytes;
    if fit < per_sequence {
        return Err(LoadError::KvMemory {
            available: budget,
            fit: fit * BLOCK_SIZE as u64,
            max_model_len,
            needed: per_sequence * block_bytes,
        });
    }
    let useful = per_sequence.saturating_mul(u64::from(options.max_num_seqs));
    Ok(u32::try_from(fit.min(useful)).unwrap_or(u32::MAX))
}

/// What a step at the ceilings of the dials needs beside the weights and the KV cache.
fn activation_bytes(config: &ModelConfig, options: &LoadOptions) -> u64 {
    let rows = Forward::values_per_row(config) as u64 * u64::from(options.max_num_batched_tokens);
    let logits = LOGIT_ROWS * config.vocab as u64;
    (rows + logits) * size_of::<f32>() as u64
}

/// `share` of the memory that the process may use, less what it has in use already.
fn memory_budget(share: f64) -> u64 {
    let mut budget = u64::MAX;
    if let Some(limit) = cgroup_limit() {
        budget = ((limit as f64 * share) as u64).saturating_sub(resident_bytes().unwrap_or(0));
    }
    // What others use of the machine isn't ours, limit or no limit.
    if let Some(available) = available_bytes() {
        budget = budget.min((available as f64 * share) as u64);
    }
    budget
}

/// The smallest memory limit of the process's cgroup and those above it, version 1 or 2.
fn cgroup_limit() -> Option<u64> {
    let membership = fs::read_to_string("/proc/self/cgroup").ok()?;
    membership
        .lines()
        .filter_map(|line| {
            // hierarchy:controllers:path
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            if controllers.is_empty() {
                smallest_limit(Path::new("/sys/fs/cgroup"), path, "memory.max")
            } else if controllers.split(',').any(|c| c == "memory") {
                let root = Path::new("/sys/fs/cgroup/memory");
                smallest_limit(root, path, "memory.limit_in_bytes")
            } else {
                None
            }
        })
        .min()
}

/// The smallest number in `file` from `root/path` up to `root`. In a container the path may be the
/// host's, which isn't there: then only the root, the container's own cgroup, counts.
fn smallest_limit(root: &Path, path: &str, file: &str) -> Option<u64> {
    let own = root.join(path.trim_start_matches('/'));
    own.ancestors()
        .take_while(|folder| folder.starts_with(root))
        .filter_map(|folder| fs::read_to_string(folder.join(file)).ok())
        .filter_map(|text| text.trim().parse().ok())
        .min()
}

fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kibibytes << 10)
}

fn resident_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use stoker_kernels::AttentionShape;

    use super::*;
    use crate::{
        architecture::{LLAMA, PairOrder},
        config::RopeScaling,
    };

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: &LLAMA,
            layers: 30,
            hidden: 576,
            inner: 1536,
            attention: AttentionShape {
                heads: 9,
                kv_heads: 3,
                head_size: 64,
                window: None,
            },
            vocab: 49152,
            context_length: 8192,
            rotated: 64,
            rope_base: 1e5,
            rope_scaling: RopeScaling::None,
            norm_epsilon: 1e-5,
            pairs: PairOrder::Adjacent,
        }
    }

    fn options(kv_memory: KvMemory, max_num_seqs: u32) -> LoadOptions {
        LoadOptions {
            kv_memory,
            max_num_seqs,
            ..LoadOptions::default()
        }
    }

    #[test]
    fn a_token_takes_two_bytes_a_key_and_value_in_every_layer() {
        assert_eq!(block_bytes(&config()), 16 * 30 * 3 * 64 * 2 * 2);
    }

    #[test]
    fn blocks_fill_the_memory_but_not_more_than_sequences_can_use() {
        let memory = KvMemory::Bytes(block_bytes(&config()) * 1000 + 5);
        assert_eq!(blocks(&config(), 8192, &options(memory, 8)).unwrap(), 1000);
        assert_eq!(blocks(&config(), 100, &options(memory, 8)).unwrap(), 7 * 8);
    }

    #[test]
    fn memory_for_less_than_one_sequence_is_refused_with_what_fits() {
        let memory = KvMemory::Bytes(block_bytes(&config()) * 10);
        let error = blocks(&config(), 161, &options(memory, 8)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("hold 160 tokens"), "{text}");
        assert!(
            text.contains("lower --max-model-len to at most 160"),
            "{text}"
        );
        assert_eq!(blocks(&config(), 160, &options(memory, 8)).unwrap(), 10);
    }

    #[test]
    fn a_share_must_be_one() {
        for share in [0.0, -1.0, 1.1, f64::NAN] {
            let result = blocks(&config(), 10, &options(KvMemory::Utilization(share), 1));
            assert!(matches!(result, Err(LoadError::Option { .. })), "{share}");
        }
        assert!(blocks(&config(), 10, &options(KvMemory::Utilization(0.5), 1)).is_ok());
    }

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("pods/one");
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("memory.max"), "max\n").unwrap();
        assert_eq!(smallest_limit(root.path(), "/pods/one", "memory.max"), None);
        fs::write(root.path().join("pods/memory.max"), "5000\n").unwrap();
        assert_eq!(
            smallest_limit(root.path(), "/pods/one", "memory.max"),
            Some(5000)
        );
        fs::write(own.join("memory.max"), "4000\n").unwrap();
        assert_eq!(
            smallest_limit(root.path(), "/pods/one", "memory.max"),
            Some(4000)
        );
        fs::write(root.path().join("memory.max"), "3000\n").unwrap();
        assert_eq!(
            smallest_limit(root.path(), "/elsewhere", "memory.max"),
            Some(3000)
        );
    }
}
