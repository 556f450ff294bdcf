use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use stoker_server::args::{Args, ArgsError, LogFormat};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// Exit code for wrong flags, as clap has it.
const USAGE: u8 = 2;
const FAILURE: u8 = 1;
/// The GPU or its driver can't be used: the operator tells it by this code.
const DEVICE: u8 = 3;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(folder) = &args.prepare_model_cache {
        return match stoker_server::download::prepare_cache(folder) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::from(FAILURE)
            }
        };
    }
    if let Err(error) = args.validate().and_then(|()| start_log(&args)) {
        eprintln!("error: {error}");
        return ExitCode::from(USAGE);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        // The engine and its device have threads of their own; HTTP needs little.
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().min(4)))
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: the async runtime can't be started: {error}");
            return ExitCode::from(FAILURE);
        }
    };
    let result = runtime.block_on(stoker_server::run(args));
    // A loading thread or a large body in work must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "exit");
            eprintln!("error: {error}");
            ExitCode::from(match &error {
                error if error.is_device() => DEVICE,
                error if error.is_usage() => USAGE,
                _ => FAILURE,
            })
        }
    }
}

fn start_log(args: &Args) -> Result<(), ArgsError> {
    let filter = EnvFilter::try_new(&args.log).map_err(|e| ArgsError::Log {
        value: args.log.clone(),
        reason: e.to_string(),
    })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match args.log_format {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(stoker_server::nvtx::ranges())
        .init();
    Ok(())
}
