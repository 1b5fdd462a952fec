// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From what mappings let be done with pages to what can be taken away on them.
//!
//! A right that no mapping gives can be taken away without anybody noticing who plays by the tables.
//! Pure: knows ranges and rights, neither memory nor what holds there.

use rangemap::RangeMap;

use super::Rights;
use super::collective::Collective;
use super::runs::Run;
use crate::protect::{Attributes, Deny, GfnRange, Protection};

/// Ranges of each kind that a plan tells.
const TOLD_MAX: usize = 4096;

/// What becomes of pages that no mapping leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unmapped {
    /// Nothing, but they are counted.
    #[default]
    Leave,
    /// As [`Self::Leave`], and the plan tells which they are.
    Report,
    /// As [`Self::Leave`], but the plan names the first entry that has one as refused.
    Refuse,
    /// Neither written nor executed in supervisor mode. What maps them later, or maps them outside of
    /// the range that was walked (user mode, say), can only read.
    Deny,
}

/// What becomes of pages that are written and executed in supervisor mode, by one mapping or two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WriteExec {
    /// Nothing, but they are counted.
    #[default]
    Leave,
    /// As [`Self::Leave`], and the plan tells which they are.
    Report,
    /// As [`Self::Leave`], but the plan names the first entry that has one as refused.
    Refuse,
}

/// What becomes of pages for which the mappings give no answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Pages without mapping.
    pub unmapped: Unmapped,
    /// Pages that are written and executed.
    pub write_exec: WriteExec,
}

/// Pages by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Pages that the plan is about.
    pub pages: u64,
    /// Those that no mapping leads to. They are in none of the next three counts.
    pub unmapped: u64,
    /// Those that no mapping writes.
    pub not_written: u64,
    /// Those that no mapping executes in supervisor mode.
    pub not_executed: u64,
    /// Those that are written and executed in supervisor mode.
    pub write_exec: u64,
    /// Pages that get attributes.
    pub given: u64,
    /// Pages that are mapped, and that the plan is not about: devices' memory, say.
    pub elsewhere: u64,
}

/// Pages of one entry that get one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Piece {
    /// The pages.
    pub range: GfnRange,
    /// What they get; free attributes if that is nothing.
    pub attributes: Attributes,
    /// The entry that counts on them, counted from 0.
    pub entry: usize,
}

/// What pages get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[must_use = "a plan changes nothing until its order is carried out"]
pub struct Plan {
    /// What the pages of each entry may get.
    offered: Vec<Attributes>,
    /// The pages that the plan is about, with the entry that counts: disjoint, ascending.
    asked: Vec<(GfnRange, usize)>,
    /// Those of them that get something: disjoint, ascending, neighbours joined within an entry.
    given: Vec<Given>,
    /// Pages by kind, all of them, also beyond the lists.
    pub counts: Counts,
    /// The first entry with pages that the policy refuses. Nothing is to be set then.
    pub refused: Option<usize>,
    /// With [`Unmapped::Report`], the first 4096 ranges without mapping.
    pub unmapped: Vec<GfnRange>,
    /// With [`WriteExec::Report`], the first 4096 ranges that are written and executed.
    pub write_exec: Vec<GfnRange>,
    /// The first pages that are written and executed, whatever the policy.
    pub first_write_exec: Option<GfnRange>,
}

/// A [`Piece`] that gets something. Hostile tables make millions of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    start: u64,
    /// After the last.
    end: u64,
    entry: u32,
    unused: Unused,
}

/// Rights that no mapping gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Unused {
    write: bool,
    exec_supervisor: bool,
}

impl Unused {
    /// What of these rights an entry takes away.
    fn of(self, offered: Attributes) -> Attributes {
        let mut rights = Deny::empty();
        rights.set(Deny::NOWRITE, self.write);
        rights.set(Deny::NOEXEC_KERNEL, self.exec_supervisor);
        Attributes::new(offered.deny() & rights, offered.audit() & rights)
    }
}

impl Plan {
    /// The pages that get something: disjoint, ascending, cut where another entry counts.
    pub fn given(&self) -> impl ExactSizeIterator<Item = Piece> + '_ {
        self.given
            .iter()
            .map(|given| self.piece(given, given.start, given.end))
    }

    /// Hands over the pages of `range` that the plan is about, in ascending order: those that get
    /// nothing, too.
    pub(super) fn each_within(&self, range: GfnRange, mut take: impl FnMut(Piece)) {
        let (from, to) = (range.start().number(), range.end().number() + 1);
        let first = self.asked.partition_point(|asked| end_of(asked.0) <= from);
        for &(asked, entry) in &self.asked[first..] {
            let mut at = asked.start().number().max(from);
            let end = end_of(asked).min(to);
            if at >= end {
                return;
            }
            let nothing = |range| Piece {
                range,
                attributes: Attributes::default(),
                entry,
            };
            let first = self.given.partition_point(|given| given.end <= at);
            for given in self.given[first..].iter().take_while(|g| g.start < end) {
                pages(at, given.start).map(nothing).map(&mut take);
                at = at.max(given.start);
                take(self.piece(given, at, given.end.min(end)));
                at = given.end.min(end);
            }
            pages(at, end).map(nothing).map(&mut take);
        }
    }

    /// Pages from `start` to before `end`, which are among those of `given`.
    fn piece(&self, given: &Given, start: u64, end: u64) -> Piece {
        let entry = given.entry as usize;
        Piece {
            range: pages(start, end).expect("a part that is not empty"),
            attributes: given.unused.of(self.offered[entry]),
            entry,
        }
    }

    /// Has the pages of `range`, which come after all others, get what `entry` offers of rights that
    /// are `unused`.
    fn give(&mut self, range: GfnRange, entry: usize, unused: Unused) {
        let offered = self.offered[entry];
        let attributes = unused.of(offered);
        if attributes.is_free() {
            return;
        }
        self.counts.given += range.pages();
        let (start, end) = (range.start().number(), end_of(range));
        let entry = entry as u32;
        match self.given.last_mut() {
            Some(last)
                if last.end == start
                    && last.entry == entry
                    && last.unused.of(offered) == attributes =>
            {
                last.end = end;
            }
            _ => self.given.push(Given {
                start,
                end,
                entry,
                unused,
            }),
        }
    }

    fn refuse(&mut self, entry: usize) {
        self.refused = Some(self.refused.map_or(entry, |first| first.min(entry)));
    }
}

