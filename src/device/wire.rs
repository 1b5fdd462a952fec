// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The formats of `docs/device.md`: requests, responses, events and the configuration space.
//!
//! Pure: bytes that were copied out of guest memory come in, a validated request or the errno
//! that the specification gives comes out. Knows neither rings nor who enforces.

use std::sync::Arc;

use super::kernel_wire::{self, KernelRequest};
use super::msr_wire::{self, MsrQuery};
use crate::protect::msr::{MAX_BITMAP_SIZE, MAX_BITMAPS};
use crate::protect::{Attributes, Demand, Deny, GfnRange, Order, Protection};
use crate::vm::enforcer::{Access, Action, Policy, Source, Target, Violation};

/// The virtio device ID: the end of the range that virtio-pci can express (virtio 1.3, 4.1.2), left to
/// experiments (`docs/device.md`, "Device ID and queues").
pub const DEVICE_ID: u32 = 63;
/// Most entries that a driver may give a queue (`docs/device.md`, "Device ID and queues"). QEMU
/// lets a guest choose up to this many, whatever the device asks for.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Chains that are served at once; more wait in the ring.
pub(super) const QUEUE_SIZE: u16 = 64;
/// Most descriptors in a chain that is served.
pub(super) const MAX_DESCRIPTORS: usize = 256;
/// Most entries in one request.
pub(super) const MAX_REQUEST_RANGES: u32 = 4096;
/// Bytes of a request before its entries.
pub(super) const REQUEST_HEADER_SIZE: usize = 8;
/// Most device-readable bytes that a request can use, on either queue.
pub(super) const MAX_REQUEST_SIZE: usize =
    kernel_wire::HEADER_SIZE + RANGE_SIZE * MAX_REQUEST_RANGES as usize;
/// Bytes of a response, before what some requests are told besides.
pub(super) const RESPONSE_SIZE: usize = 16;
/// Bytes of an event.
pub(super) const EVENT_SIZE: usize = 64;
/// Bytes of the configuration space (`docs/device.md`, "Configuration space").
pub const CONFIG_SIZE: usize = 80;
/// Bytes of an entry.
pub(super) const RANGE_SIZE: usize = 24;

const TYPE_LOCK: u16 = 1;
const TYPE_PROTECT: u16 = 2;
const TYPE_SEAL: u16 = 3;
const TYPE_QUERY: u16 = 4;
pub(super) const TYPE_MSR_LOCK: u16 = 5;
pub(super) const TYPE_MSR_PROTECT: u16 = 6;
const TYPE_MSR_BITMAP: u16 = 7;
pub(super) const TYPE_MSR_QUERY: u16 = 8;
pub(super) const TYPE_KERNEL: u16 = 9;
const EVENT_VIOLATION: u16 = 1;
const EVENT_MSR: u16 = 2;
const CONFIG_VERSION: u32 = 1;
const NO_INDEX: u32 = u32::MAX;
const SOURCE_DEVICE: u32 = u32::MAX;

/// Feature bits that stand for a deny bit each.
const DENY_FEATURES: [(u32, Deny); 4] = [
    (0, Deny::NOWRITE),
    (1, Deny::NOEXEC),
    (2, Deny::NOREAD),
    (3, Deny::NOEXEC_KERNEL),
];
/// The feature bit of a host that can watch accesses.
const AUDIT_FEATURE: u64 = 1 << 4;
/// The feature bit of a host that enforces rules for MSRs.
const MSR_FEATURE: u64 = 1 << 5;
/// The feature bit of a host that reads page tables.
const KERNEL_FEATURE: u64 = 1 << 6;

/// A queue that takes requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lane {
    /// All kinds but one.
    #[default]
    Control,
    /// Those that take their time: `PROTECT_KERNEL`.
    Walk,
}

