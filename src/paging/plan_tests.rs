// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each policy, and plans and their orders against the rule said page by page.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::collective::tests::from_runs;
use super::super::order::TooManyPieces;
use super::*;
use crate::protect::{Order, Table};

const R: Rights = Rights::READ;
const RW: Rights = Rights::READ.union(Rights::WRITE);
const RX: Rights = Rights::READ.union(Rights::EXEC_SUPERVISOR);
const RWX: Rights = RW.union(RX);

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(start, end).unwrap()
}

/// Data, code, constants, both, then nothing until frame 99; a device at 1000.
fn kernel() -> Collective {
    from_runs(&[
        (0, 9, RW),
        (10, 19, RX),
        (20, 29, R),
        (30, 39, RWX),
        (1000, 1000, RW),
    ])
}

fn entry(start: u64, end: u64, bits: u64) -> Protection {
    Protection {
        range: range(start, end),
        attributes: Attributes::from_bits(bits).unwrap(),
    }
}

/// Both rights denied, or both watched.
const DENY: u64 = 9;
const WATCH: u64 = 0x900;

fn planned(policy: Policy, entries: &[Protection]) -> Plan {
    plan(&kernel(), entries, policy)
}

fn given(plan: &Plan) -> Vec<(u64, u64, u64, usize)> {
    let given = |p: Piece| {
        (
            p.range.start().number(),
            p.range.end().number(),
            p.attributes.bits(),
            p.entry,
        )
    };
    plan.given().map(given).collect()
}

#[test]
fn what_no_mapping_does_is_taken_away() {
    let plan = planned(Policy::default(), &[entry(0, 99, DENY)]);
    assert_eq!(given(&plan), [(0, 9, 8, 0), (10, 19, 1, 0), (20, 29, 9, 0)]);
    assert_eq!(
        plan.counts,
        Counts {
            pages: 100,
            unmapped: 60,
            not_written: 20,
            not_executed: 20,
            write_exec: 10,
            given: 30,
            elsewhere: 1,
        }
    );
    assert_eq!(plan.first_write_exec, Some(range(30, 39)));
    assert_eq!(plan.refused, None);
}

#[test]
fn only_what_the_entry_offers_is_given_and_neighbours_are_joined() {
    let only = |bits| planned(Policy::default(), &[entry(0, 99, bits)]);
    assert_eq!(given(&only(1)), [(10, 29, 1, 0)]);
    assert_eq!(given(&only(0x100)), [(10, 29, 0x100, 0)]);
    assert_eq!(given(&only(0x101)), [(10, 29, 1, 0)]);
    assert_eq!(
        given(&only(0x801)),
        [(0, 9, 0x800, 0), (10, 19, 1, 0), (20, 29, 0x801, 0)]
    );
    assert_eq!(
        (only(1).counts.given, only(1).counts.not_executed),
        (20, 20)
    );
}

#[test]
fn the_last_entry_on_a_page_counts_and_pieces_are_cut_where_another_does() {
    let plan = planned(
        Policy::default(),
        &[
            entry(0, 30, DENY),
            entry(5, 12, WATCH),
            entry(7, 7, 0),
            entry(15, 25, DENY),
        ],
    );
    assert_eq!(
        given(&plan),
        [
            (0, 4, 8, 0),
            (5, 6, 0x800, 1),
            (8, 9, 0x800, 1),
            (10, 12, 0x100, 1),
            (13, 14, 1, 0),
            (15, 19, 1, 3),
            (20, 25, 9, 3),
            (26, 29, 9, 0),
        ]
    );
    let counts = plan.counts;
    assert_eq!((counts.pages, counts.given), (30, 29));
    assert_eq!(
        counts.elsewhere,
        1 + 9 + 1,
        "a device, what comes after, and what is left alone"
    );
}

#[test]
fn each_policy_does_as_it_says() {
    let with = |unmapped, write_exec| {
        let policy = Policy {
            unmapped,
            write_exec,
        };
        planned(policy, &[entry(50, 99, DENY), entry(0, 49, DENY)])
    };
    let reported = with(Unmapped::Report, WriteExec::Report);
    assert_eq!(reported.unmapped, [range(40, 99)]);
    assert_eq!(reported.write_exec, [range(30, 39)]);
    assert_eq!(reported.refused, None);
    let left = with(Unmapped::Leave, WriteExec::Leave);
    assert_eq!((&left.unmapped, &left.write_exec), (&vec![], &vec![]));
    assert_eq!(given(&left), given(&reported));
    let denied = with(Unmapped::Deny, WriteExec::Leave);
    assert_eq!(given(&denied)[3..], [(40, 49, 9, 1), (50, 99, 9, 0)]);
    assert_eq!(denied.counts.given, 90);
    for (unmapped, write_exec, refused) in [
        (Unmapped::Refuse, WriteExec::Leave, 0),
        (Unmapped::Refuse, WriteExec::Refuse, 0),
        (Unmapped::Report, WriteExec::Refuse, 1),
    ] {
        let plan = with(unmapped, write_exec);
        assert_eq!(plan.refused, Some(refused), "{unmapped:?} {write_exec:?}");
        assert_eq!(plan.counts, left.counts);
    }
}

