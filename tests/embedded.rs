// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device in a VMM's own process: driven as a transport does, with no socket anywhere.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak, mpsc};
use std::thread;

use common::front_end::{F_ALL, F_EVENT_IDX, F_KERNEL};
use common::guest::{
    LOCK, PROTECT, QUEUE_SIZE, RAM_SIZE, SEAL, Used, WRITE, lock_request, query_request, request,
};
use common::kernel::{KERNEL, KernelRequest, NX, P, Tables, W};
use common::owner::Owner;
use common::*;
use vhost_guard::device::Device;
use vhost_guard::device::embedded::{
    CONFIG_SIZE, DEVICE_ID, Embedded, EmbeddedError, Interrupt, MAX_QUEUE_SIZE, NUM_QUEUES,
    QueueConfig,
};
use vhost_guard::vm::enforcer::{Access, Action, Policy, Source, Target, Violation};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

const F_INDIRECT: u64 = 1 << 28;
const F_VERSION_1: u64 = 1 << 32;
const OFFERED: u64 = F_ALL | F_KERNEL | F_INDIRECT | F_EVENT_IDX | F_VERSION_1;

/// A frame behind all that the tests have in memory: rings that they lock would stand still.
const ELSEWHERE: u64 = 0x1_0000;

/// What locks a page that is no neighbour of another.
fn page(n: u64) -> vm_guard::Range {
    (ELSEWHERE + 2 * n, ELSEWHERE + 2 * n, NOWRITE)
}

/// A VM with the device, whose transport is the test.
struct Vm {
    guard: Embedded,
    device: Arc<Device>,
    owner: Arc<Owner>,
    guest: Guest,
    interrupts: [Arc<AtomicU64>; NUM_QUEUES],
}

impl Vm {
    /// With all queues running.
    fn new() -> Self {
        let (owner, device) = Owner::able();
        let guest = Guest::new();
        let memory = GuestMemoryAtomic::new(guest.memory.clone());
        let vm = Self {
            guard: Embedded::new(device.clone(), memory).unwrap(),
            device,
            owner,
            guest,
            interrupts: Default::default(),
        };
        vm.begin();
        vm
    }

    /// What a driver does first.
    fn begin(&self) {
        self.guard.set_features(self.guard.features()).unwrap();
        (0..3).for_each(|queue| self.start(queue, 0));
    }

    /// How the guest has set a queue up.
    fn config(&self, queue: u32, next_avail: u16) -> QueueConfig {
        let interrupts = Arc::clone(&self.interrupts[queue as usize]);
        QueueConfig {
            interrupt: Box::new(move || {
                interrupts.fetch_add(1, Ordering::SeqCst);
            }),
            ..described(&self.guest, queue, next_avail)
        }
    }

    fn start(&self, queue: u32, next_avail: u16) {
        let config = self.config(queue, next_avail);
        self.guard.start_queue(queue, config).unwrap();
    }

    fn kick(&self, queue: u32) {
        self.guard.kick(queue).unwrap();
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        // All of it has to be written.
        let mut bytes = vec![0xee; len];
        self.guard.read_config(offset, &mut bytes);
        bytes
    }

    fn in_force(&self) -> u32 {
        u32::from_le_bytes(self.read(32, 4).try_into().unwrap())
    }

    /// Makes a request of queue 0 that is answered without the owner, or by one who does it by itself.
    fn ask(&mut self, bytes: &[u8]) -> Response {
        let head = self.guest.request(bytes);
        self.kick(0);
        self.guest.response(head)
    }

    fn interrupts(&self, queue: usize) -> u64 {
        self.interrupts[queue].load(Ordering::SeqCst)
    }

    fn wait_for_interrupt(&self, queue: usize, before: u64) {
        wait_for("an interrupt", || {
            (self.interrupts(queue) > before).then_some(())
        });
    }

    /// Locks one page and answers for the owner: everything works.
    fn assert_works(&mut self) {
        let head = self.guest.lock(&[(0x777, 0x777, NOWRITE)]);
        self.kick(0);
        let order = self.owner.order();
        assert_eq!(order.ranges(), [(0x777, 0x777, NOWRITE | IMMUTABLE)]);
        self.owner.succeed(&order);
        let response = self.guest.response(head);
        assert_eq!((response.status, response.index), (0, NO_INDEX));
    }
}

