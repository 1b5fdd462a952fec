// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random requests for MSR rules through the whole program, with a vm-guard that does each of them
//! MSR by MSR as docs/msr.md words it. The companion has to refuse what it would refuse, count what
//! it counts, or else ask it for its state, and answer queries with what it holds.

mod common;

use std::collections::BTreeMap;

use common::guest::{MSR_BITMAP, MSR_LOCK, MSR_PROTECT, SEAL};
use common::msr::*;
use common::vm_guard::{NO_POLICY, Rule, hello_msrs};
use common::*;

const STEPS: usize = 1500;
/// Few MSRs, so that rules meet: beside what no rule can name, and at the end of the numbers.
const BASES: [u32; 4] = [0x10, 0x7f0, 0xc000_0080, u32::MAX - 15];
const MAX_RANGES: u32 = 30;
const PINS: usize = 64;

/// What holds, on one access to one MSR: the action's bits, the mask, and whether it is immutable.
type Cell = (u16, u64, bool);

/// By access and MSR.
#[derive(Clone, Default)]
struct Msrs(BTreeMap<(u16, u32), Cell>);

/// As strict as both.
fn both(a: (u16, u64), b: (u16, u64)) -> (u16, u64) {
    let bits = a.0 | b.0;
    if bits & DENY != 0 {
        (DENY, 0)
    } else {
        (bits, a.1 | b.1)
    }
}

impl Msrs {
    fn get(&self, at: (u16, u32)) -> Cell {
        self.0.get(&at).copied().unwrap_or_default()
    }

    fn set(&mut self, at: (u16, u32), cell: Cell) {
        if cell.0 == ALLOW {
            self.0.remove(&at);
        } else {
            self.0.insert(at, cell);
        }
    }

    fn lock(&mut self, rules: &[Rule]) {
        for (at, _, asked) in each(rules) {
            let held = self.get(at);
            let (action, mask) = both((held.0, held.1), asked);
            self.set(at, (action, mask, true));
        }
    }

    /// Or the index of the first rule that loosens.
    fn replace(&mut self, rules: &[Rule]) -> Result<(), u32> {
        let mut last = BTreeMap::new();
        for (at, index, asked) in each(rules) {
            last.insert(at, (index, asked));
        }
        let loosens = last.iter().filter(|&(&at, &(_, asked))| {
            let (action, mask, immutable) = self.get(at);
            immutable && both((action, mask), asked) != asked
        });
        if let Some(index) = loosens.map(|(_, &(index, _))| index).min() {
            return Err(index);
        }
        for (at, (_, (action, mask))) in last {
            let immutable = self.get(at).2;
            self.set(at, (action, mask, immutable));
        }
        Ok(())
    }

    /// What is held, as it is told: of MSRs from `first` to `last`, by MSR, reads first.
    fn rules(&self, first: u32, last: u32) -> Vec<Rule> {
        let mut rules: Vec<Rule> = Vec::new();
        for (&(access, msr), &(action, mask, immutable)) in &self.0 {
            let flags = if immutable { FIXED } else { 0 };
            if !(first..=last).contains(&msr) {
                continue;
            }
            match rules.last_mut() {
                Some(rule)
                    if rule.1.checked_add(1) == Some(msr)
                        && (rule.2, rule.3, rule.4, rule.5) == (access, action, flags, mask) =>
                {
                    rule.1 = msr;
                }
                _ => rules.push((msr, msr, access, action, flags, mask)),
            }
        }
        rules.sort_by_key(|rule| (rule.0, rule.2));
        rules
    }

    fn fits(&self) -> bool {
        let pins = self.0.values().filter(|cell| cell.0 & PIN != 0).count();
        self.rules(0, !0).len() <= MAX_RANGES as usize && pins <= PINS
    }
}

/// An access to an MSR, the rule that speaks of it, and what that asks for.
type Asked = ((u16, u32), u32, (u16, u64));

