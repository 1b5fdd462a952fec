// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Plans against a model that has one entry for each frame, carried out on a stand-in for KVM that
//! refuses what KVM refuses.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;

const PAGE: u64 = 1 << PAGE_SHIFT;
/// Slot numbers of a stock host.
const STOCK: Range<u16> = 0..32764;

/// KVM: what has which number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct FakeKvm(BTreeMap<u16, Slot>);

impl FakeKvm {
    fn of(slots: &Slots) -> Self {
        let mut kvm = Self::default();
        for slot in slots.iter() {
            kvm.carry_out(Op::Add(slot)).unwrap();
        }
        kvm
    }

    fn carry_out(&mut self, op: Op) -> Result<(), String> {
        match op {
            // KVM looks at the number only; that undoing it is right takes all of it.
            Op::Delete(slot) => match self.0.remove(&slot.id) {
                Some(held) if held == slot => Ok(()),
                held => Err(format!("{op:?}, where {held:?} is")),
            },
            Op::Add(slot) => {
                let end = slot.gpa + slot.size;
                let overlaps = |held: &&Slot| held.gpa < end && slot.gpa < held.gpa + held.size;
                if slot.size == 0 || (slot.gpa | slot.size | slot.host) % PAGE != 0 {
                    Err(format!("{op:?} is not made of pages"))
                } else if let Some(held) = self.0.get(&slot.id) {
                    Err(format!("{op:?} would change {held:?}"))
                } else if let Some(held) = self.0.values().find(overlaps) {
                    Err(format!("{op:?} overlaps {held:?}"))
                } else {
                    self.0.insert(slot.id, slot);
                    Ok(())
                }
            }
        }
    }

    fn listed(&self) -> Vec<Slot> {
        let mut all: Vec<Slot> = self.0.values().copied().collect();
        all.sort_by_key(|slot| slot.gpa);
        all
    }
}

/// The specification, said once more: frames one by one, each with its region and whether it is
/// read-only.
#[derive(Clone, Debug)]
struct Model {
    regions: Vec<Region>,
    frames: BTreeMap<u64, (usize, bool)>,
}

impl Model {
    fn new(regions: &[Region]) -> Self {
        let mut frames = BTreeMap::new();
        for (index, region) in regions.iter().enumerate() {
            for frame in 0..region.size / PAGE {
                frames.insert(region.gpa / PAGE + frame, (index, false));
            }
        }
        let regions = regions.to_vec();
        Self { regions, frames }
    }

    /// The first change that is not within RAM, in which case nothing happens.
    fn set(&mut self, changes: &[Frames]) -> Result<(), usize> {
        let is_ram = |change: &Frames| numbers(change.range).all(|f| self.frames.contains_key(&f));
        if let Some(index) = changes.iter().position(|change| !is_ram(change)) {
            return Err(index);
        }
        for change in changes {
            for frame in numbers(change.range) {
                self.frames.get_mut(&frame).unwrap().1 = change.readonly;
            }
        }
        Ok(())
    }

    /// The fewest slots, from nothing; their numbers are all 0.
    fn slots(&self) -> Vec<Slot> {
        let mut slots: Vec<Slot> = Vec::new();
        let mut last = None;
        for (&frame, &held) in &self.frames {
            match slots.last_mut() {
                Some(slot) if last == Some(held) && slot.gpa + slot.size == frame * PAGE => {
                    slot.size += PAGE;
                }
                _ => {
                    let region = &self.regions[held.0];
                    slots.push(Slot {
                        id: 0,
                        gpa: frame * PAGE,
                        size: PAGE,
                        host: region.host + (frame * PAGE - region.gpa),
                        readonly: held.1,
                    });
                }
            }
            last = Some(held);
        }
        slots
    }

    fn is_readonly(&self, frame: u64) -> bool {
        self.frames[&frame].1
    }
}

fn numbers(range: GfnRange) -> impl Iterator<Item = u64> {
    range.start().number()..=range.end().number()
}

fn frames_of(slot: &Slot) -> Range<u64> {
    slot.gpa / PAGE..(slot.gpa + slot.size) / PAGE
}

fn without_id(slot: Slot) -> Slot {
    Slot { id: 0, ..slot }
}

