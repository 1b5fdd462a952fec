// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs of one vCPU: what it keeps of those that are pinned, and what becomes of an access that KVM
//! has left to user space. On the vCPU's own thread. Tells nobody.

use std::collections::BTreeMap;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuFd;

use super::exit::MsrAccess;
use super::msr_checks::{self, Cpuid, EFER, Guest, Host, LBR_FORMAT, PERF_CAPABILITIES};
use super::msrs::{InForce, Msrs, get, set};
use crate::log_limit::{LogLimit, log_limited};
use crate::protect::msr::{Decisions, OnWrite, Verdict};

static UNEXPECTED: LogLimit = LogLimit::new(3);

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is over: this was read or written, and whether it is reported.
    Done { value: u64, logged: bool },
    /// It gets the #GP(0) that it would get without rules.
    Fault,
    /// A rule denies it.
    Denied,
    /// The VM was reset since: it is of a guest that is gone, and has no effect.
    Over,
    /// The rules have changed meanwhile, and say nothing of it any more: the guest is to try again.
    Again,
}

/// What a vCPU had in an MSR when bits of it became pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    /// The bits that are pinned.
    pinned: u64,
    /// Those of them that are kept; fewer if the MSR could not be read.
    mask: u64,
    value: u64,
}

#[derive(Debug, Default)]
pub(super) struct VcpuMsrs {
    /// Has been in [`Self::catch_up`].
    begun: bool,
    /// The rules that `kept` is of.
    epoch: u64,
    resets: u64,
    kept: BTreeMap<u32, Kept>,
    guest: Option<Guest>,
}

impl VcpuMsrs {
    /// Before the vCPU runs: keeps what is pinned since it did last.
    pub(super) fn catch_up(&mut self, msrs: &Msrs, vcpu: &VcpuFd) {
        if !self.begun {
            self.begun = true;
            if get(vcpu, PERF_CAPABILITIES).is_some_and(|bits| bits & LBR_FORMAT != 0) {
                msrs.has_lbrs();
            }
        }
        if self.epoch != msrs.epoch() {
            self.keep(&msrs.in_force(), vcpu);
        }
    }

    fn keep(&mut self, in_force: &InForce, vcpu: &VcpuFd) {
        if self.epoch == in_force.epoch {
            return;
        }
        self.epoch = in_force.epoch;
        if self.resets != in_force.resets {
            self.resets = in_force.resets;
            self.kept.clear();
        }
        self.kept = kept(&self.kept, &in_force.decisions, |msr| get(vcpu, msr));
    }

    /// Decides on an access, and carries it out if the rules let it through.
    pub(super) fn access(&mut self, msrs: &Msrs, vcpu: &VcpuFd, access: MsrAccess) -> Outcome {
        let began = self.epoch;
        // Held until it is carried out: who says that a rule is in force has waited for that.
        let in_force = msrs.in_force();
        if self.begun && self.resets != in_force.resets {
            return Outcome::Over;
        }
        self.keep(&in_force, vcpu);
        let Some(host) = msrs.cpu() else {
            return Outcome::Fault;
        };
        let decisions = &in_force.decisions;
        let answer = match access {
            MsrAccess::Read { msr } => decisions.read(msr),
            MsrAccess::Write { msr, value } => match self.kept.get(&msr).copied() {
                None => decisions.write(msr, 0, 0, value),
                Some(kept) => {
                    let Some(now) = get(vcpu, msr) else {
                        return Outcome::Denied;
                    };
                    let width = self.guest(vcpu).map_or(u64::MAX, |g| g.width(msr, host));
                    let had = if kept.mask == kept.pinned {
                        kept.value & width | now & !width
                    } else {
                        now
                    };
                    decisions.write(msr, now, had, value & width | now & !width)
                }
            },
        };
        let value = match answer.verdict {
            Verdict::Fault => return Outcome::Denied,
            Verdict::Value(value) => Some(value),
            Verdict::Skip => Some(access.written()),
            Verdict::Allowed if msr_checks::is_plain(access.msr()) => {
                self.plain(vcpu, access, host)
            }
            // What it has or had.
            Verdict::Allowed if access.is_write() && self.kept.contains_key(&access.msr()) => {
                set(vcpu, access.msr(), access.written()).then_some(access.written())
            }
            Verdict::Allowed if began != in_force.epoch => return Outcome::Again,
            Verdict::Allowed => {
                log_limited!(UNEXPECTED, Warn, "unexpected exit for {access:?}");
                None
            }
        };
        match value {
            Some(value) => Outcome::Done {
                value,
                logged: answer.report,
            },
            None => Outcome::Fault,
        }
    }

