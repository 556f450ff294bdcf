//! The policy at work: a small model of a fleet in virtual time drives `decide()`.

mod arbitrary;
mod faults;
mod fleet;
mod load;
mod replica;
mod speed;
