//! Every CUDA kernel against plain loops or its CPU form, on random shapes. On a machine without a
//! GPU the tests say so and pass. With STOKER_CUDA_OLDEST_CODE=1 they run the PTX for the oldest
//! architecture.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attention;
mod heads;
mod products;
mod quantised;
mod quantised_products;
mod rows;
mod sampling;
mod support;
