// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that run on, joined into extents, one at a time: what a listing for people has in a
//! line. Pure; knows neither memory nor tables, and keeps one extent whatever comes.

use super::{Mapping, Rights};

/// Linear addresses mapped to as many guest-physical ones, in pages of one size with the same
/// rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Extent {
    /// First linear address.
    pub va: u64,
    /// Guest-physical address that it is mapped to.
    pub pa: u64,
    /// Bytes.
    pub size: u64,
    /// Level of the pages' entries: 1, 2 or 3 for pages of 4 KiB, 2 MiB or 1 GiB.
    pub level: u8,
    /// What can be done with them.
    pub rights: Rights,
}

impl Extent {
    /// Last linear address.
    pub fn last(&self) -> u64 {
        self.va + (self.size - 1)
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        let end = |first: u64| first.checked_add(self.size);
        end(self.va) == Some(next.va)
            && end(self.pa) == Some(next.pa)
            && (self.level, self.rights) == (next.level, next.rights)
    }
}

impl From<&Mapping> for Extent {
    fn from(mapping: &Mapping) -> Self {
        Self {
            va: mapping.va,
            pa: mapping.pa,
            size: mapping.size,
            level: mapping.level,
            rights: mapping.rights,
        }
    }
}

/// Joins mappings that come in the order of their addresses, as [`walk()`](super::walk()) tells them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Merger {
    last: Option<Extent>,
}

impl Merger {
    /// Takes the next mapping, and gives the extent before it if it does not go on there.
    #[must_use = "an extent that is complete is not given again"]
    pub fn add(&mut self, mapping: &Mapping) -> Option<Extent> {
        let next = Extent::from(mapping);
        match &mut self.last {
            Some(last) if last.is_followed_by(&next) => {
                last.size += next.size;
                None
            }
            last => last.replace(next),
        }
    }

    /// The last extent, if there was a mapping.
    #[must_use]
    pub fn finish(self) -> Option<Extent> {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const R: Rights = Rights::READ;

    fn mapping(va: u64, pa: u64, level: u8, rights: Rights) -> Mapping {
        Mapping {
            va,
            pa,
            size: 1 << (3 + 9 * u32::from(level)),
            flags: 0,
            level,
            rights,
        }
    }

    fn merged(mappings: &[Mapping]) -> Vec<Extent> {
        let mut merger = Merger::default();
        let mut extents: Vec<_> = mappings.iter().filter_map(|m| merger.add(m)).collect();
        extents.extend(merger.finish());
        extents
    }

    #[test]
    fn mappings_join_only_where_all_of_it_runs_on() {
        let first = mapping(0x1000, 0x8000, 1, R);
        for (next, joins) in [
            (mapping(0x2000, 0x9000, 1, R), true),
            (mapping(0x3000, 0x9000, 1, R), false),
            (mapping(0x2000, 0xa000, 1, R), false),
            (mapping(0x2000, 0x8000, 1, R), false),
            (mapping(0x2000, 0x9000, 1, R | Rights::WRITE), false),
            (mapping(0x2000, 0x9000, 1, R | Rights::EXEC_USER), false),
            (mapping(0x2000, 0x9000, 2, R), false),
        ] {
            let extents = merged(&[first, next]);
            assert_eq!(extents.len(), if joins { 1 } else { 2 }, "{next:?}");
            assert_eq!(
                extents.iter().map(|e| e.size).sum::<u64>(),
                4096 + next.size
            );
        }
    }

    #[test]
    fn the_last_address_of_all_does_not_run_on_at_zero() {
        let top = mapping(u64::MAX - 0xfff, 0x8000, 1, R);
        let extents = merged(&[top, mapping(0, 0x9000, 1, R)]);
        assert_eq!(extents.len(), 2);
        assert_eq!(extents[0].last(), u64::MAX);
    }

    proptest! {
        /// Page for page the same, and nothing left that could be joined.
        #[test]
        fn extents_are_the_mappings_and_as_few_as_can_be(
            pages in prop::collection::vec((0..3u64, 0..3u64, any::<bool>()), 0..40),
        ) {
            let (mut va, mut pa) = (0, 0);
            let mappings: Vec<_> = pages.iter().map(|&(gap, jump, write)| {
                va += 4096 * if gap == 0 { 2 } else { 1 };
                pa += 4096 * if jump == 0 { 2 } else { 1 };
                mapping(va, pa, 1, if write { R | Rights::WRITE } else { R })
            }).collect();
            let extents = merged(&mappings);
            let single: Vec<_> = extents.iter().flat_map(|e| {
                (0..e.size / 4096).map(move |n| mapping(e.va + n * 4096, e.pa + n * 4096, 1, e.rights))
            }).collect();
            prop_assert_eq!(single, mappings);
            for pair in extents.windows(2) {
                prop_assert!(!pair[0].is_followed_by(&pair[1]));
            }
        }
    }
}