#[test]
fn nothing_is_refused_for_pages_that_the_plan_is_not_about() {
    let policy = Policy {
        unmapped: Unmapped::Refuse,
        write_exec: WriteExec::Refuse,
    };
    let plan = planned(policy, &[entry(0, 99, DENY), entry(30, 99, 0)]);
    assert_eq!(plan.refused, None);
    assert_eq!((plan.counts.pages, plan.counts.elsewhere), (30, 11));
}

#[test]
fn of_many_ranges_the_first_are_told_and_all_are_counted() {
    let runs: Vec<_> = (0..10_000).map(|n| (2 * n, 2 * n, RWX)).collect();
    let policy = Policy {
        unmapped: Unmapped::Report,
        write_exec: WriteExec::Report,
    };
    let plan = plan(&from_runs(&runs), &[entry(0, 19_999, DENY)], policy);
    assert_eq!((plan.unmapped.len(), plan.write_exec.len()), (4096, 4096));
    assert_eq!(
        (plan.counts.unmapped, plan.counts.write_exec),
        (10_000, 10_000)
    );
}

/// What holds on each page, as bits.
type Model = BTreeMap<u64, u64>;

fn paged(pieces: impl IntoIterator<Item = (GfnRange, u64)>) -> Model {
    let mut model = Model::new();
    for (range, bits) in pieces {
        for page in range.start().number()..=range.end().number() {
            assert_eq!(model.insert(page, bits), None, "twice");
        }
    }
    model
}

fn bits() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![0, 1, 8, 9, 0x100, 0x800, 0x900, 0x801, 0x909])
}

