// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the host is told of a VM: each violation as it happens, and what is known when it asks.
//!
//! As types, [`Seen`] and [`Snapshot`]; as documents for programs, made of these, [`Event`] and
//! [`Status`], which are serde's to write (README.md describes them as JSON). The companion sends
//! them with `events_file` and `status`; a VMM does with them what it likes. Knows the device's
//! state by its types, and changes nothing.

#[cfg(feature = "companion")]
pub mod events_file;
#[cfg(feature = "companion")]
mod memory;
mod msr_rules;
#[cfg(feature = "companion")]
pub(crate) mod status;

use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vm_memory::FileOffset;

use crate::protect::{Deny, Protection, Table, msr};
use crate::vm::enforcer::{Target, Violation, VmInfo};
#[cfg(feature = "companion")]
pub use memory::MAX_FILES;
pub use msr_rules::MsrRule;

/// Says which [`Status`] a document is. Fields may be added to one; anything else changes it.
pub const FORMAT: u32 = 1;

/// A violation, and when it was heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seen {
    /// By this process' clock.
    pub time: SystemTime,
    /// The VM's generation then.
    pub generation: u64,
    /// What was seen.
    pub violation: Violation,
}

/// Is told of each violation, by the thread that calls
/// [`VmEvents::violation`](crate::vm::enforcer::VmEvents::violation). That may be one that answers
/// guests, so it must not wait; a guest can cause as many as it likes, so what is kept of them is
/// to be bounded.
pub trait Witness: Send + Sync {
    /// A violation was heard of.
    fn seen(&self, seen: &Seen);
}

/// What the device knows at one moment. Made by [`Device::snapshot`](crate::device::Device::snapshot).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Snapshot {
    /// The owner of the VM is there. If not, the rest is what it said last.
    pub connected: bool,
    /// What is known of the VM.
    pub vm: Option<VmInfo>,
    /// What is in force, on which page.
    pub pages: Table,
    /// The guest's rules for MSRs.
    pub msrs: msr::Table,
    /// The host's, if it has any.
    pub host: Option<msr::Policy>,
    /// What was counted.
    pub counters: Counters,
    /// The last 64 violations, oldest first.
    pub violations: Vec<Seen>,
    /// Guest memory as the front end has it; empty without one.
    pub memory: Vec<Ram>,
}

/// A piece of guest memory.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Ram {
    /// Its first guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// The file that it is mapped from, and at which offset, if it is one.
    pub backing: Option<FileOffset>,
}

/// What was counted since the device knows the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Counters {
    /// Accesses refused or watched.
    pub violations: u64,
    /// Violations of which the guest was not told, because nobody took the event.
    pub events_lost: u64,
    /// Chains of the guest that could not hold an answer.
    pub malformed: u64,
    /// Requests answered with status 0.
    pub requests_ok: u64,
    /// Requests answered with another.
    pub requests_refused: u64,
}

/// What is known of a VM, as a document: that of the companion's status socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of this library.
    pub companion: String,
    /// The owner of the VM is there. If not, the rest is what it said last.
    pub connected: bool,
    /// What runs the guest; null while no VM is known.
    pub accel: Option<String>,
    /// The VM's generation; null while no VM is known.
    pub generation: Option<u64>,
    /// What becomes of a denied access; null while no VM is known.
    pub on_violation: Option<String>,
    /// What this VM can enforce.
    pub deny_bits: Vec<String>,
    /// What this VM can watch.
    pub audit_bits: Vec<String>,
    /// How much can be asked for.
    pub limits: Limits,
    /// What is in force, in ascending order.
    pub ranges: Vec<Range>,
    /// What the host's rules say of MSRs that they do not list: "allow" or "deny"; null if the
    /// host has none.
    #[serde(default)]
    pub msr_default: Option<String>,
    /// Rules for MSRs: the guest's, and then the host's.
    #[serde(default)]
    pub msr_rules: Vec<MsrRule>,
    /// What was counted.
    pub counters: Counters,
    /// The last 64 violations, oldest first.
    pub violations: Vec<Event>,
    /// Guest memory, in descriptors that come with the document's first byte. Of the status socket
    /// only, and there not for a client that is neither root nor the companion's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Vec<Memory>>,
    /// Pieces of guest memory that cannot be passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_left_out: Option<u64>,
}

/// A piece of guest memory that was passed as a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Memory {
    /// Its first guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Of its first byte in the file.
    pub offset: u64,
    /// Which of the descriptors has the file, counted from 0.
    pub fd: u32,
}

