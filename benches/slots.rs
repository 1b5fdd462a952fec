// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What planning memslots costs: N separate pages of one region made read-only at once, and one page
//! more when they are. Criterion has the times of both; the table at the end has those of applying,
//! too. Knows the library as its users do, and makes no ioctl: `benches/memslots.rs` does.
//!
//! `ROUNDS` is how many runs each figure of that table is the median of.

mod common;

use std::hint::black_box;
use std::time::Duration;

use common::{median, micros};
use criterion::{BatchSize, Criterion, Throughput};
use vhost_guard::protect::GfnRange;
use vhost_guard::vm::kvm::slots::{Frames, Region, Slots};

const RAM: u64 = 256 << 20;
/// Slot numbers of a stock host.
const IDS: u16 = 32764;
const SIZES: [u64; 5] = [1, 16, 256, 4096, 8192];
/// Changes of one page that are timed together: one is too short for the clock.
const BATCH: u32 = 256;

fn page(number: u64, readonly: bool) -> Frames {
    let range = GfnRange::new(number, number).expect("a frame number");
    Frames { range, readonly }
}

/// Every fourth page, `n` of them.
fn pages(n: u64) -> Vec<Frames> {
    (0..n).map(|i| page(4 * i + 1, true)).collect()
}

/// The page between two of them, in their middle: a slot of three pages becomes three.
fn one_more(n: u64, readonly: bool) -> [Frames; 1] {
    [page(4 * (n / 2) + 3, readonly)]
}

fn read_write() -> Slots {
    let ram = Region {
        gpa: 0,
        size: RAM,
        host: 0x7f00_0000_0000,
    };
    Slots::new(&[ram], 0..IDS).expect("one region")
}

/// Plans, and takes it over as if it had been carried out. How many operations that takes.
fn change(slots: &mut Slots, changes: &[Frames]) -> usize {
    let plan = slots.plan(changes).expect("slots enough");
    let ops = plan.ops().len();
    slots.apply(plan);
    ops
}

fn with(n: u64) -> Slots {
    let mut slots = read_write();
    change(&mut slots, &pages(n));
    slots
}

fn times(criterion: &mut Criterion) {
    for n in SIZES {
        let mut group = criterion.benchmark_group(format!("slots {n}"));
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_secs(1));
        let (empty, full) = (read_write(), with(n));
        let (all, more) = (pages(n), one_more(n, true));
        group.bench_function("plan one more", |b| b.iter(|| full.plan(&more)));
        group.throughput(Throughput::Elements(n));
        group.bench_function("plan all", |b| b.iter(|| empty.plan(&all)));
        group.bench_function("apply all", |b| {
            let planned = || (empty.clone(), empty.plan(&all).expect("slots enough"));
            let apply = |(mut slots, plan): (Slots, _)| {
                slots.apply(plan);
                slots
            };
            b.iter_batched(planned, apply, BatchSize::LargeInput);
        });
    }
}

/// For each size a line of name=value: all at once in microseconds, one more in nanoseconds.
fn table() {
    let rounds = std::env::var("ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(11);
    for n in SIZES {
        let mut rows: [Vec<f64>; 4] = Default::default();
        let (mut slots, mut ops, mut more_ops) = (0, 0, 0);
        let batch = f64::from(BATCH);
        for _ in 0..rounds {
            let (mut held, all) = (read_write(), pages(n));
            rows[0].push(micros(|| held.plan(&all)));
            let plan = held.plan(&all).expect("slots enough");
            ops = plan.ops().len();
            rows[1].push(micros(|| held.apply(plan)));
            slots = held.len();

            let (on, off) = (one_more(n, true), one_more(n, false));
            rows[2].push(
                micros(|| {
                    for _ in 0..BATCH {
                        let _ = black_box(held.plan(black_box(&on)));
                    }
                }) * 1e3
                    / batch,
            );
            // There and back, so that each time as many slots are there.
            rows[3].push(
                micros(|| {
                    for _ in 0..BATCH / 2 {
                        more_ops = change(&mut held, &on);
                        change(&mut held, &off);
                    }
                }) * 1e3
                    / batch,
            );
        }
        let [plan, apply, more_plan, more] = rows.map(median);
        println!(
            "SLOTS n={n} slots={slots} ops={ops} plan_us={plan:.1} apply_us={apply:.1} \
             plan_ns_each={:.0} one_more_ops={more_ops} one_more_plan_ns={more_plan:.0} \
             one_more_ns={more:.0}",
            plan * 1e3 / n as f64,
        );
    }
}

/// Time that this thread had a CPU: others want it, too.
fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    times(&mut criterion);
    criterion.final_summary();
    // Without `--bench` this is a test, which only wants to know whether it runs.
    if std::env::args().any(|arg| arg == "--bench") {
        table();
    }
}
