// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtio device of `docs/device.md`: what survives its front ends, behind one lock.
//!
//! A front end is what brings a driver's queues here: `backend` those of a vhost-user connection,
//! [`embedded`] those of a transport in this very process.
//! Four threads call in: two of the front end, its worker that serves the vrings and the one that
//! starts and stops them, the control channel's through `VmEvents`, and the one that reads page
//! tables, when it has. Each takes the device's lock, then that of a vring, and never waits with
//! either held. Knows the enforcer and what keeps a vring as traits, and no socket.

#[cfg(feature = "companion")]
pub(crate) mod backend;
mod chain;
mod control;
pub mod embedded;
mod events;
mod guarded;
mod in_force;
mod kernel_wire;
mod msr_wire;
mod ring;
mod vm_events;
mod walk;
mod walker;
mod wire;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::log_limit::{LogLimit, log_limited};
use crate::msr_policy::PolicyFile;
use crate::protect::Deny;
use crate::report::{Counters, Ram, Seen, Snapshot, Witness};
use crate::vm::enforcer::{Enforcer, Outcome, VmInfo};
use control::{Known, Requests};
use events::Events;
use in_force::{Change, InForce, describe};
use ring::{Left, Ring, Vring};
use walk::Progress;
use walker::{Ended, Take, Walker};
use wire::{Config, Errno, Lane, Limits, MAX_REQUEST_RANGES, Rights};

static CHANGED: LogLimit = LogLimit::new(10);
static REFUSED: LogLimit = LogLimit::new(10);

/// Queue 0.
const CONTROL: u32 = 0;
/// Queue 1.
const EVENTS: u32 = 1;
/// Queue 2.
const WALK: u32 = 2;
/// How many there are.
const QUEUES: usize = 3;

/// How long a front end that asks what this host can enforce waits for the VM's owner to say so.
/// QEMU's main thread waits as long, so what was not sent by then is not coming soon.
const PATIENCE: Duration = Duration::from_secs(1);

/// Violations that are remembered for whoever asks.
const REMEMBERED: usize = 64;

/// The device has a front end already, and can have one only. A driver's reset does not end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device has another front end")]
pub struct InUse;

/// Has the vring worker look at the rings without a kick. Called with the device's lock held.
type Again = dyn Fn() + Send;

/// The device, of one VM. It is told of the VM as a [`VmEvents`](crate::vm::enforcer::VmEvents), and
/// serves one front end at a time: an [`Embedded`](embedded::Embedded), say, which may come and go.
///
/// Any thread may call it. It holds its lock while it calls the [`Enforcer`], and none while it calls
/// the [`Witness`]. Dropping it ends nothing that is in force.
pub struct Device {
    enforcer: Arc<dyn Enforcer>,
    witness: Option<Arc<dyn Witness>>,
    /// The host's rules for MSRs that the enforcer gives the VM's owner.
    policy: Option<Arc<PolicyFile>>,
    state: Mutex<State>,
    greeted: Condvar,
    walker: Walker,
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
    control: Served,
    walk: Served,
    /// How far the oldest request of the queue "walk" has come.
    walked: Progress,
    events: Events,
    /// The last violations, oldest first.
    recent: VecDeque<Seen>,
    last_seq: u64,
    /// The request that the VM's owner is carrying out.
    under_way: Option<UnderWay>,
    /// The queue that had its turn last.
    last_turn: Lane,
    /// The question for what is in force that was not answered yet.
    state_asked: Option<u64>,
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

/// What is known of a queue that takes requests.
#[derive(Debug, Default)]
struct Served {
    requests: Requests,
    start: Start,
}

/// How far a ring's start has come. The VM's owner has told of a reset before it let the
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
    /// The VM was reset since: whatever is in the ring was put there before, until the ring is
    /// started anew.
    Over,
}

#[derive(Debug)]
struct UnderWay {
    seq: u64,
    lane: Lane,
    /// Of each entry of an order that follows from page tables, the entry of the request.
    origins: Vec<usize>,
    /// What it comes to on what is in force in this generation; `None` in a later one.
    change: Option<Change>,
    /// For the log.
    what: String,
    /// The ring was stopped or the VM reset since: there is nobody to be told.
    orphaned: bool,
}

