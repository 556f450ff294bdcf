//! `stoker-operator`: turns InferenceServices into pods that answer within their objectives.

mod actuate;
mod args;
mod controller;
mod fence;
mod http;
mod lease;
mod probes;
mod release;
mod resources;
mod routing;
mod run;
mod scaling;
mod scrape;
mod stores;
#[cfg(test)]
mod testing;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

use args::{Args, Command, LogFormat};

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Crds => match stoker_api::crd_yaml() {
            Ok(yaml) => {
                print!("{yaml}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("could not write the CRD as YAML: {error}");
                ExitCode::FAILURE
            }
        },
        Command::Run(args) => {
            start_log(args.log_format);
            exit(run_async(run::run(*args)))
        }
        Command::Release(place) => {
            start_log(LogFormat::Text);
            exit(run_async(release::release(place)))
        }
    }
}

fn exit(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain; the last line of the log is what `kubectl describe` shows.
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_async(program: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    // Two providers may be compiled in; rustls wants to be told which one to use.
    let provider = rustls::crypto::ring::default_provider();
    if provider.install_default().is_err() {
        anyhow::bail!("a TLS provider was installed before");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("could not start the async runtime")?;
    let result = runtime.block_on(program);
    // Whatever still runs has been fenced off.
    runtime.shutdown_background();
    result
}

fn start_log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
