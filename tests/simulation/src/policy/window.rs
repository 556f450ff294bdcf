//! What most autoscalers keep of the past.

use std::collections::VecDeque;

/// Values within the last `seconds`.
#[derive(Clone, Debug)]
pub(super) struct Window {
    seconds: f64,
    values: VecDeque<(f64, f64)>,
}

impl Window {
    pub fn new(seconds: f64) -> Self {
        Window {
            seconds,
            values: VecDeque::new(),
        }
    }

    pub fn push(&mut self, now: f64, value: f64) {
        self.values.push_back((now, value));
        while (self.values.front()).is_some_and(|(at, _)| now - at >= self.seconds) {
            self.values.pop_front();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub fn mean(&self) -> f64 {
        let sum: f64 = self.values.iter().map(|(_, value)| value).sum();
        sum / self.values.len().max(1) as f64
    }

    pub fn max(&self) -> f64 {
        let values = self.values.iter().map(|(_, value)| *value);
        values.fold(0.0, f64::max)
    }
}
