//! The scaling policy: observation in, decision and reason out. Pure: no clock, no I/O, no Kubernetes.

pub mod decision;
pub mod observation;
