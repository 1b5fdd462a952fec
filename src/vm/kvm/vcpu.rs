// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU of a VM of this process, as its thread takes it into KVM_RUN and out of it: what becomes
//! of its exits, and the faults that it is given. What is denied is not known here.

use std::sync::Arc;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_VCPUEVENT_VALID_PAYLOAD, kvm_cpuid_entry2, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{Error, SyncReg, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::exit::{Exit, MsrAccess};
use super::unemulated::{Decoded, MAX_LEN, Registers};
use super::vcpu_msrs::{Outcome, VcpuMsrs};
use super::vm::{Decision, Seen, Shared};
use crate::protect::PAGE_SHIFT;
use crate::vm::enforcer::{Action, Policy};

const EINTR: i32 = 4;
const EIO: i32 = 5;

const EFER_LMA: u64 = 1 << 10;

const PAGE: u64 = 1 << PAGE_SHIFT;

/// Pieces that KVM may cut the rest of one store into: those of 64 bytes, and half of it twice.
const MAX_PIECES: usize = 16;

/// What a vCPU's thread does after an exit. There will be no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
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
    /// What has become so far of the store that KVM is in the middle of.
    store: Option<Seen>,
    /// It is to be given this.
    fault: Option<Fault>,
    /// It is to try the instruction again that it had begun with these registers.
    again: Option<kvm_regs>,
    msrs: VcpuMsrs,
    /// [`Shared::slots_epoch`] when it ran last.
    slots_epoch: u64,
    /// [`Shared::life`] when it ran last.
    life: u64,
}

/// A fault that a vCPU is to be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// #GP(0).
    Protection,
    /// #UD.
    Undefined,
}

impl KvmVcpu {
    pub(super) fn new(shared: Arc<Shared>, index: u32) -> Self {
        let life = shared.life();
        Self {
            shared,
            index,
            store: None,
            fault: None,
            again: None,
            msrs: VcpuMsrs::default(),
            slots_epoch: 0,
            life,
        }
    }

