// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every mapping of a range of linear addresses, one by one, in the order of addresses.
//!
//! The contract is that of Heki's `heki_walk()` (seed 003): address, physical address, size and
//! flags of each mapping, clipped to the range at every level; what is not present is passed over.
//! It follows each path, so tables that share tables can keep it busy until its limits.

use std::ops::ControlFlow;

use vm_memory::GuestMemory;

use super::entry::{self, Entry, Path};
use super::table::{Counts, Limits, Malformed, Reader, Table, WalkError, keep_example};
use super::{Mistake, Rights, Space};
use crate::protect::PAGE_SHIFT;

/// A mapping, or the part of one that lies in the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mapping {
    /// First linear address.
    pub va: u64,
    /// Guest-physical address that it is mapped to.
    pub pa: u64,
    /// Bytes: at most those of the page.
    pub size: u64,
    /// All bits of the page's own entry that are not its address (SDM vol. 3A, tables 4-16, 4-18
    /// and 4-20).
    pub flags: u64,
    /// Level of the page's own entry: 1, 2 or 3 for a page of 4 KiB, 2 MiB or 1 GiB.
    pub level: u8,
    /// What all entries on the way to the page leave of rights.
    pub rights: Rights,
}

/// What a walk came by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Walked {
    /// Mappings and malformed entries in the range, up to where the walk ended.
    pub counts: Counts,
    /// The first 64 malformed entries.
    pub malformed: Vec<Malformed>,
    /// Entries read, 512 for each table.
    pub entries_read: u64,
    /// Whether the callback ended it.
    pub stopped: bool,
}

/// Calls `callback` for every mapping in `space`, in the order of linear addresses, until it breaks
/// (`docs/paging.md`, "`walk`: each mapping").
///
/// A guest that changes its tables meanwhile is seen half before and half after; each entry is read
/// once for each path to it.
///
/// # Errors
///
/// [`WalkError`]: the root lies outside of memory, a limit was reached, or the walk was cancelled. The
/// callback has been called then for what came before. [`Limits::ranges`] does not count here.
pub fn walk<M: GuestMemory + ?Sized>(
    memory: &M,
    space: &Space,
    limits: &Limits<'_>,
    callback: impl FnMut(&Mapping) -> ControlFlow<()>,
) -> Result<Walked, WalkError> {
    let mut walk = Walk {
        reader: Reader::new(memory, limits),
        space,
        callback,
        walked: Walked::default(),
    };
    let root = Place {
        frame: space.root,
        level: space.paging.levels.number(),
        path: Path::ROOT,
        base: 0,
    };
    match walk.table(&root, space.first, space.last)? {
        Outcome::Outside => return Err(WalkError::RootOutside(space.root << PAGE_SHIFT)),
        Outcome::Stopped => walk.walked.stopped = true,
        Outcome::Done => {}
    }
    walk.walked.entries_read = walk.reader.entries();
    Ok(walk.walked)
}

/// Where a table is, and how one comes there.
struct Place {
    frame: u64,
    level: u8,
    path: Path,
    /// Translated bits of the first address that it can map.
    base: u64,
}

enum Outcome {
    Done,
    Stopped,
    Outside,
}

struct Walk<'a, M: ?Sized, F> {
    reader: Reader<'a, M>,
    space: &'a Space,
    callback: F,
    walked: Walked,
}

impl<M: GuestMemory + ?Sized, F: FnMut(&Mapping) -> ControlFlow<()>> Walk<'_, M, F> {
    /// Walks the part `first..=last` of what a table maps.
    fn table(&mut self, at: &Place, first: u64, last: u64) -> Result<Outcome, WalkError> {
        let mut table: Table = [0; _];
        if !self.reader.read(at.frame, &mut table)? {
            return Ok(Outcome::Outside);
        }
        let paging = &self.space.paging;
        let shift = Space::shift(at.level);
        for index in (first - at.base) >> shift..=(last - at.base) >> shift {
            let entry = table[index as usize];
            let base = at.base + (index << shift);
            let part_first = first.max(base);
            let part_last = last.min(base + ((1 << shift) - 1));
            match Entry::read(paging, at.level, entry) {
                Entry::Absent => {}
                Entry::Reserved(mistake) => {
                    self.malformed(at.level, part_first, entry, mistake);
                }
                Entry::Table(frame) => {
                    let below = Place {
                        frame,
                        level: at.level - 1,
                        path: at.path.through(entry),
                        base,
                    };
                    match self.table(&below, part_first, part_last)? {
                        Outcome::Done => {}
                        Outcome::Stopped => return Ok(Outcome::Stopped),
                        Outcome::Outside => {
                            self.malformed(at.level, part_first, entry, Mistake::Outside);
                        }
                    }
                }
                Entry::Leaf(frame) => {
                    self.walked.counts.leaves(at.level, 1);
                    let mapping = Mapping {
                        va: paging.levels.canonical(part_first),
                        pa: (frame << PAGE_SHIFT) + (part_first - base),
                        size: part_last - part_first + 1,
                        flags: entry::flags(at.level, entry),
                        level: at.level,
                        rights: at.path.rights(paging, entry),
                    };
                    if (self.callback)(&mapping).is_break() {
                        return Ok(Outcome::Stopped);
                    }
                }
            }
        }
        Ok(Outcome::Done)
    }

    fn malformed(&mut self, level: u8, linear: u64, entry: u64, mistake: Mistake) {
        self.walked.counts.mistake(mistake);
        let va = self.space.paging.levels.canonical(linear);
        keep_example(
            &mut self.walked.malformed,
            Malformed {
                va,
                level,
                entry,
                mistake,
            },
        );
    }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