fn spread<T: std::fmt::Debug>(
    what: impl Strategy<Value = T>,
    n: usize,
) -> impl Strategy<Value = Vec<(u64, u64, T)>> {
    prop::collection::vec((0..8u64, 0..8u64, what), 0..n).prop_map(|parts| {
        let mut at = 0;
        parts
            .into_iter()
            .map(|(gap, more, what)| {
                let start = at + gap;
                at = start + more + 1;
                (start, start + more, what)
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn every_page_gets_what_the_rule_says(
        runs in spread((1..16u8).prop_map(|bits| R | Rights::from_bits_truncate(bits)), 12),
        entries in prop::collection::vec((0..150u64, 0..60u64, bits()), 1..8),
        held in spread((bits(), any::<bool>()), 12),
        unmapped in prop::sample::select(vec![
            Unmapped::Leave, Unmapped::Report, Unmapped::Refuse, Unmapped::Deny,
        ]),
        write_exec in prop::sample::select(vec![
            WriteExec::Leave, WriteExec::Report, WriteExec::Refuse,
        ]),
    ) {
        let policy = Policy { unmapped, write_exec };
        let mapped: BTreeMap<u64, Rights> = runs
            .iter()
            .flat_map(|&(start, end, rights)| (start..=end).map(move |page| (page, rights)))
            .collect();
        // The rule, page by page.
        let mut asked = BTreeMap::new();
        for (index, &(start, more, bits)) in entries.iter().enumerate() {
            for page in start..=start + more {
                asked.insert(page, (index, bits));
            }
        }
        asked.retain(|_, &mut (_, bits)| bits != 0);
        let mut counts = Counts::default();
        let mut gets = Model::new();
        let (mut refused, mut told) = (BTreeSet::new(), [BTreeSet::new(), BTreeSet::new()]);
        for (&page, &(index, bits)) in &asked {
            // What is denied is not watched.
            let bits = bits & !((bits & 0xf) << 8);
            counts.pages += 1;
            let kept = match mapped.get(&page) {
                None => {
                    counts.unmapped += 1;
                    told[1].insert(page);
                    if unmapped == Unmapped::Refuse {
                        refused.insert(index);
                    }
                    if unmapped == Unmapped::Deny { 0xf0f } else { 0 }
                }
                Some(rights) => {
                    let write = rights.contains(Rights::WRITE);
                    let exec = rights.contains(Rights::EXEC_SUPERVISOR);
                    counts.not_written += u64::from(!write);
                    counts.not_executed += u64::from(!exec);
                    if write && exec {
                        counts.write_exec += 1;
                        told[0].insert(page);
                        if write_exec == WriteExec::Refuse {
                            refused.insert(index);
                        }
                    }
                    (if write { 0 } else { 0x101 }) | if exec { 0 } else { 0x808 }
                }
            };
            counts.given += u64::from(bits & kept != 0);
            gets.insert(page, bits & kept);
        }
        counts.elsewhere = mapped.keys().filter(|page| !asked.contains_key(page)).count() as u64;

        let list: Vec<_> = entries
            .iter()
            .map(|&(start, more, bits)| entry(start, start + more, bits))
            .collect();
        let runs: Vec<_> = runs.clone();
        let plan = plan(&from_runs(&runs), &list, policy);
        prop_assert_eq!(plan.counts, counts);
        prop_assert_eq!(plan.refused, refused.first().copied());
        let pages = |ranges: &[GfnRange]| -> BTreeSet<u64> {
            let pages = ranges.iter().map(|r| r.start().number()..=r.end().number());
            pages.flatten().collect()
        };
        if write_exec == WriteExec::Report {
            prop_assert_eq!(pages(&plan.write_exec), told[0].clone());
        }
        if unmapped == Unmapped::Report {
            prop_assert_eq!(pages(&plan.unmapped), told[1].clone());
        }
        prop_assert_eq!(
            plan.first_write_exec.map(|range| range.start().number()),
            told[0].first().copied()
        );
        let found = paged(plan.given().map(|p| (p.range, p.attributes.bits())));
        let something: Model = gets.clone().into_iter().filter(|&(_, bits)| bits != 0).collect();
        prop_assert_eq!(found, something.clone());
        for piece in plan.given() {
            for page in piece.range.start().number()..=piece.range.end().number() {
                prop_assert_eq!(asked[&page].0, piece.entry, "page {}", page);
            }
        }
        let pieces: Vec<_> = plan.given().collect();
        for pair in pieces.windows(2) {
            let touch = end_of(pair[0].range) == pair[1].range.start().number();
            let same = (pair[0].attributes, pair[0].entry) == (pair[1].attributes, pair[1].entry);
            prop_assert!(!(touch && same), "not joined: {:?}", pair);
        }

        // And as orders on what holds.
        let table: Table = held
            .iter()
            .map(|&(start, end, (bits, immutable))| {
                let held = entry(start, end, bits);
                let locked = held.attributes.locked();
                let attributes = if immutable { locked } else { held.attributes };
                Protection { attributes, ..held }
            })
            .collect();
        let now = |page: u64| table.get(crate::protect::Gfn::new(page).unwrap());
        let bits_of = |order: &Order| paged(order.entries().iter().map(|p| (p.range, p.attributes.bits())));

        let lock = plan.lock(usize::MAX).unwrap();
        prop_assert!(matches!(lock.order, Order::Lock(_)));
        prop_assert_eq!(bits_of(&lock.order), something.clone());

        let protect = plan.protect(&table, usize::MAX).unwrap();
        prop_assert!(matches!(protect.order, Order::Protect(_)));
        let mut expected = something;
        for (&page, &bits) in &gets {
            if bits == 0 && !now(page).is_free() {
                expected.insert(page, 0);
            }
        }
        prop_assert_eq!(bits_of(&protect.order), expected);
        let freed: Vec<_> = protect
            .order
            .entries()
            .iter()
            .zip(&protect.origins)
            .filter(|(entry, _)| entry.attributes.is_free())
            .collect();
        for pair in freed.windows(2) {
            let touch = pair[0].0.range.followed_by(pair[1].0.range).is_some();
            prop_assert!(!(touch && pair[0].1 == pair[1].1), "not joined: {:?}", pair);
        }
        let loosened = gets.iter().filter(|&(&page, &bits)| {
            let held = now(page);
            held.is_immutable() && held.is_loosened_by(Attributes::from_bits(bits).unwrap())
        });
        let first = loosened.map(|(page, _)| asked[page].0).min();
        prop_assert_eq!(plan.loosens(&table), first);
        prop_assert_eq!(table.plan(&protect.order).is_err(), first.is_some());
        for (planned, len) in [(&lock, lock.order.entries().len()), (&protect, protect.order.entries().len())] {
            prop_assert_eq!(planned.origins.len(), len);
            for (entry, &origin) in planned.order.entries().iter().zip(&planned.origins) {
                prop_assert_eq!(asked[&entry.range.start().number()].0, origin);
                prop_assert_eq!(asked[&entry.range.end().number()].0, origin);
            }
            if len > 0 {
                let few = if planned == &lock { plan.lock(len - 1) } else { plan.protect(&table, len - 1) };
                prop_assert_eq!(few, Err(TooManyPieces(len - 1)));
            }
        }
    }
}
