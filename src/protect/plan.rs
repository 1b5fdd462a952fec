// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From what is asked for to what changes: an order is held against a table as a whole.
//!
//! For n entries that touch m ranges of the table this takes O((n + m) log (n + m)), however the
//! entries overlap: they are made disjoint first, and then laid over the table once. Pure; the
//! table is not touched.

use std::ops::Range;

use rangemap::RangeMap;

use super::spans;
use super::table::span_of;
use super::{Attributes, Deny, Protection, Table, table};

/// What a guest asks for: `LOCK` is `KVM_HC_LOCK_MEM_PAGE_RANGES` of Heki v1 (seed 000), `PROTECT` is
/// `KVM_HC_PROTECT_MEMORY` of Heki v2 (`docs/device.md`). The attributes of entries are what is asked
/// for on each page; whether they are marked immutable is of no account here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Add these to what holds, for good. Where entries overlap they add up.
    Lock(Vec<Protection>),
    /// Let these take the place of what holds. Where entries overlap the last one counts.
    Protect(Vec<Protection>),
}

impl Order {
    /// The entries, in the order in which they were asked for.
    pub fn entries(&self) -> &[Protection] {
        match self {
            Self::Lock(entries) | Self::Protect(entries) => entries,
        }
    }
}

/// An order would loosen an immutable page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} would loosen an immutable page")]
#[non_exhaustive]
pub struct Loosens {
    /// The first entry that does, counted from 0.
    pub index: usize,
}

/// What an order comes to on one table: what each page that it touches is to become. Made by
/// [`Table::plan`] and [`Table::seal`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a change holds when it is enforced and applied"]
pub struct Change {
    /// Disjoint and ascending. Free attributes take a page out of the table.
    pieces: Vec<(Range<u64>, Attributes)>,
}

impl Change {
    /// How many pages are touched.
    pub fn pages(&self) -> u64 {
        self.pieces
            .iter()
            .map(|(span, _)| span.end - span.start)
            .sum()
    }

    /// What each page becomes: disjoint, ascending; free attributes where nothing is to hold. Pages
    /// on which the same holds already may be among them.
    pub fn protections(&self) -> impl Iterator<Item = Protection> + '_ {
        self.pieces()
            .map(|(span, attributes)| table::protection(span, attributes))
    }

    pub(super) fn pieces(&self) -> impl Iterator<Item = (Range<u64>, Attributes)> + '_ {
        self.pieces.iter().cloned()
    }

    pub(super) fn of(table: &Table, order: &Order) -> Result<Self, Loosens> {
        match order {
            Order::Lock(entries) => Ok(Self::lock(table, entries)),
            Order::Protect(entries) => Self::protect(table, entries),
        }
    }

    fn lock(table: &Table, entries: &[Protection]) -> Self {
        let mut pieces = Vec::new();
        for (span, asked) in added_up(entries) {
            table.each_within(&span, |part, held| {
                pieces.push((part, held.union(asked).locked()));
            });
        }
        Self { pieces }
    }

    fn protect(table: &Table, entries: &[Protection]) -> Result<Self, Loosens> {
        let mut pieces = Vec::new();
        let mut loosens = None::<usize>;
        for (span, &(index, asked)) in last_counts(entries).iter() {
            table.each_within(span, |part, held| {
                if !held.is_immutable() {
                    pieces.push((part, asked));
                } else if !held.is_loosened_by(asked) {
                    pieces.push((part, asked.locked()));
                } else {
                    loosens = Some(loosens.map_or(index, |first| first.min(index)));
                }
            });
        }
        match loosens {
            Some(index) => Err(Loosens { index }),
            None => Ok(Self { pieces }),
        }
    }

    pub(super) fn seal(table: &Table) -> Self {
        let pieces = table
            .iter()
            .filter(|held| !held.attributes.is_immutable())
            .map(|held| (span_of(held.range), held.attributes.locked()))
            .collect();
        Self { pieces }
    }
}

/// Entries made disjoint, each page with the last one that names it and its index.
fn last_counts(entries: &[Protection]) -> RangeMap<u64, (usize, Attributes)> {
    let mut map = RangeMap::new();
    for (index, entry) in entries.iter().enumerate() {
        let asked = Attributes::new(entry.attributes.deny(), entry.attributes.audit());
        map.insert(span_of(entry.range), (index, asked));
    }
    map
}

/// Entries made disjoint and ascending, each page with all that is asked for on it.
fn added_up(entries: &[Protection]) -> impl Iterator<Item = (Range<u64>, Attributes)> {
    let bits = entries.iter().map(|entry| {
        let asked = entry.attributes.bits() & !Attributes::IMMUTABLE;
        (span_of(entry.range), asked.into())
    });
    spans::added_up(bits).into_iter().map(|(span, bits)| {
        let bits = bits as u64;
        let asked = Attributes::new(
            Deny::from_bits_truncate(bits),
            Deny::from_bits_truncate(bits >> Attributes::AUDIT_SHIFT),
        );
        (span, asked)
    })
}
