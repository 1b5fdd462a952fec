// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What it takes to protect N ranges, and one more when N are: the ioctls alone, the planner, and
//! `KvmVm` from the call until its answer. Both VMs have the same memory and go through the same
//! memslot operations, in turns.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use criterion::Criterion;
use kvm_ioctls::{Kvm, VcpuFd};
use vhost_guard::protect::GfnRange;
use vhost_guard::vm::kvm::slots::Frames;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bare::{self, Bare};
use crate::enforced::{self, Enforced, gfns, order};
use crate::guest::{DATA, Guest};
use crate::{Compared, median, micros_of};

/// As much as the guests of scripts/bench have.
const RAM: u64 = 512 << 20;
const SIZES: [u64; 5] = [1, 16, 256, 4096, 8192];
/// Most ranges in one request.
const REQUEST: usize = 4096;

/// Every fourth page, `n` of them.
fn pages(n: u64) -> Vec<GfnRange> {
    (0..n).map(|i| gfns(4 * i + 5..4 * i + 6)).collect()
}

/// The page between two of them, in their middle, or before the only one: a slot of a few pages
/// becomes three.
fn one_more(n: u64) -> GfnRange {
    let page = 4 * (n / 2) + 3;
    gfns(page..page + 1)
}

fn everything() -> GfnRange {
    gfns(0..RAM >> 12)
}

/// The two VMs.
struct Both {
    bare: Bare,
    enforced: Enforced,
    memory: Arc<GuestMemoryMmap>,
    /// The vCPU of the other VM, if it stands.
    standing: Option<VcpuFd>,
    /// Whose turn it is to be first.
    bare_first: bool,
}

/// What the same change took in both.
#[derive(Default)]
struct Cost {
    bare: bare::Cost,
    enforced: enforced::Cost,
}

impl Both {
    /// The bare VM's vCPU stands in any case.
    fn new(kvm: &Kvm, runs: bool) -> Self {
        let memory = Arc::new(bare::memory(RAM));
        let enforced = Enforced::new(kvm, &memory);
        let vcpu = enforced.vm.create_vcpu(0).expect("a vCPU can be created");
        let standing = if runs {
            let mut guest = Guest::new(vcpu, &memory);
            guest.count();
            enforced.door.run(guest.vcpu);
            None
        } else {
            Some(vcpu)
        };
        Self {
            bare: Bare::new(kvm, RAM),
            enforced,
            memory,
            standing,
            bare_first: true,
        }
    }

    /// Waits until the vCPU is back in the guest, if it runs.
    fn settle(&self) {
        if self.standing.is_none() {
            let count = || -> u64 { self.memory.read_obj(GuestAddress(DATA)).expect("RAM") };
            let before = count();
            while count() == before {
                thread::yield_now();
            }
        }
    }

    /// As many requests as it takes.
    fn change_bare(&mut self, ranges: &[GfnRange], protect: bool, cost: &mut bare::Cost) {
        for request in ranges.chunks(REQUEST) {
            let frames = |&range: &GfnRange| Frames {
                range,
                readonly: protect,
            };
            let changes: Vec<_> = request.iter().map(frames).collect();
            self.bare.change(&changes, cost);
        }
    }

    fn change_enforced(&mut self, ranges: &[GfnRange], protect: bool, cost: &mut enforced::Cost) {
        for request in ranges.chunks(REQUEST) {
            self.settle();
            let order = order(request, protect);
            self.enforced.change(order, cost);
        }
    }

    fn change(&mut self, ranges: &[GfnRange], protect: bool) -> Cost {
        let mut cost = Cost::default();
        if self.bare_first {
            self.change_bare(ranges, protect, &mut cost.bare);
        }
        self.change_enforced(ranges, protect, &mut cost.enforced);
        if !self.bare_first {
            self.change_bare(ranges, protect, &mut cost.bare);
        }
        cost
    }

    fn free(&mut self) {
        self.change(&[everything()], false);
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        self.enforced.door.end();
    }
}

