//! `stoker-advise` as its caller sees it: lines in, lines out.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn talk(lines: &[String]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_stoker-advise"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for line in lines {
        writeln!(input, "{line}").unwrap();
    }
    drop(input);
    child.wait_with_output().unwrap()
}

fn answers(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Two observations of a real fleet, ten minutes apart, its replicas cut to three.
fn recorded() -> Vec<String> {
    include_str!("recorded.jsonl")
        .lines()
        .map(str::to_owned)
        .collect()
}

/// The second one as it would go on: `seconds` later with so many requests a second a replica.
fn later(seconds: f64, rate: f64) -> String {
    let mut observation: Value = serde_json::from_str(&recorded()[1]).unwrap();
    observation["t"] = json!(600.0 + seconds);
    for replica in observation["replicas"].as_array_mut().unwrap() {
        let requests = (rate * seconds).floor();
        for (field, each) in [
            ("arrived", 1.0),
            ("finished", 1.0),
            ("arrived_prompt_tokens", 1150.0),
            ("prompt_tokens", 1150.0),
            ("finished_generation_tokens", 210.0),
            ("generation_tokens", 210.0),
        ] {
            let was = replica[field].as_f64().unwrap();
            replica[field] = json!(was + each * requests);
        }
    }
    observation.to_string()
}

fn dialogue(rate: f64) -> Vec<String> {
    (0..60).map(|i| later(5.0 * f64::from(i), rate)).collect()
}

#[test]
fn every_observation_is_answered_within_its_limits() {
    let output = talk(&recorded());
    assert!(output.status.success());
    let answers = answers(&output);
    assert_eq!(answers.len(), 2);
    for answer in answers {
        assert!(
            (1..=40).contains(&answer["replicas"].as_u64().unwrap()),
            "{answer}"
        );
        assert!(
            (1..=256).contains(&answer["max_num_seqs"].as_u64().unwrap()),
            "{answer}"
        );
        let budget = answer["max_num_batched_tokens"].as_u64().unwrap();
        assert!((64..=8192).contains(&budget), "{answer}");
    }
}

#[test]
fn the_budget_follows_from_the_sums_and_replicas_from_load() {
    let last = |rate: f64| answers(&talk(&dialogue(rate))).pop().unwrap();
    let (low, high) = (last(0.3), last(3.0));
    for answer in [&low, &high] {
        let budget = answer["max_num_batched_tokens"].as_u64().unwrap();
        assert!((224..=448).contains(&budget), "{answer}");
    }
    // Three ready replicas with 0.9 requests a second in all, and with 9.
    assert!(low["replicas"].as_u64().unwrap() <= 3, "{low}");
    assert!(
        (5..=9).contains(&high["replicas"].as_u64().unwrap()),
        "{high}"
    );
}

#[test]
fn a_bad_line_is_told_and_the_next_is_answered() {
    let mut lines = dialogue(1.0);
    let good = answers(&talk(&lines));
    lines.insert(30, r#"{"t": 750.0, "max_num_seqs": "many"}"#.into());
    lines.insert(40, "nonsense".into());
    lines.insert(50, String::new());
    let output = talk(&lines);
    assert_eq!(output.status.code(), Some(2));
    let mut answers = answers(&output);
    assert_eq!(answers.remove(40), json!({}));
    assert_eq!(answers.remove(30), json!({}));
    assert_eq!(answers, good);
    let errors = String::from_utf8(output.stderr).unwrap();
    let told: Vec<&str> = errors.lines().collect();
    assert_eq!(told.len(), 2, "{errors}");
    assert!(
        told[0].contains("line 31") && told[0].contains("many"),
        "{errors}"
    );
    assert!(told[1].contains("line 41"), "{errors}");
    let missing = talk(&["{\"t\": 1}".into()]);
    let errors = String::from_utf8(missing.stderr).unwrap();
    assert!(errors.contains("max_num_seqs"), "{errors}");
}

#[test]
fn no_line_is_no_error() {
    let output = talk(&[]);
    assert!(output.status.success() && output.stdout.is_empty());
}
