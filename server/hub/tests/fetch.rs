//! Models from a stand-in hub that misbehaves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common {
    pub mod stand_in;
}

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::stand_in::{Fault, GOOD_TOKEN, OTHER_TOKEN, StandIn, hex};
use sha2::{Digest, Sha256};
use stoker_hub::{HubError, ModelSource, Options, Patience, Progress, Token, fetch};

const MODEL: &str = "test/tiny";
const WEIGHTS: usize = 300_000;

fn content(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

/// A hub with a checkpoint of two shards.
fn sha256(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

fn hub() -> StandIn {
    let hub = StandIn::start();
    let index = serde_json::json!({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
    hub.add(
        MODEL,
        &[
            ("config.json", b"{\"hidden_size\": 64}".to_vec()),
            ("tokenizer.json", content(5, 5000)),
            ("README.md", b"not needed".to_vec()),
            ("consolidated.safetensors", content(9, 1000)),
            (
                "model.safetensors.index.json",
                index.to_string().into_bytes(),
            ),
            ("model-00001-of-00002.safetensors", content(1, WEIGHTS)),
            ("model-00002-of-00002.safetensors", content(2, 1000)),
        ],
    );
    hub
}

fn options(hub: &StandIn, cache: &Path) -> Options {
    Options {
        endpoint: Some(hub.url.clone()),
        token: None,
        cache: cache.to_owned(),
        patience: Patience {
            connect: Duration::from_secs(5),
            stall: Duration::from_secs(4),
            attempts: 4,
            first_pause: Duration::from_millis(10),
            longest_pause: Duration::from_millis(50),
        },
    }
}

async fn get(source: &str, options: &Options) -> Result<PathBuf, HubError> {
    fetch(&source.parse::<ModelSource>()?, options, &|_| {}).await
}

#[track_caller]
fn assert_complete(path: &Path) {
    let read = |name: &str| fs::read(path.join(name)).unwrap();
    assert_eq!(
        read("model-00001-of-00002.safetensors"),
        content(1, WEIGHTS)
    );
    assert_eq!(read("model-00002-of-00002.safetensors"), content(2, 1000));
    assert_eq!(read("tokenizer.json"), content(5, 5000));
    let leftovers = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".incomplete")).count()
    };
    let blobs = path.parent().unwrap().parent().unwrap().join("blobs");
    assert_eq!(leftovers(&blobs), 0);
}

#[track_caller]
fn assert_error(result: Result<PathBuf, HubError>, parts: &[&str]) -> String {
    let text = result.expect_err("it must fail").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    text
}

#[tokio::test]
async fn a_checkpoint_is_fetched_in_the_layout_of_hugging_faces_tools() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let path = get("hf://test/tiny", &options(&hub, cache.path()))
        .await
        .unwrap();
    let commit = hub.commit(MODEL);
    let folder = cache.path().join("models--test--tiny");
    assert_eq!(path, folder.join("snapshots").join(&commit));
    assert_complete(&path);
    assert_eq!(
        fs::read_to_string(folder.join("refs/main")).unwrap(),
        commit
    );
    assert!(
        fs::read_link(path.join("config.json"))
            .unwrap()
            .starts_with("../../blobs")
    );
    assert!(!path.join("README.md").exists() && !path.join("consolidated.safetensors").exists());
    // Again: nothing is downloaded twice.
    let sent = hub.sent();
    assert_eq!(
        get("hf://test/tiny@main", &options(&hub, cache.path()))
            .await
            .unwrap(),
        path
    );
    assert_eq!(hub.sent(), sent);
}

#[tokio::test]
async fn the_token_goes_to_the_hub_and_nowhere_else() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.repository(MODEL, |r| r.gated = true);
    let mut options = options(&hub, cache.path());
    let without = get("hf://test/tiny", &options).await;
    assert_error(without, &["401", "Sorry: GatedRepo", "HF_TOKEN"]);
    options.token = Some(Token::new(OTHER_TOKEN).unwrap());
    let text = assert_error(
        get("hf://test/tiny", &options).await,
        &["403", "accept its terms"],
    );
    assert!(!text.contains(OTHER_TOKEN), "{text}");
    options.token = Some(Token::new("hf_mistyped").unwrap());
    assert_error(
        get("hf://test/tiny", &options).await,
        &["401", "isn't accepted"],
    );
    options.token = Some(Token::new(GOOD_TOKEN).unwrap());
    assert_complete(&get("hf://test/tiny", &options).await.unwrap());
    let seen = hub.seen();
    let (storage, hub): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.storage);
    assert!(!storage.is_empty() && storage.iter().all(|seen| seen.token.is_none()));
    assert!(hub.iter().any(|seen| seen.token.is_some()));
    assert!(!format!("{options:?}").contains(GOOD_TOKEN));
}

