// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM is told, so that an access comes to user space just when the rules say something
//! about it.
//!
//! KVM's filter (KVM_X86_SET_MSR_FILTER; `kvm_msr_allowed()` in Linux' arch/x86/kvm/x86.c) is at
//! most 16 ranges of at most 12288 MSRs. Of the ranges that speak of an access to an MSR the first
//! one's bit counts, set for "KVM carries it out", and where none does a default. What is not
//! allowed there makes an exit to user space, if KVM_CAP_X86_USER_SPACE_MSR says so. Nothing here
//! makes the call.

use std::ops::Range;

use super::{Access, Decisions, END, X2APIC};
use crate::protect::spans::clip;

/// Most ranges of one filter: `KVM_MSR_FILTER_MAX_RANGES`.
pub const MAX_FILTER_RANGES: usize = 16;

/// Most MSRs of one range: 8 for each byte of `KVM_MSR_FILTER_MAX_BITMAP_SIZE`.
pub const MAX_FILTER_MSRS: u32 = 8 * 0x600;

/// A range of the filter: `struct kvm_msr_filter_range`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FilterRange {
    /// The accesses that the range speaks of.
    pub access: Access,
    /// The MSR of bit 0.
    pub base: u32,
    /// How many MSRs: 1 to [`MAX_FILTER_MSRS`].
    pub nmsrs: u32,
    /// Bit i of byte j is that of MSR `base` + 8 j + i. Whole words of 8 bytes, as KVM reads them.
    pub bitmap: Vec<u8>,
}

/// A filter: `struct kvm_msr_filter`. No two of its ranges speak of the same access to the same
/// MSR, so their order does not matter, and others may come before them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Filter {
    /// Whether accesses that no range speaks of come to user space:
    /// `KVM_MSR_FILTER_DEFAULT_DENY`.
    pub default_deny: bool,
    /// The ranges.
    pub ranges: Vec<FilterRange>,
}

/// The rules need more ranges than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the MSRs of the rules lie too far apart for a filter of {budget} ranges of 12288 MSRs each"
)]
#[non_exhaustive]
pub struct FilterFull {
    /// How many ranges there are.
    pub budget: usize,
}

impl Filter {
    /// The filter that deflects what `decisions` speak of, and nothing else, in at most `budget`
    /// ranges.
    ///
    /// Either what is deflected is listed, or everything else is, whichever takes fewer ranges.
    /// For one access alone none has fewer ranges. For both, that is not looked for beyond the two
    /// ways of `docs/msr.md`.
    ///
    /// # Errors
    ///
    /// There is no such filter.
    pub fn new(decisions: &Decisions, budget: usize) -> Result<Self, FilterFull> {
        let reads = decisions.deflected_reads();
        let writes = decisions.deflected_writes();
        let (rest_reads, rest_writes) = (carried_out(&reads), carried_out(&writes));
        let deflected = cover(&reads, &writes, budget).map(|windows| (false, windows));
        let rest = cover(&rest_reads, &rest_writes, budget).map(|windows| (true, windows));
        let (default_deny, windows) = [deflected, rest]
            .into_iter()
            .flatten()
            .min_by_key(|(_, windows)| windows.len())
            .ok_or(FilterFull { budget })?;
        // KVM refuses a filter that denies by default and has no range. This one has: writes of
        // TSC_DEADLINE are always carried out.
        let ranges = windows
            .into_iter()
            .map(|window| window.range(default_deny))
            .collect();
        Ok(Self {
            default_deny,
            ranges,
        })
    }
}

/// What KVM has to carry out when `deflected` comes to user space. [`X2APIC`] needs no mention.
fn carried_out(deflected: &[Range<u64>]) -> Vec<Range<u64>> {
    let x2apic = u64::from(*X2APIC.start())..u64::from(*X2APIC.end()) + 1;
    let mut rest = Vec::new();
    let mut from = 0;
    for span in deflected.iter().chain([&(END..END)]) {
        for part in [
            from..span.start.min(x2apic.start),
            from.max(x2apic.end)..span.start,
        ] {
            if !part.is_empty() {
                rest.push(part);
            }
        }
        from = span.end;
    }
    rest
}

/// A range of the filter before it is made: which accesses, where, and to which MSRs in it.
struct Window<'a> {
    access: Access,
    span: Range<u64>,
    listed: &'a [Range<u64>],
}

