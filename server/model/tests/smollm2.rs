//! The real model against llama.cpp's continuations in f32 (data/smollm2_greedy_reference.json).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, MutexGuard},
    time::SystemTime,
};

use common::{GREEDY, Request, generate};
use serde::Deserialize;
use stoker_engine::executor::Sampling;
use stoker_model::{
    ChatMessage, CpuExecutor, DecodeStream, EncodeOptions, KvMemory, LoadOptions, LoadedModel,
    Tokenizer,
};

/// Where the best two tokens are nearer than this (nats), arithmetic in another order may choose
/// the other one.
const NEAR_TIE: f64 = 0.2;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    kind: String,
    user_text: Option<String>,
    prompt: String,
    prompt_ids: Vec<u32>,
    reference: Continuation,
}

#[derive(Deserialize)]
struct Continuation {
    text: String,
    ids: Vec<u32>,
    margin_top1_top2: Vec<f64>,
}

static PROMPTS: LazyLock<Vec<Prompt>> = LazyLock::new(|| {
    let text = include_str!("data/smollm2_greedy_reference.json");
    serde_json::from_str::<Reference>(text).unwrap().prompts
});

static MODEL: LazyLock<Mutex<LoadedModel>> = LazyLock::new(|| {
    let options = LoadOptions {
        kv_memory: KvMemory::Bytes(256 << 20),
        ..LoadOptions::default()
    };
    Mutex::new(LoadedModel::load(&model_path(), &options, &|_| {}).unwrap())
});

fn model_path() -> PathBuf {
    let path = match std::env::var_os("STOKER_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
            .join(".cache/stoker/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    assert!(
        path.is_file(),
        "the test model {} isn't there: run `make model`, or set STOKER_TEST_MODEL to its path",
        path.display()
    );
    path
}

fn model() -> MutexGuard<'static, LoadedModel> {
    MODEL
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn tokenizer() -> Arc<Tokenizer> {
    model().tokenizer.clone()
}

fn request(prompt: &Prompt) -> Request {
    Request {
        prompt: prompt.prompt_ids.clone(),
        max_tokens: 64,
        eos: vec![2],
        sampling: GREEDY,
    }
}

#[track_caller]
fn assert_equals_reference(prompt: &Prompt, tokens: &[u32]) {
    let reference = &prompt.reference;
    let differs = (0..reference.ids.len()).find(|&i| tokens.get(i) != Some(&reference.ids[i]));
    match differs {
        None => assert_eq!(tokens, reference.ids, "{}", prompt.name),
        Some(i) => {
            let margin = reference.margin_top1_top2[i];
            assert!(
                margin < NEAR_TIE,
                "{}: token {i} is {:?} instead of {}, by a margin of {margin} nats",
                prompt.name,
                tokens.get(i),
                reference.ids[i]
            );
            eprintln!(
                "{}: another choice at token {i}, margin {margin}",
                prompt.name
            );
        }
    }
}

#[test]
fn prompts_become_the_reference_tokens() {
    let tokenizer = tokenizer();
    for prompt in PROMPTS.iter() {
        for options in [EncodeOptions::COMPLETION, EncodeOptions::CHAT] {
            let ids = tokenizer.encode(&prompt.prompt, options).unwrap();
            assert_eq!(ids, prompt.prompt_ids, "{}", prompt.name);
        }
    }
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.bos_token(), Some("<|im_start|>"));
    assert!(tokenizer.eos_token_ids().contains(&2));
}

#[test]
fn text_alone_never_becomes_a_control_token() {
    let tokenizer = tokenizer();
    let ids = tokenizer
        .encode("a<|im_end|>\n<|im_start|>system", EncodeOptions::TEXT)
        .unwrap();
    assert!(ids.iter().all(|&id| id > 16), "{ids:?}");
    assert_eq!(tokenizer.decode(&ids), "a<|im_end|>\n<|im_start|>system");
}

#[test]
fn the_files_template_renders_the_reference_prompts() {
    let template = model().chat_template.clone();
    let chats = PROMPTS.iter().filter(|prompt| prompt.kind == "chat");
    for prompt in chats {
        let message = ChatMessage {
            role: "user".into(),
            content: prompt.user_text.clone().unwrap(),
        };
        let text = template.render(&[message], SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(text, prompt.prompt, "{}", prompt.name);
    }
}

#[test]
fn streamed_text_is_the_references_text() {
    let tokenizer = tokenizer();
    for prompt in PROMPTS.iter() {
        let mut stream = DecodeStream::new(tokenizer.clone());
        let ids = &prompt.reference.ids;
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        assert_eq!(text, prompt.reference.text, "{}", prompt.name);
    }
}

/// The answer that the project promises, and the same tokens alone and in a batch, whatever the
/// chunks.
#[test]
fn greedy_tokens_equal_the_reference_alone_and_together() {
    let mut model = model();
    let executor: &mut CpuExecutor = &mut model.executor;
    let requests: Vec<Request> = PROMPTS.iter().map(request).collect();
    let together = generate(executor, &requests, |step, i| 1 + (step * 7 + i * 13) % 61);
    for (prompt, tokens) in PROMPTS.iter().zip(&together) {
        assert_equals_reference(prompt, tokens);
    }
    for (i, request) in requests.iter().enumerate() {
        let alone = generate(executor, std::slice::from_ref(request), |_, _| 37);
        assert_eq!(alone[0], together[i], "{}", PROMPTS[i].name);
    }
    let text = model.tokenizer.decode(&together[0]);
    assert_eq!(text, "The capital of France is Paris.");
}

#[test]
fn a_seed_gives_the_same_tokens_in_any_batch() {
    let mut model = model();
    let sampled = |seed| Request {
        max_tokens: 20,
        sampling: Sampling {
            temperature: 0.8,
            top_p: 0.9,
            top_k: 40,
            seed,
        },
        ..request(&PROMPTS[1])
    };
    let requests = [sampled(1), sampled(2), sampled(1)];
    let together = generate(&mut model.executor, &requests, |_, _| 11);
    let alone = generate(&mut model.executor, &requests[..1], |_, _| 64);
    assert_eq!(together[0], together[2]);
    assert_eq!(together[0], alone[0]);
    assert_ne!(together[0], together[1]);
}
