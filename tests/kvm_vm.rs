// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KvmVm` on the real KVM: a guest of a few bytes, in long mode at CPL 0, that stores where it is
//! told to, and reads and writes the MSRs that it is told to.

use std::env;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vhost_guard::protect::msr::{
    self, Access as MsrAccess, Action as MsrAction, HostRule, MsrRange, Policy as MsrPolicy, Rule,
    Unlisted,
};
use vhost_guard::protect::{Attributes, Demand, Deny, GfnRange, Order, Protection};
use vhost_guard::vm::enforcer::{
    Access, Action, Enforcer, HostPolicyOutcome, InForce, MsrInfo, Outcome, Policy, Source, Target,
    Unexpected, Violation, VmEvents, VmInfo,
};
use vhost_guard::vm::kvm::{
    KvmVcpu, KvmVm, MsrPolicyError, NewError, NotReset, Options, StartError, Vcpus, Verdict,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, Permissions,
};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

const RAM: u64 = 16 << 20;
const PML4: u64 = 0x1000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const CODE: u64 = 0x6000;
/// RDMSR and HLT; WRMSR and HLT; and WRMSR of ever other values.
const READS: u64 = CODE + 0x200;
const WRITES: u64 = CODE + 0x240;
const WRITES_ON: u64 = CODE + 0x280;
/// What [`begin`] puts there.
const UNEMULATED: u64 = CODE + 0x300;
/// Of #GP, and of #UD.
const HANDLER: u64 = 0x6800;
const UNDEFINED: u64 = 0x6810;
const TSS: u64 = 0x7000;
const STACK: u64 = 0x8000;
/// The pages that are stored to.
const DATA: u64 = 0x10_0000;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOPNOTSUPP: u32 = 95;
const ESTALE: u32 = 116;

const DEADLINE: Duration = Duration::from_secs(20);

/// What the device would hear.
enum Heard {
    Connected(VmInfo),
    State(u64, InForce),
    Result(u64, Outcome),
    HostPolicy(HostPolicyOutcome),
    Violation(Violation),
    Reset(u64),
    CaughtUp(u64),
}

struct Ear(Mutex<Sender<Heard>>);

impl Ear {
    fn hear(&self, heard: Heard) {
        assert!(!matches!(heard, Heard::CaughtUp(u64::MAX)), "a bug");
        let _ = self.0.lock().unwrap().send(heard);
    }
}

impl VmEvents for Ear {
    fn connected(&self, vm: VmInfo) {
        self.hear(Heard::Connected(vm));
    }

    fn state(&self, seq: u64, _generation: u64, state: InForce) -> Result<(), Unexpected> {
        self.hear(Heard::State(seq, state));
        Ok(())
    }

    fn result(&self, seq: u64, outcome: Outcome) -> Result<(), Unexpected> {
        self.hear(Heard::Result(seq, outcome));
        Ok(())
    }

    fn host_policy(&self, outcome: HostPolicyOutcome) {
        self.hear(Heard::HostPolicy(outcome));
    }

    fn violation(&self, violation: Violation) {
        self.hear(Heard::Violation(violation));
    }

    fn reset(&self, generation: u64) {
        self.hear(Heard::Reset(generation));
    }

    fn caught_up(&self, seq: u64) {
        self.hear(Heard::CaughtUp(seq));
    }

    fn disconnected(&self) {}
}

/// A door that vCPU threads go through, and that can be shut.
#[derive(Default)]
struct Door {
    shut: AtomicBool,
    inside: Mutex<u32>,
    changed: Condvar,
    kick: Mutex<Option<thread::JoinHandle<()>>>,
    paused: AtomicBool,
    shut_down: AtomicBool,
}

impl Door {
    fn enter(&self) {
        let mut inside = self.inside.lock().unwrap();
        while self.shut.load(Ordering::SeqCst) {
            inside = self.changed.wait(inside).unwrap();
        }
        *inside += 1;
    }

    fn leave(&self) {
        *self.inside.lock().unwrap() -= 1;
        self.changed.notify_all();
    }
}

impl Vcpus for Door {
    fn while_out(&self, work: &mut dyn FnMut()) {
        let mut inside = self.inside.lock().unwrap();
        self.shut.store(true, Ordering::SeqCst);
        while *inside != 0 {
            // A signal that comes just before KVM_RUN does nothing: again, then.
            if let Some(thread) = &*self.kick.lock().unwrap() {
                thread.kill(SIGRTMIN()).unwrap();
            }
            let wait = Duration::from_millis(1);
            inside = self.changed.wait_timeout(inside, wait).unwrap().0;
        }
        drop(inside);
        work();
        self.shut.store(false, Ordering::SeqCst);
        drop(self.inside.lock().unwrap());
        self.changed.notify_all();
    }

    fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    fn shut_down(&self) {
        self.shut_down.store(true, Ordering::SeqCst);
    }
}

struct Machine {
    kvm_vm: Arc<KvmVm>,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemoryMmap>,
    vcpu: Option<(VcpuFd, KvmVcpu)>,
    /// Number 1.
    other: Option<(VcpuFd, KvmVcpu)>,
    door: Arc<Door>,
    heard: Receiver<Heard>,
    ear: Arc<dyn VmEvents>,
    last_seq: u64,
}

fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(e) if env::var_os("VHOST_GUARD_REQUIRE_KVM").is_none() => {
            eprintln!("skipped: /dev/kvm cannot be opened: {e}");
            None
        }
        Err(e) => panic!("/dev/kvm cannot be opened: {e}"),
    }
}

fn gfns(range: Range<u64>) -> GfnRange {
    GfnRange::new(range.start, range.end - 1).unwrap()
}

/// The frame of data page `n`.
fn page(n: u64) -> u64 {
    (DATA >> 12) + n
}

fn protection(range: Range<u64>, attributes: Attributes) -> Protection {
    let range = gfns(range);
    Protection { range, attributes }
}

fn denied() -> Attributes {
    Attributes::new(Deny::NOWRITE, Deny::empty())
}

fn watched() -> Attributes {
    Attributes::new(Deny::empty(), Deny::NOWRITE)
}

fn lock(pages: Range<u64>) -> Demand {
    Demand::Pages(Order::Lock(vec![protection(pages, denied())]))
}

impl Machine {
    fn new(on_violation: Policy) -> Option<Self> {
        Self::with(Options {
            on_violation,
            ..Options::new(0..200)
        })
    }

    fn with_policy(on_violation: Policy, policy: MsrPolicy) -> Option<Self> {
        Self::with(Options {
            on_violation,
            msr_policy: Some(policy),
            ..Options::new(0..200)
        })
    }

