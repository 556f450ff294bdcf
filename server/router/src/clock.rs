//! Seconds since this process started, monotonic: small enough for atomics.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

#[must_use]
pub fn now() -> f64 {
    START.elapsed().as_secs_f64()
}

/// The instant at which `now()` will be this.
#[must_use]
pub fn instant(at: f64) -> tokio::time::Instant {
    let after = Duration::try_from_secs_f64(at.max(0.0)).unwrap_or(Duration::from_secs(1 << 30));
    tokio::time::Instant::from_std(*START + after.min(Duration::from_secs(1 << 30)))
}
