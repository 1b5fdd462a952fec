// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which memslots a VM needs so that some of its frames are read-only, and the way there.
//!
//! Pure: knows frames and numbers, and neither KVM's types nor its ioctls, nor why a frame is to be
//! read-only. The rules are those of `KVM_SET_USER_MEMORY_REGION` in the kernel's
//! Documentation/virt/kvm/api.rst (section 4.35), and of `kvm_set_memory_region()` in its
//! virt/kvm/kvm_main.c where api.rst is silent:
//!
//! * Slots do not overlap in guest-physical space. So what covers a frame is deleted before another
//!   slot with this frame is added.
//! * `KVM_MEM_READONLY` does not change on a slot that exists, nor does its size (both `EINVAL`,
//!   kvm_main.c). So a slot is deleted and others are added, and nothing is ever changed in place.
//! * The number of a slot is below `KVM_CAP_NR_MEMSLOTS`; bits 16 to 31 of it are an address space,
//!   and always 0 here.
//! * Addresses and sizes are multiples of a page, and within a slot the host address runs on with the
//!   guest address. So two regions are never in one slot, even if they are neighbours.
//! * A slot has at most 2^31 - 1 pages (`KVM_MEM_MAX_NR_PAGES`, kvm_main.c).
//!
//! Between a deletion and an addition the frames are not there, and a vCPU that touches them gets an
//! MMIO exit: whoever carries a plan out holds the vCPUs meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::ops::Range;

use rangemap::RangeMap;

use crate::protect::{GfnRange, PAGE_SHIFT};

/// Most pages in one slot: `KVM_MEM_MAX_NR_PAGES` of the kernel's include/linux/kvm_host.h.
pub const MAX_PAGES: u64 = (1 << 31) - 1;

/// A stretch of the VM's RAM, as the process that owns the VM has mapped it. All of it in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// How many bytes.
    pub size: u64,
    /// Where its first byte is in this process.
    pub host: u64,
}

/// A memslot. Addresses and size are in bytes, and multiples of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Slot {
    /// Bits 0 to 15 of what KVM calls `slot`; the others are 0.
    pub id: u16,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// How many bytes; never 0.
    pub size: u64,
    /// Where its first byte is in this process.
    pub host: u64,
    /// Whether it has the flag `KVM_MEM_READONLY`.
    pub readonly: bool,
}

/// Frames of RAM, and what they are to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// The frames; they may lie in more than one region.
    pub range: GfnRange,
    /// Whether the guest may only read and execute them, or write them too.
    pub readonly: bool,
}

/// One call of `KVM_SET_USER_MEMORY_REGION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Take this slot away: a call with its number and a size of 0.
    Delete(Slot),
    /// Make this slot. No other has its number or any of its frames.
    Add(Slot),
}

impl Op {
    /// What takes it back.
    #[must_use]
    pub fn inverse(self) -> Self {
        match self {
            Self::Delete(slot) => Self::Add(slot),
            Self::Add(slot) => Self::Delete(slot),
        }
    }
}

/// There are not enough slot numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} memslots are needed, and there are {limit}")]
#[non_exhaustive]
pub struct NoSlots {
    /// How many slots there would be.
    pub needed: usize,
    /// How many there may be.
    pub limit: usize,
}

