// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What happens while page tables are read. A gate holds each walk until the test lets it go, so that
//! nothing here depends on how long one takes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use vhost_user_backend::{VringMutex, VringT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::walker::{Job, Work};
use super::wire::{MAX_QUEUE_SIZE, QUEUE_SIZE};
use super::*;
use crate::protect::{Attributes, Demand, GfnRange, Order, Protection};
use crate::vm::enforcer::{Accelerator, InForce as Told, MsrInfo, Policy, VmEvents};

const RAM: usize = 4 << 20;
const ROOT: u64 = 0x200;
/// The leaf table, which maps frames from 0x300 on at address 0.
const LEAVES: u64 = 0x203;
const P: u64 = 1;
const W: u64 = 2;
const NX: u64 = 1 << 63;
const NOWRITE: u64 = 1;
const NOREAD: u64 = 4;
const NOEXEC_KERNEL: u64 = 8;

const ESTALE: u32 = 116;
const EFAULT: u32 = 14;
const EIO: u32 = 5;

type Range = (u64, u64, u64);

/// Asks until there is an answer.
fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Where walks stop until they are let through, one by one.
#[derive(Default)]
struct Gate {
    came: AtomicU64,
    let_through: AtomicU64,
}

impl Gate {
    fn pass(&self) {
        let number = self.came.fetch_add(1, Ordering::SeqCst) + 1;
        wait_for("the gate to open", || {
            (self.let_through.load(Ordering::SeqCst) >= number).then_some(())
        });
    }

    /// Waits until so many walks have come, in all.
    fn wait_for(&self, walks: u64) {
        wait_for("a walk", || {
            (self.came.load(Ordering::SeqCst) >= walks).then_some(())
        });
    }

    /// Lets so many through, in all.
    fn open(&self, walks: u64) {
        self.let_through.store(walks, Ordering::SeqCst);
    }
}

/// The owner of the VM.
#[derive(Default)]
struct Owner {
    /// Sequence number and entries of each order. A `LOCK` has all bits from 60 on set.
    orders: Mutex<Vec<(u64, Vec<Range>)>>,
    catch_up: Mutex<Vec<u64>>,
}

impl Enforcer for Owner {
    fn carry_out(&self, seq: u64, _: u64, demand: &Demand) {
        let Demand::Pages(order) = demand else {
            panic!("{demand:?}");
        };
        let entries = order.entries().iter().map(range_of);
        let kind = if matches!(order, Order::Lock(_)) {
            15 << 60
        } else {
            0
        };
        let entries = entries.map(|(start, end, bits)| (start, end, bits | kind));
        self.orders.lock().unwrap().push((seq, entries.collect()));
    }

    fn request_state(&self, _: u64) {}

    fn catch_up(&self, seq: u64) {
        self.catch_up.lock().unwrap().push(seq);
    }
}

fn range_of(p: &Protection) -> Range {
    (
        p.range.start().number(),
        p.range.end().number(),
        p.attributes.bits(),
    )
}

fn protection(&(start, end, bits): &Range) -> Protection {
    Protection {
        range: GfnRange::new(start, end).unwrap(),
        attributes: Attributes::from_bits(bits).unwrap(),
    }
}

/// A device with everything around it.
struct Setup {
    device: Arc<Device>,
    owner: Arc<Owner>,
    gate: Arc<Gate>,
    /// No thread is to be had.
    no_thread: Arc<AtomicBool>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    rings: [VringMutex; QUEUES],
    /// Requests made, by queue.
    made: [u16; QUEUES],
    again: EventFd,
}

fn base(queue: u32) -> u64 {
    0x10000 * u64::from(queue + 1)
}

impl Setup {
    fn new() -> Self {
        Self::with(Box::new(walker::work))
    }

