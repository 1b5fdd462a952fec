// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules against a model that has one entry for each MSR and access, and does everything MSR
//! by MSR; and the filter against what KVM does with it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::iter::repeat_n;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::bitmap::MAX_BITMAP_RULES;
use super::*;

/// What KVM does with a filter, word for word as Linux has it (`kvm_msr_allowed()`): 32-bit sums
/// that may wrap, the first range of that access, its bit.
fn kvm_allows(filter: &Filter, msr: u32, access: Access) -> bool {
    if (0x800..=0x8ff).contains(&msr) {
        return true;
    }
    for range in &filter.ranges {
        let end = range.base.wrapping_add(range.nmsrs);
        if msr >= range.base && msr < end && range.access.intersects(access) {
            let bit = (msr - range.base) as usize;
            let word = &range.bitmap[bit / 64 * 8..][..8];
            let word = u64::from_le_bytes(word.try_into().unwrap());
            return word >> (bit % 64) & 1 != 0;
        }
    }
    !filter.default_deny
}

/// What `KVM_X86_SET_MSR_FILTER` takes (`kvm_add_msr_filter()`).
fn kvm_takes(filter: &Filter) -> bool {
    filter.ranges.len() <= 16
        && (!filter.default_deny || !filter.ranges.is_empty())
        && filter.ranges.iter().all(|range| {
            let len = range.nmsrs.div_ceil(64) as usize * 8;
            (1..=12288).contains(&range.nmsrs)
                && range.bitmap.len() == len
                && !range.access.is_empty()
        })
}

/// A rule of the model: first and last MSR, access bits, and an action by name.
type Plain = (u32, u32, u32, Act);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    Allow,
    Log,
    Deny,
    Pin(u64, bool),
    Emulate(u64, bool),
}

/// What holds on one access to one MSR.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cell1 {
    denied: bool,
    log: bool,
    pinned: u64,
    constant: Option<u64>,
    immutable: bool,
}

impl Cell1 {
    fn of(act: Act) -> Self {
        let mut cell = Self::default();
        match act {
            Act::Allow => {}
            Act::Log => cell.log = true,
            Act::Deny => cell.denied = true,
            Act::Pin(mask, log) => (cell.pinned, cell.log) = (mask, log),
            Act::Emulate(value, log) => (cell.constant, cell.log) = (Some(value), log),
        }
        cell
    }

    /// The stricter of both; a denied access has no details.
    fn with(self, other: Self) -> Self {
        let immutable = self.immutable || other.immutable;
        if self.denied || other.denied {
            return Self {
                immutable,
                ..Self::of(Act::Deny)
            };
        }
        Self {
            denied: false,
            log: self.log || other.log,
            pinned: self.pinned | other.pinned,
            constant: self.constant.or(other.constant),
            immutable,
        }
    }

    fn looser_than(self, held: Self) -> bool {
        if self.denied {
            return false;
        }
        held.denied || (held.log && !self.log) || (held.pinned & !self.pinned) != 0
    }

    fn is_free(self) -> bool {
        !self.denied && !self.log && self.pinned == 0 && self.constant.is_none()
    }

    /// A write is what the MSR holds, what was kept of it, and what is to be written.
    fn answer(self, write: Option<(u64, u64, u64)>) -> Answer {
        let good = |(now, kept, value): (u64, u64, u64)| {
            [now, kept]
                .map(|n| n & self.pinned)
                .contains(&(value & self.pinned))
        };
        let verdict = match (self, write) {
            (Self { denied: true, .. }, _) => Verdict::Fault,
            (_, Some(write)) if !good(write) => Verdict::Fault,
            (_, Some((now, _, value))) if self.pinned != 0 && now == value => Verdict::Skip,
            (Self { constant, .. }, None) => constant.map_or(Verdict::Allowed, Verdict::Value),
            _ => Verdict::Allowed,
        };
        Answer {
            verdict,
            report: self.log || verdict == Verdict::Fault,
        }
    }
}

fn rule(&(first, last, access, act): &Plain) -> HostRule {
    let range = MsrRange::new(first, last).unwrap();
    let action = match act {
        Act::Allow => Action::Allow,
        Act::Log => Action::Log,
        Act::Deny => Action::Deny,
        Act::Pin(mask, log) => Action::Pin { mask, log },
        Act::Emulate(value, log) => return HostRule::Emulate { range, value, log },
    };
    HostRule::Limit(Rule::new(range, Access::from_bits(access).unwrap(), action).unwrap())
}

