// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each guest frame can be used for over all mappings of a range of linear addresses.
//!
//! A table is walked once for each level at which it is met and each set of rights that it is met
//! with, however many paths lead to it; so work is bounded by the table pages there are, and not by
//! what they map. The result is the same as that of following every path.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use vm_memory::GuestMemory;

use super::entry::{self, Covers, Entry, Path, Paths};
use super::runs::{Run, Runs, TooMany};
use super::table::{Counts, ENTRIES, Limits, Malformed, Reader, Table, WalkError, keep_example};
use super::{Mistake, Paging, Rights, Space};
use crate::protect::{GfnRange, PAGE_SHIFT};

/// Mappings that are writable and executable that are kept.
const WRITE_EXEC_MAX: usize = 256;
/// Entries that are compared at once.
const CHUNK: usize = 16;

/// Linear addresses that are mapped to frame after frame, writable and executable in supervisor
/// mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriteExecMapping {
    /// The first address by which the frames were found.
    pub va: u64,
    /// The frames.
    pub frames: GfnRange,
}

/// The union of rights over all mappings, for every frame that there is a mapping of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collective {
    runs: Vec<Run>,
    counts: Counts,
    malformed: Vec<Malformed>,
    write_exec: Vec<WriteExecMapping>,
    tables: u64,
    entries_read: u64,
}

impl Collective {
    /// Frames with their rights: disjoint, ascending, as few ranges as possible. A frame without
    /// mapping is in none of them. Frames need not be RAM.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (GfnRange, Rights)> + '_ {
        self.runs.iter().map(|run| {
            let frames = GfnRange::new(run.start(), run.end() - 1).expect("runs are not empty");
            (frames, run.rights())
        })
    }

    /// How many ranges [`Self::iter`] gives.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Rights on the frame with this number; none if it is not mapped.
    pub fn get(&self, gfn: u64) -> Rights {
        let after = self.runs.partition_point(|run| run.start() <= gfn);
        match self.runs[..after].last() {
            Some(run) if gfn < run.end() => run.rights(),
            _ => Rights::empty(),
        }
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How many frames have exactly `rights`, at index `rights.bits()`.
    pub fn pages(&self) -> [u64; 16] {
        let mut pages = [0; 16];
        for run in &self.runs {
            pages[usize::from(run.rights().bits())] += run.end() - run.start();
        }
        pages
    }

    /// Mappings and malformed entries in the range: what [`walk()`](super::walk()) would have counted.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// The first 64 malformed entries, each by one of its addresses.
    pub fn malformed(&self) -> &[Malformed] {
        &self.malformed
    }

    /// The first 256 mappings that are writable and executable themselves. A page that one mapping
    /// writes and another one executes is not here, but has both [`Rights`].
    pub fn write_exec(&self) -> &[WriteExecMapping] {
        &self.write_exec
    }

    /// Table pages, each counted once for each level at which it was met.
    pub fn tables(&self) -> u64 {
        self.tables
    }

    /// Entries read, 512 for each time that a table was.
    pub fn entries_read(&self) -> u64 {
        self.entries_read
    }
}

/// Adds up the rights that all mappings in `space` give (`docs/paging.md`, "`collective`: each frame").
///
/// What the processor may have against an access besides (SMAP, protection keys, ...) is not
/// considered, so rights are an upper bound.
///
/// # Errors
///
/// [`WalkError`]: the root lies outside of memory, a limit was reached, or the walk was cancelled.
/// There is no part of a result then.
pub fn collective<M: GuestMemory + ?Sized>(
    memory: &M,
    space: &Space,
    limits: &Limits<'_>,
) -> Result<Collective, WalkError> {
    let paging = &space.paging;
    let levels = paging.levels.number();
    let secret = Secret::new();
    let mut collector = Collector {
        reader: Reader::new(memory, limits),
        covers: Covers::new(paging),
        buffers: vec![[0; ENTRIES]; levels.into()],
        directories: HashMap::with_hasher(secret),
        page_tables: HashMap::with_hasher(secret),
        found: Found {
            paging,
            runs: Runs::new(limits.ranges),
            ranges: limits.ranges,
            write_exec: Vec::new(),
            malformed: Vec::new(),
        },
    };
    let root = Place {
        frame: space.root,
        level: levels,
        path: Path::ROOT,
        base: 0,
        first: space.first,
        last: space.last,
    };
    let counts = collector
        .directory(&root)?
        .ok_or(WalkError::RootOutside(space.root << PAGE_SHIFT))?;
    let tables = collector.directories.len() + collector.page_tables.len();
    let Found {
        runs,
        write_exec,
        malformed,
        ..
    } = collector.found;
    Ok(Collective {
        runs: runs
            .finish()
            .map_err(|TooMany| WalkError::TooManyRanges(limits.ranges))?,
        counts,
        malformed,
        write_exec,
        tables: tables as u64,
        entries_read: collector.reader.entries(),
    })
}