    fn with(options: Options) -> Option<Self> {
        let kvm = kvm()?;
        let vm: Arc<VmFd> = Arc::new(kvm.create_vm().unwrap());
        let ram = [(GuestAddress(0), RAM as usize)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ram).unwrap());
        let policy = options.msr_policy.clone();
        let options = Options {
            max_ranges: 64,
            ..options
        };
        let kvm_vm = KvmVm::new(Arc::clone(&vm), Arc::clone(&memory), options).unwrap();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpu = |index| {
            let vcpu = vm.create_vcpu(index).unwrap();
            vcpu.set_cpuid2(&cpuid).unwrap();
            set_up(&vcpu, &memory);
            vcpu
        };
        let (vcpu, other) = (vcpu(0), vcpu(1));
        let (tell, heard) = channel();
        let ear: Arc<dyn VmEvents> = Arc::new(Ear(Mutex::new(tell)));
        let door = Arc::new(Door::default());
        let weak: Weak<dyn VmEvents> = Arc::downgrade(&ear);
        kvm_vm.start(weak, door.clone()).unwrap();
        let mut machine = Self {
            vcpu: Some((vcpu, kvm_vm.vcpu(0))),
            other: Some((other, kvm_vm.vcpu(1))),
            kvm_vm: Arc::new(kvm_vm),
            vm,
            memory,
            door,
            heard,
            ear,
            last_seq: 0,
        };
        match machine.hear() {
            Heard::Connected(info) => {
                assert_eq!((info.deny, info.audit), (Deny::NOWRITE, Deny::NOWRITE));
            }
            _ => panic!("connected comes first"),
        }
        let in_force = InForce {
            host: policy.clone(),
            ..InForce::default()
        };
        assert!(matches!(machine.hear(), Heard::State(0, state) if state == in_force));
        if policy.is_some() {
            let outcome = HostPolicyOutcome::InForce;
            assert!(matches!(machine.hear(), Heard::HostPolicy(told) if told == outcome));
        }
        Some(machine)
    }

    /// Takes a memslot's number, for memory behind the guest's.
    #[allow(unsafe_code)]
    fn take_slot(&self, slot: u32) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: RAM,
            memory_size: 8192,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: no part of this program has a reference into that memory, and it is never freed.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
        std::mem::forget(memory);
    }

    fn hear(&mut self) -> Heard {
        self.heard
            .recv_timeout(DEADLINE)
            .expect("something is told")
    }

    /// Asks, and waits for the answer: status and index.
    fn ask_in(&mut self, generation: u64, demand: &Demand) -> (u32, Option<u32>) {
        self.last_seq += 1;
        self.kvm_vm.carry_out(self.last_seq, generation, demand);
        loop {
            if let Heard::Result(seq, outcome) = self.hear() {
                assert_eq!(seq, self.last_seq);
                return (outcome.status, outcome.index);
            }
        }
    }

    fn ask(&mut self, demand: &Demand) -> (u32, Option<u32>) {
        self.ask_in(1, demand)
    }

    fn state(&mut self) -> InForce {
        self.last_seq += 1;
        self.kvm_vm.request_state(self.last_seq);
        loop {
            if let Heard::State(seq, state) = self.hear() {
                assert_eq!(seq, self.last_seq);
                return state;
            }
        }
    }

    fn violation(&mut self) -> Violation {
        loop {
            if let Heard::Violation(violation) = self.hear() {
                return violation;
            }
        }
    }

    /// Has vCPU `cpu` read or write an MSR: the verdicts of its exits, and what was read or written;
    /// `None` for a #GP(0) at the instruction.
    fn access(&mut self, cpu: u32, msr: u32, write: Option<u64>) -> (Vec<Verdict>, Option<u64>) {
        let vcpu = if cpu == 0 {
            &mut self.vcpu
        } else {
            &mut self.other
        };
        let (vcpu, guarded) = vcpu.as_mut().unwrap();
        let code = begin_access(vcpu, msr, write);
        let mut verdicts = Vec::new();
        loop {
            self.door.enter();
            guarded.before_run(vcpu).unwrap();
            let exit = vcpu.run();
            self.door.leave();
            match exit {
                Ok(VcpuExit::Hlt) => return (verdicts, end_access(vcpu, &self.memory, code)),
                Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => {
                    verdicts.push(guarded.after_exit(vcpu));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Has it run an instruction at CPL 0 or 3: the verdicts of its exits, and how it has ended, or
    /// `None` after an exit that nobody knows.
    fn run(&mut self, cpl: u8, code: &[u8], rdi: u64) -> (Vec<Verdict>, Option<End>) {
        let (vcpu, guarded) = self.vcpu.as_mut().unwrap();
        begin(vcpu, &self.memory, cpl, code, rdi);
        let mut verdicts = Vec::new();
        loop {
            self.door.enter();
            guarded.before_run(vcpu).unwrap();
            let exit = vcpu.run();
            self.door.leave();
            match exit {
                Ok(VcpuExit::Hlt) => {
                    let end = end(vcpu, &self.memory, cpl, code.len());
                    return (verdicts, Some(end));
                }
                Ok(VcpuExit::InternalError | VcpuExit::MmioWrite(..)) => {
                    verdicts.push(guarded.after_exit(vcpu));
                    if verdicts.last() == Some(&Verdict::NotMine) {
                        return (verdicts, None);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn read(&mut self, cpu: u32, msr: u32) -> (Vec<Verdict>, Option<u64>) {
        self.access(cpu, msr, None)
    }

    fn write(&mut self, cpu: u32, msr: u32, value: u64) -> (Vec<Verdict>, Option<u64>) {
        self.access(cpu, msr, Some(value))
    }

    /// What it has, without asking the guest.
    fn msr(&self, cpu: u32, msr: u32) -> u64 {
        let vcpu = if cpu == 0 { &self.vcpu } else { &self.other };
        let mut entries = Msrs::from_entries(&[entry(msr, 0)]).unwrap();
        let (vcpu, _) = vcpu.as_ref().unwrap();
        assert_eq!(vcpu.get_msrs(&mut entries), Ok(1), "{msr:#x}");
        entries.as_slice()[0].data
    }

    /// As the VMM may at any time, when it resets a vCPU for one.
    fn set_msr(&self, cpu: u32, msr: u32, value: u64) {
        let vcpu = if cpu == 0 { &self.vcpu } else { &self.other };
        let entries = Msrs::from_entries(&[entry(msr, value)]).unwrap();
        let (vcpu, _) = vcpu.as_ref().unwrap();
        assert_eq!(vcpu.set_msrs(&entries), Ok(1), "{msr:#x}");
    }

    /// Whether KVM takes this value of the VMM.
    fn vmm_may(&self, msr: u32, value: u64) -> bool {
        let old = self.msr(0, msr);
        let entries = Msrs::from_entries(&[entry(msr, value)]).unwrap();
        let (vcpu, _) = self.vcpu.as_ref().unwrap();
        let may = vcpu.set_msrs(&entries) == Ok(1);
        self.set_msr(0, msr, old);
        may
    }

    fn byte(&self, gpa: u64) -> u8 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Stores a byte; returns the verdicts of its exits, and where the vCPU has stopped.
    fn store(&mut self, gpa: u64, value: u8) -> (Vec<Verdict>, u64) {
        let (vcpu, guarded) = self.vcpu.as_mut().unwrap();
        start(vcpu, gpa, value);
        let mut verdicts = Vec::new();
        loop {
            self.door.enter();
            guarded.before_run(vcpu).unwrap();
            let exit = vcpu.run();
            self.door.leave();
            match exit {
                Ok(VcpuExit::Hlt) => {
                    let rip = vcpu.get_regs().unwrap().rip;
                    return (verdicts, rip);
                }
                Ok(VcpuExit::MmioWrite(..)) => verdicts.push(guarded.after_exit(vcpu)),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// Has the vCPU run `code`, and then HLT, at CPL 0 or 3, with RDI for an address.
fn begin(vcpu: &VcpuFd, memory: &GuestMemoryMmap, cpl: u8, code: &[u8], rdi: u64) {
    let code = [code, &[0xf4]].concat();
    memory.write_slice(&code, GuestAddress(UNEMULATED)).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    for (segment, selector) in [(&mut sregs.cs, 8), (&mut sregs.ss, 16)] {
        (segment.dpl, segment.selector) = (cpl, selector | u16::from(cpl));
    }
    sregs.cs.type_ = 11;
    sregs.ss = kvm_segment {
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        limit: 0xffff_ffff,
        unusable: 0,
        ..sregs.ss
    };
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: UNEMULATED,
        rdi,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

/// How it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// At the HLT behind the code.
    Behind,
    /// With a fault of this vector at the code.
    Fault(u8),
}

fn end(vcpu: &VcpuFd, memory: &GuestMemoryMmap, cpl: u8, len: usize) -> End {
    let regs = vcpu.get_regs().unwrap();
    let behind = UNEMULATED + len as u64;
    let frame: [u64; 2] = memory.read_obj(GuestAddress(regs.rsp)).unwrap();
    match regs.rip - 1 {
        HANDLER if frame == [0, UNEMULATED] => End::Fault(13),
        // A user's HLT.
        HANDLER if cpl == 3 && frame == [0, behind] => End::Behind,
        UNDEFINED if frame[0] == UNEMULATED => End::Fault(6),
        at if at == behind => End::Behind,
        at => panic!("stopped at {at:#x}, with {frame:x?}"),
    }
}

fn begin_access(vcpu: &VcpuFd, msr: u32, write: Option<u64>) -> u64 {
    let code = if write.is_some() { WRITES } else { READS };
    let value = write.unwrap_or(0x5555_5555_5555_5555);
    let regs = kvm_regs {
        rip: code,
        rcx: msr.into(),
        rax: value & 0xffff_ffff,
        rdx: value >> 32,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    code
}

fn end_access(vcpu: &VcpuFd, memory: &GuestMemoryMmap, code: u64) -> Option<u64> {
    let regs = vcpu.get_regs().unwrap();
    if regs.rip == HANDLER + 1 {
        let [error, rip]: [u64; 2] = memory.read_obj(GuestAddress(regs.rsp)).unwrap();
        assert_eq!((error, rip), (0, code), "#GP(0) at the instruction");
        return None;
    }
    assert_eq!(regs.rip, code + 3);
    Some(regs.rax & 0xffff_ffff | regs.rdx << 32)
}

/// Long mode with the first 16 MiB mapped to themselves, and a handler of #GP that halts.
fn set_up(vcpu: &VcpuFd, memory: &GuestMemoryMmap) {
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    write(PML4, 0x2000 | 7);
    write(0x2000, 0x3000 | 7);
    for i in 0..RAM >> 21 {
        write(0x3000 + 8 * i, i << 21 | 0x87);
    }
    write(GDT + 8, 0x00af_9b00_0000_ffff);
    write(GDT + 16, 0x00cf_9300_0000_ffff);
    // Interrupt gates.
    for (vector, handler) in [(13, HANDLER), (6, UNDEFINED)] {
        write(IDT + 16 * vector, handler & 0xffff | 8 << 16 | 0x8e00 << 32);
        memory.write_slice(&[0xf4], GuestAddress(handler)).unwrap();
    }
    write(TSS + 4, STACK);
    // mov %al,(%rdi); hlt
    memory
        .write_slice(&[0x88, 0x07, 0xf4], GuestAddress(CODE))
        .unwrap();
    // again: inc %al; mov %al,(%rdi); jmp again
    let busy = [0xfe, 0xc0, 0x88, 0x07, 0xeb, 0xfa];
    memory
        .write_slice(&busy, GuestAddress(CODE + 0x100))
        .unwrap();
    for (at, code) in [
        (READS, &[0x0f, 0x32, 0xf4][..]),
        (WRITES, &[0x0f, 0x30, 0xf4]),
        // again: inc %eax; wrmsr; mov %eax,(%rdi); jmp again
        (WRITES_ON, &[0xff, 0xc0, 0x0f, 0x30, 0x89, 0x07, 0xeb, 0xf8]),
    ] {
        memory.write_slice(code, GuestAddress(at)).unwrap();
    }

    let mut sregs = vcpu.get_sregs().unwrap();
    let segment = |selector, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        l: 1,
        ..segment(8, 11)
    };
    let data = kvm_segment {
        db: 1,
        ..segment(16, 3)
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        s: 0,
        g: 0,
        ..segment(24, 11)
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 16 * 32 - 1);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8001_0011, PML4, 0x620);
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs).unwrap();
}

fn start(vcpu: &VcpuFd, gpa: u64, value: u8) {
    let regs = kvm_regs {
        rip: CODE,
        rdi: gpa,
        rax: value.into(),
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

#[test]
fn a_store_to_a_locked_page_does_not_land_and_is_told_of() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.store(DATA, 1), (vec![], CODE + 3));
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    assert_eq!(m.store(DATA + 5, 2), (vec![Verdict::Done], CODE + 3));
    assert_eq!((m.byte(DATA), m.byte(DATA + 5)), (1, 0));
    let violation = m.violation();
    assert_eq!(violation.target, Target::Memory(DATA + 5));
    assert_eq!(
        (violation.value, violation.size, violation.times),
        (2, 1, 1)
    );
    assert_eq!(violation.action, Action::Refused(Policy::Drop));
    // The neighbours are free.
    for gpa in [DATA - 1, DATA + 4096] {
        assert_eq!(m.store(gpa, 3), (vec![], CODE + 3));
        assert_eq!(m.byte(gpa), 3);
    }
}

#[test]
fn the_policy_decides_what_becomes_of_the_vcpu() {
    for (policy, verdict, rip) in [
        (Policy::Inject, Verdict::Done, HANDLER + 1),
        (Policy::Pause, Verdict::Pause, CODE + 3),
        (Policy::Shutdown, Verdict::Shutdown, CODE + 3),
    ] {
        let Some(mut m) = Machine::new(policy) else {
            return;
        };
        assert_eq!(m.ask(&lock(page(0)..page(2))), (0, None));
        assert_eq!(m.store(DATA, 1), (vec![verdict], rip));
        assert_eq!(m.byte(DATA), 0);
    }
}

#[test]
fn a_store_that_is_watched_lands_and_is_told_of() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let watch = Order::Protect(vec![protection(page(0)..page(4), watched())]);
    assert_eq!(m.ask(&Demand::Pages(watch)), (0, None));
    assert_eq!(m.store(DATA + 4096, 7), (vec![Verdict::Done], CODE + 3));
    assert_eq!(m.byte(DATA + 4096), 7);
    assert_eq!(m.violation().action, Action::Audit);
    // And free again: no exit at all.
    let free = Order::Protect(vec![protection(page(1)..page(2), Attributes::default())]);
    assert_eq!(m.ask(&Demand::Pages(free)), (0, None));
    assert_eq!(m.store(DATA + 4096, 8), (vec![], CODE + 3));
    assert_eq!(m.store(DATA + 8192, 8), (vec![Verdict::Done], CODE + 3));
}

#[test]
fn a_device_may_write_what_the_guest_may() {
    let Some(mut m) = Machine::new(Policy::Pause) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(1)..page(2))), (0, None));
    let watch = Order::Protect(vec![protection(page(4)..page(5), watched())]);
    assert_eq!(m.ask(&Demand::Pages(watch)), (0, None));
    let kvm_vm = Arc::clone(&m.kvm_vm);
    let write = |at: u64, bytes: &[u8]| {
        let memory = kvm_vm.device_memory();
        memory.write_slice(bytes, GuestAddress(at)).is_ok()
    };
    // Below the page, up to its edge and over it; in it; behind it.
    assert!(write(DATA + 4096 - 8, &[1; 8]));
    assert!(!write(DATA + 4096 - 8, &[2; 9]));
    assert_eq!((m.byte(DATA + 4095), m.byte(DATA + 4096)), (1, 0));
    let violation = m.violation();
    assert_eq!(violation.source, Source::Device);
    assert_eq!(violation.target, Target::Memory(DATA + 4096));
    assert_eq!(violation.action, Action::Refused(Policy::Pause));
    assert!(!write(DATA + 4100, &[2]));
    assert_eq!(m.violation().target, Target::Memory(DATA + 4100));
    assert!(write(DATA + 8192, &[1; 4096]));
    // It may be read.
    let memory = kvm_vm.device_memory();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 4096)).unwrap(), 0);
    assert!(memory.check_range(GuestAddress(DATA), 8192, Permissions::Read));
    assert!(!memory.check_range(GuestAddress(DATA), 8192, Permissions::Write));
    assert!(!memory.check_range(GuestAddress(RAM - 1), 2, Permissions::Read));
    drop(memory);
    // Watched: it lands, and is told of.
    assert!(write(DATA + 4 * 4096 + 7, &[3]));
    assert_eq!(m.byte(DATA + 4 * 4096 + 7), 3);
    assert_eq!(m.violation().action, Action::Audit);
    // The thread that tells of violations has had the VM stopped before.
    m.state();
    assert!(m.door.paused.load(Ordering::SeqCst));
    assert!(!m.door.shut_down.load(Ordering::SeqCst));
}

#[test]
fn no_lock_is_granted_while_a_device_is_at_work() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    let kvm_vm = Arc::clone(&m.kvm_vm);
    let memory = kvm_vm.device_memory();
    let slice = memory
        .get_slices(GuestAddress(DATA), 1, Permissions::Write)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    m.last_seq += 1;
    kvm_vm.carry_out(m.last_seq, 1, &lock(page(0)..page(1)));
    // The lock waits at the gate, now or soon; the device goes on with what it was given.
    assert!(m.heard.recv_timeout(Duration::from_millis(50)).is_err());
    slice.write_obj(9_u8, 0).unwrap();
    drop(memory);
    assert!(matches!(m.hear(), Heard::Result(_, outcome) if outcome.status == 0));
    assert_eq!(m.byte(DATA), 9);
    let memory = kvm_vm.device_memory();
    assert!(memory.write_obj(8_u8, GuestAddress(DATA)).is_err());
    assert_eq!(m.byte(DATA), 9);
}

#[test]
fn what_is_refused_changes_nothing() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    let before = m.state();
    let free = protection(page(0)..page(1), Attributes::default());
    let fresh = protection(page(8)..page(9), denied());
    let outside = protection(RAM >> 12..(RAM >> 12) + 1, denied());
    let everything = protection(0..1 << 52, denied());
    let no_exec = Attributes::new(Deny::NOEXEC, Deny::empty());
    let scattered = (0..65).map(|n| protection(page(16 + 2 * n)..page(17 + 2 * n), denied()));
    for (demand, expected) in [
        (Order::Protect(vec![fresh, free]), (EPERM, Some(1))),
        (Order::Lock(vec![fresh, outside]), (EINVAL, Some(1))),
        (Order::Lock(vec![everything]), (EINVAL, Some(0))),
        (
            Order::Lock(vec![
                fresh,
                Protection {
                    attributes: no_exec,
                    ..fresh
                },
            ]),
            (EOPNOTSUPP, Some(1)),
        ),
        (Order::Lock(scattered.collect()), (ENOSPC, None)),
    ] {
        assert_eq!(m.ask(&Demand::Pages(demand)), expected);
        assert_eq!(m.state(), before);
    }
    assert_eq!(m.ask_in(2, &lock(page(8)..page(9))), (ESTALE, None));
    assert_eq!(m.store(DATA + 8 * 4096, 1), (vec![], CODE + 3));
}

#[test]
fn what_kvm_refuses_half_way_is_taken_back() {
    const EIO: u32 = 5;
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    // Somebody has taken one of its numbers, for another memory.
    m.take_slot(2);
    for value in 1..4 {
        assert_eq!(m.ask(&lock(page(0)..page(1))), (EIO, None));
        assert_eq!(m.store(DATA, value), (vec![], CODE + 3));
        assert_eq!(m.byte(DATA), value);
    }
    assert_eq!(m.state(), InForce::default());
    assert!(!m.door.shut_down.load(Ordering::SeqCst));
}

#[test]
fn a_bug_in_what_is_told_ends_the_vm() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    m.kvm_vm.catch_up(u64::MAX);
    assert_eq!(m.kvm_vm.reset(), Err(NotReset));
    assert!(m.door.shut_down.load(Ordering::SeqCst));
    // Nothing is loosened by it.
    assert_eq!(m.store(DATA, 1).0, [Verdict::Shutdown]);
    assert_eq!(m.byte(DATA), 0);
}

