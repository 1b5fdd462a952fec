// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules for the MSRs of a VM of this process: what is in force, and KVM's filter for it.
//!
//! Knows KVM; neither requests nor what becomes of the exit of a vCPU.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_FILTER, Msrs as Entries,
    kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{
    Cap, Error, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};

use super::msr_checks::{self, Cpuid, Host, Probe};
use super::vm::{EIO, ENOSPC, EOPNOTSUPP, EPERM, Refused, Vcpus};
use crate::log_limit::{LogLimit, log_limited};
use crate::protect::msr::{
    self, Budget, Decisions, Filter, Loosens, MAX_FILTER_RANGES, MAX_PINS, NoRoom, Order, Planned,
    Policy, Rules, Table,
};
use crate::vm::enforcer::MsrInfo;

static FAILED: LogLimit = LogLimit::new(5);

/// Most disjoint ranges that a guest's rules may be.
const MAX_RANGES: u32 = 4096;

/// The whole filter is ours.
const BUDGET: Budget = Budget {
    filter_ranges: Some(MAX_FILTER_RANGES),
    ranges: MAX_RANGES as usize,
    pins: MAX_PINS as u64,
};

/// Why the host's rules for MSRs cannot be enforced.
#[derive(Debug, thiserror::Error)]
pub enum MsrPolicyError {
    /// KVM does not leave accesses to MSRs to user space.
    #[error(
        "no rule for MSRs can be enforced: this KVM has no MSR filter \
         (KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_X86_MSR_FILTER), or /dev/kvm cannot be opened"
    )]
    NoFilter,
    /// KVM cannot carry out what the rule lets through as if nobody had looked (`docs/msr.md`).
    #[error("rule {index} cannot be enforced to the letter on KVM")]
    Rule {
        /// The first rule of which it is so.
        index: usize,
    },
    /// There is no room for all of them.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// KVM refuses the filter.
    #[error("KVM refuses the filter of the rules")]
    Filter(#[source] Error),
}

/// The rules of a VM.
pub(super) struct Msrs {
    vm: Arc<VmFd>,
    host: Option<Policy>,
    /// Where rules can be enforced.
    scratch: Option<Scratch>,
    /// A vCPU has run that may use LBRs.
    lbrs: AtomicBool,
    /// [`InForce::epoch`].
    epoch: AtomicU64,
    in_force: RwLock<InForce>,
}

/// What is in force. Changed by the one thread only, while all vCPUs are out; a vCPU that deals with an
/// exit carries it out with the lock held, so it is over before a change, or comes after it.
pub(super) struct InForce {
    rules: Rules,
    pub(super) decisions: Decisions,
    filter: Filter,
    /// Grows with each change.
    pub(super) epoch: u64,
    /// Grows with each reset of the VM.
    pub(super) resets: u64,
}

impl Msrs {
    /// With the host's rules in force.
    pub(super) fn new(vm: Arc<VmFd>, host: Option<Policy>) -> Result<Self, MsrPolicyError> {
        let scratch = let_rules_be(&vm);
        if let Some(policy) = &host {
            let scratch = scratch.as_ref().ok_or(MsrPolicyError::NoFilter)?;
            let can = |rule| msr_checks::can_enforce_host(rule, scratch);
            if let Some(index) = policy.rules().iter().position(|rule| !can(rule)) {
                return Err(MsrPolicyError::Rule { index });
            }
        }
        let (rules, planned) = Rules::new(host.clone().unwrap_or_default(), BUDGET)?;
        let filter = planned.filter.unwrap_or_default();
        if host.is_some() {
            set_filter(&vm, &filter).map_err(MsrPolicyError::Filter)?;
        }
        let in_force = InForce {
            rules,
            decisions: planned.decisions,
            filter,
            epoch: 1,
            resets: 0,
        };
        Ok(Self {
            vm,
            host,
            scratch,
            lbrs: AtomicBool::new(false),
            epoch: AtomicU64::new(in_force.epoch),
            in_force: RwLock::new(in_force),
        })
    }