/// Why regions cannot be a VM's RAM. The regions are named by their place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionsError {
    /// An address or the size is no multiple of 4096.
    #[error("region {index}: an address or the size is not a multiple of 4096")]
    Unaligned {
        /// The region.
        index: usize,
    },
    /// It has no bytes.
    #[error("region {index} is empty")]
    Empty {
        /// The region.
        index: usize,
    },
    /// It has more than [`MAX_PAGES`].
    #[error("region {index} has {pages} pages, and a memslot at most {MAX_PAGES}")]
    TooLarge {
        /// The region.
        index: usize,
        /// Its pages.
        pages: u64,
    },
    /// It reaches the end of the guest's or the host's 64-bit address space, or goes beyond.
    #[error("region {index} reaches the end of the address space")]
    TooHigh {
        /// The region.
        index: usize,
    },
    /// Two regions have guest-physical addresses in common.
    #[error("regions {first} and {second} overlap")]
    Overlap {
        /// The one that comes first in the list.
        first: usize,
        /// The other one.
        second: usize,
    },
    /// Two regions have host memory in common: what is read-only in one could be written in the other.
    #[error("regions {first} and {second} are the same host memory")]
    Alias {
        /// The one that comes first in the list.
        first: usize,
        /// The other one.
        second: usize,
    },
    /// There are more regions than slots.
    #[error(transparent)]
    NoSlots(#[from] NoSlots),
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Not all frames of a change are RAM.
    #[error("change {index}: not all of frames {range} are RAM")]
    Outside {
        /// Which change: the first of them.
        index: usize,
        /// Its frames.
        range: GfnRange,
    },
    /// There would be too many slots.
    #[error(transparent)]
    NoSlots(#[from] NoSlots),
}

/// What is to be done for some frames to become read-only or read-write, in this order:
///
/// 1. slots are deleted, read-write ones first;
/// 2. read-only ones are added;
/// 3. read-write ones are added.
///
/// So slots never overlap, there are never more of them than before or after, and from the first
/// operation on a frame that is to be read-only this frame is in no read-write slot. One that is
/// read-only before and after is in none at any time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a plan changes nothing until it is carried out and applied"]
pub struct Plan {
    ops: Vec<Op>,
    /// The [`Slots::generation`] that it was made on.
    generation: u64,
}

impl Plan {
    /// The operations, in the order in which they are to be carried out.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// What takes back the first `done` operations, in order; all of them if there are not so many.
    ///
    /// It keeps the promises of a plan, in the other direction. But KVM wants memory for additions and
    /// deletions alike, so it can fail as the plan did; frames are missing then.
    pub fn undo(&self, done: usize) -> impl Iterator<Item = Op> + '_ {
        let done = done.min(self.ops.len());
        self.ops[..done].iter().rev().map(|op| op.inverse())
    }
}

/// The memslots of a VM's RAM: in each region as few as can be.
///
/// Planning and applying are apart: [`Self::plan`] says what is to be done, somebody does it, and
/// [`Self::apply`] takes it over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    /// By guest-physical address.
    regions: Vec<Placed>,
    /// Frames that are RAM; neighbouring regions are one.
    ram: BTreeMap<u64, u64>,
    /// By first frame. Neighbours in one region differ in `readonly`.
    slots: BTreeMap<u64, Entry>,
    /// Numbers that were in use and are not any more.
    freed: BTreeSet<u16>,
    /// Numbers that never were; above all others.
    fresh: Range<u16>,
    limit: usize,
    /// Grows with each plan that is applied.
    generation: u64,
}

/// A region in frames.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    span: Range<u64>,
    host: u64,
}

/// A slot, but for its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// The frame behind its last one.
    end: u64,
    region: usize,
    readonly: bool,
    id: u16,
}

/// A slot that has no number yet.
struct Run {
    start: u64,
    end: u64,
    region: usize,
    readonly: bool,
}

impl Slots {
    /// The slots of RAM that is read-write everywhere, one for each region, with numbers from
    /// `ids`. They are in [`Self::iter`]; whoever owns the VM makes them, and lets nobody else use
    /// `ids` (its end is exclusive, and at most `KVM_CAP_NR_MEMSLOTS`).
    ///
    /// That no two regions map the same memory (a file that is mapped twice, say) is up to the caller,
    /// but for host addresses that are in both.
    ///
    /// # Errors
    ///
    /// A region that KVM would not take, two that overlap, or more than `ids` has numbers.
    pub fn new(regions: &[Region], ids: Range<u16>) -> Result<Self, RegionsError> {
        for (index, region) in regions.iter().enumerate() {
            check(index, region)?;
        }
        // Sorted by one address or the other, those that have something in common are neighbours.
        let sorted = |address: fn(&Region) -> u64| {
            let mut order: Vec<usize> = (0..regions.len()).collect();
            order.sort_by_key(|&index| address(&regions[index]));
            let meeting = order.windows(2).find_map(|two| {
                let (low, high) = (&regions[two[0]], &regions[two[1]]);
                let meet = address(low) + low.size > address(high);
                meet.then_some((two[0].min(two[1]), two[0].max(two[1])))
            });
            (order, meeting)
        };
        let (order, overlap) = sorted(|region| region.gpa);
        if let Some((first, second)) = overlap {
            return Err(RegionsError::Overlap { first, second });
        }
        if let (_, Some((first, second))) = sorted(|region| region.host) {
            return Err(RegionsError::Alias { first, second });
        }
        let limit = ids.len();
        if order.len() > limit {
            let needed = order.len();
            return Err(NoSlots { needed, limit }.into());
        }

        let mut all = Self {
            regions: Vec::with_capacity(order.len()),
            ram: BTreeMap::new(),
            slots: BTreeMap::new(),
            freed: BTreeSet::new(),
            fresh: ids,
            limit,
            generation: 0,
        };
        for (region, id) in order.into_iter().zip(all.fresh.clone()) {
            let Region { gpa, size, host } = regions[region];
            let span = gpa >> PAGE_SHIFT..(gpa + size) >> PAGE_SHIFT;
            match all.ram.last_entry() {
                Some(mut last) if *last.get() == span.start => *last.get_mut() = span.end,
                _ => drop(all.ram.insert(span.start, span.end)),
            }
            let entry = Entry {
                end: span.end,
                region: all.regions.len(),
                readonly: false,
                id,
            };
            all.slots.insert(span.start, entry);
            all.fresh.start = id + 1;
            all.regions.push(Placed { span, host });
        }
        Ok(all)
    }

