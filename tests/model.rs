// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random requests through the whole program, with a vm-guard that does each of them page by page
//! as the specification words it. The companion has to refuse what it would refuse, count what it
//! counts, or else ask it for its state, and answer queries with what it holds.

mod common;

use std::collections::BTreeMap;

use common::guest::{LOCK, PROTECT, SEAL, query_request, request};
use common::vm_guard::Range;
use common::*;

/// Far from the guest's rings.
const BASE: u64 = 0x10_0000;
const PAGES: u64 = 48;
const STEPS: usize = 1500;

/// What is set on each page: bits as on the wire.
#[derive(Default)]
struct Pages(BTreeMap<u64, u64>);

/// 0 free, 1 watched, 2 denied, for each of the four rights.
fn states(bits: u64) -> [u64; 4] {
    [0, 1, 2, 3].map(|n| match (bits >> n & 1, bits >> (n + 8) & 1) {
        (1, _) => 2,
        (_, audit) => audit,
    })
}

fn bits_of(states: [u64; 4]) -> u64 {
    (0..4).fold(0, |bits, n| bits | [0, 0x100, 1][states[n] as usize] << n)
}

impl Pages {
    fn set(&mut self, page: u64, bits: u64) {
        if bits & !IMMUTABLE == 0 {
            self.0.remove(&page);
        } else {
            self.0.insert(page, bits);
        }
    }

    fn lock(&mut self, entries: &[Range]) {
        for &(start, end, bits) in entries {
            for page in start..=end {
                let held = self.0.get(&page).copied().unwrap_or(0);
                let (held, asked) = (states(held), states(bits));
                let sum = [0, 1, 2, 3].map(|n| held[n].max(asked[n]));
                self.set(page, bits_of(sum) | IMMUTABLE);
            }
        }
    }

    /// Or the index of the first entry that loosens.
    fn protect(&mut self, entries: &[Range]) -> Result<(), u32> {
        let mut last = BTreeMap::new();
        for (index, &(start, end, bits)) in (0..).zip(entries) {
            last.extend((start..=end).map(|page| (page, (index, bits))));
        }
        let mut first = None;
        for (page, &(index, bits)) in &last {
            let held = self.0.get(page).copied().unwrap_or(0);
            let back = states(held).iter().zip(states(bits)).any(|(&h, a)| a < h);
            if held & IMMUTABLE != 0 && back && first.is_none_or(|first| index < first) {
                first = Some(index);
            }
        }
        if let Some(index) = first {
            return Err(index);
        }
        for (page, (_, bits)) in last {
            let mark = self.0.get(&page).copied().unwrap_or(0) & IMMUTABLE;
            self.set(page, bits_of(states(bits)) | mark);
        }
        Ok(())
    }

    fn ranges(&self, start: u64, end: u64) -> Vec<Range> {
        let mut ranges: Vec<Range> = Vec::new();
        for (&page, &bits) in self.0.range(start..=end) {
            match ranges.last_mut() {
                Some((_, end, last)) if *end + 1 == page && *last == bits => *end = page,
                _ => ranges.push((page, page, bits)),
            }
        }
        ranges
    }
}

/// Numerical Recipes' generator: the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn entries(&mut self, kinds: &[u64]) -> Vec<Range> {
        (0..=self.below(8))
            .map(|_| {
                let start = BASE + self.below(PAGES);
                let bits = kinds[self.below(kinds.len() as u64) as usize];
                (start, start + self.below(8), bits)
            })
            .collect()
    }
}

#[test]
fn random_requests_are_answered_as_page_by_page() {
    let mut s = Setup::able();
    let mut random = Random(7);
    let mut pages = Pages::default();
    let mut refusals = 0;
    let kinds = [0x001, 0x100, 0x101, 0x005, 0x402, 0xf0f, 0x008];
    let or_free = [kinds.as_slice(), &[0, 0, 0]].concat();
    for step in 0..STEPS {
        let (kind, entries) = match random.below(40) {
            0 => {
                s.vm_guard.reset();
                let generation = s.vm_guard.generation;
                wait_for("the reset", || {
                    (s.front_end.config().generation() == generation).then_some(())
                });
                s.start_anew(0);
                pages = Pages::default();
                continue;
            }
            1 => (SEAL, vec![]),
            2..10 => (LOCK, random.entries(&kinds)),
            _ => (PROTECT, random.entries(&or_free)),
        };
        let loosens = match kind {
            LOCK => {
                pages.lock(&entries);
                Ok(())
            }
            PROTECT => pages.protect(&entries),
            _ => {
                pages.0.values_mut().for_each(|bits| *bits |= IMMUTABLE);
                Ok(())
            }
        };
        let bytes = request(kind, 0, entries.len() as u32, &entries);
        let head = s.guest.request(&bytes);
        s.front_end.kick(0);
        match loosens {
            Ok(()) => {
                let seq = match kind {
                    SEAL => s.vm_guard.seal().0,
                    _ => s.vm_guard.protect().seq,
                };
                let in_force = pages.ranges(0, TOP).len() as u32;
                s.vm_guard.done(seq, in_force);
                let value = s.vm_guard.generation;
                let response = s.guest.response(head);
                assert_eq!(response, Response { value, ..OK }, "{step}: {entries:?}");
                assert_eq!(s.front_end.config().ranges_in_force(), u64::from(in_force));
            }
            Err(index) => {
                refusals += 1;
                let response = s.guest.response(head);
                assert_eq!(response, refused(EPERM, index), "{step}: {entries:?}");
            }
        }
        // Had the counts differed, it would have asked.
        s.vm_guard.assert_silent();
        let start = BASE + random.below(PAGES);
        let end = start + random.below(PAGES);
        let room = random.below(12) as u32;
        let head = s
            .guest
            .request_with_room(&query_request(start, end), 16 + 24 * room);
        s.front_end.kick(0);
        let held = pages.ranges(start, end);
        let (count, told) = s.guest.query_response(head);
        assert_eq!(count, held.len() as u64, "{step}");
        assert_eq!(told, held[..held.len().min(room as usize)], "{step}");
    }
    let share = f64::from(refusals) / STEPS as f64;
    assert!((0.1..0.9).contains(&share), "{share} were refused");
}
