//! Flags that the programs share.

use clap::{Args, ValueEnum};

use crate::{Backend, Device, Setup, Starts};

/// The world that a policy is put into.
#[derive(Args, Clone, Debug)]
pub struct World {
    /// study-t4, unhidden-t4, unswept-t4, t4 or h100.
    #[arg(long, default_value = "study-t4", value_parser = device)]
    device: Device,
    #[arg(long, default_value_t = 2)]
    warm_nodes: u32,
    #[arg(long, default_value_t = 75.0)]
    warm_seconds: f64,
    #[arg(long, default_value_t = 240.0)]
    cold_seconds: f64,
    /// Replicas serve first come, first served, as vLLM does; without it those that can't be in time
    /// let others go first, as stoker-engine does.
    #[arg(long)]
    first_come: bool,
    #[arg(long, value_enum, default_value_t = Scheduler::Engine)]
    backend: Scheduler,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// What runs a replica's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scheduler {
    /// The real one.
    Engine,
    /// Some fifteen times faster.
    Surrogate,
}

impl World {
    pub fn setup(&self) -> Setup {
        let device = self.device.clone();
        Setup {
            device: if self.first_come {
                device.first_come()
            } else {
                device
            },
            backend: match self.backend {
                Scheduler::Engine => Backend::Engine,
                Scheduler::Surrogate => Backend::Surrogate,
            },
            starts: Starts {
                warm_nodes: self.warm_nodes,
                warm_seconds: self.warm_seconds,
                cold_seconds: self.cold_seconds,
            },
            seed: self.seed,
            ..Setup::study()
        }
    }
}

fn device(name: &str) -> Result<Device, &'static str> {
    Device::by_name(name).ok_or("choose study-t4, unhidden-t4, unswept-t4, t4 or h100")
}
