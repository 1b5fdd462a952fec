// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table against a model that has one entry for each page, and does every order page by page.

use std::cell::Cell;
use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;

/// The specification, said once more: states as numbers, pages one by one, entries in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model(BTreeMap<u64, Page>);

/// The states of the four rights (0 free, 1 watched, 2 denied), and whether they are final.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Page {
    rights: [u8; 4],
    immutable: bool,
}

fn rights(bits: u64) -> [u8; 4] {
    [0, 1, 2, 3].map(|bit| match (bits >> bit & 1, bits >> (bit + 8) & 1) {
        (1, _) => 2,
        (0, audit) => audit as u8,
        _ => unreachable!(),
    })
}

impl Page {
    fn bits(self) -> u64 {
        let mut bits = if self.immutable { 1 << 63 } else { 0 };
        for (bit, state) in self.rights.into_iter().enumerate() {
            bits |= [0, 1 << (bit + 8), 1 << bit][usize::from(state)];
        }
        bits
    }
}

impl Model {
    fn page(&self, page: u64) -> Page {
        self.0.get(&page).copied().unwrap_or_default()
    }

    fn set(&mut self, page: u64, to: Page) {
        if to.rights == [0; 4] {
            self.0.remove(&page);
        } else {
            self.0.insert(page, to);
        }
    }

    fn lock(&mut self, entries: &[[u64; 3]]) {
        for &[start, end, bits] in entries {
            for page in start..=end {
                let mut held = self.page(page);
                for (right, asked) in held.rights.iter_mut().zip(rights(bits)) {
                    *right = asked.max(*right);
                }
                held.immutable = true;
                self.set(page, held);
            }
        }
    }

    fn protect(&mut self, entries: &[[u64; 3]]) -> Result<(), usize> {
        let mut last = BTreeMap::new();
        for (index, &[start, end, _]) in entries.iter().enumerate() {
            for page in start..=end {
                last.insert(page, index);
            }
        }
        let mut wrong = Vec::new();
        for (&page, &index) in &last {
            let held = self.page(page);
            let asked = rights(entries[index][2]);
            if held.immutable && held.rights.iter().zip(asked).any(|(&h, a)| a < h) {
                wrong.push(index);
            }
        }
        if let Some(&first) = wrong.iter().min() {
            return Err(first);
        }
        for (page, index) in last {
            let immutable = self.page(page).immutable;
            let rights = rights(entries[index][2]);
            self.set(page, Page { rights, immutable });
        }
        Ok(())
    }

    fn seal(&mut self) {
        for page in self.0.values_mut() {
            page.immutable = true;
        }
    }

    /// Maximal runs of neighbouring pages with equal attributes.
    fn runs(&self, start: u64, end: u64) -> Vec<[u64; 3]> {
        let mut runs: Vec<[u64; 3]> = Vec::new();
        for (&page, held) in self.0.range(start..=end) {
            match runs.last_mut() {
                Some([_, end, bits]) if *end + 1 == page && *bits == held.bits() => *end = page,
                _ => runs.push([page, page, held.bits()]),
            }
        }
        runs
    }
}

#[derive(Clone, Debug)]
enum Step {
    Lock(Vec<[u64; 3]>),
    Protect(Vec<[u64; 3]>),
    Seal,
    Reset,
}

/// Few pages, so that entries meet; at the top of the address space too, where an end + 1 could
/// go wrong.
fn entries(attributes: impl Strategy<Value = u64>) -> impl Strategy<Value = Vec<[u64; 3]>> {
    let entry = (0u64..64, 0u64..12, attributes, prop::bool::weighted(0.1)).prop_map(
        |(start, more, bits, top)| {
            let base = if top { Gfn::MAX.number() - 75 } else { 0 };
            [base + start, base + start + more, bits]
        },
    );
    prop::collection::vec(entry, 1..12)
}

/// Few of all the combinations there are, or else everything loosens.
fn attributes() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => prop::sample::select(vec![1u64, 0x100, 5, 0x101, 0x401, 3]),
        1 => (0u64..16, 0u64..16).prop_map(|(deny, audit)| deny | audit << 8),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let any_attributes = prop_oneof![3 => attributes(), 1 => Just(0)];
    prop_oneof![
        4 => entries(attributes().prop_filter("asks for something", |&bits| bits != 0))
            .prop_map(Step::Lock),
        12 => entries(any_attributes).prop_map(Step::Protect),
        1 => Just(Step::Seal),
        1 => Just(Step::Reset),
    ]
}

fn protections(entries: &[[u64; 3]]) -> Vec<Protection> {
    entries
        .iter()
        .map(|&[start, end, bits]| Protection {
            range: GfnRange::new(start, end).unwrap(),
            attributes: Attributes::from_bits(bits).unwrap(),
        })
        .collect()
}

fn words(protection: Protection) -> [u64; 3] {
    let Protection { range, attributes } = protection;
    [
        range.start().number(),
        range.end().number(),
        attributes.bits(),
    ]
}

fn listed(protections: impl Iterator<Item = Protection>) -> Vec<[u64; 3]> {
    protections.map(words).collect()
}

