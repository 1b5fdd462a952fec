// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can become of an access to an MSR, and which of two such things is the stricter.
//!
//! Knows the order and how to combine; nothing of MSR numbers, or of who asked.

use std::fmt::Debug;

/// What becomes of a read, from free to strict. Of two, the stricter is the greater (`docs/msr.md`,
/// "Which rule is the stricter").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OnRead {
    /// It is carried out.
    #[default]
    Allow,
    /// It is carried out and reported.
    Log,
    /// It gets #GP(0) and is reported.
    Deny,
}

/// What becomes of a write. Of two, neither need be the stricter: `docs/msr.md` has the table of
/// what is as strict as both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnWrite {
    /// It may be carried out.
    Pass {
        /// Bits that a write must leave as they are, or it is denied. 0: it may write anything.
        pinned: u64,
        /// Whether a write that is carried out is reported.
        log: bool,
    },
    /// It gets #GP(0) and is reported.
    Deny,
}

impl Default for OnWrite {
    fn default() -> Self {
        Self::ALLOW
    }
}

impl OnWrite {
    /// Any write is carried out.
    pub const ALLOW: Self = Self::Pass {
        pinned: 0,
        log: false,
    };
    /// Any write is carried out and reported.
    pub const LOG: Self = Self::Pass {
        pinned: 0,
        log: true,
    };
}

/// An action as a set of bits. Of two, what is as strict as both has the bits of both.
pub(super) trait Restriction: Copy + Debug + Default + Eq {
    /// The set. 0 for what is free.
    fn bits(self) -> u128;

    /// The action that has these bits; a bit of [`Self::bits`] that others make pointless may be
    /// set.
    fn from_bits(bits: u128) -> Self;

    /// What is as strict as both.
    fn join(self, other: Self) -> Self {
        Self::from_bits(self.bits() | other.bits())
    }

    /// Whether nothing is restricted or reported.
    fn is_free(self) -> bool {
        self == Self::default()
    }

    /// Whether `next` is not at least as strict.
    fn is_loosened_by(self, next: Self) -> bool {
        self.join(next) != next
    }
}

const LOG: u128 = 1 << 64;
const DENY: u128 = 1 << 65;

impl Restriction for OnRead {
    fn bits(self) -> u128 {
        match self {
            Self::Allow => 0,
            Self::Log => LOG,
            Self::Deny => DENY,
        }
    }

    fn from_bits(bits: u128) -> Self {
        if bits & DENY != 0 {
            Self::Deny
        } else if bits & LOG != 0 {
            Self::Log
        } else {
            Self::Allow
        }
    }
}

impl Restriction for OnWrite {
    fn bits(self) -> u128 {
        match self {
            Self::Pass { pinned, log } => u128::from(pinned) | if log { LOG } else { 0 },
            Self::Deny => DENY,
        }
    }

    fn from_bits(bits: u128) -> Self {
        if bits & DENY != 0 {
            Self::Deny
        } else {
            Self::Pass {
                pinned: bits as u64,
                log: bits & LOG != 0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_in_the_order_of_the_table() {
        let all = [OnRead::Allow, OnRead::Log, OnRead::Deny];
        for a in all {
            for b in all {
                assert_eq!(a.join(b), a.max(b));
                assert_eq!(a.is_loosened_by(b), b < a);
            }
        }
    }

    #[test]
    fn writes_combine_by_the_table() {
        let pass = |pinned, log| OnWrite::Pass { pinned, log };
        let all = [
            OnWrite::ALLOW,
            OnWrite::LOG,
            pass(1, false),
            pass(2, false),
            pass(3, false),
            pass(1, true),
            pass(2, true),
            pass(3, true),
            pass(u64::MAX, false),
            OnWrite::Deny,
        ];
        for a in all {
            assert_eq!(a.join(OnWrite::ALLOW), a);
            assert_eq!(a.join(OnWrite::Deny), OnWrite::Deny);
            for b in all {
                assert_eq!(a.join(b), b.join(a));
                assert!(!a.is_loosened_by(a.join(b)));
                assert_eq!(a.is_loosened_by(b), a.join(b) != b);
            }
        }
        assert_eq!(pass(1, false).join(pass(2, true)), pass(3, true));
        // A pin does not swallow a log: else pinning one bit would hide writes of the others.
        assert!(OnWrite::LOG.is_loosened_by(pass(u64::MAX, false)));
        assert!(pass(3, false).is_loosened_by(pass(1, false)));
        assert!(!pass(u64::MAX, true).is_loosened_by(OnWrite::Deny));
    }
}
