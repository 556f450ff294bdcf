//! A fleet in virtual time: the real scheduler of stoker-engine and the real `decide()` of
//! stoker-autoscaler, beside what people run today, on recorded and generated traces.
//!
//! | module | |
//! |---|---|
//! | `trace` | requests over time: recorded (CSV) or generated |
//! | `replica` | an engine in virtual time: the real one, or a fast surrogate |
//! | `fleet` | pods, routing, starts, drains, faults: the loop over events |
//! | `policy` | what governs a fleet: ours and its peers |
//! | `oracle` | the cheapest schedule that somebody who knows the future finds |
//! | `tuning` | peers at the best of their settings |
//! | `score` | the figures of a run |
//! | `report` | tables, and a page with charts |
//! | `flags` | those that the programs share |
//!
//! Everything is deterministic: the same setup, trace and seed give the same outcome.

pub mod flags;
pub mod fleet;
pub mod flight;
pub mod oracle;
pub mod policy;
pub mod random;
pub mod replica;
pub mod report;
pub mod score;
pub mod trace;
pub mod tuning;

pub use fleet::{Action, Fault, Outcome, Policy, Routing, Setup, Starts, View, simulate};
pub use flight::Goals;
pub use replica::{Backend, Device};
pub use score::Score;
pub use trace::{Mix, Shape, Trace, Unseen};