/// A queue as the guest has it, with nobody to be interrupted.
fn described(guest: &Guest, queue: u32, next_avail: u16) -> QueueConfig {
    let queue = queue as usize;
    QueueConfig {
        size: QUEUE_SIZE,
        desc_table: GuestAddress(guest.descriptors_at(queue)),
        avail_ring: GuestAddress(guest.avail_at(queue)),
        used_ring: GuestAddress(guest.used_at(queue)),
        next_avail,
        interrupt: Box::new(|| {}),
    }
}

#[test]
fn a_lock_is_answered_after_the_owner_has_enforced_it() {
    let mut vm = Vm::new();
    let head = vm
        .guest
        .lock(&[(0x100, 0x1ff, NOWRITE), (0x400, 0x400, NOWRITE)]);
    // The driver wants an interrupt for each, and each queue has one when it starts.
    vm.wait_for_interrupt(0, 0);
    let before = vm.interrupts(0);
    vm.kick(0);
    let order = vm.owner.order();
    assert_eq!(order.generation, 1);
    let locked = NOWRITE | IMMUTABLE;
    let ranges = [(0x100, 0x1ff, locked), (0x400, 0x400, locked)];
    assert_eq!(order.ranges(), ranges);
    assert_eq!(
        vm.guest.try_used(0),
        None,
        "answered before it was enforced"
    );
    assert_eq!(vm.in_force(), 0);
    vm.owner.succeed(&order);
    assert_eq!(vm.guest.response(head), OK);
    vm.wait_for_interrupt(0, before);
    assert_eq!(vm.in_force(), 2);
    assert_eq!(vm.device.snapshot().pages.pages(), 0x101);
}

#[test]
fn a_request_is_refused_as_the_device_or_the_owner_says() {
    let mut vm = Vm::new();
    let wrong = lock_request(&[(1, 1, NOWRITE), (3, 2, NOWRITE)]);
    assert_eq!(vm.ask(&wrong), refused(EINVAL, 1));
    assert_eq!(
        vm.ask(&request(0xff, 0, 0, &[])),
        refused(EOPNOTSUPP, NO_INDEX)
    );
    assert!(vm.owner.try_order().is_none());
    let head = vm.guest.lock(&[(1, 1, NOWRITE), (2, 2, NOWRITE)]);
    vm.kick(0);
    let order = vm.owner.order();
    vm.owner.refuse(&order, ENOSPC, Some(1));
    assert_eq!(vm.guest.response(head), refused(ENOSPC, 1));
    vm.owner.by_itself();
    assert_eq!(vm.ask(&lock_request(&[(5, 6, NOWRITE)])), OK);
    let loosens = request(PROTECT, 0, 1, &[(6, 7, 0)]);
    assert_eq!(vm.ask(&loosens), refused(EPERM, 0));
    assert_eq!(vm.ask(&request(PROTECT, 0, 1, &[(7, 9, NOEXEC)])), OK);
    assert_eq!(vm.ask(&request(SEAL, 0, 0, &[])), OK);
    assert_eq!(vm.ask(&loosens), refused(EPERM, 0));
    assert_eq!(
        vm.ask(&request(PROTECT, 0, 1, &[(9, 9, 0)])),
        refused(EPERM, 0)
    );
    let head = vm
        .guest
        .request_with_room(&query_request(0, TOP), 16 + 24 * 4);
    vm.kick(0);
    let held = vec![(5, 6, NOWRITE | IMMUTABLE), (7, 9, NOEXEC | IMMUTABLE)];
    assert_eq!(vm.guest.query_response(head), (2, held));
}

fn violation(gpa: u64) -> Violation {
    Violation {
        access: Access::Write,
        source: Source::Vcpu(3),
        target: Target::Memory(gpa),
        gva: Violation::UNKNOWN,
        rip: Violation::UNKNOWN,
        value: 7,
        size: 8,
        times: 1,
        lost: 0,
        action: Action::Refused(Policy::Inject),
    }
}

