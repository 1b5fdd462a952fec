// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtio device: what survives its vhost-user connections, behind one lock.
//!
//! Three threads call in: the vring worker and the vhost-user thread through [`backend`], the
//! control channel's through `VmEvents`. Each takes the device's lock, then that of a vring, and
//! never waits with either held. Knows the enforcer as a trait, and no socket.

pub mod backend;
mod chain;
mod control;
mod events;
mod guarded;
mod in_force;
mod msr_wire;
mod ring;
mod vm_events;
pub mod wire;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vhost_user_backend::VringMutex;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::log_limit::{LogLimit, log_limited};
use crate::msr_policy::PolicyFile;
use crate::report::{Counters, Seen, Snapshot, Witness};
use crate::vm::enforcer::{Enforcer, Outcome, VmInfo};
use control::{Known, Requests};
use events::Events;
use in_force::{Change, InForce, describe};
use ring::{Left, Ring};
use wire::{Config, Errno, Limits, MAX_REQUEST_RANGES, Rights};

static CHANGED: LogLimit = LogLimit::new(10);
static REFUSED: LogLimit = LogLimit::new(10);

/// Queue 0.
const CONTROL: u32 = 0;
/// Queue 1.
const EVENTS: u32 = 1;

/// Violations that are remembered for whoever asks.
const REMEMBERED: usize = 64;

/// The device.
pub struct Device {
    enforcer: Arc<dyn Enforcer>,
    witness: Option<Arc<dyn Witness>>,
    /// The host's rules for MSRs that the enforcer gives the VM's owner.
    policy: Option<Arc<PolicyFile>>,
    state: Mutex<State>,
    greeted: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What is known of the VM. Stays while either of its two connections is there.
    vm: Option<VmInfo>,
    link: Link,
    /// What is in force.
    in_force: InForce,
    /// That is what this VM's owner has said, now or before it went. Until then it is not
    /// known what may be read or written in the guest's memory, and no ring is looked at.
    told: bool,
    requests: Requests,
    events: Events,
    /// The last violations, oldest first.
    recent: VecDeque<Seen>,
    last_seq: u64,
    /// The request that the VM's owner is carrying out.
    under_way: Option<UnderWay>,
    /// The question for what is in force that was not answered yet.
    state_asked: Option<u64>,
    start: Start,
    front_end: Option<FrontEnd>,
}

/// The connection to the VM's owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Link {
    #[default]
    Down,
    /// It said what it can do, not yet what is in force.
    Greeted,
    /// Requests can be sent.
    Up,
}

/// How far the control ring's start has come. The VM's owner has told of a reset before it let the
/// guest start the ring, but on another socket: a request must not be taken for one of the life
/// before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Start {
    /// The ring does not run, or nobody has noticed yet.
    #[default]
    Stopped,
    /// It runs, and what the VM's owner said before is being heard. The number is that of the wait.
    Listening(u64),
    /// That is over: requests can be taken.
    Done,
}

#[derive(Debug)]
struct UnderWay {
    seq: u64,
    /// What it comes to on what is in force in this generation; `None` in a later one.
    change: Option<Change>,
    /// For the log.
    what: String,
    /// The ring was stopped or the VM reset since: there is nobody to be told.
    orphaned: bool,
}

/// A vhost-user connection.
#[derive(Debug)]
struct FrontEnd {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Calls the vring worker.
    again: EventFd,
    control: Option<Ring>,
    events: Option<Ring>,
    /// Feature bits that the driver negotiated.
    features: u64,
    /// Somebody has connected; before that it is only waited for.
    in_use: bool,
}

