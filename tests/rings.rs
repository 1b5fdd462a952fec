// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings that stop, start, break, and outlive a companion.

mod common;

use std::collections::HashMap;

use common::guest::{NEXT, QUEUE_SIZE, Used, WRITE, lock_request};
use common::*;

#[test]
fn a_companion_that_is_killed_loses_no_request_and_answers_none_twice() {
    let companion = Companion::start();
    let mut guest = Guest::new();
    let mut vm_guard = VmGuard::connect(&companion);
    let mut front_end = FrontEnd::connect(&companion, &guest);
    let mut heads = Vec::new();
    for i in 0..10 {
        heads.push(guest.lock(&[(0x100 * i, 0x100 * i, NOWRITE)]));
    }
    front_end.kick(0);
    // Two are answered, the third is with QEMU, which has carried it out, and the fourth is wrong.
    for _ in 0..2 {
        let protect = vm_guard.protect();
        vm_guard.succeed(&protect);
    }
    let third = vm_guard.protect();
    assert_eq!(third.ranges[0].0, 0x200);
    wait_for("two answers", || (guest.used_idx(0) == 2).then_some(()));

    let companion = companion.kill_and_restart();
    front_end.assert_closed();
    let held: Vec<_> = [0, 0x100, 0x200]
        .map(|gfn| (gfn, gfn, NOWRITE | IMMUTABLE))
        .to_vec();
    let mut vm_guard = VmGuard::connect_with(&companion, 1, &held);
    front_end = FrontEnd::connect(&companion, &guest);
    assert_eq!(front_end.config().ranges_in_force(), 3);
    for i in 2..10 {
        let protect = vm_guard.protect();
        assert_eq!(protect.ranges[0].0, 0x100 * i);
        vm_guard.in_force = vm_guard.in_force.max(i as u32 + 1);
        vm_guard.result(protect.seq, 0, NO_INDEX);
    }
    let mut answers = HashMap::new();
    for _ in 0..10 {
        *answers.entry(guest.used(0).head).or_insert(0) += 1;
    }
    assert_eq!(answers, heads.iter().map(|&head| (head, 1)).collect());
    for head in heads {
        assert_eq!(guest.read_response(guest.response_at(head)).status, 0);
    }
    assert_eq!(guest.used_idx(0), 10);
    front_end.kick(0);
    front_end.config();
    assert_eq!(guest.used_idx(0), 10, "answered twice");
}

#[test]
fn an_interrupt_that_a_killed_companion_owed_is_made_up_for() {
    let Setup {
        companion, guest, ..
    } = Setup::new();
    let companion = companion.kill_and_restart();
    let _vm_guard = VmGuard::connect(&companion);
    let front_end = FrontEnd::connect(&companion, &guest);
    front_end.wait_for_interrupt(0);
}

#[test]
fn a_ring_that_stops_gives_unanswered_requests_back() {
    let mut s = Setup::new();
    let first = s.guest.lock(&[(1, 1, NOWRITE)]);
    let second = s.guest.lock(&[(3, 3, NOWRITE)]);
    let wrong = s.guest.lock(&[(3, 3, 0)]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(first).status, 0);
    let protect = s.vm_guard.protect();

    assert_eq!(
        s.front_end.stop(0),
        1,
        "the place of the oldest unanswered request"
    );
    s.guest
        .write_bytes(s.guest.response_at(second), &[0xee; 16]);
    s.vm_guard.succeed(&protect);
    wait_for("the late RESULT", || {
        (s.front_end.config().ranges_in_force() == 2).then_some(())
    });
    assert_eq!(
        s.guest.used_idx(0),
        1,
        "written to after the answer to GET_VRING_BASE"
    );
    assert_eq!(
        s.companion.log_lines("broken"),
        0,
        "a stopped ring was looked at"
    );
    assert_eq!(
        s.guest.read::<u32>(s.guest.response_at(second)),
        0xeeee_eeee
    );

    s.front_end.start(0, &s.guest, 1);
    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges[0].0, 3);
    s.vm_guard.result(protect.seq, 0, NO_INDEX);
    assert_eq!(s.guest.response(second).status, 0);
    assert_eq!(s.guest.response(wrong).status, EINVAL);
}