#[test]
fn it_starts_once_and_offers_what_there_are_slots_for() {
    let Some(kvm) = kvm() else {
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let memory = Arc::new(memory);
    let new = |slots| {
        let options = Options::new(slots);
        KvmVm::new(Arc::clone(&vm), Arc::clone(&memory), options)
    };
    let limit = vm.check_extension_int(Cap::NrMemslots) as u16;
    assert!(matches!(
        new(0..limit + 1),
        Err(NewError::SlotNumbers { end, limit: l }) if end == limit + 1 && l == limit
    ));
    let kvm_vm = new(limit - 10..limit).unwrap();
    let (tell, heard) = channel();
    let ear: Arc<dyn VmEvents> = Arc::new(Ear(Mutex::new(tell)));
    let start = || kvm_vm.start(Arc::downgrade(&ear), Arc::new(Door::default()));
    start().unwrap();
    assert!(matches!(start(), Err(StartError::Again)));
    // Of ten slots, one is all of memory's, and each range takes two more.
    let first = heard.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(first, Heard::Connected(info) if info.max_ranges == 4));
}

#[test]
fn a_reset_without_anybody_who_could_ask_waits_for_nobody() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    m.ear = Arc::new(Ear(Mutex::new(channel().0)));
    // Its thread ends at the next task: this one, or one before it. What is locked stays so.
    assert_eq!(m.kvm_vm.reset(), Err(NotReset));
    assert_eq!(m.kvm_vm.reset(), Err(NotReset));
}

