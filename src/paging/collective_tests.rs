// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What mappings add up to: on tables made to keep a walk busy, and against the naive walker.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::super::fixture::*;
use super::super::naive::{Naive, hostile};
use super::super::{Paging, Space};
use super::*;

/// What is known of frames, without tables: disjoint, ascending, both ends included.
pub(in crate::paging) fn from_runs(runs: &[(u64, u64, Rights)]) -> Collective {
    let mut all = Runs::new(usize::MAX);
    for &(start, end, rights) in runs {
        all.add(start, end - start + 1, rights).unwrap();
    }
    Collective {
        runs: all.finish().unwrap(),
        counts: Counts::default(),
        malformed: Vec::new(),
        write_exec: Vec::new(),
        tables: 0,
        entries_read: 0,
    }
}

fn of(guest: &Guest, paging: Paging) -> Collective {
    let space = Space::whole(paging, ROOT).unwrap();
    collective(&guest.memory, &space, &LIMITS).unwrap()
}

fn ranges(found: &Collective) -> Vec<(u64, u64, Rights)> {
    let ends = |(frames, rights): (GfnRange, Rights)| {
        (frames.start().number(), frames.end().number(), rights)
    };
    found.iter().map(ends).collect()
}

const R: Rights = Rights::READ;
const W_: Rights = Rights::WRITE;
const X: Rights = Rights::EXEC_SUPERVISOR;
const U_: Rights = Rights::EXEC_USER;

#[test]
fn a_frame_has_the_rights_of_all_its_mappings() {
    let guest = Guest::new(8);
    guest.chain(4, P | W);
    // A direct map of 16 frames, code at 4 and 5 by another address, data at 8.
    for index in 0..16 {
        let writable = if (4..8).contains(&index) { 0 } else { W };
        guest.set(4, index, entry(index, P | NX | writable));
    }
    guest.set(4, 104, entry(4, P)).set(4, 105, entry(5, P));
    guest.set(4, 106, entry(8, P | NX)).set(4, 107, entry(9, P));
    let found = of(&guest, FOUR);
    assert_eq!(
        ranges(&found),
        [
            (0, 3, R | W_),
            (4, 5, R | X),
            (6, 7, R),
            (8, 8, R | W_),
            (9, 9, R | W_ | X),
            (10, 15, R | W_),
        ]
    );
    assert_eq!(found.get(5), R | X);
    assert_eq!(found.get(16), Rights::empty());
    let pages = found.pages();
    assert_eq!(pages[usize::from((R | W_).bits())], 4 + 1 + 6);
    assert_eq!(pages.iter().sum::<u64>(), 16);
    assert_eq!(found.counts().mappings, [20, 0, 0]);
    assert_eq!(found.write_exec(), [], "no mapping is both");
}

#[test]
fn mappings_that_are_writable_and_executable_are_told_joined() {
    let guest = Guest::new(8);
    guest.chain(4, P | W);
    for index in 510..512 {
        guest.set(4, index, entry(index, P | W));
    }
    guest.set(3, 1, entry(1 << 9, P | W | PS));
    guest.set(3, 3, entry(1 << 10, P | W | PS));
    let found = of(&guest, FOUR);
    let told: Vec<_> = found
        .write_exec()
        .iter()
        .map(|m| (m.va, m.frames.to_string()))
        .collect();
    assert_eq!(
        told,
        [
            (510 << 12, "0x1fe-0x3ff".into()),
            (3 << 21, "0x400-0x5ff".to_string()),
        ]
    );
}

#[test]
fn a_range_clips_mappings_and_shared_tables() {
    let guest = Guest::new(8);
    guest.chain(4, P | W);
    // The same level 1 table at three addresses, the first and last of them cut.
    for index in 0..512 {
        guest.set(4, index, entry(0x1000 + index, P | NX));
    }
    guest.set(3, 1, entry(4, P | W)).set(3, 2, entry(4, P | W));
    for (start, last, pages, mappings) in [
        (
            0x1f_e000,
            0x20_0fff,
            vec![(0x1000, 0x1000, R), (0x11fe, 0x11ff, R)],
            3,
        ),
        (0x1f_e000, 0x40_0fff, vec![(0x1000, 0x11ff, R)], 2 + 512 + 1),
        (0, 0x5f_ffff, vec![(0x1000, 0x11ff, R)], 3 * 512),
    ] {
        let space = Space::new(FOUR, ROOT, start..=last).unwrap();
        let found = collective(&guest.memory, &space, &LIMITS).unwrap();
        assert_eq!(ranges(&found), pages);
        assert_eq!(found.counts().mappings, [mappings, 0, 0]);
        assert_eq!(found.tables(), 4);
    }
}

