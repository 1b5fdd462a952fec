// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The enforcer of a VM of this process: what the device asks for becomes memslots.
//!
//! A thread of its own carries requests out, one after the other, and makes all calls of
//! [`VmEvents`]; vCPU threads only ask what becomes of an exit. Knows KVM, and nothing of virtio or
//! of how the VMM runs its vCPUs but what [`Vcpus`] says.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::memslots::Memslots;
use super::slots::{Frames, Op, Plan, PlanError, RegionsError, Slots};
use super::violations::Violations;
use crate::log_limit::{LogLimit, log_limited};
use crate::protect::{
    Attributes, Change, Demand, Deny, Gfn, GfnRange, Order, PAGE_SHIFT, Protection, Table,
};
use crate::vm::enforcer::{
    Accelerator, Access, Action, Enforcer, InForce, MsrInfo, Outcome, Policy, Source, Target,
    Violation, VmEvents, VmInfo,
};

static FAILED: LogLimit = LogLimit::new(5);

/// Most ranges in one request.
const MAX_REQUEST_RANGES: u32 = 4096;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOPNOTSUPP: u32 = 95;
const ESTALE: u32 = 116;

/// How the VMM brings its vCPUs to a stand.
pub trait Vcpus: Send + Sync {
    /// Calls `work` once, from the calling thread, while no vCPU is in KVM_RUN, and none enters it.
    /// A vCPU that is dealing with an exit may go on with that, but not enter again.
    ///
    /// Called by [`KvmVm`]'s own thread, which holds no lock.
    fn while_out(&self, work: &mut dyn FnMut());
}

/// What an embedder chooses.
#[derive(Clone, Debug)]
pub struct Options {
    /// What becomes of a denied store.
    pub on_violation: Policy,
    /// Most disjoint ranges in force at once.
    pub max_ranges: u32,
    /// Numbers of memslots that nobody else uses; the end is at most `KVM_CAP_NR_MEMSLOTS`.
    pub slots: Range<u16>,
}

/// Why there is no [`KvmVm`].
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// This KVM has no read-only memslots.
    #[error("this KVM has no read-only memslots (KVM_CAP_READONLY_MEM)")]
    NoReadOnly,
    /// The VM's RAM cannot be put into memslots.
    #[error("guest memory cannot be put into memslots: {0}")]
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
}

/// What a vCPU thread does after an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is not about protected memory: the VMM's own devices may know it.
    NotMine,
    /// It is dealt with: run the vCPU again.
    Done,
    /// Give the vCPU a #GP(0), and run it again.
    Fault,
    /// Stop the VM; the vCPU goes on when it does.
    Pause,
    /// End the VM.
    Shutdown,
}

/// Enforces protections on a VM that this process owns.
pub struct KvmVm {
    shared: Arc<Shared>,
}

struct Shared {
    memslots: Memslots,
    options: Options,
    state: Mutex<State>,
    inbox: Mutex<Inbox>,
    filled: Condvar,
    emptied: Condvar,
}

/// What is in force. Changed by the one thread only, while all vCPUs are out.
#[derive(Debug)]
struct State {
    generation: u64,
    pages: Table,
    slots: Slots,
}