#[tokio::test]
async fn cuts_are_resumed_where_they_happened() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    // More cuts than attempts: each brings something.
    hub.fault("?signature", 6, Fault::Cut(40_000));
    let path = get("hf://test/tiny", &options(&hub, cache.path()))
        .await
        .unwrap();
    assert_complete(&path);
    let most: usize = hub.seen().iter().map(|seen| seen.from).max().unwrap();
    assert!(most >= 160_000, "resumed at {most} at the latest");
    // What the kernel still held when a connection was cut may come twice.
    assert!(hub.sent() < WEIGHTS * 2, "{} bytes were sent", hub.sent());
}

#[tokio::test]
async fn another_process_goes_on_where_one_ended() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let options = options(&hub, cache.path());
    hub.fault("?signature", 1000, Fault::Cut(0));
    assert!(matches!(
        get("hf://test/tiny", &options).await,
        Err(HubError::Unreachable { attempts: 4, .. })
    ));
    // What it would have left after a while.
    let blobs = cache.path().join("models--test--tiny/blobs");
    let sum = sha256(&content(1, WEIGHTS));
    let partial = blobs.join(format!("{sum}.incomplete"));
    fs::write(&partial, &content(1, WEIGHTS)[..200_000]).unwrap();
    let hub = self::hub();
    let options = self::options(&hub, cache.path());
    let seen = RefCell::new(Vec::new());
    let source: ModelSource = "hf://test/tiny".parse().unwrap();
    let path = fetch(&source, &options, &|p| seen.borrow_mut().push(p))
        .await
        .unwrap();
    assert_complete(&path);
    assert_eq!(hub.sent(), WEIGHTS - 200_000 + 1000);
    // Progress counts what was missing, and ends with all of it.
    let seen = seen.into_inner();
    assert!(seen.windows(2).all(|w| w[0].done <= w[1].done), "{seen:?}");
    let last = seen.last().unwrap();
    assert_eq!(last.done, last.total);
    assert_eq!(seen[0].done, 0);
    assert!((101_000..110_000).contains(&last.total), "{last:?}");
}

#[tokio::test]
async fn a_damaged_beginning_is_noticed_and_fetched_again() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let options = options(&hub, cache.path());
    hub.fault("?signature", 1, Fault::Damage);
    assert_complete(&get("hf://test/tiny", &options).await.unwrap());
    assert!(hub.sent() > WEIGHTS);
}

#[tokio::test]
async fn a_file_that_stays_damaged_is_refused_with_both_checksums() {
    for part in ["?signature", "config.json"] {
        let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
        hub.fault(part, 1000, Fault::Damage);
        let result = get("hf://test/tiny", &options(&hub, cache.path())).await;
        assert_error(result, &["arrived damaged 2 times", "checksum"]);
        let folder = cache.path().join("models--test--tiny");
        assert!(!folder.join("snapshots").exists());
    }
}

#[tokio::test]
async fn a_wrong_length_is_never_taken_for_the_file() {
    for (by, times) in [(-5, 1), (5, 1), (-5, 1000), (5, 1000)] {
        let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
        hub.fault("?signature", times, Fault::Length(by));
        let result = get("hf://test/tiny", &options(&hub, cache.path())).await;
        match times {
            1 => assert_complete(&result.unwrap()),
            _ => drop(assert_error(
                result,
                &["the server wants to send", "are missing"],
            )),
        }
    }
}

#[tokio::test]
async fn servers_without_ranges_or_with_wrong_ones_start_over() {
    for fault in [Fault::NoRanges, Fault::WrongRange] {
        let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
        hub.fault("?signature", 1, Fault::Cut(100_000));
        hub.fault("?signature", 1, fault);
        assert_complete(
            &get("hf://test/tiny", &options(&hub, cache.path()))
                .await
                .unwrap(),
        );
    }
}

