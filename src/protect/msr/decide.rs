// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What user space answers for an access to an MSR that was deflected to it.
//!
//! Host's and guest's rules, the stricter of both for each MSR and access. Total: there is an
//! answer for any number and any value. Who asks, and what an MSR holds, is not known here.

use std::ops::Range;

use rangemap::RangeMap;

use super::action::Restriction;
use super::{MsrRange, OnRead, OnWrite, Policy, Table};

/// What becomes of an access. Exhaustive: whoever answers KVM has to do each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is carried out as if nobody had deflected it, with every check that the guest's own
    /// access would get.
    Allowed,
    /// It is a write that changes nothing, and is over: the vCPU goes on behind it.
    Skip,
    /// It gets #GP(0).
    Fault,
    /// It is a read, and gives this in EDX:EAX.
    Value(u64),
}

/// What becomes of an access, and whether it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[must_use]
pub struct Answer {
    /// What becomes of it.
    pub verdict: Verdict,
    /// Whether it is reported: what is denied always is.
    pub report: bool,
}

impl Answer {
    const FAULT: Self = Self {
        verdict: Verdict::Fault,
        report: true,
    };
}

/// All rules that are in force, combined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decisions {
    reads: RangeMap<u64, OnRead>,
    writes: RangeMap<u64, OnWrite>,
    constants: RangeMap<u64, u64>,
}

impl Decisions {
    /// What `policy` and `table` come to.
    #[must_use]
    pub fn new(policy: &Policy, table: &Table) -> Self {
        let mut decisions = Self {
            reads: policy.reads.clone(),
            writes: policy.writes.clone(),
            constants: policy.constants.clone(),
        };
        for (range, held) in table.reads() {
            join(&policy.reads, &mut decisions.reads, &range.span(), held.on);
        }
        for (range, held) in table.writes() {
            join(
                &policy.writes,
                &mut decisions.writes,
                &range.span(),
                held.on,
            );
        }
        decisions
    }

    /// What becomes of a read of `msr`.
    pub fn read(&self, msr: u32) -> Answer {
        let msr = u64::from(msr);
        let on = self.reads.get(&msr).copied().unwrap_or_default();
        let constant = self.constants.get(&msr);
        match on {
            OnRead::Deny => Answer::FAULT,
            OnRead::Allow | OnRead::Log => Answer {
                verdict: constant.map_or(Verdict::Allowed, |&value| Verdict::Value(value)),
                report: on == OnRead::Log,
            },
        }
    }

    /// What becomes of a write of `value` to `msr`, which holds `now` on the vCPU that writes, and
    /// held `kept` when it became pinned (`docs/msr.md`, "A rule"). Both count only where the MSR
    /// is pinned.
    pub fn write(&self, msr: u32, now: u64, kept: u64, value: u64) -> Answer {
        match self.writes.get(&msr.into()).copied().unwrap_or_default() {
            // The bits of one or of the other, not some of each.
            OnWrite::Pass { pinned, .. }
                if (now ^ value) & pinned != 0 && (kept ^ value) & pinned != 0 =>
            {
                Answer::FAULT
            }
            OnWrite::Pass { pinned, log } => Answer {
                verdict: if pinned != 0 && now == value {
                    Verdict::Skip
                } else {
                    Verdict::Allowed
                },
                report: log,
            },
            OnWrite::Deny => Answer::FAULT,
        }
    }

    /// Which MSRs user space has something to say about when they are read: disjoint, ascending,
    /// with what.
    pub fn reads(&self) -> impl Iterator<Item = (MsrRange, OnRead)> + '_ {
        self.reads
            .iter()
            .map(|(span, &on)| (MsrRange::of_span(span), on))
    }

    /// The same of writes.
    pub fn writes(&self) -> impl Iterator<Item = (MsrRange, OnWrite)> + '_ {
        self.writes
            .iter()
            .map(|(span, &on)| (MsrRange::of_span(span), on))
    }

    /// How many MSRs are pinned: for each of them, what it held is kept on each vCPU.
    #[must_use]
    pub fn pins(&self) -> u64 {
        self.writes
            .iter()
            .filter(|(_, on)| matches!(on, OnWrite::Pass { pinned: 1.., .. }))
            .map(|(span, _)| span.end - span.start)
            .sum()
    }

    /// Which MSRs give a constant when they are read and that is not denied.
    pub fn constants(&self) -> impl Iterator<Item = (MsrRange, u64)> + '_ {
        self.constants
            .iter()
            .map(|(span, &value)| (MsrRange::of_span(span), value))
    }

    /// Reads that must come to user space; disjoint, ascending, not touching.
    pub(super) fn deflected_reads(&self) -> Vec<Range<u64>> {
        let reads = self.reads.iter().map(|(span, _)| span);
        let mut all: RangeMap<u64, ()> = reads.map(|span| (span.clone(), ())).collect();
        all.extend(self.constants.iter().map(|(span, _)| (span.clone(), ())));
        all.iter().map(|(span, ())| span.clone()).collect()
    }

    /// Writes that must come to user space; disjoint, ascending, not touching.
    pub(super) fn deflected_writes(&self) -> Vec<Range<u64>> {
        let writes = self.writes.iter().map(|(span, _)| span);
        let all: RangeMap<u64, ()> = writes.map(|span| (span.clone(), ())).collect();
        all.iter().map(|(span, ())| span.clone()).collect()
    }
}

/// Adds `on` to what `host` has on `span`. The guest's ranges are disjoint, so `all` has nothing
/// there yet but that.
fn join<A: Restriction>(
    host: &RangeMap<u64, A>,
    all: &mut RangeMap<u64, A>,
    span: &Range<u64>,
    on: A,
) {
    crate::protect::spans::each_within(host, span, |part, held| all.insert(part, held.join(on)));
}