#[test]
fn what_a_vcpu_had_begun_before_a_reset_has_no_effect() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    let (mut vcpu, mut guarded) = m.vcpu.take().unwrap();
    // Refused, and dealt with: it would get a #GP.
    start(&vcpu, DATA, 1);
    guarded.before_run(&mut vcpu).unwrap();
    assert!(matches!(vcpu.run(), Ok(VcpuExit::MmioWrite(..))));
    assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
    m.kvm_vm.reset().unwrap();
    guarded.settle(&mut vcpu).unwrap();
    start(&vcpu, DATA + 8, 2);
    guarded.before_run(&mut vcpu).unwrap();
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Hlt)));
    assert_eq!(vcpu.get_regs().unwrap().rip, CODE + 3);
    assert_eq!((m.byte(DATA), m.byte(DATA + 8)), (0, 2));
    // Refused, and not dealt with yet: the page is free now, but not for that.
    assert_eq!(m.ask_in(2, &lock(page(0)..page(1))), (0, None));
    start(&vcpu, DATA + 16, 3);
    guarded.before_run(&mut vcpu).unwrap();
    assert!(matches!(vcpu.run(), Ok(VcpuExit::MmioWrite(..))));
    m.kvm_vm.reset().unwrap();
    assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
    guarded.settle(&mut vcpu).unwrap();
    assert_eq!(m.byte(DATA + 16), 0);
    // An access to an MSR as well, which was logged and let through.
    let log = one(CSTAR, MsrAccess::WRITE, MsrAction::Log);
    assert_eq!(m.ask_in(3, &lock_msrs(&[log])), (0, None));
    begin_access(&vcpu, CSTAR, Some(7));
    guarded.before_run(&mut vcpu).unwrap();
    assert!(matches!(vcpu.run(), Ok(VcpuExit::X86Wrmsr(_))));
    m.kvm_vm.reset().unwrap();
    assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
    guarded.settle(&mut vcpu).unwrap();
    m.vcpu = Some((vcpu, guarded));
    assert_eq!(m.msr(0, CSTAR), 0);
    assert_eq!(m.write(0, CSTAR, 7), (vec![], Some(7)));
}

#[test]
fn a_reset_frees_everything_and_begins_another_generation() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(3))), (0, None));
    assert_eq!(m.ask(&Demand::Seal), (0, None));
    m.kvm_vm.reset().unwrap();
    assert_eq!(m.store(DATA, 9), (vec![], CODE + 3));
    assert!(matches!(m.hear(), Heard::Reset(2)));
    assert_eq!(m.state(), InForce::default());
    assert_eq!(m.ask(&lock(page(0)..page(3))), (ESTALE, None));
    assert_eq!(m.ask_in(2, &lock(page(0)..page(3))), (0, None));
    m.kvm_vm.catch_up(77);
    assert!(matches!(m.hear(), Heard::CaughtUp(77)));
}

#[test]
fn memory_goes_out_of_the_vm_with_its_enforcer() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    let (mut vcpu, _) = m.vcpu.take().unwrap();
    drop(m);
    // Its thread ends a little later.
    let start_time = std::time::Instant::now();
    loop {
        start(&vcpu, DATA + 4096, 1);
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => assert!(start_time.elapsed() < DEADLINE),
            // Not even the instruction is there.
            Ok(_) => break,
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn a_vcpu_that_stores_all_the_time_is_stopped_by_an_ok() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    // All that it has to do is to end KVM_RUN.
    signal_hook::flag::register(SIGRTMIN(), Arc::default()).unwrap();
    let (mut vcpu, mut guarded) = m.vcpu.take().unwrap();
    let regs = kvm_regs {
        rip: CODE + 0x100,
        rdi: DATA,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let ends = Arc::new(AtomicBool::new(false));
    let refused = Arc::new(AtomicU32::new(0));
    let door = Arc::clone(&m.door);
    let thread = {
        let (ends, refused) = (Arc::clone(&ends), Arc::clone(&refused));
        thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                door.enter();
                guarded.before_run(&mut vcpu).unwrap();
                let exit = vcpu.run();
                door.leave();
                match exit {
                    Ok(VcpuExit::MmioWrite(..)) => {
                        assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                    Ok(VcpuExit::Intr) => {}
                    Err(e) => assert_eq!(e.errno(), 4, "EINTR"),
                    other => panic!("{other:?}"),
                }
            }
        })
    };
    *m.door.kick.lock().unwrap() = Some(thread);
    let wait_for = |what: &str, is: &dyn Fn() -> bool| {
        let start = std::time::Instant::now();
        while !is() {
            assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
            thread::yield_now();
        }
    };
    for round in 0..20 {
        let before = m.byte(DATA);
        wait_for("a store that lands", &|| m.byte(DATA) != before);
        assert_eq!(m.ask_in(round + 1, &lock(page(0)..page(1))), (0, None));
        let (held, count) = (m.byte(DATA), refused.load(Ordering::SeqCst));
        wait_for("stores that do not", &|| {
            refused.load(Ordering::SeqCst) > count + 3
        });
        assert_eq!(m.byte(DATA), held, "round {round}");
        m.kvm_vm.reset().unwrap();
    }
    ends.store(true, Ordering::SeqCst);
    let is_finished = || m.door.kick.lock().unwrap().as_ref().unwrap().is_finished();
    while !is_finished() {
        // Not by signals alone: one after the other without a pause leaves it no time to end.
        m.door.while_out(&mut || {});
        thread::yield_now();
    }
    let thread = m.door.kick.lock().unwrap().take().unwrap();
    thread.join().unwrap();
    drop(m.ear);
}

