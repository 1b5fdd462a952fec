// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KvmVm` on the real KVM: a guest of a few bytes, in long mode at CPL 0, that stores where it is
//! told to.

use std::env;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vhost_guard::protect::{Attributes, Demand, Deny, GfnRange, Order, Protection};
use vhost_guard::vm::enforcer::{
    Action, Enforcer, HostPolicyOutcome, InForce, Outcome, Policy, Source, Target, Unexpected,
    Violation, VmEvents, VmInfo,
};
use vhost_guard::vm::kvm::{KvmVcpu, KvmVm, Options, Vcpus, Verdict};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

const RAM: u64 = 16 << 20;
const PML4: u64 = 0x1000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const CODE: u64 = 0x6000;
const HANDLER: u64 = 0x6800;
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
    Violation(Violation),
    Reset(u64),
    CaughtUp(u64),
}

struct Ear(Mutex<Sender<Heard>>);

impl Ear {
    fn hear(&self, heard: Heard) {
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

    fn host_policy(&self, _outcome: HostPolicyOutcome) {}

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
    memory: Arc<GuestMemoryMmap>,
    vcpu: Option<(VcpuFd, KvmVcpu)>,
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
        Self::with_slots(on_violation, 0..200)
    }

    fn with_slots(on_violation: Policy, slots: Range<u16>) -> Option<Self> {
        let kvm = kvm()?;
        let vm: Arc<VmFd> = Arc::new(kvm.create_vm().unwrap());
        let ram = [(GuestAddress(0), RAM as usize)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ram).unwrap());
        let options = Options {
            on_violation,
            max_ranges: 64,
            slots,
        };
        let kvm_vm = KvmVm::new(Arc::clone(&vm), Arc::clone(&memory), options).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        set_up(&vcpu, &memory);
        let (tell, heard) = channel();
        let ear: Arc<dyn VmEvents> = Arc::new(Ear(Mutex::new(tell)));
        let door = Arc::new(Door::default());
        let weak: Weak<dyn VmEvents> = Arc::downgrade(&ear);
        kvm_vm.start(weak, door.clone()).unwrap();
        let mut machine = Self {
            vcpu: Some((vcpu, kvm_vm.vcpu(0))),
            kvm_vm: Arc::new(kvm_vm),
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
        assert!(matches!(machine.hear(), Heard::State(0, state) if state == InForce::default()));
        Some(machine)
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

/// Long mode with the first 16 MiB mapped to themselves, and a handler of #GP that halts.
fn set_up(vcpu: &VcpuFd, memory: &GuestMemoryMmap) {
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    write(PML4, 0x2000 | 3);
    write(0x2000, 0x3000 | 3);
    for i in 0..RAM >> 21 {
        write(0x3000 + 8 * i, i << 21 | 0x83);
    }
    write(GDT + 8, 0x00af_9b00_0000_ffff);
    write(GDT + 16, 0x00cf_9300_0000_ffff);
    // An interrupt gate.
    write(IDT + 16 * 13, HANDLER & 0xffff | 8 << 16 | 0x8e00 << 32);
    // mov %al,(%rdi); hlt
    memory
        .write_slice(&[0x88, 0x07, 0xf4], GuestAddress(CODE))
        .unwrap();
    // again: inc %al; mov %al,(%rdi); jmp again
    let busy = [0xfe, 0xc0, 0x88, 0x07, 0xeb, 0xfa];
    memory
        .write_slice(&busy, GuestAddress(CODE + 0x100))
        .unwrap();
    memory.write_slice(&[0xf4], GuestAddress(HANDLER)).unwrap();

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
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 16 * 32 - 1);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8001_0011, PML4, 0x20);
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
    let no_exec = Attributes::new(Deny::NOEXEC, Deny::empty());
    let scattered = (0..65).map(|n| protection(page(16 + 2 * n)..page(17 + 2 * n), denied()));
    for (demand, expected) in [
        (Order::Protect(vec![fresh, free]), (EPERM, Some(1))),
        (Order::Lock(vec![fresh, outside]), (EINVAL, Some(1))),
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
    // KVM has slots up to number 32763, so it takes the first of three and then no other.
    let Some(mut m) = Machine::with_slots(Policy::Drop, 32763..32800) else {
        return;
    };
    for value in 1..4 {
        assert_eq!(m.ask(&lock(page(0)..page(1))), (EIO, None));
        assert_eq!(m.store(DATA, value), (vec![], CODE + 3));
        assert_eq!(m.byte(DATA), value);
    }
    assert_eq!(m.state(), InForce::default());
    assert!(!m.door.shut_down.load(Ordering::SeqCst));
}

#[test]
fn a_reset_without_anybody_who_could_ask_waits_for_nobody() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(1))), (0, None));
    m.ear = Arc::new(Ear(Mutex::new(channel().0)));
    // Its thread ends at the next task: this one, or one before it.
    m.kvm_vm.reset();
    m.kvm_vm.reset();
}

#[test]
fn a_reset_frees_everything_and_begins_another_generation() {
    let Some(mut m) = Machine::new(Policy::Drop) else {
        return;
    };
    assert_eq!(m.ask(&lock(page(0)..page(3))), (0, None));
    assert_eq!(m.ask(&Demand::Seal), (0, None));
    m.kvm_vm.reset();
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
        m.kvm_vm.reset();
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
