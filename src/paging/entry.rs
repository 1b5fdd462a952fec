// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One entry of a page table: what it is at its level, and how rights combine down the levels.
//!
//! The rules of the SDM, vol. 3A, "4-level paging and 5-level paging" and "Access rights". Knows
//! numbers only: neither memory nor ranges of addresses.

use std::fmt;

use super::Paging;
use crate::protect::PAGE_SHIFT;

pub(super) const PRESENT: u64 = 1 << 0;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const DIRTY: u64 = 1 << 6;
/// PS at levels 2 and 3, reserved at 4 and 5. At level 1 the same bit is PAT.
pub(super) const LARGE: u64 = 1 << 7;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// Where addresses are, up to the highest MAXPHYADDR there can be.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// PAT of a 2 MiB or 1 GiB page, which lies where a table's address has its lowest bit.
const LARGE_PAT: u64 = 1 << 12;

bitflags::bitflags! {
    /// What mappings let be done with a page.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
    pub struct Rights: u8 {
        /// Something loads from it: true of every page that is mapped.
        const READ = 1 << 0;
        /// Something stores to it, in supervisor or user mode.
        const WRITE = 1 << 1;
        /// Supervisor mode fetches instructions from it.
        const EXEC_SUPERVISOR = 1 << 2;
        /// User mode fetches instructions from it.
        const EXEC_USER = 1 << 3;
    }
}

impl Rights {
    /// Whether supervisor mode can execute what something can write.
    #[must_use]
    pub fn is_write_exec(self) -> bool {
        self.contains(Self::WRITE | Self::EXEC_SUPERVISOR)
    }
}