#[tokio::test]
async fn passing_errors_are_waited_out() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.fault("/api/", 2, Fault::Status(500, vec![]));
    hub.fault("tokenizer.json", 2, Fault::Status(503, vec![]));
    hub.fault(
        "?signature",
        1,
        Fault::Status(429, vec![("retry-after", "1")]),
    );
    let started = Instant::now();
    assert_complete(
        &get("hf://test/tiny", &options(&hub, cache.path()))
            .await
            .unwrap(),
    );
    assert!(
        started.elapsed() >= Duration::from_secs(1),
        "Retry-After was ignored"
    );
}

#[tokio::test]
async fn lasting_errors_end_with_the_number_of_tries() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.fault("/api/", 1000, Fault::Status(502, vec![]));
    let result = get("hf://test/tiny", &options(&hub, cache.path())).await;
    assert_error(result, &["hf://test/tiny@main", "502", "tried 4 times"]);
}

#[tokio::test]
async fn a_stalled_connection_counts_as_cut() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    // Of files that come at once, the one that is long enough to stall.
    let weights = sha256(&content(1, WEIGHTS));
    hub.fault(&weights, 1, Fault::Stall(100_000));
    let mut options = options(&hub, cache.path());
    options.patience.stall = Duration::from_millis(500);
    assert_complete(&get("hf://test/tiny", &options).await.unwrap());
    assert!(hub.seen().iter().any(|seen| seen.from > 0));
}

#[tokio::test]
async fn what_isnt_there_is_said() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let options = options(&hub, cache.path());
    hub.add(
        "test/bins",
        &[("config.json", vec![]), ("pytorch_model.bin", vec![1])],
    );
    hub.add(
        "test/ggufs",
        &[("a.Q4.gguf", vec![1]), ("b.Q8.gguf", vec![2])],
    );
    for (source, parts) in [
        ("hf://test/none", &["no such model"][..]),
        ("hf://test/tiny@v9", &["404", "no such revision"]),
        ("hf://test/bins", &["neither safetensors"]),
        (
            "hf://test/ggufs",
            &["several .gguf files", "a.Q4.gguf, b.Q8.gguf"],
        ),
        ("hf://test/ggufs/c.gguf", &["no file c.gguf"]),
    ] {
        let before = hub.seen().len();
        assert_error(get(source, &options).await, parts);
        assert_eq!(hub.seen().len(), before + 1, "{source} was retried");
    }
    let path = get("hf://test/ggufs/b.Q8.gguf", &options).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), [2]);
}

#[tokio::test]
async fn a_disk_too_small_is_told_before_it_is_full() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.repository(MODEL, |repository| {
        let claimed = &mut repository.claimed;
        claimed.insert(
            "model-00001-of-00002.safetensors".into(),
            5_000_000_000_000_000,
        );
    });
    let result = get("hf://test/tiny", &options(&hub, cache.path())).await;
    assert_error(result, &["disk full", "5000.0 TB", " free"]);
    assert_eq!(hub.sent(), 0);
}

#[tokio::test]
async fn a_cache_that_cant_be_written_is_named() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let file = cache.path().join("file");
    fs::write(&file, "").unwrap();
    let result = get("hf://test/tiny", &options(&hub, &file.join("cache"))).await;
    assert_error(result, &["model cache", "file/cache", "writable"]);
}

#[test]
fn two_at_once_download_once() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.fault("?signature", 2, Fault::Slow(20, Duration::from_millis(60)));
    let fetch_in_thread = || {
        let options = options(&hub, cache.path());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let seen = RefCell::new(Vec::<Progress>::new());
            let source: ModelSource = "hf://test/tiny".parse().unwrap();
            let path = runtime
                .unwrap()
                .block_on(fetch(&source, &options, &|p| seen.borrow_mut().push(p)));
            (path.unwrap(), seen.into_inner())
        })
    };
    let threads = [fetch_in_thread(), fetch_in_thread()];
    let results = threads.map(|thread| thread.join().unwrap());
    assert_eq!(results[0].0, results[1].0);
    assert_complete(&results[0].0);
    assert_eq!(hub.sent(), WEIGHTS + 1000);
    // The one that waited saw how far the other one was.
    for (_, seen) in &results {
        let total = seen.last().unwrap().total;
        assert!(
            seen.iter().any(|p| p.done > 0 && p.done < total),
            "{seen:?}"
        );
    }
}

