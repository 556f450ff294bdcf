//! What can be wrong with a file or an option, and what the executor does with bad steps.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
#[path = "common/tiny.rs"]
mod tiny;

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use candle_core::quantized::{GgmlDType, gguf_file::Value};
use common::{GREEDY, Request, generate};
use stoker_engine::executor::{Executor, InputToken, Row, StepBatch, Ticket};
use stoker_model::{CpuExecutor, KvMemory, LoadError, LoadOptions, LoadPhase, LoadedModel};
use tempfile::TempDir;
use tiny::TinyFile;

fn options() -> LoadOptions {
    LoadOptions {
        kv_memory: KvMemory::Bytes(4 << 20),
        threads: Some(2),
        ..LoadOptions::default()
    }
}

fn load(path: &Path, options: &LoadOptions) -> Result<LoadedModel, LoadError> {
    LoadedModel::load(path, options, &|_| {})
}

/// Loads the tiny model after a change to its file.
fn load_changed(change: impl FnOnce(&mut TinyFile)) -> Result<LoadedModel, LoadError> {
    let (_folder, path) = write_changed(change);
    load(&path, &options())
}

fn write_changed(change: impl FnOnce(&mut TinyFile)) -> (TempDir, PathBuf) {
    let mut file = TinyFile::new();
    change(&mut file);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    file.write(&path);
    (folder, path)
}

#[track_caller]
fn assert_error(result: Result<LoadedModel, LoadError>, parts: &[&str]) {
    let text = result.err().expect("loading must fail").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

fn executor() -> CpuExecutor {
    load_changed(|_| {}).unwrap().executor
}

#[test]
fn a_file_that_isnt_there_or_isnt_gguf_is_named() {
    let missing = load(Path::new("no/such.gguf"), &options());
    assert_error(missing, &["no/such.gguf", "--model"]);
    let folder = tempfile::tempdir().unwrap();
    assert_error(load(folder.path(), &options()), &["is a directory"]);
    let path = folder.path().join("model.bin");
    std::fs::write(&path, "PK\u{3}\u{4}").unwrap();
    assert_error(
        load(&path, &options()),
        &["model.bin", "isn't a GGUF file", "PK"],
    );
    std::fs::write(&path, "").unwrap();
    assert_error(load(&path, &options()), &["isn't a GGUF file"]);
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (_folder, path) = write_changed(|_| {});
    let bytes = std::fs::read(&path).unwrap();
    let cut = path.with_extension("cut");
    for i in 0..40 {
        // The file ends with up to 31 bytes of padding.
        let len = 4 + (bytes.len() - 40) * i / 39;
        std::fs::write(&cut, &bytes[..len]).unwrap();
        assert_error(load(&cut, &options()), &["damaged or unreadable"]);
    }
}

#[test]
fn no_change_of_a_header_byte_panics() {
    let (_folder, path) = write_changed(|file| {
        file.metadata
            .insert("general.alignment".into(), Value::U32(32));
    });
    let bytes = std::fs::read(&path).unwrap();
    let changed = path.with_extension("changed");
    // Tensor data makes up the last part; most of the header is the vocabulary.
    let header = bytes.len() / 5;
    let mut failed = 0;
    for (i, place) in tiny::random(1, 400).enumerate() {
        let mut bytes = bytes.clone();
        let place = 4 + ((place + 1.0) / 2.0 * (header - 5) as f32) as usize;
        bytes[place] = [0, 1, 0x7F, 0x80, 0xFF][i % 5];
        std::fs::write(&changed, &bytes).unwrap();
        failed += usize::from(load(&changed, &options()).is_err());
    }
    assert!(failed > 50, "only {failed} of 400 changes were noticed");
    let alignment = load_changed(|file| {
        file.metadata
            .insert("general.alignment".into(), Value::U32(0));
    });
    assert_error(alignment, &["damaged or unreadable"]);
}

#[test]
fn what_isnt_supported_is_named_with_its_value() {
    let set = |key: &'static str, value: Value| {
        load_changed(move |file| {
            file.metadata.insert(key.into(), value);
        })
    };
    let string = |s: &str| Value::String(s.into());
    assert_error(
        set("general.architecture", string("mamba")),
        &["\"mamba\"", "supported: llama, mistral, qwen2, qwen3"],
    );
    assert_error(
        set("llama.rope.scaling.type", string("yarn")),
        &["rope.scaling.type", "\"yarn\""],
    );
    assert_error(
        set("llama.expert_count", Value::U32(8)),
        &["llama.expert_count", "8"],
    );
    assert_error(
        set("llama.attention.head_count_kv", Value::U32(4)),
        &["head_count_kv", "is 4"],
    );
    assert_error(
        set("llama.attention.key_length", Value::U32(20)),
        &["key_length", "is 20"],
    );
    assert_error(
        set("llama.block_count", string("three")),
        &["block_count", "String"],
    );
    assert_error(
        set("tokenizer.ggml.model", string("bert")),
        &["tokenizer.ggml.model", "\"bert\""],
    );
    assert_error(
        set("tokenizer.ggml.pre", string("tekken")),
        &["\"tekken\"", "smollm"],
    );
    assert_error(
        set("tokenizer.ggml.eos_token_id", Value::U32(300)),
        &["eos_token_id", "300"],
    );
    assert_error(
        set("tokenizer.chat_template", string("{% if %}")),
        &["tokenizer.chat_template"],
    );
    let missing = load_changed(|file| {
        file.metadata.remove("llama.embedding_length");
    });
    assert_error(missing, &["llama.embedding_length", "missing"]);
}