#[derive(Default)]
struct Inbox {
    tasks: VecDeque<Task>,
    violations: Violations,
    busy: bool,
    ends: bool,
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

/// A status and the entry that it is about.
type Refused = (u32, Option<usize>);

impl KvmVm {
    /// Takes over the memslots of `memory` in `vm`, all read-write; the VMM makes none for it. When this
    /// is dropped they go, and then `memory` is let go of.
    ///
    /// # Errors
    ///
    /// [`NewError`]. The VM has none of the memslots then.
    pub fn new(
        vm: Arc<VmFd>,
        memory: Arc<GuestMemoryMmap>,
        options: Options,
    ) -> Result<Self, NewError> {
        if !vm.check_extension(Cap::ReadonlyMem) {
            return Err(NewError::NoReadOnly);
        }
        let memslots = Memslots::new(vm, memory);
        let slots = Slots::new(&memslots.regions(), options.slots.clone())?;
        for (made, slot) in slots.iter().enumerate() {
            let gpa = slot.gpa;
            if let Err(source) = memslots.carry_out(Op::Add(slot)) {
                memslots.let_go(slots.iter().take(made));
                return Err(NewError::Memslot { gpa, source });
            }
        }
        let state = State {
            generation: 1,
            pages: Table::default(),
            slots,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                memslots,
                options,
                state: Mutex::new(state),
                inbox: Mutex::default(),
                filled: Condvar::new(),
                emptied: Condvar::new(),
            }),
        })
    }

    /// Begins to carry out what is asked for, and to tell `events`. To be called once.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn start(&self, events: Weak<dyn VmEvents>, vcpus: Arc<dyn Vcpus>) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let run = move || shared.run(&events, &*vcpus);
        thread::Builder::new().name("kvm-guard".into()).spawn(run)?;
        Ok(())
    }

    /// The VM is being reset: nothing that the guest asked for is in force when this returns. The vCPUs
    /// may stand still already. Not to be called from [`Vcpus::while_out`].
    pub fn reset(&self) {
        self.shared.put(Task::Reset);
        let inbox = self.shared.inbox();
        drop(
            self.shared
                .emptied
                .wait_while(inbox, |inbox| {
                    (inbox.busy || !inbox.tasks.is_empty()) && !inbox.ends
                })
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// KVM_EXIT_MMIO, a store, by vCPU `vcpu`. `rip` for the report: KVM has moved it past the store,
    /// but for a `rep` store.
    ///
    /// A store to memory that is not denied (it is watched, or not any more) is carried out here.
    pub fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8], rip: Option<u64>) -> Verdict {
        self.shared.mmio_write(vcpu, gpa, data, rip)
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        self.shared.inbox().ends = true;
        self.shared.filled.notify_all();
        self.shared.emptied.notify_all();
    }
}