    pub(super) fn info(&self) -> MsrInfo {
        if self.scratch.is_none() {
            return MsrInfo::default();
        }
        MsrInfo {
            max_ranges: MAX_RANGES,
            max_pins: MAX_PINS,
            filter_ranges: Some(MAX_FILTER_RANGES as u32),
        }
    }

    /// The host's rules.
    pub(super) fn host(&self) -> Option<&Policy> {
        self.host.as_ref()
    }

    /// The guest's.
    pub(super) fn table(&self) -> Table {
        self.in_force().rules.table().clone()
    }

    /// Disjoint ranges of the guest's rules.
    pub(super) fn ranges(&self) -> u32 {
        u32::try_from(self.in_force().rules.table().len()).unwrap_or(u32::MAX)
    }

    /// A number that changes when rules do. Does not wait for a change that is under way: no vCPU is
    /// in KVM_RUN then.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The CPU under vCPUs; `None` where there are no rules.
    pub(super) fn cpu(&self) -> Option<Host> {
        self.scratch.as_ref().map(|scratch| scratch.host)
    }

    /// A vCPU runs that may use LBRs.
    pub(super) fn has_lbrs(&self) {
        self.lbrs.store(true, Ordering::Release);
    }

    pub(super) fn in_force(&self) -> RwLockReadGuard<'_, InForce> {
        self.in_force.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, InForce> {
        self.in_force
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `order` in force, or changes nothing.
    pub(super) fn carry_out(&self, order: &Order, vcpus: &dyn Vcpus) -> Result<(), Refused> {
        let scratch = self.scratch.as_ref().ok_or((EOPNOTSUPP, None))?;
        let lbrs = self.lbrs.load(Ordering::Acquire);
        let can = |rule| msr_checks::can_enforce(rule, scratch, lbrs);
        if let Some(index) = order.rules().iter().position(|rule| !can(rule)) {
            return Err((EOPNOTSUPP, Some(index)));
        }
        let planned = self.in_force().rules.plan(order);
        let planned = planned.map_err(|refused| match refused {
            msr::Refused::Loosens(Loosens { index }) => (EPERM, Some(index)),
            msr::Refused::NoRoom(_) => (ENOSPC, None),
        })?;
        if self.in_force().decisions == planned.decisions {
            // All the same to vCPUs.
            self.change().rules.apply(planned.table);
            return Ok(());
        }
        self.put_in_force(planned, false, vcpus)
    }

    /// What the guest's rules hold now is for good.
    pub(super) fn seal(&self) {
        let mut in_force = self.change();
        let mut table = in_force.rules.table().clone();
        table.seal();
        in_force.rules.apply(table);
    }

    /// Ends the guest's rules, and has vCPUs keep anew what the host pins.
    pub(super) fn reset(&self, vcpus: &dyn Vcpus) -> Result<(), Refused> {
        let host = self.host.clone().unwrap_or_default();
        // There was room for them alone before.
        let (_, planned) = Rules::new(host, BUDGET).map_err(|_| (EIO, None))?;
        let in_force = self.in_force();
        let nothing = in_force.rules.table().is_empty() && in_force.decisions.pins() == 0;
        drop(in_force);
        if nothing {
            let mut in_force = self.change();
            in_force.resets += 1;
            in_force.epoch += 1;
            self.epoch.store(in_force.epoch, Ordering::Release);
            return Ok(());
        }
        self.put_in_force(planned, true, vcpus)
    }

    fn put_in_force(
        &self,
        planned: Planned,
        resets: bool,
        vcpus: &dyn Vcpus,
    ) -> Result<(), Refused> {
        let mut planned = Some(planned);
        let mut result = Err((EIO, None));
        vcpus.while_out(&mut || {
            if let Some(planned) = planned.take() {
                result = self.take_over(planned, resets);
            }
        });
        result
    }

    /// No vCPU is in KVM_RUN. KVM has each of them look at the new filter before it enters the guest
    /// again, and make the bitmap for direct access by it (x86.c, `kvm_vm_ioctl_set_msr_filter()`,
    /// `vcpu_enter_guest()`). So what is filtered now makes an exit from then on.
    fn take_over(&self, planned: Planned, resets: bool) -> Result<(), Refused> {
        let mut in_force = self.change();
        let filter = planned.filter.unwrap_or_default();
        if filter != in_force.filter {
            // KVM replaces it whole, or keeps the old one.
            set_filter(&self.vm, &filter).map_err(|error| {
                log_limited!(FAILED, Error, "KVM refuses an MSR filter: {error}");
                (EIO, None)
            })?;
        }
        in_force.rules.apply(planned.table);
        in_force.decisions = planned.decisions;
        in_force.filter = filter;
        in_force.resets += u64::from(resets);
        in_force.epoch += 1;
        self.epoch.store(in_force.epoch, Ordering::Release);
        Ok(())
    }
}

/// Has KVM leave filtered accesses to user space, and makes ready to judge rules; `None` if it cannot.
fn let_rules_be(vm: &VmFd) -> Option<Scratch> {
    if !vm.check_extension(Cap::X86UserSpaceMsr) || !vm.check_extension(Cap::X86MsrFilter) {
        return None;
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0],
        ..Default::default()
    };
    let scratch = Scratch::new().and_then(|scratch| vm.enable_cap(&cap).map(|()| scratch));
    scratch
        .inspect_err(|error| log::warn!("no rules for MSRs in this VM: {error}"))
        .ok()
}

