//! Sizes and offsets as indices.

/// They fit: the crate only builds where addresses have 64 bits.
#[allow(clippy::cast_possible_truncation, reason = "usize has 64 bits, see lib.rs")]
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}