/// Who serves a driver: a vhost-user connection, say.
struct FrontEnd {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Calls the vring worker.
    again: Box<Again>,
    /// By queue, those that the front end has.
    rings: [Option<Ring>; QUEUES],
    /// Feature bits that the driver negotiated.
    features: u64,
    /// Somebody has connected; before that it is only waited for.
    in_use: bool,
}

impl Device {
    /// A device whose protections are enforced by `enforcer`, which also gives the VM's owner the
    /// host's rules of `policy`, and whose violations are told to `witness`.
    ///
    /// The device itself only tells people which rules of `policy` are in force, when it hears so by
    /// [`VmEvents::host_policy`](crate::vm::enforcer::VmEvents::host_policy). It keeps the enforcer,
    /// which is to hear of it by a [`Weak`] only.
    #[must_use]
    pub fn new(
        enforcer: Arc<dyn Enforcer>,
        policy: Option<Arc<PolicyFile>>,
        witness: Option<Arc<dyn Witness>>,
    ) -> Arc<Self> {
        Self::with_walker(enforcer, policy, witness, |take| {
            Walker::new(Box::new(walker::thread), Box::new(walker::work), take)
        })
    }

    /// The same, with a walker that hands its results to what `walker` is called with.
    fn with_walker(
        enforcer: Arc<dyn Enforcer>,
        policy: Option<Arc<PolicyFile>>,
        witness: Option<Arc<dyn Witness>>,
        walker: impl FnOnce(Box<Take>) -> Walker,
    ) -> Arc<Self> {
        Arc::new_cyclic(|device: &Weak<Self>| {
            let device = device.clone();
            let take = move |id, ended| {
                if let Some(device) = device.upgrade() {
                    device.walked(id, ended);
                }
            };
            Self {
                enforcer,
                witness,
                policy,
                state: Mutex::default(),
                greeted: Condvar::new(),
                walker: walker(Box::new(take)),
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A front end is waited for. `again` is called, with the device's lock held, when the vring
    /// worker is to look at the rings without a kick.
    ///
    /// # Errors
    ///
    /// There is another.
    fn attach(
        &self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        again: impl Fn() + Send + 'static,
    ) -> Result<(), InUse> {
        let front_end = FrontEnd {
            memory,
            again: Box::new(again),
            rings: Default::default(),
            features: 0,
            in_use: false,
        };
        let mut state = self.lock();
        if state.front_end.is_some() {
            return Err(InUse);
        }
        state.front_end = Some(front_end);
        Ok(())
    }

    /// The front end is gone, or looks at no ring any more.
    fn detach(&self) {
        let mut state = self.lock();
        for lane in Lane::ALL {
            state.stop_lane(lane);
        }
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

    /// What is known now: copies, made with the device's lock held. Waits for nothing else.
    #[must_use]
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
                requests_ok: state.control.requests.ok + state.walk.requests.ok,
                requests_refused: state.control.requests.refused + state.walk.requests.refused,
            },
            violations: state.recent.iter().copied().collect(),
            memory: state
                .front_end
                .as_ref()
                .map_or_else(Vec::new, FrontEnd::ram),
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

    /// The front end has this queue. Until it does, the queue is not looked at.
    fn add_ring(&self, queue: u32, vring: &dyn Vring) {
        self.lock().add_ring(queue, vring);
    }

    /// Looks at a queue that was kicked or started, and adds it first, if it is to.
    fn serve(&self, queue: u32, vring: Option<&dyn Vring>) {
        let mut state = self.lock();
        if let Some(vring) = vring {
            state.add_ring(queue, vring);
        }
        match queue {
            CONTROL => state.serve_lane(Lane::Control, &*self.enforcer),
            WALK => state.serve_lane(Lane::Walk, &*self.enforcer),
            EVENTS => return state.serve_events(),
            _ => return,
        }
        self.go_on(&mut state);
    }

    /// Looks at both queues that take requests.
    fn serve_requests(&self, state: &mut State) {
        for lane in Lane::ALL {
            state.serve_lane(lane, &*self.enforcer);
        }
        self.go_on(state);
    }

    /// Begins what can be begun of what was asked for.
    fn go_on(&self, state: &mut State) {
        state.send_next(&*self.enforcer);
        state.start_walk(&self.walker);
    }

    /// A walk of page tables has ended.
    fn walked(&self, id: u64, ended: Ended) {
        let mut state = self.lock();
        // Else it was cancelled just when it ended.
        if matches!(&state.walked, Progress::Walks(walk) if walk.id == id) {
            state.take_walked(ended);
            self.serve_requests(&mut state);
        }
    }

    /// A queue was stopped: from now on nothing is written to it.
    fn stop(&self, queue: u32) {
        let mut state = self.lock();
        match queue {
            CONTROL => state.stop_lane(Lane::Control),
            WALK => state.stop_lane(Lane::Walk),
            _ => {
                if let Some(ring) = state.ring(queue) {
                    ring.stopped(None);
                }
            }
        }
    }
}

impl fmt::Debug for Device {
    /// Waits for no lock, so that it may be shown from anywhere.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Device");
        if let Ok(state) = self.state.try_lock() {
            shown
                .field("link", &state.link)
                .field("vm", &state.vm)
                .field("front_end", &state.front_end);
        }
        shown.finish_non_exhaustive()
    }
}

impl fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEnd")
            .field("rings", &self.rings)
            .field("features", &self.features)
            .field("in_use", &self.in_use)
            .finish_non_exhaustive()
    }
}

impl FrontEnd {
    /// Guest memory, as QEMU has shared it.
    fn ram(&self) -> Vec<Ram> {
        let regions = self.memory.memory();
        let ram = regions.iter().map(|region| Ram {
            gpa: region.start_addr().0,
            size: region.len(),
            backing: region.file_offset().cloned(),
        });
        ram.collect()
    }
}

impl State {
    fn generation(&self) -> u64 {
        self.vm.map_or(0, |vm| vm.generation)
    }