#[test]
fn violations_are_told_whether_a_buffer_or_the_violation_is_there_first() {
    let mut vm = Vm::new();
    let at = vm.guest.post_event_buffer(0, 64);
    vm.kick(1);
    vm.wait_for_interrupt(1, 0);
    let before = vm.interrupts(1);
    vm.owner.act(|events| events.violation(violation(0x1008)));
    assert_eq!(vm.guest.used(1), Used { head: 0, len: 64 });
    assert_eq!(vm.guest.read::<u64>(at + 8), 0x1008);
    vm.wait_for_interrupt(1, before);

    vm.owner.act(|events| events.violation(violation(0x2010)));
    vm.owner.settle();
    assert_eq!(vm.guest.try_used(1), None);
    let at = vm.guest.post_event_buffer(1, 64);
    vm.kick(1);
    assert_eq!(vm.guest.used(1), Used { head: 1, len: 64 });
    assert_eq!(vm.guest.read::<u64>(at + 8), 0x2010);
    assert_eq!(vm.read(40, 8), 2u64.to_le_bytes());
    // A queue that was stopped goes on where it was.
    assert_eq!(vm.guard.stop_queue(1).unwrap(), 2);
    vm.owner.act(|events| events.violation(violation(0x3018)));
    let at = vm.guest.post_event_buffer(2, 64);
    vm.owner.settle();
    assert_eq!(vm.guest.try_used(1), None);
    vm.start(1, 2);
    assert_eq!(vm.guest.used(1), Used { head: 2, len: 64 });
    assert_eq!(vm.guest.read::<u64>(at + 8), 0x3018);
}

/// Frames 0x1000 to 0x100f are code, 0x1010 to 0x101f data.
fn map_kernel(guest: &Guest) {
    let mut tables = Tables::new(guest);
    tables.map_range(guest, 0x1000, 0x100f, P);
    tables.map_range(guest, 0x1010, 0x101f, P | W | NX);
    tables.map(guest, KERNEL, 0, P | W | NX);
}

const GIVEN: [vm_guard::Range; 2] = [(0x1000, 0x100f, NOWRITE), (0x1010, 0x101f, NOEXEC_KERNEL)];

fn walk(vm: &mut Vm) -> u16 {
    let request = KernelRequest::new(&[(0x1000, 0x101f, NOWRITE | NOEXEC_KERNEL)]);
    let head = vm.guest.walk_request(&request.bytes(), 120);
    vm.kick(2);
    head
}

#[test]
fn page_tables_are_read_for_queue_2() {
    let mut vm = Vm::new();
    map_kernel(&vm.guest);
    let head = walk(&mut vm);
    let order = vm.owner.order();
    assert_eq!(order.ranges(), GIVEN);
    // Queue 0 is served meanwhile.
    assert_eq!(vm.ask(&lock_request(&[(1, 1, 0)])), refused(EINVAL, 0));
    vm.owner.succeed(&order);
    let answer = vm.guest.walk_answer(head);
    assert_eq!((answer.outcome(), answer.value), ((0, NO_INDEX), 1));
    assert_eq!((answer.counts.given, answer.counts.mappings), (32, 33));
    assert_eq!(vm.in_force(), 2);
}

#[test]
fn a_queue_that_stops_while_page_tables_are_read_is_answered_once() {
    let mut vm = Vm::new();
    map_kernel(&vm.guest);
    let head = walk(&mut vm);
    vm.owner.by_itself();
    for _ in 0..50 {
        let at = vm.guard.stop_queue(2).unwrap();
        assert_eq!(at, vm.guest.used_idx(2));
        vm.start(2, at);
    }
    // One that came before.
    if let Some(order) = vm.owner.try_order() {
        vm.owner.succeed(&order);
    }
    assert_eq!(vm.guest.walk_answer(head).outcome(), (0, NO_INDEX));
    vm.kick(2);
    vm.owner.settle();
    assert_eq!(vm.guard.stop_queue(2).unwrap(), 1);
    assert_eq!(vm.guest.used_idx(2), 1);
    assert_eq!(vm.in_force(), 2);
}