/// What the pages of `entries` get of the attributes there (`docs/paging.md`, "`plan`: what pages
/// get"): that of `NOWRITE` where nothing writes, that of `NOEXEC_KERNEL` where nothing executes in
/// supervisor mode. Where entries overlap the last one counts, and those without attributes are for
/// pages to be left alone.
///
/// Nothing else follows from a kernel's tables: its pages may well be executed and read by
/// processes whose tables were not looked at.
pub fn plan(collective: &Collective, entries: &[Protection], policy: Policy) -> Plan {
    let mut plan = Plan {
        offered: entries.iter().map(|entry| entry.attributes).collect(),
        asked: last_counts(entries),
        ..Plan::default()
    };
    let asked = std::mem::take(&mut plan.asked);
    let mut mapped = 0;
    each_part(collective.runs(), &asked, |range, entry, rights| {
        let pages = range.pages();
        plan.counts.pages += pages;
        let mut unused = Unused::default();
        if rights.is_empty() {
            plan.counts.unmapped += pages;
            match policy.unmapped {
                Unmapped::Leave => {}
                Unmapped::Report => tell(&mut plan.unmapped, range),
                Unmapped::Refuse => plan.refuse(entry),
                Unmapped::Deny => {
                    unused = Unused {
                        write: true,
                        exec_supervisor: true,
                    };
                }
            }
        } else {
            mapped += pages;
            unused.write = !rights.contains(Rights::WRITE);
            unused.exec_supervisor = !rights.contains(Rights::EXEC_SUPERVISOR);
            plan.counts.not_written += pages * u64::from(unused.write);
            plan.counts.not_executed += pages * u64::from(unused.exec_supervisor);
            if rights.is_write_exec() {
                plan.counts.write_exec += pages;
                plan.first_write_exec.get_or_insert(range);
                match policy.write_exec {
                    WriteExec::Leave => {}
                    WriteExec::Report => tell(&mut plan.write_exec, range),
                    WriteExec::Refuse => plan.refuse(entry),
                }
            }
        }
        plan.give(range, entry, unused);
    });
    plan.counts.elsewhere = collective.pages().iter().sum::<u64>() - mapped;
    plan.asked = asked;
    plan
}

/// The pages of entries with attributes, made disjoint: each with the last entry that has it.
fn last_counts(entries: &[Protection]) -> Vec<(GfnRange, usize)> {
    let mut map = RangeMap::new();
    for (index, entry) in entries.iter().enumerate() {
        map.insert(entry.range.start().number()..end_of(entry.range), index);
    }
    map.into_iter()
        .filter(|&(_, index)| !entries[index].attributes.is_free())
        .filter_map(|(span, index)| Some((pages(span.start, span.end)?, index)))
        .collect()
}

/// Hands over the pages of `asked` in ascending order, in ranges with the same rights.
fn each_part(
    runs: &[Run],
    asked: &[(GfnRange, usize)],
    mut take: impl FnMut(GfnRange, usize, Rights),
) {
    for &(range, entry) in asked {
        let (mut at, end) = (range.start().number(), end_of(range));
        let mut take = |start: u64, end: u64, rights| {
            if let Some(range) = pages(start, end) {
                take(range, entry, rights);
            }
        };
        let first = runs.partition_point(|run| run.end() <= at);
        for run in runs[first..].iter().take_while(|run| run.start() < end) {
            take(at, run.start(), Rights::empty());
            at = at.max(run.start());
            take(at, run.end().min(end), run.rights());
            at = run.end().min(end);
        }
        take(at, end, Rights::empty());
    }
}

fn tell(told: &mut Vec<GfnRange>, range: GfnRange) {
    let full = told.len() == TOLD_MAX;
    let joined = told.last().and_then(|last| last.followed_by(range));
    match (joined, told.last_mut()) {
        (Some(joined), Some(last)) => *last = joined,
        _ if full => {}
        _ => told.push(range),
    }
}

/// The frame after the last.
fn end_of(range: GfnRange) -> u64 {
    range.end().number() + 1
}

/// The frames from `start` to before `end`, if there are any.
fn pages(start: u64, end: u64) -> Option<GfnRange> {
    GfnRange::new(start, end.checked_sub(1)?).ok()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
