// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio device through which a guest locks its own memory against an attacker who already runs
//! code in its kernel: what it has locked, nothing in the guest unlocks before the next system reset.
//!
//! This library has the device, and enforces what guests ask of it, in the process of a VMM that is
//! written in Rust: x86-64, on the KVM of a stock kernel. `docs/embedding.md` goes through it step by
//! step, `docs/device.md` is the specification of the device and `docs/threat-model.md` says what is
//! promised against whom. The program `vhost-guard` is the same device beside QEMU, whose `vm-guard`
//! enforces there (README.md).
//!
//! # Parts
//!
//! A request walks one way: the device takes it out of the guest's queue and holds it against what is
//! in force, whoever owns the VM carries it out, whole or not at all, and the answer goes back into the
//! queue. **OK means enforced**: a guest reads it when every vCPU is bound, and every device that goes
//! through [`DeviceMemory`](vm::kvm::DeviceMemory).
//!
//! | module | for a VMM |
//! | --- | --- |
//! | [`device`] | [`Device`](device::Device), the virtio device without a transport |
//! | [`device::embedded`] | [`Embedded`](device::embedded::Embedded): its queues, for whatever virtio transport the VMM has |
//! | [`vm::kvm`] | [`KvmVm`](vm::kvm::KvmVm): enforces on a KVM VM of this process. [`Vcpus`](vm::kvm::Vcpus) is what the VMM does for it, [`DeviceMemory`](vm::kvm::DeviceMemory) what the VMM's other devices write through |
//! | [`vm::enforcer`] | for an enforcer of one's own in place of `KvmVm`: the traits, and what a violation is |
//! | [`protect`] | what can be asked for, as data: pages, rights, orders, the table of what is in force. [`protect::msr`] the same for MSRs |
//! | [`report`] | what is known of the VM for whoever manages it, and each violation as it happens |
//! | [`msr_policy`] | the host's rules for MSRs, from a file |
//! | [`paging`] | reads a guest's page tables; used by the device, of use on its own |
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use kvm_ioctls::VmFd;
//! use vhost_guard::device::Device;
//! use vhost_guard::device::embedded::Embedded;
//! use vhost_guard::vm::kvm::{KvmVm, Options, Vcpus};
//! use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
//!
//! # fn run(
//! #     vm: Arc<VmFd>, memory: Arc<GuestMemoryMmap>, options: Options, vcpus: Arc<dyn Vcpus>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! // The memslots of `memory` are made and kept by this.
//! let guarded = Arc::new(KvmVm::new(vm, Arc::clone(&memory), options)?);
//! let device = Device::new(guarded.clone(), None, None);
//! let events = Arc::downgrade(&device);
//! guarded.start(events, vcpus)?;
//! // For the transport.
//! let queues = Embedded::new(device, GuestMemoryAtomic::from(memory))?;
//! // For the thread of vCPU 0: `before_run` and `after_exit` go around its KVM_RUN.
//! let vcpu = guarded.vcpu(0);
//! # drop((queues, vcpu));
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! `companion`, on by default: the program, with the modules `daemon`, `fd`, `socket` and
//! `report::events_file` that are its own. A VMM takes `default-features = false`, and has no
//! vhost-user, no socket and no command line then.
//!
//! # What a VMM may count on
//!
//! * All that a guest says is taken for hostile, here: whatever a transport passes on need not have been
//!   checked. Memory, time under a lock and log lines that a guest can cause are bounded.
//! * No call panics, but where its documentation says so. What the VMM implements must not panic
//!   either: the thread that calls it may end then, and guests wait for answers; nothing is
//!   loosened by that.
//! * Log lines go to the crate `log`. Those that a guest can cause have a limited rate.
//! * Threads are started by [`Embedded::new`](device::embedded::Embedded::new) (`guard-queues`), by
//!   [`KvmVm::start`](vm::kvm::KvmVm::start) (`kvm-guard`), and when a guest has its page tables read
//!   for the first time (`guard-walk`). No signal handler is set, and no environment variable read.
//! * Sizes and addresses are in bytes and guest-physical unless a type ([`Gfn`](protect::Gfn)) or name
//!   says otherwise; ranges that are types have an inclusive end.
//!
//! # Versions
//!
//! Rust 1.89 or later. As long as the version is 0.x, a new x may change any interface here, and
//! may need a later Rust; what comes between two x changes none. Types of `vm-memory`,
//! `kvm-ioctls` and `bitflags`, and traits of `serde`, are part of the interface, so a new
//! incompatible version of these is one of this. An enum that is not `#[non_exhaustive]`
//! is so on purpose: who enforces has to deal with every kind. The device that a guest sees has a
//! version of its own (`docs/device.md`), which does not change with these.

#[cfg(feature = "companion")]
pub mod daemon;
pub mod device;
#[cfg(feature = "companion")]
pub mod fd;
mod log_limit;
pub mod msr_policy;
pub mod paging;
pub mod protect;
pub mod report;
#[cfg(feature = "companion")]
pub mod socket;
mod token_bucket;
pub mod vm;
