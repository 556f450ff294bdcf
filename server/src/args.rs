//! The command line. Names are vLLM's where it has one; every flag is an environment variable
//! too.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use stoker_engine::Profile;
use stoker_hub::ModelSource;
use stoker_model::Dtype;
use thiserror::Error;

use crate::objectives::{Objectives, ObjectivesError};

/// Serves a language model with OpenAI's HTTP API.
#[derive(Clone, Debug, Parser)]
#[command(name = "stoker-server", version, about, max_term_width = 100)]
pub struct Args {
    /// The model: a GGUF file, the folder of a Hugging Face checkpoint,
    /// hf://<org>/<name>[/<file>.gguf][@<revision>] or https://<host>/<path>.gguf (not needed with
    /// --device simulated)
    #[arg(long, env = "STOKER_MODEL", value_name = "MODEL")]
    pub model: Option<ModelSource>,

    /// Base URL of the Hugging Face hub that hf:// means. A token for gated and private models is
    /// read from the environment variable HF_TOKEN
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL")]
    pub hub_endpoint: Option<String>,

    /// Directory that keeps downloaded models; servers may share it [default: ~/.cache/stoker/hub]
    #[arg(long, env = "STOKER_MODEL_CACHE", value_name = "DIR")]
    pub model_cache: Option<PathBuf>,

    /// Make this directory, give it to the user of Stoker's images (65532) and exit
    #[arg(long, env = "STOKER_PREPARE_MODEL_CACHE", value_name = "DIR")]
    pub prepare_model_cache: Option<PathBuf>,

    /// Name that requests use for the model [default: the file's name, or simulated-<profile>]
    #[arg(long, env = "STOKER_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// Address to listen on
    #[arg(
        long,
        env = "STOKER_HOST",
        default_value = "0.0.0.0",
        value_name = "IP"
    )]
    pub host: IpAddr,

    /// Port of the API, the probes and the metrics; 0 takes a free one and logs it
    #[arg(long, env = "STOKER_PORT", default_value_t = 8000)]
    pub port: u16,

    /// Port of the control API; 0 takes a free one and logs it
    #[arg(long, env = "STOKER_CONTROL_PORT", default_value_t = 8001)]
    pub control_port: u16,

    /// PEM file with the Ed25519 public key that control tokens are signed for; read again when
    /// it changes. Without it the control port listens on loopback only and asks for no token
    #[arg(long, env = "STOKER_CONTROL_KEY", value_name = "PATH")]
    pub control_key: Option<PathBuf>,

    /// UID of this pod: the subject that control tokens must have
    #[arg(long, env = "POD_UID", value_name = "UID")]
    pub pod_uid: Option<String>,

    /// What runs the model. What was asked for or a clear failure: never a silent fall back
    #[arg(long, env = "STOKER_DEVICE", value_enum, default_value = "cpu")]
    pub device: Device,

    /// What weights are kept as. auto: with --device cuda as a GGUF file has them (Q8_0, Q4_0, Q4_1,
    /// Q4_K, Q6_K), else f16. int8 and int4 (a scale for every 128 weights, made from the file's
    /// weights) are for --device cuda; matrices whose columns aren't multiples of 128 stay f16
    #[arg(long, env = "STOKER_DTYPE", value_enum, default_value = "auto")]
    pub dtype: WeightType,

    /// Device that --device simulated imitates
    #[arg(
        long,
        env = "STOKER_SIMULATED_PROFILE",
        value_enum,
        default_value = "t4"
    )]
    pub simulated_profile: SimulatedProfile,

    /// Seconds that --device simulated takes to load its model
    #[arg(
        long,
        env = "STOKER_SIMULATED_LOAD_SECONDS",
        default_value_t = 0.0,
        value_name = "SECONDS"
    )]
    pub simulated_load_seconds: f64,

    /// Most tokens of prompt and answer together [default: what the model was made for]
    #[arg(long, env = "STOKER_MAX_MODEL_LEN", value_name = "TOKENS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_model_len: Option<u32>,

    /// Sequences that run at once; can be changed through the control port
    #[arg(long, env = "STOKER_MAX_NUM_SEQS", default_value_t = 8, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_seqs: u32,

    /// Tokens computed in one step, prompts and new tokens together; can be changed through the
    /// control port
    #[arg(long, env = "STOKER_MAX_NUM_BATCHED_TOKENS", default_value_t = 512, value_name = "TOKENS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_batched_tokens: u32,

    /// Share of the device's memory that weights and KV cache may fill
    #[arg(
        long,
        env = "STOKER_GPU_MEMORY_UTILIZATION",
        default_value_t = 0.9,
        value_name = "SHARE"
    )]
    pub gpu_memory_utilization: f64,

    /// Bytes of memory for the KV cache [default: what --gpu-memory-utilization leaves]
    #[arg(long, env = "STOKER_KV_CACHE_MEMORY_BYTES", value_name = "BYTES",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub kv_cache_memory_bytes: Option<u64>,

    /// Threads that compute with --device cpu [default: as many as the process may use]
    #[arg(long, env = "STOKER_THREADS", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub threads: Option<u32>,

    /// What a request must reach to count as good, as JSON: {"ttft_ms": 2000,
    /// "ttft_free_prompt_tokens": 1000, "ttft_ms_per_prompt_token": 1.0, "itl_ms": 100,
    /// "itl_of": "mean" or "p95"} [default: these values]
    #[arg(long, env = "STOKER_OBJECTIVES", value_name = "JSON")]
    pub objectives: Option<String>,

    /// Requests that may wait for a seat; one more is answered with 429 and Retry-After
    #[arg(
        long,
        env = "STOKER_MAX_WAITING",
        default_value_t = 256,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub max_waiting: u32,

    /// Largest request body
    #[arg(
        long,
        env = "STOKER_MAX_BODY_BYTES",
        default_value_t = 4 << 20,
        value_name = "BYTES"
    )]
    pub max_body_bytes: usize,

    /// Age after which a connection is closed with its next answer, so that clients spread over
    /// new replicas (10 % more or less, at random); 0: never
    #[arg(
        long,
        env = "STOKER_MAX_CONNECTION_AGE_SECONDS",
        default_value_t = 30.0,
        value_name = "SECONDS"
    )]
    pub max_connection_age_seconds: f64,

    /// Seconds that running requests get to finish after SIGTERM
    #[arg(
        long,
        env = "STOKER_DRAIN_TIMEOUT_SECONDS",
        default_value_t = 120.0,
        value_name = "SECONDS"
    )]
    pub drain_timeout_seconds: f64,

    /// How log lines are written, on standard error
    #[arg(long, env = "STOKER_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace, or filters such as stoker_server=debug
    #[arg(
        long,
        env = "STOKER_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The host's processor
    Cpu,
    /// An NVIDIA GPU
    Cuda,
    /// No model: made-up tokens at the pace of a GPU
    Simulated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    Auto,
    #[value(alias = "half")]
    Float16,
    Int8,
    Int4,
}