    fn malformed(&self) -> u64 {
        self.control.requests.malformed + self.walk.requests.malformed + self.events.malformed
    }

    /// What this host can enforce and watch.
    fn rights(&self) -> Rights {
        self.vm.map_or_else(Rights::default, |vm| Rights {
            deny: vm.deny,
            audit: vm.audit,
            msrs: vm.msrs.max_ranges != 0,
            kernel: vm.deny.contains(Deny::NOWRITE),
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

    fn lane(&mut self, lane: Lane) -> &mut Served {
        match lane {
            Lane::Control => &mut self.control,
            Lane::Walk => &mut self.walk,
        }
    }

    fn add_ring(&mut self, queue: u32, vring: &dyn Vring) {
        if let Some(front_end) = &mut self.front_end
            && let Some(ring) = front_end.rings.get_mut(queue as usize)
        {
            ring.get_or_insert_with(|| Ring::new(NAMES[queue as usize], vring.share()));
        }
    }

    fn ring(&mut self, queue: u32) -> Option<&mut Ring> {
        let rings = &mut self.front_end.as_mut()?.rings;
        rings.get_mut(queue as usize)?.as_mut()
    }

    /// Has the vring worker look at the rings.
    fn again(&self) {
        if let Some(front_end) = &self.front_end {
            (front_end.again)();
        }
    }

    /// Whether requests can be taken from the ring.
    fn has_started(&mut self, lane: Lane, enforcer: &dyn Enforcer) -> bool {
        let runs = self.ring(queue_of(lane)).is_some_and(|ring| ring.runs());
        if self.lane(lane).start == Start::Stopped && runs {
            let seq = self.next_seq();
            self.lane(lane).start = Start::Listening(seq);
            enforcer.catch_up(seq);
        }
        matches!(self.lane(lane).start, Start::Done | Start::Over)
    }

    /// The VM's owner has told of a reset. It does so before it stops a ring of the life that has
    /// ended, and before it answers the wait of a ring that has started since.
    fn end_rings(&mut self) {
        for lane in Lane::ALL {
            let start = &mut self.lane(lane).start;
            if *start == Start::Done {
                *start = Start::Over;
            }
        }
    }

    /// What the VM's owner said before wait number `seq` is heard.
    fn heard(&mut self, seq: u64) {
        for lane in Lane::ALL {
            // A later wait takes the place of an earlier one, and who has heard what was said before
            // the later has heard it all.
            if matches!(self.lane(lane).start, Start::Listening(wait) if wait <= seq) {
                self.lane(lane).start = Start::Done;
            }
        }
    }

    /// Gives back and takes requests.
    fn serve_lane(&mut self, lane: Lane, enforcer: &dyn Enforcer) {
        if !self.told || !self.has_started(lane, enforcer) {
            return;
        }
        let (limits, settled) = (self.limits(), self.is_settled());
        let known = Known {
            lane,
            limits,
            settled,
            over: self.lane(lane).start == Start::Over,
            msrs: self.in_force.msrs(),
        };
        let requests = match lane {
            Lane::Control => &mut self.control.requests,
            Lane::Walk => &mut self.walk.requests,
        };
        let Some(FrontEnd { rings, memory, .. }) = &mut self.front_end else {
            return;
        };
        let Some(ring) = &mut rings[queue_of(lane) as usize] else {
            return;
        };
        if ring.turn(memory, &self.in_force.pages, |turn| {
            requests.serve(turn, known)
        }) == Left::Chains
        {
            self.again();
        }
    }

    fn serve_events(&mut self) {
        if !self.told {
            return;
        }
        let Some(FrontEnd { rings, memory, .. }) = &mut self.front_end else {
            return;
        };
        let Some(ring) = &mut rings[EVENTS as usize] else {
            return;
        };
        if ring.turn(memory, &self.in_force.pages, |turn| self.events.serve(turn)) == Left::Chains {
            self.again();
        }
    }

    /// Sends the oldest order of either queue, unless something is under way, or refuses it. The
    /// queues take turns.
    fn send_next(&mut self, enforcer: &dyn Enforcer) {
        if !self.is_settled() {
            return;
        }
        for lane in [self.last_turn.other(), self.last_turn] {
            let had = match lane {
                Lane::Control => self.send_order(enforcer),
                Lane::Walk => self.send_walked(enforcer),
            };
            if had {
                self.last_turn = lane;
                return;
            }
        }
    }

    /// Deals with the oldest order of the control queue, if there is one.
    fn send_order(&mut self, enforcer: &dyn Enforcer) -> bool {
        let Some(demand) = self.control.requests.next() else {
            return false;
        };
        let what = describe(demand);
        match self.in_force.plan(demand) {
            Ok(change) => {
                self.last_seq += 1;
                enforcer.carry_out(self.last_seq, self.generation(), demand);
                self.under_way = Some(UnderWay {
                    seq: self.last_seq,
                    lane: Lane::Control,
                    origins: Vec::new(),
                    change: Some(change),
                    what,
                    orphaned: false,
                });
            }
            Err(unplanned) => {
                log_limited!(REFUSED, Info, "{what} refused: {unplanned}");
                let refusal = Err(unplanned.into());
                self.control.requests.finish(refusal, None);
                // It is given back, and the one behind it looked at, at the worker's next turn: a
                // guest with nothing but such requests is to keep nobody waiting.
                self.again();
            }
        }
        true
    }

    fn stop_lane(&mut self, lane: Lane) {
        let oldest = self.lane(lane).requests.give_up();
        if self.under_way.as_ref().is_some_and(|u| u.lane == lane) {
            self.orphan();
        }
        if lane == Lane::Walk {
            self.forget_walk();
        }
        self.lane(lane).start = Start::Stopped;
        if let Some(ring) = self.ring(queue_of(lane)) {
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
        self.forget_walk();
        for lane in Lane::ALL {
            self.lane(lane).requests.refuse_all(Errno::Estale);
        }
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
            for lane in Lane::ALL {
                let requests = &mut self.lane(lane).requests;
                (requests.malformed, requests.ok, requests.refused) = (0, 0, 0);
            }
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
            self.check_hidden();
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

/// The feature bits that a host with these rights offers.
fn features(rights: Rights) -> u64 {
    rights.features()
        | 1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
}

/// Names of the queues, for the log.
const NAMES: [&str; QUEUES] = ["control", "events", "walk"];

fn queue_of(lane: Lane) -> u32 {
    match lane {
        Lane::Control => CONTROL,
        Lane::Walk => WALK,
    }
}

#[cfg(all(test, feature = "companion"))]
mod walk_tests;