#[test]
fn a_queue_that_stops_gives_unanswered_requests_back() {
    let mut vm = Vm::new();
    let first = vm.guest.lock(&[(1, 1, NOWRITE)]);
    let second = vm.guest.lock(&[(3, 3, NOWRITE)]);
    let wrong = vm.guest.lock(&[(3, 3, 0)]);
    vm.kick(0);
    let order = vm.owner.order();
    vm.owner.succeed(&order);
    assert_eq!(vm.guest.response(first), OK);
    let order = vm.owner.order();
    assert_eq!(vm.guard.stop_queue(0).unwrap(), 1);
    let interrupts = vm.interrupts(0);
    vm.owner.succeed(&order);
    vm.owner.settle();
    assert_eq!(vm.in_force(), 2);
    assert_eq!(vm.guest.used_idx(0), 1, "written to after it was stopped");
    vm.kick(0);
    assert!(matches!(
        vm.guard.stop_queue(0),
        Err(EmbeddedError::Stopped(0))
    ));
    vm.start(0, 1);
    let again = vm.owner.order();
    assert_eq!(again.ranges(), order.ranges());
    assert_ne!(again.seq, order.seq);
    vm.owner.succeed(&again);
    assert_eq!(vm.guest.response(second), OK);
    assert_eq!(vm.guest.response(wrong), refused(EINVAL, 0));
    vm.wait_for_interrupt(0, interrupts);
    assert_eq!(vm.guard.stop_queue(0).unwrap(), 3);
    assert_eq!(vm.guest.used_idx(0), 3, "answered twice");
}

#[test]
fn many_stops_and_starts_lose_nothing_and_answer_nothing_twice() {
    let mut vm = Vm::new();
    vm.owner.by_itself();
    for round in 0..300u16 {
        let page = ELSEWHERE + 4 * u64::from(round);
        let heads = [page, page + 2].map(|gfn| vm.guest.lock(&[(gfn, gfn, NOWRITE)]));
        vm.kick(0);
        for _ in 0..2 {
            let at = vm.guard.stop_queue(0).unwrap();
            assert_eq!(at, vm.guest.used_idx(0), "what is before it was given back");
            vm.start(0, at);
        }
        for head in heads {
            assert_eq!(vm.guest.response(head), OK);
        }
        assert_eq!(vm.guest.used_idx(0), 2 * round + 2);
    }
    vm.owner.settle();
    assert_eq!(vm.in_force(), 600);
}

#[test]
fn many_threads_that_kick_at_once_have_each_request_answered_once_and_in_order() {
    let mut vm = Vm::new();
    vm.owner.by_itself();
    let end = AtomicBool::new(false);
    let Vm { guard, guest, .. } = &mut vm;
    thread::scope(|scope| {
        for n in 0..8u32 {
            let (guard, end) = (&*guard, &end);
            scope.spawn(move || {
                while !end.load(Ordering::SeqCst) {
                    guard.kick(n % 4).ok();
                    guard.read_config(0, &mut [0; CONFIG_SIZE]);
                }
            });
        }
        for round in 0..100u64 {
            // As many as the guest's driver has room for.
            let heads: Vec<u16> = (0..u64::from(QUEUE_SIZE / 2))
                .map(|n| guest.lock(&[page(n + 32 * round)]))
                .collect();
            for head in heads {
                assert_eq!(guest.response(head), OK);
            }
        }
        end.store(true, Ordering::SeqCst);
    });
    assert_eq!(vm.guest.used_idx(0), 3200);
    assert_eq!((vm.owner.carried_out(), vm.in_force()), (3200, 3200));
}

#[test]
fn a_device_reset_drops_what_is_under_way_and_keeps_what_is_in_force() {
    let mut vm = Vm::new();
    vm.assert_works();
    vm.guest.lock(&[(1, 1, NOWRITE)]);
    map_kernel(&vm.guest);
    vm.kick(0);
    let order = vm.owner.order();
    walk(&mut vm);
    vm.guard.reset();
    vm.owner.succeed(&order);
    vm.owner.settle();
    assert_eq!(vm.in_force(), 2);
    assert_eq!(vm.guest.used_idx(0), 1, "the driver that asked is gone");
    for queue in 0..3 {
        let stopped = vm.guard.stop_queue(queue);
        assert!(matches!(stopped, Err(EmbeddedError::Stopped(q)) if q == queue));
    }
    // The next driver may ask for nothing before it has said what it knows.
    vm.guest = Guest::starting_on(vm.guest.memory);
    vm.start(0, 0);
    let lock = lock_request(&[(9, 9, NOWRITE)]);
    assert_eq!(vm.ask(&lock), refused(EOPNOTSUPP, 0));
    vm.guard.reset();
    vm.guest = Guest::starting_on(vm.guest.memory);
    vm.begin();
    vm.owner.by_itself();
    assert_eq!(vm.ask(&lock), OK);
    assert_eq!(vm.in_force(), 3);
    assert!(vm.owner.try_order().is_none());
    vm.guard.reset();
    vm.guard.reset();
}