/// A table, how one comes there, and which part of it is meant.
struct Place {
    frame: u64,
    level: u8,
    path: Path,
    /// Translated bits of the first address that it can map.
    base: u64,
    /// Those of the first and last address in the range.
    first: u64,
    last: u64,
}

impl Place {
    /// Whether the range has all that the table can map. It cuts at most two tables of each level,
    /// so only whole ones have to be remembered.
    fn is_whole(&self) -> bool {
        self.last - self.first == (1 << (Space::shift(self.level) + 9)) - 1
    }

    /// Indices of the first and last entry in the range.
    fn indices(&self) -> (usize, usize) {
        let index = |linear| ((linear - self.base) >> Space::shift(self.level)) as usize;
        (index(self.first), index(self.last))
    }

    /// The part of the range that `entries` entries from `index` on are for.
    fn part(&self, index: usize, entries: usize) -> (u64, u64) {
        let shift = Space::shift(self.level);
        let base = self.base + ((index as u64) << shift);
        let last = base + (((entries as u64) << shift) - 1);
        (base.max(self.first), last.min(self.last))
    }
}

/// What is known of a table above level 1.
#[derive(Default)]
struct Directory {
    /// By which all of it was walked.
    walked: Paths,
    /// All of what is below it; `None` while only parts of it were walked.
    counts: Option<Counts>,
}

/// The same of a table at level 1. There are so many of these that it pays to be short.
#[derive(Clone, Copy, Default)]
struct PageTable {
    walked: Paths,
    known: bool,
    mappings: u16,
    reserved: u16,
}

impl PageTable {
    fn counts(self) -> Counts {
        Counts {
            mappings: [self.mappings.into(), 0, 0],
            reserved: self.reserved.into(),
            outside: 0,
        }
    }
}

struct Collector<'a, M: ?Sized> {
    reader: Reader<'a, M>,
    covers: Covers,
    /// A table of each level. A walk goes down only, so one is enough.
    buffers: Vec<Table>,
    /// By frame and level.
    directories: HashMap<u64, Directory, Secret>,
    /// By frame.
    page_tables: HashMap<u64, PageTable, Secret>,
    found: Found<'a>,
}

