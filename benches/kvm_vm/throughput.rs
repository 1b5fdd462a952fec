// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest gets done on pages that are protected, or beside them, and the same on the same
//! pages while nothing is; what a refused store takes, and an exit for an address without memory.

use std::iter;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::{Kvm, VcpuExit};
use vhost_guard::protect::GfnRange;
use vhost_guard::vm::kvm::{KvmVcpu, Verdict};

use crate::bare;
use crate::common::micros;
use crate::enforced::{Cost, Enforced, gfns, order};
use crate::guest::{DATA, DATA_SIZE, Guest, NOWHERE, Program, RAM};
use crate::{Compared, median, micros_of};

const FIRST: u64 = DATA >> 12;
const END: u64 = (DATA + DATA_SIZE) >> 12;
/// Stores that are timed together.
const STORES: u32 = 1000;

struct Machine {
    enforced: Enforced,
    guest: Guest,
    guarded: KvmVcpu,
}

impl Machine {
    fn new(kvm: &Kvm, huge_pages: bool) -> Self {
        let memory = Arc::new(bare::memory(RAM));
        bare::huge_pages(&memory, RAM, huge_pages);
        let enforced = Enforced::new(kvm, &memory);
        let vcpu = enforced.vm.create_vcpu(0).expect("a vCPU can be created");
        Self {
            guest: Guest::new(vcpu, &memory),
            guarded: enforced.kvm_vm.vcpu(0),
            enforced,
        }
    }

    fn set(&mut self, ranges: &[GfnRange], protect: bool) {
        let order = order(ranges, protect);
        self.enforced.change(order, &mut Cost::default());
    }

    /// What one store to `gpa` takes, of many: the exit, and the answer if there is to be one.
    fn store(&mut self, gpa: u64, answered: bool) -> f64 {
        let mut stores = |count| {
            for _ in 0..count {
                let vcpu = &mut self.guest.vcpu;
                if answered {
                    self.guarded.before_run(vcpu).expect("no fault is due");
                }
                let exit = vcpu.run();
                assert!(matches!(exit, Ok(VcpuExit::MmioWrite(at, _)) if at == gpa));
                if answered {
                    assert_eq!(self.guarded.after_exit(vcpu), Verdict::Done);
                }
            }
        };
        // What KVM makes for this page is made once.
        stores(10);
        let start = Instant::now();
        stores(STORES);
        micros_of(start.elapsed()) / f64::from(STORES)
    }

    /// What it takes to ask KVM for the registers, as `after_exit` does.
    fn registers(&self) -> f64 {
        let start = Instant::now();
        for _ in 0..STORES {
            self.guest.vcpu.get_regs().expect("KVM tells");
        }
        micros_of(start.elapsed()) / f64::from(STORES)
    }

    /// From KVM_RUN to a store that is refused until it is told of, in microseconds.
    fn told_after(&mut self) -> f64 {
        // What is on its way is told of before an answer.
        let other = [gfns(FIRST + 2..FIRST + 3)];
        self.set(&other, true);
        self.set(&other, false);
        self.enforced.forget_violations();
        let start = Instant::now();
        let vcpu = &mut self.guest.vcpu;
        let exit = vcpu.run();
        assert!(matches!(exit, Ok(VcpuExit::MmioWrite(DATA, _))));
        assert_eq!(self.guarded.after_exit(vcpu), Verdict::Done);
        micros_of(self.enforced.violation() - start)
    }
}

/// A line of name=value for each program, layout of protected pages and size of host pages.
pub(crate) fn table(kvm: &Kvm, rounds: usize) {
    let whole = || vec![gfns(FIRST..END)];
    let second = || {
        (FIRST + 1..END)
            .step_by(2)
            .map(|page| gfns(page..page + 1))
            .collect()
    };
    let cases: [(_, _, Vec<_>, u64); 5] = [
        (Program::Read, "all", whole(), 64),
        (Program::Read, "every-second", second(), 64),
        (Program::Execute, "all", whole(), 400),
        (Program::Execute, "every-second", second(), 400),
        (Program::Write, "neighbours", second(), 128),
    ];
    for huge_pages in [false, true] {
        let mut machine = Machine::new(kvm, huge_pages);
        for (program, pages, ranges, passes) in &cases {
            let mut compared = Compared::default();
            let took = |machine: &mut Machine, protect| {
                machine.set(ranges, protect);
                // KVM has no mapping of these pages: the first pass makes them.
                machine.guest.run(*program, 1);
                micros(|| machine.guest.run(*program, *passes))
            };
            machine.set(ranges, true);
            for _ in 0..3 * rounds {
                let free = took(&mut machine, false);
                let protected = took(&mut machine, true);
                compared.add(free, protected);
            }
            machine.set(&whole(), false);
            println!(
                "GUEST what={} protected={pages} host_pages={} {}",
                format!("{program:?}").to_lowercase(),
                if huge_pages { "2M" } else { "4K" },
                compared.columns("free", "protected"),
            );
        }
    }
}

/// A line of name=value for each privilege level.
pub(crate) fn violations(kvm: &Kvm, rounds: usize) {
    let mut machine = Machine::new(kvm, false);
    machine.set(&[gfns(FIRST..FIRST + 1)], true);
    for cpl in [3, 0] {
        let mut compared = Compared::default();
        let (mut unanswered, mut registers, mut told) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..3 * rounds {
            machine.guest.store_to(cpl, NOWHERE);
            let bare = machine.store(NOWHERE, false);
            machine.guest.store_to(cpl, DATA);
            unanswered.push(machine.store(DATA, false));
            compared.add(bare, machine.store(DATA, true));
            registers.push(machine.registers());
            let some = iter::repeat_with(|| machine.told_after()).take(100);
            told.push(median(some.collect()));
        }
        println!(
            "VIOLATION cpl={cpl} {} locked_exit_us={:.2} registers_us={:.2} told_us={:.2}",
            compared.columns("exit", "refused"),
            median(unanswered),
            median(registers),
            median(told),
        );
    }
}