impl Lane {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Control, Self::Walk];

    /// Least bytes of an answer.
    pub(super) fn answer_size(self) -> usize {
        match self {
            Self::Control => RESPONSE_SIZE,
            Self::Walk => kernel_wire::ANSWER_SIZE,
        }
    }

    /// The one whose turn it is next.
    #[must_use]
    pub(super) fn other(self) -> Self {
        match self {
            Self::Control => Self::Walk,
            Self::Walk => Self::Control,
        }
    }
}

/// Rights that can be taken away, those that can be watched, and what else can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rights {
    /// They can be denied.
    pub deny: Deny,
    /// They can be watched instead.
    pub audit: Deny,
    /// There can be rules for MSRs.
    pub msrs: bool,
    /// Page tables are read.
    pub kernel: bool,
}

impl Rights {
    /// The feature bits to offer on a host that can do this.
    pub(super) fn features(self) -> u64 {
        let denied: u64 = DENY_FEATURES
            .iter()
            .filter(|(_, deny)| self.deny.contains(*deny))
            .map(|(bit, _)| 1 << bit)
            .sum();
        let watched = if self.audit.is_empty() {
            0
        } else {
            AUDIT_FEATURE
        };
        let msrs = if self.msrs { MSR_FEATURE } else { 0 };
        let kernel = if self.kernel { KERNEL_FEATURE } else { 0 };
        denied | watched | msrs | kernel
    }

    /// What of this a driver may use that negotiated `features`.
    #[must_use]
    pub(super) fn negotiated(self, features: u64) -> Self {
        let deny: Deny = DENY_FEATURES
            .iter()
            .filter(|(bit, _)| features & (1 << bit) != 0)
            .map(|&(_, deny)| deny)
            .collect();
        Self {
            deny: self.deny & deny,
            audit: if features & AUDIT_FEATURE != 0 {
                self.audit
            } else {
                Deny::empty()
            },
            msrs: self.msrs && features & MSR_FEATURE != 0,
            kernel: self.kernel && features & KERNEL_FEATURE != 0,
        }
    }

    /// The attribute bits of an entry that may ask for all of this.
    fn bits(self) -> u64 {
        self.deny.bits() | self.audit.bits() << Attributes::AUDIT_SHIFT
    }
}

/// The status of a response that is not 0: a Linux errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Errno {
    /// An immutable page would be loosened.
    Eperm = 1,
    /// The VM's side failed for a reason of its own.
    Eio = 5,
    /// Too many entries.
    E2big = 7,
    /// There are pages that the guest's policy refuses.
    Eacces = 13,
    /// The request lies in memory that the guest does not have, or may not read; or page tables do.
    Efault = 14,
    /// An emulated device is doing with a range what is to be denied.
    Ebusy = 16,
    /// The request makes no sense.
    Einval = 22,
    /// No room for more ranges.
    Enospc = 28,
    /// Page tables that are too much, or come to too much.
    Eoverflow = 75,
    /// Not something that this device or this host does.
    Eopnotsupp = 95,
    /// The VM was reset meanwhile.
    Estale = 116,
}

impl Errno {
    /// The errno with this number, if the device's specification has it.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        use Errno::*;
        [
            Eperm, Eio, E2big, Eacces, Efault, Ebusy, Einval, Enospc, Eoverflow, Eopnotsupp, Estale,
        ]
        .into_iter()
        .find(|&e| e as u32 == number)
    }
}

/// Why a request is refused: the status and index of its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The status.
    pub errno: Errno,
    /// The first entry that is wrong, where one is.
    pub index: Option<u32>,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, index: None }
    }
}

/// What a driver may ask for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// What the host can do and was negotiated.
    pub rights: Rights,
    /// Most entries in one request: at most [`MAX_REQUEST_RANGES`].
    pub max_request_ranges: u32,
}

