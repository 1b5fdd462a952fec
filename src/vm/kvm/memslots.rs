// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memslots of guest memory that this process has mapped: the one system call that takes an
//! address; and whether KVM tells of stores to them that it cannot emulate.

// KVM cannot check that a slot's host memory is there for as long as the slot is.
#![allow(unsafe_code)]

use std::mem;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MEM_READONLY, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Error, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use super::slots::{Op, Region, Slot};
use crate::log_limit::{LogLimit, log_limited};

static KEPT: LogLimit = LogLimit::new(3);
static UNTOLD: LogLimit = LogLimit::new(1);

/// A VM, and the memory that its slots may be of.
pub(super) struct Memslots {
    vm: Arc<VmFd>,
    /// Kept for as long as there are slots of it: whoever drops this has deleted them.
    memory: Arc<GuestMemoryMmap>,
}

impl Memslots {
    pub(super) fn new(vm: Arc<VmFd>, memory: Arc<GuestMemoryMmap>) -> Self {
        Self { vm, memory }
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Guest memory, as slots are planned for it.
    pub(super) fn regions(&self) -> Vec<Region> {
        let regions = self.memory.iter();
        regions
            .map(|region| {
                let mapped: &MmapRegion = region;
                Region {
                    gpa: region.start_addr().raw_value(),
                    size: region.len(),
                    host: mapped.as_ptr() as u64,
                }
            })
            .collect()
    }

    /// This process keeps the memory for good: slots of it may stay.
    pub(super) fn keep_memory(&self) {
        mem::forget(Arc::clone(&self.memory));
    }

    /// Deletes these slots, which are all that there are: the memory may go then. If KVM keeps one, this
    /// process keeps the memory for good.
    pub(super) fn let_go(&self, slots: impl Iterator<Item = Slot>) {
        for slot in slots {
            if let Err(error) = self.carry_out(Op::Delete(slot)) {
                log_limited!(
                    KEPT,
                    Error,
                    "KVM keeps a memslot, and so guest memory stays: {error}"
                );
                self.keep_memory();
            }
        }
    }

    /// Has KVM leave all instructions to user space that it cannot emulate, or as it does by default
    /// those of CPL 0 only: what is a user's is an undefined instruction to it. For the guest's sake
    /// it must not be, if the reason is a read-only slot.
    pub(super) fn tell_unemulated(&self, all: bool) {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
            args: [all.into(), 0, 0, 0],
            ..Default::default()
        };
        if let Err(error) = self.vm.enable_cap(&cap) {
            log_limited!(
                UNTOLD,
                Warn,
                "denied stores that KVM cannot emulate will be undefined instructions: {error}"
            );
        }
    }

    /// Carries out one operation on a slot of [`Self::regions`].
    pub(super) fn carry_out(&self, op: Op) -> Result<(), Error> {
        let (
            Slot {
                id,
                gpa,
                host,
                readonly,
                ..
            },
            size,
        ) = match op {
            Op::Delete(slot) => (slot, 0),
            Op::Add(slot) => (slot, slot.size),
        };
        debug_assert!(self.regions().iter().any(|region| {
            region.gpa <= gpa
                && gpa + size <= region.gpa + region.size
                && host - region.host == gpa - region.gpa
        }));
        let region = kvm_userspace_memory_region {
            slot: id.into(),
            flags: if readonly && size != 0 {
                KVM_MEM_READONLY
            } else {
                0
            },
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the planner cuts slots out of `regions()` only (checked above in debug builds).
        // These are mappings that `self.memory` keeps, and slots go before it does (`let_go`). The
        // VM has no other slots there: the planner was told which numbers are ours. Guest memory
        // is shared with the guest, so nothing in this process holds references into it.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}
