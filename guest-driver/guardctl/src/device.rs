// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `/dev/guard`: the calls of `include/uapi/linux/virtio_guard.h`.

// The system calls of this module, which no crate knows.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

use crate::msr::{Access, Msrs};
use crate::range::Range;

const LOCK: Opcode = opcode::read_write::<RawLock>(b'G', 0xe0);
const INFO: Opcode = opcode::read::<Info>(b'G', 0xe1);
const PROTECT: Opcode = opcode::read_write::<RawLock>(b'G', 0xe2);
const SEAL: Opcode = opcode::read::<RawSeal>(b'G', 0xe3);
const QUERY: Opcode = opcode::read_write::<RawQuery>(b'G', 0xe4);
const MSR_LOCK: Opcode = opcode::read_write::<RawLock>(b'G', 0xe5);
const MSR_PROTECT: Opcode = opcode::read_write::<RawLock>(b'G', 0xe6);
const MSR_BITMAP: Opcode = opcode::read_write::<RawMsrBitmap>(b'G', 0xe7);
const MSR_QUERY: Opcode = opcode::read_write::<RawMsrQuery>(b'G', 0xe8);
const KERNEL: Opcode = opcode::read_write::<RawKernel>(b'G', 0xe9);

const NO_INDEX: u32 = u32::MAX;
/// Most entries that one query fills.
const QUERY_ROOM: usize = 4096;
/// Most ranges that are told of page tables, of either kind.
const TOLD_ROOM: usize = 2 * 4096;

/// `struct guard_range`: pages, and what holds on them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The first frame.
    pub(crate) first: u64,
    /// The last frame.
    pub(crate) last: u64,
    /// Deny bits, audit bits and, told by a query, whether it is immutable.
    pub(crate) attributes: u64,
}

/// `struct guard_msr`: MSRs, and the rule for them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MsrEntry {
    pub(crate) first: u32,
    pub(crate) last: u32,
    pub(crate) access: u16,
    pub(crate) action: u16,
    pub(crate) flags: u32,
    pub(crate) mask: u64,
}

/// `struct guard_lock`
#[repr(C)]
struct RawLock {
    ranges: u64,
    count: u32,
    index: u32,
    generation: u64,
}

/// `struct guard_seal`
#[repr(C)]
struct RawSeal {
    generation: u64,
}

/// `struct guard_query`
#[repr(C)]
struct RawQuery {
    gfn_start: u64,
    gfn_end: u64,
    ranges: u64,
    count: u32,
    reserved: u32,
    total: u64,
}

/// `struct guard_msr_bitmap`
#[repr(C)]
struct RawMsrBitmap {
    bitmaps: u64,
    bytes: u32,
    count: u32,
    index: u32,
    reserved: u32,
    generation: u64,
}

/// `struct guard_msr_query`
#[repr(C)]
struct RawMsrQuery {
    first: u32,
    last: u32,
    msrs: u64,
    count: u32,
    access: u32,
    total: u64,
}

/// `struct guard_kernel_counts`: what page tables say.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) pages: u64,
    pub(crate) unmapped: u64,
    pub(crate) not_written: u64,
    pub(crate) not_executed: u64,
    pub(crate) write_exec: u64,
    pub(crate) given: u64,
    pub(crate) elsewhere: u64,
    pub(crate) ranges: u64,
    pub(crate) mappings: u64,
    pub(crate) reserved: u64,
    pub(crate) outside: u64,
    pub(crate) tables: u64,
    pub(crate) told: u64,
}

/// `struct guard_kernel`
#[repr(C)]
struct RawKernel {
    ranges: u64,
    told: u64,
    count: u32,
    told_count: u32,
    flags: u16,
    unmapped: u8,
    write_exec: u8,
    index: u32,
    reserved: u64,
    generation: u64,
    counts: Counts,
}

/// What came of reading page tables. There is something to tell with some errors, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Walk {
    /// The generation.
    pub(crate) result: Result<u64, Refusal>,
    /// What the tables say; zeros if they were not read.
    pub(crate) counts: Counts,
    /// The pages that policy asks for.
    pub(crate) told: Vec<Entry>,
}

