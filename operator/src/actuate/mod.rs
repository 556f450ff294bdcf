//! From decisions to replicas: signed tokens, dial pushes, and the mark on the pod that goes first.

mod deletion_cost;
mod key;
mod limits;
mod token;

pub use deletion_cost::{Candidate, DeletionCost, choose_victim};
pub use key::{ControlKey, KeyError};
pub use limits::{Pushed, Pusher, WireObjectives};
pub use token::{Signer, TokenError};