fn op_slot(op: Op) -> Slot {
    match op {
        Op::Delete(slot) | Op::Add(slot) => slot,
    }
}

/// Carries `ops` out one by one, and sees after each that no frame is in a read-write slot that
/// became read-only or stays so.
fn carried_out(
    kvm: &mut FakeKvm,
    ops: impl Iterator<Item = Op>,
    from: &Model,
    to: &Model,
    slots: &Slots,
) -> Result<(), TestCaseError> {
    let mut touched = BTreeSet::new();
    for op in ops {
        prop_assert_eq!(kvm.carry_out(op), Ok(()));
        prop_assert!(kvm.0.len() <= slots.limit());
        touched.extend(frames_of(&op_slot(op)));
        for slot in kvm.0.values().filter(|slot| !slot.readonly) {
            for frame in frames_of(slot).filter(|&frame| to.is_readonly(frame)) {
                prop_assert!(
                    !from.is_readonly(frame) && !touched.contains(&frame),
                    "frame {:#x} can be written after {:?}",
                    frame,
                    op
                );
            }
        }
    }
    Ok(())
}

/// What has happened in all runs of a test, which shows nothing if one of them did not.
#[derive(Default)]
struct Seen {
    done: Cell<u32>,
    outside: Cell<u32>,
    no_slots: Cell<u32>,
    empty: Cell<u32>,
    undone: Cell<u32>,
    kept: Cell<u32>,
}

fn count(cell: &Cell<u32>) {
    cell.set(cell.get() + 1);
}

/// One request, from planning to applying, and all that is to hold on the way.
fn one_step(
    slots: &mut Slots,
    model: &mut Model,
    ids: &Range<u16>,
    changes: &[Frames],
    fails_after: usize,
    seen: &Seen,
) -> Result<(), TestCaseError> {
    let before = slots.clone();
    let planned = slots.plan(changes);
    prop_assert_eq!(&*slots, &before, "planning changed something");

    let mut to = model.clone();
    if let Err(index) = to.set(changes) {
        let range = changes[index].range;
        prop_assert_eq!(planned, Err(PlanError::Outside { index, range }));
        count(&seen.outside);
        return Ok(());
    }
    let fewest = to.slots();
    if fewest.len() > ids.len() {
        let (needed, limit) = (fewest.len(), ids.len());
        prop_assert_eq!(planned, Err(NoSlots { needed, limit }.into()));
        count(&seen.no_slots);
        return Ok(());
    }
    let plan = match planned {
        Ok(plan) => plan,
        Err(err) => return Err(TestCaseError::fail(err.to_string())),
    };

    // No operation but what makes the old list the new one, and the lowest numbers that there are.
    let old: Vec<Slot> = slots.iter().collect();
    let is_kept = |slot: &&Slot| fewest.contains(&without_id(**slot));
    let kept: BTreeSet<u16> = old.iter().filter(is_kept).map(|slot| slot.id).collect();
    let mut gone: Vec<u16> = Vec::new();
    let mut added: Vec<u16> = Vec::new();
    for &op in plan.ops() {
        match op {
            Op::Delete(slot) => gone.push(slot.id),
            Op::Add(slot) => added.push(slot.id),
        }
    }
    let count_gone = gone.len();
    gone.sort_unstable();
    gone.dedup();
    prop_assert_eq!(gone.len(), count_gone);
    prop_assert!(gone.iter().all(|id| !kept.contains(id)));
    prop_assert_eq!(gone.len() + kept.len(), old.len());
    prop_assert_eq!(added.len() + kept.len(), fewest.len());
    let lowest = ids.clone().filter(|id| !kept.contains(id));
    let lowest: Vec<u16> = lowest.take(added.len()).collect();
    prop_assert_eq!(&added, &lowest);
    prop_assert_eq!(plan.is_empty(), *model.slots() == fewest);
    let phase = |op: &Op| match op {
        Op::Delete(slot) => u8::from(slot.readonly),
        Op::Add(slot) => 3 - u8::from(slot.readonly),
    };
    prop_assert!(plan.ops().is_sorted_by_key(phase), "{:?}", plan);
    if !plan.is_empty() && !kept.is_empty() {
        count(&seen.kept);
    }

    // One that fails half way, and one that does not.
    let mut kvm = FakeKvm::of(slots);
    let fails_after = fails_after % (plan.ops().len() + 1);
    let done = plan.ops()[..fails_after].iter().copied();
    carried_out(&mut kvm, done, model, &to, slots)?;
    carried_out(&mut kvm, plan.undo(fails_after), &to, model, slots)?;
    prop_assert_eq!(&kvm, &FakeKvm::of(slots));
    seen.undone
        .set(seen.undone.get() + u32::from(fails_after > 0));

    carried_out(&mut kvm, plan.ops().iter().copied(), model, &to, slots)?;
    let empty = plan.is_empty();
    slots.apply(plan);
    *model = to;
    prop_assert_eq!(kvm.listed(), slots.iter().collect::<Vec<_>>());
    prop_assert_eq!(kvm.0.len(), slots.len());
    let listed: Vec<Slot> = slots.iter().map(without_id).collect();
    prop_assert_eq!(listed, fewest);
    prop_assert!(slots.plan(changes).unwrap().is_empty(), "twice");
    count(&seen.done);
    seen.empty.set(seen.empty.get() + u32::from(empty));
    Ok(())
}

