// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM of this very process: KVM's VM ioctls work in no other (`EIO`).
//!
//! [`KvmVm`] enforces on it what the device is asked for, for a VMM that is made with this library.
//! [`slots`] plans memslots.

mod exit;
mod memory;
mod memslots;
pub mod slots;
mod vcpu;
mod violations;
mod vm;

pub use memory::DeviceMemory;
pub use vcpu::{KvmVcpu, Verdict};
pub use vm::{KvmVm, NewError, Options, Vcpus};
