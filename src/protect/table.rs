// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of what is denied where.
//!
//! A copy of what the VM's owner enforces, kept as disjoint ranges; adjacent ranges with equal
//! attributes are one range. Pure data: who enforces it, and who asked, is not known here.

use std::ops::Range;

use rangemap::RangeMap;

use super::{Attributes, Deny, Gfn, GfnRange};

/// A range of pages and what is to hold, or holds, on each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// The pages.
    pub range: GfnRange,
    /// What is denied on them.
    pub attributes: Attributes,
}

/// What is denied on which guest page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    ranges: RangeMap<u64, Attributes>,
}

impl Table {
    /// Adds a protection to what holds already. Nothing is ever loosened: on a page that is in
    /// the table the attributes add up.
    pub fn add(&mut self, protection: &Protection) {
        let Protection { range, attributes } = *protection;
        let span = span_of(range);
        let held: Vec<_> = self
            .ranges
            .overlapping(&span)
            .map(|(r, &a)| (r.start.max(span.start)..r.end.min(span.end), a))
            .collect();
        self.ranges.insert(span, attributes);
        for (piece, attributes_held) in held {
            self.ranges.insert(piece, attributes.union(attributes_held));
        }
    }

    /// What holds on one page.
    pub fn get(&self, gfn: Gfn) -> Attributes {
        self.ranges.get(&gfn.number()).copied().unwrap_or_default()
    }

    /// Whether any of `deny` holds on any page of `range`.
    pub fn denies(&self, range: GfnRange, deny: Deny) -> bool {
        self.ranges
            .overlapping(&span_of(range))
            .any(|(_, attributes)| attributes.deny.intersects(deny))
    }

    /// How many disjoint ranges there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether nothing is denied anywhere.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Protection> + '_ {
        self.ranges.iter().map(|(r, &attributes)| Protection {
            range: GfnRange::new(r.start, r.end - 1).expect("only GfnRanges are put in"),
            attributes,
        })
    }

    /// How many pages the table covers.
    pub fn pages(&self) -> u64 {
        self.iter().map(|p| p.range.pages()).sum()
    }
}

/// Frame numbers as `rangemap` has them, with an exclusive end.
fn span_of(range: GfnRange) -> Range<u64> {
    range.start().number()..range.end().number() + 1
}

impl FromIterator<Protection> for Table {
    fn from_iter<I: IntoIterator<Item = Protection>>(protections: I) -> Self {
        let mut table = Self::default();
        for protection in protections {
            table.add(&protection);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The same thing, one entry for each page.
    #[derive(Default)]
    struct Model(BTreeMap<u64, Attributes>);

    impl Model {
        fn add(&mut self, p: &Protection) {
            for page in p.range.start().number()..=p.range.end().number() {
                let held = self.0.entry(page).or_default();
                *held = held.union(p.attributes);
            }
        }

        /// Maximal runs of neighbouring pages with equal attributes.
        fn runs(&self) -> Vec<(u64, u64, Attributes)> {
            let mut runs: Vec<(u64, u64, Attributes)> = Vec::new();
            for (&page, &attributes) in &self.0 {
                match runs.last_mut() {
                    Some((_, end, a)) if *end + 1 == page && *a == attributes => *end = page,
                    _ => runs.push((page, page, attributes)),
                }
            }
            runs
        }
    }

    fn protection() -> impl Strategy<Value = Protection> {
        (0u64..64, 0u64..16, 1u64..16, any::<bool>(), any::<bool>()).prop_map(
            |(start, more, deny, immutable, top)| {
                // The top of the address space is where an end + 1 could go wrong.
                let base = if top { Gfn::MAX.number() - 80 } else { 0 };
                Protection {
                    range: GfnRange::new(base + start, base + start + more).unwrap(),
                    attributes: Attributes {
                        deny: Deny::from_bits(deny).unwrap(),
                        immutable,
                    },
                }
            },
        )
    }

    proptest! {
        #[test]
        fn behaves_like_one_entry_per_page(list in prop::collection::vec(protection(), 0..40)) {
            let mut model = Model::default();
            let mut table = Table::default();
            for p in &list {
                model.add(p);
                table.add(p);
            }
            let runs: Vec<_> = table
                .iter()
                .map(|p| (p.range.start().number(), p.range.end().number(), p.attributes))
                .collect();
            prop_assert_eq!(&runs, &model.runs());
            prop_assert_eq!(table.len(), runs.len());
            prop_assert_eq!(table.is_empty(), runs.is_empty());
            prop_assert_eq!(table.pages(), model.0.len() as u64);
            for page in 0..96 {
                let held = model.0.get(&page).copied().unwrap_or_default();
                prop_assert_eq!(table.get(Gfn::new(page).unwrap()), held);
            }
        }

        #[test]
        fn a_range_is_denied_what_one_of_its_pages_is(
            list in prop::collection::vec(protection(), 0..20),
            start in 0u64..96,
            more in 0u64..8,
            deny in 1u64..16,
        ) {
            let deny = Deny::from_bits(deny).unwrap();
            let table: Table = list.iter().copied().collect();
            let expected = (start..=start + more)
                .any(|page| table.get(Gfn::new(page).unwrap()).deny.intersects(deny));
            prop_assert_eq!(table.denies(GfnRange::new(start, start + more).unwrap(), deny), expected);
        }

        #[test]
        fn order_and_repetition_do_not_matter(list in prop::collection::vec(protection(), 0..20)) {
            let forward: Table = list.iter().copied().collect();
            let backward: Table = list.iter().rev().chain(list.iter()).copied().collect();
            prop_assert_eq!(&forward, &backward);
            // A table told range by range, as STATE does, is the same table.
            prop_assert_eq!(&forward.iter().collect::<Table>(), &forward);
        }
    }
}
