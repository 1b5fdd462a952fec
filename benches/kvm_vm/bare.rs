// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The yardstick: a VM whose memslots are changed by nothing but the ioctls that the planner says.
//! The only part of this benchmark that takes addresses.

// KVM cannot check the memory that a slot is of; madvise() is told where it is.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::mm::{Advice, madvise};
use vhost_guard::vm::kvm::slots::{Frames, Op, Region, Slots};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::common::micros;

/// Slot numbers of a stock host.
pub(crate) const IDS: u16 = 32764;

/// What one change took.
#[derive(Default)]
pub(crate) struct Cost {
    pub(crate) ops: usize,
    /// The planner: planning, and taking over what was done.
    pub(crate) plan_us: f64,
    pub(crate) ioctls: Duration,
    /// Of that, the time for which this thread had a CPU and did not wait for the kernel.
    pub(crate) ioctls_cpu_us: f64,
}

pub(crate) struct Bare {
    vm: VmFd,
    // As the other VM has one.
    _vcpu: VcpuFd,
    slots: Slots,
    _memory: GuestMemoryMmap,
}

impl Bare {
    pub(crate) fn new(kvm: &Kvm, ram: u64) -> Self {
        let memory = memory(ram);
        let host = host(&memory);
        let region = Region {
            gpa: 0,
            size: ram,
            host,
        };
        let slots = Slots::new(&[region], 0..IDS).expect("one region");
        let vm = kvm.create_vm().expect("a VM can be created");
        let bare = Self {
            _vcpu: vm.create_vcpu(0).expect("a vCPU can be created"),
            vm,
            slots,
            _memory: memory,
        };
        bare.slots.iter().for_each(|slot| bare.ioctl(Op::Add(slot)));
        bare
    }

    /// Makes a change: what it took is added to `cost`.
    pub(crate) fn change(&mut self, changes: &[Frames], cost: &mut Cost) {
        let mut plan = None;
        cost.plan_us += micros(|| plan = self.slots.plan(changes).ok());
        let plan = plan.expect("slots enough");
        cost.ops += plan.ops().len();
        let start = Instant::now();
        cost.ioctls_cpu_us += micros(|| plan.ops().iter().for_each(|&op| self.ioctl(op)));
        cost.ioctls += start.elapsed();
        cost.plan_us += micros(|| self.slots.apply(plan));
    }

    fn ioctl(&self, op: Op) {
        let (slot, size) = match op {
            Op::Delete(slot) => (slot, 0),
            Op::Add(slot) => (slot, slot.size),
        };
        let readonly = slot.readonly && size != 0;
        let region = kvm_userspace_memory_region {
            slot: slot.id.into(),
            flags: if readonly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: size,
            userspace_addr: slot.host,
        };
        // SAFETY: the planner cuts slots out of the one region, which `_memory` keeps for as long as
        // `vm`, and no vCPU of this VM ever runs.
        unsafe { self.vm.set_user_memory_region(region) }.expect("the memslot ioctl succeeds");
    }
}

/// Guest memory from address 0 on.
pub(crate) fn memory(ram: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)])
        .expect("address space can be mapped")
}

fn host(memory: &GuestMemoryMmap) -> u64 {
    let host = memory.get_host_address(GuestAddress(0));
    host.expect("address 0 is mapped") as u64
}

/// Has the host use huge pages for `memory`, or none. Before anything is there.
pub(crate) fn huge_pages(memory: &GuestMemoryMmap, ram: u64, huge: bool) {
    let advice = if huge {
        Advice::LinuxHugepage
    } else {
        Advice::LinuxNoHugepage
    };
    let host = host(memory) as *mut std::ffi::c_void;
    // SAFETY: this is the whole of the mapping, whose content the advice does not change.
    unsafe { madvise(host, ram as usize, advice) }.expect("this host has huge pages");
}
