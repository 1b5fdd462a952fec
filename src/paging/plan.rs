// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From what mappings let be done with pages to what can be denied on them.
//!
//! A right that no mapping gives can be taken away without anybody noticing who plays by the tables.
//! Pure: knows ranges and rights, neither memory nor who enforces.

use super::Rights;
use super::collective::Collective;
use super::runs::Run;
use crate::protect::{Attributes, Deny, GfnRange, Protection};

/// Ranges of each kind that a plan tells.
const TOLD_MAX: usize = 4096;

/// What becomes of pages that no mapping leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Unmapped {
    /// Nothing, but they are counted.
    #[default]
    Leave,
    /// As [`Self::Leave`], and the plan tells which they are.
    Report,
    /// There is no plan if there is one.
    Refuse,
    /// Neither written nor executed in supervisor mode. What maps them later, or maps them outside of
    /// the range that was walked (user mode, say), can only read.
    Deny,
}

/// What becomes of pages that are written and executed in supervisor mode, by one mapping or two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WriteExec {
    /// Nothing, but they are counted.
    #[default]
    Leave,
    /// As [`Self::Leave`], and the plan tells which they are.
    Report,
    /// There is no plan if there is one.
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

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Pages are written and executed.
    #[error("{pages} pages are writable and executable, the first at frames {first}")]
    WriteExec {
        /// How many.
        pages: u64,
        /// The first of them.
        first: GfnRange,
    },
    /// Pages have no mapping.
    #[error("{pages} pages are not mapped, the first at frames {first}")]
    Unmapped {
        /// How many.
        pages: u64,
        /// The first of them.
        first: GfnRange,
    },
}

/// Pages by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that the plan is about.
    pub pages: u64,
    /// Those that no mapping leads to. They are in none of the counts below.
    pub unmapped: u64,
    /// Those that no mapping writes.
    pub not_written: u64,
    /// Those that no mapping executes in supervisor mode.
    pub not_executed: u64,
    /// Those that are written and executed in supervisor mode.
    pub write_exec: u64,
    /// Pages that get attributes by the plan.
    pub denied: u64,
    /// Pages that are mapped, and that the plan is not about: devices' memory, say.
    pub elsewhere: u64,
}

/// What to deny.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Disjoint, ascending, neighbours joined; mutable attributes, only of what is offered.
    pub protections: Vec<Protection>,
    /// Pages by kind, all of them.
    pub counts: Counts,
    /// With [`Unmapped::Report`], the first 4096 ranges without mapping.
    pub unmapped: Vec<GfnRange>,
    /// With [`WriteExec::Report`], the first 4096 ranges that are written and executed.
    pub write_exec: Vec<GfnRange>,
}

/// What can be denied on the pages of `within` (RAM, less what is to be left alone; in any order),
/// as far as `offered` goes: `NOWRITE` where nothing writes, `NOEXEC_KERNEL` where nothing executes
/// in supervisor mode.
///
/// Nothing else follows from a kernel's tables: its pages may well be executed and read by
/// processes whose tables were not looked at.
///
/// # Errors
///
/// Pages that `policy` does not put up with.
pub fn plan(
    collective: &Collective,
    within: &[GfnRange],
    policy: Policy,
    offered: Deny,
) -> Result<Plan, Refused> {
    let mut plan = Plan::default();
    let (mut first_write_exec, mut first_unmapped) = (None, None);
    let mut mapped = 0;
    each_part(collective.runs(), within, |range, rights| {
        let pages = range.pages();
        plan.counts.pages += pages;
        let mut deny = Deny::empty();
        if rights.is_empty() {
            plan.counts.unmapped += pages;
            first_unmapped.get_or_insert(range);
            match policy.unmapped {
                Unmapped::Leave | Unmapped::Refuse => {}
                Unmapped::Report => tell(&mut plan.unmapped, range),
                Unmapped::Deny => deny = Deny::NOWRITE | Deny::NOEXEC_KERNEL,
            }
        } else {
            mapped += pages;
            if !rights.contains(Rights::WRITE) {
                plan.counts.not_written += pages;
                deny |= Deny::NOWRITE;
            }
            if !rights.contains(Rights::EXEC_SUPERVISOR) {
                plan.counts.not_executed += pages;
                deny |= Deny::NOEXEC_KERNEL;
            }
            if rights.is_write_exec() {
                plan.counts.write_exec += pages;
                first_write_exec.get_or_insert(range);
                if policy.write_exec == WriteExec::Report {
                    tell(&mut plan.write_exec, range);
                }
            }
        }
        let deny = deny & offered;
        if !deny.is_empty() {
            plan.counts.denied += pages;
            add(
                &mut plan.protections,
                range,
                Attributes::new(deny, Deny::empty()),
            );
        }
    });
    plan.counts.elsewhere = collective.pages().iter().sum::<u64>() - mapped;
    if let (WriteExec::Refuse, Some(first)) = (policy.write_exec, first_write_exec) {
        let pages = plan.counts.write_exec;
        return Err(Refused::WriteExec { pages, first });
    }
    if let (Unmapped::Refuse, Some(first)) = (policy.unmapped, first_unmapped) {
        let pages = plan.counts.unmapped;
        return Err(Refused::Unmapped { pages, first });
    }
    Ok(plan)
}

/// Hands over the pages of `within` in ascending order, each once, in ranges with the same rights.
fn each_part(runs: &[Run], within: &[GfnRange], mut take: impl FnMut(GfnRange, Rights)) {
    let mut take = |start: u64, end: u64, rights| {
        if let Ok(range) = GfnRange::new(start, end.wrapping_sub(1))
            && start < end
        {
            take(range, rights);
        }
    };
    let mut within = within.to_vec();
    within.sort_unstable_by_key(|range| range.start());
    let mut at = 0;
    for range in within {
        let end = range.end().number() + 1;
        at = at.max(range.start().number());
        let first = runs.partition_point(|run| run.end() <= at);
        for run in runs[first..].iter().take_while(|run| run.start() < end) {
            take(at, run.start(), Rights::empty());
            at = at.max(run.start());
            take(at, run.end().min(end), run.rights());
            at = at.max(run.end().min(end));
        }
        take(at, end, Rights::empty());
        at = at.max(end);
    }
}

fn tell(told: &mut Vec<GfnRange>, range: GfnRange) {
    let full = told.len() == TOLD_MAX;
    match told.last_mut() {
        Some(last) if touches(*last, range) => *last = joined(*last, range),
        _ if full => {}
        _ => told.push(range),
    }
}

fn add(protections: &mut Vec<Protection>, range: GfnRange, attributes: Attributes) {
    match protections.last_mut() {
        Some(last) if last.attributes == attributes && touches(last.range, range) => {
            last.range = joined(last.range, range);
        }
        _ => protections.push(Protection { range, attributes }),
    }
}

fn touches(range: GfnRange, next: GfnRange) -> bool {
    range.end().number() + 1 == next.start().number()
}

fn joined(range: GfnRange, next: GfnRange) -> GfnRange {
    GfnRange::new(range.start().number(), next.end().number()).expect("next is higher")
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
