// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `PROTECT_KERNEL` in the formats of `docs/device.md`: the request, and what it is told.
//!
//! Pure, as [`wire`](super::wire) is. Memory is not known here, so neither is whether tables and
//! pages are in it.

use super::wire::{
    Errno, Limits, MAX_REQUEST_RANGES, RANGE_SIZE, RESPONSE_SIZE, Refusal, TYPE_KERNEL, each_entry,
    encode_response, parse_entry, put,
};
use crate::paging::{Levels, Paging, Policy, Space, Unmapped, WriteExec};
use crate::protect::{Attributes, Deny, GfnRange, Protection};

/// Bytes of a request before its entries.
pub(super) const HEADER_SIZE: usize = 40;
/// Bytes of an answer before the ranges that are told.
pub(super) const ANSWER_SIZE: usize = RESPONSE_SIZE + 8 * COUNTS;
/// The attributes that an entry may let its pages have.
pub(super) const GIVEN: u64 = {
    let rights = Deny::NOWRITE.union(Deny::NOEXEC_KERNEL).bits();
    rights | rights << Attributes::AUDIT_SHIFT
};

/// Numbers in an answer.
const COUNTS: usize = 13;
const FLAG_LOCK: u16 = 1;
const FLAG_DRY_RUN: u16 = 2;
const CONTROL_NXE: u32 = 1;
const CONTROL_WP: u32 = 2;
const CONTROL_SMEP: u32 = 4;
const CONTROL_SHADOW_STACKS: u32 = 8;
const CONTROL_GIB_PAGES: u32 = 16;
const CONTROL_ALL: u32 = 31;
/// What a range that is told is, in the place of its attributes.
const TOLD_WRITE_EXEC: u64 = 1;
const TOLD_UNMAPPED: u64 = 2;

/// That pages get what the mappings of a space do not need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KernelRequest {
    /// Which tables, read how.
    pub space: Space,
    /// Pages and what they may get; the last one on a page counts.
    pub entries: Vec<Protection>,
    /// What becomes of pages for which the mappings give no answer.
    pub policy: Policy,
    /// For good.
    pub lock: bool,
    /// Only to be told.
    pub dry_run: bool,
}

/// What the driver is told besides the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// Pages of entries with attributes.
    pub pages: u64,
    /// Those without mapping; they are in none of the next four.
    pub unmapped: u64,
    /// Those that no mapping writes.
    pub not_written: u64,
    /// Those that no mapping executes in supervisor mode.
    pub not_executed: u64,
    /// Those that are written and executed in supervisor mode.
    pub write_exec: u64,
    /// Those that get attributes.
    pub given: u64,
    /// Mapped pages of no entry with attributes.
    pub elsewhere: u64,
    /// Ranges that get attributes, cut at the ends of entries.
    pub ranges: u64,
    /// Mappings, as often as addresses lead to them.
    pub mappings: u64,
    /// Entries of tables with reserved bits.
    pub reserved: u64,
    /// Entries of tables that name one outside of memory.
    pub outside: u64,
    /// Table pages that were read.
    pub tables: u64,
    /// Ranges that are written and executed, as many as are told.
    pub told_write_exec: Vec<GfnRange>,
    /// Ranges without mapping, as many as are told.
    pub told_unmapped: Vec<GfnRange>,
}

impl Report {
    fn told(&self) -> impl Iterator<Item = (GfnRange, u64)> + '_ {
        let write_exec = self.told_write_exec.iter();
        let unmapped = self.told_unmapped.iter();
        write_exec
            .map(|&range| (range, TOLD_WRITE_EXEC))
            .chain(unmapped.map(|&range| (range, TOLD_UNMAPPED)))
    }

    /// How many ranges are to be told.
    pub(super) fn told_len(&self) -> usize {
        self.told_write_exec.len() + self.told_unmapped.len()
    }

    /// In the order of the answer.
    fn counts(&self) -> [u64; COUNTS] {
        [
            self.pages,
            self.unmapped,
            self.not_written,
            self.not_executed,
            self.write_exec,
            self.given,
            self.elsewhere,
            self.ranges,
            self.mappings,
            self.reserved,
            self.outside,
            self.tables,
            self.told_len() as u64,
        ]
    }
}

