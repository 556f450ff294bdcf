//! The command line; every flag is an environment variable too.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::config::{Config, Timeouts};

/// Routes requests to the replicas of all services of a cluster.
#[derive(Clone, Debug, Parser)]
#[command(name = "stoker-router", version, about, max_term_width = 100)]
pub struct Args {
    /// Address to listen on
    #[arg(
        long,
        env = "STOKER_HOST",
        default_value = "0.0.0.0",
        value_name = "IP"
    )]
    pub host: IpAddr,

    /// Port of the API; 0 takes a free one and logs it
    #[arg(long, env = "STOKER_PORT", default_value_t = 8000)]
    pub port: u16,

    /// Port of the API by TLS; needs --tls-cert and --tls-key
    #[arg(long, env = "STOKER_TLS_PORT", default_value_t = 8443)]
    pub tls_port: u16,

    /// PEM file with the certificate chain; read again when it changes
    #[arg(
        long,
        env = "STOKER_TLS_CERT",
        value_name = "PATH",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with the certificate's private key; read again when it changes
    #[arg(
        long,
        env = "STOKER_TLS_KEY",
        value_name = "PATH",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,

    /// Port of the control API; 0 takes a free one and logs it
    #[arg(long, env = "STOKER_CONTROL_PORT", default_value_t = 9001)]
    pub control_port: u16,

    /// PEM file with the Ed25519 public key that control tokens are signed for; read again when
    /// it changes. Without it the control port listens on loopback only and asks for no token
    #[arg(
        long,
        env = "STOKER_CONTROL_KEY",
        value_name = "PATH",
        requires = "pod_uid"
    )]
    pub control_key: Option<PathBuf>,

    /// UID of this pod: the subject that control tokens must have
    #[arg(long, env = "POD_UID", value_name = "UID")]
    pub pod_uid: Option<String>,

    /// Port of /metrics, /health, /ready and /live; 0 takes a free one and logs it
    #[arg(long, env = "STOKER_METRICS_PORT", default_value_t = 9000)]
    pub metrics_port: u16,

    /// Threads that serve connections [default: as many as there are CPUs]
    #[arg(long, env = "STOKER_WORKERS", value_name = "N")]
    pub workers: Option<usize>,

    /// Folder that keeps the last good table over a restart
    #[arg(long, env = "STOKER_STATE_DIR", value_name = "PATH")]
    pub state_dir: Option<PathBuf>,

    /// Write a line of JSON a request to standard output
    #[arg(long, env = "STOKER_ACCESS_LOG", default_value_t = true,
          action = clap::ArgAction::Set, value_name = "BOOL")]
    pub access_log: bool,

    /// After SIGTERM, how long everything goes on as before while answers ask clients to close
    /// their connections: until nobody is led here any more
    #[arg(
        long,
        env = "STOKER_LAME_DUCK_SECONDS",
        default_value_t = 0,
        value_name = "SECONDS"
    )]
    pub lame_duck_seconds: u64,

    /// How long requests may go on after that
    #[arg(
        long,
        env = "STOKER_DRAIN_TIMEOUT_SECONDS",
        default_value_t = 600,
        value_name = "SECONDS"
    )]
    pub drain_timeout_seconds: u64,

    /// Bytes of request bodies held at once, waiting ones and running ones
    #[arg(long, env = "STOKER_MAX_HELD_BYTES", default_value_t = 256 << 20, value_name = "BYTES")]
    pub max_held_bytes: usize,

    /// Client connections open at once
    #[arg(
        long,
        env = "STOKER_MAX_CONNECTIONS",
        default_value_t = 20_000,
        value_name = "N"
    )]
    pub max_connections: usize,

    /// To open a connection to a replica
    #[arg(long, env = "STOKER_CONNECT_TIMEOUT_SECONDS", default_value_t = 2.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub connect_timeout_seconds: f64,

    /// From sending a request to a replica to the first byte of its answer
    #[arg(long, env = "STOKER_FIRST_BYTE_TIMEOUT_SECONDS", default_value_t = 600.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub first_byte_timeout_seconds: f64,

    /// Between two events of a stream
    #[arg(long, env = "STOKER_STREAM_IDLE_TIMEOUT_SECONDS", default_value_t = 120.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub stream_idle_timeout_seconds: f64,

    /// For a client to send a request's head, or its next request
    #[arg(long, env = "STOKER_HEADER_READ_TIMEOUT_SECONDS", default_value_t = 60.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub header_read_timeout_seconds: f64,

    /// For a client to send a request's body
    #[arg(long, env = "STOKER_BODY_READ_TIMEOUT_SECONDS", default_value_t = 60.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub body_read_timeout_seconds: f64,

    /// For a client to take something of what is written to it
    #[arg(long, env = "STOKER_WRITE_STALL_TIMEOUT_SECONDS", default_value_t = 60.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub write_stall_timeout_seconds: f64,

    /// Between comments to a stream that waits for a replica
    #[arg(long, env = "STOKER_HEARTBEAT_SECONDS", default_value_t = 2.0,
          value_parser = seconds, value_name = "SECONDS")]
    pub heartbeat_seconds: f64,

    /// Between two looks at a replica's metrics
    #[arg(long, env = "STOKER_POLL_SECONDS", default_value_t = 0.5,
          value_parser = seconds, value_name = "SECONDS")]
    pub poll_seconds: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!(
            "{text:?} is not a number of seconds from 0.01 to 86400"
        )),
    }
}

impl Args {
    #[must_use]
    pub fn config(&self) -> Config {
        let duration = Duration::from_secs_f64;
        Config {
            timeouts: Timeouts {
                connect: duration(self.connect_timeout_seconds),
                first_byte: duration(self.first_byte_timeout_seconds),
                stream_idle: duration(self.stream_idle_timeout_seconds),
                header_read: duration(self.header_read_timeout_seconds),
                body_read: duration(self.body_read_timeout_seconds),
                write_stall: duration(self.write_stall_timeout_seconds),
                ..Timeouts::default()
            },
            max_held_bytes: self.max_held_bytes,
            max_connections: self.max_connections,
            heartbeat: duration(self.heartbeat_seconds),
            poll: duration(self.poll_seconds),
        }
    }
}
