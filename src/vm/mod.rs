// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who enforces protections on the VM.
//!
//! [`enforcer`] is what the device sees; `qemu` is QEMU's `vm-guard` object behind the control
//! channel, [`kvm`] is for a VM that this very process owns. Knows `protect`, and nothing of virtio.

pub mod enforcer;
pub mod kvm;
#[cfg(feature = "companion")]
pub(crate) mod qemu;
