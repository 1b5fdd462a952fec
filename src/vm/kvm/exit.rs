// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a vCPU has left KVM_RUN with, as far as protections are concerned: copied out of
//! `struct kvm_run` once; and how it is answered there. Decides nothing.

// A union is read.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_MSR_EXIT_REASON_FILTER, KVM_RUN_X86_GUEST_MODE, KVM_RUN_X86_SMM, kvm_run,
};

use super::unemulated::MAX_LEN;

/// An exit that may be about something protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// KVM_EXIT_MMIO, a store: the first `len` bytes of `data` to `gpa`.
    Store { gpa: u64, data: [u8; 8], len: usize },
    /// KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR, because of the filter. The instruction is not over.
    Msr(MsrAccess),
    /// KVM_EXIT_INTERNAL_ERROR, because KVM cannot emulate an instruction. It has done nothing.
    Unemulated {
        /// The instruction, as far as KVM has fetched it: `len` bytes.
        bytes: [u8; MAX_LEN],
        len: usize,
        /// A nested guest's, if KVM says so (Linux 6.11).
        nested: bool,
    },
}

/// An access to an MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MsrAccess {
    Read { msr: u32 },
    Write { msr: u32, value: u64 },
}

impl MsrAccess {
    pub(super) fn msr(self) -> u32 {
        match self {
            Self::Read { msr } | Self::Write { msr, .. } => msr,
        }
    }

    pub(super) fn is_write(self) -> bool {
        matches!(self, Self::Write { .. })
    }

    /// What is to be written; of a read 0.
    pub(super) fn written(self) -> u64 {
        match self {
            Self::Read { .. } => 0,
            Self::Write { value, .. } => value,
        }
    }

    /// Has KVM end the instruction that `run` was left in, with this value if it is a read, or `None`
    /// for a #GP(0), when the vCPU runs next.
    pub(super) fn answer(self, run: &mut kvm_run, value: Option<u64>) {
        run.__bindgen_anon_1.msr.error = value.is_none().into();
        if let (Self::Read { .. }, Some(value)) = (self, value) {
            run.__bindgen_anon_1.msr.data = value;
        }
    }
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
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                // SAFETY: as above.
                let exit = unsafe { run.__bindgen_anon_1.msr };
                let msr = exit.index;
                let access = if run.exit_reason == KVM_EXIT_X86_RDMSR {
                    MsrAccess::Read { msr }
                } else {
                    let value = exit.data;
                    MsrAccess::Write { msr, value }
                };
                (exit.reason == KVM_MSR_EXIT_REASON_FILTER).then_some(Self::Msr(access))
            }
            // In SMM, the guest's memory looks different from here.
            KVM_EXIT_INTERNAL_ERROR if u32::from(run.flags) & KVM_RUN_X86_SMM == 0 => {
                // SAFETY: as above; this has the `suberror` and `ndata` of every internal error.
                let exit = unsafe { run.__bindgen_anon_1.emulation_failure };
                // SAFETY: as above.
                let fetched = unsafe { exit.__bindgen_anon_1.__bindgen_anon_1 };
                let bytes = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
                let len = if exit.ndata >= 3 && exit.flags & bytes != 0 {
                    usize::from(fetched.insn_size).min(MAX_LEN)
                } else {
                    0
                };
                (exit.suberror == KVM_INTERNAL_ERROR_EMULATION).then_some(Self::Unemulated {
                    bytes: fetched.insn_bytes,
                    len,
                    nested: u32::from(run.flags) & KVM_RUN_X86_GUEST_MODE != 0,
                })
            }
            _ => None,
        }
    }
}
