// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules said once more, for tests: follows every path, remembers nothing, and shares no code
//! with what it is compared with. Also the random hostile tables that both are run on.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::fixture::*;
use super::{Counts, Levels, Mapping, Paging, Rights};

/// What the walk of a range finds.
#[derive(Debug, Default)]
pub(super) struct Naive {
    pub(super) mappings: Vec<Mapping>,
    pub(super) counts: Counts,
}

#[derive(Clone, Copy)]
struct Above {
    w: bool,
    u: bool,
    nx: bool,
}

impl Naive {
    pub(super) fn walk(guest: &Guest, paging: &Paging, root: u64, start: u64, last: u64) -> Self {
        let mut naive = Self::default();
        let above = Above {
            w: true,
            u: true,
            nx: false,
        };
        let level = paging.levels.number();
        naive.table(guest, paging, root, level, 0, (start, last), above);
        naive
    }

    #[allow(clippy::too_many_arguments)]
    fn table(
        &mut self,
        guest: &Guest,
        paging: &Paging,
        table: u64,
        level: u8,
        index_bits: u64,
        range: (u64, u64),
        above: Above,
    ) {
        let size = 4096u64 * 512u64.pow(u32::from(level) - 1);
        for index in 0..512 {
            // The address as the processor sees it: indices, and the highest bit repeated.
            let linear = index_bits + index * size;
            let top_bit = if paging.levels == Levels::Four {
                47
            } else {
                56
            };
            let va = if linear >> top_bit & 1 == 1 {
                linear | !0 << top_bit
            } else {
                linear
            };
            let va_last = va + (size - 1);
            if va_last < range.0 || va > range.1 {
                continue;
            }
            let e: u64 = guest
                .memory
                .read_obj(GuestAddress(table + index * 8))
                .unwrap();
            if e & 1 == 0 {
                continue;
            }
            let bit = |n: u32| e >> n & 1 == 1;
            let mut wrong = (paging.physical_bits..52).any(|n| bit(n.into()));
            wrong |= bit(63) && !paging.nxe;
            let leaf = match level {
                1 => true,
                2 => bit(7),
                3 => bit(7) && paging.gib_pages,
                _ => false,
            };
            wrong |= !leaf && bit(7);
            wrong |= leaf && level == 2 && (13..21).any(bit);
            wrong |= leaf && level == 3 && (13..30).any(bit);
            if wrong {
                self.counts.reserved += 1;
                continue;
            }
            let here = Above {
                w: above.w && bit(1),
                u: above.u && bit(2),
                nx: above.nx || bit(63),
            };
            let mut address = e & 0x000f_ffff_ffff_f000;
            if !leaf {
                if guest.memory.check_range(GuestAddress(address), 4096) {
                    let level = level - 1;
                    self.table(guest, paging, address, level, linear, range, here);
                } else {
                    self.counts.outside += 1;
                }
                continue;
            }
            let mut flags = e & !0x000f_ffff_ffff_f000;
            if level > 1 {
                flags |= e & 1 << 12;
                address &= !(1 << 12);
            }
            let mut rights = Rights::READ;
            let shadow = paging.shadow_stacks && above.w && !bit(1) && bit(6);
            if here.w || shadow || !paging.wp {
                rights |= Rights::WRITE;
            }
            if !here.nx && here.u {
                rights |= Rights::EXEC_USER;
            }
            let kept_off = here.u && paging.smep;
            if !here.nx && !kept_off {
                rights |= Rights::EXEC_SUPERVISOR;
            }
            let (from, to) = (va.max(range.0), va_last.min(range.1));
            self.counts.mappings[usize::from(level) - 1] += 1;
            self.mappings.push(Mapping {
                va: from,
                pa: address + (from - va),
                size: to - from + 1,
                flags,
                level,
                rights,
            });
        }
    }

    /// What all mappings together let be done with one frame.
    pub(super) fn rights(&self, frame: u64) -> Rights {
        let mut rights = Rights::empty();
        for mapping in &self.mappings {
            let pages = mapping.size / 4096;
            if (mapping.pa / 4096..mapping.pa / 4096 + pages).contains(&frame) {
                rights |= mapping.rights;
            }
        }
        rights
    }

