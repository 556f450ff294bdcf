//! Architectures as data.
