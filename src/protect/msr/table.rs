// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's rules, and what an order does to them.
//!
//! The same semantics as for pages: locked rules only get stricter until system reset, mutable
//! ones can be replaced and removed, and an order is held against the table as a whole before
//! anything changes. Reads and writes are two tables that know nothing of each other.
//!
//! For n rules that touch m ranges this takes O((n + m) log (n + m)), however they overlap.

use std::ops::Range;

use rangemap::RangeMap;

use super::action::Restriction;
use super::{MsrRange, OnRead, OnWrite, Rule};
use crate::protect::spans;

/// What a guest asks for (`docs/msr.md`, "The guest's rules").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Add these to what holds, for good. Where rules overlap they add up. A rule that allows
    /// adds nothing, and locks nothing.
    Lock(Vec<Rule>),
    /// Let these take the place of what holds; to allow is to remove. Where rules overlap the
    /// last one counts.
    Replace(Vec<Rule>),
}

impl Order {
    /// The rules, in the order in which they were asked for.
    pub fn rules(&self) -> &[Rule] {
        match self {
            Self::Lock(rules) | Self::Replace(rules) => rules,
        }
    }
}

/// An order would loosen a locked rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {index} would loosen a locked one")]
#[non_exhaustive]
pub struct Loosens {
    /// The first rule that does, counted from 0.
    pub index: usize,
}

/// What holds on one access to an MSR, and whether it can only get stricter until system reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Held<A> {
    /// What becomes of the access.
    pub on: A,
    /// Whether it is locked.
    pub immutable: bool,
}

type Pieces<A> = Vec<(Range<u64>, Held<A>)>;

/// What an order comes to on one table. Of each access: disjoint, ascending pieces, and what they
/// are to become.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a change holds when it is enforced and applied"]
pub struct Change {
    reads: Pieces<OnRead>,
    writes: Pieces<OnWrite>,
}

/// The guest's rules. An MSR of which nothing is restricted or reported is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    reads: Side<OnRead>,
    writes: Side<OnWrite>,
}

impl Table {
    /// What `order` comes to, whole. The table stays as it is.
    ///
    /// # Errors
    ///
    /// The first rule that would loosen a locked one.
    pub fn plan(&self, order: &Order) -> Result<Change, Loosens> {
        let (reads, writes) = match order {
            Order::Lock(rules) => (
                Ok(self.reads.lock(rules.iter().filter_map(on_reads))),
                Ok(self.writes.lock(rules.iter().filter_map(on_writes))),
            ),
            Order::Replace(rules) => (
                self.reads.replace(rules.iter().map(on_reads)),
                self.writes.replace(rules.iter().map(on_writes)),
            ),
        };
        match (reads, writes) {
            (Ok(reads), Ok(writes)) => Ok(Change { reads, writes }),
            (Err(a), Err(b)) => Err(Loosens {
                index: a.index.min(b.index),
            }),
            (Err(e), Ok(_)) | (Ok(_), Err(e)) => Err(e),
        }
    }

    /// What holds now is for good: changes the table at once, as nothing has to be enforced for it.
    pub fn seal(&mut self) {
        self.reads.seal();
        self.writes.seal();
    }

    /// Takes over a change that was planned on this table, as it is now. One that was planned on
    /// another is taken over as it is, so locked rules can be loosened by it.
    pub fn apply(&mut self, change: &Change) {
        self.reads.apply(&change.reads);
        self.writes.apply(&change.writes);
    }

    /// What holds on reads of one MSR.
    pub fn read(&self, msr: u32) -> Held<OnRead> {
        self.reads.get(msr)
    }

    /// What holds on writes of one MSR.
    pub fn write(&self, msr: u32) -> Held<OnWrite> {
        self.writes.get(msr)
    }

    /// The ranges on whose reads something holds, in ascending order.
    pub fn reads(&self) -> impl Iterator<Item = (MsrRange, Held<OnRead>)> + '_ {
        self.reads.iter()
    }

    /// The ranges on whose writes something holds, in ascending order.
    pub fn writes(&self) -> impl Iterator<Item = (MsrRange, Held<OnWrite>)> + '_ {
        self.writes.iter()
    }

    /// How many disjoint ranges there are, of reads and of writes.
    pub fn len(&self) -> usize {
        self.reads.0.len() + self.writes.0.len()
    }

    /// Whether nothing is restricted or reported.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells what holds on reads of a range, whatever held there before.
    pub fn tell_read(&mut self, range: MsrRange, held: Held<OnRead>) {
        self.reads.set(range.span(), held);
    }

    /// Tells what holds on writes of a range, whatever held there before.
    pub fn tell_write(&mut self, range: MsrRange, held: Held<OnWrite>) {
        self.writes.set(range.span(), held);
    }
}

fn on_reads(rule: &Rule) -> Option<(Range<u64>, OnRead)> {
    Some((rule.range().span(), rule.read()?))
}

fn on_writes(rule: &Rule) -> Option<(Range<u64>, OnWrite)> {
    Some((rule.range().span(), rule.write()?))
}

/// The rules of one access.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Side<A: Eq + Clone>(RangeMap<u64, Held<A>>);

impl<A: Restriction> Side<A> {
    fn lock(&self, entries: impl Iterator<Item = (Range<u64>, A)>) -> Pieces<A> {
        let mut pieces = Vec::new();
        for (span, bits) in spans::added_up(entries.map(|(span, on)| (span, on.bits()))) {
            let asked = A::from_bits(bits);
            spans::each_within(&self.0, &span, |part, held| {
                let held = Held {
                    on: held.on.join(asked),
                    immutable: true,
                };
                pieces.push((part, held));
            });
        }
        pieces
    }

    /// `entries` has `None` for a rule that does not speak of this access.
    fn replace(
        &self,
        entries: impl Iterator<Item = Option<(Range<u64>, A)>>,
    ) -> Result<Pieces<A>, Loosens> {
        let mut last_counts = RangeMap::new();
        for (index, entry) in entries.enumerate() {
            if let Some((span, on)) = entry {
                last_counts.insert(span, (index, on));
            }
        }
        let mut pieces = Vec::new();
        let mut loosens = None::<usize>;
        for (span, &(index, on)) in last_counts.iter() {
            spans::each_within(&self.0, span, |part, held| {
                if held.immutable && held.on.is_loosened_by(on) {
                    loosens = Some(loosens.map_or(index, |first| first.min(index)));
                }
                let immutable = held.immutable;
                pieces.push((part, Held { on, immutable }));
            });
        }
        match loosens {
            Some(index) => Err(Loosens { index }),
            None => Ok(pieces),
        }
    }

    fn seal(&mut self) {
        let lock = |(span, held): (&Range<u64>, &Held<A>)| {
            let held = Held {
                immutable: true,
                ..*held
            };
            (span.clone(), held)
        };
        self.0 = self.0.iter().map(lock).collect();
    }

    fn apply(&mut self, pieces: &Pieces<A>) {
        for (span, held) in pieces {
            self.set(span.clone(), *held);
        }
    }

    fn set(&mut self, span: Range<u64>, held: Held<A>) {
        if held.on.is_free() {
            self.0.remove(span);
        } else {
            self.0.insert(span, held);
        }
    }

    fn get(&self, msr: u32) -> Held<A> {
        self.0.get(&msr.into()).copied().unwrap_or_default()
    }

    fn iter(&self) -> impl Iterator<Item = (MsrRange, Held<A>)> + '_ {
        self.0
            .iter()
            .map(|(span, &held)| (MsrRange::of_span(span), held))
    }
}