impl Device {
    /// A device whose protections are enforced by `enforcer`, which also gives the VM's owner the
    /// host's rules of `policy`, and whose violations are told to `witness`.
    pub fn new(
        enforcer: Arc<dyn Enforcer>,
        policy: Option<Arc<PolicyFile>>,
        witness: Option<Arc<dyn Witness>>,
    ) -> Self {
        Self {
            enforcer,
            witness,
            policy,
            state: Mutex::default(),
            greeted: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vhost-user connection is waited for. `again` is written to when the vring worker is to look
    /// at the rings without a kick.
    fn attach(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>, again: EventFd) {
        let front_end = FrontEnd {
            memory,
            again,
            control: None,
            events: None,
            features: 0,
            in_use: false,
        };
        self.lock().front_end = Some(front_end);
    }

    /// The vhost-user connection has ended, and its threads with it.
    fn detach(&self) {
        let mut state = self.lock();
        state.stop_control();
        state.front_end = None;
        state.forget_unconnected();
    }

    fn set_features(&self, features: u64) {
        if let Some(front_end) = &mut self.lock().front_end {
            front_end.features = features;
        }
    }

    /// What the front end asks for first: what this host can enforce and watch; waits up to
    /// `patience` for it to say so.
    fn rights(&self, patience: Duration) -> Rights {
        let mut state = self.lock();
        if let Some(front_end) = &mut state.front_end {
            front_end.in_use = true;
        }
        let (state, _) = self
            .greeted
            .wait_timeout_while(state, patience, |state| state.vm.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        state.rights()
    }

    /// What is known now. Holds the lock only to copy it.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        Snapshot {
            connected: state.link != Link::Down,
            vm: state.vm,
            pages: state.in_force.pages.clone(),
            msrs: state.in_force.msrs().clone(),
            host: state.in_force.host().cloned(),
            counters: Counters {
                violations: state.events.violations,
                events_lost: state.events.lost(),
                malformed: state.malformed(),
                requests_ok: state.requests.ok,
                requests_refused: state.requests.refused,
            },
            violations: state.recent.iter().copied().collect(),
        }
    }

    fn config(&self) -> Config {
        let state = self.lock();
        Config {
            rights: state.rights(),
            max_request_ranges: state.limits().max_request_ranges,
            max_ranges: state.vm.map_or(0, |vm| vm.max_ranges),
            generation: state.generation(),
            ranges_in_force: state.in_force.ranges(),
            max_msr_ranges: state.vm.map_or(0, |vm| vm.msrs.max_ranges),
            msr_ranges_in_force: state.in_force.msr_ranges(),
            violations: state.events.violations,
            events_lost: state.events.lost(),
            malformed: state.malformed(),
        }
    }

    /// Looks at a queue that was kicked or started.
    fn serve(&self, queue: u32, vring: Option<&VringMutex>) {
        let mut state = self.lock();
        if let (Some(vring), Some(front_end)) = (vring, &mut state.front_end) {
            match queue {
                CONTROL if front_end.control.is_none() => {
                    front_end.control = Some(Ring::new("control", vring.clone()));
                }
                EVENTS if front_end.events.is_none() => {
                    front_end.events = Some(Ring::new("events", vring.clone()));
                }
                _ => {}
            }
        }
        match queue {
            CONTROL => state.serve_control(&*self.enforcer),
            EVENTS => state.serve_events(),
            _ => {}
        }
    }

    /// A queue was stopped: from now on nothing is written to it.
    fn stop(&self, queue: u32) {
        let mut state = self.lock();
        match queue {
            CONTROL => state.stop_control(),
            EVENTS => {
                if let Some(ring) = state.front_end.as_mut().and_then(|f| f.events.as_mut()) {
                    ring.stopped(None);
                }
            }
            _ => {}
        }
    }
}

impl State {
    fn generation(&self) -> u64 {
        self.vm.map_or(0, |vm| vm.generation)
    }

    fn malformed(&self) -> u64 {
        self.requests.malformed + self.events.malformed
    }

    /// What this host can enforce and watch.
    fn rights(&self) -> Rights {
        self.vm.map_or_else(Rights::default, |vm| Rights {
            deny: vm.deny,
            audit: vm.audit,
            msrs: vm.msrs.max_ranges != 0,
        })
    }

    fn limits(&self) -> Limits {
        let features = self.front_end.as_ref().map_or(0, |f| f.features);
        let ranges = self
            .vm
            .map_or(MAX_REQUEST_RANGES, |vm| vm.max_request_ranges);
        Limits {
            rights: self.rights().negotiated(features),
            max_request_ranges: ranges.min(MAX_REQUEST_RANGES),
        }
    }

    /// Whether the table is what is in force, and nothing is about to change it. Only then can a
    /// request be held against it.
    fn is_settled(&self) -> bool {
        self.link == Link::Up && self.under_way.is_none() && self.state_asked.is_none()
    }

    fn next_seq(&mut self) -> u64 {
        self.last_seq += 1;
        self.last_seq
    }

    /// Whether requests can be taken from the control ring.
    fn has_started(&mut self, enforcer: &dyn Enforcer) -> bool {
        let ring = self.front_end.as_ref().and_then(|f| f.control.as_ref());
        if self.start == Start::Stopped && ring.is_some_and(Ring::runs) {
            let seq = self.next_seq();
            self.start = Start::Listening(seq);
            enforcer.catch_up(seq);
        }
        self.start == Start::Done
    }