impl<M: GuestMemory + ?Sized> Collector<'_, M> {
    /// What is below a table of any level; `None` if it is outside of memory.
    fn table(&mut self, at: &Place) -> Result<Option<Counts>, WalkError> {
        match at.level {
            1 => self.page_table(at),
            _ => self.directory(at),
        }
    }

    fn directory(&mut self, at: &Place) -> Result<Option<Counts>, WalkError> {
        let key = at.frame << 3 | u64::from(at.level);
        let mut again = false;
        if let Some(seen) = self.directories.get(&key)
            && let Some(counts) = seen.counts
        {
            if at.is_whole() && !self.covers.is_new(at.path, seen.walked) {
                return Ok(Some(counts));
            }
            again = true;
        }
        let buffer = usize::from(at.level) - 1;
        if !self.reader.read(at.frame, &mut self.buffers[buffer])? {
            return Ok(None);
        }
        let counts = self.below(at, again)?;
        let seen = self.directories.entry(key).or_default();
        if !at.is_whole() {
            return Ok(Some(counts));
        }
        seen.walked.insert(at.path);
        // The guest may have changed the table since it was counted first.
        Ok(Some(*seen.counts.get_or_insert(counts)))
    }

    /// Walks the table in the buffer of its level.
    fn below(&mut self, at: &Place, again: bool) -> Result<Counts, WalkError> {
        let buffer = usize::from(at.level) - 1;
        let mut counts = Counts::default();
        let (mut index, last) = at.indices();
        while index <= last {
            let entry = self.buffers[buffer][index];
            let mistake = match Entry::read(self.found.paging, at.level, entry) {
                Entry::Absent => None,
                Entry::Reserved(mistake) => Some(mistake),
                Entry::Leaf(frame) => {
                    let entries = &self.buffers[buffer][index..=last];
                    let alike = self.found.leaves(at, index, frame, entries)?;
                    counts.leaves(at.level, alike as u64);
                    index += alike;
                    continue;
                }
                Entry::Table(frame) => {
                    let (first, last) = at.part(index, 1);
                    let below = self.table(&Place {
                        frame,
                        level: at.level - 1,
                        path: at.path.through(entry),
                        base: at.base + ((index as u64) << Space::shift(at.level)),
                        first,
                        last,
                    })?;
                    below.inspect(|below| counts.add(below));
                    below.is_none().then_some(Mistake::Outside)
                }
            };
            if let Some(mistake) = mistake {
                counts.mistake(mistake);
                self.found.mistake(at, index, entry, mistake, again);
            }
            index += 1;
        }
        Ok(counts)
    }

    /// Level 1, where nearly all entries are.
    fn page_table(&mut self, at: &Place) -> Result<Option<Counts>, WalkError> {
        let seen = self.page_tables.entry(at.frame).or_default();
        let again = seen.known;
        if again && at.is_whole() && !self.covers.is_new(at.path, seen.walked) {
            return Ok(Some(seen.counts()));
        }
        let table = &mut self.buffers[0];
        if !self.reader.read(at.frame, table)? {
            self.page_tables.remove(&at.frame);
            return Ok(None);
        }
        let mut now = PageTable::default();
        let (mut index, last) = at.indices();
        while index <= last {
            let entry = table[index];
            match Entry::read(self.found.paging, 1, entry) {
                Entry::Leaf(frame) => {
                    let entries = &table[index..=last];
                    let alike = self.found.leaves(at, index, frame, entries)?;
                    now.mappings += alike as u16;
                    index += alike;
                    continue;
                }
                Entry::Reserved(mistake) => {
                    now.reserved += 1;
                    self.found.mistake(at, index, entry, mistake, again);
                }
                // There are no tables below level 1.
                Entry::Absent | Entry::Table(_) => {}
            }
            index += 1;
        }
        if !at.is_whole() {
            return Ok(Some(now.counts()));
        }
        if !again {
            *seen = PageTable { known: true, ..now };
        }
        seen.walked.insert(at.path);
        Ok(Some(seen.counts()))
    }
}

/// Hashes frame numbers in a few cycles, by a secret: the guest, who chooses the numbers, cannot tell
/// which collide.
#[derive(Clone, Copy)]
struct Secret(u64);

impl Secret {
    fn new() -> Self {
        Self(RandomState::new().hash_one(0u64) | 1)
    }
}

impl BuildHasher for Secret {
    type Hasher = FrameHasher;

    fn build_hasher(&self) -> FrameHasher {
        FrameHasher(self.0)
    }
}

struct FrameHasher(u64);

impl Hasher for FrameHasher {
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }

    /// A product of 128 bits, folded: each bit of the key reaches all bits of the hash.
    fn write_u64(&mut self, key: u64) {
        let product = u128::from(self.0 ^ key) * u128::from(self.0.rotate_left(32) | 1);
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What was found.
struct Found<'a> {
    paging: &'a Paging,
    runs: Runs,
    ranges: usize,
    write_exec: Vec<WriteExecMapping>,
    malformed: Vec<Malformed>,
}

