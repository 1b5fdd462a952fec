// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The enforcer of a VM of this process: what the device asks for becomes memslots.
//!
//! A thread of its own carries requests out, one after the other, and makes all calls of
//! [`VmEvents`]; vCPU threads only ask what becomes of an exit. Knows KVM, and nothing of virtio or
//! of how the VMM runs its vCPUs but what [`Vcpus`] says.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::exit::MsrAccess;
use super::memory::{DeviceMemory, Gate};
use super::memslots::Memslots;
use super::msrs::{MsrPolicyError, Msrs};
use super::slots::{Frames, Op, Plan, PlanError, RegionsError, Slots};
use super::vcpu::KvmVcpu;
use super::violations::Violations;
use crate::log_limit::{LogLimit, log_limited};
use crate::protect::msr::Policy as MsrPolicy;
use crate::protect::{
    Attributes, Change, Demand, Deny, GfnRange, Order, PAGE_SHIFT, Protection, Table,
};
use crate::vm::enforcer::{
    Accelerator, Access, Action, Enforcer, HostPolicyOutcome, InForce, Outcome, Policy, Source,
    Target, Violation, VmEvents, VmInfo,
};

static FAILED: LogLimit = LogLimit::new(5);

/// Most ranges in one request.
const MAX_REQUEST_RANGES: u32 = 4096;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const EOPNOTSUPP: u32 = 95;
const ESTALE: u32 = 116;

/// How the VMM brings its vCPUs to a stand.
pub trait Vcpus: Send + Sync {
    /// Calls `work` once, from the calling thread, while no vCPU is in KVM_RUN, and none enters it.
    /// A vCPU that is dealing with an exit may go on with that, but not enter again.
    ///
    /// Called by [`KvmVm`]'s own thread, which holds no lock.
    fn while_out(&self, work: &mut dyn FnMut());

    /// A device of the VMM was denied an access, or a vCPU a later part of one, and the policy is to
    /// stop the VM. Called by [`KvmVm`]'s own thread.
    fn pause(&self);

    /// The VM must not run on: an access was denied like that, and the policy is to end it, or KVM has
    /// refused to give back a memslot that it had, so that the guest has lost memory, or what is in
    /// force is not what was said. Called by [`KvmVm`]'s own thread, perhaps more than once.
    fn shut_down(&self);
}

/// What an embedder chooses. More may be added: begin with [`Options::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What becomes of a denied access, as far as the access allows it (`docs/device.md`).
    pub on_violation: Policy,
    /// Most disjoint ranges in force at once. Guests are told of fewer if there are too few `slots`.
    pub max_ranges: u32,
    /// Numbers of memslots that nobody else uses, the end exclusive and at most KVM_CAP_NR_MEMSLOTS. One
    /// is taken for each region of guest memory, and up to two for each range in force.
    pub slots: Range<u16>,
    /// The host's rules for MSRs, in force from the start for as long as there is the VM.
    pub msr_policy: Option<MsrPolicy>,
}

impl Options {
    /// A denied access is a fault, there is room for 4096 ranges, and the host has no rules for MSRs.
    #[must_use]
    pub fn new(slots: Range<u16>) -> Self {
        Self {
            on_violation: Policy::Inject,
            max_ranges: MAX_REQUEST_RANGES,
            slots,
            msr_policy: None,
        }
    }
}

