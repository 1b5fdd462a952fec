// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What reading a guest's page tables costs: direct maps of 4, 16 and 64 GiB in 4 KiB, 2 MiB and
//! mixed pages, beside a plain sequential read of the same table pages. Criterion has the times of
//! each; the table at the end has the ratio, of runs in turn, and the memory. Knows the library as
//! its users do.
//!
//! `ROUNDS` is how many runs each figure of that table is the median of. `PAGE_TABLES` is
//! `NAME=FILE,CR3,CR4` with the memory of a guest, from address 0 on, whose tables are looked at, too;
//! more of them are separated by `;`. `scripts/bench` makes such files.

// Counting what is allocated takes an allocator.
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashSet;
use std::error::Error;
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{median, micros};
use criterion::{Criterion, Throughput};
use vhost_guard::paging::{Levels, Limits, Paging, Space, collective, walk};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const PAGE: u64 = 4096;
/// Where the tables are: beyond what they map.
const TABLES: u64 = 1 << 37;
/// Linux's direct map.
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

const P: u64 = 1;
const W: u64 = 2;
const LARGE: u64 = 1 << 7;
const NX: u64 = 1 << 63;
/// Accessed, dirty, global: as Linux has it.
const ODD: u64 = 0x160;

const PAGING: Paging = Paging {
    levels: Levels::Four,
    nxe: true,
    wp: true,
    smep: true,
    shadow_stacks: false,
    physical_bits: 46,
    gib_pages: true,
};

#[derive(Clone, Copy, PartialEq)]
enum Pages {
    Small,
    Large,
    /// Every fourth 2 MiB are cut into small pages, of which every 16th is read-only.
    Mixed,
    /// Small pages with frames in another order, so that no two neighbours are one range until they
    /// are sorted.
    Scattered,
}

impl Pages {
    fn name(self) -> &'static str {
        match self {
            Self::Small => "4K",
            Self::Large => "2M",
            Self::Mixed => "mixed",
            Self::Scattered => "scattered",
        }
    }

    /// Whether a 2 MiB area has a level 1 table.
    fn has_table(self, area: u64) -> bool {
        match self {
            Self::Small | Self::Scattered => true,
            Self::Large => false,
            Self::Mixed => area.is_multiple_of(4),
        }
    }

    fn small(self, frame: u64) -> u64 {
        let (frame, writable) = match self {
            Self::Mixed => (frame, if frame.is_multiple_of(16) { 0 } else { W }),
            Self::Scattered => (frame & !511 | ((frame * 5) & 511), W),
            _ => (frame, W),
        };
        (frame * PAGE) | P | writable | NX | ODD
    }
}

/// A guest and its page tables.
struct Guest {
    memory: GuestMemoryMmap,
    space: Space,
    /// Where the tables are, in the order in which the plain read reads them.
    tables: Vec<GuestAddress>,
}

impl Guest {
    /// One that consists of nothing but page tables.
    fn new(gib: u64, pages: Pages) -> Self {
        let areas = gib * 512;
        let level1 = (0..areas).filter(|&area| pages.has_table(area)).count() as u64;
        let tables = 2 + gib + level1;
        let size = (tables * PAGE) as usize;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(TABLES), size)])
            .expect("address space for the tables");
        let guest = Self {
            memory,
            space: Space::kernel_half(PAGING, TABLES).expect("the root is aligned"),
            tables: (0..tables)
                .map(|table| GuestAddress(TABLES + table * PAGE))
                .collect(),
        };
        let address = |table: u64| (TABLES + table * PAGE) | P | W;
        guest.set(0, DIRECT_MAP >> 39 & 511, address(1));
        let mut next = 2 + gib;
        for area in 0..areas {
            if area % 512 == 0 {
                guest.set(1, area / 512, address(2 + area / 512));
            }
            let entry = if pages.has_table(area) {
                for index in 0..512 {
                    guest.set(next, index, pages.small(area * 512 + index));
                }
                next += 1;
                address(next - 1)
            } else {
                area << 21 | P | W | LARGE | NX | ODD
            };
            guest.set(2 + area / 512, area % 512, entry);
        }
        guest
    }

    /// One whose memory was saved.
    fn saved(file: File, cr3: u64, cr4: u64) -> Result<Self, Box<dyn Error>> {
        const LINUX_CR0: u64 = 0x8005_0033;
        const LINUX_EFER: u64 = 0xd01;
        let size = file.metadata()?.len() as usize;
        let range = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range])?;
        let paging = Paging::from_registers(LINUX_CR0, cr4, LINUX_EFER, 52, true)?;
        let root = cr3 & !0xfff;
        let mut guest = Self {
            memory,
            space: Space::kernel_half(paging, root)?,
            tables: Vec::new(),
        };
        let mut seen = HashSet::new();
        guest.find(root, paging.levels.number(), 256, &mut seen);
        Ok(guest)
    }

    /// Notes a table of the upper half and those below it, each once.
    fn find(&mut self, table: u64, level: u8, from: u64, seen: &mut HashSet<u64>) {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let at = GuestAddress(table);
        if !self
            .memory
            .check_range(at, PAGE as usize, Permissions::Read)
            || !seen.insert(table)
        {
            return;
        }
        self.tables.push(at);
        if level == 1 {
            return;
        }
        for index in from..512 {
            let entry = self.memory.read_obj(GuestAddress(table + index * 8));
            let entry = u64::from_le(entry.expect("checked"));
            if entry & P != 0 && entry & LARGE == 0 {
                self.find(entry & ADDRESS, level - 1, 0, seen);
            }
        }
    }

    fn set(&self, table: u64, index: u64, entry: u64) {
        self.memory
            .write_obj(
                entry.to_le(),
                GuestAddress(TABLES + table * PAGE + index * 8),
            )
            .expect("one of the tables");
    }

    /// The yardstick: every entry of every table once, as the library may read guest memory (checked
    /// addresses, a copy of each page), and nothing done with it.
    fn read(&self) -> u64 {
        let mut buffer = [0u64; 512];
        let mut sum = 0u64;
        for &at in &self.tables {
            let slices = self.memory.get_slices(at, PAGE as usize, Permissions::Read);
            let page = slices
                .expect("memory")
                .next()
                .expect("a page")
                .expect("memory");
            page.copy_to(&mut buffer);
            sum = buffer.iter().fold(sum, |sum, entry| sum ^ entry);
        }
        sum
    }

    fn collective(&self) -> usize {
        let found = collective(&self.memory, &self.space, &Limits::default());
        found.expect("within limits").len()
    }

    /// Mappings and an XOR of what they map to.
    fn walk(&self) -> (u64, u64) {
        let (mut mappings, mut sum) = (0, 0);
        let walked = walk(&self.memory, &self.space, &Limits::default(), |mapping| {
            mappings += 1;
            sum ^= mapping.pa;
            ControlFlow::Continue(())
        });
        walked.expect("within limits");
        (mappings, sum)
    }
}

