// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What reading a guest's page tables costs: direct maps of 4, 16 and 64 GiB in 4 KiB, 2 MiB and
//! mixed pages, beside a plain sequential read of the same table pages. Criterion has the times of
//! each; the table at the end has the ratio, of runs in turn, and the memory. Knows the library as
//! its users do.
//!
//! `ROUNDS` is how many runs each figure of that table is the median of.

// Counting what is allocated takes an allocator.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use criterion::{Criterion, Throughput};
use rustix::time::{ClockId, clock_gettime};
use vhost_guard::paging::{Levels, Limits, Paging, Space, collective, walk};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

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

/// A guest that consists of nothing but page tables.
struct Guest {
    memory: GuestMemoryMmap,
    tables: u64,
}

impl Guest {
    fn new(gib: u64, pages: Pages) -> Self {
        let areas = gib * 512;
        let level1 = (0..areas).filter(|&area| pages.has_table(area)).count() as u64;
        let tables = 2 + gib + level1;
        let size = (tables * PAGE) as usize;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(TABLES), size)])
            .expect("address space for the tables");
        let guest = Self { memory, tables };
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
        for table in 0..self.tables {
            let at = GuestAddress(TABLES + table * PAGE);
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

    fn space(&self) -> Space {
        Space::kernel_half(PAGING, TABLES).expect("the root is aligned")
    }

    fn collective(&self) -> usize {
        let found = collective(&self.memory, &self.space(), &Limits::default());
        found.expect("within limits").len()
    }

    fn walk(&self) -> u64 {
        let mut sum = 0;
        let walked = walk(&self.memory, &self.space(), &Limits::default(), |mapping| {
            sum ^= mapping.pa;
            ControlFlow::Continue(())
        });
        walked.expect("within limits");
        sum
    }
}

const ALL: [Pages; 4] = [Pages::Small, Pages::Large, Pages::Mixed, Pages::Scattered];
const GIB: [u64; 3] = [4, 16, 64];

fn times(criterion: &mut Criterion) {
    for pages in ALL {
        let mut group = criterion.benchmark_group(format!("direct map, {}", pages.name()));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_secs(1));
        for gib in GIB {
            let guest = Guest::new(gib, pages);
            group.throughput(Throughput::Bytes(guest.tables * PAGE));
            let name = |what| format!("{gib} GiB/{what}");
            group.bench_function(name("read"), |b| b.iter(|| guest.read()));
            group.bench_function(name("collective"), |b| b.iter(|| guest.collective()));
            group.bench_function(name("walk"), |b| b.iter(|| guest.walk()));
        }
    }
}

fn ratios() {
    let rounds = std::env::var("ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(11);
    println!(
        "pages      GiB tables  ranges   read us   collective us (ratio)   walk us (ratio)   heap KiB"
    );
    for pages in ALL {
        for gib in GIB {
            let guest = Guest::new(gib, pages);
            let mut rows: [Vec<f64>; 3] = Default::default();
            for _ in 0..rounds {
                rows[0].push(micros(|| {
                    black_box(guest.read());
                }));
                rows[1].push(micros(|| guest.collective()));
                rows[2].push(micros(|| guest.walk()));
            }
            let [read, collective, walk] = rows.map(median);
            let before = HEAP.load(Ordering::Relaxed);
            PEAK.store(before, Ordering::Relaxed);
            let ranges = guest.collective();
            let heap = PEAK.load(Ordering::Relaxed) - before;
            println!(
                "{:10} {gib:3} {:6} {ranges:7} {read:9.0} {collective:15.0} ({:.2}) {walk:12.0} ({:.2}) {:10}",
                pages.name(),
                guest.tables,
                collective / read,
                walk / read,
                heap / 1024,
            );
        }
    }
}

/// Time that this thread had a CPU: others want it, too.
fn micros<T>(run: impl FnOnce() -> T) -> f64 {
    let now = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
    };
    let start = now();
    black_box(run());
    now() - start
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

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
