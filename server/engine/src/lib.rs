//! The continuous-batching engine: scheduler, KV blocks and the executor it drives.
//!
//! [`Engine`] owns every sequence's state. Each [`Engine::step`] schedules the next step within
//! the two dials ([`Limits`]), submits it to the [`executor::Executor`] while the step before is
//! still in flight, then waits for that one and turns its tokens into [`Event`]s. There is no
//! I/O here, no tensor, and no time but what a [`Clock`] tells.

mod blocks;
mod calibrate;
mod clock;
mod engine;
pub mod executor;
mod request;
mod scheduler;
mod sequence;
pub mod simulated;
mod stats;
mod waiting;

pub use calibrate::calibrate;
pub use clock::{Clock, RealClock, VirtualClock};
pub use engine::{Engine, EngineConfig};
pub use request::{AddError, Event, FinishReason, Limits, LimitsError, Request, RequestId, Timing};
pub use simulated::{Profile, SimulatedExecutor};
pub use stats::{LastStep, Stats};
