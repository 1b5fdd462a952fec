// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The companion of QEMU's `vm-guard`: a vhost-user device through which a guest locks its own
//! memory against an attacker who already runs code in it.
//!
//! A request walks one way: [`device`] takes it out of the guest's control queue and has
//! [`protect`] check it, [`vm`] carries it to whoever owns the VM, and the answer goes back into
//! the queue. What a guest's page tables say is found out by [`paging`]. What happens is told to
//! people and programs by [`report`]. `daemon` ties the parts to sockets; a VMM that owns the VM
//! itself has the same device in its own process, by [`device::embedded`]. The formats are specified
//! in `docs/device.md` and `docs/control-channel.md`.

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