#[test]
fn a_reset_of_the_vm_answers_estale_and_ends_what_was_locked() {
    let mut vm = Vm::new();
    vm.assert_works();
    let head = vm.guest.lock(&[(1, 1, NOWRITE)]);
    vm.kick(0);
    let stale = vm.owner.order();
    vm.owner.reset();
    assert_eq!(vm.guest.response(head), refused(ESTALE, NO_INDEX));
    vm.owner.refuse(&stale, ESTALE, None);
    vm.owner.settle();
    assert_eq!(vm.in_force(), 0);
    assert_eq!(vm.read(24, 8), 2u64.to_le_bytes());
    // What is in a queue now is of the life before, until the driver sets it up anew.
    let late = vm.guest.lock(&[(3, 3, NOWRITE)]);
    vm.kick(0);
    assert_eq!(vm.guest.response(late), refused(ESTALE, NO_INDEX));
    let next = vm.guard.stop_queue(0).unwrap();
    vm.start(0, next);
    vm.assert_works();
}

#[test]
fn the_configuration_space_can_be_read_in_any_piece() {
    let mut vm = Vm::new();
    vm.assert_works();
    let all = vm.read(0, CONFIG_SIZE);
    assert_eq!(all[..8], [1, 0, 0, 0, 0, 0x10, 0, 0]);
    assert_eq!(all[8..16], ALL.to_le_bytes());
    assert_eq!(all[32..36], 1u32.to_le_bytes());
    for offset in 0..CONFIG_SIZE + 3 {
        for len in 0..12 {
            let expected: Vec<u8> = (offset..offset + len)
                .map(|at| all.get(at).copied().unwrap_or(0))
                .collect();
            assert_eq!(vm.read(offset as u64, len), expected);
        }
    }
    for offset in [1 << 16, 1 << 32, u64::MAX - 1, u64::MAX] {
        assert_eq!(vm.read(offset, 4), [0; 4]);
    }
    assert_eq!(DEVICE_ID, 63);
}

#[test]
fn features_are_those_that_were_offered_and_hold_until_a_reset() {
    let (owner, device) = Owner::silent();
    let guest = Guest::new();
    let memory = GuestMemoryAtomic::new(guest.memory.clone());
    let guard = Embedded::new(device, memory).unwrap();
    thread::scope(|scope| {
        // It waits for the owner.
        let features = scope.spawn(|| guard.features());
        owner.connect();
        assert_eq!(features.join().unwrap(), OFFERED);
    });
    // Without bit 30, which is vhost-user's.
    for unknown in [1 << 5, 1 << 30, 1 << 63] {
        let error = guard.set_features(OFFERED | unknown).unwrap_err();
        assert!(matches!(error, EmbeddedError::NotOffered(bits) if bits == unknown));
    }
    for legacy in [0, OFFERED & !F_VERSION_1] {
        let error = guard.set_features(legacy).unwrap_err();
        assert!(matches!(error, EmbeddedError::Legacy));
    }
    guard.set_features(F_VERSION_1).unwrap();
    guard.set_features(F_VERSION_1 | 1).unwrap();
    guard.start_queue(1, described(&guest, 1, 0)).unwrap();
    let error = guard.set_features(OFFERED).unwrap_err();
    assert!(matches!(error, EmbeddedError::Runs(1)));
    guard.reset();
    guard.set_features(OFFERED).unwrap();
}

#[test]
fn only_what_was_negotiated_can_be_asked_for() {
    let mut vm = Vm::new();
    vm.owner.by_itself();
    vm.guard.reset();
    vm.guard.set_features(F_VERSION_1 | 1).unwrap();
    vm.start(0, 0);
    let noexec = request(LOCK, 0, 1, &[(1, 1, NOEXEC)]);
    assert_eq!(vm.ask(&noexec), refused(EOPNOTSUPP, 0));
    assert_eq!(vm.ask(&lock_request(&[(1, 1, NOWRITE)])), OK);
}

