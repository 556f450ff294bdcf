//! Spreading a block's tasks over the caller's rayon pool.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `task(0..tasks)`, each once, and returns when all are done. Threads take the next task as
/// they come free, so a slow core holds up at most one task.
pub(crate) fn parallel(tasks: usize, task: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(tasks);
    if threads <= 1 {
        return (0..tasks).for_each(task);
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                break;
            }
            task(index);
        }
    };
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// How many parts to cut `units` of work into: enough to even out the threads' speeds, none
/// smaller than `least`.
pub(crate) fn parts(units: usize, least: usize) -> usize {
    match rayon::current_num_threads() {
        0 | 1 => 1,
        threads => (threads * 4).min(units / least.max(1)).max(1),
    }
}

/// A pointer into an output that parallel tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: the pointer is only a number; every dereference happens in an unsafe block that states
// why no other task touches the same elements.
#[allow(unsafe_code)]
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            for tasks in [0, 1, 3, 100] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.install(|| {
                    parallel(tasks, |i| {
                        runs[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
