// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The yardstick for request latency on KVM: what the memslot ioctls of one lock request cost when a process does nothing
//! else. Prints one line for each number of ranges. Knows nothing of vhost-guard; `scripts/bench` sets it beside the
//! latency that a guest sees.
//!
//! A request that protects N separate pages inside one memslot of guest RAM deletes that slot and adds 2N + 1 pieces,
//! read-write and read-only in turn.

// The memslot ioctl takes the address of memory that it cannot check.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 4096;
const RAM: u64 = 256 << 20;

fn main() {
    let runs: usize = std::env::var("RUNS")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(11);
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(err) => {
            println!("SKIP memslots: /dev/kvm cannot be opened: {err}");
            return;
        }
    };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM as usize)])
        .expect("256 MiB of address space can be mapped");
    let host = memory
        .get_host_address(GuestAddress(0))
        .expect("address 0 is mapped") as u64;

    for ranges in [1u64, 16, 256, 4096, 8192] {
        // A new VM for each size, with a vCPU, so that every run starts from the same state.
        let vm = kvm.create_vm().expect("a VM can be created");
        let _vcpu = vm.create_vcpu(0).expect("a vCPU can be created");
        set(&vm, 0, host, 0, RAM, 0);

        let mut times: Vec<Duration> = (0..runs)
            .map(|_| {
                let start = Instant::now();
                set(&vm, 0, host, 0, 0, 0);
                for (slot, (first, last, flags)) in pieces(ranges).enumerate() {
                    set(&vm, slot as u32, host, first, last - first, flags);
                }
                let taken = start.elapsed();
                // Back to one slot; not measured.
                for slot in 0..=2 * ranges as u32 {
                    set(&vm, slot, host, 0, 0, 0);
                }
                set(&vm, 0, host, 0, RAM, 0);
                taken
            })
            .collect();
        times.sort_unstable();
        println!("BARE n={ranges} ns={}", times[runs / 2].as_nanos());
    }
}

/// The read-write and read-only pieces of RAM when every other page of its first part is protected, as
/// (start, end, flags) in bytes.
fn pieces(ranges: u64) -> impl Iterator<Item = (u64, u64, u32)> {
    (0..ranges)
        .flat_map(|i| {
            let page = (2 * i + 1) * PAGE;
            [
                (page - PAGE, page, 0),
                (page, page + PAGE, KVM_MEM_READONLY),
            ]
        })
        .chain(std::iter::once((2 * ranges * PAGE, RAM, 0)))
}

fn set(vm: &VmFd, slot: u32, host: u64, start: u64, size: u64, flags: u32) {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: start,
        memory_size: size,
        userspace_addr: host + start,
    };
    // SAFETY: `host` is the start of a private mapping of RAM bytes that lives until main returns, `start + size` never
    // exceeds RAM (see pieces()), and no vCPU of this VM ever runs.
    unsafe { vm.set_user_memory_region(region) }.expect("the memslot ioctl succeeds");
}