/// Changes what a guest says of a queue.
type Change = fn(&mut QueueConfig);

#[test]
fn a_queue_that_cannot_be_is_not_started_and_stops_no_other() {
    let mut vm = Vm::new();
    let wrong: [(&str, Change); 13] = [
        ("0 entries", |c| c.size = 0),
        ("no power of 2", |c| c.size = 48),
        ("too many", |c| c.size = 2 * MAX_QUEUE_SIZE),
        ("far too many", |c| c.size = u16::MAX),
        ("descriptors not aligned", |c| c.desc_table.0 += 8),
        ("avail not aligned", |c| c.avail_ring.0 += 1),
        ("used not aligned", |c| c.used_ring.0 += 2),
        ("descriptors outside", |c| c.desc_table.0 = RAM_SIZE),
        ("avail ends outside", |c| {
            c.avail_ring.0 = RAM_SIZE - 6 - 126
        }),
        ("used ends outside", |c| {
            c.used_ring.0 = RAM_SIZE - 8 - 8 * 63
        }),
        ("descriptors wrap", |c| c.desc_table.0 = u64::MAX - 15),
        ("avail wraps", |c| c.avail_ring.0 = u64::MAX - 1),
        ("used wraps", |c| c.used_ring.0 = u64::MAX - 3),
    ];
    vm.guard.stop_queue(1).unwrap();
    for (what, change) in wrong {
        let mut config = vm.config(1, 0);
        change(&mut config);
        let started = vm.guard.start_queue(1, config);
        assert!(started.is_err(), "{what}");
        let stopped = vm.guard.stop_queue(1);
        assert!(matches!(stopped, Err(EmbeddedError::Stopped(1))), "{what}");
    }
    for size in [1, MAX_QUEUE_SIZE] {
        let config = QueueConfig {
            size,
            desc_table: GuestAddress(0x10_0000),
            avail_ring: GuestAddress(0x20_0000),
            used_ring: GuestAddress(RAM_SIZE - 8 - 8 * u64::from(size)),
            ..vm.config(1, 0)
        };
        vm.guard.start_queue(1, config).unwrap();
        vm.guard.stop_queue(1).unwrap();
    }
    vm.assert_works();
    vm.start(1, 0);
    let twice = vm.guard.start_queue(1, vm.config(1, 0));
    assert!(matches!(twice, Err(EmbeddedError::Runs(1))));
    for queue in [3, 4, 1 << 16, u32::MAX] {
        let config = vm.config(0, 0);
        let errors = [
            vm.guard.start_queue(queue, config).unwrap_err(),
            vm.guard.kick(queue).unwrap_err(),
            vm.guard.stop_queue(queue).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, EmbeddedError::NoQueue(q) if q == queue));
        }
    }
    vm.assert_works();
}

#[test]
fn a_queue_that_makes_no_sense_stands_still_until_it_is_mended() {
    let mut vm = Vm::new();
    vm.guest.write_avail_idx(0, 1000);
    vm.kick(0);
    vm.owner.settle();
    assert_eq!(vm.guest.used_idx(0), 0);
    assert_eq!(vm.guard.stop_queue(0).unwrap(), 0);
    vm.guest.write_avail_idx(0, 0);
    vm.start(0, 0);
    vm.assert_works();
    // From a place in the ring that the guest does not have.
    vm.guard.stop_queue(0).unwrap();
    vm.start(0, 0x8000);
    vm.kick(0);
    assert_eq!(vm.guard.stop_queue(0).unwrap(), 0x8000);
    vm.start(0, 1);
    vm.assert_works();
}

#[test]
fn memory_that_is_put_there_later_is_found() {
    let (owner, device) = Owner::able();
    let mut guest = Guest::new();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let guard = Embedded::new(device, memory.clone()).unwrap();
    guard.set_features(OFFERED).unwrap();
    let outside = guard.start_queue(0, described(&guest, 0, 0)).unwrap_err();
    assert!(
        matches!(outside, EmbeddedError::Outside { .. }),
        "{outside}"
    );
    memory.lock().unwrap().replace(guest.memory.clone());
    guard.start_queue(0, described(&guest, 0, 0)).unwrap();
    owner.by_itself();
    let head = guest.lock(&[(1, 1, NOWRITE)]);
    guard.kick(0).unwrap();
    assert_eq!(guest.response(head), OK);
    // It is taken away, ring and all, and put back.
    memory.lock().unwrap().replace(GuestMemoryMmap::new());
    let head = guest.lock(&[(2, 2, NOWRITE)]);
    guard.kick(0).unwrap();
    assert_eq!(guard.stop_queue(0).unwrap(), 1);
    memory.lock().unwrap().replace(guest.memory.clone());
    guard.start_queue(0, described(&guest, 0, 1)).unwrap();
    assert_eq!(guest.response(head), OK);
}