/// Why there is no [`KvmVm`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NewError {
    /// This KVM has no read-only memslots.
    #[error("this KVM has no read-only memslots (KVM_CAP_READONLY_MEM)")]
    NoReadOnly,
    /// The VM's RAM cannot be put into memslots.
    #[error("guest memory cannot be put into memslots")]
    Regions(#[from] RegionsError),
    /// KVM refuses a memslot.
    #[error("KVM refuses the memslot at {gpa:#x}")]
    Memslot {
        /// Its guest-physical address.
        gpa: u64,
        /// KVM's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host's rules for MSRs cannot be enforced.
    #[error("the host's rules for MSRs cannot be enforced")]
    MsrPolicy(#[from] MsrPolicyError),
    /// KVM has no memslots of such numbers.
    #[error("memslot numbers end at {end}, and this KVM's at {limit} (KVM_CAP_NR_MEMSLOTS)")]
    SlotNumbers {
        /// The end of [`Options::slots`].
        end: u16,
        /// One more than KVM's last number.
        limit: u16,
    },
}

/// Why a [`KvmVm`] does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It was started before.
    #[error("it was started before")]
    Again,
    /// There is no thread to be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// What was locked is locked still, so the VM must not begin anew: end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what the guest has locked cannot be freed; the VM is to be ended")]
pub struct NotReset;

/// What becomes of an access of a vCPU.
pub(super) enum Decision {
    /// It is not about anything protected.
    NotMine,
    /// It is dealt with.
    Done,
    /// The vCPU gets a #GP(0).
    Fault,
    /// The VM is to be stopped.
    Pause,
    /// The VM is to be ended.
    Shutdown,
}

/// What has been told of a store, piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It is watched.
    Watched,
    /// It is denied, and what follows with it.
    Denied,
}

/// Enforces protections on a VM that this process owns.
#[derive(Debug)]
pub struct KvmVm {
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    memslots: Memslots,
    options: Options,
    /// KVM_RUN can leave a vCPU's registers where no ioctl is needed for them.
    pub(super) syncs_registers: bool,
    gate: Gate,
    pub(super) msrs: Msrs,
    /// Grows with each reset of the VM, with `state` locked.
    life: AtomicU64,
    /// Changes when memslots do, while all vCPUs are out.
    slots_epoch: AtomicU64,
    state: Mutex<State>,
    inbox: Mutex<Inbox>,
    filled: Condvar,
    reset: Condvar,
}

/// What is in force. Changed by the one thread only, while all vCPUs are out.
#[derive(Debug)]
struct State {
    generation: u64,
    pages: Table,
    slots: Slots,
    /// KVM leaves all instructions to user space that it cannot emulate.
    tells_unemulated: bool,
    /// KVM's memslots are not `slots`: nothing can be said of the VM any more.
    broken: bool,
}

#[derive(Default)]
struct Inbox {
    tasks: VecDeque<Task>,
    violations: Violations,
    started: bool,
    /// There is a thread that serves tasks.
    served: bool,
    ends: bool,
    /// A vCPU was denied an access, and the VM is to be stopped.
    stop: Option<Policy>,
    resets_asked: u64,
    resets_done: u64,
}

impl Inbox {
    /// What is to be done next: a guest that violates as fast as it can does not hold up tasks.
    fn next(&mut self) -> (VecDeque<Violation>, Option<Task>) {
        (self.violations.take(), self.tasks.pop_front())
    }
}

enum Task {
    CarryOut {
        seq: u64,
        generation: u64,
        demand: Demand,
    },
    State(u64),
    CatchUp(u64),
    Reset,
}

/// How a change of memslots has failed.
enum Failed {
    /// They are what they were.
    AsBefore,
    /// They are neither that nor what they should be.
    Broken,
}

/// A status and the entry that it is about.
pub(super) type Refused = (u32, Option<usize>);

impl KvmVm {
    /// Takes over the memslots of `memory` in `vm`, all read-write; the VMM makes none for it. When this
    /// is dropped they go, and then `memory` is let go of. No vCPU has run yet.
    ///
    /// Takes over the VM's MSR filter (KVM_X86_SET_MSR_FILTER), too, where there is one: the VMM sets
    /// none, and leaves KVM_MSR_EXIT_REASON_FILTER in what it enables of KVM_CAP_X86_USER_SPACE_MSR.
    /// A vCPU of another VM, which never runs, is asked what can be enforced: /dev/kvm is opened for it
    /// here, and where that cannot be done there are no rules for MSRs.
    ///
    /// # Errors
    ///
    /// [`NewError`]. The VM has none of the memslots then, and no filter.
    pub fn new(
        vm: Arc<VmFd>,
        memory: Arc<GuestMemoryMmap>,
        options: Options,
    ) -> Result<Self, NewError> {
        if !vm.check_extension(Cap::ReadonlyMem) {
            return Err(NewError::NoReadOnly);
        }
        // As user space counts them: those above are KVM's own.
        let limit = vm.check_extension_int(Cap::NrMemslots);
        let limit = u16::try_from(limit).unwrap_or(u16::MAX);
        let end = options.slots.end;
        if end > limit {
            return Err(NewError::SlotNumbers { end, limit });
        }
        let syncs_registers = vm.check_extension(Cap::SyncRegs);
        let memslots = Memslots::new(Arc::clone(&vm), memory);
        let slots = Slots::new(&memslots.regions(), options.slots.clone())?;
        for (made, slot) in slots.iter().enumerate() {
            let gpa = slot.gpa;
            if let Err(source) = memslots.carry_out(Op::Add(slot)) {
                memslots.let_go(slots.iter().take(made));
                return Err(NewError::Memslot { gpa, source });
            }
        }
        let msrs = Msrs::new(vm, options.msr_policy.clone())
            .inspect_err(|_| memslots.let_go(slots.iter()))?;
        let state = State {
            generation: 1,
            pages: Table::default(),
            slots,
            tells_unemulated: false,
            broken: false,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                memslots,
                options,
                syncs_registers,
                gate: Gate::default(),
                msrs,
                life: AtomicU64::new(0),
                slots_epoch: AtomicU64::new(0),
                state: Mutex::new(state),
                inbox: Mutex::default(),
                filled: Condvar::new(),
                reset: Condvar::new(),
            }),
        })
    }

    /// Begins to carry out what is asked for, and to tell `events`, by a thread of its own, which ends
    /// when this is dropped or nobody else holds `events`. If something panics there, the VM is shut
    /// down ([`Vcpus::shut_down`]).
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn start(
        &self,
        events: Weak<dyn VmEvents>,
        vcpus: Arc<dyn Vcpus>,
    ) -> Result<(), StartError> {
        let mut inbox = self.shared.inbox();
        if mem::replace(&mut inbox.started, true) {
            return Err(StartError::Again);
        }
        inbox.served = true;
        drop(inbox);
        let shared = Arc::clone(&self.shared);
        let serving = Serving(Arc::clone(&shared));
        let run = move || {
            // However it ends, nobody waits for it then.
            let _serving = serving;
            let run = || shared.run(&events, &*vcpus);
            if panic::catch_unwind(AssertUnwindSafe(run)).is_err() {
                log_limited!(
                    FAILED,
                    Error,
                    "kvm-guard panicked (please report it, with the log); the VM is given up"
                );
                shared.state().broken = true;
                vcpus.shut_down();
            }
        };
        thread::Builder::new()
            .name("kvm-guard".into())
            .spawn(run)
            .map_err(StartError::Thread)?;
        Ok(())
    }

    /// The VM is being reset: nothing that the guest asked for is in force when this returns. The vCPUs
    /// are to stand still, and what they had begun has no effect from here on:
    /// [`KvmVcpu::settle`] is to be called for each of them, by its thread or while that stands still,
    /// before its state is set anew. Not to be called from [`Vcpus`] or [`VmEvents`].
    ///
    /// Of MSRs that the host's rules pin, a vCPU keeps anew what they hold when it runs next: give it
    /// the values of power-on before that.
    ///
    /// # Errors
    ///
    /// [`NotReset`].
    pub fn reset(&self) -> Result<(), NotReset> {
        let mut inbox = self.shared.inbox();
        inbox.resets_asked += 1;
        let this = inbox.resets_asked;
        inbox.tasks.push_back(Task::Reset);
        self.shared.filled.notify_one();
        let done = |inbox: &mut Inbox| inbox.served && inbox.resets_done < this;
        let waited = self.shared.reset.wait_while(inbox, done);
        let was_done = waited.unwrap_or_else(PoisonError::into_inner).resets_done >= this;
        let state = self.shared.state();
        // Where nobody serves, nothing may have been asked for.
        let nothing = state.pages.is_empty() && self.shared.msrs.table().is_empty();
        if state.broken || !(was_done || nothing) {
            return Err(NotReset);
        }
        Ok(())
    }

    /// Guest memory for a device of the VMM that is about to do something on the guest's behalf.
    /// Everything that is written for a guest has to go through here, or a lock does not hold
    /// against it. Waits while a change is put in force.
    #[must_use]
    pub fn device_memory(&self) -> DeviceMemory<'_> {
        DeviceMemory::new(&self.shared, &self.shared.gate)
    }

    /// The vCPU with this number, for the thread that runs it. To be called once for each.
    #[must_use]
    pub fn vcpu(&self, index: u32) -> KvmVcpu {
        KvmVcpu::new(Arc::clone(&self.shared), index)
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        self.shared.inbox().ends = true;
        self.shared.filled.notify_all();
    }
}

