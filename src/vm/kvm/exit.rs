// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a vCPU has left KVM_RUN with, as far as protections are concerned: copied out of
//! `struct kvm_run` once. Decides nothing.

// A union is read.
#![allow(unsafe_code)]

use kvm_bindings::{KVM_EXIT_MMIO, kvm_run};

/// An exit that may be about something protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// KVM_EXIT_MMIO, a store: the first `len` bytes of `data` to `gpa`.
    Store { gpa: u64, data: [u8; 8], len: usize },
}

impl Exit {
    /// The exit in `run`, if it is one of these.
    pub(super) fn of(run: &kvm_run) -> Option<Self> {
        match run.exit_reason {
            KVM_EXIT_MMIO => {
                // SAFETY: of plain integers, so whatever is there is a value; `exit_reason` says that
                // KVM has written this member last.
                let mmio = unsafe { run.__bindgen_anon_1.mmio };
                (mmio.is_write != 0).then_some(Self::Store {
                    gpa: mmio.phys_addr,
                    data: mmio.data,
                    len: (mmio.len as usize).min(mmio.data.len()),
                })
            }
            _ => None,
        }
    }
}
