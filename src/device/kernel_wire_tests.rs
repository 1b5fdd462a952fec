// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The request and the answer against the tables of the specification, said once more.

use proptest::prelude::*;

use super::super::wire::{Lane, Request, Rights, parse_request};
use super::*;

const LIMITS: Limits = Limits {
    rights: Rights {
        deny: Deny::NOWRITE.union(Deny::NOREAD),
        audit: Deny::NOEXEC_KERNEL,
        msrs: true,
        kernel: true,
    },
    max_request_ranges: 100,
};

/// A request, field by field.
#[derive(Clone, Debug)]
struct Fields {
    kind: u16,
    flags: u16,
    count: u32,
    root: u64,
    start: u64,
    last: u64,
    levels: u8,
    physical_bits: u8,
    unmapped: u8,
    write_exec: u8,
    control: u32,
    entries: Vec<[u64; 3]>,
}

/// One that is in order.
fn good() -> Fields {
    Fields {
        kind: 9,
        flags: 0,
        count: 2,
        root: 0x1000,
        start: 0,
        last: !0,
        levels: 4,
        physical_bits: 40,
        unmapped: 0,
        write_exec: 0,
        control: 7,
        entries: vec![[1, 5, 1], [7, 7, 0x801]],
    }
}

impl Fields {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.count.to_le_bytes());
        bytes.extend(self.root.to_le_bytes());
        bytes.extend(self.start.to_le_bytes());
        bytes.extend(self.last.to_le_bytes());
        bytes.extend([self.levels, self.physical_bits]);
        bytes.extend([self.unmapped, self.write_exec]);
        bytes.extend(self.control.to_le_bytes());
        let words = self.entries.as_flattened().iter();
        bytes.extend(words.flat_map(|word| word.to_le_bytes()));
        bytes
    }

    fn parse(&self) -> Result<KernelRequest, Refusal> {
        let bytes = self.bytes();
        parse(&bytes, bytes.len() as u64)
    }
}

fn parse(bytes: &[u8], total: u64) -> Result<KernelRequest, Refusal> {
    match parse_request(Lane::Walk, bytes, total, LIMITS)? {
        Request::Kernel(request) => Ok((*request).clone()),
        other => panic!("{other:?}"),
    }
}

fn none(errno: Errno) -> Option<Refusal> {
    Some(errno.into())
}

fn entry(errno: Errno, index: u32) -> Option<Refusal> {
    let index = Some(index);
    Some(Refusal { errno, index })
}

/// Makes one thing wrong.
type Spoil = fn(&mut Fields);

/// The rows of the table in its order, each with ways to break it.
fn rows() -> Vec<(Option<Refusal>, Vec<Spoil>)> {
    use Errno::*;
    vec![
        (
            none(Eopnotsupp),
            vec![|f| f.kind = 1, |f| f.kind = 0x109, |f| f.kind = 0],
        ),
        (none(Einval), vec![|f| f.flags = 4, |f| f.flags |= 0x8000]),
        (none(E2big), vec![|f| f.count = 101, |f| f.count = !0]),
        (
            none(Einval),
            vec![|f| f.count = 1, |f| f.count = 3, |f| f.count = 0],
        ),
        (
            entry(Einval, 1),
            vec![
                |f| f.entries[1][0] = 1 << 52,
                |f| f.entries[1][1] = !0,
                |f| f.entries[1] = [5, 4, 1],
                |f| f.entries[1][2] = 2,
                |f| f.entries[1][2] = 4,
                |f| f.entries[1][2] = 0x200,
                |f| f.entries[1][2] = 0x401,
                |f| f.entries[1][2] = 0x11,
                |f| f.entries[1][2] = 1 << 63 | 1,
            ],
        ),
        // On offer are NOWRITE and a watched NOEXEC_KERNEL.
        (
            entry(Eopnotsupp, 1),
            vec![|f| f.entries[1][2] = 8, |f| f.entries[1][2] = 0x101],
        ),
        (
            none(Einval),
            vec![
                |f| f.levels = 3,
                |f| f.levels = 6,
                |f| f.physical_bits = 31,
                |f| f.physical_bits = 53,
                |f| f.unmapped = 4,
                |f| f.unmapped = 255,
                |f| f.write_exec = 3,
                |f| f.control = 32,
                |f| f.control |= 1 << 31,
                |f| f.root = 0x1008,
                |f| f.root = 1 << 40,
                |f| (f.start, f.last) = (0x2000, 0x1fff),
                |f| f.start = 0x800,
                |f| f.last = !0 - 1,
                |f| f.start = 1 << 47,
                |f| f.last = (1 << 48) - 1,
            ],
        ),
    ]
}