fn rules(plain: &[Plain]) -> Vec<Rule> {
    plain
        .iter()
        .map(|plain| match rule(plain) {
            HostRule::Limit(rule) => rule,
            HostRule::Emulate { .. } => panic!("a guest has none"),
        })
        .collect()
}

fn speaks(&(first, last, accesses, _): &Plain, msr: u32, access: u32) -> bool {
    (first..=last).contains(&msr) && accesses & access != 0
}

/// The bits of the accesses that an action can speak of.
fn accesses(act: Act, wanted: u32) -> u32 {
    match act {
        Act::Pin(..) => 2,
        Act::Emulate(..) => 1,
        Act::Allow | Act::Log | Act::Deny => wanted,
    }
}

fn act() -> impl Strategy<Value = Act> {
    let mask = prop::sample::select(vec![1u64, 2, 3, u64::MAX]);
    prop_oneof![
        2 => Just(Act::Allow),
        2 => Just(Act::Log),
        3 => Just(Act::Deny),
        3 => (mask, any::<bool>()).prop_map(|(mask, log)| Act::Pin(mask, log)),
    ]
}

/// Where rules may lie: first MSR, how many.
const WINDOWS: [(u32, u32); 4] = [
    (0, 0x3000),
    (0x4000_0000, 0x3000),
    (0xc000_0000, 0x3000),
    (0xc001_0000, 0x3000),
];

/// Cuts what no rule can name out of `first..=last`.
fn nameable(first: u32, last: u32, access: u32, act: Act) -> Vec<Plain> {
    let access = accesses(act, access);
    let mut runs = vec![(first, last)];
    let mut out = vec![(0x800, 0x8ff)];
    if access & 2 != 0 && act != Act::Allow {
        out.push((0x6e0, 0x6e0));
    }
    for (from, to) in out {
        runs = runs
            .into_iter()
            .flat_map(|(first, last)| {
                let before = (first < from).then(|| (first, last.min(from - 1)));
                let after = (last > to).then(|| (first.max(to + 1), last));
                before.into_iter().chain(after)
            })
            .collect();
    }
    runs.into_iter()
        .map(|(first, last)| (first, last, access, act))
        .collect()
}

fn anywhere(act: impl Strategy<Value = Act>, most: usize) -> impl Strategy<Value = Vec<Plain>> {
    let len = prop_oneof![3 => 1u32..4, 2 => 1u32..0x400, 1 => 1u32..0x3001];
    let one = (0usize..4, 0u32..0x3000, len, 1u32..4, act).prop_map(
        |(window, offset, len, access, act)| {
            let (base, size) = WINDOWS[window];
            let last = base + (offset + len - 1).min(size - 1);
            nameable(base + offset, last, access, act)
        },
    );
    prop::collection::vec(one, 0..most).prop_map(|lists| lists.concat())
}

/// Every access to every MSR of the windows, and a few beside them.
fn every_msr() -> impl Iterator<Item = u32> {
    let windows = WINDOWS.iter().flat_map(|&(base, size)| base..base + size);
    windows.chain([
        0x3000,
        0x4b56_4d00,
        0x3fff_ffff,
        0x4000_3000,
        0xbfff_ffff,
        0xc000_3000,
        0xc001_3000,
        0xffff_fffe,
        0xffff_ffff,
    ])
}

/// The model: all MSRs that were ever named.
#[derive(Clone, Default)]
struct Model(BTreeMap<(u32, u32), Cell1>);

impl Model {
    fn get(&self, msr: u32, access: u32) -> Cell1 {
        self.0.get(&(msr, access)).copied().unwrap_or_default()
    }

    fn set(&mut self, msr: u32, access: u32, cell: Cell1) {
        if cell.is_free() {
            self.0.remove(&(msr, access));
        } else {
            self.0.insert((msr, access), cell);
        }
    }

    fn each(plain: &[Plain], mut f: impl FnMut(usize, u32, u32, Cell1)) {
        for (index, &(first, last, accesses, act)) in plain.iter().enumerate() {
            for access in [1, 2] {
                if accesses & access != 0 {
                    (first..=last).for_each(|msr| f(index, msr, access, Cell1::of(act)));
                }
            }
        }
    }