#[test]
fn a_ring_that_starts_again_waits_for_the_result_that_is_still_out() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    let before = s.vm_guard.protect();
    assert_eq!(s.front_end.stop(0), 0);
    s.front_end.start(0, &s.guest, 0);
    s.front_end.kick(0);
    s.front_end.config();
    s.vm_guard.assert_silent();
    s.vm_guard.succeed(&before);
    let again = s.vm_guard.protect();
    assert_ne!(again.seq, before.seq);
    assert_eq!(
        s.guest.try_used(0),
        None,
        "answered with the result of another request"
    );
    s.vm_guard.result(again.seq, 0, NO_INDEX);
    assert_eq!(s.guest.response(head).status, 0);
}

#[test]
fn many_stops_and_starts_lose_nothing() {
    let mut s = Setup::new();
    for round in 0..200u64 {
        let head = s.guest.lock(&[(4 * round, 4 * round, NOWRITE)]);
        s.front_end.kick(0);
        let base = s.front_end.stop(0);
        assert_eq!(base, round as u16);
        s.front_end.start(0, &s.guest, base);
        // Once or twice, depending on who was faster.
        loop {
            let protect = s.vm_guard.protect();
            assert_eq!(protect.ranges[0].0, 4 * round);
            s.vm_guard.in_force = round as u32 + 1;
            s.vm_guard.result(protect.seq, 0, NO_INDEX);
            let answered = wait_for("an answer or another PROTECT", || {
                if s.guest.used_idx(0) == (round + 1) as u16 {
                    return Some(true);
                }
                s.vm_guard.has_input().then_some(false)
            });
            if answered {
                break;
            }
        }
        assert_eq!(s.guest.response(head).status, 0);
    }
}

#[test]
fn a_device_reset_drops_what_is_under_way_and_keeps_what_is_in_force() {
    use vhost::vhost_user::VhostUserFrontend;

    let mut s = Setup::new();
    s.assert_works();
    s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.front_end.frontend.reset_device().unwrap();
    s.vm_guard.succeed(&protect);
    wait_for("the late RESULT", || {
        (s.front_end.config().ranges_in_force() == 2).then_some(())
    });
    assert_eq!(s.guest.used_idx(0), 1, "the driver that asked is gone");
    assert_eq!(s.front_end.config().deny_bits(), NOWRITE);
}

#[test]
fn a_ring_that_is_disabled_is_left_alone_until_it_is_enabled() {
    use vhost::vhost_user::VhostUserFrontend;

    let mut s = Setup::new();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.front_end.frontend.set_vring_enable(0, false).unwrap();
    s.vm_guard.succeed(&protect);
    wait_for("the RESULT", || {
        (s.front_end.config().ranges_in_force() == 1).then_some(())
    });
    assert_eq!(s.guest.used_idx(0), 0);
    s.front_end.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(s.guest.response(head).status, 0);
}

#[test]
fn an_avail_index_that_jumps_costs_one_log_line_and_can_be_mended() {
    let mut s = Setup::new();
    let ahead = s.guest.queues[0].avail + QUEUE_SIZE + 1;
    s.guest.write_avail_idx(0, ahead);
    s.front_end.kick(0);
    s.companion
        .wait_for_log("control queue is broken by the guest");
    let ticks = s.companion.ticks();
    for _ in 0..2000 {
        s.front_end.kick(0);
        s.front_end.config();
    }
    assert!(s.companion.ticks() - ticks < 400, "it spins");
    assert_eq!(s.companion.log_lines("broken"), 1, "{}", s.companion.log());
    assert_eq!(
        s.companion.log().lines().count(),
        s.companion.log_lines("vhost_guard")
    );
    s.guest.write_avail_idx(0, s.guest.queues[0].avail);
    s.assert_works();
}

#[test]
fn a_descriptor_that_the_queue_does_not_have_breaks_the_ring_until_mended() {
    let mut s = Setup::new();
    let avail = s.guest.avail_at(0);
    s.guest.publish(0, 9999);
    s.front_end.kick(0);
    s.companion.wait_for_log("names descriptor 9999");
    assert_eq!(s.guest.used_idx(0), 0);
    let bytes = lock_request(&[(1, 1, 0)]);
    let (at, response_at) = (s.guest.request_at(0), s.guest.response_at(0));
    s.guest.write_bytes(at, &bytes);
    s.guest.write_chain(
        0,
        0,
        &[(at, bytes.len() as u32, 0), (response_at, 16, WRITE)],
    );
    s.guest.write(avail + 4, 0u16);
    s.front_end.kick(0);
    assert_eq!(s.guest.used(0), Used { head: 0, len: 16 });
}