    fn with(work: Box<Work>) -> Self {
        let (owner, gate) = (Arc::new(Owner::default()), Arc::new(Gate::default()));
        let passes = Arc::clone(&gate);
        let work = move |job: &Job| {
            passes.pass();
            work(job)
        };
        let no_thread = Arc::new(AtomicBool::new(false));
        let none = Arc::clone(&no_thread);
        let thread = move || match none.load(Ordering::SeqCst) {
            true => walker::thread().stack_size(1 << 60),
            false => walker::thread(),
        };
        let device = Device::with_walker(owner.clone(), None, None, |take| {
            Walker::new(Box::new(thread), Box::new(work), take)
        });
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let memory = GuestMemoryAtomic::new(memory);
        let ring = |queue| {
            let ring = VringMutex::new(memory.clone(), MAX_QUEUE_SIZE).unwrap();
            ring.set_queue_size(QUEUE_SIZE);
            let base = base(queue);
            ring.set_queue_info(base, base + 0x1000, base + 0x2000)
                .unwrap();
            ring
        };
        let again = EventFd::new(EFD_NONBLOCK).unwrap();
        let call = again.try_clone().unwrap();
        device
            .attach(memory.clone(), move || call.write(1).unwrap())
            .unwrap();
        device.set_features(!0);
        let setup = Self {
            owner,
            gate,
            no_thread,
            rings: [ring(0), ring(1), ring(2)],
            memory,
            made: [0; QUEUES],
            again,
            device,
        };
        setup.connect(1, &[]);
        setup.make_tables();
        setup.start(CONTROL);
        setup.start(WALK);
        setup
    }

    fn connect(&self, generation: u64, held: &[Range]) {
        self.device.connected(VmInfo {
            accelerator: Accelerator::Tcg,
            deny: Deny::all(),
            audit: Deny::all(),
            policy: Policy::Inject,
            generation,
            max_ranges: 1000,
            max_request_ranges: 4096,
            msrs: MsrInfo::default(),
        });
        let told = Told {
            pages: held.iter().map(protection).collect(),
            ..Told::default()
        };
        self.device.state(0, generation, told).unwrap();
    }

