// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `PROTECT_KERNEL` as a driver has it: page tables in its memory, the request, the answer. Said
//! once more from `docs/device.md`, so that a mistake in the crate's is seen.

use super::guest::{Guest, PROTECT_KERNEL};
use super::vm_guard::Range;

/// Bits of an entry of a page table.
pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const PS: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;

/// Flags of a request.
pub const F_LOCK: u16 = 1;
pub const F_DRY_RUN: u16 = 2;

/// Where the kernel's half begins.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;

/// Page tables, made from frame `0x100` on.
pub struct Tables {
    pub root: u64,
    next: u64,
}

impl Tables {
    pub fn new(guest: &Guest) -> Self {
        let mut tables = Self {
            root: 0x100,
            next: 0x101,
        };
        guest.write_bytes(tables.root << 12, &[0; 4096]);
        tables.next = 0x101;
        tables
    }

    /// Maps a page, all tables on the way with all rights. Returns where its entry is.
    pub fn map(&mut self, guest: &Guest, va: u64, gfn: u64, flags: u64) -> u64 {
        let mut table = self.root;
        for shift in [39, 30, 21] {
            let at = (table << 12) + (va >> shift & 511) * 8;
            let entry: u64 = guest.read(at);
            table = if entry & P == 0 {
                let new = self.next;
                self.next += 1;
                guest.write_bytes(new << 12, &[0; 4096]);
                guest.write(at, new << 12 | P | W | U);
                new
            } else {
                (entry & 0x000f_ffff_ffff_f000) >> 12
            };
        }
        let at = (table << 12) + (va >> 12 & 511) * 8;
        guest.write(at, gfn << 12 | flags);
        at
    }

    /// Maps frames one after the other where a direct map has them.
    pub fn map_range(&mut self, guest: &Guest, start: u64, end: u64, flags: u64) {
        for gfn in start..=end {
            self.map(guest, KERNEL + (gfn << 12), gfn, flags);
        }
    }
}

/// The usual: a kernel's half with all protections on.
#[derive(Clone, Debug)]
pub struct KernelRequest {
    pub kind: u16,
    pub flags: u16,
    /// Instead of the number of entries.
    pub count: Option<u32>,
    pub root: u64,
    pub va_start: u64,
    pub va_end: u64,
    pub levels: u8,
    pub physical_bits: u8,
    pub unmapped: u8,
    pub write_exec: u8,
    pub control: u32,
    pub entries: Vec<Range>,
}

impl KernelRequest {
    pub fn new(entries: &[Range]) -> Self {
        Self {
            kind: PROTECT_KERNEL,
            flags: 0,
            count: None,
            root: 0x100 << 12,
            va_start: KERNEL,
            va_end: !0,
            levels: 4,
            physical_bits: 40,
            unmapped: 0,
            write_exec: 0,
            control: 7,
            entries: entries.to_vec(),
        }
    }

    pub fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }

    pub fn policy(self, unmapped: u8, write_exec: u8) -> Self {
        Self {
            unmapped,
            write_exec,
            ..self
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let count = self.count.unwrap_or(self.entries.len() as u32);
        let mut bytes = self.kind.to_le_bytes().to_vec();
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        for field in [self.root, self.va_start, self.va_end] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend([
            self.levels,
            self.physical_bits,
            self.unmapped,
            self.write_exec,
        ]);
        bytes.extend(self.control.to_le_bytes());
        for &(start, end, attributes) in &self.entries {
            for field in [start, end, attributes] {
                bytes.extend(field.to_le_bytes());
            }
        }
        bytes
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub status: u32,
    pub index: u32,
    pub value: u64,
    pub counts: Counts,
    pub told: Vec<Range>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub pages: u64,
    pub unmapped: u64,
    pub not_written: u64,
    pub not_executed: u64,
    pub write_exec: u64,
    pub given: u64,
    pub elsewhere: u64,
    pub ranges: u64,
    pub mappings: u64,
    pub reserved: u64,
    pub outside: u64,
    pub tables: u64,
    pub told: u64,
}

impl Answer {
    pub fn read(guest: &Guest, at: u64, len: u32) -> Self {
        assert!(len >= 120 && (len - 120).is_multiple_of(24), "{len}");
        let word = |index: u64| guest.read::<u64>(at + 8 * index);
        let told = (0..u64::from(len - 120) / 24)
            .map(|n| {
                let [start, end, what] = [0, 1, 2].map(|i| word(15 + 3 * n + i));
                (start, end, what)
            })
            .collect();
        Self {
            status: word(0) as u32,
            index: (word(0) >> 32) as u32,
            value: word(1),
            counts: Counts {
                pages: word(2),
                unmapped: word(3),
                not_written: word(4),
                not_executed: word(5),
                write_exec: word(6),
                given: word(7),
                elsewhere: word(8),
                ranges: word(9),
                mappings: word(10),
                reserved: word(11),
                outside: word(12),
                tables: word(13),
                told: word(14),
            },
            told,
        }
    }

    /// Status and index.
    pub fn outcome(&self) -> (u32, u32) {
        (self.status, self.index)
    }

    /// A refusal that comes before anything is found out.
    pub fn nothing_but(status: u32, index: u32) -> Self {
        Self {
            status,
            index,
            ..Self::default()
        }
    }
}