/// Regions with gaps between them or none, in both address spaces, in any order.
fn regions() -> impl Strategy<Value = Vec<Region>> {
    let region = (0u64..3, 1u64..24, 0u64..2);
    prop::collection::vec(region, 1..6)
        .prop_map(|sizes| {
            let (mut gpa, mut host) = (0, 0x7f00_0000_0000);
            let mut regions = Vec::new();
            for (gap, pages, host_gap) in sizes {
                // Mostly neighbours, so that changes can reach across.
                gpa += gap / 2 * 5 * PAGE;
                host += host_gap * PAGE;
                let size = pages * PAGE;
                regions.push(Region { gpa, size, host });
                gpa += size;
                host += size;
            }
            regions
        })
        .prop_shuffle()
}

/// Where a change begins, in some number of frames, how many more it has, and what they become.
type Drawn = (usize, u64, bool);

fn changes() -> impl Strategy<Value = Vec<Drawn>> {
    let length = prop_oneof![6 => 0u64..3, 2 => 0u64..12, 1 => 0u64..60];
    let change = (any::<usize>(), length, any::<bool>());
    prop_oneof![
        3 => prop::collection::vec(change.clone(), 1..2),
        1 => prop::collection::vec(change, 0..8),
    ]
}

/// Changes that begin in RAM, mostly, or right behind a region.
fn placed(drawn: &[Drawn], model: &Model) -> Vec<Frames> {
    let behind = model.slots().last().map_or(0, |slot| frames_of(slot).end);
    let starts: Vec<u64> = model.frames.keys().copied().chain([behind]).collect();
    let place = |&(at, more, readonly): &Drawn| {
        let start = starts[at % starts.len()];
        frames(start, start + more, readonly)
    };
    drawn.iter().map(place).collect()
}

#[test]
fn random_changes_come_out_as_frame_by_frame_and_nothing_is_writable_on_the_way() {
    let config = Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    };
    let ids = prop_oneof![
        2 => (0u16..500).prop_map(|first| first..32764),
        1 => (0u16..500, 5u16..20).prop_map(|(first, count)| first..first + count),
    ];
    let steps = prop::collection::vec((changes(), any::<usize>()), 60);
    let seen = Seen::default();
    let result = TestRunner::new(config).run(&(regions(), ids, steps), |(regions, ids, steps)| {
        let mut slots = Slots::new(&regions, ids.clone()).unwrap();
        let mut model = Model::new(&regions);
        let fewest = model.slots();
        prop_assert_eq!(slots.iter().map(without_id).collect::<Vec<_>>(), fewest);
        for (drawn, fails_after) in &steps {
            let changes = placed(drawn, &model);
            one_step(&mut slots, &mut model, &ids, &changes, *fails_after, &seen)?;
        }
        Ok(())
    });
    result.unwrap();
    let steps = [&seen.done, &seen.outside, &seen.no_slots].map(Cell::get);
    assert_eq!(steps.iter().sum::<u32>(), 400 * 60);
    assert!(seen.done.get() > 8000, "{steps:?}");
    assert!(steps[1..].iter().all(|&n| n > 150), "{steps:?}");
    assert!(seen.empty.get() < seen.done.get() / 2);
    assert!(seen.empty.get() > 100 && seen.undone.get() > 2000 && seen.kept.get() > 2000);
}

