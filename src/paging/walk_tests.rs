// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The walk of single mappings: its contract case by case, and against the naive walker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::fixture::*;
use super::super::naive::{Naive, hostile};
use super::super::{Paging, Space};
use super::*;

fn mappings(guest: &Guest, paging: Paging, start: u64, last: u64) -> (Vec<Mapping>, Walked) {
    let space = Space::new(paging, ROOT, start..=last).unwrap();
    let mut mappings = Vec::new();
    let walked = walk(&guest.memory, &space, &LIMITS, |mapping| {
        mappings.push(*mapping);
        ControlFlow::Continue(())
    });
    (mappings, walked.unwrap())
}

/// Address, physical address and size.
fn places(mappings: &[Mapping]) -> Vec<[u64; 3]> {
    mappings.iter().map(|m| [m.va, m.pa, m.size]).collect()
}

/// Frame 5 is a level 1 table below five levels, frame 4 below four.
#[test]
fn pages_of_each_size_are_found_with_four_and_five_levels() {
    for paging in [FOUR, FIVE] {
        let levels = u64::from(paging.levels.number());
        let guest = Guest::new(8);
        guest
            .chain(levels, P | W | U)
            .set(levels, 3, entry(77, P | W | NX))
            .set(levels - 1, 2, entry(3 << 9, P | PS | 1 << 12))
            .set(levels - 2, 5, entry(2 << 18, P | U | PS));
        let (found, walked) = mappings(&guest, paging, 0, u64::MAX);
        let mapping = |va, pa, level, flags, rights| Mapping {
            va,
            pa,
            size: 1 << (3 + 9 * u32::from(level)),
            flags,
            level,
            rights,
        };
        let (r, w) = (Rights::READ, Rights::WRITE);
        assert_eq!(
            found,
            [
                mapping(3 << 12, 77 << 12, 1, P | W | NX, r | w),
                mapping(
                    2 << 21,
                    3 << 21,
                    2,
                    P | PS | 1 << 12,
                    r | Rights::EXEC_SUPERVISOR
                ),
                mapping(5 << 30, 2 << 30, 3, P | U | PS, r | Rights::EXEC_USER),
            ]
        );
        assert_eq!(walked.counts.mappings, [1, 1, 1]);
        assert_eq!(walked.entries_read, 512 * levels);
    }
}

#[test]
fn addresses_of_the_upper_half_are_canonical() {
    for (paging, first) in [(FOUR, 0xffff_8000_0000_0000), (FIVE, 0xff00_0000_0000_0000)] {
        let guest = Guest::new(8);
        let levels = u64::from(paging.levels.number());
        guest.chain(levels, P).set(levels, 0, entry(9, P));
        guest.set(1, 0, 0).set(1, 256, entry(2, P));
        let (found, _) = mappings(&guest, paging, 0, u64::MAX);
        assert_eq!(places(&found), [[first, 9 << 12, 4096]]);
    }
}

#[test]
fn mappings_are_clipped_to_the_range_at_every_level() {
    let guest = Guest::new(8);
    guest
        .chain(4, P)
        .set(4, 510, entry(100, P))
        .set(4, 511, entry(101, P))
        .set(3, 1, entry(1 << 9, P | PS))
        .set(2, 1, entry(1 << 18, P | PS));
    for (start, last, expected) in [
        (0x1f_f000, 0x1f_ffff, vec![[0x1f_f000, 101 << 12, 4096]]),
        (
            0x1f_f000,
            0x20_0fff,
            vec![[0x1f_f000, 101 << 12, 4096], [0x20_0000, 0x20_0000, 4096]],
        ),
        (0x20_3000, 0x20_4fff, vec![[0x20_3000, 0x20_3000, 0x2000]]),
        (
            0x3f_f000,
            0x4000_0fff,
            vec![[0x3f_f000, 0x3f_f000, 4096], [1 << 30, 1 << 30, 4096]],
        ),
        (
            0x7fff_f000,
            0xffff_ffff,
            vec![[0x7fff_f000, 0x7fff_f000, 4096]],
        ),
        (0x1000, 0x1f_dfff, vec![]),
    ] {
        let (found, _) = mappings(&guest, FOUR, start, last);
        assert_eq!(places(&found), expected, "{start:#x}-{last:#x}");
    }
}

#[test]
fn malformed_entries_map_nothing_and_are_told() {
    let guest = Guest::new(8);
    guest
        .chain(4, P)
        .set(1, 1, entry(2, P | PS))
        .set(2, 2, entry((1 << 18) + 8, P | PS))
        .set(3, 3, entry(8, P))
        .set(3, 4, entry(1 << 30, P))
        .set(4, 5, entry(1 << 28, P));
    let (found, walked) = mappings(&guest, FOUR, 0, u64::MAX);
    assert_eq!(found, []);
    let told: Vec<_> = walked
        .malformed
        .iter()
        .map(|m| (m.va, m.level, m.mistake))
        .collect();
    assert_eq!(
        told,
        [
            (5 << 12, 1, Mistake::AddressBits),
            (3 << 21, 2, Mistake::Outside),
            (4 << 21, 2, Mistake::AddressBits),
            (2 << 30, 3, Mistake::Misaligned),
            (1 << 39, 4, Mistake::Large),
        ]
    );
    assert_eq!((walked.counts.reserved, walked.counts.outside), (4, 1));
}