/// What a driver asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// That something be changed.
    Order {
        /// What.
        demand: Demand,
        /// Of each rule of the demand, the bitmap that it comes from, if it comes from one.
        bitmaps: Option<Vec<usize>>,
    },
    /// What holds on these pages.
    Query(GfnRange),
    /// Which rules hold for these MSRs.
    MsrQuery(MsrQuery),
    /// What page tables do not need.
    Kernel(Arc<KernelRequest>),
}

impl Request {
    /// Which entry of the request this one of what it demands comes from.
    pub(super) fn entry_of(&self, index: u32) -> Option<u32> {
        match self {
            Self::Order {
                bitmaps: Some(bitmaps),
                ..
            } => u32::try_from(*bitmaps.get(index as usize)?).ok(),
            _ => Some(index),
        }
    }
}

impl From<Demand> for Request {
    fn from(demand: Demand) -> Self {
        Self::Order {
            demand,
            bitmaps: None,
        }
    }
}

/// Reads a request of this queue.
///
/// `bytes` is the device-readable part of the chain, of which `total` bytes were there; more
/// than [`MAX_REQUEST_SIZE`] are not copied. The order of the checks is that of the
/// specification.
///
/// # Errors
///
/// The status and index of the response.
pub(super) fn parse_request(
    lane: Lane,
    bytes: &[u8],
    total: u64,
    limits: Limits,
) -> Result<Request, Refusal> {
    if lane == Lane::Walk {
        let request = kernel_wire::parse(bytes, total, limits)?;
        return Ok(Request::Kernel(Arc::new(request)));
    }
    let (header, entries) = bytes
        .split_first_chunk::<REQUEST_HEADER_SIZE>()
        .ok_or(Errno::Einval)?;
    let [t0, t1, f0, f1, count @ ..] = *header;
    let count = u32::from_le_bytes(count);
    let most = limits.max_request_ranges.min(MAX_REQUEST_RANGES);
    let kind = u16::from_le_bytes([t0, t1]);
    let counts = match kind {
        TYPE_LOCK | TYPE_PROTECT => 1..=most,
        TYPE_SEAL => 0..=0,
        TYPE_QUERY => 1..=1,
        TYPE_MSR_LOCK | TYPE_MSR_PROTECT if limits.rights.msrs => 1..=most,
        TYPE_MSR_BITMAP if limits.rights.msrs => 1..=MAX_BITMAPS as u32,
        TYPE_MSR_QUERY if limits.rights.msrs => 1..=1,
        _ => return Err(Errno::Eopnotsupp.into()),
    };
    if u16::from_le_bytes([f0, f1]) != 0 {
        return Err(Errno::Einval.into());
    }
    if kind == TYPE_MSR_BITMAP {
        let size = (REQUEST_HEADER_SIZE + MAX_BITMAPS * MAX_BITMAP_SIZE) as u64;
        if count > *counts.end() || total > size {
            return Err(Errno::E2big.into());
        }
        if !counts.contains(&count) || total != bytes.len() as u64 {
            return Err(Errno::Einval.into());
        }
        return msr_wire::parse_bitmaps(entries, count);
    }
    let size_of = |count: u32| (REQUEST_HEADER_SIZE + RANGE_SIZE * count as usize) as u64;
    if count > most || total > size_of(most) {
        return Err(Errno::E2big.into());
    }
    if !counts.contains(&count) || total != size_of(count) {
        return Err(Errno::Einval.into());
    }
    let (entries, _) = entries.as_chunks::<RANGE_SIZE>();
    if matches!(kind, TYPE_MSR_LOCK | TYPE_MSR_PROTECT | TYPE_MSR_QUERY) {
        return msr_wire::parse_entries(entries, kind);
    }
    let entries = each_entry(entries, |entry| parse_entry(entry, kind, limits.rights))?;
    Ok(match (kind, entries.as_slice()) {
        (TYPE_LOCK, _) => Demand::Pages(Order::Lock(entries)).into(),
        (TYPE_PROTECT, _) => Demand::Pages(Order::Protect(entries)).into(),
        (TYPE_QUERY, [entry]) => Request::Query(entry.range),
        (TYPE_SEAL, []) => Demand::Seal.into(),
        _ => return Err(Errno::Einval.into()),
    })
}