    fn lock(&mut self, plain: &[Plain]) {
        Self::each(plain, |_, msr, access, asked| {
            if asked.is_free() {
                return;
            }
            let mut cell = self.get(msr, access).with(asked);
            cell.immutable = true;
            self.set(msr, access, cell);
        });
    }

    fn replace(&mut self, plain: &[Plain]) -> Result<(), usize> {
        let mut last = BTreeMap::new();
        Self::each(plain, |index, msr, access, asked| {
            last.insert((msr, access), (index, asked));
        });
        let held = |&(msr, access): &(u32, u32)| self.get(msr, access);
        let wrong = last
            .iter()
            .filter(|(at, (_, asked))| held(at).immutable && asked.looser_than(held(at)))
            .map(|(_, &(index, _))| index)
            .min();
        if let Some(index) = wrong {
            return Err(index);
        }
        for ((msr, access), (_, mut asked)) in last {
            asked.immutable = self.get(msr, access).immutable;
            self.set(msr, access, asked);
        }
        Ok(())
    }

    fn seal(&mut self) {
        self.0.values_mut().for_each(|cell| cell.immutable = true);
    }

    /// Maximal runs of neighbouring MSRs on which the same holds.
    fn runs(&self, access: u32) -> usize {
        let cells = self.0.iter().filter(|((_, a), _)| *a == access);
        let mut before = None::<(u32, Cell1)>;
        cells
            .filter(|&(&(msr, _), &cell)| {
                let begins =
                    before.is_none_or(|(last, held)| last.wrapping_add(1) != msr || held != cell);
                before = Some((msr, cell));
                begins
            })
            .count()
    }
}

fn cell_of_read(held: Held<OnRead>) -> Cell1 {
    Cell1 {
        immutable: held.immutable,
        ..Cell1::of(match held.on {
            OnRead::Allow => Act::Allow,
            OnRead::Log => Act::Log,
            OnRead::Deny => Act::Deny,
        })
    }
}

fn cell_of_write(held: Held<OnWrite>) -> Cell1 {
    Cell1 {
        immutable: held.immutable,
        ..Cell1::of(match held.on {
            OnWrite::Pass { pinned, log } => Act::Pin(pinned, log),
            OnWrite::Deny => Act::Deny,
        })
    }
}

fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Holds host's and guest's rules against the model, at every MSR.
fn check(unlisted: Unlisted, host: &[Plain], guest: &[Plain]) -> Result<bool, TestCaseError> {
    // The host's rules may not overlap: of those that do, the first stays.
    let (mut kept, mut policy) = (Vec::new(), Policy::new(unlisted, &[]).unwrap());
    for plain in host {
        kept.push(rule(plain));
        match Policy::new(unlisted, &kept) {
            Ok(more) => policy = more,
            Err(overlap) => {
                prop_assert_eq!(overlap.index, kept.len() - 1);
                kept.pop();
            }
        }
    }
    let host: Vec<&Plain> = host
        .iter()
        .filter(|plain| kept.contains(&rule(plain)))
        .collect();
    let host_says = |msr: u32, access: u32| {
        let exempt = (0x800..=0x8ff).contains(&msr) || (msr == 0x6e0 && access == 2);
        let unlisted = Cell1 {
            denied: unlisted == Unlisted::Deny && !exempt,
            ..Cell1::default()
        };
        host.iter()
            .find(|plain| speaks(plain, msr, access))
            .map_or(unlisted, |plain| Cell1::of(plain.3))
    };
    let guest_says = |msr: u32, access: u32| {
        guest
            .iter()
            .filter(|plain| speaks(plain, msr, access))
            .fold(Cell1::default(), |cell, plain| {
                cell.with(Cell1::of(plain.3))
            })
    };

    let budget = Budget {
        filter_ranges: Some(11),
        ranges: usize::MAX,
        pins: u64::MAX,
    };
    let Ok((mut all, _)) = Rules::new(policy, budget) else {
        return Ok(false);
    };
    let planned = match all.plan(&Order::Lock(rules(guest))) {
        Ok(planned) => planned,
        Err(Refused::NoRoom(NoRoom::Filter(_))) => return Ok(false),
        Err(other) => panic!("{other}"),
    };
    all.apply(planned.table.clone());
    prop_assert_eq!(all.table(), &planned.table);
    let (filter, decisions) = (planned.filter.as_ref().unwrap(), &planned.decisions);
    prop_assert!(kvm_takes(filter));
    // One for each window and access is always enough.
    prop_assert!(filter.ranges.len() <= 2 * WINDOWS.len());
    let mut pins = 0;
    for msr in every_msr() {
        let read = host_says(msr, 1).with(guest_says(msr, 1));
        let deflected = !kvm_allows(filter, msr, Access::READ);
        prop_assert_eq!(deflected, !read.is_free(), "read of {:#x}", msr);
        prop_assert_eq!(decisions.read(msr), read.answer(None), "read of {:#x}", msr);
        let write = host_says(msr, 2).with(guest_says(msr, 2));
        let deflected = !kvm_allows(filter, msr, Access::WRITE);
        prop_assert_eq!(deflected, !write.is_free(), "write of {:#x}", msr);
        let writes = [
            (0, 0, 0),
            (0, 0, 1),
            (4, 4, 6),
            (8, 8, 24),
            // After a reset of the vCPU: all as it was kept, all but what nobody pins, and a bit
            // of each.
            (0, 3, 3),
            (0, 3, 11),
            (0, 3, 1),
            (2, 1, 3),
        ];
        let free = if write.is_free() { 1 } else { writes.len() };
        for &(now, kept, value) in &writes[..free] {
            prop_assert_eq!(
                decisions.write(msr, now, kept, value),
                write.answer(Some((now, kept, value))),
                "write of {:#x} to {:#x} that holds {:#x} and held {:#x}",
                value,
                msr,
                now,
                kept
            );
        }
        pins += u64::from(!write.denied && write.pinned != 0);
    }
    prop_assert_eq!(decisions.pins(), pins);
    Ok(true)
}

#[test]
fn filter_and_decisions_give_the_answer_of_a_table_with_every_msr() {
    let host_act = prop_oneof![
        6 => act(),
        2 => (0u64..3, any::<bool>()).prop_map(|(value, log)| Act::Emulate(value, log)),
    ];
    let fit = [Cell::new(0), Cell::new(0)];
    TestRunner::new(config(64))
        .run(
            &(any::<bool>(), anywhere(host_act, 10), anywhere(act(), 10)),
            |(deny, host, guest)| {
                let unlisted = if deny {
                    Unlisted::Deny
                } else {
                    Unlisted::Allow
                };
                let fits = check(unlisted, &host, &guest)?;
                // In these windows there is always room for a list of what is deflected.
                prop_assert!(fits);
                fit[usize::from(deny)].set(fit[usize::from(deny)].get() + 1);
                Ok(())
            },
        )
        .unwrap();
    assert!(fit.iter().all(|n| n.get() > 10), "{fit:?}");
}

#[test]
fn nothing_and_everything_have_a_filter() {
    for unlisted in [Unlisted::Allow, Unlisted::Deny] {
        assert!(check(unlisted, &[], &[]).unwrap());
        let all: Vec<Plain> = WINDOWS
            .iter()
            .flat_map(|&(base, size)| nameable(base, base + size - 1, 3, Act::Deny))
            .collect();
        assert!(check(unlisted, &all, &[]).unwrap());
        assert!(check(unlisted, &[], &all).unwrap());
    }
    // An allow list by the guest: every MSR but STAR and LSTAR, the highest one too.
    let rest = [
        nameable(0, 0xc000_0080, 3, Act::Deny),
        nameable(0xc000_0083, u32::MAX, 3, Act::Deny),
    ];
    assert!(check(Unlisted::Allow, &[], &rest.concat()).unwrap());
    // The highest one alone cannot be filtered: KVM's end of such a range is 0.
    assert!(!check(Unlisted::Allow, &[], &[(u32::MAX, u32::MAX, 1, Act::Deny)]).unwrap());
    assert!(!check(Unlisted::Deny, &[(u32::MAX, u32::MAX, 1, Act::Allow)], &[]).unwrap());
}