/// `struct guard_info`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) version: u32,
    pub(crate) page_size: u32,
    pub(crate) deny_bits: u64,
    pub(crate) audit_bits: u64,
    pub(crate) max_request_ranges: u32,
    pub(crate) max_ranges: u32,
    pub(crate) generation: u64,
    pub(crate) ranges_in_force: u32,
    pub(crate) reserved: u32,
    pub(crate) violations: u64,
    pub(crate) events_lost: u64,
    pub(crate) malformed: u64,
    pub(crate) max_msr_ranges: u32,
    pub(crate) msr_ranges_in_force: u32,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What the driver or the device said.
    pub(crate) errno: Errno,
    /// The entry that it is about.
    pub(crate) index: Option<usize>,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, index: None }
    }
}

/// `struct guard_event`: an access that was refused or watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: u32,
    pub(crate) access: u32,
    pub(crate) source: u32,
    pub(crate) action: u32,
    pub(crate) gpa: u64,
    pub(crate) gva: u64,
    pub(crate) rip: u64,
    pub(crate) value: u64,
    pub(crate) size: u32,
    pub(crate) times: u32,
    pub(crate) dropped: u64,
    pub(crate) lost: u64,
    pub(crate) time: u64,
}

impl Event {
    /// Bytes of a record.
    const SIZE: usize = 80;

    fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        Self {
            kind: u32_at(0),
            access: u32_at(4),
            source: u32_at(8),
            action: u32_at(12),
            gpa: u64_at(16),
            gva: u64_at(24),
            rip: u64_at(32),
            value: u64_at(40),
            size: u32_at(48),
            times: u32_at(52),
            dropped: u64_at(56),
            lost: u64_at(64),
            time: u64_at(72),
        }
    }
}

/// The open device.
pub(crate) struct Device(File);