#[test]
fn tensors_must_be_those_of_the_architecture() {
    let missing = load_changed(|file| {
        file.tensors.remove("blk.1.ffn_up.weight");
    });
    assert_error(missing, &["blk.1.ffn_up.weight is missing"]);
    let shape = load_changed(|file| {
        file.tensor("blk.2.attn_q.weight", &[tiny::HIDDEN, 32], GgmlDType::F16);
    });
    assert_error(shape, &["blk.2.attn_q.weight", "[64, 32]", "[96, 64]"]);
    let unused = load_changed(|file| {
        for layer in 0..tiny::LAYERS {
            file.tensor(&format!("blk.{layer}.attn_q.bias"), &[96], GgmlDType::F32);
        }
    });
    assert_error(
        unused,
        &["blk.0.attn_q.bias, blk.1.attn_q.bias", "wrong answers"],
    );
}

#[test]
fn options_outside_their_range_are_refused() {
    let (_folder, path) = write_changed(|_| {});
    let with = |change: &dyn Fn(&mut LoadOptions)| {
        let mut options = options();
        change(&mut options);
        load(&path, &options)
    };
    assert_error(with(&|o| o.max_model_len = Some(257)), &["257", "1..=256"]);
    assert_error(with(&|o| o.max_model_len = Some(0)), &["--max-model-len 0"]);
    assert_error(with(&|o| o.threads = Some(0)), &["--threads is 0"]);
    assert_error(with(&|o| o.max_num_seqs = 0), &["--max-num-seqs is 0"]);
    assert_error(
        with(&|o| o.kv_memory = KvMemory::Bytes(60_000)),
        &["60000 bytes", "lower --max-model-len to at most 144"],
    );
    let loaded = with(&|o| o.max_model_len = Some(100)).unwrap();
    let capacity = loaded.executor.capacity();
    assert_eq!((capacity.max_model_len, capacity.block_size), (100, 16));
    // 7 blocks a sequence for 128 sequences would be more than 4 MiB hold.
    assert_eq!(capacity.blocks, (4 << 20) / (16 * 2 * 2 * 2 * 16 * 3));
}

#[test]
fn progress_rises_to_100_through_all_phases() {
    let (_folder, path) = write_changed(|_| {});
    let seen = RefCell::new(Vec::new());
    LoadedModel::load(&path, &options(), &|p| seen.borrow_mut().push(p)).unwrap();
    let seen = seen.into_inner();
    assert!(
        seen.windows(2).all(|w| w[0].percent <= w[1].percent),
        "{seen:?}"
    );
    assert_eq!(
        seen.first().map(|p| (p.phase, p.percent)),
        Some((LoadPhase::Header, 0.0))
    );
    assert_eq!(
        seen.last().map(|p| (p.phase, p.percent)),
        Some((LoadPhase::KvCache, 100.0))
    );
    assert!(
        seen.iter()
            .filter(|p| p.phase == LoadPhase::Weights)
            .count()
            > 10
    );
}

fn row(slot: u32, tokens: Vec<InputToken>, start: u32) -> Row {
    Row {
        slot,
        tokens,
        start,
        blocks: vec![slot],
        sample: Some(GREEDY),
    }
}

#[test]
fn a_bad_step_is_an_error_and_the_next_one_runs() {
    let mut executor = executor();
    let blocks = executor.capacity().blocks;
    let known = |id| vec![InputToken::Known(id)];
    for (row, message) in [
        (
            row(0, known(300), 0),
            "token 300 is outside the vocabulary of 300",
        ),
        (
            row(0, vec![InputToken::FromPreviousStep], 0),
            "no token for slot 0",
        ),
        (row(0, vec![], 0), "row without tokens"),
        (row(blocks, known(1), 0), "outside the KV cache"),
        (row(0, known(1), 16), "don't hold position 16"),
        (row(0, known(1), 256), "position 256"),
    ] {
        let ticket = executor.submit(StepBatch { rows: vec![row] }).unwrap();
        let error = executor.wait(ticket).unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    let good = StepBatch {
        rows: vec![row(0, known(1), 0)],
    };
    let ticket = executor.submit(good).unwrap();
    let output = executor.wait(ticket).unwrap();
    assert!(output.tokens[0].is_some_and(|t| t < 300));
    assert!(output.device_time > std::time::Duration::ZERO);
}

#[test]
fn steps_are_waited_for_in_order() {
    let mut executor = executor();
    assert!(executor.wait(Ticket(0)).is_err());
    let first = executor.submit(StepBatch::default()).unwrap();
    let second = executor.submit(StepBatch::default()).unwrap();
    assert!(executor.wait(second).is_err());
    assert_eq!(executor.wait(first).unwrap().tokens, []);
    assert_eq!(executor.wait(second).unwrap().tokens, []);
}

#[test]
fn prompts_in_any_chunks_and_batches_generate_the_same() {
    let mut executor = executor();
    let requests: Vec<Request> = (0..6)
        .map(|i| Request {
            prompt: tiny::random(i, 5 + 17 * i as usize)
                .map(|v| ((v + 1.0) * 149.0) as u32)
                .collect(),
            max_tokens: 30,
            eos: vec![299],
            sampling: GREEDY,
        })
        .collect();
    let together = generate(&mut executor, &requests, |step, i| 1 + (step + i) % 7);
    for (request, expected) in requests.iter().zip(&together) {
        let alone = generate(&mut executor, std::slice::from_ref(request), |_, _| 1000);
        assert_eq!(&alone[0], expected);
    }
}