fn filter_of(plain: &[Plain], budget: usize) -> Result<Filter, FilterFull> {
    let rules: Vec<_> = plain.iter().map(rule).collect();
    let policy = Policy::new(Unlisted::Allow, &rules).unwrap();
    Filter::new(&Decisions::new(&policy, &Table::default()), budget)
}

#[test]
fn a_filter_for_one_access_has_no_more_ranges_than_it_must() {
    let msrs = prop::collection::btree_set(0u32..600_000, 1..14);
    TestRunner::new(config(200))
        .run(&(msrs, 1u32..3), |(msrs, access)| {
            let plain: Vec<Plain> = msrs
                .iter()
                .map(|&msr| (0x1_0000 + msr, 0x1_0000 + msr, access, Act::Log))
                .collect();
            // No two of these can be in one range.
            let mut apart: Vec<u32> = Vec::new();
            for &msr in &msrs {
                if apart.last().is_none_or(|last| msr - last >= 12288) {
                    apart.push(msr);
                }
            }
            let filter = filter_of(&plain, apart.len()).unwrap();
            prop_assert_eq!(filter.ranges.len(), apart.len());
            let full = filter_of(&plain, apart.len() - 1);
            prop_assert_eq!(
                full,
                Err(FilterFull {
                    budget: apart.len() - 1
                })
            );
            Ok(())
        })
        .unwrap();
}

#[test]
fn ranges_of_both_accesses_are_one_where_they_can_be() {
    let ranges = |plain: &[Plain]| {
        let filter = filter_of(plain, 16).unwrap();
        assert!(kvm_takes(&filter));
        filter
            .ranges
            .iter()
            .map(|range| (range.access.bits(), range.base, range.nmsrs))
            .collect::<Vec<_>>()
    };
    let deny = |first, last, access| (first, last, access, Act::Deny);
    // The same MSRs, by two rules and by different actions.
    assert_eq!(
        ranges(&[
            deny(0x10, 0x20, 1),
            (0x10, 0x20, 2, Act::Pin(1, false)),
            deny(0x30, 0x30, 3)
        ]),
        [(3, 0x10, 0x21)]
    );
    // Different ones.
    assert_eq!(
        ranges(&[deny(0x10, 0x20, 1), deny(0x18, 0x20, 2)]),
        [(1, 0x10, 0x11), (2, 0x18, 9)]
    );
    // Different ones that begin and end together.
    let ends = [deny(0x10, 0x10, 3), deny(0x20, 0x20, 3)];
    let apart = [&ends[..], &[deny(0x12, 0x12, 1), deny(0x14, 0x14, 2)]].concat();
    assert_eq!(ranges(&apart), [(1, 0x10, 0x11), (2, 0x10, 0x11)]);
    assert!(check(Unlisted::Allow, &apart, &[]).unwrap());
    // One more read shifts every window of reads; covered together, only the first differs.
    let far = |k: u32| 0x10_0000 + 12288 * k;
    let mut shifted: Vec<Plain> = (1..5).map(|k| deny(far(k), far(k) + 12287, 3)).collect();
    shifted.push(deny(far(1) - 100, far(1) - 100, 1));
    assert_eq!(ranges(&shifted).len(), 1 + 1 + 4);
    // Whole windows side by side.
    assert_eq!(ranges(&[deny(far(0), far(2) - 1, 3)]).len(), 2);
    assert_eq!(ranges(&[deny(far(0), far(2), 3)]).len(), 3);
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let budget = Budget {
        filter_ranges: Some(2),
        ranges: 4,
        pins: 64,
    };
    let (mut all, first) = Rules::new(Policy::default(), budget).unwrap();
    assert_eq!(first.filter, Some(Filter::default()));
    let order = |plain: &[Plain]| Order::Lock(rules(plain));
    let deny = |first, last| (first, last, 2, Act::Deny);
    let planned = all
        .plan(&order(&[deny(0, 0), deny(0x10_0000, 0x10_0000)]))
        .unwrap();
    all.apply(planned.table.clone());
    let pin = |first, last| (first, last, 2, Act::Pin(1, false));
    for (plain, refused) in [
        (
            vec![deny(1, 1), deny(0x20_0000, 0x20_0000)],
            NoRoom::Filter(FilterFull { budget: 2 }),
        ),
        (
            vec![deny(0, u32::MAX - 0x900)],
            NoRoom::Filter(FilterFull { budget: 2 }),
        ),
        (vec![deny(2, 2), deny(4, 4), deny(6, 6)], NoRoom::Ranges(4)),
        (vec![pin(0x100, 0x140)], NoRoom::Pins(64)),
        (vec![pin(0x100, 0x13f), pin(0x200, 0x200)], NoRoom::Pins(64)),
    ] {
        let plain: Vec<Plain> = plain
            .into_iter()
            .flat_map(|(first, last, access, act)| nameable(first, last, access, act))
            .collect();
        assert_eq!(all.plan(&order(&plain)), Err(refused.into()));
        assert_eq!(all.table(), &planned.table);
    }
    // What is denied as well is not kept.
    let denied: Vec<Plain> = vec![deny(0x13f, 0x140), pin(0x100, 0x140)];
    assert!(all.plan(&order(&denied)).is_ok());
    let allow = (0, 0, 2, Act::Allow);
    assert_eq!(
        all.plan(&Order::Replace(rules(&[deny(1, 1), allow]))),
        Err(Refused::Loosens(Loosens { index: 1 }))
    );
}