fn set_filter(vm: &VmFd, filter: &Filter) -> Result<(), Error> {
    let default = if filter.default_deny {
        MsrFilterDefaultAction::DENY
    } else {
        MsrFilterDefaultAction::ALLOW
    };
    let ranges: Vec<_> = filter
        .ranges
        .iter()
        .map(|range| MsrFilterRange {
            flags: MsrFilterRangeFlags::from_bits_truncate(range.access.bits()),
            base: range.base,
            msr_count: range.nmsrs,
            bitmap: &range.bitmap,
        })
        .collect();
    vm.set_msr_filter(default, &ranges)
}

/// What `msr` has on this vCPU.
pub(super) fn get(vcpu: &VcpuFd, msr: u32) -> Option<u64> {
    let mut entries = Entries::from_entries(&[kvm_msr_entry {
        index: msr,
        ..Default::default()
    }])
    .ok()?;
    let is_there = vcpu.get_msrs(&mut entries).is_ok_and(|read| read == 1);
    let entry = entries.as_slice().first().filter(|_| is_there)?;
    Some(entry.data)
}

/// Whether this vCPU has taken `value` for `msr`.
pub(super) fn set(vcpu: &VcpuFd, msr: u32, value: u64) -> bool {
    let entries = Entries::from_entries(&[kvm_msr_entry {
        index: msr,
        data: value,
        ..Default::default()
    }]);
    entries.is_ok_and(|entries| vcpu.set_msrs(&entries).is_ok_and(|written| written == 1))
}

/// A vCPU of another VM to ask about MSRs: those of this one belong to their threads. It has all that
/// KVM can give to a guest.
struct Scratch {
    vcpu: Mutex<VcpuFd>,
    host: Host,
}

impl Scratch {
    fn new() -> Result<Self, Error> {
        let kvm = Kvm::new()?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let vcpu = kvm.create_vm()?.create_vcpu(0)?;
        vcpu.set_cpuid2(&supported)?;
        Ok(Self {
            vcpu: Mutex::new(vcpu),
            host: Host::new(Cpuid(supported.as_slice())),
        })
    }
}

impl Probe for Scratch {
    fn is_readable(&self, msr: u32) -> bool {
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        get(&vcpu, msr).is_some()
    }

    fn is_kept(&self, msr: u32) -> bool {
        const SOME: u64 = 0x1000;
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        set(&vcpu, msr, SOME) && get(&vcpu, msr) == Some(SOME)
    }
}