impl fmt::Display for Rights {
    /// As in `ls`: `rwxu`, a dash for what is not there; `x` is supervisor mode's, `u` user mode's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (right, letter) in Self::all().iter().zip(["r", "w", "x", "u"]) {
            f.write_str(if self.contains(right) { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// Why an entry that is present maps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Mistake {
    /// Address bits at or above MAXPHYADDR.
    #[error("address bits above the physical address width")]
    AddressBits,
    /// Bit 63 without EFER.NXE.
    #[error("no-execute bit without EFER.NXE")]
    NoExecute,
    /// PS at level 4 or 5, or at level 3 of a processor without 1 GiB pages.
    #[error("large-page bit where there are no large pages")]
    Large,
    /// Bits below the address of a 2 MiB or 1 GiB page, other than PAT.
    #[error("large page is not aligned to its size")]
    Misaligned,
    /// The table that it names does not lie in memory as a whole.
    #[error("table lies outside guest memory")]
    Outside,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Not present: all its other bits are the guest's own.
    Absent,
    /// Any access through it faults.
    Reserved(Mistake),
    /// Names the table of the next lower level at this frame.
    Table(u64),
    /// Maps the page that begins at this frame.
    Leaf(u64),
}

impl Entry {
    /// What `entry` is in a table of `level`.
    pub(super) fn read(paging: &Paging, level: u8, entry: u64) -> Self {
        if entry & PRESENT == 0 {
            return Self::Absent;
        }
        if entry & beyond(paging) != 0 {
            return Self::Reserved(Mistake::AddressBits);
        }
        if entry & NO_EXECUTE != 0 && !paging.nxe {
            return Self::Reserved(Mistake::NoExecute);
        }
        let frame = (entry & ADDRESS) >> PAGE_SHIFT;
        let large = entry & LARGE != 0;
        match level {
            1 => Self::Leaf(frame),
            2 if large => Self::large(level, entry),
            3 if large && paging.gib_pages => Self::large(level, entry),
            _ if large => Self::Reserved(Mistake::Large),
            _ => Self::Table(frame),
        }
    }

    fn large(level: u8, entry: u64) -> Self {
        let address = entry & ADDRESS & !LARGE_PAT;
        if address & ((1 << super::Space::shift(level)) - 1) != 0 {
            return Self::Reserved(Mistake::Misaligned);
        }
        Self::Leaf(address >> PAGE_SHIFT)
    }
}

/// The flags of a leaf at `level`: all that is not its address.
pub(super) fn flags(level: u8, entry: u64) -> u64 {
    if level == 1 {
        entry & !ADDRESS
    } else {
        entry & (!ADDRESS | LARGE_PAT)
    }
}

/// Address bits that `paging` does not have.
fn beyond(paging: &Paging) -> u64 {
    ADDRESS & !((1 << paging.physical_bits) - 1)
}

/// The bits of a leaf at `level` that say what it maps and with which rights. Two leaves of one
/// table that differ in other bits only do the same.
pub(super) fn telling(paging: &Paging, level: u8) -> u64 {
    let address = if level == 1 {
        ADDRESS
    } else {
        ADDRESS & !LARGE_PAT | LARGE
    };
    let dirty = if paging.shadow_stacks { DIRTY } else { 0 };
    PRESENT | WRITABLE | USER | NO_EXECUTE | address | dirty
}

/// What the entries on the way to a table, or to a page, have left of rights: R/W and U/S are
/// ANDed, XD is ORed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Path {
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl Path {
    /// At the root.
    pub(super) const ROOT: Self = Self {
        writable: true,
        user: true,
        no_execute: false,
    };

    /// Below `entry`.
    pub(super) fn through(self, entry: u64) -> Self {
        Self {
            writable: self.writable && entry & WRITABLE != 0,
            user: self.user && entry & USER != 0,
            no_execute: self.no_execute || entry & NO_EXECUTE != 0,
        }
    }

    /// Rights on the page that the leaf `entry` of a table maps, which this path leads to.
    pub(super) fn rights(self, paging: &Paging, entry: u64) -> Rights {
        let page = self.through(entry);
        let shadow_stack =
            paging.shadow_stacks && self.writable && entry & (WRITABLE | DIRTY) == DIRTY;
        let execute = !page.no_execute;
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, page.writable || !paging.wp || shadow_stack);
        rights.set(
            Rights::EXEC_SUPERVISOR,
            execute && !(page.user && paging.smep),
        );
        rights.set(Rights::EXEC_USER, execute && page.user);
        rights
    }

    /// A number below 8.
    fn index(self) -> u8 {
        u8::from(self.writable) | u8::from(self.user) << 1 | u8::from(self.no_execute) << 2
    }

    fn all() -> impl Iterator<Item = Self> {
        (0..8u8).map(|n| Self {
            writable: n & 1 != 0,
            user: n & 2 != 0,
            no_execute: n & 4 != 0,
        })
    }

    /// Whether every page below a table gets by `self` at least the rights that it gets by `other`.
    fn covers(self, other: Self, paging: &Paging) -> bool {
        let writable = self.writable || !other.writable || !paging.wp;
        let execute = !self.no_execute || other.no_execute;
        // With SMEP, user pages have one right more and another one less.
        let user = self.user == other.user || (self.user && !paging.smep) || other.no_execute;
        writable && execute && user
    }
}

/// A set of paths by which a table was walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Paths(u8);

impl Paths {
    pub(super) fn insert(&mut self, path: Path) {
        self.0 |= 1 << path.index();
    }
}

/// For each path the paths that it adds nothing to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Covers([Paths; 8]);

impl Covers {
    pub(super) fn new(paging: &Paging) -> Self {
        let mut covers = [Paths::default(); 8];
        for path in Path::all() {
            for other in Path::all().filter(|other| other.covers(path, paging)) {
                covers[usize::from(path.index())].insert(other);
            }
        }
        Self(covers)
    }

    /// Whether a table that was walked by `walked` has to be walked by `path`, too.
    pub(super) fn is_new(&self, path: Path, walked: Paths) -> bool {
        self.0[usize::from(path.index())].0 & walked.0 == 0
    }
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