fn region(first: u64, pages: u64, host: u64) -> Region {
    Region {
        gpa: first * PAGE,
        size: pages * PAGE,
        host,
    }
}

fn frames(start: u64, end: u64, readonly: bool) -> Frames {
    Frames {
        range: GfnRange::new(start, end).unwrap(),
        readonly,
    }
}

/// (number, first frame, last frame, read-only)
type Row = (u16, u64, u64, bool);

fn row(slot: Slot) -> Row {
    let frames = frames_of(&slot);
    (slot.id, frames.start, frames.end - 1, slot.readonly)
}

fn rows(slots: &Slots) -> Vec<Row> {
    slots.iter().map(row).collect()
}

fn change(slots: &mut Slots, changes: &[Frames]) -> Vec<Op> {
    let plan = slots.plan(changes).unwrap();
    let ops = plan.ops().to_vec();
    slots.apply(plan);
    ops
}

const RO: bool = true;
const RW: bool = false;

#[test]
fn what_is_cut_out_of_a_region_takes_the_lowest_numbers_read_only_first() {
    let cases: [(Frames, &[Row]); 5] = [
        (
            frames(100, 100, RO),
            &[(5, 100, 100, RO), (6, 101, 109, RW)],
        ),
        (
            frames(109, 109, RO),
            &[(6, 100, 108, RW), (5, 109, 109, RO)],
        ),
        (frames(100, 109, RO), &[(5, 100, 109, RO)]),
        (
            frames(104, 104, RO),
            &[(6, 100, 103, RW), (5, 104, 104, RO), (7, 105, 109, RW)],
        ),
        (frames(100, 109, RW), &[(5, 100, 109, RW)]),
    ];
    for (asked, expected) in cases {
        let mut slots = Slots::new(&[region(100, 10, 0x10000)], 5..8).unwrap();
        change(&mut slots, &[asked]);
        assert_eq!(rows(&slots), expected, "{asked:?}");
        for slot in slots.iter() {
            assert_eq!(slot.host, 0x10000 + slot.gpa - 100 * PAGE);
        }
        // And back: what was one slot is one again.
        change(&mut slots, &[frames(100, 109, RW)]);
        assert_eq!(rows(&slots), [(5, 100, 109, RW)], "{asked:?}");
    }
}

#[test]
fn a_change_between_two_slots_of_its_kind_makes_one_of_three_and_leaves_the_others() {
    let mut slots = Slots::new(&[region(0, 10, 0)], STOCK).unwrap();
    change(&mut slots, &[frames(2, 3, RO), frames(5, 6, RO)]);
    let before: [Row; 5] = [
        (2, 0, 1, RW),
        (0, 2, 3, RO),
        (3, 4, 4, RW),
        (1, 5, 6, RO),
        (4, 7, 9, RW),
    ];
    assert_eq!(rows(&slots), before);
    let ops = change(&mut slots, &[frames(4, 4, RO)]);
    let after: [Row; 3] = [(2, 0, 1, RW), (0, 2, 6, RO), (4, 7, 9, RW)];
    assert_eq!(rows(&slots), after);
    // The read-write one first.
    let gone: Vec<u16> = ops[..3].iter().map(|&op| op_slot(op).id).collect();
    assert_eq!(gone, [3, 0, 1]);
    assert!(matches!(ops[3], Op::Add(Slot { id: 0, .. })) && ops.len() == 4);
}