    /// Has KVM finish what `vcpu` has left KVM_RUN in, without effect, and forgets what it was to be
    /// given. To be called with [`KvmVm::reset`](super::KvmVm::reset), before the VMM sets a vCPU's
    /// state anew: KVM finishes a store in pieces and the access to an MSR with the next KVM_RUN, whatever
    /// was set meanwhile. May run the vCPU with `immediate_exit` set.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn settle(&mut self, vcpu: &mut VcpuFd) -> Result<(), Error> {
        self.forget();
        // What comes of it goes nowhere.
        self.store = Some(Seen::Denied);
        self.finish(vcpu)?;
        self.store = None;
        Ok(())
    }

    fn forget(&mut self) {
        (self.fault, self.again) = (None, None);
        if self.store.is_some() {
            self.store = Some(Seen::Denied);
        }
    }

    /// To be called before each KVM_RUN of `vcpu`, when [`Vcpus::while_out`](super::Vcpus::while_out)
    /// takes it to be in KVM_RUN already. May run it with `immediate_exit` set.
    ///
    /// # Errors
    ///
    /// KVM's. The vCPU is not to be run then.
    pub fn before_run(&mut self, vcpu: &mut VcpuFd) -> Result<(), Error> {
        if self.life != self.shared.life() {
            // That was of a guest that is gone.
            self.forget();
        }
        if self.store.is_some() {
            self.finish(vcpu)?;
            self.store = None;
        }
        if let Some(fault) = self.fault {
            let (vector, has_error_code) = match fault {
                Fault::Protection => (13, 1),
                Fault::Undefined => (6, 0),
            };
            let mut events = vcpu.get_vcpu_events()?;
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = has_error_code;
            events.exception.error_code = 0;
            // In place of what KVM may have made of it.
            events.exception.pending = 0;
            events.exception_has_payload = 0;
            // An NMI, SMI or INIT that comes just now is not to be taken back.
            events.flags &= KVM_VCPUEVENT_VALID_PAYLOAD;
            vcpu.set_vcpu_events(&events)?;
            self.fault = None;
        }
        if let Some(regs) = self.again {
            self.finish(vcpu)?;
            vcpu.set_regs(&regs)?;
            self.again = None;
        }
        self.msrs.catch_up(&self.shared.msrs, vcpu);
        self.slots_epoch = self.shared.slots_epoch();
        self.life = self.shared.life();
        if self.shared.syncs_registers {
            vcpu.set_sync_valid_reg(SyncReg::Register);
        }
        Ok(())
    }

    /// To be called after a KVM_RUN of `vcpu` that ended with KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR,
    /// KVM_EXIT_X86_WRMSR or KVM_EXIT_INTERNAL_ERROR, and before the next. The exit may be looked at
    /// before, but not be answered.
    ///
    /// An access that is not denied (it is watched, or not any more) is carried out here.
    ///
    /// KVM's emulator, which all stores to a page that is denied or watched come to, does not know all
    /// instructions, and ends KVM_RUN with an internal error. If a page that such an instruction stores
    /// to is denied, that is dealt with like any other store. Otherwise, also if it is watched, it is an
    /// undefined instruction above CPL 0, as it is to KVM, and [`Verdict::NotMine`] at CPL 0: the VM cannot
    /// go on. So a page that the guest may store to with FXSAVE, say, should not be watched here.
    ///
    /// KVM_EXIT_MEMORY_FAULT, and a KVM_RUN that fails with EFAULT, are never about a protection.
    pub fn after_exit(&mut self, vcpu: &mut VcpuFd) -> Verdict {
        let decision = match Exit::of(vcpu.get_kvm_run()) {
            Some(Exit::Store { gpa, data, len }) => {
                // KVM has moved it past the store, but for a `rep` store.
                let rip = if self.shared.syncs_registers {
                    Some(vcpu.sync_regs().regs.rip)
                } else {
                    vcpu.get_regs().ok().map(|regs| regs.rip)
                };
                let data = &data[..len];
                self.shared
                    .store((self.index, self.life), gpa, data, rip, &mut self.store)
            }
            Some(Exit::Msr(access)) => self.msr(vcpu, access),
            Some(Exit::Unemulated { bytes, len, nested }) => {
                let failed = self.unemulated(vcpu, &bytes[..len], nested);
                failed.unwrap_or(Decision::NotMine)
            }
            None => Decision::NotMine,
        };
        match decision {
            Decision::NotMine => Verdict::NotMine,
            Decision::Done => Verdict::Done,
            Decision::Fault => {
                self.fault = Some(Fault::Protection);
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
                let dropped = access.is_write().then_some(0);
                let policy = match (self.shared.on_violation(), dropped) {
                    // There is nothing that a read could go on with.
                    (Policy::Drop, None) => Policy::Inject,
                    (policy, _) => policy,
                };
                tell(access.written(), Action::Refused(policy));
                match policy {
                    Policy::Inject => (None, Decision::Done),
                    Policy::Drop => (dropped, Decision::Done),
                    Policy::Pause => (dropped, Decision::Pause),
                    Policy::Shutdown => (dropped, Decision::Shutdown),
                }
            }
            Outcome::Over => (Some(0), Decision::Done),
            Outcome::Again => {
                self.again = regs;
                (regs.map(|_| 0), Decision::Done)
            }
        };
        access.answer(vcpu.get_kvm_run(), value);
        decision
    }

    /// What becomes of an instruction that KVM cannot emulate, of which it knows the first bytes.
    fn unemulated(&mut self, vcpu: &VcpuFd, bytes: &[u8], nested: bool) -> Result<Decision, Error> {
        if self.life != self.shared.life() {
            return Ok(Decision::Done);
        }
        let (mut regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
        let registers = registers(&regs, &sregs);
        let (bytes, len) = self.fetch(vcpu, &registers, bytes);
        let xsave_size = || {
            let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ok()?;
            let is_xsave = |leaf: &&_| {
                matches!(
                    leaf,
                    kvm_cpuid_entry2 {
                        function: 0xd,
                        index: 0,
                        ..
                    }
                )
            };
            Some(cpuid.as_slice().iter().find(is_xsave)?.ecx)
        };
        if let Some(Decoded { next_rip, stores }) =
            registers.decode(&bytes[..len], xsave_size().unwrap_or(0))
        {
            let stores: Vec<_> = stores
                .into_iter()
                .filter_map(|gva| Some((gva, translate(vcpu, gva)?)))
                .collect();
            if self.shared.is_denied(self.index, &stores, regs.rip) {
                let policy = self.shared.on_violation();
                if policy == Policy::Inject {
                    self.fault = Some(Fault::Protection);
                    return Ok(Decision::Done);
                }
                regs.rip = next_rip;
                vcpu.set_regs(&regs)?;
                return Ok(match policy {
                    Policy::Inject | Policy::Drop => Decision::Done,
                    Policy::Pause => Decision::Pause,
                    Policy::Shutdown => Decision::Shutdown,
                });
            }
        }
        if self.slots_epoch != self.shared.slots_epoch() {
            // It may have been denied or watched, and not be any more: again, and without the #UD that
            // KVM may have queued, which goes with this.
            vcpu.set_regs(&regs)?;
            return Ok(Decision::Done);
        }
        if sregs.ss.dpl != 0 || nested {
            self.fault = Some(Fault::Undefined);
            return Ok(Decision::Done);
        }
        Ok(Decision::NotMine)
    }

    /// An instruction's bytes, and how many: as KVM saw them if it says so, for the guest may have
    /// changed them since. It may not have fetched all of them.
    fn fetch(&self, vcpu: &VcpuFd, registers: &Registers, known: &[u8]) -> ([u8; MAX_LEN], usize) {
        let mut bytes = [0; MAX_LEN];
        let mut len = known.len().min(MAX_LEN);
        bytes[..len].copy_from_slice(&known[..len]);
        while len < MAX_LEN {
            let at = registers.code(len as u64);
            let rest = (PAGE - at % PAGE) as usize;
            let part = &mut bytes[len..];
            let part_len = part.len().min(rest);
            let read = translate(vcpu, at).is_some_and(|gpa| {
                let part = &mut part[..part_len];
                self.shared
                    .memory()
                    .read_slice(part, GuestAddress(gpa))
                    .is_ok()
            });
            if !read {
                break;
            }
            len += part_len;
        }
        (bytes, len)
    }

    /// Has KVM finish the instruction that `vcpu` has left KVM_RUN in. Of a store, KVM leaves one piece
    /// after the other to user space: one event is made of all, or two if what is watched comes before
    /// what is denied, and so the VM may have to be stopped as late as here.
    fn finish(&mut self, vcpu: &mut VcpuFd) -> Result<(), Error> {
        // Not what a kick sets, so that one is not lost here.
        const OURS: u8 = 2;
        let kicked = vcpu.get_kvm_run().immediate_exit;
        vcpu.set_kvm_immediate_exit(OURS);
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
                Ok(_) => match self.after_exit(vcpu) {
                    Verdict::Pause => self.shared.stop(Policy::Pause),
                    Verdict::Shutdown => self.shared.stop(Policy::Shutdown),
                    // What lies behind the end of guest memory does not get its piece.
                    Verdict::Done | Verdict::NotMine => {}
                },
            }
        }
        if vcpu.get_kvm_run().immediate_exit == OURS {
            vcpu.set_kvm_immediate_exit(kicked);
        }
        finished
    }
}

/// Where a byte of the guest is.
fn translate(vcpu: &VcpuFd, gva: u64) -> Option<u64> {
    let translation = vcpu.translate_gva(gva).ok()?;
    (translation.valid != 0).then_some(translation.physical_address)
}

fn registers(regs: &kvm_regs, sregs: &kvm_sregs) -> Registers {
    Registers {
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        bases: [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].map(|s| s.base),
        bits: match (sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0, sregs.cs.db) {
            (true, _) => 64,
            (false, 0) => 16,
            (false, _) => 32,
        },
    }
}
