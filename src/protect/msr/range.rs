// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSR numbers, ranges of them and the two ways to access one.
//!
//! An [`MsrRange`] that exists is non-empty and names no MSR that KVM never filters for any
//! access. Knows nothing of what a range is for.

use std::fmt;
use std::ops::{Range, RangeInclusive};

/// The MSRs of the local APIC in x2APIC mode. KVM never filters them (`kvm_msr_allowed()` in
/// Linux' arch/x86/kvm/x86.c), so no rule can speak of them.
pub const X2APIC: RangeInclusive<u32> = 0x800..=0x8ff;

/// IA32_TSC_DEADLINE. KVM carries out writes of it before it looks at its filter
/// (`handle_fastpath_wrmsr()` in Linux' arch/x86/kvm/x86.c), so no rule can restrict those.
pub const TSC_DEADLINE: u32 = 0x6e0;

bitflags::bitflags! {
    /// Ways to access an MSR, with the values of `KVM_MSR_ALLOW_READ` (KVM_ADD_MSR_ALLOWLIST
    /// proposal, seed 001) and of `KVM_MSR_FILTER_READ` (KVM_X86_SET_MSR_FILTER).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Access: u32 {
        /// RDMSR.
        const READ = 1 << 0;
        /// WRMSR.
        const WRITE = 1 << 1;
    }
}

/// Why two numbers are not a range of MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsrRangeError {
    /// The range would end before it starts.
    #[error("range starts at MSR {first:#x}, after its end {last:#x}")]
    Reversed {
        /// First MSR asked for.
        first: u32,
        /// Last MSR asked for.
        last: u32,
    },
    /// The range has an MSR of [`X2APIC`].
    #[error(
        "{} has x2APIC MSRs (0x800-0x8ff), which KVM never filters; leave them out",
        numbers(*first, *last)
    )]
    X2apic {
        /// First MSR asked for.
        first: u32,
        /// Last MSR asked for.
        last: u32,
    },
}

fn numbers(first: u32, last: u32) -> String {
    if first == last {
        format!("{first:#x}")
    } else {
        format!("{first:#x}-{last:#x}")
    }
}

/// A non-empty run of MSRs; both ends belong to it. None of them is in [`X2APIC`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsrRange {
    first: u32,
    last: u32,
}

impl MsrRange {
    /// The MSRs `first..=last`.
    ///
    /// # Errors
    ///
    /// `first` after `last`, or an MSR of [`X2APIC`], in this order.
    pub fn new(first: u32, last: u32) -> Result<Self, MsrRangeError> {
        if first > last {
            return Err(MsrRangeError::Reversed { first, last });
        }
        if first <= *X2APIC.end() && last >= *X2APIC.start() {
            return Err(MsrRangeError::X2apic { first, last });
        }
        Ok(Self { first, last })
    }

    /// First MSR.
    pub fn first(self) -> u32 {
        self.first
    }

    /// Last MSR, which belongs to the range.
    pub fn last(self) -> u32 {
        self.last
    }

    /// Whether `msr` belongs to the range.
    #[must_use]
    pub fn contains(self, msr: u32) -> bool {
        (self.first..=self.last).contains(&msr)
    }

    /// As `rangemap` has it, with an exclusive end.
    pub(super) fn span(self) -> Range<u64> {
        self.first.into()..u64::from(self.last) + 1
    }

    /// What [`Self::span`] was made from.
    pub(super) fn of_span(span: &Range<u64>) -> Self {
        let number = |n| u32::try_from(n).expect("only MsrRanges are put in");
        Self::new(number(span.start), number(span.end - 1)).expect("only MsrRanges are put in")
    }
}

impl fmt::Display for MsrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&numbers(self.first, self.last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_numbers_are_refused_with_their_reason() {
        let reason = |first, last| MsrRange::new(first, last).unwrap_err().to_string();
        assert_eq!(reason(2, 1), "range starts at MSR 0x2, after its end 0x1");
        for (first, last) in [(0, 0x800), (0x8ff, 0x900), (0, u32::MAX), (0x810, 0x820)] {
            assert!(reason(first, last).contains("x2APIC"));
        }
        assert!(reason(0x830, 0x830).starts_with("0x830 has"));
    }

    #[test]
    fn ranges_up_to_the_x2apic_and_to_the_last_number_are_good() {
        for (first, last) in [(0, 0x7ff), (0x900, u32::MAX), (u32::MAX, u32::MAX)] {
            let range = MsrRange::new(first, last).unwrap();
            assert_eq!(MsrRange::of_span(&range.span()), range);
        }
    }
}