/// Reads a request of queue 2; the rest is as in [`parse_request`](super::wire::parse_request).
pub(super) fn parse(bytes: &[u8], total: u64, limits: Limits) -> Result<KernelRequest, Refusal> {
    // Of what is longer than a request can be there is only the start.
    let field = |at: usize, len: usize| bytes.get(at..at + len).ok_or(Errno::Einval);
    let number = |at, len| -> Result<u64, Errno> {
        let mut word = [0; 8];
        word[..len].copy_from_slice(field(at, len)?);
        Ok(u64::from_le_bytes(word))
    };
    let (kind, flags, count) = (number(0, 2)? as u16, number(2, 2)? as u16, number(4, 4)?);
    if kind != TYPE_KERNEL || !limits.rights.kernel {
        return Err(Errno::Eopnotsupp.into());
    }
    if flags & !(FLAG_LOCK | FLAG_DRY_RUN) != 0 {
        return Err(Errno::Einval.into());
    }
    let most = u64::from(limits.max_request_ranges.min(MAX_REQUEST_RANGES));
    let size_of = |count: u64| HEADER_SIZE as u64 + RANGE_SIZE as u64 * count;
    if count > most || total > size_of(most) {
        return Err(Errno::E2big.into());
    }
    if count == 0 || total != size_of(count) {
        return Err(Errno::Einval.into());
    }
    let (entries, _) = bytes[HEADER_SIZE..].as_chunks::<RANGE_SIZE>();
    let entries = each_entry(entries, |entry| {
        parse_entry(entry, TYPE_KERNEL, limits.rights)
    })?;

    let (root, start, last) = (number(8, 8)?, number(16, 8)?, number(24, 8)?);
    let [levels, physical_bits, unmapped, write_exec] = [32, 33, 34, 35].map(|at: usize| bytes[at]);
    let control = number(36, 4)? as u32;
    let policy = Policy {
        unmapped: match unmapped {
            0 => Unmapped::Leave,
            1 => Unmapped::Report,
            2 => Unmapped::Refuse,
            3 => Unmapped::Deny,
            _ => return Err(Errno::Einval.into()),
        },
        write_exec: match write_exec {
            0 => WriteExec::Leave,
            1 => WriteExec::Report,
            2 => WriteExec::Refuse,
            _ => return Err(Errno::Einval.into()),
        },
    };
    if control & !CONTROL_ALL != 0 {
        return Err(Errno::Einval.into());
    }
    let paging = Paging {
        levels: Levels::try_from(levels).map_err(|_| Errno::Einval)?,
        nxe: control & CONTROL_NXE != 0,
        wp: control & CONTROL_WP != 0,
        smep: control & CONTROL_SMEP != 0,
        shadow_stacks: control & CONTROL_SHADOW_STACKS != 0,
        physical_bits,
        gib_pages: control & CONTROL_GIB_PAGES != 0,
    };
    Ok(KernelRequest {
        space: Space::new(paging, root, start..=last).map_err(|_| Errno::Einval)?,
        entries,
        policy,
        lock: flags & FLAG_LOCK != 0,
        dry_run: flags & FLAG_DRY_RUN != 0,
    })
}

/// The answer, with as many of the ranges to be told as go into `room` bytes. What was not found
/// out is zeros.
pub(super) fn encode(
    response: Result<u64, Refusal>,
    report: Option<&Report>,
    room: u64,
) -> Vec<u8> {
    let mut bytes = vec![0; ANSWER_SIZE];
    put(&mut bytes, 0, &encode_response(response));
    let Some(report) = report else {
        return bytes;
    };
    for (count, index) in report.counts().into_iter().zip(0..) {
        put(&mut bytes, RESPONSE_SIZE + 8 * index, &count.to_le_bytes());
    }
    let most = room.saturating_sub(ANSWER_SIZE as u64) / RANGE_SIZE as u64;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    for (range, what) in report.told().take(most) {
        let (start, end) = (range.start().number(), range.end().number());
        let words = [start, end, what].map(u64::to_le_bytes);
        bytes.extend_from_slice(words.as_flattened());
    }
    bytes
}

#[cfg(test)]
#[path = "kernel_wire_tests.rs"]
mod tests;