#[test]
fn a_broken_ring_is_in_order_after_it_was_started_anew() {
    let mut s = Setup::new();
    s.guest.write_avail_idx(0, 1000);
    s.front_end.kick(0);
    s.companion.wait_for_log("broken");
    assert_eq!(s.front_end.stop(0), 0);
    s.guest.write_avail_idx(0, 0);
    s.front_end.start(0, &s.guest, 0);
    s.assert_works();
}

#[test]
fn a_ring_outside_guest_memory_is_left_alone() {
    let mut s = Setup::new();
    s.front_end.stop(0);
    // The start of the used ring is in memory, its end is not.
    s.guest.queues[0].base = guest::RAM_SIZE - 0x2000 - 4;
    let base = s.guest.queues[0].base & !0xf;
    s.guest.queues[0].base = base;
    s.front_end.start(0, &s.guest, 0);
    s.front_end.kick(0);
    s.companion.wait_for_log("lies outside guest memory");
    s.companion.assert_runs();
    s.guest.queues[0].base = 0x10000;
    s.front_end.stop(0);
    s.front_end.start(0, &s.guest, 0);
    s.assert_works();
}

#[test]
fn chains_that_loop_are_given_back_as_often_as_they_are_made_available() {
    let mut s = Setup::new();
    let table = s.guest.descriptors_at(0);
    let at = s.guest.response_at(0);
    for i in 0..QUEUE_SIZE {
        s.guest
            .write_descriptor(table, i, (at, 16, WRITE | NEXT, (i + 1) % QUEUE_SIZE));
    }
    for head in 0..QUEUE_SIZE {
        s.guest.publish(0, head);
    }
    s.front_end.kick(0);
    for head in 0..QUEUE_SIZE {
        assert_eq!(s.guest.used(0), Used { head, len: 0 });
    }
    assert_eq!(s.front_end.config().malformed(), u64::from(QUEUE_SIZE));
}

#[test]
fn one_chain_made_available_over_and_over_is_answered_as_often() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    for _ in 1..QUEUE_SIZE {
        s.guest.publish(0, head);
    }
    s.front_end.kick(0);
    s.vm_guard.in_force = 1;
    for _ in 0..QUEUE_SIZE {
        let protect = s.vm_guard.protect();
        s.vm_guard.result(protect.seq, 0, NO_INDEX);
        assert_eq!(s.guest.used(0), Used { head, len: 16 });
    }
    s.vm_guard.assert_silent();
    s.assert_works();
}

#[test]
fn a_guest_that_never_stops_asking_does_not_keep_the_ring_from_stopping() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let mut s = Setup::new();
    // Every one of these is answered at once, so nothing but the turn's budget ends it.
    let bytes = lock_request(&[(1, 1, 0)]);
    let (at, response_at) = (s.guest.request_at(0), s.guest.response_at(0));
    s.guest.write_bytes(at, &bytes);
    s.guest.write_chain(
        0,
        0,
        &[(at, bytes.len() as u32, 0), (response_at, 16, WRITE)],
    );
    let stop = AtomicBool::new(false);
    let Setup {
        guest,
        front_end,
        companion,
        ..
    } = &mut s;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if guest.queues[0].avail.wrapping_sub(guest.used_idx(0)) < QUEUE_SIZE {
                    guest.publish(0, 0);
                }
            }
        });
        front_end.kick(0);
        for _ in 0..100 {
            front_end.config();
        }
        // Answered at all is what counts.
        front_end.stop(0);
        stop.store(true, Ordering::Relaxed);
    });
    companion.assert_runs();
}

#[test]
fn a_driver_that_kicks_only_when_it_is_asked_to_is_never_forgotten() {
    let mut s = Setup::new();
    let bytes = lock_request(&[(1, 1, 0)]);
    for round in 0..1000u16 {
        // The companion is busy finding out that there is nothing, just when something comes.
        s.front_end.kick(0);
        let old = s.guest.queues[0].avail;
        assert_eq!(old, round);
        let head = s.guest.request(&bytes);
        // Virtio 1.2, 2.7.10: kick if avail_event is what has just been passed.
        if s.guest.avail_event(0) == old {
            s.front_end.kick(0);
        }
        assert_eq!(s.guest.response(head).status, EINVAL);
    }
    assert_eq!(s.companion.log_lines("broken"), 0, "{}", s.companion.log());
}