impl Window<'_> {
    /// The range whose bits say "carry it out" for what is listed, or for what is not.
    fn range(&self, carry_out_listed: bool) -> FilterRange {
        let nmsrs = self.span.end - self.span.start;
        let fill = if carry_out_listed { 0 } else { 0xff };
        let mut bitmap = vec![fill; nmsrs.div_ceil(64) as usize * 8];
        for part in parts(self.listed, &self.span) {
            for bit in part.start - self.span.start..part.end - self.span.start {
                bitmap[(bit / 8) as usize] ^= 1 << (bit % 8);
            }
        }
        let number = |n| u32::try_from(n).expect("windows lie among MSR numbers");
        FilterRange {
            access: self.access,
            base: number(self.span.start),
            nmsrs: number(nmsrs),
            bitmap,
        }
    }
}

/// Windows that have all of `reads` and `writes`, or `None` if that takes more than `budget`.
///
/// Two ways are tried. In the first, each access is covered alone, with no more windows than it
/// must have, and windows that turn out the same are one. In the second, both are covered
/// together, and a window in which they differ is two. For sets that are equal, or have nothing
/// in common, one of them is best; else there may be a better one, which is not looked for.
fn cover<'a>(
    reads: &'a [Range<u64>],
    writes: &'a [Range<u64>],
    budget: usize,
) -> Option<Vec<Window<'a>>> {
    // Of a range that ends at 2^32 KVM computes the end as 0, and finds nothing in it.
    let last = |spans: &[Range<u64>]| spans.last().map_or(0, |span| span.end);
    if last(reads) == END || last(writes) == END {
        return None;
    }
    let alone = || {
        let mut windows: Vec<Window> = greedy(reads.iter(), budget)?
            .into_iter()
            .map(|span| window(Access::READ, span, reads))
            .collect();
        for span in greedy(writes.iter(), budget)? {
            let same = windows
                .iter_mut()
                .find(|w| w.access == Access::READ && w.span == span && same(reads, writes, &span));
            match same {
                Some(both) => both.access = Access::all(),
                None => windows.push(window(Access::WRITE, span, writes)),
            }
        }
        Some(windows)
    };
    let together = || {
        let mut both: Vec<&Range<u64>> = reads.iter().chain(writes).collect();
        both.sort_unstable_by_key(|span| span.start);
        let mut windows = Vec::new();
        for span in greedy(both.into_iter(), budget)? {
            if same(reads, writes, &span) {
                windows.push(window(Access::all(), span, reads));
                continue;
            }
            for (access, listed) in [(Access::READ, reads), (Access::WRITE, writes)] {
                let mut listed_here = parts(listed, &span);
                if let Some(first) = listed_here.next() {
                    let end = listed_here.last().map_or(first.end, |last| last.end);
                    windows.push(window(access, first.start..end, listed));
                }
            }
        }
        Some(windows)
    };
    [alone(), together()]
        .into_iter()
        .flatten()
        .filter(|windows| windows.len() <= budget)
        .min_by_key(Vec::len)
}

fn window(access: Access, span: Range<u64>, listed: &[Range<u64>]) -> Window<'_> {
    Window {
        access,
        span,
        listed,
    }
}

/// The fewest spans of at most [`MAX_FILTER_MSRS`] that have all of `spans`, which ascend and may
/// overlap; `None` if they are more than `budget`. Each begins and ends with a listed MSR.
fn greedy<'a>(
    spans: impl Iterator<Item = &'a Range<u64>>,
    budget: usize,
) -> Option<Vec<Range<u64>>> {
    const MAX: u64 = MAX_FILTER_MSRS as u64;
    let mut windows: Vec<Range<u64>> = Vec::new();
    for span in spans {
        let mut from = span.start;
        while from < span.end {
            let full = windows.last().map_or(0, |last| last.start + MAX);
            if from >= full {
                if windows.len() == budget {
                    return None;
                }
                windows.push(from..from);
            }
            if let Some(last) = windows.last_mut() {
                last.end = last.end.max(span.end.min(last.start + MAX));
                from = last.end;
            }
        }
    }
    Some(windows)
}

/// What of `listed` lies in `span`.
fn parts<'a>(
    listed: &'a [Range<u64>],
    span: &'a Range<u64>,
) -> impl Iterator<Item = Range<u64>> + 'a {
    let from = listed.partition_point(|part| part.end <= span.start);
    listed[from..]
        .iter()
        .take_while(|part| part.start < span.end)
        .map(|part| clip(part, span))
}

fn same(reads: &[Range<u64>], writes: &[Range<u64>], span: &Range<u64>) -> bool {
    parts(reads, span).eq(parts(writes, span))
}