impl Device {
    /// Opens it. Events are kept from here on.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map(Self)
    }

    /// The device's configuration.
    pub(crate) fn info(&self) -> Result<Info, Errno> {
        // SAFETY: INFO writes a struct guard_info, of which Info is the image.
        unsafe { ioctl(&self.0, Getter::<INFO, Info>::new()) }
    }

    /// Denies until the next system reset; returns the generation.
    pub(crate) fn lock(&self, entries: &[Entry]) -> Result<u64, Refusal> {
        // SAFETY: LOCK reads entries of struct guard_range, of which Entry is the image.
        unsafe { self.request::<LOCK, _>(entries) }
    }

    /// Sets what is denied; returns the generation.
    pub(crate) fn protect(&self, entries: &[Entry]) -> Result<u64, Refusal> {
        // SAFETY: PROTECT does, too.
        unsafe { self.request::<PROTECT, _>(entries) }
    }

    /// Rules for MSRs, until the next system reset; returns the generation.
    pub(crate) fn msr_lock(&self, entries: &[MsrEntry]) -> Result<u64, Refusal> {
        // SAFETY: MSR_LOCK reads entries of struct guard_msr, of which MsrEntry is the image.
        unsafe { self.request::<MSR_LOCK, _>(entries) }
    }

    /// Sets rules for MSRs; returns the generation.
    pub(crate) fn msr_protect(&self, entries: &[MsrEntry]) -> Result<u64, Refusal> {
        // SAFETY: MSR_PROTECT does, too.
        unsafe { self.request::<MSR_PROTECT, _>(entries) }
    }

    /// # Safety
    ///
    /// OPCODE must be a call that takes a struct guard_lock, and reads entries of which `T` is the
    /// image.
    unsafe fn request<const OPCODE: Opcode, T>(&self, entries: &[T]) -> Result<u64, Refusal> {
        let mut request = RawLock {
            ranges: entries.as_ptr() as u64,
            count: u32::try_from(entries.len()).map_err(|_| Errno::TOOBIG)?,
            index: NO_INDEX,
            generation: 0,
        };
        // SAFETY: the call reads and writes a struct guard_lock, of which RawLock is the image,
        // and reads `count` entries at `ranges`, which `entries` has for that long.
        let result = unsafe { ioctl(&self.0, Updater::<OPCODE, RawLock>::new(&mut request)) };
        result.map_err(|errno| Refusal {
            errno,
            index: (request.index != NO_INDEX).then_some(request.index as usize),
        })?;
        Ok(request.generation)
    }

    /// Makes what is denied now immutable; returns the generation.
    pub(crate) fn seal(&self) -> Result<u64, Errno> {
        // SAFETY: SEAL writes a struct guard_seal, of which RawSeal is the image.
        let seal = unsafe { ioctl(&self.0, Getter::<SEAL, RawSeal>::new()) };
        seal.map(|seal| seal.generation)
    }

    /// What holds in a range, in as many calls as it takes.
    pub(crate) fn query(&self, range: Range) -> Result<Vec<Entry>, Errno> {
        let mut found = Vec::new();
        let mut buffer = vec![Entry::default(); QUERY_ROOM];
        let mut first = range.first;
        loop {
            let mut query = RawQuery {
                gfn_start: first,
                gfn_end: range.last,
                ranges: buffer.as_mut_ptr() as u64,
                count: QUERY_ROOM as u32,
                reserved: 0,
                total: 0,
            };
            // SAFETY: QUERY reads and writes a struct guard_query, of which RawQuery is the
            // image, and writes at most `count` entries at `ranges`, which `buffer` has; any bits
            // make an Entry.
            unsafe { ioctl(&self.0, Updater::<QUERY, RawQuery>::new(&mut query)) }?;
            let filled = buffer.get(..query.count as usize).ok_or(Errno::PROTO)?;
            found.extend_from_slice(filled);
            match filled.last() {
                Some(entry) if query.total > filled.len() as u64 => {
                    // Else this would go on for ever.
                    if entry.last < first || entry.last >= range.last {
                        return Err(Errno::PROTO);
                    }
                    first = entry.last + 1;
                }
                _ => return Ok(found),
            }
        }
    }

    /// Sets rules for MSRs by bitmaps; returns the generation.
    pub(crate) fn msr_bitmap(&self, bitmaps: &[u8], count: u32) -> Result<u64, Refusal> {
        let mut request = RawMsrBitmap {
            bitmaps: bitmaps.as_ptr() as u64,
            bytes: u32::try_from(bitmaps.len()).map_err(|_| Errno::TOOBIG)?,
            count,
            index: NO_INDEX,
            reserved: 0,
            generation: 0,
        };
        // SAFETY: MSR_BITMAP reads and writes a struct guard_msr_bitmap, of which RawMsrBitmap is
        // the image, and reads `bytes` bytes at `bitmaps`, which is there for that long.
        let result = unsafe {
            ioctl(
                &self.0,
                Updater::<MSR_BITMAP, RawMsrBitmap>::new(&mut request),
            )
        };
        result.map_err(|errno| Refusal {
            errno,
            index: (request.index != NO_INDEX).then_some(request.index as usize),
        })?;
        Ok(request.generation)
    }

    /// The guest's rules for MSRs.
    pub(crate) fn msr_query(&self, msrs: Msrs) -> Result<Vec<MsrEntry>, Errno> {
        let mut buffer = vec![MsrEntry::default(); QUERY_ROOM];
        let mut query = RawMsrQuery {
            first: msrs.first,
            last: msrs.last,
            msrs: buffer.as_mut_ptr() as u64,
            count: QUERY_ROOM as u32,
            access: Access::ReadWrite.bits().into(),
            total: 0,
        };
        // SAFETY: MSR_QUERY reads and writes a struct guard_msr_query, of which RawMsrQuery is the
        // image, and writes at most `count` entries at `msrs`, which `buffer` has; any bits make
        // an MsrEntry.
        unsafe { ioctl(&self.0, Updater::<MSR_QUERY, RawMsrQuery>::new(&mut query)) }?;
        // More than fit cannot be told apart at an MSR that two rules speak of: nobody has so many.
        if query.total > u64::from(query.count) || query.count as usize > buffer.len() {
            return Err(Errno::OVERFLOW);
        }
        buffer.truncate(query.count as usize);
        Ok(buffer)
    }

    /// Has page tables read, and denies what they do not use, all as `modes` (flags, policy for
    /// pages without mapping, policy for written and executed ones) say. No entries: all memory.
    pub(crate) fn kernel(&self, entries: &[Entry], modes: (u16, u8, u8)) -> Walk {
        let mut told = vec![Entry::default(); TOLD_ROOM];
        let mut request = RawKernel {
            ranges: entries.as_ptr() as u64,
            told: told.as_mut_ptr() as u64,
            // More than 2^32 have no room in an argument list.
            count: u32::try_from(entries.len()).unwrap_or(u32::MAX),
            told_count: TOLD_ROOM as u32,
            flags: modes.0,
            unmapped: modes.1,
            write_exec: modes.2,
            index: NO_INDEX,
            reserved: 0,
            generation: 0,
            counts: Counts::default(),
        };
        // SAFETY: KERNEL reads and writes a struct guard_kernel, of which RawKernel is the image,
        // reads `count` entries at `ranges`, of which `entries` has no fewer (if it had more than
        // an u32 can say the driver would read none), and writes at most `told_count` entries at
        // `told`, which has that many; any bits make an Entry.
        let result = unsafe { ioctl(&self.0, Updater::<KERNEL, RawKernel>::new(&mut request)) };
        // With most errors nothing is written, and told_count is what it was.
        told.truncate(request.counts.told.min(request.told_count.into()) as usize);
        Walk {
            result: result
                .map(|()| request.generation)
                .map_err(|errno| Refusal {
                    errno,
                    index: (request.index != NO_INDEX).then_some(request.index as usize),
                }),
            counts: request.counts,
            told,
        }
    }

    /// Waits for events and returns those that are there.
    pub(crate) fn events(&mut self) -> io::Result<Vec<Event>> {
        let mut buffer = [0; 64 * Event::SIZE];
        let len = loop {
            match self.0.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        let (records, _) = buffer[..len].as_chunks();
        Ok(records.iter().map(Event::from_bytes).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The numbers that the C header's macros make.
    #[test]
    fn the_calls_have_the_numbers_of_the_header() {
        assert_eq!(LOCK, 0xc018_47e0);
        assert_eq!(INFO, 0x8050_47e1);
        assert_eq!(PROTECT, 0xc018_47e2);
        assert_eq!(SEAL, 0x8008_47e3);
        assert_eq!(QUERY, 0xc028_47e4);
        assert_eq!(MSR_LOCK, 0xc018_47e5);
        assert_eq!(MSR_PROTECT, 0xc018_47e6);
        assert_eq!(MSR_BITMAP, 0xc020_47e7);
        assert_eq!(MSR_QUERY, 0xc020_47e8);
        assert_eq!(KERNEL, 0xc098_47e9);
    }

    #[test]
    fn an_event_is_read_field_by_field() {
        let mut bytes = [0; Event::SIZE];
        let fields: [(usize, u64, usize); 13] = [
            (0, 1, 4),
            (4, 2, 4),
            (8, 3, 4),
            (12, 4, 4),
            (16, 5, 8),
            (24, 6, 8),
            (32, 7, 8),
            (40, 8, 8),
            (48, 9, 4),
            (52, 10, 4),
            (56, 11, 8),
            (64, 12, 8),
            (72, 13, 8),
        ];
        for (at, value, size) in fields {
            if size == 4 {
                bytes[at..at + 4].copy_from_slice(&(value as u32).to_ne_bytes());
            } else {
                bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
            }
        }
        assert_eq!(
            Event::from_bytes(&bytes),
            Event {
                kind: 1,
                access: 2,
                source: 3,
                action: 4,
                gpa: 5,
                gva: 6,
                rip: 7,
                value: 8,
                size: 9,
                times: 10,
                dropped: 11,
                lost: 12,
                time: 13,
            }
        );
    }
}