fn each(rules: &[Rule]) -> Vec<Asked> {
    let mut all = Vec::new();
    for (index, &(first, last, access, action, _, mask)) in (0..).zip(rules) {
        for one in [R, W].into_iter().filter(|one| access & one != 0) {
            all.extend((first..=last).map(|msr| ((one, msr), index, (action, mask))));
        }
    }
    all
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

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    fn rules(&mut self, allow: bool) -> Vec<Rule> {
        (0..=self.below(6))
            .map(|_| {
                let first = self.of(&BASES) + self.below(12) as u32;
                let last = first.saturating_add(self.below(4) as u32);
                let access = [R, W, RW][self.below(3) as usize];
                let mask = self.of(&[1, 3, 1 << 63, !0]);
                match self.below(if allow { 9 } else { 6 }) {
                    0 | 1 => (first, last, access, DENY, 0, 0),
                    2 | 3 => (first, last, access, LOG, 0, 0),
                    4 => (first, last, W, PIN, 0, mask),
                    5 => (first, last, W, PIN | LOG, 0, mask),
                    _ => (first, last, access, ALLOW, 0, 0),
                }
            })
            .collect()
    }

    /// A request of bitmaps, the rules that it stands for, and the bitmap of each.
    fn bitmaps(&mut self) -> (Vec<u8>, Vec<Rule>, Vec<u32>) {
        let (mut bytes, mut rules, mut bitmap_of) = (Vec::new(), Vec::<Rule>::new(), Vec::new());
        for (index, base) in (0..).zip([0x10u32, 0xc000_0080]) {
            let (access, nmsrs) = (self.of(&[R, W, RW]), 1 + self.below(12) as u32);
            let bits = self.below(1 << 12);
            let allows = |msr: u32| bits >> (msr - base) & 1 != 0;
            bytes.push(bitmap(access.into(), nmsrs, base, 0, &bits.to_le_bytes()));
            for msr in base..base + nmsrs {
                let action = if allows(msr) { ALLOW } else { DENY };
                match rules.last_mut() {
                    Some((_, last, _, before, ..))
                        if *last + 1 == msr && *before == action && msr != base =>
                    {
                        *last = msr;
                    }
                    _ => {
                        rules.push((msr, msr, access, action, 0, 0));
                        bitmap_of.push(index);
                    }
                }
            }
        }
        (bitmaps(&bytes), rules, bitmap_of)
    }
}

#[test]
fn random_requests_are_answered_as_msr_by_msr() {
    let hello = hello_msrs(MAX_RANGES, u32::MAX, NO_POLICY);
    let mut s = Setup::on(Companion::start(), &hello);
    let mut random = Random(11);
    let mut msrs = Msrs::default();
    let (mut loosening, mut full, mut most) = (0, 0, 0);
    for step in 0..STEPS {
        let (kind, bytes, rules, bitmap_of) = match random.below(40) {
            0 => {
                s.vm_guard.reset();
                let generation = s.vm_guard.generation;
                wait_for("the reset", || {
                    (s.front_end.config().generation() == generation).then_some(())
                });
                s.start_anew(0);
                msrs = Msrs::default();
                continue;
            }
            1 => (SEAL, guest::request(SEAL, 0, 0, &[]), vec![], None),
            2..8 => {
                let rules = random.rules(false);
                (MSR_LOCK, request(MSR_LOCK, &rules), rules, None)
            }
            8..14 => {
                let (bytes, rules, bitmap_of) = random.bitmaps();
                (MSR_BITMAP, bytes, rules, Some(bitmap_of))
            }
            _ => {
                let rules = random.rules(true);
                (MSR_PROTECT, request(MSR_PROTECT, &rules), rules, None)
            }
        };
        let mut next = msrs.clone();
        let loosens = match kind {
            SEAL => {
                next.0.values_mut().for_each(|cell| cell.2 = true);
                Ok(())
            }
            MSR_LOCK => {
                next.lock(&rules);
                Ok(())
            }
            _ => next.replace(&rules),
        };
        let head = s.guest.request(&bytes);
        s.front_end.kick(0);
        match loosens {
            Ok(()) if next.fits() => {
                msrs = next;
                let in_force = msrs.rules(0, !0).len() as u32;
                s.vm_guard.msrs_in_force = in_force;
                let seq = if kind == SEAL {
                    s.vm_guard.seal().0
                } else {
                    let (seq, _, sent) = s.vm_guard.msr_rules();
                    let mark = if kind == MSR_LOCK { FIXED } else { 0 };
                    let marked = rules.iter().map(|r| (r.0, r.1, r.2, r.3, mark, r.5));
                    assert_eq!(sent, marked.collect::<Vec<_>>(), "{step}");
                    seq
                };
                s.vm_guard.result(seq, 0, NO_INDEX);
                let value = s.vm_guard.generation;
                assert_eq!(s.guest.response(head), Response { value, ..OK }, "{step}");
                let told = s.front_end.config().msr_ranges_in_force();
                assert_eq!(told, u64::from(in_force), "{step}");
                most = most.max(in_force);
            }
            Ok(()) => {
                full += 1;
                assert_eq!(s.guest.response(head), refused(ENOSPC, NO_INDEX), "{step}");
            }
            Err(index) => {
                loosening += 1;
                let index = bitmap_of.map_or(index, |of| of[index as usize]);
                let response = s.guest.response(head);
                assert_eq!(response, refused(EPERM, index), "{step}: {rules:x?}");
            }
        }
        // Had the counts differed, it would have asked.
        s.vm_guard.assert_silent();
        let first = random.of(&BASES) + random.below(12) as u32;
        let last = first.saturating_add(random.below(0x100) as u32);
        let room = random.below(12) as u32;
        let held = msrs.rules(first, last);
        let (count, told) = s.msr_query(first, last, RW, room);
        assert_eq!(count, held.len() as u64, "{step}");
        assert_eq!(told, held[..held.len().min(room as usize)], "{step}");
    }
    let share = f64::from(loosening) / STEPS as f64;
    assert!((0.1..0.9).contains(&share), "{share} loosened something");
    assert!(
        full > 10,
        "there was always room, with at most {most} ranges"
    );
}