#[test]
fn regions_are_never_joined_even_where_both_addresses_run_on() {
    let (low, high) = (region(0, 4, 0), region(4, 4, 4 * PAGE));
    let mut slots = Slots::new(&[high, low], STOCK).unwrap();
    assert_eq!(rows(&slots), [(0, 0, 3, RW), (1, 4, 7, RW)]);
    change(&mut slots, &[frames(3, 4, RO)]);
    let expected: [Row; 4] = [(2, 0, 2, RW), (0, 3, 3, RO), (1, 4, 4, RO), (3, 5, 7, RW)];
    assert_eq!(rows(&slots), expected);
    // A neighbour of the other region is not touched.
    let ops = change(&mut slots, &[frames(0, 2, RO)]);
    assert!(ops.iter().all(|&op| op_slot(op).gpa < 4 * PAGE));
    let expected: [Row; 3] = [(0, 0, 3, RO), (1, 4, 4, RO), (3, 5, 7, RW)];
    assert_eq!(rows(&slots), expected);
}

#[test]
fn what_holds_already_comes_to_nothing() {
    let mut slots = Slots::new(&[region(0, 10, 0)], STOCK).unwrap();
    assert!(slots.plan(&[]).unwrap().is_empty());
    assert!(slots.plan(&[frames(0, 9, RW)]).unwrap().is_empty());
    // Of two changes of one frame the last one counts.
    let nothing = [frames(3, 5, RO), frames(2, 5, RW)];
    assert!(slots.plan(&nothing).unwrap().is_empty());
    change(&mut slots, &[frames(4, 5, RO)]);
    let again = [frames(4, 4, RO), frames(5, 9, RW), frames(5, 5, RO)];
    assert!(slots.plan(&again).unwrap().is_empty());
}

#[test]
fn a_change_outside_of_ram_is_named_before_anything_else() {
    let regions = [
        region(10, 10, 0),
        region(20, 10, 0x10_0000),
        region(40, 10, 0x20_0000),
    ];
    let slots = Slots::new(&regions, 0..3).unwrap();
    let cases = [
        (frames(10, 29, RO), false),
        (frames(9, 10, RO), true),
        (frames(29, 30, RO), true),
        (frames(25, 45, RO), true),
        (frames(30, 39, RW), true),
        (frames(0, 0, RW), true),
        (frames(50, 50, RO), true),
        (frames(0, (1 << 52) - 1, RO), true),
    ];
    for (asked, outside) in cases {
        // The first of these takes more slots than there are.
        let planned = slots.plan(&[frames(15, 15, RO), asked, frames(0, 0, RO)]);
        let index = if outside { 1 } else { 2 };
        let range = if outside {
            asked.range
        } else {
            frames(0, 0, RO).range
        };
        assert_eq!(planned, Err(PlanError::Outside { index, range }));
    }
}

#[test]
fn one_slot_too_many_is_refused_with_both_numbers_and_the_last_one_is_not() {
    let mut slots = Slots::new(&[region(0, 10, 0)], 10..13).unwrap();
    let needs = |needed| Err(NoSlots { needed, limit: 3 }.into());
    assert_eq!(slots.plan(&[frames(1, 1, RO), frames(3, 3, RO)]), needs(5));
    assert_eq!(slots.plan(&[frames(0, 0, RO), frames(2, 2, RO)]), needs(4));
    change(&mut slots, &[frames(0, 0, RO), frames(9, 9, RO)]);
    assert_eq!(slots.len(), slots.limit());
    assert_eq!(slots.plan(&[frames(5, 5, RO)]), needs(5));
    // What gives slots back in the same request counts.
    let moved = [frames(0, 9, RW), frames(5, 5, RO)];
    change(&mut slots, &moved);
    let expected: [Row; 3] = [(11, 0, 4, RW), (10, 5, 5, RO), (12, 6, 9, RW)];
    assert_eq!(rows(&slots), expected);
}

