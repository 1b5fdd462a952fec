// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The formats against the tables of the specification, said once more.

use proptest::prelude::*;

use super::*;

/// A host that enforces two rights and watches one, for a driver that wants it all.
const LIMITS: Limits = Limits {
    rights: Rights {
        deny: Deny::NOWRITE.union(Deny::NOREAD),
        audit: Deny::NOWRITE,
        msrs: false,
        kernel: false,
    },
    max_request_ranges: 100,
};

fn request(header: [u8; 8], entries: &[[u64; 3]]) -> Vec<u8> {
    let words = entries
        .as_flattened()
        .iter()
        .flat_map(|word| word.to_le_bytes());
    header.into_iter().chain(words).collect()
}

fn parse(bytes: &[u8]) -> Result<Request, Refusal> {
    parse_request(Lane::Control, bytes, bytes.len() as u64, LIMITS)
}

/// The table of the specification: entry by entry, check by check.
fn expected(kind: u8, entries: &[[u64; 3]]) -> Result<(), Refusal> {
    const TOP: u64 = (1 << 52) - 1;
    for (&[start, end, attributes], index) in entries.iter().zip(0..) {
        let no_range = start > TOP || end > TOP || start > end;
        let not_for_this = kind == 1 && attributes == 0 || kind == 4 && attributes != 0;
        let errno = if no_range || attributes & !0xf0f != 0 || not_for_this {
            Errno::Einval
        } else if attributes & !0x105 != 0 {
            Errno::Eopnotsupp
        } else {
            continue;
        };
        return Err(Refusal {
            errno,
            index: Some(index),
        });
    }
    Ok(())
}

fn frame() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..100, 1 => (1u64 << 52) - 2..(1 << 52) + 1, 1 => any::<u64>()]
}