    /// As the guest's own access would be: `None` if that gets #GP(0).
    fn plain(&mut self, vcpu: &VcpuFd, access: MsrAccess, host: Host) -> Option<u64> {
        match access {
            MsrAccess::Read { msr } => get(vcpu, msr),
            MsrAccess::Write { msr, value } => {
                let valid = if msr == EFER {
                    let sregs = vcpu.get_sregs().ok()?;
                    self.guest(vcpu)?.may_set_efer(value, sregs.efer, sregs.cr0)
                } else {
                    msr_checks::may_write(msr, value, host)
                };
                (valid && set(vcpu, msr, value)).then_some(value)
            }
        }
    }

    fn guest(&mut self, vcpu: &VcpuFd) -> Option<Guest> {
        if self.guest.is_none() {
            let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ok()?;
            self.guest = Some(Guest::new(Cpuid(cpuid.as_slice())));
        }
        self.guest
    }
}

/// What a vCPU keeps under `decisions`, when it kept `before` so far.
fn kept(
    before: &BTreeMap<u32, Kept>,
    decisions: &Decisions,
    read: impl Fn(u32) -> Option<u64>,
) -> BTreeMap<u32, Kept> {
    let pins = decisions.writes().filter_map(|(range, on)| match on {
        OnWrite::Pass { pinned, .. } if pinned != 0 => Some((range, pinned)),
        _ => None,
    });
    pins.flat_map(|(range, pinned)| (range.first()..=range.last()).map(move |msr| (msr, pinned)))
        .map(|(msr, pinned)| {
            let had = before.get(&msr).copied();
            let (mut mask, mut value) = had.map_or((0, 0), |had| {
                let mask = had.mask & pinned;
                (mask, had.value & mask)
            });
            if mask != pinned
                && let Some(now) = read(msr)
            {
                value |= now & pinned & !mask;
                mask = pinned;
            }
            let kept = Kept {
                pinned,
                mask,
                value,
            };
            (msr, kept)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protect::msr::{Access, Action, MsrRange, Order, Policy, Rule, Table};

    fn pinned(pins: &[(u32, u64)]) -> Decisions {
        let rules = pins.iter().map(|&(msr, mask)| {
            let range = MsrRange::new(msr, msr).unwrap();
            Rule::new(range, Access::WRITE, Action::Pin { mask, log: false }).unwrap()
        });
        let order = Order::Replace(rules.collect());
        let mut table = Table::default();
        table.apply(&table.clone().plan(&order).unwrap());
        Decisions::new(&Policy::default(), &table)
    }

    #[test]
    fn each_bit_is_kept_as_it_was_when_it_became_pinned() {
        let none = BTreeMap::new();
        let first = kept(&none, &pinned(&[(1, 0xff), (2, !0)]), |_| Some(0xabcd));
        let of = |kept: &BTreeMap<u32, Kept>, msr| {
            kept.get(&msr).map(
                |Kept {
                     pinned,
                     mask,
                     value,
                 }| (*pinned, *mask, *value),
            )
        };
        assert_eq!(of(&first, 1), Some((0xff, 0xff, 0xcd)));
        assert_eq!(of(&first, 2), Some((!0, !0, 0xabcd)));
        // One mask grows, one pin ends, one begins.
        let now = pinned(&[(1, 0xfff), (3, 1)]);
        let second = kept(&first, &now, |_| Some(0x1111));
        assert_eq!(of(&second, 1), Some((0xfff, 0xfff, 0x1cd)));
        assert_eq!((of(&second, 2), of(&second, 3)), (None, Some((1, 1, 1))));
        // What shrinks is forgotten; nothing is read for what is kept already.
        let third = kept(&second, &pinned(&[(1, 0xf0)]), |_| panic!("it is kept"));
        assert_eq!(of(&third, 1), Some((0xf0, 0xf0, 0xc0)));
        assert_eq!(third.len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_not_kept() {
        let one = kept(&BTreeMap::new(), &pinned(&[(7, !0)]), |_| None);
        assert_eq!((one[&7].mask, one[&7].pinned), (0, !0));
        // And it is tried again when something changes.
        let later = kept(&one, &pinned(&[(7, !0)]), |_| Some(5));
        assert_eq!((later[&7].mask, later[&7].value), (!0, 5));
    }
}
