//! The devices that replicas run on.

use stoker_engine::executor::ExecutorError;
use stoker_engine::{Profile, SimulatedExecutor, VirtualClock, calibrate};
use stoker_law::{Law, Prior};

/// What a replica is: a latency law with its memory and noise, and an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    pub profile: Profile,
    /// What the engine believes of the law before it has seen a step; the surrogate knows it.
    pub prior: Prior,
    /// Whether requests that can't have their first token in time let others go first, as
    /// stoker-engine has it, or all are served as they come, as vLLM has it.
    pub sets_back: bool,
}

/// Standard deviation of the logarithm of a step's time.
const NOISE: f64 = 0.03;
/// Longer than any request of the traces.
const CONTEXT: u32 = 32_768;

impl Device {
    fn with_noise(profile: Profile) -> Self {
        let device = Device {
            prior: Prior::default(),
            sets_back: true,
            profile: Profile {
                noise: NOISE,
                max_model_len: CONTEXT,
                ..profile
            },
        };
        device.swept()
    }

    /// Its engine knows what the sweep at start-up would have told: the law, roughly.
    fn swept(mut self) -> Self {
        self.prior = Prior {
            law: self.profile.law.slowed(1.05),
            confidence: 0.6,
        };
        self
    }

    /// The reference study's T4: its law, and 60,000 tokens of KV cache.
    pub fn study_t4() -> Self {
        let t4 = Profile::t4();
        Self::with_noise(Profile {
            name: "study-t4",
            law: Law {
                base: 27.5e-3,
                per_kv_token: 0.36e-6,
                per_token: 0.27e-3,
                per_sequence: 0.2e-3,
                hidden: 1.0,
            },
            single_token_saving: 0.0,
            memory_bytes: t4.weight_bytes + 60_000 * t4.kv_bytes_per_token,
            memory_utilization: 1.0,
            ..t4
        })
    }

    /// The study's T4 with nothing of the prompt's compute hidden behind the memory's reads.
    pub fn unhidden_t4() -> Self {
        let mut device = Self::study_t4();
        device.profile.name = "unhidden-t4";
        device.profile.law.hidden = 0.0;
        device.swept()
    }

    /// The same device under an engine that serves first come, first served.
    pub fn first_come(mut self) -> Self {
        self.sets_back = false;
        self
    }

    /// The study's T4 whose engine makes no sweep: it begins with a guess.
    pub fn unswept_t4() -> Self {
        let mut device = Self::study_t4();
        device.profile.name = "unswept-t4";
        device.prior = Prior::default();
        device
    }

    /// stoker-engine's T4.
    pub fn t4() -> Self {
        Self::with_noise(Profile::t4())
    }

    /// The same as a server simulates it: without noise, for requests of its own length, and with a
    /// law that begins with what the engine's own sweep measures.
    pub fn served_t4() -> Result<Self, ExecutorError> {
        let profile = Profile::t4();
        // Before the replica is ready: on a clock of its own.
        let mut executor = SimulatedExecutor::new(profile.clone(), VirtualClock::new());
        let prior = calibrate(&mut executor)?;
        Ok(Device {
            profile,
            prior,
            sets_back: true,
        })
    }

    /// stoker-engine's H100.
    pub fn h100() -> Self {
        Self::with_noise(Profile::h100())
    }

    pub fn by_name(name: &str) -> Option<Self> {
        let devices = [
            Self::study_t4(),
            Self::unhidden_t4(),
            Self::unswept_t4(),
            Self::t4(),
            Self::h100(),
        ];
        devices.into_iter().find(|d| d.profile.name == name)
    }

    /// The same device, `factor` times as slow.
    pub fn slowed(&self, factor: f64) -> Self {
        let mut device = self.clone();
        device.profile.law = device.profile.law.slowed(factor);
        device.prior.law = device.prior.law.slowed(factor);
        device.profile.single_token_saving *= factor;
        device
    }

    pub fn without_noise(&self) -> Self {
        let mut device = self.clone();
        device.profile.noise = 0.0;
        device
    }
}