fn attributes() -> impl Strategy<Value = u64> {
    prop_oneof![
        20 => prop::sample::select(vec![1u64, 4, 5, 0x100, 0x104, 0x101]),
        2 => 0u64..20,
        1 => (0u64..16, 0u64..16).prop_map(|(deny, audit)| deny | audit << 8),
        1 => (0u32..64).prop_map(|bit| 1 << bit),
        1 => any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn entries_are_refused_as_the_specification_says(
        kind in 1u8..5,
        mut entries in prop::collection::vec(
            (frame(), 0u64..50, attributes()).prop_map(|(s, n, a)| [s, s.wrapping_add(n), a]),
            1..20,
        ),
        no_attributes in any::<bool>(),
    ) {
        match kind {
            3 => entries.clear(),
            4 => {
                entries.truncate(1);
                entries[0][2] *= u64::from(!no_attributes);
            }
            _ => {}
        }
        let parsed = parse(&request([kind, 0, 0, 0, entries.len() as u8, 0, 0, 0], &entries));
        match expected(kind, &entries) {
            Err(refusal) => prop_assert_eq!(parsed, Err(refusal)),
            Ok(()) => {
                let read = match (kind, parsed.unwrap()) {
                    (1, Request::Order { demand: Demand::Pages(Order::Lock(list)), .. })
                    | (2, Request::Order { demand: Demand::Pages(Order::Protect(list)), .. }) => {
                        list
                    }
                    (3, Request::Order { demand: Demand::Seal, .. }) => vec![],
                    (4, Request::Query(range)) => vec![Protection {
                        range,
                        attributes: Attributes::default(),
                    }],
                    (_, other) => panic!("{other:?}"),
                };
                let read: Vec<_> = read
                    .iter()
                    .map(|p| [p.range.start().number(), p.range.end().number(), p.attributes.bits()])
                    .collect();
                // What is both denied and watched is denied.
                for entry in &mut entries {
                    entry[2] &= !(entry[2] << 8) | 0xff;
                }
                prop_assert_eq!(read, entries);
            }
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        start in prop::option::of((1u8..10, 0u8..8)),
        msrs in any::<bool>(),
        more in prop_oneof![3 => Just(0u64), 1 => any::<u32>().prop_map(u64::from)],
    ) {
        let mut bytes = bytes;
        if let (Some((kind, count)), true) = (start, bytes.len() >= 8) {
            bytes[..8].copy_from_slice(&[kind, 0, 0, 0, count, 0, 0, 0]);
        }
        let total = bytes.len() as u64 + more;
        let mut limits = LIMITS;
        limits.rights.msrs = msrs;
        let parsed = parse_request(Lane::Control, &bytes, total, limits);
        prop_assert!(parsed.is_err() || more == 0);
    }

    #[test]
    fn any_part_of_the_configuration_space_has_the_size_asked_for(
        offset in prop_oneof![0u64..100, any::<u64>()],
        size in 0usize..300,
    ) {
        let config = Config::default();
        let mut read = vec![0xff; size];
        config.read(offset, &mut read);
        let all = config.encode().into_iter().chain(std::iter::repeat(0));
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_SIZE);
        prop_assert_eq!(read, all.skip(from).take(size).collect::<Vec<_>>());
    }

    #[test]
    fn an_answer_to_a_query_never_outgrows_its_room(ranges in 0u64..30, room in 16u64..600) {
        let held = (0..ranges).map(|i| Protection {
            range: GfnRange::new(2 * i, 2 * i).unwrap(),
            attributes: Attributes::new(Deny::NOWRITE, Deny::NOREAD).locked(),
        });
        let (bytes, found) = encode_query(held.map(encode_range), room);
        prop_assert_eq!(found, ranges);
        prop_assert_eq!(bytes.len() as u64, 16 + 24 * ranges.min((room - 16) / 24));
        prop_assert_eq!(&bytes[8..16], &ranges.to_le_bytes());
        if let Some(first) = bytes.get(16..40) {
            let words = [0, 0, 1 << 63 | 0x401u64].map(u64::to_le_bytes);
            prop_assert_eq!(first, words.as_flattened());
        }
    }
}

#[test]
fn the_count_is_what_the_type_takes() {
    let entry = [7, 7, 1];
    let cases = [
        (1, 0, Some(Errno::Einval)),
        (1, 100, None),
        (1, 101, Some(Errno::E2big)),
        (2, 0, Some(Errno::Einval)),
        (2, 100, None),
        (2, 101, Some(Errno::E2big)),
        (3, 0, None),
        (3, 1, Some(Errno::Einval)),
        (3, 101, Some(Errno::E2big)),
        (4, 0, Some(Errno::Einval)),
        (4, 2, Some(Errno::Einval)),
        (4, 101, Some(Errno::E2big)),
        (0, 0, Some(Errno::Eopnotsupp)),
        (5, 0, Some(Errno::Eopnotsupp)),
        (8, 1, Some(Errno::Eopnotsupp)),
    ];
    for (kind, count, errno) in cases {
        let bytes = request([kind, 0, 0, 0, count, 0, 0, 0], &vec![entry; count.into()]);
        let refused = parse(&bytes).err();
        assert_eq!(refused, errno.map(Refusal::from), "{kind} {count}");
    }
}

#[test]
fn features_are_what_the_host_can_do() {
    for (deny, audit, features) in [
        (0, 0, 0),
        (1, 1, 0x11),
        (15, 15, 0x1f),
        (4, 0, 4),
        (0, 2, 0x10),
    ] {
        let rights = Rights {
            deny: Deny::from_bits_truncate(deny),
            audit: Deny::from_bits_truncate(audit),
            msrs: false,
            kernel: false,
        };
        assert_eq!(rights.features(), features);
        assert_eq!(rights.negotiated(!0), rights);
        assert_eq!(rights.negotiated(1 << 32), Rights::default());
        assert_eq!(rights.negotiated(!0x10).audit, Deny::empty());
        assert_eq!(rights.negotiated(0x12).deny, rights.deny & Deny::NOEXEC);
    }
}

#[test]
fn each_errno_is_found_by_its_number() {
    for number in [1, 5, 7, 13, 14, 16, 22, 28, 75, 95, 116] {
        assert_eq!(Errno::from_number(number).map(|e| e as u32), Some(number));
    }
    assert_eq!(Errno::from_number(0), None);
    assert_eq!(Errno::from_number(2), None);
}

#[test]
fn a_vm_that_takes_fewer_ranges_at_once_lowers_the_limit() {
    let limits = Limits {
        max_request_ranges: 1,
        ..LIMITS
    };
    let bytes = request([1, 0, 0, 0, 2, 0, 0, 0], &[[1, 1, 1]; 2]);
    let refusal = parse_request(Lane::Control, &bytes, bytes.len() as u64, limits).unwrap_err();
    assert_eq!(refusal, Errno::E2big.into());
}
