// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory with page tables in it, for tests.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Levels, Limits, Paging};

pub(super) const P: u64 = 1;
pub(super) const W: u64 = 2;
pub(super) const U: u64 = 4;
pub(super) const A: u64 = 1 << 5;
pub(super) const D: u64 = 1 << 6;
pub(super) const PS: u64 = 1 << 7;
pub(super) const NX: u64 = 1 << 63;

/// The usual: all protections on, 40 bits of physical addresses.
pub(super) const FOUR: Paging = Paging {
    levels: Levels::Four,
    nxe: true,
    wp: true,
    smep: true,
    shadow_stacks: false,
    physical_bits: 40,
    gib_pages: true,
};
pub(super) const FIVE: Paging = Paging {
    levels: Levels::Five,
    ..FOUR
};

pub(super) const LIMITS: Limits<'static> = Limits {
    entries: 1 << 28,
    ranges: 1 << 22,
    cancel: None,
    progress: None,
};

/// Memory from address 0 on. Frame 1 is the root by convention.
pub(super) struct Guest {
    pub(super) memory: GuestMemoryMmap,
}

pub(super) const ROOT: u64 = 0x1000;

impl Guest {
    pub(super) fn new(pages: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), pages * 4096)]);
        Self {
            memory: memory.expect("a few pages can be mapped"),
        }
    }

    /// Puts an entry into the table at `frame`.
    pub(super) fn set(&self, frame: u64, index: u64, entry: u64) -> &Self {
        let at = GuestAddress(frame * 4096 + index * 8);
        self.memory
            .write_obj(entry.to_le(), at)
            .expect("a frame of this memory");
        self
    }

    /// Tables at frames 1, 2, ... so that index 0 of each leads to the next, with `flags`; the last
    /// of `depth` is left empty.
    pub(super) fn chain(&self, depth: u64, flags: u64) -> &Self {
        for frame in 1..depth {
            self.set(frame, 0, entry(frame + 1, flags));
        }
        self
    }
}

pub(super) fn entry(frame: u64, flags: u64) -> u64 {
    frame << 12 | flags
}
