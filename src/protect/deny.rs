// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rights that can be denied or watched on a guest page, and the mark that makes it final.
//!
//! Knows the bits and their order, and nothing of pages, devices or wires that carry them.

use std::fmt;

bitflags::bitflags! {
    /// Rights of a guest on a page, each named by its denial (`docs/device.md`, "Attributes"). A
    /// set bit takes a right away, as in Heki's `KVM_HC_LOCK_MEM_PAGE_RANGES` (seed 000: "nowrite"
    /// rather than "read-only"); the value of `NOWRITE` is that of `HEKI_ATTR_MEM_NOWRITE`. Bits
    /// are compared one by one: `NOEXEC` does not stand for `NOEXEC_KERNEL`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Deny: u64 {
        /// No store to the page succeeds.
        const NOWRITE = 1 << 0;
        /// No instruction is fetched from the page.
        const NOEXEC = 1 << 1;
        /// No load from the page succeeds.
        const NOREAD = 1 << 2;
        /// No instruction is fetched from the page in supervisor mode (CPL below 3).
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

/// What holds, or is to hold, on a page (`docs/device.md`, "Attributes"). The default: every right
/// is free.
///
/// For each right a page is in one of three states, in this order: free, watched, denied. What
/// is denied is not watched, whatever was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    deny: Deny,
    audit: Deny,
    immutable: bool,
}

/// Attribute bits that nobody knows: these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown attribute bits {0:#x}")]
pub struct UnknownBits(pub u64);

impl Attributes {
    /// The bit that stands for "immutable" wherever attributes are one number.
    pub const IMMUTABLE: u64 = 1 << 63;
    /// How far the bit that watches a right lies above the one that denies it.
    pub const AUDIT_SHIFT: u32 = 8;

    /// Mutable attributes that deny `deny` and watch what is left of `audit`.
    #[must_use]
    pub fn new(deny: Deny, audit: Deny) -> Self {
        Self {
            deny,
            audit: audit.difference(deny),
            immutable: false,
        }
    }

    /// The same, until system reset.
    #[must_use]
    pub fn locked(self) -> Self {
        Self {
            immutable: true,
            ..self
        }
    }

    /// The rights that are denied.
    pub fn deny(self) -> Deny {
        self.deny
    }

    /// The rights that are watched.
    pub fn audit(self) -> Deny {
        self.audit
    }

    /// Whether until system reset the attributes can only grow.
    #[must_use]
    pub fn is_immutable(self) -> bool {
        self.immutable
    }

    /// Whether every right is free. A page of which that is true is in no table.
    #[must_use]
    pub fn is_free(self) -> bool {
        (self.deny | self.audit).is_empty()
    }

    /// As one number, that of the device's requests and answers: deny bits, what is watched shifted
    /// left by [`Self::AUDIT_SHIFT`], and [`Self::IMMUTABLE`].
    pub fn bits(self) -> u64 {
        self.deny.bits()
            | self.audit.bits() << Self::AUDIT_SHIFT
            | if self.immutable { Self::IMMUTABLE } else { 0 }
    }

    /// Reads what [`Self::bits`] gives. Where a right is both denied and watched it is denied.
    ///
    /// # Errors
    ///
    /// [`UnknownBits`] names the bits that mean nothing.
    pub fn from_bits(bits: u64) -> Result<Self, UnknownBits> {
        let known = Deny::all().bits();
        let unknown = bits & !(known | known << Self::AUDIT_SHIFT | Self::IMMUTABLE);
        if unknown != 0 {
            return Err(UnknownBits(unknown));
        }
        Ok(Self {
            immutable: bits & Self::IMMUTABLE != 0,
            ..Self::new(
                Deny::from_bits_truncate(bits),
                Deny::from_bits_truncate(bits >> Self::AUDIT_SHIFT),
            )
        })
    }

    /// What holds on a page on which both `self` and `other` were asked for: each right is in the
    /// higher of its two states.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            immutable: self.immutable || other.immutable,
            ..Self::new(self.deny | other.deny, self.audit | other.audit)
        }
    }

    /// Whether a page on which `self` holds would be loosened by `next`: some right moves back in
    /// the order of its states.
    #[must_use]
    pub fn is_loosened_by(self, next: Self) -> bool {
        !next.deny.contains(self.deny) || !(next.deny | next.audit).contains(self.audit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pair of deny and audit bits there is.
    fn all() -> impl Iterator<Item = Attributes> {
        (0..256).map(|n| {
            Attributes::new(
                Deny::from_bits_truncate(n),
                Deny::from_bits_truncate(n >> 4),
            )
        })
    }

    /// The states of the four rights: 0 free, 1 watched, 2 denied.
    fn states(a: Attributes) -> [u8; 4] {
        [0, 1, 2, 3].map(|bit| {
            let right = Deny::from_bits_truncate(1 << bit);
            match (a.deny().contains(right), a.audit().contains(right)) {
                (true, false) => 2,
                (false, true) => 1,
                (false, false) => 0,
                (true, true) => panic!("{a:?} both denies and watches"),
            }
        })
    }

    #[test]
    fn bits_survive_a_round_trip() {
        for a in all().flat_map(|a| [a, a.locked()]) {
            assert_eq!(Attributes::from_bits(a.bits()), Ok(a));
        }
    }

    #[test]
    fn what_is_denied_is_not_watched() {
        let both = Attributes::from_bits(0x0303).unwrap();
        assert_eq!(both.bits(), 0x3);
        let added = Attributes::new(Deny::empty(), Deny::all())
            .union(Attributes::new(Deny::NOREAD, Deny::empty()));
        assert_eq!(added.bits(), 0x0b04);
    }

    #[test]
    fn loosened_means_that_some_right_moves_back() {
        for from in all() {
            for to in all() {
                let (before, after) = (states(from), states(to));
                let back = before.iter().zip(&after).any(|(b, a)| a < b);
                assert_eq!(from.is_loosened_by(to), back, "{from:?} to {to:?}");
                let highest: Vec<_> = before.iter().zip(after).map(|(&b, a)| a.max(b)).collect();
                assert_eq!(states(from.union(to)).to_vec(), highest);
            }
        }
    }

    #[test]
    fn unknown_bits_are_named() {
        assert_eq!(
            Attributes::from_bits(0x1031 | Attributes::IMMUTABLE),
            Err(UnknownBits(0x1030))
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