/// Every entry of the only table is the table: 512^4 addresses, 512^5 with five levels.
#[test]
fn a_table_of_itself_is_read_once_for_each_level() {
    for paging in [FOUR, FIVE] {
        let levels = u32::from(paging.levels.number());
        let guest = Guest::new(2);
        for index in 0..512 {
            guest.set(1, index, entry(1, P | W | U));
        }
        let found = of(&guest, paging);
        assert_eq!(ranges(&found), [(1, 1, R | W_ | U_)]);
        assert_eq!(found.counts().mappings, [512u64.pow(levels), 0, 0]);
        assert_eq!(found.tables(), u64::from(levels));
        assert_eq!(found.entries_read(), 512 * u64::from(levels));
    }
}

/// Tables lead to each other with all combinations of rights: the most that there is to do.
#[test]
fn work_is_bounded_by_tables_levels_and_rights() {
    for paging in [FOUR, FIVE] {
        let levels = u64::from(paging.levels.number());
        let tables = 16u64;
        let guest = Guest::new(tables as usize + 1);
        for frame in 1..=tables {
            for index in 0..512 {
                let flags = (index & 3) << 1 | (index >> 2 & 1) << 63;
                guest.set(frame, index, entry(1 + (index >> 3) % tables, P | flags));
            }
        }
        let found = of(&guest, paging);
        assert!(found.entries_read() <= 512 * tables * levels * 8);
        assert_eq!(found.counts().mappings, [512u64.pow(levels as u32), 0, 0]);
        assert_eq!(ranges(&found), [(1, tables, R | W_ | X | U_)]);
    }
}

/// KASAN's early shadow: terabytes by one page, through one table of each level; with a hole that
/// makes the last level partial.
#[test]
fn one_page_over_terabytes_takes_no_time() {
    let guest = Guest::new(8);
    for index in 256..512 {
        guest.set(1, index, entry(2, P | W));
    }
    for index in 0..512 {
        guest.set(2, index, entry(3, P | W));
        guest.set(3, index, entry(4, P | W));
        guest.set(4, index, entry(6, P | A | D | NX));
    }
    let space = Space::new(FOUR, ROOT, 0xffff_8000_0000_1000..=0xffff_ffff_ffff_efff).unwrap();
    let found = collective(&guest.memory, &space, &LIMITS).unwrap();
    assert_eq!(ranges(&found), [(6, 6, R)]);
    assert_eq!(found.counts().mappings, [(1 << 35) - 2, 0, 0]);
    assert!(found.entries_read() <= 512 * 10, "{}", found.entries_read());
}

/// A table that is met first with few rights and later with more.
#[test]
fn a_table_is_walked_again_with_other_rights() {
    let guest = Guest::new(8);
    guest.chain(4, P).set(4, 0, entry(7, P | W | U));
    guest
        .set(3, 1, entry(4, P | W))
        .set(2, 1, entry(5, P | W | U));
    guest.set(1, 0, entry(2, P | W | U));
    guest.set(5, 0, entry(4, P | W | U | NX));
    assert_eq!(ranges(&of(&guest, FOUR)), [(7, 7, R | W_ | X)]);
    guest.set(5, 1, entry(4, P | U));
    assert_eq!(ranges(&of(&guest, FOUR)), [(7, 7, R | W_ | X | U_)]);
}