const SYSENTER_CS: u32 = 0x174;
const SYSENTER_EIP: u32 = 0x176;
const PAT: u32 = 0x277;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
/// One that is not plain: the microcode's revision.
const REVISION: u32 = 0x8b;
/// One that nobody has.
const NOBODYS: u32 = 0x1234;

const ADDRESS: u64 = 0xffff_8000_0000_0000;

/// One exit, dealt with.
const ONE: &[Verdict] = &[Verdict::Done];

fn pin(mask: u64) -> MsrAction {
    MsrAction::Pin { mask, log: false }
}

fn rule(msrs: Range<u32>, access: MsrAccess, action: MsrAction) -> Rule {
    let range = MsrRange::new(msrs.start, msrs.end - 1).unwrap();
    Rule::new(range, access, action).unwrap()
}

fn one(msr: u32, access: MsrAccess, action: MsrAction) -> Rule {
    rule(msr..msr + 1, access, action)
}

fn replace(rules: &[Rule]) -> Demand {
    Demand::Msrs(msr::Order::Replace(rules.to_vec()))
}

fn lock_msrs(rules: &[Rule]) -> Demand {
    Demand::Msrs(msr::Order::Lock(rules.to_vec()))
}

fn host(rules: &[HostRule]) -> MsrPolicy {
    MsrPolicy::new(Unlisted::Allow, rules).unwrap()
}

fn msr_violation(cpu: u32, msr: u32, write: Option<u64>, action: Action) -> Violation {
    Violation {
        access: if write.is_some() {
            Access::Write
        } else {
            Access::Read
        },
        source: Source::Vcpu(cpu),
        target: Target::Msr(msr),
        gva: Violation::UNKNOWN,
        rip: if write.is_some() { WRITES } else { READS },
        value: write.unwrap_or(0),
        size: 8,
        times: 1,
        lost: 0,
        action,
    }
}

fn refused(cpu: u32, msr: u32, write: Option<u64>) -> Violation {
    msr_violation(cpu, msr, write, Action::Refused(Policy::Inject))
}

#[test]
fn each_action_does_what_it_says_and_no_more() {
    use MsrAction::{Allow, Deny, Log};
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let (r, w, rw) = (MsrAccess::READ, MsrAccess::WRITE, MsrAccess::all());
    for msr in [LSTAR, SYSENTER_EIP] {
        let base = if msr == LSTAR { ADDRESS } else { 0 };
        for cpu in 0..2 {
            let (old, new) = (base + 0x1000 + u64::from(cpu), base + 0x2000);
            assert_eq!(m.write(cpu, msr, old), (vec![], Some(old)));
            // What becomes of a read, of a write of what is there, and of another: whether it makes
            // an exit, and goes through; and whether what goes through is told of.
            let (free, seen, told, denied) = (
                (0, true, false),
                (1, true, false),
                (1, true, true),
                (1, false, true),
            );
            for (access, action, read, same, other) in [
                (r, Log, told, free, free),
                (w, Log, free, told, told),
                (rw, Log, told, told, told),
                (w, pin(!0), free, seen, denied),
                (w, pin(0x1000), free, seen, denied),
                (w, pin(0x4000), free, seen, seen),
                (
                    w,
                    MsrAction::Pin {
                        mask: !0,
                        log: true,
                    },
                    free,
                    told,
                    denied,
                ),
                (w, Deny, free, denied, denied),
                (r, Deny, denied, free, free),
                (rw, Deny, denied, denied, denied),
                (rw, Allow, free, free, free),
            ] {
                m.set_msr(cpu, msr, old);
                assert_eq!(
                    m.ask(&replace(&[one(msr, rw, Allow), one(msr, access, action)])),
                    (0, None)
                );
                for (write, (exits, goes, is_told)) in
                    [(None, read), (Some(old), same), (Some(new), other)]
                {
                    let before = m.msr(cpu, msr);
                    let what = format!("{msr:#x} {action:?} {write:x?}");
                    let got = write.unwrap_or(before);
                    let expected = (vec![Verdict::Done; exits], goes.then_some(got));
                    assert_eq!(m.access(cpu, msr, write), expected, "{what}");
                    let left = if goes { got } else { before };
                    assert_eq!(m.msr(cpu, msr), left, "{what}");
                    if is_told {
                        let expected = if goes {
                            Violation {
                                value: got,
                                ..msr_violation(cpu, msr, write, Action::Audit)
                            }
                        } else {
                            refused(cpu, msr, write)
                        };
                        assert_eq!(m.violation(), expected, "{what}");
                    }
                }
                // Nothing else was told.
                m.kvm_vm.catch_up(5);
                assert!(matches!(m.hear(), Heard::CaughtUp(5)), "{action:?}");
            }
        }
    }
    assert_eq!(m.state(), InForce::default());
}

#[test]
fn an_msr_that_is_not_plain_takes_a_pin_of_all_bits_and_what_is_denied() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let all = MsrAccess::all();
    assert_eq!(
        m.ask(&lock_msrs(&[one(NOBODYS, all, MsrAction::Deny)])),
        (0, None)
    );
    assert_eq!(m.read(1, NOBODYS), (ONE.to_vec(), None));
    assert_eq!(m.violation(), refused(1, NOBODYS, None));
    assert_eq!(m.write(0, NOBODYS, 1 << 63), (ONE.to_vec(), None));
    assert_eq!(m.violation(), refused(0, NOBODYS, Some(1 << 63)));
    let has = m.msr(0, REVISION);
    let pinned = one(REVISION, MsrAccess::WRITE, pin(!0));
    assert_eq!(m.ask(&lock_msrs(&[pinned])), (0, None));
    assert_eq!(m.write(0, REVISION, has), (ONE.to_vec(), Some(has)));
    assert_eq!(m.write(0, REVISION, has ^ 1 << 40), (ONE.to_vec(), None));
    assert_eq!(m.msr(0, REVISION), has);
    assert_eq!(m.read(0, REVISION), (vec![], Some(has)));
}

#[test]
fn a_rule_that_kvm_cannot_keep_to_the_letter_is_refused_whole() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let (r, w) = (MsrAccess::READ, MsrAccess::WRITE);
    let good = one(LSTAR, w, MsrAction::Deny);
    for bad in [
        one(REVISION, r, MsrAction::Log),
        one(REVISION, w, MsrAction::Log),
        one(REVISION, w, pin(1)),
        one(
            REVISION,
            w,
            MsrAction::Pin {
                mask: !0,
                log: true,
            },
        ),
        one(NOBODYS, w, pin(!0)),
        rule(SYSENTER_CS..SYSENTER_EIP + 2, r, MsrAction::Log),
        rule(0x200..0x600, w, pin(!0)),
    ] {
        for demand in [replace(&[good, bad, bad]), lock_msrs(&[good, bad, bad])] {
            assert_eq!(m.ask(&demand), (EOPNOTSUPP, Some(1)), "{bad:?}");
        }
    }
    assert_eq!(m.state(), InForce::default());
    assert_eq!(m.write(0, LSTAR, ADDRESS), (vec![], Some(ADDRESS)));
}

#[test]
fn rules_that_are_refused_change_nothing() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let w = MsrAccess::WRITE;
    let deny = |msr| one(msr, w, MsrAction::Deny);
    let allow = |msr| one(msr, w, MsrAction::Allow);
    assert_eq!(m.ask(&lock_msrs(&[deny(LSTAR)])), (0, None));
    let before = m.state();
    let windows: Vec<_> = (1..20)
        .map(|n| deny(0x1000_0000 * (n % 16) + 0x10_0000 * n))
        .collect();
    let stripes: Vec<_> = (0..4096).map(|n| deny(0x4000_0000 + 2 * n)).collect();
    let many: Vec<_> = (0x200..0x210)
        .chain(0x400..0x480)
        .chain(SYSENTER_CS..=SYSENTER_EIP)
        .map(|msr| one(msr, w, pin(!0)))
        .collect();
    for (demand, expected) in [
        (replace(&[deny(CSTAR), allow(LSTAR)]), (EPERM, Some(1))),
        (replace(&windows), (ENOSPC, None)),
        (replace(&stripes), (ENOSPC, None)),
    ] {
        assert_eq!(m.ask(&demand), expected);
        assert_eq!(m.state(), before);
        assert_eq!(m.write(0, CSTAR, ADDRESS), (vec![], Some(ADDRESS)));
    }
    // What can be pinned depends on the host; too much of it is one error or the other.
    let (status, _) = m.ask(&replace(&many));
    assert!([ENOSPC, EOPNOTSUPP].contains(&status), "{status}");
    assert_eq!(m.ask_in(2, &replace(&[deny(CSTAR)])), (ESTALE, None));
    assert_eq!(m.write(0, CSTAR, 0), (vec![], Some(0)));
    assert_eq!(m.write(0, LSTAR, 0), (ONE.to_vec(), None));
    // All but the last of the stripes fit, beside what is there.
    assert_eq!(m.ask(&replace(&stripes[1..])), (0, None));
    assert_eq!(m.read(1, 0x4000_0001).0, vec![]);
    assert_eq!(m.write(1, 0x4000_0000 + 2 * 4095, 0), (ONE.to_vec(), None));
}

