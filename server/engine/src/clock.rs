//! Time as the engine sees it: seconds on a monotonic scale, real or virtual.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A monotonic clock in seconds. Clones of a clock share one scale.
pub trait Clock {
    /// Seconds since the clock's origin.
    fn now(&self) -> f64;
    /// Returns at `t`, or at once if `t` has passed.
    fn sleep_until(&self, t: f64);
}

impl<C: Clock + ?Sized> Clock for &C {
    fn now(&self) -> f64 {
        (**self).now()
    }
    fn sleep_until(&self, t: f64) {
        (**self).sleep_until(t);
    }
}

impl<C: Clock + ?Sized> Clock for Arc<C> {
    fn now(&self) -> f64 {
        (**self).now()
    }
    fn sleep_until(&self, t: f64) {
        (**self).sleep_until(t);
    }
}

/// How long before a deadline the operating system's sleep, which overshoots by tens of
/// microseconds, gives way to yielding.
const FINE: f64 = 100e-6;

/// The machine's monotonic clock, counted from the clock's making.
#[derive(Clone, Copy, Debug)]
pub struct RealClock {
    origin: Instant,
}

impl RealClock {
    pub fn new() -> Self {
        Self::since(Instant::now())
    }

    /// A clock whose zero is `origin`; for callers that stamp times with `Instant` too.
    pub fn since(origin: Instant) -> Self {
        Self { origin }
    }
}

impl Default for RealClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for RealClock {
    fn now(&self) -> f64 {
        self.origin.elapsed().as_secs_f64()
    }

    fn sleep_until(&self, t: f64) {
        loop {
            let left = t - self.now();
            if left <= 0.0 || left.is_nan() {
                return;
            }
            if left > FINE {
                std::thread::sleep(
                    Duration::try_from_secs_f64(left - FINE).unwrap_or(Duration::MAX),
                );
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// A clock that stands still until somebody sleeps: then it jumps.
#[derive(Clone, Debug, Default)]
pub struct VirtualClock {
    /// Seconds as the bits of an f64. Bits of non-negative floats are ordered as the floats are.
    bits: Arc<AtomicU64>,
}

impl VirtualClock {
    pub fn new() -> Self {
        Self::default()
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> f64 {
        f64::from_bits(self.bits.load(Ordering::SeqCst))
    }

    fn sleep_until(&self, t: f64) {
        // Negative times and NaN lie before the origin: nothing to wait for.
        if t > 0.0 {
            self.bits.fetch_max(t.to_bits(), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_clock_jumps_forward_only_and_is_shared_by_clones() {
        let clock = VirtualClock::new();
        let other = clock.clone();
        clock.sleep_until(2.5);
        other.sleep_until(1.0);
        other.sleep_until(-3.0);
        other.sleep_until(f64::NAN);
        assert_eq!(clock.now(), 2.5);
        assert_eq!(other.now(), 2.5);
    }

    #[test]
    fn real_clock_never_returns_early() {
        let clock = RealClock::new();
        for micros in [0, 10, 90, 400, 2_000] {
            let deadline = clock.now() + f64::from(micros) * 1e-6;
            clock.sleep_until(deadline);
            assert!(clock.now() >= deadline);
        }
        clock.sleep_until(f64::NAN);
        clock.sleep_until(-1.0);
    }
}