    /// The slots that there are, in ascending order of guest-physical addresses.
    pub fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.slots
            .iter()
            .map(|(&start, entry)| self.slot(start, entry))
    }

    /// How many slots there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none, which is so without RAM only.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// How many slots there may be.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The fewest operations after which `changes` hold; of those that overlap the last one counts. It
    /// touches only slots with a frame that changes and those beside them that become one with it, and
    /// gives new ones the lowest numbers that are free. Nothing is done yet, and nothing changes here.
    ///
    /// For c changes on which t slots lie, of n, this takes O((c + t) log n).
    ///
    /// # Errors
    ///
    /// [`PlanError`]: the first change that is not within RAM, or more slots than there may be.
    pub fn plan(&self, changes: &[Frames]) -> Result<Plan, PlanError> {
        let mut wanted = RangeMap::new();
        for (index, &Frames { range, readonly }) in changes.iter().enumerate() {
            let span = range.start().number()..range.end().number() + 1;
            let ram = self.ram.range(..=span.start).next_back();
            if ram.is_none_or(|(_, &end)| end < span.end) {
                return Err(PlanError::Outside { index, range });
            }
            wanted.insert(span, readonly);
        }
        let pieces = self.pieces(&wanted);
        let old = self.touched(&pieces);
        let new = runs(&old, &pieces);

        let needed = self.len() - old.len() + new.len();
        if needed > self.limit {
            let limit = self.limit;
            return Err(NoSlots { needed, limit }.into());
        }
        let of = |readonly| old.iter().filter(move |(_, e)| e.readonly == readonly);
        let deletes = of(false)
            .chain(of(true))
            .map(|(start, entry)| Op::Delete(self.slot(*start, entry)));
        let of = |readonly| new.iter().filter(move |run| run.readonly == readonly);
        let ids = self.lowest_ids(&old, new.len());
        let adds = of(true).chain(of(false)).zip(ids).map(|(run, id)| {
            let &Run {
                start,
                end,
                region,
                readonly,
            } = run;
            let entry = Entry {
                end,
                region,
                readonly,
                id,
            };
            Op::Add(self.slot(start, &entry))
        });
        Ok(Plan {
            ops: deletes.chain(adds).collect(),
            generation: self.generation,
        })
    }

    /// Takes over that all operations of `plan` were carried out.
    ///
    /// # Panics
    ///
    /// If another plan was applied since this one was made: what is in force is not known then.
    pub fn apply(&mut self, plan: Plan) {
        assert_eq!(plan.generation, self.generation, "a plan of other slots");
        self.generation += 1;
        for op in plan.ops {
            match op {
                Op::Delete(slot) => {
                    self.slots.remove(&(slot.gpa >> PAGE_SHIFT));
                    self.freed.insert(slot.id);
                }
                Op::Add(slot) => {
                    let start = slot.gpa >> PAGE_SHIFT;
                    let entry = Entry {
                        end: (slot.gpa + slot.size) >> PAGE_SHIFT,
                        region: self.regions.partition_point(|r| r.span.end <= start),
                        readonly: slot.readonly,
                        id: slot.id,
                    };
                    self.slots.insert(start, entry);
                    if !self.freed.remove(&slot.id) {
                        self.fresh.start = slot.id + 1;
                    }
                }
            }
        }
    }

    /// Frames that are not yet what is wanted, in ascending order, each stretch in one slot.
    fn pieces(&self, wanted: &RangeMap<u64, bool>) -> Vec<Range<u64>> {
        let mut pieces = Vec::new();
        for (span, &readonly) in wanted.iter() {
            let first = self.slots.range(..=span.start).next_back();
            let first = first.map_or(span.start, |(&start, _)| start);
            for (&start, entry) in self.slots.range(first..span.end) {
                if entry.readonly != readonly {
                    pieces.push(span.start.max(start)..span.end.min(entry.end));
                }
            }
        }
        pieces
    }

    /// The slots that cannot stay when the frames of `pieces` change, in ascending order: those with
    /// the frames, and those that are to be one slot with them.
    fn touched(&self, pieces: &[Range<u64>]) -> Vec<(u64, Entry)> {
        let mut touched: Vec<(u64, Entry)> = Vec::new();
        // What is not behind the last one is there already: pieces ascend.
        let mut touch = |found: Option<(&u64, &Entry)>, of: &Entry| match (found, touched.last()) {
            (Some((&start, entry)), last)
                if entry.region == of.region && last.is_none_or(|last| last.0 < start) =>
            {
                touched.push((start, *entry));
            }
            _ => {}
        };
        for piece in pieces {
            let Some((&start, slot)) = self.slots.range(..=piece.start).next_back() else {
                continue;
            };
            if piece.start == start {
                touch(self.slots.range(..start).next_back(), slot);
            }
            touch(Some((&start, slot)), slot);
            if piece.end == slot.end {
                touch(self.slots.range(slot.end..).next(), slot);
            }
        }
        touched
    }

    /// The lowest numbers that are free when `old` is gone, in ascending order; `count` of them, if
    /// there are so many.
    fn lowest_ids(&self, old: &[(u64, Entry)], count: usize) -> impl Iterator<Item = u16> + use<> {
        let mut used: Vec<u16> = old.iter().map(|(_, entry)| entry.id).collect();
        used.extend(self.freed.iter().take(count));
        used.sort_unstable();
        used.into_iter().chain(self.fresh.clone()).take(count)
    }

    fn slot(&self, start: u64, entry: &Entry) -> Slot {
        let region = &self.regions[entry.region];
        Slot {
            id: entry.id,
            gpa: start << PAGE_SHIFT,
            size: (entry.end - start) << PAGE_SHIFT,
            host: region.host + ((start - region.span.start) << PAGE_SHIFT),
            readonly: entry.readonly,
        }
    }
}