const ALL: [Pages; 4] = [Pages::Small, Pages::Large, Pages::Mixed, Pages::Scattered];
const GIB: [u64; 3] = [4, 16, 64];

/// All guests that are looked at, one after the other, by name.
fn each_guest(mut take: impl FnMut(&str, &Guest)) {
    for pages in ALL {
        for gib in GIB {
            let name = format!("{} {gib} GiB", pages.name());
            take(&name, &Guest::new(gib, pages));
        }
    }
    let saved = std::env::var("PAGE_TABLES").unwrap_or_default();
    for saved in saved.split(';').filter(|saved| !saved.is_empty()) {
        let (name, guest) = parse(saved).unwrap_or_else(|e| panic!("PAGE_TABLES: {saved}: {e}"));
        take(name, &guest);
    }
}

fn parse(saved: &str) -> Result<(&str, Guest), Box<dyn Error>> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
    let (name, rest) = saved.split_once('=').ok_or("no name")?;
    let mut rest = rest.rsplitn(3, ',');
    let mut next = || rest.next().ok_or("not FILE,CR3,CR4");
    let (cr4, cr3, path) = (next()?, next()?, next()?);
    let file = File::options().read(true).write(true).open(path)?;
    Ok((name, Guest::saved(file, number(cr3)?, number(cr4)?)?))
}

fn times(criterion: &mut Criterion) {
    each_guest(|name, guest| {
        let mut group = criterion.benchmark_group(name);
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Bytes(guest.tables.len() as u64 * PAGE));
        group.bench_function("read", |b| b.iter(|| guest.read()));
        group.bench_function("collective", |b| b.iter(|| guest.collective()));
        group.bench_function("walk", |b| b.iter(|| guest.walk().1));
    });
}

/// For each guest a line of name=value: times are medians in microseconds, heap is in KiB.
fn ratios() {
    let rounds = std::env::var("ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(11);
    each_guest(|name, guest| {
        let mut rows: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            rows[0].push(micros(|| guest.read()));
            rows[1].push(micros(|| guest.collective()));
            rows[2].push(micros(|| guest.walk()));
        }
        // Of runs that lay beside each other, which is fairer than that of the medians.
        let ratio = |row: &[f64]| median(row.iter().zip(&rows[0]).map(|(t, r)| t / r).collect());
        let (of_collective, of_walk) = (ratio(&rows[1]), ratio(&rows[2]));
        let [read, collective, walk] = rows.map(median);
        let before = HEAP.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let ranges = guest.collective();
        let heap = PEAK.load(Ordering::Relaxed) - before;
        println!(
            "PAGING guest={} tables={} mapped={} ranges={ranges} read_us={read:.0} \
             collective_us={collective:.0} collective_ratio={of_collective:.2} walk_us={walk:.0} \
             walk_ratio={of_walk:.2} heap_kib={}",
            name.replace(' ', "_"),
            guest.tables.len(),
            guest.walk().0,
            heap / 1024,
        );
    });
}

/// Time that this thread had a CPU: others want it, too.
static HEAP: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: allocates as the system does; the counters touch no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = HEAP.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HEAP.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    times(&mut criterion);
    criterion.final_summary();
    // Without `--bench` this is a test, which only wants to know whether it runs.
    if std::env::args().any(|arg| arg == "--bench") {
        ratios();
    }
}
