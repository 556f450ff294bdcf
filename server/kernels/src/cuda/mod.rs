//! The fused blocks on an NVIDIA GPU: own kernels (cuda/*.cu) through the driver, which is opened at
//! run time, so that one program starts with and without a GPU.
//!
//! A step has one of two forms, by its rows:
//! - few ([`FEW_ROWS`]): five kernels a layer that stream the weights ([`Kernels::few`],
//!   [`Kernels::decode`]); norms are folded into the products before and after them.
//! - more: products in tiles on tensor cores ([`Kernels::many`]), whose parts are summed by the
//!   norms between them ([`Kernels::norm`]); rows of prompt chunks go through
//!   [`Kernels::rope`] and [`Kernels::prefill`], single rows through [`Kernels::decode`].
//!
//! Weights are f16, row-major ([`Weights`]), or of 8 or 4 bits ([`Quantised`]); the residual is f32; what products read and write is
//! f16, their sums are f32. Results depend on the rows of a step only through the form it takes.
//!
//! This module checks the shapes that it is given; that block ids and positions of a step make
//! sense is its caller's to check. Work is asynchronous: it is done in the order of the stream.

mod attention;
mod driver;
mod error;
mod few;
mod format;
mod heads;
mod image;
mod launch;
mod many;
mod memory;
mod quantised;
mod quantised_products;
mod rows;
mod sampling;
mod step;
mod stream;
mod thin;
#[cfg(test)]
mod turing;
mod weights;

pub use attention::{Attention, CacheShape};
pub use driver::{Gpu, GpuOptions};
pub use error::CudaError;
pub use few::{AnyWeights, FEW_ROWS, FewIn, FewOut, FewTile, Squares};
pub use format::{EIGHT, Format, Order, UnitRow};
pub use heads::Heads;
pub use launch::Kernels;
pub use many::{ManyOut, ManyShape};
pub use memory::{Buffer, Pinned, Plain, Slice};
pub use quantised::Quantised;
pub use quantised_products::FEW_ROWS_QUANTISED;
pub use rows::NormRows;
pub use step::{NOWHERE, PREVIOUS, StepRow, StepSample, StepSequence, StepTile};
pub use stream::{Event, Graph, Marks, Stream};
pub use weights::{Weights, interleave_gate_up};