fn check(index: usize, region: &Region) -> Result<(), RegionsError> {
    let &Region { gpa, size, host } = region;
    let pages = size >> PAGE_SHIFT;
    if (gpa | size | host) & ((1 << PAGE_SHIFT) - 1) != 0 {
        Err(RegionsError::Unaligned { index })
    } else if size == 0 {
        Err(RegionsError::Empty { index })
    } else if pages > MAX_PAGES {
        Err(RegionsError::TooLarge { index, pages })
    } else if gpa.checked_add(size).is_none() || host.checked_add(size).is_none() {
        Err(RegionsError::TooHigh { index })
    } else {
        Ok(())
    }
}

/// What becomes of slots when the frames of `pieces` in them change; both ascend.
fn runs(old: &[(u64, Entry)], pieces: &[Range<u64>]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut push = |start, end, region, readonly| match runs.last_mut() {
        _ if start == end => {}
        Some(last) if (last.end, last.region, last.readonly) == (start, region, readonly) => {
            last.end = end;
        }
        _ => runs.push(Run {
            start,
            end,
            region,
            readonly,
        }),
    };
    let mut pieces = pieces.iter().peekable();
    for &(start, entry) in old {
        let mut from = start;
        let within = iter::from_fn(|| pieces.next_if(|piece| piece.start < entry.end));
        for piece in within {
            push(from, piece.start, entry.region, entry.readonly);
            push(piece.start, piece.end, entry.region, !entry.readonly);
            from = piece.end;
        }
        push(from, entry.end, entry.region, entry.readonly);
    }
    runs
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
