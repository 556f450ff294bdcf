//! Threads that serve connections, each with a runtime of its own.
//!
//! A connection stays on its thread, and so do the connections to replicas that its requests
//! use: no task moves, and no thread wakes another for an event of a stream.

use std::cell::Cell;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::runtime::{Builder, Handle};

thread_local! {
    static INDEX: Cell<usize> = const { Cell::new(0) };
}

/// Number of the thread that asks; 0 outside of workers.
#[must_use]
pub fn index() -> usize {
    INDEX.get()
}

/// The threads.
#[derive(Clone, Debug)]
pub struct Workers(Arc<[Worker]>);

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

/// One more connection of a worker, until it is dropped.
#[derive(Debug)]
pub struct Place {
    pub runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Relaxed);
    }
}

impl Workers {
    /// Starts so many threads; they live as long as the process.
    ///
    /// # Errors
    /// When a thread or its runtime can't be made.
    pub fn start(count: usize) -> std::io::Result<Self> {
        let workers: std::io::Result<Vec<Worker>> = (0..count.max(1)).map(start).collect();
        Ok(Self(workers?.into()))
    }

    /// Everything on the runtime that calls.
    #[must_use]
    pub fn here() -> Self {
        let worker = Worker {
            runtime: Handle::current(),
            connections: Arc::default(),
        };
        Self(Arc::new([worker]))
    }

    /// A place at the worker with the fewest connections.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        let load = |worker: &&Worker| worker.connections.load(Relaxed);
        let worker = self.0.iter().min_by_key(load)?;
        worker.connections.fetch_add(1, Relaxed);
        Some(Place {
            runtime: worker.runtime.clone(),
            connections: Arc::clone(&worker.connections),
        })
    }
}

fn start(number: usize) -> std::io::Result<Worker> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            INDEX.set(number);
            runtime.block_on(pending::<()>());
        })?;
    Ok(Worker {
        runtime: handle,
        connections: Arc::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_spread_evenly() {
        let workers = Workers::start(3).unwrap();
        let mut places: Vec<_> = (0..6).map(|_| workers.place().unwrap()).collect();
        let load = || -> Vec<usize> {
            let workers = workers.0.iter();
            workers
                .map(|worker| worker.connections.load(Relaxed))
                .collect()
        };
        assert_eq!(load(), [2, 2, 2]);
        let seen = places[0].runtime.spawn(async { index() });
        let runtime = Builder::new_current_thread().build().unwrap();
        assert_eq!(runtime.block_on(seen).unwrap(), 0);
        places.remove(1);
        assert_eq!(load(), [2, 1, 2]);
        let place = workers.place().unwrap();
        let seen = place.runtime.spawn(async { index() });
        assert_eq!(runtime.block_on(seen).unwrap(), 1);
    }
}