#[test]
fn a_pin_keeps_what_each_vcpu_has_though_the_vmm_may_change_it() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let of = |cpu: u32| ADDRESS + 0x1000 * (u64::from(cpu) + 1);
    for cpu in 0..2 {
        assert_eq!(m.write(cpu, LSTAR, of(cpu)), (vec![], Some(of(cpu))));
    }
    let pinned = one(LSTAR, MsrAccess::WRITE, pin(!0));
    assert_eq!(m.ask(&lock_msrs(&[pinned])), (0, None));
    for cpu in 0..2 {
        assert_eq!(m.write(cpu, LSTAR, of(1 - cpu)), (ONE.to_vec(), None));
        // As INIT does.
        m.set_msr(cpu, LSTAR, 0);
        assert_eq!(m.write(cpu, LSTAR, 0), (ONE.to_vec(), Some(0)));
        // Another rule for it keeps nothing anew.
        if cpu == 1 {
            let log = one(LSTAR, MsrAccess::WRITE, MsrAction::Log);
            assert_eq!(m.ask(&lock_msrs(&[log])), (0, None));
        }
        for other in [of(1 - cpu), of(cpu) + 8] {
            assert_eq!(m.write(cpu, LSTAR, other), (ONE.to_vec(), None));
        }
        assert_eq!(m.msr(cpu, LSTAR), 0);
        assert_eq!(m.write(cpu, LSTAR, of(cpu)), (ONE.to_vec(), Some(of(cpu))));
        assert_eq!(m.msr(cpu, LSTAR), of(cpu));
        assert_eq!(m.write(cpu, LSTAR, 0), (ONE.to_vec(), None));
    }
}

#[test]
fn a_mask_that_grows_keeps_the_bits_that_it_grows_by() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let pinned = |mask| lock_msrs(&[one(STAR, MsrAccess::WRITE, pin(mask))]);
    m.set_msr(0, STAR, 0x0023_0010_0000_0001);
    assert_eq!(m.ask(&pinned(0xffff_ffff_0000_0000)), (0, None));
    let value = 0x0023_0010_0000_0002;
    assert_eq!(m.write(0, STAR, value), (ONE.to_vec(), Some(value)));
    assert_eq!(m.ask(&pinned(0xf)), (0, None));
    // It has run since, so what is gone from the MSR is known.
    assert_eq!(m.read(0, STAR), (vec![], Some(value)));
    m.set_msr(0, STAR, 0);
    for (other, goes) in [
        (value ^ 3, false),
        (0x0023_0010_0000_0000, false),
        (value & 0xf, false),
        (value | 0xff0, true),
    ] {
        assert_eq!(
            m.write(0, STAR, other),
            (ONE.to_vec(), goes.then_some(other))
        );
    }
}

#[test]
fn the_policy_decides_what_becomes_of_a_denied_access() {
    for (policy, verdict, written) in [
        (Policy::Drop, Verdict::Done, Some(7)),
        (Policy::Pause, Verdict::Pause, Some(7)),
        (Policy::Shutdown, Verdict::Shutdown, Some(7)),
        (Policy::Inject, Verdict::Done, None),
    ] {
        let Some(mut m) = Machine::new(policy) else {
            return;
        };
        let deny = one(CSTAR, MsrAccess::all(), MsrAction::Deny);
        assert_eq!(m.ask(&lock_msrs(&[deny])), (0, None));
        assert_eq!(m.write(0, CSTAR, 7), (vec![verdict], written));
        assert_eq!(m.violation().action, Action::Refused(policy));
        assert_eq!(m.msr(0, CSTAR), 0);
        // There is nothing that a read could go on with.
        let policy = match policy {
            Policy::Drop => Policy::Inject,
            policy => policy,
        };
        assert_eq!(m.read(0, CSTAR), (vec![verdict], None));
        assert_eq!(
            m.violation(),
            msr_violation(0, CSTAR, None, Action::Refused(policy))
        );
    }
}

#[test]
fn what_is_logged_is_checked_as_the_cpu_would() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let efer = m.msr(0, EFER);
    // Some KVMs take any PAT, of everybody.
    for (msr, value, good) in [
        (LSTAR, 0x7fff_ffff_ffff, true),
        (LSTAR, 1 << 62, false),
        (CSTAR, ADDRESS, true),
        (PAT, 0x0007_0406_0007_0401, true),
        (
            PAT,
            0x0007_0406_0007_0402,
            m.vmm_may(PAT, 0x0007_0406_0007_0402),
        ),
        (SYSENTER_EIP, 0x1234_5678, true),
        (EFER, efer | 1, true),
        (EFER, efer & !0x100, false),
        (EFER, efer | 2, false),
        (EFER, efer | 1 << 62, false),
    ] {
        let log = |action| replace(&[one(msr, MsrAccess::WRITE, action)]);
        let old = m.msr(0, msr);
        let free = m.write(0, msr, value);
        assert_eq!(free, (vec![], good.then_some(value)), "{msr:#x} {value:#x}");
        m.set_msr(0, msr, old);
        assert_eq!(m.ask(&log(MsrAction::Log)), (0, None));
        let logged = m.write(0, msr, value);
        assert_eq!(logged, (ONE.to_vec(), free.1), "{msr:#x} {value:#x}");
        assert_eq!(m.msr(0, msr), if good { value } else { old });
        assert_eq!(m.ask(&log(MsrAction::Allow)), (0, None));
        m.set_msr(0, msr, old);
    }
}

#[test]
fn a_seal_is_for_msrs_too() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let deny = one(LSTAR, MsrAccess::WRITE, MsrAction::Deny);
    let allow = one(LSTAR, MsrAccess::WRITE, MsrAction::Allow);
    assert_eq!(m.ask(&replace(&[deny])), (0, None));
    assert_eq!(m.ask(&Demand::Seal), (0, None));
    assert_eq!(m.ask(&replace(&[allow])), (EPERM, Some(0)));
    assert_eq!(m.ask(&replace(&[deny])), (0, None));
    assert!(m.state().msrs.write(LSTAR).immutable);
    assert_eq!(m.write(0, LSTAR, 0), (ONE.to_vec(), None));
}

#[test]
fn a_reset_ends_the_guests_rules_and_has_the_hosts_pins_kept_anew() {
    let host_rules = [HostRule::Limit(one(LSTAR, MsrAccess::WRITE, pin(!0)))];
    let Some(mut m) = Machine::with_policy(Policy::Inject, host(&host_rules)) else {
        return;
    };
    // Power-on, of which the guest leaves nothing.
    assert_eq!(m.write(0, LSTAR, 0x1000), (ONE.to_vec(), None));
    let rules = [
        one(STAR, MsrAccess::WRITE, pin(!0)),
        one(CSTAR, MsrAccess::all(), MsrAction::Deny),
    ];
    assert_eq!(m.ask(&lock_msrs(&rules)), (0, None));
    assert_eq!(m.write(0, STAR, 1), (ONE.to_vec(), None));
    assert_eq!(m.ask(&Demand::Seal), (0, None));

    m.set_msr(0, LSTAR, 0x2000);
    m.kvm_vm.reset().unwrap();
    let state = m.state();
    assert_eq!(state.msrs, msr::Table::default());
    assert_eq!(state.host, Some(host(&host_rules)));
    assert_eq!(m.write(0, STAR, 1), (vec![], Some(1)));
    assert_eq!(m.write(0, CSTAR, 1), (vec![], Some(1)));
    assert_eq!(m.write(0, LSTAR, 0), (ONE.to_vec(), None));
    m.set_msr(0, LSTAR, 0);
    assert_eq!(m.write(0, LSTAR, 0x2000), (ONE.to_vec(), Some(0x2000)));
    // What the guest pins in its next life is what it has there.
    assert_eq!(m.ask_in(2, &lock_msrs(&rules[..1])), (0, None));
    assert_eq!(m.write(0, STAR, 1), (ONE.to_vec(), Some(1)));
    assert_eq!(m.write(0, STAR, 0), (ONE.to_vec(), None));
}