#[test]
fn a_driver_that_kicks_only_when_it_is_asked_to_is_never_forgotten() {
    let mut vm = Vm::new();
    let bytes = lock_request(&[(1, 1, 0)]);
    for round in 0..1000u16 {
        // The worker is busy finding out that there is nothing, just when something comes.
        vm.kick(0);
        let old = vm.guest.queues[0].avail;
        assert_eq!(old, round);
        let head = vm.guest.request(&bytes);
        // Virtio 1.2, 2.7.10: kick if avail_event is what has just been passed.
        if vm.guest.avail_event(0) == old {
            vm.kick(0);
        }
        assert_eq!(vm.guest.response(head), refused(EINVAL, 0));
    }
}

/// One that takes the lock of a transport, and counts.
fn interrupt(
    transport: &Arc<Mutex<Embedded>>,
    begun: &Arc<AtomicU64>,
    ended: &Arc<AtomicU64>,
) -> Box<Interrupt> {
    let transport = Arc::downgrade(transport);
    let (begun, ended) = (Arc::clone(begun), Arc::clone(ended));
    Box::new(move || {
        begun.fetch_add(1, Ordering::SeqCst);
        let transport = transport.upgrade().unwrap();
        transport.lock().unwrap().kick(1).unwrap();
        ended.fetch_add(1, Ordering::SeqCst);
    })
}

