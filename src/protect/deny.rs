// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rights that can be denied on a guest page, and the mark that makes a denial final.
//!
//! Knows the bits and nothing of pages, devices or wires that carry them.

use std::fmt;

bitflags::bitflags! {
    /// What a guest may no longer do with a page. A set bit takes a right away, as in Heki's
    /// `KVM_HC_LOCK_MEM_PAGE_RANGES` ("nowrite" rather than "read-only"); the value of
    /// `NOWRITE` is that of `HEKI_ATTR_MEM_NOWRITE`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Deny: u64 {
        /// No store to the page succeeds.
        const NOWRITE = 1 << 0;
        /// No instruction is fetched from the page.
        const NOEXEC = 1 << 1;
        /// No load from the page succeeds.
        const NOREAD = 1 << 2;
        /// No instruction is fetched from the page in supervisor mode.
        const NOEXEC_KERNEL = 1 << 3;
    }
}

impl fmt::Display for Deny {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        bitflags::parser::to_writer(self, f)
    }
}

/// Deny bits together with the mark that they hold until system reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// The rights taken away.
    pub deny: Deny,
    /// Until system reset the deny bits of the page can only grow.
    pub immutable: bool,
}

/// Attribute bits that this version does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown attribute bits {0:#x}")]
pub struct UnknownBits(pub u64);

impl Attributes {
    /// The bit that stands for [`Attributes::immutable`] on the control channel.
    pub const IMMUTABLE: u64 = 1 << 63;

    /// Attributes that deny `deny` until system reset.
    pub fn locked(deny: Deny) -> Self {
        Self {
            deny,
            immutable: true,
        }
    }

    /// The bits of the control channel: deny bits, and bit 63 for "immutable".
    pub fn bits(self) -> u64 {
        self.deny.bits() | if self.immutable { Self::IMMUTABLE } else { 0 }
    }

    /// Reads the bits of the control channel.
    ///
    /// # Errors
    ///
    /// [`UnknownBits`] names the bits that are neither a deny bit nor the immutable mark.
    pub fn from_bits(bits: u64) -> Result<Self, UnknownBits> {
        let deny = bits & !Self::IMMUTABLE;
        Ok(Self {
            deny: Deny::from_bits(deny).ok_or(UnknownBits(deny & !Deny::all().bits()))?,
            immutable: bits & Self::IMMUTABLE != 0,
        })
    }

    /// What holds on a page on which both `self` and `other` were asked for: denials add up.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            deny: self.deny | other.deny,
            immutable: self.immutable || other.immutable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_survive_a_round_trip() {
        for bits in [0, 1, 0xf, Attributes::IMMUTABLE, Attributes::IMMUTABLE | 5] {
            assert_eq!(Attributes::from_bits(bits).unwrap().bits(), bits);
        }
    }

    #[test]
    fn unknown_bits_are_named() {
        assert_eq!(
            Attributes::from_bits(0x31 | Attributes::IMMUTABLE),
            Err(UnknownBits(0x30))
        );
    }

    #[test]
    fn deny_bits_print_by_name() {
        assert_eq!(
            (Deny::NOWRITE | Deny::NOREAD).to_string(),
            "NOWRITE | NOREAD"
        );
        assert_eq!(Deny::empty().to_string(), "none");
    }
}