#[test]
fn more_malformed_entries_than_are_kept_are_counted() {
    let guest = Guest::new(8);
    guest.chain(4, P);
    for index in 0..512 {
        guest.set(4, index, entry(1 << 28, P));
    }
    let (_, walked) = mappings(&guest, FOUR, 0, u64::MAX);
    assert_eq!((walked.counts.reserved, walked.malformed.len()), (512, 64));
}

/// Half of frame 4 is memory, and it goes on in another region: no table can lie there.
#[test]
fn a_table_across_regions_is_outside() {
    let ranges = [(GuestAddress(0), 0x4800), (GuestAddress(0x4800), 0x1800)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let guest = Guest { memory };
    guest.chain(4, P);
    guest
        .memory
        .write_obj(entry(7, P), GuestAddress(0x4000))
        .unwrap();
    let (found, walked) = mappings(&guest, FOUR, 0, u64::MAX);
    assert_eq!((found, walked.counts.outside), (vec![], 1));
    let space = Space::whole(FOUR, 0x4000).unwrap();
    let refused = walk(
        &guest.memory,
        &space,
        &LIMITS,
        |_| ControlFlow::Continue(()),
    );
    assert_eq!(refused, Err(WalkError::RootOutside(0x4000)));
}

#[test]
fn a_root_outside_of_memory_is_an_error() {
    let guest = Guest::new(2);
    for root in [0x2000, 0xff_ffff_f000] {
        let space = Space::whole(FOUR, root).unwrap();
        let refused = walk(
            &guest.memory,
            &space,
            &LIMITS,
            |_| ControlFlow::Continue(()),
        );
        assert_eq!(refused, Err(WalkError::RootOutside(root)));
    }
}

#[test]
fn the_callback_can_end_the_walk() {
    let guest = Guest::new(8);
    guest.chain(4, P);
    for index in 0..512 {
        guest.set(4, index, entry(index, P));
    }
    let space = Space::whole(FOUR, ROOT).unwrap();
    let mut calls = 0;
    let walked = walk(&guest.memory, &space, &LIMITS, |_| {
        calls += 1;
        if calls == 7 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let walked = walked.unwrap();
    assert!(walked.stopped);
    assert_eq!((calls, walked.counts.mappings[0]), (7, 7));
}

/// 512 to the power of 4 mappings: only the limit, or somebody, ends this.
#[test]
fn a_walk_ends_at_its_limit_or_when_it_is_cancelled() {
    let guest = Guest::new(2);
    for index in 0..512 {
        guest.set(1, index, entry(1, P));
    }
    let space = Space::whole(FOUR, ROOT).unwrap();
    let flag = AtomicBool::new(false);
    let limits = Limits {
        entries: 10_000,
        cancel: Some(&flag),
        ..LIMITS
    };
    let ended = walk(
        &guest.memory,
        &space,
        &limits,
        |_| ControlFlow::Continue(()),
    );
    assert_eq!(ended, Err(WalkError::TooManyEntries(10_000)));
    let ended = walk(&guest.memory, &space, &limits, |_| {
        flag.store(true, Ordering::Relaxed);
        ControlFlow::Continue(())
    });
    assert_eq!(ended, Err(WalkError::Cancelled));
}

#[test]
fn whoever_wants_to_know_is_told_how_far_a_walk_is() {
    let guest = Guest::new(8);
    guest.chain(4, P).set(4, 3, entry(7, P));
    let space = Space::whole(FOUR, ROOT).unwrap();
    let read = AtomicU64::new(0);
    let limits = Limits {
        progress: Some(&read),
        ..LIMITS
    };
    let walked = walk(&guest.memory, &space, &limits, |_| {
        assert_eq!(read.load(Ordering::Relaxed), 4 * 512);
        ControlFlow::Continue(())
    });
    assert_eq!(walked.unwrap().entries_read, read.load(Ordering::Relaxed));
}

proptest! {
    #[test]
    fn a_walk_finds_what_the_naive_one_finds(hostile in hostile()) {
        let guest = hostile.guest();
        let naive = Naive::walk(&guest, &hostile.paging, ROOT, hostile.start, hostile.last);
        let (found, walked) = mappings(&guest, hostile.paging, hostile.start, hostile.last);
        prop_assert_eq!(found, naive.mappings);
        prop_assert_eq!(walked.counts, naive.counts);
    }
}