#[test]
fn the_hosts_rules_hold_from_the_start_and_with_the_guests() {
    let constant = HostRule::Emulate {
        range: MsrRange::new(REVISION, REVISION).unwrap(),
        value: 0xfeed_f00d_dead_beef,
        log: true,
    };
    let (r, w) = (MsrAccess::READ, MsrAccess::WRITE);
    let policy = host(&[constant, HostRule::Limit(one(LSTAR, w, MsrAction::Log))]);
    let Some(mut m) = Machine::with_policy(Policy::Inject, policy) else {
        return;
    };
    let value = 0xfeed_f00d_dead_beef;
    assert_eq!(m.read(0, REVISION), (ONE.to_vec(), Some(value)));
    let told = Violation {
        value,
        ..msr_violation(0, REVISION, None, Action::Audit)
    };
    assert_eq!(m.violation(), told);
    assert_eq!(m.write(0, LSTAR, 5), (ONE.to_vec(), Some(5)));
    assert_eq!(
        m.violation(),
        msr_violation(0, LSTAR, Some(5), Action::Audit)
    );
    // A pin of the guest's does not hide its writes from the host.
    let rules = [
        one(LSTAR, w, pin(0xf000)),
        one(REVISION, r, MsrAction::Deny),
    ];
    assert_eq!(m.ask(&lock_msrs(&rules)), (0, None));
    assert_eq!(m.write(0, LSTAR, 6), (ONE.to_vec(), Some(6)));
    assert_eq!(
        m.violation(),
        msr_violation(0, LSTAR, Some(6), Action::Audit)
    );
    assert_eq!(m.write(0, LSTAR, 0x1000), (ONE.to_vec(), None));
    assert_eq!(m.read(0, REVISION), (ONE.to_vec(), None));
    m.kvm_vm.reset().unwrap();
    assert_eq!(m.read(0, REVISION), (ONE.to_vec(), Some(value)));
}

#[test]
fn a_host_may_deny_all_that_it_does_not_list() {
    let allow = |msr| HostRule::Limit(one(msr, MsrAccess::all(), MsrAction::Allow));
    let policy = MsrPolicy::new(Unlisted::Deny, &[allow(STAR), allow(EFER)]).unwrap();
    let Some(mut m) = Machine::with_policy(Policy::Inject, policy) else {
        return;
    };
    assert_eq!(m.write(1, STAR, 1), (vec![], Some(1)));
    for msr in [LSTAR, NOBODYS, 0, 0xffff_fff0] {
        assert_eq!(m.read(1, msr), (ONE.to_vec(), None));
        assert_eq!(m.write(1, msr, 0), (ONE.to_vec(), None));
    }
    assert_eq!(m.write(1, STAR, 2), (vec![], Some(2)));
}

#[test]
fn hosts_rules_that_cannot_be_enforced_are_an_error_that_names_one() {
    let Some(kvm) = kvm() else {
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let memory = Arc::new(memory);
    let new = |rules: &[HostRule]| {
        let options = Options {
            msr_policy: Some(host(rules)),
            ..Options::new(0..10)
        };
        KvmVm::new(Arc::clone(&vm), Arc::clone(&memory), options)
    };
    let limit = |msr, action| HostRule::Limit(one(msr, MsrAccess::WRITE, action));
    let good = limit(LSTAR, MsrAction::Deny);
    let error = new(&[good, limit(REVISION, MsrAction::Log)]).err();
    assert!(matches!(
        error,
        Some(NewError::MsrPolicy(MsrPolicyError::Rule { index: 1 }))
    ));
    let windows: Vec<_> = (0..17)
        .map(|n| limit(0x10_0000 * (n + 1), MsrAction::Deny))
        .collect();
    assert!(matches!(
        new(&windows).err(),
        Some(NewError::MsrPolicy(MsrPolicyError::NoRoom(_)))
    ));
    // Nothing is left behind.
    assert!(new(&[good]).is_ok());
}

#[test]
fn an_access_that_is_answered_late_is_answered_by_the_rules_of_then() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    use MsrAction::{Allow, Deny, Log};
    let (r, w) = (MsrAccess::READ, MsrAccess::WRITE);
    m.set_msr(0, LSTAR, 0x55);
    let revision = m.msr(0, REVISION);
    for (msr, write, access, first, then, expected) in [
        // Not plain, and free now: KVM does it.
        (REVISION, None, r, Deny, Allow, Some(revision)),
        (LSTAR, Some(0x77), w, Deny, Allow, Some(0x77)),
        (LSTAR, None, r, Deny, Log, Some(0x77)),
        (LSTAR, Some(0x99), w, Log, pin(!0), None),
        (LSTAR, Some(0x99), w, Log, Deny, None),
    ] {
        assert_eq!(m.ask(&replace(&[one(msr, access, first)])), (0, None));
        let (mut vcpu, mut guarded) = m.vcpu.take().unwrap();
        let code = begin_access(&vcpu, msr, write);
        let before = vcpu.get_regs().unwrap();
        guarded.before_run(&mut vcpu).unwrap();
        assert!(matches!(
            vcpu.run(),
            Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_))
        ));
        assert_eq!(vcpu.get_regs().unwrap(), before);
        assert_eq!(m.ask(&replace(&[one(msr, access, then)])), (0, None));
        assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
        guarded.before_run(&mut vcpu).unwrap();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::Hlt)), "{first:?}");
        let got = end_access(&vcpu, &m.memory, code);
        m.vcpu = Some((vcpu, guarded));
        assert_eq!(got, expected, "{first:?} {then:?}");
        assert_eq!(m.msr(0, LSTAR), if msr == LSTAR { 0x77 } else { 0x55 });
        assert_eq!(m.ask(&replace(&[one(msr, access, Allow)])), (0, None));
    }
}

#[test]
fn a_vcpu_that_writes_an_msr_all_the_time_is_stopped_by_an_ok() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    signal_hook::flag::register(SIGRTMIN(), Arc::default()).unwrap();
    let (mut vcpu, mut guarded) = m.vcpu.take().unwrap();
    let regs = kvm_regs {
        rip: WRITES_ON,
        rcx: LSTAR.into(),
        rdi: DATA,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let ends = Arc::new(AtomicBool::new(false));
    let door = Arc::clone(&m.door);
    // What it had in the MSR after each exit that was answered.
    let held = Arc::new(Mutex::new((0_u64, 0_u64)));
    let thread = {
        let (ends, held) = (Arc::clone(&ends), Arc::clone(&held));
        thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                door.enter();
                guarded.before_run(&mut vcpu).unwrap();
                let exit = vcpu.run();
                door.leave();
                match exit {
                    Ok(VcpuExit::X86Wrmsr(_)) => {
                        assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
                        let mut entries = Msrs::from_entries(&[entry(LSTAR, 0)]).unwrap();
                        vcpu.get_msrs(&mut entries).unwrap();
                        let mut held = held.lock().unwrap();
                        *held = (held.0 + 1, entries.as_slice()[0].data);
                    }
                    Ok(VcpuExit::Intr) => {}
                    Err(e) => assert_eq!(e.errno(), 4, "EINTR"),
                    other => panic!("{other:?}"),
                }
            }
        })
    };
    *m.door.kick.lock().unwrap() = Some(thread);
    let wait_for = |what: &str, is: &dyn Fn() -> bool| {
        let start = std::time::Instant::now();
        while !is() {
            assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
            thread::yield_now();
        }
    };
    let written =
        |memory: &GuestMemoryMmap| -> u32 { memory.read_obj(GuestAddress(DATA)).unwrap() };
    let (w, pin_all) = (MsrAccess::WRITE, pin(!0));
    for action in [pin_all, MsrAction::Deny, pin_all] {
        let before = written(&m.memory);
        wait_for("a write", &|| written(&m.memory) != before);
        assert_eq!(m.ask(&replace(&[one(LSTAR, w, action)])), (0, None));
        let refused = || held.lock().unwrap().0;
        let count = refused();
        wait_for("a write that is refused", &|| refused() > count + 1);
        let first = held.lock().unwrap().1;
        let count = refused();
        wait_for("more of them", &|| refused() > count + 10);
        assert_eq!(held.lock().unwrap().1, first);
        assert_ne!(first, 0);
        assert_eq!(
            m.ask(&replace(&[one(LSTAR, w, MsrAction::Allow)])),
            (0, None)
        );
    }
    ends.store(true, Ordering::SeqCst);
    let is_finished = || m.door.kick.lock().unwrap().as_ref().unwrap().is_finished();
    while !is_finished() {
        m.door.while_out(&mut || {});
        thread::yield_now();
    }
    let thread = m.door.kick.lock().unwrap().take().unwrap();
    thread.join().unwrap();
}