/// Accessed and dirty bits, caching, protection keys and the guest's own bits come and go.
#[test]
fn bits_that_say_nothing_of_rights_do_not_split_ranges() {
    let guest = Guest::new(8);
    guest.chain(4, P | W);
    let odd = [
        A,
        D,
        PS,
        1 << 3,
        1 << 4,
        1 << 8,
        1 << 9,
        1 << 52,
        1 << 58,
        1 << 62,
    ];
    for index in 0..512 {
        guest.set(
            4,
            index,
            entry(index, P | NX | odd[index as usize % odd.len()]),
        );
    }
    assert_eq!(ranges(&of(&guest, FOUR)), [(0, 511, R)]);
    let shadow_stacks = Paging {
        shadow_stacks: true,
        ..FOUR
    };
    let found = of(&guest, shadow_stacks);
    assert_eq!(found.get(1), R | W_, "dirty and not writable");
    assert_eq!(found.get(2), R);
}

/// The run of frames goes on, into bits that are reserved.
#[test]
fn frames_beyond_maxphyaddr_are_no_part_of_a_run() {
    let guest = Guest::new(8);
    guest.chain(4, P | W);
    for index in 0..512 {
        guest.set(4, index, entry((1 << 28) - 256 + index, P));
    }
    let found = of(&guest, FOUR);
    assert_eq!(ranges(&found), [((1 << 28) - 256, (1 << 28) - 1, R | X)]);
    assert_eq!(
        (found.counts().mappings[0], found.counts().reserved),
        (256, 256)
    );
    assert_eq!(found.malformed()[0].va, 256 << 12);
    let wide = Paging {
        physical_bits: 52,
        ..FOUR
    };
    for index in 0..512 {
        guest.set(4, index, entry((1 << 40) - 256 + index, P | NX));
    }
    let found = of(&guest, wide);
    assert_eq!(found.counts().mappings[0], 512);
    assert_eq!(found.get((1 << 40) - 1), R);
}

#[test]
fn limits_end_it_with_their_reason() {
    let guest = Guest::new(8);
    guest.chain(4, P | W);
    for index in 0..512 {
        guest.set(4, index, entry(index * 2, P));
    }
    let space = Space::whole(FOUR, ROOT).unwrap();
    let ended = |entries, ranges, cancelled| {
        let flag = AtomicBool::new(cancelled);
        let limits = Limits {
            entries,
            ranges,
            cancel: Some(&flag),
            progress: None,
        };
        collective(&guest.memory, &space, &limits).err()
    };
    assert_eq!(ended(2048, 512, false), None);
    assert_eq!(
        ended(2047, 512, false),
        Some(WalkError::TooManyEntries(2047))
    );
    assert_eq!(ended(2048, 511, false), Some(WalkError::TooManyRanges(511)));
    assert_eq!(ended(2048, 512, true), Some(WalkError::Cancelled));
    let outside = Space::whole(FOUR, 0x8000).unwrap();
    assert_eq!(
        collective(&guest.memory, &outside, &LIMITS).err(),
        Some(WalkError::RootOutside(0x8000))
    );
}

proptest! {
    #[test]
    fn rights_and_counts_are_those_of_every_path(hostile in hostile()) {
        let guest = hostile.guest();
        let space = Space::new(hostile.paging, ROOT, hostile.start..=hostile.last).unwrap();
        let found = collective(&guest.memory, &space, &LIMITS).unwrap();
        let mut naive = Naive::walk(&guest, &hostile.paging, ROOT, hostile.start, hostile.last);
        prop_assert_eq!(found.counts(), &naive.counts);
        prop_assert!(found.entries_read() <= 512 * 5 * 5 * 8 + 512 * 10);
        prop_assert_eq!(
            found.write_exec().is_empty(),
            !naive.mappings.iter().any(|m| m.rights.is_write_exec())
        );
        // The same frames with the same rights by many paths make the check slow and no better.
        naive.mappings.sort_by_key(|m| (m.pa, m.size, m.rights));
        naive.mappings.dedup_by_key(|m| (m.pa, m.size, m.rights));
        let mut edges = naive.edges();
        for (frames, _) in found.iter() {
            edges.extend([frames.start().number(), frames.end().number(), frames.end().number() + 1]);
        }
        for frame in edges {
            prop_assert_eq!(found.get(frame), naive.rights(frame), "frame {:#x}", frame);
        }
    }
}