pub(crate) fn times(kvm: &Kvm, criterion: &mut Criterion) {
    for n in SIZES {
        let mut group = criterion.benchmark_group(format!("kvm_vm {n}"));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(100))
            .measurement_time(Duration::from_secs(1));
        let mut both = Both::new(kvm, false);
        let (ranges, more) = (pages(n), [one_more(n)]);
        let free = [everything()];
        group.bench_function("ioctls, all", |b| {
            b.iter_custom(|runs| {
                let mut cost = bare::Cost::default();
                for _ in 0..runs {
                    both.change_bare(&ranges, true, &mut cost);
                    both.change_bare(&free, false, &mut bare::Cost::default());
                }
                cost.ioctls
            });
        });
        group.bench_function("KvmVm, all", |b| {
            b.iter_custom(|runs| {
                let mut cost = enforced::Cost::default();
                for _ in 0..runs {
                    both.change_enforced(&ranges, true, &mut cost);
                    both.change_enforced(&free, false, &mut enforced::Cost::default());
                }
                cost.all
            });
        });
        both.change(&ranges, true);
        group.bench_function("ioctls, one more", |b| {
            b.iter_custom(|runs| {
                let mut cost = bare::Cost::default();
                for _ in 0..runs {
                    both.change_bare(&more, true, &mut cost);
                    both.change_bare(&more, false, &mut bare::Cost::default());
                }
                cost.ioctls
            });
        });
        group.bench_function("KvmVm, one more", |b| {
            b.iter_custom(|runs| {
                let mut cost = enforced::Cost::default();
                for _ in 0..runs {
                    both.change_enforced(&more, true, &mut cost);
                    both.change_enforced(&more, false, &mut enforced::Cost::default());
                }
                cost.all
            });
        });
    }
}

/// The columns of a line of the table.
#[derive(Default)]
struct Line {
    ops: usize,
    /// KvmVm against the ioctls.
    compared: Compared,
    bare_cpu: Vec<f64>,
    plan: Vec<f64>,
    before: Vec<f64>,
    stopping: Vec<f64>,
    standing: Vec<f64>,
}

impl Line {
    fn add(&mut self, cost: &Cost) {
        self.ops = cost.bare.ops;
        let ours = micros_of(cost.enforced.all);
        self.compared.add(micros_of(cost.bare.ioctls), ours);
        self.bare_cpu.push(cost.bare.ioctls_cpu_us);
        self.plan.push(cost.bare.plan_us);
        self.before.push(micros_of(cost.enforced.before));
        self.stopping.push(micros_of(cost.enforced.stopping));
        self.standing.push(micros_of(cost.enforced.standing));
    }

    fn print(self, what: &str, runs: bool, n: u64) {
        let [bare_cpu, plan, before, stopping, standing] = [
            self.bare_cpu,
            self.plan,
            self.before,
            self.stopping,
            self.standing,
        ]
        .map(median);
        println!(
            "KVM_VM what={what} vcpu={} n={n} ops={} {} bare_cpu_us={bare_cpu:.2} \
             plan_us={plan:.2} before_us={before:.2} \
             stopping_us={stopping:.2} standing_us={standing:.2}",
            if runs { "running" } else { "standing" },
            self.ops,
            self.compared.columns("bare", "kvm_vm"),
        );
    }
}

/// For each size a line of name=value for all at once, and one for one more; and the same while the
/// vCPU of `KvmVm`'s VM runs.
pub(crate) fn table(kvm: &Kvm, rounds: usize) {
    for runs in [false, true] {
        for n in SIZES {
            // What is short scatters more.
            let rounds = rounds * (4096 / n as usize).clamp(1, 8);
            lines(kvm, runs, n, rounds);
        }
    }
}

fn lines(kvm: &Kvm, runs: bool, n: u64, rounds: usize) {
    let mut both = Both::new(kvm, runs);
    let (ranges, more) = (pages(n), [one_more(n)]);
    let mut all = Line::default();
    for _ in 0..rounds {
        all.add(&both.change(&ranges, true));
        both.free();
        both.bare_first = !both.bare_first;
    }
    all.print("all", runs, n);
    both.change(&ranges, true);
    let mut one = Line::default();
    for _ in 0..8 * rounds {
        one.add(&both.change(&more, true));
        both.change(&more, false);
        both.bare_first = !both.bare_first;
    }
    one.print("one-more", runs, n);
}