    /// Frames where rights may change, with those beside them.
    pub(super) fn edges(&self) -> Vec<u64> {
        let mut edges = Vec::new();
        for mapping in &self.mappings {
            let start = mapping.pa / 4096;
            let end = start + mapping.size / 4096;
            edges.extend([start.saturating_sub(1), start, end - 1, end]);
        }
        edges.sort_unstable();
        edges.dedup();
        edges
    }
}

/// Few tables with few entries, which lead to each other, to themselves and out of memory, at all
/// levels; with odd bits.
#[derive(Clone, Debug)]
pub(super) struct Hostile {
    pub(super) paging: Paging,
    entries: Vec<(u64, u64, u64)>,
    pub(super) start: u64,
    pub(super) last: u64,
}

/// Frames 1 to this are tables; memory ends in the middle of the page after the next.
const TABLES: u64 = 5;

impl Hostile {
    pub(super) fn guest(&self) -> Guest {
        let guest = Guest::new(TABLES as usize + 2);
        for &(frame, index, entry) in &self.entries {
            guest.set(frame, index, entry);
        }
        guest
    }
}

/// Where entries are, and both ends of ranges.
const INDICES: [u64; 5] = [0, 1, 255, 256, 511];
const SLOTS: usize = TABLES as usize * INDICES.len();

fn index() -> impl Strategy<Value = u64> {
    prop::sample::select(INDICES.to_vec())
}

fn one_entry() -> impl Strategy<Value = u64> {
    let flags = prop::collection::vec(
        prop::sample::select(vec![W, W, U, U, NX, A, D, 1 << 8, 1 << 9, 1 << 59, 1 << 11]),
        0..5,
    );
    let target = prop_oneof![
        // A table, itself perhaps.
        10 => (1..=TABLES).prop_map(|frame| frame << 12),
        // Behind memory.
        1 => (TABLES + 1..TABLES + 4).prop_map(|frame| frame << 12),
        // A large page, aligned or not so.
        2 => (0..4u64, 18..31u32).prop_map(|(n, shift)| n << shift | PS),
        1 => (0..4u64).prop_map(|n| n << 30 | 1 << 12 | PS),
        // Address bits that there are not, or only with some.
        1 => (36..52u32).prop_map(|bit| 1 << bit | 1 << 12),
        1 => Just(0x0000_007f_ffff_f000),
        1 => Just(0x000f_ffff_c000_0000 | PS),
    ];
    (flags, target, prop::bool::weighted(0.95)).prop_map(|(flags, target, present)| {
        flags
            .into_iter()
            .fold(target | u64::from(present), |entry, flag| entry | flag)
    })
}

fn paging() -> impl Strategy<Value = Paging> {
    let physical_bits = prop::sample::select(vec![36u8, 40, 52]);
    (any::<[bool; 6]>(), physical_bits).prop_map(
        |([five, nx_off, wp_off, smep, shadow_stacks, gib_pages], physical_bits)| Paging {
            levels: if five { Levels::Five } else { Levels::Four },
            nxe: !nx_off,
            wp: !wp_off,
            smep,
            shadow_stacks,
            physical_bits,
            gib_pages,
        },
    )
}

/// The first or last address of a page, made of indices.
fn address() -> impl Strategy<Value = [u64; 5]> {
    [index(), index(), index(), index(), index()]
}

pub(super) fn hostile() -> impl Strategy<Value = Hostile> {
    let entries = prop::collection::vec(prop::option::weighted(0.5, one_entry()), SLOTS);
    let ends = (address(), address(), prop::bool::weighted(0.5));
    (paging(), entries, ends).prop_map(|(paging, entries, (a, b, whole))| {
        let slots = (1..=TABLES).flat_map(|frame| INDICES.map(|index| (frame, index)));
        let entries = slots
            .zip(entries)
            .filter_map(|((frame, index), entry)| Some((frame, index, entry?)))
            .collect();
        let levels = usize::from(paging.levels.number());
        let va = |indices: [u64; 5]| {
            let linear = indices[..levels]
                .iter()
                .fold(0, |va, index| va << 9 | index)
                << 12;
            paging.levels.canonical(linear)
        };
        let (a, b) = (va(a), va(b));
        let (start, last) = if whole {
            (0, u64::MAX)
        } else {
            (a.min(b), a.max(b) + 0xfff)
        };
        Hostile {
            paging,
            entries,
            start,
            last,
        }
    })
}