/// Reads entries, up to the first that is wrong.
pub(super) fn each_entry<T>(
    entries: &[[u8; RANGE_SIZE]],
    parse: impl Fn(&[u8; RANGE_SIZE]) -> Result<T, Errno>,
) -> Result<Vec<T>, Refusal> {
    let parse = |(entry, index)| {
        parse(entry).map_err(|errno| Refusal {
            errno,
            index: Some(index),
        })
    };
    entries.iter().zip(0..).map(parse).collect()
}

pub(super) fn parse_entry(
    entry: &[u8; RANGE_SIZE],
    kind: u16,
    offered: Rights,
) -> Result<Protection, Errno> {
    let (words, _) = entry.as_chunks::<8>();
    let [start, end, bits] = [0, 1, 2].map(|i| u64::from_le_bytes(words[i]));
    let range = GfnRange::new(start, end).map_err(|_| Errno::Einval)?;
    let attributes = Attributes::from_bits(bits)
        .ok()
        .filter(|a| !a.is_immutable())
        .ok_or(Errno::Einval)?;
    let fits = match kind {
        TYPE_LOCK => bits != 0,
        TYPE_QUERY => bits == 0,
        TYPE_KERNEL => bits & !kernel_wire::GIVEN == 0,
        _ => true,
    };
    if !fits {
        return Err(Errno::Einval);
    }
    // All that is asked for has to be on offer, even a watch that its denial makes void.
    if bits & !offered.bits() != 0 {
        return Err(Errno::Eopnotsupp);
    }
    Ok(Protection { range, attributes })
}

/// The answer to a request. `Ok` carries the value: the generation in which the order holds, or
/// how many ranges a query has found.
pub(super) fn encode_response(response: Result<u64, Refusal>) -> [u8; RESPONSE_SIZE] {
    let (status, index, value) = match response {
        Ok(value) => (0, NO_INDEX, value),
        Err(Refusal { errno, index }) => (errno as u32, index.unwrap_or(NO_INDEX), 0),
    };
    let mut bytes = [0; RESPONSE_SIZE];
    put(&mut bytes, 0, &status.to_le_bytes());
    put(&mut bytes, 4, &index.to_le_bytes());
    put(&mut bytes, 8, &value.to_le_bytes());
    bytes
}

/// An entry of the answer to a `QUERY`.
pub(super) fn encode_range(Protection { range, attributes }: Protection) -> [u8; RANGE_SIZE] {
    let mut bytes = [0; RANGE_SIZE];
    put(&mut bytes, 0, &range.start().number().to_le_bytes());
    put(&mut bytes, 8, &range.end().number().to_le_bytes());
    put(&mut bytes, 16, &attributes.bits().to_le_bytes());
    bytes
}

/// The answer to a query: of what holds, as many entries as go into `room` bytes. Also returns how
/// many there are.
pub(super) fn encode_query(
    held: impl Iterator<Item = [u8; RANGE_SIZE]>,
    room: u64,
) -> (Vec<u8>, u64) {
    let most = room.saturating_sub(RESPONSE_SIZE as u64) / RANGE_SIZE as u64;
    let most = most.min(u64::from(MAX_REQUEST_RANGES));
    let mut bytes = vec![0; RESPONSE_SIZE];
    let mut found = 0;
    for entry in held {
        if found < most {
            bytes.extend(entry);
        }
        found += 1;
    }
    put(&mut bytes, 0, &encode_response(Ok(found)));
    (bytes, found)
}