impl From<WeightType> for Dtype {
    fn from(dtype: WeightType) -> Self {
        match dtype {
            WeightType::Auto => Self::Auto,
            WeightType::Float16 => Self::Float16,
            WeightType::Int8 => Self::Int8,
            WeightType::Int4 => Self::Int4,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SimulatedProfile {
    /// NVIDIA T4, 16 GB
    T4,
    /// NVIDIA H100, 80 GB
    H100,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Why a command line can't be used.
#[derive(Debug, Error)]
pub enum ArgsError {
    #[error(
        "--model is missing; give a GGUF file, the folder of a checkpoint, hf://<org>/<name> or a URL (or use --device simulated)"
    )]
    NoModel,
    #[error("--model {path}: {source}")]
    Model {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{flag} must be {range}, not {value}")]
    Range {
        flag: &'static str,
        range: &'static str,
        value: f64,
    },
    #[error("--{0}")]
    Objectives(#[from] ObjectivesError),
    #[error("--control-key needs --pod-uid (or POD_UID), the subject that tokens must have")]
    NoPodUid,
    #[error("--log {value:?}: {reason}")]
    Log { value: String, reason: String },
}

impl Args {
    /// Checks what the types of the flags don't.
    pub fn validate(&self) -> Result<(), ArgsError> {
        match (self.device, &self.model) {
            (Device::Cpu | Device::Cuda, None) => return Err(ArgsError::NoModel),
            // What is to be downloaded is looked at then.
            (Device::Cpu | Device::Cuda, Some(ModelSource::Hub(_) | ModelSource::Url(_))) => {}
            (Device::Cpu | Device::Cuda, Some(ModelSource::Path(path))) => {
                std::fs::File::open(path).map_err(|source| ArgsError::Model {
                    path: path.clone(),
                    source,
                })?;
            }
            (Device::Simulated, _) => {}
        }
        if self.control_key.is_some() && self.pod_uid.as_deref().unwrap_or("").is_empty() {
            return Err(ArgsError::NoPodUid);
        }
        let share = self.gpu_memory_utilization;
        if !(share > 0.0 && share <= 1.0) {
            return Err(ArgsError::Range {
                flag: "--gpu-memory-utilization",
                range: "above 0 and at most 1",
                value: share,
            });
        }
        for (flag, value) in [
            (
                "--max-connection-age-seconds",
                self.max_connection_age_seconds,
            ),
            ("--drain-timeout-seconds", self.drain_timeout_seconds),
            ("--simulated-load-seconds", self.simulated_load_seconds),
        ] {
            if !(0.0..=1e9).contains(&value) {
                return Err(ArgsError::Range {
                    flag,
                    range: "between 0 and 1000000000",
                    value,
                });
            }
        }
        self.objectives()?;
        Ok(())
    }

    pub fn objectives(&self) -> Result<Objectives, ObjectivesError> {
        match &self.objectives {
            Some(json) => Objectives::from_json(json),
            None => Ok(Objectives::default()),
        }
    }

    /// The name under which the model is served.
    pub fn model_name(&self) -> String {
        match (&self.served_model_name, self.device, &self.model) {
            (Some(name), _, _) => name.clone(),
            (None, Device::Simulated, _) | (None, _, None) => {
                format!("simulated-{}", self.profile().name)
            }
            (None, _, Some(source)) => source.name(),
        }
    }

    /// The profile of the simulated device, with the flags that change it.
    pub fn profile(&self) -> Profile {
        let mut profile = match self.simulated_profile {
            SimulatedProfile::T4 => Profile::t4(),
            SimulatedProfile::H100 => Profile::h100(),
        };
        profile.memory_utilization = self.gpu_memory_utilization;
        if let Some(tokens) = self.max_model_len {
            profile.max_model_len = tokens;
        }
        if let Some(bytes) = self.kv_cache_memory_bytes {
            let wanted = profile.weight_bytes.saturating_add(bytes);
            profile.memory_utilization = wanted as f64 / profile.memory_bytes as f64;
        }
        profile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        Args::try_parse_from(format!("stoker-server {line}").split_whitespace()).unwrap()
    }

    #[test]
    fn bad_combinations_are_refused() {
        for (line, word) in [
            ("--device cuda", "--model is missing"),
            ("", "--model is missing"),
            ("--model /nowhere/x.gguf", "/nowhere/x.gguf"),
            (
                "--device simulated --gpu-memory-utilization 1.5",
                "at most 1",
            ),
            ("--device simulated --drain-timeout-seconds NaN", "NaN"),
            ("--device simulated --control-key k", "--pod-uid"),
            ("--device simulated --objectives {}x", "objectives"),
        ] {
            let error = args(line).validate().unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
        args("--device simulated").validate().unwrap();
    }

    #[test]
    fn numbers_are_checked_by_the_parser() {
        for line in [
            "--max-num-seqs 0",
            "--max-waiting 0",
            "--port 70000",
            "--device tpu",
            "--model hf://name-alone",
            "--model s3://bucket/m.gguf",
        ] {
            let words = format!("stoker-server {line}");
            assert!(
                Args::try_parse_from(words.split_whitespace()).is_err(),
                "{line}"
            );
        }
    }

    #[test]
    fn every_flag_is_an_environment_variable() {
        use clap::CommandFactory;
        for arg in Args::command().get_arguments() {
            assert!(
                arg.get_env().is_some() || ["help", "version"].contains(&arg.get_id().as_str()),
                "{}",
                arg.get_id()
            );
        }
    }

    #[test]
    fn a_small_kv_cache_can_be_asked_for() {
        let profile = args("--device simulated --kv-cache-memory-bytes 73400320").profile();
        assert!((639..=640).contains(&profile.kv_capacity_tokens()));
    }

    #[test]
    fn names() {
        assert_eq!(args("--device simulated").model_name(), "simulated-t4");
        assert_eq!(args("--model /m/Smol.Q4_1.gguf").model_name(), "Smol.Q4_1");
        assert_eq!(args("--served-model-name a --model x").model_name(), "a");
        assert_eq!(args("--model hf://org/name@v1").model_name(), "org/name");
    }
}
