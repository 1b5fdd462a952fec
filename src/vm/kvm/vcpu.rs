// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU of a VM of this process, as its thread takes it into KVM_RUN and out of it: what becomes
//! of its exits, and the faults that it is given. What is denied is not known here.

use std::sync::Arc;

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Error, VcpuFd};

use super::exit::{Exit, MsrAccess};
use super::vcpu_msrs::{Outcome, VcpuMsrs};
use super::vm::{Decision, Shared};
use crate::vm::enforcer::{Action, Policy};

const EINTR: i32 = 4;
const EIO: i32 = 5;

/// Vector of #GP.
const GP: u8 = 13;

/// Pieces that KVM may cut the rest of one store into: those of 64 bytes, and half of it twice.
const MAX_PIECES: usize = 16;

/// What a vCPU's thread does after an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is not about anything protected: the VMM's own devices may know it.
    NotMine,
    /// It is dealt with: run the vCPU again.
    Done,
    /// Stop the VM; the vCPU goes on when it does.
    Pause,
    /// End the VM.
    Shutdown,
}

/// A vCPU of a [`KvmVm`](super::KvmVm). Belongs to the thread that runs it.
#[derive(Debug)]
pub struct KvmVcpu {
    shared: Arc<Shared>,
    index: u32,
    /// It is to be given a #GP(0).
    faults: bool,
    /// It is to try the instruction again that it had begun with these registers.
    again: Option<kvm_regs>,
    msrs: VcpuMsrs,
}

impl KvmVcpu {
    pub(super) fn new(shared: Arc<Shared>, index: u32) -> Self {
        Self {
            shared,
            index,
            faults: false,
            again: None,
            msrs: VcpuMsrs::default(),
        }
    }

    /// To be called before each KVM_RUN of `vcpu`, when [`Vcpus::while_out`](super::Vcpus::while_out)
    /// takes it to be in KVM_RUN already. May run it with `immediate_exit` set.
    ///
    /// # Errors
    ///
    /// KVM's. The vCPU is not to be run then.
    pub fn before_run(&mut self, vcpu: &mut VcpuFd) -> Result<(), Error> {
        if self.faults {
            self.finish(vcpu)?;
            let mut events = vcpu.get_vcpu_events()?;
            events.exception.injected = 1;
            events.exception.nr = GP;
            events.exception.has_error_code = 1;
            events.exception.error_code = 0;
            vcpu.set_vcpu_events(&events)?;
            self.faults = false;
        }
        if let Some(regs) = self.again {
            self.finish(vcpu)?;
            vcpu.set_regs(&regs)?;
            self.again = None;
        }
        self.msrs.catch_up(&self.shared.msrs, vcpu);
        Ok(())
    }

    /// To be called after a KVM_RUN of `vcpu` that ended with KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR or
    /// KVM_EXIT_X86_WRMSR, and before the next. The exit may be looked at before, but not be answered.
    ///
    /// An access that is not denied (it is watched, or not any more) is carried out here.
    pub fn after_exit(&mut self, vcpu: &mut VcpuFd) -> Verdict {
        let decision = match Exit::of(vcpu.get_kvm_run()) {
            Some(Exit::Store { gpa, data, len }) => {
                // KVM has moved it past the store, but for a `rep` store.
                let rip = vcpu.get_regs().ok().map(|regs| regs.rip);
                self.shared.store(self.index, gpa, &data[..len], rip)
            }
            Some(Exit::Msr(access)) => self.msr(vcpu, access),
            None => Decision::NotMine,
        };
        match decision {
            Decision::NotMine => Verdict::NotMine,
            Decision::Done => Verdict::Done,
            Decision::Fault => {
                self.faults = true;
                Verdict::Done
            }
            Decision::Pause => Verdict::Pause,
            Decision::Shutdown => Verdict::Shutdown,
        }
    }

    fn msr(&mut self, vcpu: &mut VcpuFd, access: MsrAccess) -> Decision {
        // KVM moves it on when the vCPU runs again.
        let regs = vcpu.get_regs().ok();
        let rip = regs.map(|regs| regs.rip);
        let tell = |value, action| {
            self.shared
                .msr_violation(self.index, access, value, rip, action)
        };
        let (value, decision) = match self.msrs.access(&self.shared.msrs, vcpu, access) {
            Outcome::Done { value, logged } => {
                if logged {
                    tell(value, Action::Audit);
                }
                (Some(value), Decision::Done)
            }
            Outcome::Fault => (None, Decision::Done),
            Outcome::Denied => {
                let policy = self.shared.on_violation();
                tell(access.written(), Action::Refused(policy));
                // There is nothing that a read could go on with.
                let dropped = access.is_write().then_some(0);
                match policy {
                    Policy::Inject => (None, Decision::Done),
                    Policy::Drop => (dropped, Decision::Done),
                    Policy::Pause => (dropped, Decision::Pause),
                    Policy::Shutdown => (dropped, Decision::Shutdown),
                }
            }
            Outcome::Again => {
                self.again = regs;
                (regs.map(|_| 0), Decision::Done)
            }
        };
        access.answer(vcpu.get_kvm_run(), value);
        decision
    }

    /// Has KVM finish the instruction that `vcpu` has left KVM_RUN in.
    fn finish(&mut self, vcpu: &mut VcpuFd) -> Result<(), Error> {
        vcpu.set_kvm_immediate_exit(1);
        let mut finished = Err(Error::new(EIO));
        for _ in 0..MAX_PIECES {
            match vcpu.run() {
                Err(e) if e.errno() == EINTR => {
                    finished = Ok(());
                    break;
                }
                Err(e) => {
                    finished = Err(e);
                    break;
                }
                // The next piece of the store.
                Ok(_) => {
                    self.after_exit(vcpu);
                }
            }
        }
        vcpu.set_kvm_immediate_exit(0);
        finished
    }
}
