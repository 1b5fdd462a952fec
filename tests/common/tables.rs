// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory with page tables in it, built by hand, and the files that hold it.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const PS: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;

/// The root's address.
pub const ROOT: u64 = 0x1000;

/// A guest with memory from address 0 on.
pub struct Image {
    pub bytes: Vec<u8>,
    levels: u32,
    next: u64,
}

impl Image {
    pub fn new(levels: u32, size: usize) -> Self {
        Self {
            bytes: vec![0; size],
            levels,
            next: ROOT + 0x1000,
        }
    }

    pub fn entry(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    pub fn set(&mut self, at: u64, entry: u64) {
        let at = at as usize;
        self.bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }

    /// Where the entry for `va` lies in the table of `level`; tables on the way are made, with all
    /// rights.
    pub fn entry_at(&mut self, va: u64, level: u32) -> u64 {
        let index = |level: u32| va >> (12 + 9 * (level - 1)) & 511;
        let mut table = ROOT;
        for above in (level + 1..=self.levels).rev() {
            let at = table + 8 * index(above);
            if self.entry(at) == 0 {
                self.set(at, self.next | P | W | U);
                self.next += 0x1000;
            }
            table = self.entry(at) & !0xfff;
        }
        table + 8 * index(level)
    }

    /// Maps pages of `level`, one after the other.
    pub fn map(&mut self, va: u64, pa: u64, level: u32, pages: u64, flags: u64) {
        let size = 1 << (12 + 9 * (level - 1));
        let large = if level == 1 { 0 } else { PS };
        for n in 0..pages {
            let at = self.entry_at(va + n * size, level);
            self.set(at, (pa + n * size) | P | large | flags);
        }
    }

    /// A raw image, as `pmemsave` makes one.
    pub fn raw(&self, dir: &TempDir) -> PathBuf {
        put(dir, "ram", &self.bytes)
    }

    /// An ELF core as `dump-guest-memory` makes one: notes, then pieces of memory (address and size), not
    /// on page boundaries. Each CPU has CR0, CR3, CR4 and a selector of CS.
    pub fn elf(&self, dir: &TempDir, cpus: &[[u64; 4]], pieces: &[(u64, u64)]) -> PathBuf {
        put(dir, "elf", &self.elf_bytes(cpus, pieces))
    }

    pub fn elf_bytes(&self, cpus: &[[u64; 4]], pieces: &[(u64, u64)]) -> Vec<u8> {
        let mut notes = note(b"CORE\0", 1, &[0; 336]);
        for cpu in cpus {
            notes.extend(note(b"QEMU\0", 0, &cpu_state(cpu)));
        }
        let headers = 64 + 56 * (1 + pieces.len() as u64);
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(16, 0);
        for half in [4u16, 62] {
            out.extend(half.to_le_bytes());
        }
        out.extend(1u32.to_le_bytes());
        for word in [0u64, 64, 0] {
            out.extend(word.to_le_bytes());
        }
        out.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1 + pieces.len() as u16, 0, 0, 0] {
            out.extend(half.to_le_bytes());
        }
        let header = |out: &mut Vec<u8>, kind: u32, offset: u64, paddr: u64, size: u64| {
            out.extend(kind.to_le_bytes());
            out.extend(0u32.to_le_bytes());
            for word in [offset, 0, paddr, size, size, 0] {
                out.extend(word.to_le_bytes());
            }
        };
        header(&mut out, 4, headers, 0, notes.len() as u64);
        let mut at = headers + notes.len() as u64;
        for &(gpa, size) in pieces {
            header(&mut out, 1, at, gpa, size);
            at += size;
        }
        out.extend(notes);
        for &(gpa, size) in pieces {
            out.extend(&self.bytes[gpa as usize..(gpa + size) as usize]);
        }
        out
    }
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [name.len() as u32, desc.len() as u32, kind] {
        out.extend(word.to_le_bytes());
    }
    for part in [name, desc] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// `QEMUCPUState`.
fn cpu_state(&[cr0, cr3, cr4, cs]: &[u64; 4]) -> Vec<u8> {
    let mut out = vec![0; 440];
    out[..4].copy_from_slice(&1u32.to_le_bytes());
    out[4..8].copy_from_slice(&440u32.to_le_bytes());
    out[152..160].copy_from_slice(&cs.to_le_bytes());
    for (n, value) in [(0, cr0), (3, cr3), (4, cr4)] {
        out[392 + 8 * n..400 + 8 * n].copy_from_slice(&value.to_le_bytes());
    }
    out
}

pub fn put(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(dir.path()).join(name);
    fs::write(&path, bytes).unwrap();
    path
}
