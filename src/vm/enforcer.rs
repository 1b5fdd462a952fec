// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device may ask of whoever owns the VM, and what it is told in return.
//!
//! Everything is asynchronous: a request is handed over and the answer arrives later as a call
//! of [`VmEvents`]. The owner of the VM may be waiting for the device at that very moment, so
//! neither side ever waits for the other. No wire format and no virtio is known here.
//!
//! [`KvmVm`](super::kvm::KvmVm) is an [`Enforcer`]; [`Device`](crate::device::Device) is a
//! [`VmEvents`]. An enforcer that is neither QEMU nor that says [`connected`](VmEvents::connected),
//! then [`state`](VmEvents::state) with seq 0, and from then on answers what it is asked. What it
//! has to do to each page and MSR is specified in `docs/device.md` and `docs/msr.md`.
//!
//! Sequence numbers are the device's, are never 0 and grow; a question and a request never have the
//! same. A *generation* is the VM's life between two system resets: a number that grows with each
//! of them.

use std::fmt;

use crate::protect::msr::{self, Policy as HostPolicy};
use crate::protect::{Demand, Deny, Table};

/// Takes requests to the owner of the VM. All methods hand over and return at once: they are called
/// with the device's lock held, for which a call of [`VmEvents`] from within would wait for ever.
/// They may be called by any thread, and by that which is just calling [`VmEvents`]: so that holds
/// no lock that they take.
pub trait Enforcer: Send + Sync {
    /// Asks that `demand` be carried out, whole or not at all. It was planned on what the owner of
    /// the VM was last heard of to have in force, and found not to loosen what is immutable; the
    /// owner holds it against what is in force, and refuses it (`ESTALE`) if `generation` is not
    /// that of the VM any more. Exactly one [`VmEvents::result`] with this `seq` follows, when
    /// every vCPU and every device is bound by it, unless the connection ends first. Not called
    /// again before that.
    ///
    /// Its entries may overlap, and are at most [`VmInfo::max_request_ranges`]; those of rules that
    /// come from bitmaps are at most 4096. Their rights are of those that the owner has said it can
    /// deny and watch, but whether pages are RAM is for the owner to check. A demand that is
    /// carried out twice is the same as once.
    fn carry_out(&self, seq: u64, generation: u64, demand: &Demand);

    /// Asks for everything that is in force; [`VmEvents::state`] with this `seq` follows. Not
    /// called again before that.
    fn request_state(&self, seq: u64);

    /// Asks to be told when everything has been handed over that the owner of the VM had said
    /// before this call: [`VmEvents::caught_up`] with this `seq` follows, also if it is gone. When
    /// it is called again before that, only the last call counts.
    fn catch_up(&self, seq: u64);
}

/// Is told what happens to the VM. Calls come one after another, from one thread at a time, which
/// holds no lock that [`Enforcer`]'s methods or a [`Witness`](crate::report::Witness) take. They do
/// not wait for the guest.
pub trait VmEvents: Send + Sync {
    /// The owner of the VM is there and says what it can do. The first call on a connection; one
    /// with another generation than was known may be another VM.
    fn connected(&self, vm: VmInfo);

    /// Everything that is in force, which takes the place of what was believed. `seq` is 0 for the
    /// one that follows `connected`, before which nothing but [`Enforcer::catch_up`] is asked.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] if nobody asked for it; it is not taken over then.
    fn state(&self, seq: u64, generation: u64, state: InForce) -> Result<(), Unexpected>;

    /// The answer to the request with this `seq`. If the owner's counts of ranges are not those that the
    /// device expects, it asks for the [`state`](Self::state).
    ///
    /// # Errors
    ///
    /// [`Unexpected`] if no such request is under way; nothing changes then.
    fn result(&self, seq: u64, outcome: Outcome) -> Result<(), Unexpected>;

    /// What the owner of the VM says to the host's rules for MSRs that this process was started
    /// with ([`Device::new`](crate::device::Device::new)), once on each connection, after the first
    /// `state`. There is no call if it was started without, and none is needed if that `state` has
    /// them.
    fn host_policy(&self, outcome: HostPolicyOutcome);

    /// The guest was refused an access, or was seen to make one that is watched.
    fn violation(&self, violation: Violation);

    /// The VM was reset: nothing is in force any more but the host's rules for MSRs. To be called
    /// before the guest runs again, with a `generation` above the last one. Requests that are under
    /// way are still answered.
    fn reset(&self, generation: u64);

    /// What had been said before the call of [`Enforcer::catch_up`] with this `seq` was handed over.
    fn caught_up(&self, seq: u64);

    /// The owner of the VM is gone. What is in force stays in force. May be called without a
    /// `connected` before it.
    fn disconnected(&self);
}

/// An answer to a question that was not asked: whoever gave it has lost count, and begins anew with
/// [`VmEvents::disconnected`] and [`VmEvents::connected`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} with seq {seq}, which answers no request")]
pub struct Unexpected {
    /// The message.
    pub what: &'static str,
    /// Its sequence number.
    pub seq: u64,
}

/// What runs the guest's instructions. Told to people; nothing is decided by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Accelerator {
    /// The host's KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG",
        })
    }
}

/// What the owner of a VM says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmInfo {
    /// What runs the guest.
    pub accelerator: Accelerator,
    /// What this VM can enforce. Drivers are offered what is said here when a transport first asks; what
    /// is not said later is refused then.
    pub deny: Deny,
    /// What this VM can watch.
    pub audit: Deny,
    /// What becomes of a denied access, as far as the access allows it.
    pub policy: Policy,
    /// Grows with every system reset.
    pub generation: u64,
    /// Most disjoint ranges of pages in force at once. The guest is told; the owner refuses more
    /// (`ENOSPC`).
    pub max_ranges: u32,
    /// Most ranges in one request; at least 1. Above 4096 it counts as 4096.
    pub max_request_ranges: u32,
    /// What it can do about MSRs.
    pub msrs: MsrInfo,
}