#[test]
fn what_can_be_done_about_msrs_is_said() {
    let Some(kvm) = kvm() else {
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let kvm_vm = KvmVm::new(vm, Arc::new(memory), Options::new(0..10)).unwrap();
    let (tell, heard) = channel();
    let ear: Arc<dyn VmEvents> = Arc::new(Ear(Mutex::new(tell)));
    let weak: Weak<dyn VmEvents> = Arc::downgrade(&ear);
    kvm_vm.start(weak, Arc::new(Door::default())).unwrap();
    let Ok(Heard::Connected(info)) = heard.recv_timeout(DEADLINE) else {
        panic!("connected comes first");
    };
    let msrs = MsrInfo {
        max_ranges: 4096,
        max_pins: 64,
        filter_ranges: Some(16),
    };
    assert_eq!(info.msrs, msrs);
}

const FXSAVE: &[u8] = &[0x0f, 0xae, 0x07];
const FISTP: &[u8] = &[0xdf, 0x3f];
const CMPXCHG16B: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0f];

/// FXSAVE stores MXCSR there.
const MXCSR: u64 = 24;

#[test]
fn a_denied_store_that_kvm_cannot_emulate_is_one_like_any_other() {
    for (policy, verdict, expected) in [
        (Policy::Inject, Verdict::Done, End::Fault(13)),
        (Policy::Drop, Verdict::Done, End::Behind),
        (Policy::Pause, Verdict::Pause, End::Behind),
        (Policy::Shutdown, Verdict::Shutdown, End::Behind),
    ] {
        let Some(mut m) = Machine::new(policy) else {
            return;
        };
        assert_eq!(m.ask(&lock(page(1)..page(2))), (0, None));
        let before = vec![0x5a; 4096];
        let at = DATA + 4096;
        m.memory.write_slice(&before, GuestAddress(at)).unwrap();
        for cpl in [3, 0] {
            for code in [FXSAVE, FISTP, CMPXCHG16B] {
                let what = format!("{policy} at CPL {cpl}: {code:x?}");
                let ran = m.run(cpl, code, at + 0x40);
                assert_eq!(ran, (vec![verdict], Some(expected)), "{what}");
                let violation = m.violation();
                let told = Violation {
                    access: Access::Write,
                    source: Source::Vcpu(0),
                    target: Target::Memory(at + 0x40),
                    gva: at + 0x40,
                    rip: UNEMULATED,
                    value: 0,
                    size: 0,
                    times: 1,
                    lost: 0,
                    action: Action::Refused(policy),
                };
                assert_eq!(violation, told, "{what}");
            }
            // From the page before.
            let ran = m.run(cpl, FXSAVE, at - 0x100);
            assert_eq!(ran, (vec![verdict], Some(expected)));
            let violation = m.violation();
            assert_eq!((violation.gva, violation.target), (at, Target::Memory(at)));
        }
        let mut after = vec![0; 4096];
        m.memory.read_slice(&mut after, GuestAddress(at)).unwrap();
        assert!(after == before, "{policy}");
    }
}

#[test]
fn what_kvm_cannot_emulate_for_another_reason_is_an_undefined_instruction_to_users_only() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    let watch = protection(page(0)..page(1), watched());
    let deny = protection(page(1)..page(2), denied());
    let order = Order::Protect(vec![watch, deny]);
    assert_eq!(m.ask(&Demand::Pages(order)), (0, None));
    // The last 2 MiB are mapped to where no memory is.
    let nowhere = RAM - (2 << 20);
    let entry = GuestAddress(0x3000 + 8 * (nowhere >> 21));
    m.memory.write_obj((4 * RAM) | 0x87, entry).unwrap();
    for at in [nowhere, DATA] {
        let ran = m.run(3, FXSAVE, at);
        assert_eq!(ran, (ONE.to_vec(), Some(End::Fault(6))), "{at:#x}");
        assert_eq!(m.run(0, FXSAVE, at), (vec![Verdict::NotMine], None));
    }
    assert_eq!(m.byte(DATA + MXCSR), 0);
    // An ordinary page.
    let at = DATA + 2 * 4096;
    assert_eq!(m.run(3, FXSAVE, at), (vec![], Some(End::Behind)));
    assert_eq!(m.byte(at + MXCSR), 0x80);
    // Nothing of it was told.
    m.kvm_vm.catch_up(5);
    assert!(matches!(m.hear(), Heard::CaughtUp(5)));
}

#[test]
fn a_store_that_kvm_cannot_emulate_is_tried_again_when_its_page_is_free_meanwhile() {
    let Some(mut m) = Machine::new(Policy::Inject) else {
        return;
    };
    let set = |attributes| {
        let held = protection(page(0)..page(1), attributes);
        Demand::Pages(Order::Protect(vec![held]))
    };
    for attributes in [watched(), denied()] {
        assert_eq!(m.ask(&set(attributes)), (0, None));
        let (mut vcpu, mut guarded) = m.vcpu.take().unwrap();
        begin(&vcpu, &m.memory, 3, FXSAVE, DATA);
        guarded.before_run(&mut vcpu).unwrap();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::InternalError)));
        assert_eq!(m.ask(&set(Attributes::default())), (0, None));
        assert_eq!(guarded.after_exit(&mut vcpu), Verdict::Done);
        guarded.before_run(&mut vcpu).unwrap();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::Hlt)));
        assert_eq!(end(&vcpu, &m.memory, 3, FXSAVE.len()), End::Behind);
        m.vcpu = Some((vcpu, guarded));
        assert_eq!(m.byte(DATA + MXCSR), 0x80);
        m.memory
            .write_obj(0_u8, GuestAddress(DATA + MXCSR))
            .unwrap();
    }
}

/// Stores 16 bytes, which KVM does in two pieces, or more over the edge of a page.
const MOVUPS: &[u8] = &[0x0f, 0x11, 0x07];

#[test]
fn one_event_is_made_of_a_store_or_two_if_a_denied_part_comes_after_a_watched_one() {
    for policy in [Policy::Drop, Policy::Pause] {
        let Some(mut m) = Machine::new(policy) else {
            return;
        };
        let watch = protection(page(0)..page(1), watched());
        let deny = protection(page(1)..page(2), denied());
        let watch_too = protection(page(2)..page(3), watched());
        let order = Order::Protect(vec![watch, deny, watch_too]);
        assert_eq!(m.ask(&Demand::Pages(order)), (0, None));
        let verdict = match policy {
            Policy::Pause => Verdict::Pause,
            _ => Verdict::Done,
        };
        let (audit, refused) = (Action::Audit, Action::Refused(policy));
        for (at, verdict, told, lands) in [
            (
                DATA + 0x100,
                Verdict::Done,
                &[(DATA + 0x100, audit)][..],
                16,
            ),
            (DATA + 0x1100, verdict, &[(DATA + 0x1100, refused)], 0),
            // Paused by way of the other thread.
            (
                DATA + 0x1000 - 12,
                Verdict::Done,
                &[(DATA + 0x1000 - 12, audit), (DATA + 0x1000, refused)],
                12,
            ),
            (
                DATA + 0x2000 - 12,
                verdict,
                &[(DATA + 0x2000 - 12, refused)],
                0,
            ),
        ] {
            m.memory.write_slice(&[0x5a; 16], GuestAddress(at)).unwrap();
            let ran = m.run(0, MOVUPS, at);
            assert_eq!(ran, (vec![verdict], Some(End::Behind)), "{policy} {at:#x}");
            for told in told {
                let violation = m.violation();
                let (target, action) = (Target::Memory(told.0), told.1);
                assert_eq!((violation.target, violation.action), (target, action));
                assert_eq!(violation.times, 1);
            }
            let mut after = [0; 16];
            m.memory.read_slice(&mut after, GuestAddress(at)).unwrap();
            let expected: Vec<u8> = (0..16).map(|n| if n < lands { 0 } else { 0x5a }).collect();
            assert_eq!(after, *expected, "{policy} {at:#x}");
            m.kvm_vm.catch_up(5);
            assert!(matches!(m.hear(), Heard::CaughtUp(5)), "{at:#x}");
        }
        // What came after the events has been done when another thing is answered.
        m.state();
        let paused = m.door.paused.load(Ordering::SeqCst);
        assert_eq!(paused, policy == Policy::Pause);
    }
}
