// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of what holds where.
//!
//! A copy of what the VM's owner enforces, kept as disjoint ranges; adjacent ranges with equal
//! attributes are one range. Pure data: who enforces it, and who asked, is not known here.

use std::ops::Range;

use rangemap::RangeMap;

use super::{Attributes, Change, Deny, Gfn, GfnRange, Loosens, Order, spans};

/// A range of pages and what is to hold, or holds, on each of them: `struct heki_pa_range` (seed 000).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// The pages.
    pub range: GfnRange,
    /// What is denied and watched on them.
    pub attributes: Attributes,
}

/// What is denied and watched on which guest page. A page on which nothing is, is not in it. Two
/// tables are equal if the same holds on every page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    ranges: RangeMap<u64, Attributes>,
}

impl Table {
    /// What `order` comes to, whole. The table stays as it is. Whether its pages are RAM, and its
    /// rights can be denied, is not known here.
    ///
    /// For n entries that touch m ranges this takes O((n + m) log (n + m)), however they overlap.
    ///
    /// # Errors
    ///
    /// The first entry that would loosen an immutable page. Of entries of an [`Order::Protect`] that
    /// overlap only the last one can; an [`Order::Lock`] never does.
    pub fn plan(&self, order: &Order) -> Result<Change, Loosens> {
        Change::of(self, order)
    }

    /// What it comes to that what holds now is for good (`SEAL`). The table stays as it is.
    pub fn seal(&self) -> Change {
        Change::seal(self)
    }

    /// Takes over a change that was planned on this table, as it is now. One that was planned on
    /// another is taken over as it is, so immutable pages can be loosened by it.
    pub fn apply(&mut self, change: &Change) {
        for (span, attributes) in change.pieces() {
            self.set(span, attributes);
        }
    }

    /// Whether what a change comes to holds already.
    #[must_use]
    pub fn holds(&self, change: &Change) -> bool {
        let mut same = true;
        for (span, attributes) in change.pieces() {
            self.each_within(&span, |_, held| same &= held == attributes);
        }
        same
    }

    /// Tells what holds on a range, whatever held there before.
    pub fn tell(&mut self, protection: &Protection) {
        self.set(span_of(protection.range), protection.attributes);
    }

    fn set(&mut self, span: Range<u64>, attributes: Attributes) {
        if attributes.is_free() {
            self.ranges.remove(span);
        } else {
            self.ranges.insert(span, attributes);
        }
    }

    /// What holds on one page.
    #[must_use]
    pub fn get(&self, gfn: Gfn) -> Attributes {
        self.ranges.get(&gfn.number()).copied().unwrap_or_default()
    }

    /// Whether any of `deny` is denied on any page of `range`.
    #[must_use]
    pub fn denies(&self, range: GfnRange, deny: Deny) -> bool {
        self.ranges
            .overlapping(&span_of(range))
            .any(|(_, attributes)| attributes.deny().intersects(deny))
    }

    /// The ranges on the pages of `range`, cut to it, in ascending order.
    pub fn within(&self, range: GfnRange) -> impl Iterator<Item = Protection> + '_ {
        let span = span_of(range);
        self.ranges
            .overlapping(span.clone())
            .map(move |(held, &attributes)| protection(spans::clip(held, &span), attributes))
    }

    /// Hands over the pages of `span` in order: each stretch on which one thing holds, free ones
    /// too.
    pub(super) fn each_within(&self, span: &Range<u64>, take: impl FnMut(Range<u64>, Attributes)) {
        spans::each_within(&self.ranges, span, take);
    }

    /// How many disjoint ranges there are; neighbours with equal attributes are one.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// How many there will be when `change` is applied. Looks at what lies between its first and its
    /// last page only.
    #[must_use]
    pub fn len_after(&self, change: &Change) -> usize {
        let mut pieces = change.pieces();
        let Some((first, _)) = pieces.next() else {
            return self.len();
        };
        let last = pieces.last().map_or(first.end, |(last, _)| last.end);
        // With the neighbours, which may become one with what changes.
        let around = first.start.saturating_sub(1)..last + 1;
        let mut part = Self::default();
        for (held, &attributes) in self.ranges.overlapping(&around) {
            part.ranges.insert(held.clone(), attributes);
        }
        let before = part.len();
        part.apply(change);
        self.len() - before + part.len()
    }

    /// Whether nothing is denied or watched anywhere.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Protection> + '_ {
        self.ranges
            .iter()
            .map(|(held, &attributes)| protection(held.clone(), attributes))
    }

    /// How many pages the table covers.
    pub fn pages(&self) -> u64 {
        self.iter().map(|p| p.range.pages()).sum()
    }
}

/// Frame numbers as `rangemap` has them, with an exclusive end.
pub(super) fn span_of(range: GfnRange) -> Range<u64> {
    range.start().number()..range.end().number() + 1
}

pub(super) fn protection(span: Range<u64>, attributes: Attributes) -> Protection {
    Protection {
        range: GfnRange::new(span.start, span.end - 1).expect("only GfnRanges are put in"),
        attributes,
    }
}

impl FromIterator<Protection> for Table {
    fn from_iter<I: IntoIterator<Item = Protection>>(protections: I) -> Self {
        let mut table = Self::default();
        for protection in protections {
            table.tell(&protection);
        }
        table
    }
}

#[cfg(test)]
#[path = "model.rs"]
mod model;