/// A violation as an event; `lost` is the device's own count, not that of the violation.
pub(super) fn encode_event(violation: &Violation, lost: u64) -> [u8; EVENT_SIZE] {
    let access: u16 = match violation.access {
        Access::Write => 1,
        Access::Fetch => 2,
        Access::Read => 3,
    };
    let source = match violation.source {
        Source::Vcpu(number) => number,
        Source::Device => SOURCE_DEVICE,
    };
    let action: u32 = match violation.action {
        Action::Refused(Policy::Inject) => 1,
        Action::Refused(Policy::Drop) => 2,
        Action::Refused(Policy::Pause) => 3,
        Action::Refused(Policy::Shutdown) => 4,
        Action::Audit => 5,
    };
    let (kind, target) = match violation.target {
        Target::Memory(gpa) => (EVENT_VIOLATION, gpa),
        Target::Msr(number) => (EVENT_MSR, number.into()),
    };
    let mut bytes = [0; EVENT_SIZE];
    put(&mut bytes, 0, &kind.to_le_bytes());
    put(&mut bytes, 2, &access.to_le_bytes());
    put(&mut bytes, 4, &source.to_le_bytes());
    put(&mut bytes, 8, &target.to_le_bytes());
    put(&mut bytes, 16, &violation.gva.to_le_bytes());
    put(&mut bytes, 24, &violation.rip.to_le_bytes());
    put(&mut bytes, 32, &violation.value.to_le_bytes());
    put(&mut bytes, 40, &violation.size.to_le_bytes());
    put(&mut bytes, 44, &violation.times.to_le_bytes());
    put(&mut bytes, 48, &lost.to_le_bytes());
    put(&mut bytes, 56, &action.to_le_bytes());
    bytes
}

/// The fields of the configuration space that are not constant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    /// What the host enforces and watches now.
    pub rights: Rights,
    /// Most entries in one request.
    pub max_request_ranges: u32,
    /// Most disjoint ranges in force at once.
    pub max_ranges: u32,
    /// Grows with every system reset.
    pub generation: u64,
    /// Disjoint ranges in force now.
    pub ranges_in_force: u32,
    /// Accesses refused or watched.
    pub violations: u64,
    /// Events dropped because nobody took them.
    pub events_lost: u64,
    /// Chains that could not hold a response.
    pub malformed: u64,
    /// Most disjoint ranges of MSRs that the guest's rules may speak of.
    pub max_msr_ranges: u32,
    /// How many they speak of.
    pub msr_ranges_in_force: u32,
}

impl Config {
    /// The configuration space.
    pub(super) fn encode(&self) -> [u8; CONFIG_SIZE] {
        let mut bytes = [0; CONFIG_SIZE];
        put(&mut bytes, 0, &CONFIG_VERSION.to_le_bytes());
        put(&mut bytes, 4, &4096u32.to_le_bytes());
        put(&mut bytes, 8, &self.rights.deny.bits().to_le_bytes());
        put(&mut bytes, 16, &self.max_request_ranges.to_le_bytes());
        put(&mut bytes, 20, &self.max_ranges.to_le_bytes());
        put(&mut bytes, 24, &self.generation.to_le_bytes());
        put(&mut bytes, 32, &self.ranges_in_force.to_le_bytes());
        put(&mut bytes, 40, &self.violations.to_le_bytes());
        put(&mut bytes, 48, &self.events_lost.to_le_bytes());
        put(&mut bytes, 56, &self.malformed.to_le_bytes());
        put(&mut bytes, 64, &self.rights.audit.bits().to_le_bytes());
        put(&mut bytes, 72, &self.max_msr_ranges.to_le_bytes());
        put(&mut bytes, 76, &self.msr_ranges_in_force.to_le_bytes());
        bytes
    }

    /// The configuration space from `offset` on, zeros behind its end.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let config = self.encode();
        let there = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        if let Some(there) = there {
            let len = there.len().min(bytes.len());
            bytes[..len].copy_from_slice(&there[..len]);
        }
    }
}

pub(super) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
