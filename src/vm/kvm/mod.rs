// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM of this very process: KVM's VM ioctls work in no other (`EIO`).
//!
//! [`KvmVm`] enforces on it what the device is asked for, for a VMM that is made with this library.
//! [`slots`] plans memslots; rules for MSRs become KVM's MSR filter.

mod exit;
mod memory;
mod memslots;
mod msr_checks;
mod msrs;
pub mod slots;
mod unemulated;
mod vcpu;
mod vcpu_msrs;
mod violations;
mod vm;

pub use memory::DeviceMemory;
pub use msrs::MsrPolicyError;
pub use vcpu::{KvmVcpu, Verdict};
pub use vm::{KvmVm, NewError, NotReset, Options, StartError, Vcpus};
