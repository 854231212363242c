//! Token shards to training batches.
//!
//! A data set is a list of flat little-endian `u32` files. This crate maps them ([`shard`], [`set`]; plain values in [`options`]), decides
//! which sequence stands at which position of the endless training stream ([`order`], [`stream`]),
//! copies or views the rows of a batch ([`batch`]) and runs ahead of the consumer ([`filler`], [`ring`]).
//! `python` is the face that `apr_dist.data.loader` imports; nothing here knows about ranks,
//! configuration or manifests, but for the layout of a manifest's shard list ([`table`]).

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic"))]

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!("shards are little-endian and larger than a 32-bit address space");

pub mod batch;
pub mod error;
pub mod filler;
pub mod latency;
pub mod mapping;
pub mod options;
pub mod order;
#[cfg(feature = "python")]
mod python;
pub mod ring;
pub mod set;
pub mod shard;
mod sizes;
pub mod stream;
pub mod table;
pub mod verified;

pub use error::{Error, Result};