impl Drop for Shared {
    /// No vCPU is to touch memory that is not kept any more.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
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

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, task: Task) {
        self.inbox().tasks.push_back(task);
        self.filled.notify_one();
    }

    /// The thread.
    fn run(&self, events: &Weak<dyn VmEvents>, vcpus: &dyn Vcpus) {
        let Some(first) = events.upgrade() else {
            return;
        };
        first.connected(self.info());
        let (generation, in_force) = self.in_force();
        let _ = first.state(0, generation, in_force);
        drop(first);
        loop {
            let (task, violation) = {
                let mut inbox = self
                    .filled
                    .wait_while(self.inbox(), |inbox| {
                        inbox.tasks.is_empty() && inbox.violations.is_empty() && !inbox.ends
                    })
                    .unwrap_or_else(PoisonError::into_inner);
                if inbox.ends {
                    return;
                }
                inbox.busy = true;
                // What was seen before an answer is told before it.
                match inbox.violations.take() {
                    Some(violation) => (None, Some(violation)),
                    None => (inbox.tasks.pop_front(), None),
                }
            };
            let Some(events) = events.upgrade() else {
                return;
            };
            if let Some(violation) = violation {
                events.violation(violation);
            }
            if let Some(task) = task {
                self.serve(task, &*events, vcpus);
            }
            self.inbox().busy = false;
            self.emptied.notify_all();
        }
    }

    fn info(&self) -> VmInfo {
        VmInfo {
            accelerator: Accelerator::Kvm,
            deny: Deny::NOWRITE,
            audit: Deny::NOWRITE,
            policy: self.options.on_violation,
            generation: self.state().generation,
            max_ranges: self.options.max_ranges,
            max_request_ranges: MAX_REQUEST_RANGES,
            msrs: MsrInfo::default(),
        }
    }

    fn in_force(&self) -> (u64, InForce) {
        let state = self.state();
        let in_force = InForce {
            pages: state.pages.clone(),
            ..InForce::default()
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
                    msr_ranges_in_force: 0,
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
                let generation = self.reset(vcpus);
                events.reset(generation);
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
            Demand::Msrs(_) => return Err((EOPNOTSUPP, None)),
        };
        if state.pages.len_after(&change) > self.options.max_ranges as usize {
            return Err((ENOSPC, None));
        }
        let frames: Vec<_> = change.protections().map(frames_of).collect();
        let plan = state.slots.plan(&frames).map_err(|e| match e {
            PlanError::Outside { .. } => (EINVAL, None),
            PlanError::NoSlots(_) => (ENOSPC, None),
        })?;
        // vCPU threads that deal with an exit want it.
        drop(state);
        self.put_in_force(plan, Pages::Change(change), vcpus)
    }

    /// Every page of every entry is guest memory.
    fn check_ram(&self, order: &Order) -> Result<(), Refused> {
        for (index, entry) in order.entries().iter().enumerate() {
            let start = GuestAddress(entry.range.start().number() << PAGE_SHIFT);
            let len = usize::try_from(entry.range.pages() << PAGE_SHIFT);
            let memory = self.memslots.memory();
            if !len.is_ok_and(|len| GuestMemoryBackend::check_range(memory, start, len)) {
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
                result = self.change_slots(&plan);
                if result.is_ok() {
                    let mut state = self.state();
                    state.slots.apply(plan);
                    pages.apply(&mut state.pages);
                }
            }
        });
        result
    }

    fn change_slots(&self, plan: &Plan) -> Result<(), Refused> {
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
                        "KVM refuses a memslot that was there before: {error}; the guest has lost memory"
                    );
                }
            }
            return Err((EIO, None));
        }
        Ok(())
    }

    /// Frees everything; returns the new generation.
    fn reset(&self, vcpus: &dyn Vcpus) -> u64 {
        let state = self.state();
        let frames: Vec<_> = state
            .pages
            .iter()
            .map(|held| Frames {
                range: held.range,
                readonly: false,
            })
            .collect();
        let plan = state.slots.plan(&frames);
        drop(state);
        let done = plan
            .map_err(|_| (EIO, None))
            .and_then(|plan| self.put_in_force(plan, Pages::Freed, vcpus));
        if done.is_err() {
            log_limited!(FAILED, Error, "protections could not be freed by a reset");
        }
        self.inbox().violations.clear();
        let mut state = self.state();
        state.generation += 1;
        state.generation
    }

    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8], rip: Option<u64>) -> Verdict {
        let memory = self.memslots.memory();
        if data.is_empty()
            || !GuestMemoryBackend::check_range(memory, GuestAddress(gpa), data.len())
        {
            return Verdict::NotMine;
        }
        let state = self.state();
        let held = touched(gpa, data.len()).fold(Attributes::default(), |held, gfn| {
            held.union(state.pages.get(gfn))
        });
        let denied = held.deny().contains(Deny::NOWRITE);
        if !denied && memory.write_slice(data, GuestAddress(gpa)).is_err() {
            return Verdict::NotMine;
        }
        drop(state);
        let policy = self.options.on_violation;
        if denied || held.audit().contains(Deny::NOWRITE) {
            let mut value = [0; 8];
            let size = data.len().min(8);
            value[..size].copy_from_slice(&data[..size]);
            let violation = Violation {
                access: Access::Write,
                source: Source::Vcpu(vcpu),
                target: Target::Memory(gpa),
                gva: Violation::UNKNOWN,
                rip: rip.unwrap_or(Violation::UNKNOWN),
                value: u64::from_le_bytes(value),
                size: data.len() as u32,
                times: 1,
                lost: 0,
                action: if denied {
                    Action::Refused(policy)
                } else {
                    Action::Audit
                },
            };
            self.inbox().violations.push(violation);
            self.filled.notify_one();
        }
        match policy {
            _ if !denied => Verdict::Done,
            Policy::Inject => Verdict::Fault,
            Policy::Drop => Verdict::Done,
            Policy::Pause => Verdict::Pause,
            Policy::Shutdown => Verdict::Shutdown,
        }
    }
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

/// The pages of `len` bytes, at least 1, from `gpa` on.
fn touched(gpa: u64, len: usize) -> impl Iterator<Item = Gfn> {
    let pages = GfnRange::of_bytes(gpa, len as u64);
    let numbers = pages.map(|pages| pages.start().number()..=pages.end().number());
    numbers.into_iter().flatten().filter_map(Gfn::new)
}
