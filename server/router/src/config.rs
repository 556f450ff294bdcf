//! What a router is started with, apart from addresses and files.

use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Config {
    pub timeouts: Timeouts,
    /// Bodies of requests that wait or run, all together.
    pub max_held_bytes: usize,
    pub max_connections: usize,
    /// First comment to a stream that waits for a replica, and time between further ones.
    pub heartbeat: Duration,
    /// Time between two looks at a replica's metrics.
    pub poll: Duration,
}

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// To open a connection to a replica.
    pub connect: Duration,
    /// From sending a request to the first byte of its answer.
    pub first_byte: Duration,
    /// Between two events of a stream.
    pub stream_idle: Duration,
    /// For a client to send its request's head; also how long an idle connection is kept.
    pub header_read: Duration,
    /// For a client to send its request's body.
    pub body_read: Duration,
    /// For a client to take some of what was written to it.
    pub write_stall: Duration,
    /// For a replica to answer a probe.
    pub probe: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            first_byte: Duration::from_secs(600),
            stream_idle: Duration::from_secs(120),
            header_read: Duration::from_secs(60),
            body_read: Duration::from_secs(60),
            write_stall: Duration::from_secs(60),
            probe: Duration::from_secs(1),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            timeouts: Timeouts::default(),
            max_held_bytes: 256 << 20,
            max_connections: 20_000,
            heartbeat: Duration::from_secs(2),
            poll: Duration::from_millis(500),
        }
    }
}
