//! Files that are generated from the types, and committed: they must be up to date.
//!
//! `UPDATE=1 cargo test --release -p stoker-api` rewrites them.

// Helpers of tests are tests too; clippy.toml lets only #[test] functions off.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod reference;

use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn compare(path: &str, generated: &str) {
    let file = repository().join(path);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, generated).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    let differing = committed
        .lines()
        .zip(generated.lines())
        .position(|(committed, generated)| committed != generated);
    assert!(
        committed == generated,
        "{path} is out of date (first at line {}): run UPDATE=1 cargo test --release -p stoker-api",
        differing.map_or(committed.lines().count(), |line| line) + 1
    );
}

#[test]
fn crd_is_up_to_date() {
    let yaml = stoker_api::crd_yaml().unwrap();
    compare(
        "crds/inferenceservices.yaml",
        &format!(
            "# Generated from operator/api: UPDATE=1 cargo test --release -p stoker-api\n{yaml}"
        ),
    );
}

/// The chart carries the same definition, kept when the release goes.
#[test]
fn chart_is_up_to_date() {
    let yaml = stoker_api::crd_yaml().unwrap();
    let (head, rest) = yaml
        .split_once("metadata:\n")
        .expect("the definition has metadata");
    let annotated = format!(
        "{{{{- /* Generated from operator/api: UPDATE=1 cargo test --release -p stoker-api */ -}}}}\n\
         {{{{- if .Values.crds.install }}}}\n\
         {head}metadata:\n  annotations:\n    helm.sh/resource-policy: keep\n{rest}{{{{- end }}}}\n"
    );
    assert!(
        !rest.contains("{{"),
        "the definition must not hold what Helm takes for a template"
    );
    compare("charts/stoker/templates/crds.yaml", &annotated);
}

#[test]
fn reference_is_up_to_date() {
    compare(
        "docs/crd-reference.md",
        &reference::markdown(&stoker_api::crd()),
    );
}

/// Server-side apply keeps the whole object in etcd and nobody reads a megabyte.
#[test]
fn crd_is_small() {
    let yaml = stoker_api::crd_yaml().unwrap();
    assert!(yaml.len() < 200_000, "{} bytes", yaml.len());
}
