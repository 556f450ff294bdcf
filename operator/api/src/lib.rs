//! The Kubernetes API of Stoker: group `serving.stoker.dev`, version `v1alpha1`.
//!
//! Types, defaults and rules of the `InferenceService`, the names that its pieces go by, and the
//! types and reasons of its conditions. Holds no client and does no I/O.
//!
//! Everything that one object can state about itself is checked by the API server: ranges,
//! defaults and CEL rules are part of the CRD ([`crd`]), so code that reads an object from the
//! API server may rely on them.

mod crd;
mod embed;

pub mod access;
pub mod conditions;
pub mod engine;
pub mod names;
pub mod pod;
pub mod scaling;
pub mod spec;
pub mod status;

pub use access::{Access, KeyLimits};
pub use crd::{crd, crd_yaml};
pub use engine::{Device, Engine, MaxNumBatchedTokens, MaxNumSeqs, SimulatedProfile};
pub use pod::PodSettings;
pub use scaling::{
    InterTokenLatency, ItlStatistic, Objectives, Rollout, Scaling, ScalingMode, TimeToFirstToken,
};
pub use spec::{
    Accelerator, Dtype, InferenceService, InferenceServiceSpec, Model, ModelSource, Resources,
};
pub use status::{DialsStatus, InferenceServiceStatus, LawStatus, LoadStatus, LoadingStatus};