/// The thread is there.
struct Serving(Arc<Shared>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.inbox().served = false;
        self.0.reset.notify_all();
    }
}

impl Drop for Shared {
    /// No vCPU is to touch memory that is not kept any more.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.broken {
            // KVM may have others.
            self.memslots.keep_memory();
        }
        self.memslots.let_go(state.slots.iter());
    }
}

impl Enforcer for KvmVm {
    fn carry_out(&self, seq: u64, generation: u64, demand: &Demand) {
        let demand = demand.clone();
        self.shared.put(Task::CarryOut {
            seq,
            generation,
            demand,
        });
    }

    fn request_state(&self, seq: u64) {
        self.shared.put(Task::State(seq));
    }

    fn catch_up(&self, seq: u64) {
        self.shared.put(Task::CatchUp(seq));
    }
}

impl fmt::Debug for Shared {
    /// Waits for no lock, so that it may be shown from anywhere.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Shared");
        if let Ok(state) = self.state.try_lock() {
            shown
                .field("generation", &state.generation)
                .field("ranges", &state.pages.len())
                .field("broken", &state.broken);
        }
        shown.finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, task: Task) {
        let mut inbox = self.inbox();
        if inbox.started && !inbox.served {
            // Nobody will.
            return;
        }
        if matches!(task, Task::CatchUp(_)) {
            // Only the last call counts.
            inbox.tasks.retain(|task| !matches!(task, Task::CatchUp(_)));
        }
        inbox.tasks.push_back(task);
        drop(inbox);
        self.filled.notify_one();
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        self.memslots.memory()
    }

    /// The thread.
    fn run(&self, events: &Weak<dyn VmEvents>, vcpus: &dyn Vcpus) {
        let Some(first) = events.upgrade() else {
            return;
        };
        first.connected(self.info());
        let (generation, in_force) = self.in_force();
        let _ = first.state(0, generation, in_force);
        if self.msrs.host().is_some() {
            first.host_policy(HostPolicyOutcome::InForce);
        }
        drop(first);
        loop {
            let ((violations, task), stop) = {
                let mut inbox = self
                    .filled
                    .wait_while(self.inbox(), |inbox| {
                        inbox.tasks.is_empty()
                            && inbox.violations.is_empty()
                            && inbox.stop.is_none()
                            && !inbox.ends
                    })
                    .unwrap_or_else(PoisonError::into_inner);
                if inbox.ends {
                    return;
                }
                (inbox.next(), inbox.stop.take())
            };
            let Some(events) = events.upgrade() else {
                return;
            };
            // What was seen before an answer is told before it.
            for violation in violations {
                events.violation(violation);
                match (violation.source, violation.action) {
                    (Source::Device, Action::Refused(Policy::Pause)) => vcpus.pause(),
                    (Source::Device, Action::Refused(Policy::Shutdown)) => vcpus.shut_down(),
                    _ => {}
                }
            }
            match stop {
                Some(Policy::Pause) => vcpus.pause(),
                Some(Policy::Shutdown) => vcpus.shut_down(),
                _ => {}
            }
            if let Some(task) = task {
                self.serve(task, &*events, vcpus);
            }
        }
    }

    /// Most disjoint ranges in force at once, for which there are slots whatever they are.
    fn max_ranges(&self) -> u32 {
        let regions = self.memslots.memory().num_regions();
        let spare = self.options.slots.len().saturating_sub(regions);
        let max = u32::try_from(spare / 2).unwrap_or(u32::MAX);
        self.options.max_ranges.min(max)
    }

    fn info(&self) -> VmInfo {
        VmInfo {
            accelerator: Accelerator::Kvm,
            deny: Deny::NOWRITE,
            audit: Deny::NOWRITE,
            policy: self.options.on_violation,
            generation: self.state().generation,
            max_ranges: self.max_ranges(),
            max_request_ranges: MAX_REQUEST_RANGES,
            msrs: self.msrs.info(),
        }
    }

    fn in_force(&self) -> (u64, InForce) {
        let state = self.state();
        let in_force = InForce {
            pages: state.pages.clone(),
            msrs: self.msrs.table(),
            host: self.msrs.host().cloned(),
        };
        (state.generation, in_force)
    }

    fn serve(&self, task: Task, events: &dyn VmEvents, vcpus: &dyn Vcpus) {
        match task {
            Task::CarryOut {
                seq,
                generation,
                demand,
            } => {
                let done = self.carry_out(generation, &demand, vcpus);
                let (status, index) = done.err().unwrap_or((0, None));
                let state = self.state();
                let outcome = Outcome {
                    status,
                    index: index.and_then(|index| u32::try_from(index).ok()),
                    generation: state.generation,
                    ranges_in_force: u32::try_from(state.pages.len()).unwrap_or(u32::MAX),
                    msr_ranges_in_force: self.msrs.ranges(),
                };
                drop(state);
                let _ = events.result(seq, outcome);
            }
            Task::State(seq) => {
                let (generation, in_force) = self.in_force();
                let _ = events.state(seq, generation, in_force);
            }
            Task::CatchUp(seq) => events.caught_up(seq),
            Task::Reset => {
                if let Some(generation) = self.begin_anew(vcpus) {
                    events.reset(generation);
                }
                self.inbox().resets_done += 1;
                self.reset.notify_all();
            }
        }
    }

    fn carry_out(
        &self,
        generation: u64,
        demand: &Demand,
        vcpus: &dyn Vcpus,
    ) -> Result<(), Refused> {
        let state = self.state();
        if state.broken {
            return Err((EIO, None));
        }
        if state.generation != generation {
            return Err((ESTALE, None));
        }
        let change = match demand {
            Demand::Pages(order) => {
                check_rights(order)?;
                let change = state
                    .pages
                    .plan(order)
                    .map_err(|loosens| (EPERM, Some(loosens.index)))?;
                self.check_ram(order)?;
                change
            }
            Demand::Seal => state.pages.seal(),
            Demand::Msrs(order) => {
                // vCPU threads that deal with an exit want it.
                drop(state);
                return self.msrs.carry_out(order, vcpus);
            }
        };
        if state.pages.len_after(&change) > self.max_ranges() as usize {
            return Err((ENOSPC, None));
        }
        let frames: Vec<_> = change.protections().map(frames_of).collect();
        let plan = state.slots.plan(&frames).map_err(|e| match e {
            PlanError::Outside { .. } => (EINVAL, None),
            PlanError::NoSlots(_) => (ENOSPC, None),
        })?;
        // vCPU threads that deal with an exit want it.
        drop(state);
        self.put_in_force(plan, Pages::Change(change), vcpus)?;
        if let Demand::Seal = demand {
            self.msrs.seal();
        }
        Ok(())
    }

    /// Every page of every entry is guest memory.
    fn check_ram(&self, order: &Order) -> Result<(), Refused> {
        for (index, entry) in order.entries().iter().enumerate() {
            let start = GuestAddress(entry.range.start().number() << PAGE_SHIFT);
            let len = entry.range.pages().checked_mul(1 << PAGE_SHIFT);
            let len = len.and_then(|len| usize::try_from(len).ok());
            let memory = self.memslots.memory();
            if !len.is_some_and(|len| GuestMemoryBackend::check_range(memory, start, len)) {
                return Err((EINVAL, Some(index)));
            }
        }
        Ok(())
    }

    /// Carries `plan` out and takes it and `pages` over; or neither.
    fn put_in_force(&self, plan: Plan, pages: Pages, vcpus: &dyn Vcpus) -> Result<(), Refused> {
        if plan.is_empty() {
            pages.apply(&mut self.state().pages);
            return Ok(());
        }
        let mut plan = Some(plan);
        let mut result = Err((EIO, None));
        vcpus.while_out(&mut || {
            if let Some(plan) = plan.take() {
                let _closed = self.gate.close();
                let changed = self.change_slots(&plan);
                let mut state = self.state();
                match changed {
                    Ok(()) => {
                        state.slots.apply(plan);
                        pages.apply(&mut state.pages);
                        let holds = !state.pages.is_empty();
                        if mem::replace(&mut state.tells_unemulated, holds) != holds {
                            self.memslots.tell_unemulated(holds);
                        }
                        self.slots_epoch.fetch_add(1, Ordering::Release);
                        result = Ok(());
                    }
                    Err(Failed::AsBefore) => {}
                    Err(Failed::Broken) => state.broken = true,
                }
            }
        });
        if self.state().broken {
            vcpus.shut_down();
        }
        result
    }

    fn change_slots(&self, plan: &Plan) -> Result<(), Failed> {
        for (done, &op) in plan.ops().iter().enumerate() {
            let Err(error) = self.memslots.carry_out(op) else {
                continue;
            };
            log_limited!(FAILED, Error, "KVM refuses a memslot: {error}");
            for op in plan.undo(done) {
                if let Err(error) = self.memslots.carry_out(op) {
                    log_limited!(
                        FAILED,
                        Error,
                        "KVM refuses a memslot that was there before: {error}; the VM is given up"
                    );
                    return Err(Failed::Broken);
                }
            }
            return Err(Failed::AsBefore);
        }
        Ok(())
    }

    /// Frees everything; returns the new generation, unless KVM does not let it.
    fn begin_anew(&self, vcpus: &dyn Vcpus) -> Option<u64> {
        let state = self.state();
        // From here on what vCPUs have begun before has no effect.
        self.life.fetch_add(1, Ordering::AcqRel);
        let freed = state.pages.iter().map(|held| Frames {
            range: held.range,
            readonly: false,
        });
        let plan = state.slots.plan(&freed.collect::<Vec<_>>());
        let broken = state.broken;
        drop(state);
        let done = match plan {
            Ok(plan) if !broken => self
                .put_in_force(plan, Pages::Freed, vcpus)
                .and_then(|()| self.msrs.reset(vcpus)),
            _ => Err((EIO, None)),
        };
        let mut state = self.state();
        if done.is_err() {
            // A guest that begins anew among the locks of the one before would be told lies.
            log_limited!(
                FAILED,
                Error,
                "a reset cannot free what was locked; the VM is given up"
            );
            if !mem::replace(&mut state.broken, true) {
                drop(state);
                vcpus.shut_down();
            }
            return None;
        }
        state.generation += 1;
        let generation = state.generation;
        drop(state);
        self.inbox().violations.clear();
        Some(generation)
    }

    fn report(&self, violation: Violation) {
        let mut inbox = self.inbox();
        // Whoever is told of the first takes all.
        let is_first = inbox.violations.is_empty();
        inbox.violations.push(violation);
        drop(inbox);
        if is_first {
            self.filled.notify_one();
        }
    }

    pub(super) fn life(&self) -> u64 {
        self.life.load(Ordering::Acquire)
    }

    pub(super) fn slots_epoch(&self) -> u64 {
        self.slots_epoch.load(Ordering::Acquire)
    }

    /// An instruction of which KVM knows nothing stores to these linear and guest-physical addresses,
    /// each of another page: whether it is denied.
    pub(super) fn is_denied(&self, vcpu: u32, stores: &[(u64, u64)], rip: u64) -> bool {
        let state = self.state();
        let denied = stores.iter().find(|(_, gpa)| {
            held(&state.pages, *gpa, 1).any(|(_, held)| held.deny().contains(Deny::NOWRITE))
        });
        drop(state);
        if let Some(&(gva, gpa)) = denied {
            self.report(Violation {
                gva,
                rip,
                ..self.store_of(Source::Vcpu(vcpu), gpa, true)
            });
        }
        denied.is_some()
    }

    pub(super) fn on_violation(&self) -> Policy {
        self.options.on_violation
    }

    /// An access to an MSR was denied or logged; `value` is what was to be written, or was read.
    pub(super) fn msr_violation(
        &self,
        vcpu: u32,
        access: MsrAccess,
        value: u64,
        rip: Option<u64>,
        action: Action,
    ) {
        self.report(Violation {
            access: if access.is_write() {
                Access::Write
            } else {
                Access::Read
            },
            source: Source::Vcpu(vcpu),
            target: Target::Msr(access.msr()),
            gva: Violation::UNKNOWN,
            rip: rip.unwrap_or(Violation::UNKNOWN),
            value,
            size: 8,
            times: 1,
            lost: 0,
            action,
        });
    }

    /// A piece of a store of which `seen` has been told, by a vCPU in a life of the VM.
    pub(super) fn store(
        &self,
        (vcpu, life): (u32, u64),
        gpa: u64,
        data: &[u8],
        rip: Option<u64>,
        seen: &mut Option<Seen>,
    ) -> Decision {
        if *seen == Some(Seen::Denied) {
            return Decision::Done;
        }
        let memory = self.memslots.memory();
        if data.is_empty()
            || !GuestMemoryBackend::check_range(memory, GuestAddress(gpa), data.len())
        {
            return Decision::NotMine;
        }
        let state = self.state();
        if state.broken {
            return Decision::Shutdown;
        }
        if life != self.life() {
            *seen = Some(Seen::Denied);
            return Decision::Done;
        }
        let held = held(&state.pages, gpa, data.len())
            .fold(Attributes::default(), |all, (_, held)| all.union(held));
        let denied = held.deny().contains(Deny::NOWRITE);
        if !denied && memory.write_slice(data, GuestAddress(gpa)).is_err() {
            return Decision::NotMine;
        }
        drop(state);
        let policy = self.options.on_violation;
        if denied || held.audit().contains(Deny::NOWRITE) && seen.is_none() {
            *seen = Some(if denied { Seen::Denied } else { Seen::Watched });
            let mut value = [0; 8];
            let size = data.len().min(8);
            value[..size].copy_from_slice(&data[..size]);
            self.report(Violation {
                rip: rip.unwrap_or(Violation::UNKNOWN),
                value: u64::from_le_bytes(value),
                size: data.len() as u32,
                ..self.store_of(Source::Vcpu(vcpu), gpa, denied)
            });
        }
        match policy {
            _ if !denied => Decision::Done,
            Policy::Inject => Decision::Fault,
            Policy::Drop => Decision::Done,
            Policy::Pause => Decision::Pause,
            Policy::Shutdown => Decision::Shutdown,
        }
    }

    /// Whether a device may not write these bytes.
    pub(super) fn denies_device(&self, gpa: u64, len: usize) -> bool {
        let state = self.state();
        let denied = |(_, held): (u64, Attributes)| held.deny().contains(Deny::NOWRITE);
        state.broken || held(&state.pages, gpa, len).any(denied)
    }

    /// A device is about to write these bytes. Returns whether it may.
    pub(super) fn device_stores(&self, gpa: u64, len: usize) -> bool {
        let at = GuestAddress(gpa);
        if len != 0 && !GuestMemoryBackend::check_range(self.memory(), at, len) {
            return false;
        }
        let state = self.state();
        if state.broken {
            return false;
        }
        let mut watched = None;
        for (start, held) in held(&state.pages, gpa, len) {
            if held.deny().contains(Deny::NOWRITE) {
                self.report(self.store_of(Source::Device, start, true));
                return false;
            }
            if held.audit().contains(Deny::NOWRITE) {
                watched = watched.or(Some(start));
            }
        }
        if let Some(start) = watched {
            self.report(self.store_of(Source::Device, start, false));
        }
        true
    }

    fn store_of(&self, source: Source, gpa: u64, denied: bool) -> Violation {
        Violation {
            access: Access::Write,
            source,
            target: Target::Memory(gpa),
            gva: Violation::UNKNOWN,
            rip: Violation::UNKNOWN,
            value: 0,
            size: 0,
            times: 1,
            lost: 0,
            action: if denied {
                Action::Refused(self.options.on_violation)
            } else {
                Action::Audit
            },
        }
    }

    /// Has the VM stopped by a policy, when it is too late for a vCPU to say so.
    pub(super) fn stop(&self, policy: Policy) {
        let mut inbox = self.inbox();
        if inbox.stop != Some(Policy::Shutdown) {
            inbox.stop = Some(policy);
        }
        drop(inbox);
        self.filled.notify_one();
    }
}

