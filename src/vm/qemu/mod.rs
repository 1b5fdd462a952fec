// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's `vm-guard` object as the owner of the VM.
//!
//! [`wire`] is the format of `docs/control-channel.md`, [`channel`] the socket and its thread.

pub mod channel;
pub mod wire;
