// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's `vm-guard` object as the owner of the VM.
//!
//! [`wire`], [`encode`] and [`msr_wire`] are the format of `docs/control-channel.md`, [`channel`]
//! the socket and its thread.

pub(crate) mod channel;
pub(crate) mod encode;
pub(crate) mod msr_wire;
mod session;
pub(crate) mod wire;