/// Where in `len` bytes from `gpa` on something is denied or watched when it is written, in
/// ascending order.
fn held(pages: &Table, gpa: u64, len: usize) -> impl Iterator<Item = (u64, Attributes)> + '_ {
    let range = GfnRange::of_bytes(gpa, len as u64);
    let parts = range.into_iter().flat_map(|range| pages.within(range));
    parts.map(move |part| {
        let start = part.range.start().number() << PAGE_SHIFT;
        (start.max(gpa), part.attributes)
    })
}

/// Nothing but writing can be denied or watched.
fn check_rights(order: &Order) -> Result<(), Refused> {
    for (index, entry) in order.entries().iter().enumerate() {
        let asked = entry.attributes.deny() | entry.attributes.audit();
        if !(asked - Deny::NOWRITE).is_empty() {
            return Err((EOPNOTSUPP, Some(index)));
        }
    }
    Ok(())
}

/// What becomes of the pages of a memslot.
fn frames_of(protection: Protection) -> Frames {
    let held = protection.attributes;
    Frames {
        range: protection.range,
        readonly: (held.deny() | held.audit()).contains(Deny::NOWRITE),
    }
}

/// What becomes of the table.
enum Pages {
    Change(Change),
    Freed,
}

impl Pages {
    fn apply(&self, table: &mut Table) {
        match self {
            Self::Change(change) => table.apply(change),
            Self::Freed => *table = Table::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_violations_does_not_hold_up_a_task() {
        let flood = Violation {
            access: Access::Write,
            source: Source::Vcpu(0),
            target: Target::Memory(0),
            gva: 0,
            rip: 0,
            value: 0,
            size: 1,
            times: 1,
            lost: 0,
            action: Action::Audit,
        };
        let mut inbox = Inbox::default();
        inbox.violations.push(flood);
        inbox.tasks.push_back(Task::State(1));
        let (violations, task) = inbox.next();
        assert_eq!(violations, [flood]);
        assert!(matches!(task, Some(Task::State(1))));
        assert!(inbox.violations.is_empty());
    }
}