    /// Frames 0x300 to 0x303 are constants, 0x304 to 0x307 data.
    fn make_tables(&self) {
        for (table, below) in [(ROOT, 0x201), (0x201, 0x202), (0x202, LEAVES)] {
            self.write(table << 12, below << 12 | P | W);
        }
        for n in 0..8 {
            let flags = if n < 4 { P | NX } else { P | W | NX };
            self.write((LEAVES << 12) + 8 * n, (0x300 + n) << 12 | flags);
        }
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory
            .memory()
            .write_obj(value, GuestAddress(at))
            .unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// The front end starts a ring, and what the owner said before is heard.
    fn start(&self, queue: u32) {
        self.start_only(queue);
        let seq = *self.owner.catch_up.lock().unwrap().last().unwrap();
        self.device.caught_up(seq);
    }

    fn start_only(&self, queue: u32) {
        let ring = &self.rings[queue as usize];
        ring.set_queue_ready(true);
        ring.set_enabled(true);
        self.kick(queue);
    }

    fn stop(&self, queue: u32) {
        self.rings[queue as usize].set_queue_ready(false);
        self.device.stop(queue);
    }

    fn kick(&self, queue: u32) {
        self.device.serve(queue, Some(&self.rings[queue as usize]));
    }

    /// What the worker does when it is called.
    fn work(&self) {
        while self.again.read().is_ok() {
            for queue in 0..QUEUES as u32 {
                self.device.serve(queue, None);
            }
        }
    }

    /// Makes a request available, without a kick. Returns its number on this queue.
    fn request(&mut self, queue: u32, words: &[u64]) -> u16 {
        let number = self.made[queue as usize];
        self.made[queue as usize] += 1;
        let at = self.request_at(queue, number);
        for (word, n) in words.iter().zip(0..) {
            self.write(at + 8 * n, *word);
        }
        let (len, room) = (
            8 * words.len() as u64,
            if queue == WALK { 120u64 } else { 16 },
        );
        let (head, table) = (2 * number, base(queue));
        let descriptor = table + 16 * u64::from(head);
        self.write(descriptor, [at, len | 1 << 32 | u64::from(head + 1) << 48]);
        self.write(descriptor + 16, [at + 0x800, room | 2 << 32]);
        let avail = table + 0x1000;
        self.write(avail + 4 + 2 * u64::from(number), head);
        self.write(avail + 2, number + 1);
        number
    }

    fn request_at(&self, queue: u32, number: u16) -> u64 {
        0x10_0000 + u64::from(queue) * 0x4_0000 + u64::from(number) * 0x1000
    }

    fn lock(&mut self, gfn: u64, bits: u64) -> u16 {
        let number = self.request(CONTROL, &[1 | 1 << 32, gfn, gfn, bits]);
        self.kick(CONTROL);
        number
    }

    /// A `PROTECT_KERNEL` of frames 0x300 to 0x307.
    fn walk(&mut self) -> u16 {
        self.walk_with(0)
    }

    fn walk_with(&mut self, flags: u64) -> u16 {
        let fields = 4 | 40 << 8 | 7 << 32;
        let entry = [0x300, 0x307, NOWRITE | NOEXEC_KERNEL];
        let header = [9 | flags << 16 | 1 << 32, ROOT << 12, 0, 0x1f_ffff, fields];
        let number = self.request(WALK, &[&header[..], &entry[..]].concat());
        self.kick(WALK);
        number
    }

    /// How many requests were taken from the ring.
    fn taken(&self, queue: u32) -> u16 {
        self.rings[queue as usize].queue_next_avail()
    }

    /// The number of the walk that goes on.
    fn walk_id(&self) -> u64 {
        match &self.device.lock().walked {
            Progress::Walks(walk) => walk.id,
            other => panic!("{other:?}"),
        }
    }

    fn used(&self, queue: u32) -> u16 {
        self.read(base(queue) + 0x2002)
    }

    /// Waits until so many requests were given back; tells the status of the last.
    fn status(&self, queue: u32, number: u16) -> u32 {
        wait_for("an answer", || {
            self.work();
            (self.used(queue) > number).then_some(())
        });
        assert_eq!(self.used(queue), number + 1, "answered twice, or too early");
        self.read(self.request_at(queue, number) + 0x800)
    }

    /// The next order, which is to be this one. Returns its sequence number.
    fn order(&self, ranges: &[Range]) -> u64 {
        let (seq, entries) = wait_for("an order", || {
            self.work();
            let mut orders = self.owner.orders.lock().unwrap();
            (!orders.is_empty()).then(|| orders.remove(0))
        });
        assert_eq!(entries, ranges);
        seq
    }

    fn no_order(&self) {
        self.work();
        assert_eq!(*self.owner.orders.lock().unwrap(), []);
    }

    /// The owner has carried it out, and so many ranges are in force now.
    fn done(&self, seq: u64, in_force: u32) {
        let outcome = Outcome {
            status: 0,
            index: None,
            generation: self.device.config().generation,
            ranges_in_force: in_force,
            msr_ranges_in_force: 0,
        };
        self.device.result(seq, outcome).unwrap();
    }
}

/// What [`Setup::walk`] comes to.
const GIVEN: [Range; 2] = [
    (0x300, 0x303, NOWRITE | NOEXEC_KERNEL),
    (0x304, 0x307, NOEXEC_KERNEL),
];

fn locked(gfn: u64, bits: u64) -> Vec<Range> {
    vec![(gfn, gfn, bits | 15 << 60)]
}

#[test]
fn requests_of_the_other_queue_are_answered_while_page_tables_are_read() {
    let mut s = Setup::new();
    let walk = s.walk();
    s.gate.wait_for(1);
    for n in 0..3 {
        let lock = s.lock(0x380 + 2 * n, NOWRITE);
        let seq = s.order(&locked(0x380 + 2 * n, NOWRITE));
        s.done(seq, 1 + n as u32);
        assert_eq!(s.status(CONTROL, lock), 0);
    }
    assert_eq!(s.used(WALK), 0);
    s.gate.open(1);
    let seq = s.order(&GIVEN);
    assert_eq!(s.used(WALK), 0, "answered before it was enforced");
    s.done(seq, 5);
    assert_eq!(s.status(WALK, walk), 0);
}

#[test]
fn what_is_in_force_by_the_end_of_a_walk_is_what_its_order_is_held_against() {
    let mut s = Setup::new();
    // Data that is locked against stores meanwhile would be loosened.
    let walk = s.walk();
    s.gate.wait_for(1);
    s.lock(0x305, NOWRITE);
    let seq = s.order(&locked(0x305, NOWRITE));
    s.gate.open(1);
    s.done(seq, 1);
    assert_eq!(s.status(WALK, walk), 1);
    assert_eq!(s.read::<u32>(s.request_at(WALK, walk) + 0x804), 0);
    s.no_order();
}

#[test]
fn a_walk_whose_queue_stops_comes_to_nothing_and_is_done_again_when_it_runs() {
    let mut s = Setup::new();
    let walk = s.walk();
    s.gate.wait_for(1);
    let id = s.walk_id();
    s.stop(WALK);
    assert_eq!(s.taken(WALK), 0, "it is to be popped again");
    s.gate.open(1);
    s.start_only(WALK);
    s.work();
    assert_eq!(s.taken(WALK), 0, "taken before all was heard");
    s.start(WALK);
    s.gate.wait_for(2);
    // It may have ended just when it was cancelled.
    s.device.walked(id, Err(Errno::Eio.into()));
    s.no_order();
    assert_eq!(s.used(WALK), 0);
    s.gate.open(2);
    let seq = s.order(&GIVEN);
    s.done(seq, 2);
    assert_eq!(s.status(WALK, walk), 0);
    s.no_order();
    // The same with its order under way, whose result is late.
    let walk = s.walk_with(1);
    s.gate.open(3);
    let lock = GIVEN.map(|(start, end, bits)| (start, end, bits | 15 << 60));
    let late = s.order(&lock);
    s.stop(WALK);
    s.start(WALK);
    s.gate.open(4);
    s.gate.wait_for(4);
    s.no_order();
    assert_eq!(s.used(WALK), 1);
    s.done(late, 2);
    // Nothing is left to change.
    assert_eq!(s.status(WALK, walk), 0);
    s.no_order();
}

#[test]
fn a_system_reset_answers_estale_at_once_and_the_late_walk_to_nobody() {
    let mut s = Setup::new();
    let walks = [s.walk(), s.walk()];
    s.gate.wait_for(1);
    s.device.reset(2);
    assert_eq!(s.used(WALK), 2);
    for walk in walks {
        assert_eq!(s.read::<u32>(s.request_at(WALK, walk) + 0x800), ESTALE);
    }
    s.gate.open(1);
    s.stop(WALK);
    s.start(WALK);
    // In the new life, all is constant.
    for n in 4..8 {
        s.write((LEAVES << 12) + 8 * n, (0x300 + n) << 12 | P | NX);
    }
    let walk = s.walk();
    s.gate.wait_for(2);
    s.no_order();
    s.gate.open(2);
    let seq = s.order(&[(0x300, 0x307, NOWRITE | NOEXEC_KERNEL)]);
    s.done(seq, 1);
    assert_eq!(s.status(WALK, walk), 0);
    assert_eq!(
        s.read::<u64>(s.request_at(WALK, walk) + 0x808),
        2,
        "the generation"
    );
    s.no_order();
}

#[test]
fn a_walk_that_goes_on_when_the_front_end_goes_lets_its_memory_go() {
    let mut s = Setup::new();
    s.walk();
    s.gate.wait_for(1);
    s.stop(WALK);
    s.device.detach();
    let memory = Arc::downgrade(&s.memory.memory().into_inner());
    assert!(memory.upgrade().is_some());
    s.gate.open(1);
    let Setup {
        memory: ours,
        rings,
        ..
    } = s;
    drop((ours, rings));
    wait_for("the memory to be let go of", || {
        memory.upgrade().is_none().then_some(())
    });
}

#[test]
fn a_walk_that_panics_is_eio_and_the_next_one_is_done() {
    let panics = AtomicBool::new(true);
    let mut s = Setup::with(Box::new(move |job| {
        assert!(!panics.swap(false, Ordering::SeqCst), "as the test wants");
        walker::work(job)
    }));
    s.gate.open(2);
    let walk = s.walk();
    assert_eq!(s.status(WALK, walk), EIO);
    let walk = s.walk();
    let seq = s.order(&GIVEN);
    s.done(seq, 2);
    assert_eq!(s.status(WALK, walk), 0);
}

#[test]
fn without_a_thread_it_is_eio_and_no_hang() {
    let mut s = Setup::new();
    s.no_thread.store(true, Ordering::SeqCst);
    let walks = [s.walk(), s.walk()];
    for walk in walks {
        wait_for("an answer", || {
            s.work();
            (s.used(WALK) > walk).then_some(())
        });
        assert_eq!(s.read::<u32>(s.request_at(WALK, walk) + 0x800), EIO);
    }
    s.no_thread.store(false, Ordering::SeqCst);
    let walk = s.walk();
    s.gate.open(1);
    let seq = s.order(&GIVEN);
    s.done(seq, 2);
    assert_eq!(s.status(WALK, walk), 0);
}

#[test]
fn the_thread_ends_when_the_device_does() {
    let mut s = Setup::new();
    s.walk();
    s.gate.wait_for(1);
    s.gate.open(1);
    let Setup { device, gate, .. } = s;
    assert!(Arc::strong_count(&gate) > 1);
    drop(device);
    wait_for("the thread to end", || {
        (Arc::strong_count(&gate) == 1).then_some(())
    });
}

#[test]
fn orders_of_one_queue_do_not_keep_those_of_the_other_waiting() {
    let mut s = Setup::new();
    s.gate.open(!0);
    let first = s.lock(0x380, NOWRITE);
    let seq = s.order(&locked(0x380, NOWRITE));
    // By now more of them wait, and two walks.
    let others = [0x382, 0x384, 0x386].map(|gfn| s.lock(gfn, NOWRITE));
    let walks = [s.walk(), s.walk_with(1)];
    s.gate.wait_for(1);
    wait_for("the walk to end", || {
        let state = s.device.lock();
        matches!(state.walked, Progress::Walked(_)).then_some(())
    });
    s.no_order();
    s.done(seq, 1);
    assert_eq!(s.status(CONTROL, first), 0);
    let seq = s.order(&GIVEN);
    s.done(seq, 3);
    assert_eq!(s.status(WALK, walks[0]), 0);
    let seq = s.order(&locked(0x382, NOWRITE));
    wait_for("the walk to end", || {
        let state = s.device.lock();
        matches!(state.walked, Progress::Walked(_)).then_some(())
    });
    s.done(seq, 4);
    let lock = GIVEN.map(|(start, end, bits)| (start, end, bits | 15 << 60));
    let seq = s.order(&lock);
    s.done(seq, 4);
    for gfn in [0x384, 0x386] {
        let seq = s.order(&locked(gfn, NOWRITE));
        s.done(seq, if gfn == 0x384 { 5 } else { 6 });
    }
    assert_eq!(s.status(CONTROL, others[2]), 0);
    assert_eq!(s.status(WALK, walks[1]), 0);
}

#[test]
fn nothing_is_set_nor_told_of_what_is_in_force_before_that_is_known() {
    let mut s = Setup::new();
    let walks = [s.walk_with(2), s.walk()];
    s.gate.wait_for(1);
    s.device.disconnected();
    s.gate.open(1);
    wait_for("the walk to end", || {
        let state = s.device.lock();
        matches!(state.walked, Progress::Walked(_)).then_some(())
    });
    s.work();
    assert_eq!(
        s.used(WALK),
        0,
        "even a dry run has to know what is immutable"
    );
    s.connect(1, &GIVEN);
    assert_eq!(s.status(WALK, walks[0]), 0);
    s.gate.open(2);
    assert_eq!(s.status(WALK, walks[1]), 0);
    s.no_order();
}

#[test]
fn an_order_under_way_when_the_channel_drops_is_made_anew_on_what_is_in_force_then() {
    let mut s = Setup::new();
    s.gate.open(1);
    let walk = s.walk();
    s.order(&GIVEN);
    s.device.disconnected();
    // It had not been carried out; somebody else has set something where nothing is given.
    s.connect(1, &[(0x310, 0x310, NOWRITE), (0x302, 0x302, NOREAD)]);
    let seq = s.order(&GIVEN);
    assert_eq!(
        s.gate.came.load(Ordering::SeqCst),
        1,
        "the tables need no second look"
    );
    s.done(seq, 3);
    assert_eq!(s.status(WALK, walk), 0);
}

#[test]
fn what_may_not_be_read_any_more_is_not_read_by_a_walk_that_goes_on() {
    let mut s = Setup::new();
    let walk = s.walk();
    s.gate.wait_for(1);
    s.lock(LEAVES, NOREAD);
    let seq = s.order(&locked(LEAVES, NOREAD));
    s.done(seq, 1);
    s.gate.open(1);
    // It begins anew, and the table is as good as not there.
    s.gate.wait_for(2);
    s.gate.open(2);
    assert_eq!(s.status(WALK, walk), EFAULT);
    s.no_order();
}

#[test]
fn a_walk_sees_the_memory_that_there_was_when_it_began() {
    let mut s = Setup::new();
    let walk = s.walk();
    s.gate.wait_for(1);
    // Other memory, in which there are no tables; rings and answers are in it.
    let old = s.memory.memory().into_inner();
    let new = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let mut bytes = vec![0; ROOT as usize * 4096];
    old.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    new.write_slice(&bytes, GuestAddress(0)).unwrap();
    s.memory.lock().unwrap().replace(new);
    s.gate.open(1);
    let seq = s.order(&GIVEN);
    s.done(seq, 2);
    assert_eq!(s.status(WALK, walk), 0);
}

#[test]
fn each_ring_starts_by_itself_and_the_later_wait_is_enough_for_both() {
    let mut s = Setup::new();
    s.gate.open(!0);
    // One runs while the other waits.
    s.stop(WALK);
    s.start_only(WALK);
    let lock = s.lock(0x380, NOWRITE);
    let seq = s.order(&locked(0x380, NOWRITE));
    s.done(seq, 1);
    assert_eq!(s.status(CONTROL, lock), 0);
    let walk = s.walk();
    s.work();
    assert_eq!(s.taken(WALK), 0, "taken before all was heard");
    // The wait of the other takes the place of its.
    s.stop(CONTROL);
    s.start(CONTROL);
    let seq = s.order(&GIVEN);
    s.done(seq, 3);
    assert_eq!(s.status(WALK, walk), 0);
    // One that was over before the ring started again counts for nothing.
    s.stop(WALK);
    s.start_only(WALK);
    let stale = *s.owner.catch_up.lock().unwrap().last().unwrap();
    s.stop(WALK);
    s.start_only(WALK);
    s.walk();
    s.device.caught_up(stale);
    s.work();
    assert_eq!(s.taken(WALK), 1);
    s.device.caught_up(stale + 1);
    assert_eq!(s.taken(WALK), 2);
}
