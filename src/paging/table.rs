// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Table pages as they come out of guest memory, within limits, and what is counted on the way.
//!
//! A table is copied once, because the guest may change it meanwhile: what was checked is what is
//! used. Knows guest memory, and nothing of what entries mean.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::Mistake;
use crate::protect::PAGE_SHIFT;

pub(super) const ENTRIES: usize = 512;
pub(super) type Table = [u64; ENTRIES];

/// Examples of malformed entries that are kept.
const EXAMPLES: usize = 64;

/// How much a walk may do (`docs/paging.md`, "`collective`: each frame").
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Entries read, 512 for each table. The 64 GiB direct map of a Linux in 4 KiB pages has 2^24.
    pub entries: u64,
    /// Disjoint ranges of frames with different rights ([`collective()`](super::collective()) only).
    pub ranges: usize,
    /// Once this is true the walk ends; looked at before each table.
    pub cancel: Option<&'a AtomicBool>,
    /// Told how many entries this walk has read, after each table; for whoever shows progress.
    pub progress: Option<&'a AtomicU64>,
}

impl Default for Limits<'_> {
    /// 2^28 entries, which is a second or so; 2^22 ranges, which is 64 MiB.
    fn default() -> Self {
        Self {
            entries: 1 << 28,
            ranges: 1 << 22,
            cancel: None,
            progress: None,
        }
    }
}

/// Why a walk has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// The root's page, at this guest-physical address, is not in memory, or not in one piece of it.
    #[error("root {0:#x} of the page tables is not in guest memory")]
    RootOutside(u64),
    /// The tables are more than the walk may read: [`Limits::entries`].
    #[error("page tables have more than {0} entries to read")]
    TooManyEntries(u64),
    /// Too many ranges of frames differ in their rights: [`Limits::ranges`].
    #[error("page tables make more than {0} ranges of pages with different rights")]
    TooManyRanges(usize),
    /// Somebody wanted the walk to end: [`Limits::cancel`].
    #[error("walk of the page tables was cancelled")]
    Cancelled,
}

/// What there is below a root or a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Mappings of 4 KiB, 2 MiB and 1 GiB pages, each as often as linear addresses lead to it.
    pub mappings: [u64; 3],
    /// Entries that are present but have reserved bits set. They map nothing.
    pub reserved: u64,
    /// Entries that name a table outside of memory. Nothing is known of what they map.
    pub outside: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        for (sum, n) in self.mappings.iter_mut().zip(other.mappings) {
            *sum += n;
        }
        self.reserved += other.reserved;
        self.outside += other.outside;
    }

    /// Adds `n` leaves of a table at `level`.
    pub(super) fn leaves(&mut self, level: u8, n: u64) {
        self.mappings[usize::from(level) - 1] += n;
    }

    pub(super) fn mistake(&mut self, mistake: Mistake) {
        match mistake {
            Mistake::Outside => self.outside += 1,
            _ => self.reserved += 1,
        }
    }
}

/// An entry that is present and maps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Malformed {
    /// The first linear address that leads to it.
    pub va: u64,
    /// Level of its table: 1 to 5.
    pub level: u8,
    /// The entry.
    pub entry: u64,
    /// Why it maps nothing.
    pub mistake: Mistake,
}

/// The first few malformed entries.
pub(super) fn keep_example(examples: &mut Vec<Malformed>, malformed: Malformed) {
    if examples.len() < EXAMPLES {
        examples.push(malformed);
    }
}

/// Reads tables until a limit is reached.
pub(super) struct Reader<'a, M: ?Sized> {
    memory: &'a M,
    limits: &'a Limits<'a>,
    entries: u64,
}

impl<'a, M: GuestMemory + ?Sized> Reader<'a, M> {
    pub(super) fn new(memory: &'a M, limits: &'a Limits<'a>) -> Self {
        Self {
            memory,
            limits,
            entries: 0,
        }
    }

    /// Entries read until now.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Copies the table at `frame`; `false` if it does not lie in one piece of memory.
    pub(super) fn read(&mut self, frame: u64, table: &mut Table) -> Result<bool, WalkError> {
        let cancelled = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        if self.limits.cancel.is_some_and(cancelled) {
            return Err(WalkError::Cancelled);
        }
        if !self.copy(frame, table) {
            return Ok(false);
        }
        self.entries += ENTRIES as u64;
        if let Some(progress) = self.limits.progress {
            progress.store(self.entries, Ordering::Relaxed);
        }
        if self.entries > self.limits.entries {
            return Err(WalkError::TooManyEntries(self.limits.entries));
        }
        if cfg!(target_endian = "big") {
            table
                .iter_mut()
                .for_each(|entry| *entry = u64::from_le(*entry));
        }
        Ok(true)
    }

    fn copy(&self, frame: u64, table: &mut Table) -> bool {
        let at = GuestAddress(frame << PAGE_SHIFT);
        let slices = self
            .memory
            .get_slices(at, size_of::<Table>(), Permissions::Read);
        match slices.map(|mut slices| slices.next()) {
            Ok(Some(Ok(page))) if page.len() == size_of::<Table>() => {
                page.copy_to(table.as_mut_slice()) == ENTRIES
            }
            _ => false,
        }
    }
}
