// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as far as the guest itself may use it.
//!
//! This process has all of the guest's memory mapped, and does there what a guest's rings tell
//! it. Every access goes through a [`Guarded`], so it can be made neither to write what the guest
//! may not write nor to read what it may not read: not a request, nor a descriptor, nor an index.
//! Knows guest memory and the table, and nothing of rings.

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, Permissions,
};

use crate::protect::{Deny, GfnRange, Table};

/// A view of guest memory that lasts as long as the table does not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guarded<'a> {
    memory: &'a GuestMemoryMmap,
    table: &'a Table,
}

impl<'a> Guarded<'a> {
    pub(super) fn new(memory: &'a GuestMemoryMmap, table: &'a Table) -> Self {
        Self { memory, table }
    }

    /// What is there, whoever may use it.
    pub(super) fn memory(&self) -> &'a GuestMemoryMmap {
        self.memory
    }

    /// What holds where.
    pub(super) fn table(&self) -> &'a Table {
        self.table
    }

    /// Whether all of these bytes exist.
    pub(super) fn exists(&self, at: GuestAddress, len: usize) -> bool {
        GuestMemoryBackend::check_range(self.memory, at, len)
    }

    /// Whether the guest may do `access` on all of these bytes, as far as they exist.
    pub(super) fn allows(&self, at: GuestAddress, len: usize, access: Permissions) -> bool {
        let mut denied = Deny::empty();
        denied.set(Deny::NOREAD, access.allow(Permissions::Read));
        denied.set(Deny::NOWRITE, access.allow(Permissions::Write));
        GfnRange::of_bytes(at.0, len as u64).is_none_or(|frames| !self.table.denies(frames, denied))
    }
}

impl GuestMemory for Guarded<'_> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, at: GuestAddress, len: usize, access: Permissions) -> bool {
        self.exists(at, len) && self.allows(at, len, access)
    }

    fn get_slices<'a>(
        &'a self,
        at: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if !self.allows(at, len, access) {
            return Err(GuestMemoryError::InvalidGuestAddress(at));
        }
        GuestMemory::get_slices(self.memory, at, len, access)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::Bytes;

    use super::*;
    use crate::protect::{Attributes, Protection};

    #[test]
    fn what_the_guest_may_not_do_cannot_be_done_for_it() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
        let table: Table = [(1, Deny::NOWRITE), (2, Deny::NOREAD), (3, Deny::NOEXEC)]
            .map(|(page, deny)| Protection {
                range: GfnRange::new(page, page).unwrap(),
                attributes: Attributes::new(deny, Deny::all()),
            })
            .into_iter()
            .collect();
        let guarded = Guarded::new(&memory, &table);
        // Page, may be read, may be written; the last bytes before it belong to it here.
        for (at, reads, writes) in [
            (0x0ff8u64, true, true),
            (0x0ff9, true, false),
            (0x1ff8, true, false),
            (0x1ff9, false, false),
            (0x2000, false, true),
            (0x2ff9, false, true),
            (0x3000, true, true),
            (0x7ff8, true, true),
            (0x7ff9, false, false),
            (u64::MAX, false, false),
        ] {
            let place = GuestAddress(at);
            assert_eq!(
                guarded.read_slice(&mut [0; 8], place).is_ok(),
                reads,
                "{at:#x}"
            );
            assert_eq!(
                guarded.write_slice(&[1; 8], place).is_ok(),
                writes,
                "{at:#x}"
            );
            let check = |access| guarded.check_range(place, 8, access);
            assert_eq!(check(Permissions::Read), reads, "{at:#x}");
            assert_eq!(check(Permissions::Write), writes, "{at:#x}");
            assert_eq!(check(Permissions::ReadWrite), reads && writes, "{at:#x}");
        }
        let load = |at| guarded.load::<u16>(GuestAddress(at), Ordering::Acquire);
        let store = |at| guarded.store(1u16, GuestAddress(at), Ordering::Release);
        assert!(load(0x1000).is_ok() && store(0x1000).is_err());
        assert!(load(0x2000).is_err() && store(0x2000).is_ok());
    }
}