#[tokio::test]
async fn a_fetch_that_is_stopped_leaves_its_lock_and_its_bytes() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let options = options(&hub, cache.path());
    hub.fault("?signature", 2, Fault::Slow(100, Duration::from_millis(10)));
    let half = async {
        while hub.sent() < WEIGHTS / 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = get("hf://test/tiny", &options) => unreachable!("it was over too early"),
        () = half => {}
    }
    assert_complete(&get("hf://test/tiny", &options).await.unwrap());
    assert!(hub.seen().iter().any(|seen| seen.from > 0), "it began anew");
}

#[tokio::test]
async fn what_is_in_the_cache_needs_no_hub() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let mut options = options(&hub, cache.path());
    let path = get("hf://test/tiny", &options).await.unwrap();
    let by_commit = format!("hf://test/tiny@{}", hub.commit(MODEL));
    let requests = hub.seen().len();
    assert_eq!(get(&by_commit, &options).await.unwrap(), path);
    assert_eq!(hub.seen().len(), requests, "a commit never changes");
    hub.go_down();
    assert_eq!(get("hf://test/tiny", &options).await.unwrap(), path);
    options.endpoint = None;
    assert_eq!(get("hf://test/tiny", &options).await.unwrap(), path);
    assert_error(
        get("hf://test/other", &options).await,
        &["--hub-endpoint", "HF_ENDPOINT"],
    );
    // Incomplete is as good as not there.
    fs::remove_file(fs::canonicalize(path.join("model-00002-of-00002.safetensors")).unwrap())
        .unwrap();
    assert_error(get("hf://test/tiny", &options).await, &["--hub-endpoint"]);
}

#[tokio::test]
async fn a_branch_that_moved_on_is_fetched_anew() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let options = options(&hub, cache.path());
    let old = get("hf://test/tiny", &options).await.unwrap();
    hub.repository(MODEL, |repository| {
        repository.commit = "f".repeat(40);
        repository
            .files
            .insert("config.json".into(), b"{}".to_vec());
    });
    let sent = hub.sent();
    let new = get("hf://test/tiny", &options).await.unwrap();
    assert_ne!(old, new);
    assert_complete(&new);
    assert_eq!(fs::read(new.join("config.json")).unwrap(), b"{}");
    assert_eq!(hub.sent(), sent, "the weights are the same");
}

#[tokio::test]
async fn a_renamed_repository_is_followed() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.moved("old/name", MODEL);
    hub.repository(MODEL, |r| r.gated = true);
    let mut options = options(&hub, cache.path());
    options.token = Some(Token::new(GOOD_TOKEN).unwrap());
    assert_complete(&get("hf://old/name", &options).await.unwrap());
}

#[tokio::test]
async fn a_file_of_a_web_server_is_kept_by_its_version() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.add("test/ggufs", &[("m.gguf", content(7, 50_000))]);
    let mut options = options(&hub, cache.path());
    options.endpoint = None;
    let url = format!("{}/test/ggufs/resolve/main/m.gguf?key=s3cr3t", hub.url);
    hub.fault("?signature", 1, Fault::Cut(20_000));
    let path = get(&url, &options).await.unwrap();
    assert_eq!(path.file_name().unwrap(), "m.gguf");
    assert_eq!(fs::read(&path).unwrap(), content(7, 50_000));
    assert!(
        hub.seen().iter().any(|seen| seen.from > 0),
        "the cut wasn't resumed"
    );
    // Another version, then no server.
    hub.add("test/ggufs", &[("m.gguf", content(8, 50_000))]);
    let new = get(&url, &options).await.unwrap();
    assert_eq!(fs::read(&new).unwrap(), content(8, 50_000));
    hub.go_down();
    assert_eq!(get(&url, &options).await.unwrap(), new);
    let error = get(&url.replace("/m.gguf", "/x.gguf"), &options).await;
    let text = assert_error(error, &["can't be fetched", "tried 4 times"]);
    assert!(!text.contains("s3cr3t"), "{text}");
}