    fn serve_control(&mut self, enforcer: &dyn Enforcer) {
        if !self.told || !self.has_started(enforcer) {
            return;
        }
        let (limits, settled) = (self.limits(), self.is_settled());
        let known = Known {
            limits,
            settled,
            msrs: self.in_force.msrs(),
        };
        let Some(FrontEnd {
            control: Some(ring),
            memory,
            again,
            ..
        }) = &mut self.front_end
        else {
            return;
        };
        if ring.turn(memory, &self.in_force.pages, |turn| {
            self.requests.serve(turn, known)
        }) == Left::Chains
        {
            // Fails only when the counter is full, and then the worker is about to wake anyway.
            let _ = again.write(1);
        }
        self.send_next(enforcer);
    }

    fn serve_events(&mut self) {
        if !self.told {
            return;
        }
        let Some(FrontEnd {
            events: Some(ring),
            memory,
            again,
            ..
        }) = &mut self.front_end
        else {
            return;
        };
        if ring.turn(memory, &self.in_force.pages, |turn| self.events.serve(turn)) == Left::Chains {
            let _ = again.write(1);
        }
    }

    /// Sends the oldest order, unless something is under way, or refuses it.
    fn send_next(&mut self, enforcer: &dyn Enforcer) {
        if !self.is_settled() {
            return;
        }
        let Some(demand) = self.requests.next() else {
            return;
        };
        let what = describe(demand);
        match self.in_force.plan(demand) {
            Ok(change) => {
                self.last_seq += 1;
                enforcer.carry_out(self.last_seq, self.generation(), demand);
                self.under_way = Some(UnderWay {
                    seq: self.last_seq,
                    change: Some(change),
                    what,
                    orphaned: false,
                });
            }
            Err(unplanned) => {
                log_limited!(REFUSED, Info, "{what} refused: {unplanned}");
                self.requests.refuse(unplanned.into());
                // It is given back, and the one behind it looked at, at the worker's next turn: a
                // guest with nothing but such requests is to keep nobody waiting.
                if let Some(front_end) = &self.front_end {
                    let _ = front_end.again.write(1);
                }
            }
        }
    }

    fn stop_control(&mut self) {
        let oldest = self.requests.give_up();
        self.orphan();
        self.start = Start::Stopped;
        if let Some(ring) = self.front_end.as_mut().and_then(|f| f.control.as_mut()) {
            ring.stopped(oldest);
        }
    }

    fn orphan(&mut self) -> Option<&mut UnderWay> {
        let under_way = self.under_way.as_mut()?;
        under_way.orphaned = true;
        Some(under_way)
    }

    fn ask_state(&mut self, enforcer: &dyn Enforcer) {
        if self.state_asked.is_none() {
            let seq = self.next_seq();
            self.state_asked = Some(seq);
            enforcer.request_state(seq);
        }
    }

    /// The VM was reset: nothing that was asked for or told before is of any use.
    fn begin_generation(&mut self, generation: u64) {
        if let Some(vm) = &mut self.vm {
            vm.generation = generation;
        }
        self.in_force.reset();
        self.events.clear();
        self.requests.refuse_all(Errno::Estale);
        if let Some(under_way) = self.orphan() {
            // It was planned on tables that are gone.
            under_way.change = None;
        }
    }

    /// With both connections gone it may be another VM that comes next, which is to see nothing of
    /// this one.
    fn forget_unconnected(&mut self) {
        let in_use = self.front_end.as_ref().is_some_and(|f| f.in_use);
        if !in_use && self.link == Link::Down {
            self.vm = None;
            self.in_force = InForce::default();
            self.told = false;
            self.events = Events::default();
            self.recent.clear();
            (self.requests.malformed, self.requests.ok) = (0, 0);
            self.requests.refused = 0;
        }
    }

    /// Takes over what a request has changed, as told by the VM's owner.
    fn apply(&mut self, under_way: &UnderWay, outcome: &Outcome) {
        let UnderWay { what, change, .. } = under_way;
        if outcome.status != 0 {
            log_limited!(
                REFUSED,
                Info,
                "{what} refused: errno={} index={}",
                outcome.status,
                outcome.index.map_or("none".into(), |i| i.to_string())
            );
        } else if outcome.generation == self.generation()
            && let Some(change) = change
        {
            self.in_force.apply(change);
            log_limited!(
                CHANGED,
                Info,
                "{what} is in force {change}; {} ranges in force, {} of MSRs",
                self.in_force.ranges(),
                self.in_force.msr_ranges()
            );
        }
    }
}