#[derive(Clone, Debug)]
enum Step {
    Lock(Vec<Plain>),
    Replace(Vec<Plain>),
    Seal,
    Reset,
}

/// Few MSRs, so that rules meet: at both ends of the numbers, beside what no rule can name, and
/// elsewhere.
fn close() -> impl Strategy<Value = Vec<Plain>> {
    let base = prop::sample::select(vec![0u32, 0x6d8, 0x7f0, 0x8f8, 0xc000_0080, 0xffff_ffe8]);
    // Few of all the actions there are, or else everything loosens.
    let act = prop_oneof![6 => act(), 2 => Just(Act::Deny), 1 => Just(Act::Allow)];
    let one =
        (base, 0u32..20, 0u32..10, 1u32..4, act).prop_map(|(base, start, more, access, act)| {
            let last = (base + start).saturating_add(more);
            nameable(base + start, last, access, act)
        });
    prop::collection::vec(one, 1..8).prop_map(|lists| lists.concat())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => close().prop_map(Step::Lock),
        12 => close().prop_map(Step::Replace),
        1 => Just(Step::Seal),
        1 => Just(Step::Reset),
    ]
}

fn carry_out(table: &mut Table, order: &Order) -> Result<(), usize> {
    let before = table.clone();
    let change = table.plan(order);
    assert_eq!(*table, before, "planning changed something");
    table.apply(&change.map_err(|loosens| loosens.index)?);
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
fn ten_thousand_random_orders_come_out_as_msr_by_msr() {
    let (done, refused) = (Cell::new(0), Cell::new(0));
    TestRunner::new(config(100))
        .run(&prop::collection::vec(step(), 120..121), |steps| {
            let (mut table, mut model) = (Table::default(), Model::default());
            for step in &steps {
                let (got, expected) = match step {
                    Step::Lock(plain) => {
                        model.lock(plain);
                        (carry_out(&mut table, &Order::Lock(rules(plain))), Ok(()))
                    }
                    Step::Replace(plain) => (
                        carry_out(&mut table, &Order::Replace(rules(plain))),
                        model.replace(plain),
                    ),
                    Step::Seal => {
                        model.seal();
                        table.seal();
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

                let mut cells = BTreeMap::new();
                for (range, held) in table.reads() {
                    let all = range.first()..=range.last();
                    cells.extend(all.map(|msr| ((msr, 1), cell_of_read(held))));
                }
                for (range, held) in table.writes() {
                    let all = range.first()..=range.last();
                    cells.extend(all.map(|msr| ((msr, 2), cell_of_write(held))));
                }
                prop_assert_eq!(&cells, &model.0, "{:?}", step);
                prop_assert_eq!(table.len(), model.runs(1) + model.runs(2));
                prop_assert_eq!(table.is_empty(), model.0.is_empty());
            }
            for (&(msr, access), &cell) in &model.0 {
                let held = match access {
                    1 => cell_of_read(table.read(msr)),
                    _ => cell_of_write(table.write(msr)),
                };
                prop_assert_eq!(held, cell);
            }
            // A table told range by range, as a state is, is the same table.
            let mut told = Table::default();
            table
                .reads()
                .for_each(|(range, held)| told.tell_read(range, held));
            table
                .writes()
                .for_each(|(range, held)| told.tell_write(range, held));
            prop_assert_eq!(told, table);
            Ok(())
        })
        .unwrap();
    assert!(done.get() >= 10_000, "only {} orders", done.get());
    // Neither all nor none of them may be refused, or the test shows nothing.
    let share = f64::from(refused.get()) / f64::from(done.get());
    assert!((0.1..0.9).contains(&share), "{share} were refused");
}

#[test]
fn the_first_of_the_rules_that_loosen_is_named_whichever_access_it_speaks_of() {
    let mut table = Table::default();
    let lock = Order::Lock(rules(&[(10, 19, 3, Act::Deny)]));
    table.apply(&table.plan(&lock).unwrap());
    let (allow, deny, log) = (Act::Allow, Act::Deny, Act::Log);
    let cases: [(&[Plain], Option<usize>); 7] = [
        (&[(15, 15, 1, log)], Some(0)),
        (
            &[(0, 99, 3, deny), (18, 18, 2, allow), (11, 11, 1, allow)],
            Some(1),
        ),
        (&[(18, 18, 1, allow), (11, 11, 2, allow)], Some(0)),
        (&[(12, 12, 3, allow), (10, 19, 3, deny)], None),
        // Only half of it is mended.
        (&[(12, 12, 3, allow), (10, 19, 1, deny)], Some(0)),
        (&[(12, 12, 3, deny), (12, 12, 2, log)], Some(1)),
        (
            &[(0, 9, 3, allow), (20, 99, 3, allow), (19, 19, 1, deny)],
            None,
        ),
    ];
    for (plain, index) in cases {
        let refused = table.plan(&Order::Replace(rules(plain))).err();
        assert_eq!(refused.map(|loosens| loosens.index), index, "{plain:?}");
    }
}

#[test]
fn the_largest_orders_on_a_large_table_take_no_time_to_speak_of() {
    // Nested rules, each over every range that is there: the product of both numbers would be
    // 400 million steps, which no deadline of a test suite would forgive.
    const RULES: u32 = 4096;
    const RANGES: u32 = 100_000;
    let base = 0x1_0000;
    let mut table = Table::default();
    let apart: Vec<Plain> = (0..RANGES)
        .map(|i| (base + 4 * i, base + 4 * i, 2, Act::Log))
        .collect();
    table.apply(&table.plan(&Order::Replace(rules(&apart))).unwrap());
    let nested: Vec<Plain> = (0..RULES)
        .map(|i| {
            (
                base + i,
                base + 4 * RANGES - i,
                2,
                Act::Pin(1 << (i % 64), true),
            )
        })
        .collect();
    for order in [Order::Replace(rules(&nested)), Order::Lock(rules(&nested))] {
        table.apply(&table.plan(&order).unwrap());
    }
    let decisions = Decisions::new(&Policy::default(), &table);
    assert_eq!(Filter::new(&decisions, 16), Err(FilterFull { budget: 16 }));
    assert!(decisions.pins() > u64::from(RANGES));
    assert!(table.writes().all(|(_, held)| held.immutable));
}

#[test]
fn a_full_bitmap_comes_back_as_the_filter_that_it_was() {
    // Alternating bits: the most rules that bytes can make.
    let bits: Vec<u8> = repeat_n(0x55, 0x200).collect();
    let header = [3u32, 4096, 0xc000_0000, 0].map(u32::to_le_bytes);
    let bytes = [header.as_flattened(), &bits].concat();
    let rules = rules_of_bitmaps(&bytes, 1).unwrap();
    assert_eq!(rules.len(), MAX_BITMAP_RULES);
    let rules = rules.into_iter().map(|(_, rule)| rule).collect();
    let mut table = Table::default();
    table.apply(&table.plan(&Order::Replace(rules)).unwrap());
    assert_eq!(table.len(), 4096);
    let filter = Filter::new(&Decisions::new(&Policy::default(), &table), 1).unwrap();
    for msr in 0xc000_0000u32..0xc000_1000 {
        for access in [Access::READ, Access::WRITE] {
            assert_eq!(kvm_allows(&filter, msr, access), msr % 2 == 0);
        }
    }
}