/// What the owner of a VM says of its MSRs (`docs/msr.md`). The default: it can do nothing about them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsrInfo {
    /// Most disjoint ranges that the guest's rules may speak of, of reads and of writes together; 0
    /// where none can be enforced.
    pub max_ranges: u32,
    /// Most MSRs that can be pinned at once, by the host and the guest together.
    pub max_pins: u32,
    /// Ranges that are left of the accelerator's filter, if it has such a limit: of KVM's 16, those
    /// that the owner does not need itself.
    pub filter_ranges: Option<u32>,
}

/// What is in force. The default: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InForce {
    /// On which page.
    pub pages: Table,
    /// On which MSR, by the guest's rules.
    pub msrs: msr::Table,
    /// The host's rules, if there are any.
    pub host: Option<HostPolicy>,
}

/// What the owner of a VM says to the host's rules for MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPolicyOutcome {
    /// They are in force.
    InForce,
    /// The VM has others, until it ends.
    Others,
    /// They cannot be enforced.
    Refused {
        /// A Linux errno, positive: `EOPNOTSUPP` or `ENOSPC`, say.
        status: u32,
        /// The first rule of [`Policy::rules`](HostPolicy::rules) that cannot be, where one is;
        /// counted from 0.
        index: Option<u32>,
    },
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// 0: all of it is in force. Else a Linux errno, positive, and none of it is: one of
    /// `docs/device.md`, "Errors"; the guest is told `EIO` for any other.
    pub status: u32,
    /// The first entry of the demand that is wrong, where one is; counted from 0.
    pub index: Option<u32>,
    /// The generation in which the request was decided.
    pub generation: u64,
    /// Disjoint ranges of pages in force after it; neighbours with equal attributes are one.
    pub ranges_in_force: u32,
    /// Disjoint ranges of MSRs that the guest's rules speak of after it.
    pub msr_ranges_in_force: u32,
}

/// What is done about a denied access, which never happens (`docs/device.md`, "What becomes of a
/// denied access"). Exhaustive: whoever enforces has to do each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The vCPU takes a #GP(0). For an access of a device, as [`Self::Drop`].
    Inject,
    /// Nothing more. A load or a fetch cannot be dropped: as [`Self::Inject`].
    Drop,
    /// The VM is stopped.
    Pause,
    /// The VM ends.
    Shutdown,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inject => "inject",
            Self::Drop => "drop",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        })
    }
}

/// What was done about an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// It is denied, and did not happen.
    Refused(Policy),
    /// It is watched, and went through.
    Audit,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(policy) => policy.fmt(f),
            Self::Audit => f.write_str("audit"),
        }
    }
}

/// A kind of access, to memory or to an MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A store.
    Write,
    /// An instruction fetch.
    Fetch,
    /// A load.
    Read,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::Fetch => "fetch",
            Self::Read => "read",
        })
    }
}

/// Who made an access. Vcpu numbers are the VMM's; `u32::MAX` stands for a device on the wire, and
/// is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The vCPU with this number.
    Vcpu(u32),
    /// An emulated device.
    Device,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(number) => write!(f, "vcpu{number}"),
            Self::Device => f.write_str("device"),
        }
    }
}

/// What an access was to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// Memory at this guest-physical address.
    Memory(u64),
    /// The MSR with this number.
    Msr(u32),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(gpa) => write!(f, "gpa={gpa:#x}"),
            Self::Msr(number) => write!(f, "msr={number:#x}"),
        }
    }
}

/// An access that was refused, or seen because it is watched. The fields are those of the event
/// in `docs/device.md`, "Events".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What kind of access.
    pub access: Access,
    /// Who made it.
    pub source: Source,
    /// What it was to.
    pub target: Target,
    /// Linear address, or [`Violation::UNKNOWN`].
    pub gva: u64,
    /// Instruction pointer, or [`Violation::UNKNOWN`].
    pub rip: u64,
    /// What was to be written, or what a read of an MSR gave: up to 8 bytes, the first of them
    /// lowest. 0 if `size` is.
    pub value: u64,
    /// Bytes of the access, or 0: neither these nor `value` is known.
    pub size: u32,
    /// How often it was seen since it was last told: at least 1.
    pub times: u32,
    /// How many violations the owner of the VM had to drop before this one, in all.
    pub lost: u64,
    /// What was done about it.
    pub action: Action,
}

impl Violation {
    /// An address that is not known.
    pub const UNKNOWN: u64 = u64::MAX;

    /// Whether it counts as the same thing seen again: target, access, source and action are equal.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        (self.target, self.access, self.source, self.action)
            == (other.target, other.access, other.source, other.action)
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.action {
            Action::Refused(_) => "refused",
            Action::Audit => "watched",
        };
        let Self {
            access,
            source,
            target,
            ..
        } = self;
        write!(f, "{what} {access} by {source} at {target}")?;
        for (name, address) in [("gva", self.gva), ("rip", self.rip)] {
            if address != Self::UNKNOWN {
                write!(f, " {name}={address:#x}")?;
            }
        }
        if self.size != 0 {
            write!(f, " size={} value={:#x}", self.size, self.value)?;
        }
        write!(f, " times={} action={}", self.times, self.action)
    }
}