/// How much can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Limits {
    /// Most disjoint ranges in force at once.
    pub max_ranges: u32,
    /// Most entries in one request.
    pub max_request_ranges: u32,
    /// Most disjoint ranges of MSRs that the guest's rules may speak of; 0 where there can be no
    /// rules for MSRs.
    #[serde(default)]
    pub max_msr_ranges: u32,
    /// Most MSRs pinned at once, by the host and the guest together.
    #[serde(default)]
    pub max_msr_pins: u32,
}

/// A range in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Range {
    /// Its first frame.
    pub gfn_start: u64,
    /// Its last frame.
    pub gfn_end: u64,
    /// How many frames that are.
    pub pages: u64,
    /// What is denied.
    pub deny: Vec<String>,
    /// What is watched.
    pub audit: Vec<String>,
    /// Whether it holds until system reset.
    pub immutable: bool,
}

/// A violation, in both documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Event {
    /// When it was heard of: RFC 3339, UTC, microseconds.
    pub time: String,
    /// The VM's generation.
    pub generation: u64,
    /// "write", "fetch" or "read".
    pub access: String,
    /// "vcpu" and its number, or "device".
    pub source: String,
    /// Guest-physical address, if it was to memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpa: Option<String>,
    /// Number of the MSR, if it was to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub msr: Option<String>,
    /// Linear address; null when not known.
    pub gva: Option<String>,
    /// Instruction pointer; null when not known.
    pub rip: Option<String>,
    /// Bytes; null when not known.
    pub size: Option<u32>,
    /// What was to be written, or what a read of an MSR gave; null when not known.
    pub value: Option<String>,
    /// How often it was seen since it was last told.
    pub times: u32,
    /// "inject", "drop", "pause", "shutdown"; "audit" if it went through.
    pub action: String,
    /// Violations that the owner of the VM could not tell of before this one, in all.
    pub lost: u64,
}

impl From<&Seen> for Event {
    fn from(seen: &Seen) -> Self {
        let hex = |number: u64| format!("{number:#x}");
        let known = |address: u64| (address != Violation::UNKNOWN).then(|| hex(address));
        let violation = &seen.violation;
        let (gpa, msr) = match violation.target {
            Target::Memory(gpa) => (Some(hex(gpa)), None),
            Target::Msr(number) => (None, Some(hex(number.into()))),
        };
        // A clock that is beyond the year 9999 has nothing better to say.
        let time = Timestamp::try_from(seen.time).unwrap_or(Timestamp::MAX);
        let size = (violation.size != 0).then_some(violation.size);
        Self {
            time: format!("{time:.6}"),
            generation: seen.generation,
            access: violation.access.to_string(),
            source: violation.source.to_string(),
            gpa,
            msr,
            gva: known(violation.gva),
            rip: known(violation.rip),
            size,
            value: size.map(|_| hex(violation.value)),
            times: violation.times.max(1),
            action: violation.action.to_string(),
            lost: violation.lost,
        }
    }
}

impl From<&Snapshot> for Status {
    fn from(snapshot: &Snapshot) -> Self {
        let (vm, host) = (snapshot.vm.as_ref(), snapshot.host.as_ref());
        Self {
            format: FORMAT,
            companion: env!("CARGO_PKG_VERSION").into(),
            connected: snapshot.connected,
            accel: vm.map(|vm| vm.accelerator.to_string()),
            generation: vm.map(|vm| vm.generation),
            on_violation: vm.map(|vm| vm.policy.to_string()),
            deny_bits: vm.map_or_else(Vec::new, |vm| names(vm.deny)),
            audit_bits: vm.map_or_else(Vec::new, |vm| names(vm.audit)),
            limits: vm.map_or_else(Limits::default, |vm| Limits {
                max_ranges: vm.max_ranges,
                max_request_ranges: vm.max_request_ranges,
                max_msr_ranges: vm.msrs.max_ranges,
                max_msr_pins: vm.msrs.max_pins,
            }),
            ranges: snapshot.pages.iter().map(Range::from).collect(),
            msr_default: host.map(|policy| policy.unlisted().to_string()),
            msr_rules: msr_rules::of(&snapshot.msrs, host),
            counters: snapshot.counters,
            violations: snapshot.violations.iter().map(Event::from).collect(),
            memory: None,
            memory_left_out: None,
        }
    }
}

impl From<Protection> for Range {
    fn from(Protection { range, attributes }: Protection) -> Self {
        Self {
            gfn_start: range.start().number(),
            gfn_end: range.end().number(),
            pages: range.pages(),
            deny: names(attributes.deny()),
            audit: names(attributes.audit()),
            immutable: attributes.is_immutable(),
        }
    }
}

fn names(rights: Deny) -> Vec<String> {
    rights.iter_names().map(|(name, _)| name.into()).collect()
}