#[test]
fn scattered_pages_take_two_slots_each_and_one_more() {
    const PAGES: u64 = 8192;
    let mut slots = Slots::new(&[region(0, 1 << 20, 0)], STOCK).unwrap();
    let all: Vec<Frames> = (0..PAGES)
        .map(|i| frames(2 * i + 1, 2 * i + 1, RO))
        .collect();
    let ops = change(&mut slots, &all);
    assert_eq!((slots.len(), ops.len()), (16385, 16386));
    let numbers: BTreeSet<u16> = slots.iter().map(|slot| slot.id).collect();
    assert!(numbers.into_iter().eq(0..16385));

    // One more touches one slot, and makes three of it.
    let ops = change(&mut slots, &[frames(40_001, 40_001, RO)]);
    assert_eq!((slots.len(), ops.len()), (16387, 4));
    let back = [frames(0, (1 << 20) - 1, RW)];
    let ops = change(&mut slots, &back);
    assert_eq!((slots.len(), ops.len()), (1, 16388));
    assert_eq!(rows(&slots), [(0, 0, (1 << 20) - 1, RW)]);

    let too_many: Vec<Frames> = (0..16382)
        .map(|i| frames(2 * i + 1, 2 * i + 1, RO))
        .collect();
    let (needed, limit) = (32765, 32764);
    assert_eq!(slots.plan(&too_many), Err(NoSlots { needed, limit }.into()));
}

#[test]
fn undoing_gives_the_slots_back_in_the_opposite_order() {
    let mut slots = Slots::new(&[region(0, 10, 0)], STOCK).unwrap();
    change(&mut slots, &[frames(5, 9, RO)]);
    let plan = slots.plan(&[frames(5, 7, RW), frames(2, 2, RO)]).unwrap();
    for done in 0..=plan.ops().len() {
        let mut expected = plan.ops()[..done].to_vec();
        expected.reverse();
        let undo: Vec<Op> = plan.undo(done).map(Op::inverse).collect();
        assert_eq!(undo, expected);
    }
    assert_eq!(plan.undo(usize::MAX).count(), plan.ops().len());
    // What was read-only is back before what was read-write.
    let back = plan.undo(2).map(|op| op_slot(op).readonly);
    assert_eq!(back.collect::<Vec<_>>(), [RO, RW]);
}

#[test]
#[should_panic(expected = "a plan of other slots")]
fn a_plan_does_not_outlive_the_slots_that_it_was_made_on() {
    let mut slots = Slots::new(&[region(0, 10, 0)], STOCK).unwrap();
    let stale = slots.plan(&[frames(0, 0, RO)]).unwrap();
    change(&mut slots, &[frames(1, 1, RO)]);
    slots.apply(stale);
}

#[test]
fn regions_that_kvm_would_not_take_are_refused_with_their_reason() {
    let at = |gpa, size, host| Region { gpa, size, host };
    let good = at(0, PAGE, 0);
    let top = u64::MAX - PAGE + 1;
    let pages = MAX_PAGES + 1;
    let (index, first, second) = (1, 0, 1);
    let cases = [
        (at(PAGE + 1, PAGE, PAGE), RegionsError::Unaligned { index }),
        (at(PAGE, PAGE + 8, PAGE), RegionsError::Unaligned { index }),
        (at(PAGE, PAGE, PAGE - 1), RegionsError::Unaligned { index }),
        (at(PAGE, 0, PAGE), RegionsError::Empty { index }),
        (
            at(PAGE, pages * PAGE, PAGE),
            RegionsError::TooLarge { index, pages },
        ),
        (at(top, PAGE, PAGE), RegionsError::TooHigh { index }),
        (at(PAGE, PAGE, top), RegionsError::TooHigh { index }),
        (
            at(0, 2 * PAGE, PAGE),
            RegionsError::Overlap { first, second },
        ),
        (at(PAGE, PAGE, 0), RegionsError::Alias { first, second }),
    ];
    for (bad, expected) in cases {
        assert_eq!(Slots::new(&[good, bad], STOCK), Err(expected));
    }
    let largest = at(top - MAX_PAGES * PAGE, MAX_PAGES * PAGE, PAGE);
    let slots = Slots::new(&[good, largest], STOCK).unwrap();
    assert_eq!(slots.iter().nth(1).unwrap().size, MAX_PAGES * PAGE);

    let no_slots = |needed, limit| Err(RegionsError::NoSlots(NoSlots { needed, limit }));
    assert_eq!(
        Slots::new(&[good, at(PAGE, PAGE, PAGE)], 7..8),
        no_slots(2, 1)
    );
    assert_eq!(Slots::new(&[good], 7..7), no_slots(1, 0));
    let none = Slots::new(&[], 7..7).unwrap();
    assert!(none.is_empty() && none.plan(&[]).unwrap().is_empty());
}