#[test]
fn each_row_of_the_table_is_refused_with_its_errno_and_index() {
    assert!(good().parse().is_ok());
    for (refusal, spoils) in rows() {
        for (n, spoil) in spoils.iter().enumerate() {
            let mut fields = good();
            spoil(&mut fields);
            assert_eq!(fields.parse().err(), refusal, "way {n}: {fields:x?}");
        }
    }
}

#[test]
fn the_first_row_that_is_wrong_decides() {
    let rows = rows();
    for (at, (refusal, spoils)) in rows.iter().enumerate() {
        for (later, (_, others)) in rows.iter().enumerate().skip(at + 1) {
            // Both are about the number of entries, or about the same entry.
            if matches!((at, later), (2, 3) | (4, 5)) {
                continue;
            }
            for (spoil, other) in spoils
                .iter()
                .flat_map(|s| others.iter().map(move |o| (s, o)))
            {
                let mut fields = good();
                other(&mut fields);
                spoil(&mut fields);
                assert_eq!(fields.parse().err(), *refusal, "{at} {later}: {fields:x?}");
            }
        }
    }
}

#[test]
fn entries_are_checked_one_after_another() {
    let mut fields = good();
    fields.entries = vec![[1, 1, 8], [5, 4, 1]];
    assert_eq!(fields.parse().err(), entry(Errno::Eopnotsupp, 0));
    fields.entries = vec![[1, 1, 1], [5, 4, 8]];
    assert_eq!(fields.parse().err(), entry(Errno::Einval, 1));
}