/// Plans and applies. An order that is refused changes nothing, one that is repeated neither.
fn carry_out(table: &mut Table, order: &Order) -> Result<(), usize> {
    let before = table.clone();
    let change = table.plan(order);
    assert_eq!(*table, before, "planning changed something");
    let change = change.map_err(|loosens| loosens.index)?;
    let len = table.len_after(&change);
    table.apply(&change);
    assert_eq!(table.len(), len, "as many ranges as was said before");
    for protection in change.protections() {
        let held = |gfn| table.get(gfn) == protection.attributes;
        assert!(held(protection.range.start()) && held(protection.range.end()));
    }
    let after = table.clone();
    table.apply(
        &table
            .plan(order)
            .expect("what holds can be asked for again"),
    );
    assert_eq!(*table, after, "twice is not the same as once");
    Ok(())
}

#[test]
fn ten_thousand_random_orders_come_out_as_page_by_page() {
    let config = Config {
        cases: 80,
        failure_persistence: None,
        ..Config::default()
    };
    let (done, refused) = (Cell::new(0), Cell::new(0));
    let result = TestRunner::new(config).run(
        &(prop::collection::vec(step(), 150..151), 0u64..80, 0u64..80),
        |(steps, start, more)| {
            let (mut table, mut model) = (Table::default(), Model::default());
            for step in &steps {
                let (got, expected) = match step {
                    Step::Lock(entries) => {
                        model.lock(entries);
                        (
                            carry_out(&mut table, &Order::Lock(protections(entries))),
                            Ok(()),
                        )
                    }
                    Step::Protect(entries) => (
                        carry_out(&mut table, &Order::Protect(protections(entries))),
                        model.protect(entries),
                    ),
                    Step::Seal => {
                        model.seal();
                        table.apply(&table.seal());
                        prop_assert!(table.iter().all(|held| held.attributes.is_immutable()));
                        (Ok(()), Ok(()))
                    }
                    Step::Reset => {
                        (table, model) = Default::default();
                        (Ok(()), Ok(()))
                    }
                };
                prop_assert_eq!(got, expected, "{:?}", step);
                refused.set(refused.get() + u32::from(got.is_err()));
                done.set(done.get() + 1);

                let runs = model.runs(0, u64::MAX);
                prop_assert_eq!(listed(table.iter()), runs.clone(), "{:?}", step);
                prop_assert_eq!(table.len(), runs.len());
                prop_assert_eq!(table.is_empty(), runs.is_empty());
                prop_assert_eq!(table.pages(), model.0.len() as u64);
            }
            let end = start + more;
            let range = GfnRange::new(start, end).unwrap();
            prop_assert_eq!(listed(table.within(range)), model.runs(start, end));
            for page in start..=end {
                let held = table.get(Gfn::new(page).unwrap());
                prop_assert_eq!(held.bits(), model.page(page).bits());
            }
            for bit in 0..4 {
                let denied = (start..=end).any(|page| model.page(page).rights[bit] == 2);
                prop_assert_eq!(
                    table.denies(range, Deny::from_bits_truncate(1 << bit)),
                    denied
                );
            }
            // A table told range by range, as STATE does, is the same table.
            prop_assert_eq!(table.iter().collect::<Table>(), table);
            Ok(())
        },
    );
    result.unwrap();
    assert!(done.get() >= 10_000, "only {} orders", done.get());
    // Neither all nor none of them may be refused, or the test shows nothing.
    let share = f64::from(refused.get()) / f64::from(done.get());
    assert!((0.1..0.9).contains(&share), "{share} were refused");
}

fn order(entries: impl Iterator<Item = [u64; 3]>, of: fn(Vec<Protection>) -> Order) -> Order {
    of(protections(&entries.collect::<Vec<_>>()))
}

#[test]
fn of_entries_that_loosen_the_first_is_named_and_only_the_last_on_a_page_counts() {
    let mut table = Table::default();
    let lock = order([[10, 19, 1]].into_iter(), Order::Lock);
    table.apply(&table.plan(&lock).unwrap());
    let cases: [(&[[u64; 3]], Option<usize>); 7] = [
        (&[[15, 15, 0]], Some(0)),
        // By ascending address the other one comes first.
        (&[[18, 18, 0], [11, 11, 0]], Some(0)),
        (&[[0, 99, 1], [12, 12, 0x100], [11, 11, 0]], Some(1)),
        // What a later entry mends does not count.
        (&[[12, 12, 0], [10, 19, 1]], None),
        (&[[12, 13, 0], [12, 12, 1]], Some(0)),
        (&[[12, 12, 1], [12, 12, 0]], Some(1)),
        (&[[0, 9, 0], [20, 99, 0], [10, 19, 7]], None),
    ];
    for (entries, index) in cases {
        let order = order(entries.iter().copied(), Order::Protect);
        let refused = table.plan(&order).err().map(|loosens| loosens.index);
        assert_eq!(refused, index, "{entries:?}");
    }
}

#[test]
fn the_largest_orders_on_a_large_table_take_no_time_to_speak_of() {
    // Nested entries, each over every range that is there: the product of both numbers would be
    // 800 million steps for each of these, which no deadline of a test suite would forgive.
    const ENTRIES: u64 = 4096;
    const RANGES: u64 = 100_000;
    let mut table: Table = protections(&(0..RANGES).map(|i| [4 * i, 4 * i, 1]).collect::<Vec<_>>())
        .into_iter()
        .collect();
    let nested = |bits: u64| (0..ENTRIES).map(move |i| [i, 4 * RANGES - i, bits << (i % 4)]);
    for of in [Order::Protect, Order::Lock] {
        let order = order(nested(1), of);
        let change = table.plan(&order).unwrap();
        assert_eq!(change.pages(), 4 * RANGES + 1);
        table.apply(&change);
    }
    assert!(table.iter().all(|held| held.attributes.is_immutable()));
}