impl Found<'_> {
    /// Takes the leaf that is the first of `entries` and all that go on as it does, and tells how
    /// many. They are those of the table `at` from `index` on; the first maps `frame`.
    #[inline]
    fn leaves(
        &mut self,
        at: &Place,
        index: usize,
        frame: u64,
        entries: &[u64],
    ) -> Result<usize, WalkError> {
        let shift = Space::shift(at.level);
        let room =
            ((1 << (self.paging.physical_bits - PAGE_SHIFT as u8)) - frame) >> (shift - PAGE_SHIFT);
        let entries = &entries[..entries.len().min(room as usize)];
        let telling = entry::telling(self.paging, at.level);
        let alike = match at.level {
            1 => alike::<12>(entries, telling),
            2 => alike::<21>(entries, telling),
            _ => alike::<30>(entries, telling),
        };
        let (first, last) = at.part(index, alike);
        let skipped = first - (at.base + ((index as u64) << shift));
        let frame = frame + (skipped >> PAGE_SHIFT);
        let pages = (last - first + 1) >> PAGE_SHIFT;
        let rights = at.path.rights(self.paging, entries[0]);
        if rights.is_write_exec() {
            self.write_exec(self.paging.levels.canonical(first), frame, pages);
        }
        self.runs
            .add(frame, pages, rights)
            .map_err(|TooMany| WalkError::TooManyRanges(self.ranges))?;
        Ok(alike)
    }

    #[cold]
    fn write_exec(&mut self, va: u64, frame: u64, pages: u64) {
        let range = |start, end| GfnRange::new(start, end).expect("a mapping has pages");
        let last = frame + pages - 1;
        if let Some(before) = self.write_exec.last_mut() {
            let frames = before.frames;
            let follows = before.va.wrapping_add(frames.pages() << PAGE_SHIFT) == va;
            if follows && frames.end().number() + 1 == frame {
                before.frames = range(frames.start().number(), last);
                return;
            }
        }
        if self.write_exec.len() < WRITE_EXEC_MAX {
            let frames = range(frame, last);
            self.write_exec.push(WriteExecMapping { va, frames });
        }
    }

    /// Keeps the first few malformed entries, those of a table that is walked `again` not again.
    #[cold]
    fn mistake(&mut self, at: &Place, index: usize, entry: u64, mistake: Mistake, again: bool) {
        if !again {
            let malformed = Malformed {
                va: self.paging.levels.canonical(at.part(index, 1).0),
                level: at.level,
                entry,
                mistake,
            };
            keep_example(&mut self.malformed, malformed);
        }
    }
}

/// How many entries, the first among them, map page after page of `1 << SHIFT` bytes with the same
/// rights, by what their bits in `telling` say.
#[inline]
fn alike<const SHIFT: u32>(entries: &[u64], telling: u64) -> usize {
    let wanted = entries[0] & telling;
    let differs =
        |n: usize, entry: u64, wanted: u64| entry ^ wanted.wrapping_add((n as u64) << SHIFT);
    let count = |from: usize, to: usize| {
        let entries = entries[from..to].iter().enumerate();
        entries
            .take_while(|&(n, &entry)| differs(from + n, entry, wanted) & telling == 0)
            .count()
    };
    // Few at first; then many at once, with no branch for each, which makes vector instructions.
    let mut alike = count(0, entries.len().min(CHUNK));
    if alike < CHUNK {
        return alike;
    }
    for chunk in entries[CHUNK..].as_chunks::<CHUNK>().0 {
        let wanted = wanted.wrapping_add((alike as u64) << SHIFT);
        let differ = |any, (n, &entry): (usize, &u64)| any | differs(n, entry, wanted);
        if chunk.iter().enumerate().fold(0, differ) & telling != 0 {
            break;
        }
        alike += CHUNK;
    }
    alike + count(alike, entries.len())
}

#[cfg(test)]
#[path = "collective_tests.rs"]
pub(super) mod tests;