#[test]
fn lengths_are_those_of_the_header_and_the_entries() {
    let bytes = good().bytes();
    for len in 8..bytes.len() {
        let refusal = parse(&bytes[..len], len as u64).unwrap_err();
        assert_eq!(refusal, Errno::Einval.into(), "{len}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert_eq!(parse(&longer, 89).err(), none(Errno::Einval));
    // What is longer than any request is not copied.
    let most = 40 + 24 * 100;
    assert_eq!(parse(&bytes[..8], most).err(), none(Errno::Einval));
    assert_eq!(parse(&bytes[..8], most + 1).err(), none(Errno::E2big));
    let mut fields = good();
    fields.entries = vec![[7, 7, 1]; 100];
    fields.count = 100;
    assert!(fields.parse().is_ok());
}

#[test]
fn a_request_belongs_to_its_queue_and_needs_its_feature() {
    let bytes = good().bytes();
    let total = bytes.len() as u64;
    let on = |lane, limits| parse_request(lane, &bytes, total, limits).err();
    assert_eq!(on(Lane::Walk, LIMITS), None);
    assert_eq!(on(Lane::Control, LIMITS), none(Errno::Eopnotsupp));
    let rights = Rights {
        kernel: false,
        ..LIMITS.rights
    };
    let limits = Limits { rights, ..LIMITS };
    assert_eq!(on(Lane::Walk, limits), none(Errno::Eopnotsupp));
    for kind in (0..9u8).chain(10..20) {
        let request = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &[0; 56]].concat();
        let refusal = parse(&request, 64).err();
        assert_eq!(refusal, none(Errno::Eopnotsupp), "{kind}");
    }
}

#[test]
fn the_feature_is_offered_and_negotiated_by_itself() {
    let rights = Rights {
        kernel: true,
        ..Rights::default()
    };
    assert_eq!(rights.features(), 1 << 6);
    assert!(rights.negotiated(1 << 6).kernel);
    assert!(!rights.negotiated(!(1 << 6)).kernel);
}

#[test]
fn every_field_of_a_request_means_what_it_is_called() {
    let fields = Fields {
        flags: 3,
        root: 0xab_c000,
        start: 0xffff_8000_0000_0000,
        last: 0xffff_8000_0000_1fff,
        ..good()
    };
    let request = fields.parse().unwrap();
    assert!(request.lock && request.dry_run);
    let space = Space::new(
        *request.space.paging(),
        0xab_c000,
        0xffff_8000_0000_0000..=0xffff_8000_0000_1fff,
    );
    assert_eq!(Ok(request.space), space);
    let entries = request.entries.iter();
    let entries: Vec<_> = entries
        .map(|p| {
            (
                p.range.start().number(),
                p.range.end().number(),
                p.attributes.bits(),
            )
        })
        .collect();
    assert_eq!(entries, [(1, 5, 1), (7, 7, 0x801)]);
    let flags = |flags| Fields { flags, ..good() }.parse().unwrap();
    assert!(flags(1).lock && !flags(1).dry_run);
    assert!(!flags(2).lock && flags(2).dry_run);

    let paging = |control, levels, physical_bits| {
        let fields = Fields {
            control,
            levels,
            physical_bits,
            ..good()
        };
        *fields.parse().unwrap().space.paging()
    };
    let off = Paging {
        levels: Levels::Five,
        nxe: false,
        wp: false,
        smep: false,
        shadow_stacks: false,
        physical_bits: 52,
        gib_pages: false,
    };
    assert_eq!(paging(0, 5, 52), off);
    assert_eq!(paging(1, 5, 52), Paging { nxe: true, ..off });
    assert_eq!(paging(2, 5, 52), Paging { wp: true, ..off });
    assert_eq!(paging(4, 5, 52), Paging { smep: true, ..off });
    let shadow_stacks = true;
    assert_eq!(
        paging(8, 5, 52),
        Paging {
            shadow_stacks,
            ..off
        }
    );
    let gib_pages = true;
    assert_eq!(paging(16, 5, 52), Paging { gib_pages, ..off });
    let levels = Levels::Four;
    assert_eq!(
        paging(0, 4, 32),
        Paging {
            levels,
            physical_bits: 32,
            ..off
        }
    );

    let policy = |unmapped, write_exec| {
        let fields = Fields {
            unmapped,
            write_exec,
            ..good()
        };
        fields.parse().unwrap().policy
    };
    use Unmapped::*;
    for (number, unmapped) in [(0, Leave), (1, Report), (2, Refuse), (3, Deny)] {
        assert_eq!(policy(number, 0).unmapped, unmapped);
    }
    use WriteExec as W;
    for (number, write_exec) in [(0, W::Leave), (1, W::Report), (2, W::Refuse)] {
        assert_eq!(policy(0, number).write_exec, write_exec);
    }
}

fn report() -> Report {
    let range = |n| GfnRange::new(n, n + 1).unwrap();
    Report {
        pages: 2,
        unmapped: 3,
        not_written: 4,
        not_executed: 5,
        write_exec: 6,
        given: 7,
        elsewhere: 8,
        ranges: 9,
        mappings: 10,
        reserved: 11,
        outside: 12,
        tables: 13,
        told_write_exec: vec![range(100), range(200)],
        told_unmapped: vec![range(300)],
    }
}

#[test]
fn every_number_of_an_answer_is_where_the_specification_has_it() {
    let bytes = encode(Ok(77), Some(&report()), 1000);
    let words: Vec<_> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|&w| u64::from_le_bytes(w))
        .collect();
    let expected = [
        0xffff_ffff_0000_0000,
        77,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        3,
        100,
        101,
        1,
        200,
        201,
        1,
        300,
        301,
        2,
    ];
    assert_eq!(words, expected);
    let refused = encode(Err(entry(Errno::Eacces, 5).unwrap()), Some(&report()), 120);
    assert_eq!(
        refused[..16],
        [13, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(refused[16..], bytes[16..120]);
    let nothing = encode(Err(Errno::Estale.into()), None, 1000);
    assert_eq!(nothing.len(), 120);
    assert_eq!(nothing[16..], [0; 104]);
}

proptest! {
    #[test]
    fn an_answer_never_outgrows_its_room(room in 120u64..300) {
        let whole = encode(Ok(1), Some(&report()), 1000);
        let cut = encode(Ok(1), Some(&report()), room);
        let fits = ((room - 120) / 24).min(3);
        prop_assert_eq!(cut.len() as u64, 120 + 24 * fits);
        prop_assert_eq!(&cut[..], &whole[..cut.len()]);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        bytes in prop::collection::vec(any::<u8>(), 8..200),
        header in prop::option::of((0u8..4, 0u8..8)),
        more in prop_oneof![3 => Just(0u64), 1 => any::<u32>().prop_map(u64::from)],
    ) {
        let mut bytes = bytes;
        if let Some((flags, count)) = header {
            bytes[..8].copy_from_slice(&[9, 0, flags, 0, count, 0, 0, 0]);
        }
        let total = bytes.len() as u64 + more;
        let parsed = parse(&bytes, total);
        prop_assert!(parsed.is_err() || more == 0);
    }
}
