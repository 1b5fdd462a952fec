// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each rule of the SDM about one entry, and about rights on the way down.

use super::super::fixture::*;
use super::*;

#[test]
fn an_entry_that_is_not_present_may_be_anything() {
    for level in 1..=5 {
        assert_eq!(Entry::read(&FIVE, level, !P), Entry::Absent);
    }
}

#[test]
fn address_bits_above_maxphyaddr_are_reserved_at_every_level() {
    for level in 1..=5 {
        for bit in 40..52 {
            let entry = P | 1 << bit;
            assert_eq!(
                Entry::read(&FIVE, level, entry),
                Entry::Reserved(Mistake::AddressBits)
            );
        }
        let wide = Paging {
            physical_bits: 52,
            ..FIVE
        };
        let frame = 1 << 39;
        let found = Entry::read(&wide, level, frame << 12 | P);
        let expected = match level {
            1 => Entry::Leaf(frame),
            _ => Entry::Table(frame),
        };
        assert_eq!(found, expected);
    }
}

#[test]
fn bits_52_to_62_and_9_to_11_are_the_guests_own() {
    for level in 1..=5 {
        for bit in (52..63).chain(9..12) {
            let with = Entry::read(&FIVE, level, entry(7, P | 1 << bit));
            assert_eq!(with, Entry::read(&FIVE, level, entry(7, P)));
        }
    }
}

#[test]
fn bit_63_is_reserved_without_nxe() {
    let nx_off = Paging { nxe: false, ..FIVE };
    for level in 1..=5 {
        assert_eq!(
            Entry::read(&nx_off, level, entry(7, P | NX)),
            Entry::Reserved(Mistake::NoExecute)
        );
        assert_ne!(
            Entry::read(&FIVE, level, entry(7, P | NX)),
            Entry::Reserved(Mistake::NoExecute)
        );
    }
}

#[test]
fn bit_7_is_pat_ps_or_reserved_as_the_level_has_it() {
    let no_gib = Paging {
        gib_pages: false,
        ..FIVE
    };
    let address = 3 << 18;
    for (paging, level, expected) in [
        (&FIVE, 1, Entry::Leaf(address)),
        (&FIVE, 2, Entry::Leaf(address)),
        (&FIVE, 3, Entry::Leaf(address)),
        (&no_gib, 3, Entry::Reserved(Mistake::Large)),
        (&no_gib, 2, Entry::Leaf(address)),
        (&FIVE, 4, Entry::Reserved(Mistake::Large)),
        (&FIVE, 5, Entry::Reserved(Mistake::Large)),
    ] {
        let found = Entry::read(paging, level, entry(address, P | PS));
        assert_eq!(found, expected, "level {level}");
    }
}

#[test]
fn a_large_page_has_pat_in_bit_12_and_reserved_bits_above() {
    for (level, reserved) in [(2u8, 13..21), (3, 13..30)] {
        let address = 1 << 18;
        let pat = entry(address, P | PS | 1 << 12);
        assert_eq!(Entry::read(&FOUR, level, pat), Entry::Leaf(address));
        assert_eq!(flags(level, pat), P | PS | 1 << 12);
        for bit in reserved.clone() {
            assert_eq!(
                Entry::read(&FOUR, level, pat | 1 << bit),
                Entry::Reserved(Mistake::Misaligned)
            );
        }
        let above = pat | 1 << reserved.end;
        assert!(matches!(Entry::read(&FOUR, level, above), Entry::Leaf(_)));
    }
}

#[test]
fn flags_of_a_small_page_are_all_but_its_address() {
    let flags_in = NX | 0x7ff << 52 | 0xfff;
    assert_eq!(flags(1, flags_in | 0x000f_ffff_ffff_f000), flags_in);
}

/// Every combination of what two levels say.
#[test]
fn write_and_user_are_anded_and_no_execute_is_ored() {
    for bits in 0..64u64 {
        let of = |bits: u64| {
            let mut entry = P;
            for (n, flag) in [W, U, NX].into_iter().enumerate() {
                if bits >> n & 1 != 0 {
                    entry |= flag;
                }
            }
            entry
        };
        let (above, leaf) = (of(bits), of(bits >> 3));
        let both = |flag| above & leaf & flag == flag;
        let execute = (above | leaf) & NX == 0;
        let mut expected = Rights::READ;
        expected.set(Rights::WRITE, both(W));
        expected.set(Rights::EXEC_USER, execute && both(U));
        expected.set(Rights::EXEC_SUPERVISOR, execute && !both(U));
        assert_eq!(Path::ROOT.through(above).rights(&FOUR, leaf), expected);
    }
}

#[test]
fn control_registers_decide_what_bits_mean() {
    let smep_off = Paging {
        smep: false,
        ..FOUR
    };
    let wp_off = Paging { wp: false, ..FOUR };
    let (r, w, x, u) = (
        Rights::READ,
        Rights::WRITE,
        Rights::EXEC_SUPERVISOR,
        Rights::EXEC_USER,
    );
    for (paging, leaf, expected) in [
        (&FOUR, P, r | x),
        (&FOUR, P | U, r | u),
        (&smep_off, P | U, r | u | x),
        (&smep_off, P | U | NX, r),
        (&wp_off, P, r | w | x),
        (&wp_off, P | U | NX, r | w),
    ] {
        assert_eq!(Path::ROOT.rights(paging, leaf), expected, "{leaf:#x}");
    }
}

#[test]
fn a_dirty_page_that_is_not_writable_is_a_shadow_stack_where_there_are_some() {
    let on = Paging {
        shadow_stacks: true,
        ..FOUR
    };
    let read_only_above = Path::ROOT.through(P | U);
    for (paging, path, leaf, written) in [
        (&FOUR, Path::ROOT, P | D | NX, false),
        (&on, Path::ROOT, P | D | NX, true),
        (&on, Path::ROOT, P | D | U | NX, true),
        (&on, Path::ROOT, P | NX, false),
        (&on, read_only_above, P | D | NX, false),
        (&on, read_only_above, P | W | D | NX, false),
    ] {
        let rights = path.rights(paging, leaf);
        assert_eq!(rights.contains(Rights::WRITE), written, "{leaf:#x}");
    }
}

/// A table need not be walked again by a path that gives no page below it a right that it has not.
#[test]
fn a_path_covers_another_exactly_if_no_leaf_has_more_by_the_other() {
    for n in 0..8 {
        let paging = Paging {
            wp: n & 1 != 0,
            smep: n & 2 != 0,
            shadow_stacks: n & 4 != 0,
            ..FOUR
        };
        for path in Path::all() {
            for other in Path::all() {
                let leaves = (0..16u64).map(|bits| P | (bits & 7) << 1 | (bits >> 3) << 63);
                let more = leaves.chain([P | D, P | D | U]).any(|leaf| {
                    !path
                        .rights(&paging, leaf)
                        .contains(other.rights(&paging, leaf))
                });
                assert_eq!(path.covers(other, &paging), !more, "{path:?} {other:?}");
                let mut walked = Paths::default();
                walked.insert(path);
                assert_eq!(Covers::new(&paging).is_new(other, walked), more);
            }
        }
    }
}

#[test]
fn rights_print_as_in_ls() {
    assert_eq!(Rights::all().to_string(), "rwxu");
    assert_eq!((Rights::READ | Rights::EXEC_SUPERVISOR).to_string(), "r-x-");
}
