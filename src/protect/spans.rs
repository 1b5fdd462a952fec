// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs of numbers with something on each of them: what tables of pages and of MSRs share.
//!
//! Knows neither pages nor MSRs. What is asked for on a number is a set of bits here, and two
//! things asked for on one number are the union of their bits.

use std::ops::Range;

use rangemap::RangeMap;

/// The part of `held` that lies in `to`; they overlap.
pub(super) fn clip(held: &Range<u64>, to: &Range<u64>) -> Range<u64> {
    held.start.max(to.start)..held.end.min(to.end)
}

/// Hands over `span` in order: each stretch on which one thing is, the default where `map` has
/// nothing.
pub(super) fn each_within<A: Copy + Default + Eq>(
    map: &RangeMap<u64, A>,
    span: &Range<u64>,
    mut take: impl FnMut(Range<u64>, A),
) {
    let mut from = span.start;
    for (held, &value) in map.overlapping(span) {
        let part = clip(held, span);
        if from < part.start {
            take(from..part.start, A::default());
        }
        from = part.end;
        take(part, value);
    }
    if from < span.end {
        take(from..span.end, A::default());
    }
}

/// Entries made disjoint and ascending, each number with all bits that are asked for on it.
///
/// Goes through the ends of all entries in order and counts, for each bit, the entries that have
/// it and are open there.
pub(super) fn added_up(
    entries: impl Iterator<Item = (Range<u64>, u128)>,
) -> Vec<(Range<u64>, u128)> {
    let mut ends: Vec<(u64, bool, u128)> = entries
        .flat_map(|(span, bits)| [(span.start, true, bits), (span.end, false, bits)])
        .collect();
    ends.sort_unstable();
    let mut open = [0u32; 128];
    let mut asked = 0u128;
    let mut pieces: Vec<(Range<u64>, u128)> = Vec::new();
    let mut from = 0;
    for (at, opens, bits) in ends {
        if from < at {
            match pieces.last_mut() {
                Some((span, last)) if span.end == from && *last == asked => span.end = at,
                _ if asked == 0 => {}
                _ => pieces.push((from..at, asked)),
            }
        }
        from = at;
        let mut rest = bits;
        while rest != 0 {
            let bit = rest.trailing_zeros();
            rest &= rest - 1;
            let count = &mut open[bit as usize];
            *count = if opens { *count + 1 } else { *count - 1 };
            if *count == 0 {
                asked &= !(1 << bit);
            } else {
                asked |= 1 << bit;
            }
        }
    }
    pieces
}