#[test]
fn an_interrupt_may_wait_for_a_lock_that_is_held_where_its_queue_is_stopped() {
    let (owner, device) = Owner::able();
    owner.by_itself();
    let mut guest = Guest::new();
    let memory = GuestMemoryAtomic::new(guest.memory.clone());
    let guard = Embedded::new(device, memory).unwrap();
    guard.set_features(OFFERED).unwrap();
    // A transport behind one lock, as VMMs have them.
    let transport = Arc::new(Mutex::new(guard));
    let (begun, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let heads: Vec<u16> = (0..20).map(|n| guest.lock(&[page(n)])).collect();
    let (told, done) = mpsc::channel();
    let shared = Arc::clone(&transport);
    thread::spawn(move || {
        let mut next_avail = 0;
        for _ in 0..20 {
            let held = shared.lock().unwrap();
            let before = begun.load(Ordering::SeqCst);
            let config = QueueConfig {
                interrupt: interrupt(&shared, &begun, &ended),
                ..described(&guest, 0, next_avail)
            };
            held.start_queue(0, config).unwrap();
            wait_for("an interrupt", || {
                (begun.load(Ordering::SeqCst) > before).then_some(())
            });
            next_avail = held.stop_queue(0).unwrap();
            drop(held);
            wait_for("the end of the interrupt", || {
                (ended.load(Ordering::SeqCst) == begun.load(Ordering::SeqCst)).then_some(())
            });
        }
        told.send((guest, next_avail)).unwrap();
    });
    // Else each waits for the other.
    let (mut guest, next_avail) = done.recv_timeout(DEADLINE).unwrap();
    let guard = transport.lock().unwrap();
    guard
        .start_queue(0, described(&guest, 0, next_avail))
        .unwrap();
    for head in heads {
        assert_eq!(guest.response(head), OK);
    }
    assert_eq!(guest.used_idx(0), 20);
}

#[test]
fn an_interrupt_may_stop_its_queue_and_may_panic() {
    let mut vm = Vm::new();
    vm.owner.by_itself();
    vm.guard.reset();
    vm.guest = Guest::starting_on(vm.guest.memory);
    let Vm {
        guard, mut guest, ..
    } = vm;
    guard.set_features(OFFERED).unwrap();
    let (guard, itself) = (Arc::new(guard), Arc::new(OnceLock::<Weak<Embedded>>::new()));
    itself.set(Arc::downgrade(&guard)).unwrap();
    let (told, stopped) = mpsc::channel();
    let config = QueueConfig {
        interrupt: Box::new(move || {
            let guard = itself.get().unwrap().upgrade().unwrap();
            told.send(guard.stop_queue(0).unwrap()).unwrap();
            panic!("on purpose");
        }),
        ..described(&guest, 0, 0)
    };
    guard.start_queue(0, config).unwrap();
    assert_eq!(stopped.recv_timeout(DEADLINE), Ok(0));
    let head = guest.lock(&[(1, 1, NOWRITE)]);
    guard.start_queue(0, described(&guest, 0, 0)).unwrap();
    assert_eq!(guest.response(head), OK);
}

#[test]
fn a_guest_that_never_stops_asking_keeps_nobody_waiting() {
    let mut vm = Vm::new();
    // Every one of these is answered at once, so nothing but the turn's budget ends it.
    let bytes = lock_request(&[(1, 1, 0)]);
    let (at, response_at) = (vm.guest.request_at(0), vm.guest.response_at(0));
    vm.guest.write_bytes(at, &bytes);
    let parts = [(at, bytes.len() as u32, 0), (response_at, 16, WRITE)];
    vm.guest.write_chain(0, 0, &parts);
    let end = AtomicBool::new(false);
    let Vm {
        guard,
        guest,
        owner,
        ..
    } = &mut vm;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                if guest.queues[0].avail.wrapping_sub(guest.used_idx(0)) < QUEUE_SIZE {
                    guest.publish(0, 0);
                }
            }
        });
        guard.kick(0).unwrap();
        for _ in 0..100 {
            guard.read_config(0, &mut [0; 8]);
            owner.act(|events| events.violation(violation(0x1000)));
            owner.settle();
            let at = guard.stop_queue(0).unwrap();
            let config = QueueConfig {
                size: QUEUE_SIZE,
                desc_table: GuestAddress(0x10000),
                avail_ring: GuestAddress(0x11000),
                used_ring: GuestAddress(0x12000),
                next_avail: at,
                interrupt: Box::new(|| {}),
            };
            guard.start_queue(0, config).unwrap();
        }
        // Answered at all is what counts.
        guard.reset();
        end.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_device_has_one_front_end_at_a_time_and_its_thread_ends_with_it() {
    let mut vm = Vm::new();
    vm.assert_works();
    let memory = GuestMemoryAtomic::new(vm.guest.memory.clone());
    let second = Embedded::new(vm.device.clone(), memory.clone());
    assert!(matches!(second, Err(EmbeddedError::InUse(_))));
    vm.assert_works();
    let Vm {
        guard,
        device,
        owner,
        guest,
        ..
    } = vm;
    let used = guest.used_idx(0);
    drop(guard);
    wait_for("the end of the thread", || {
        (Arc::strong_count(&device) == 1).then_some(())
    });
    let guard = Embedded::new(device.clone(), memory).unwrap();
    guard.set_features(OFFERED).unwrap();
    let mut vm = Vm {
        guard,
        device,
        owner,
        guest,
        interrupts: Default::default(),
    };
    assert_eq!(vm.in_force(), 1, "what is in force stays so");
    vm.start(0, used);
    vm.assert_works();
}

#[test]
fn front_ends_that_follow_each_other_at_once_lose_nothing() {
    let (owner, device) = Owner::able();
    owner.by_itself();
    let mut guest = Guest::new();
    let mut unanswered = Vec::new();
    for round in 0..240 {
        let memory = GuestMemoryAtomic::new(guest.memory.clone());
        let guard = Embedded::new(device.clone(), memory).unwrap();
        guard.set_features(OFFERED).unwrap();
        let config = described(&guest, 0, guest.used_idx(0));
        guard.start_queue(0, config).unwrap();
        unanswered.push(guest.lock(&[page(round)]));
        guard.kick(0).unwrap();
        if round % 8 == 7 {
            for head in unanswered.drain(..) {
                assert_eq!(guest.response(head), OK);
            }
        }
        drop(guard);
        let used = guest.used_idx(0);
        owner.settle();
        assert_eq!(guest.used_idx(0), used, "written to with no front end");
    }
    assert_eq!(guest.used_idx(0), 240);
}
