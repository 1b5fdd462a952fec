// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control channel: what breaks it, and what survives that.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use common::guest::query_request;
use common::vm_guard::{
    HELLO, RESET, RESULT, STATE, VIOLATION, hello_payload, message, state_payload, states,
};
use common::*;

const LOCKED: u64 = NOWRITE | IMMUTABLE;

fn hello() -> Vec<u8> {
    message(HELLO, 0, &hello_payload(NOWRITE, 1))
}

fn patched(mut bytes: Vec<u8>, at: usize, patch: &[u8]) -> Vec<u8> {
    bytes[at..at + patch.len()].copy_from_slice(patch);
    bytes
}

#[test]
fn whatever_breaks_the_rules_closes_the_connection_with_one_line() {
    let range =
        |start, end, attributes| message(STATE, 0, &state_payload(1, &[(start, end, attributes)]));
    let greeted = [hello(), states(0, 1, &[])].concat();
    let after = |bytes: Vec<u8>| [hello(), bytes].concat();
    let after_state = |bytes: Vec<u8>| [greeted.clone(), bytes].concat();
    let violation = |access, action| {
        message(
            VIOLATION,
            0,
            &vm_guard::violation_with(access, action, 0, 0x1000, 1, 0),
        )
    };
    let header = |kind: u16, length: u32| patched(message(kind, 0, &[]), 4, &length.to_le_bytes());
    let cases: Vec<(&str, Vec<u8>)> = vec![
        (
            "first message was not HELLO",
            message(STATE, 0, &state_payload(1, &[])),
        ),
        ("first message was not HELLO", message(RESET, 0, &[0; 8])),
        ("second HELLO", after(hello())),
        ("magic", patched(hello(), 16, b"X")),
        (
            "HELLO of version 2; this is version 3",
            patched(hello(), 20, &[2]),
        ),
        ("HELLO of version 4", patched(hello(), 20, &[4])),
        ("msr_default is 0x2", patched(hello(), 84, &[2, 0, 0, 0])),
        ("policy is 0x0", patched(hello(), 60, &[0])),
        ("policy is 0x5", patched(hello(), 60, &[5])),
        ("accel is 0x3", patched(hello(), 24, &[3])),
        ("page_shift is 0xe", patched(hello(), 28, &[14])),
        ("max_request_ranges is 0x0", patched(hello(), 52, &[0, 0])),
        ("unknown type 0x0", message(0, 0, &[])),
        ("unknown type 0x102", after(message(0x102, 0, &[]))),
        ("unknown type 0x104", after(message(0x104, 0, &[0; 16]))),
        ("flags 0x100", patched(hello(), 2, &[0, 1])),
        ("type 0x1 with 71 bytes", header(HELLO, 71)),
        ("type 0x1 with 73 bytes", header(HELLO, 73)),
        (
            "type 0x2 with 1048577 bytes",
            after(header(STATE, (1 << 20) + 1)),
        ),
        ("type 0x2 with 4294967295 bytes", after(header(STATE, !0))),
        ("type 0x2 with 15 bytes", after(header(STATE, 15))),
        ("type 0x2 with 41 bytes", after(header(STATE, 41))),
        ("type 0x3 with 0 bytes", after(header(RESULT, 0))),
        ("type 0x4 with 65 bytes", after(header(VIOLATION, 65))),
        ("type 0x5 with 4 bytes", after(header(RESET, 4))),
        ("count in STATE", after(patched(range(1, 1, 1), 24, &[2]))),
        ("range 0 in STATE: range starts", after(range(2, 1, LOCKED))),
        (
            "range 0 in STATE: frame number",
            after(range(0, 1 << 52, LOCKED)),
        ),
        ("attributes of range 0", after(range(0, 1, 1 << 40))),
        ("attributes of range 0", after(range(0, 1, 0x1001))),
        (
            "range 0 in STATE has attributes 0x0, as no page has",
            after(range(0, 1, 0)),
        ),
        (
            "has attributes 0x8000000000000000",
            after(range(0, 1, IMMUTABLE)),
        ),
        ("has attributes 0x101", after(range(0, 1, 0x101))),
        (
            "range 1 in STATE does not lie above",
            after(message(
                STATE,
                0,
                &state_payload(1, &[(5, 6, LOCKED), (6, 7, LOCKED)]),
            )),
        ),
        ("STATE with seq 9", after(states(9, 1, &[]))),
        ("STATE with seq 0", after_state(states(0, 1, &[]))),
        (
            "RESULT with seq 1",
            after_state(message(RESULT, 1, &[0; 24])),
        ),
        (
            "type of VIOLATION is 0x3",
            after(message(VIOLATION, 0, &patched(vec![0; 64], 0, &[3]))),
        ),
        (
            "access of VIOLATION is 0x2",
            after(patched(violation(2, 1), 16, &[2])),
        ),
        (
            "MSR of VIOLATION is 0x100000000",
            after(patched(
                violation(1, 1),
                16,
                &[2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            )),
        ),
        ("access of VIOLATION is 0x0", after(violation(0, 1))),
        ("access of VIOLATION is 0x4", after(violation(4, 1))),
        ("action of VIOLATION is 0x0", after(violation(1, 0))),
        ("action of VIOLATION is 0x6", after(violation(3, 6))),
    ];
    for (reason, bytes) in cases {
        // One companion for each, because the log is rate-limited.
        let companion = Companion::start();
        let mut vm_guard = VmGuard::connect_silently(&companion);
        vm_guard.stream.write_all(&bytes).unwrap();
        vm_guard.assert_closed();
        companion.wait_for_log("control channel closed");
        assert_eq!(
            companion.log_lines("WARN"),
            1,
            "{reason}: {}",
            companion.log()
        );
        assert_eq!(
            companion.log_lines(reason),
            1,
            "{reason}: {}",
            companion.log()
        );
        VmGuard::connect(&companion);
    }
}

#[test]
fn a_flood_of_broken_connections_does_not_flood_the_log() {
    let mut s = Setup::new();
    drop(s.vm_guard);
    for _ in 0..500 {
        let mut vm_guard = VmGuard::connect_silently(&s.companion);
        vm_guard.send(99, 0, &[]);
        vm_guard.assert_closed();
    }
    assert!(
        s.companion.log_lines("unknown type") < 200,
        "{}",
        s.companion.log()
    );
    s.vm_guard = VmGuard::connect_silently(&s.companion);
    s.vm_guard.send(HELLO, 0, &hello_payload(NOWRITE, 1));
    s.vm_guard.send_states(0, 1, &[]);
    s.assert_works();
}

#[test]
fn a_second_connection_is_closed_and_the_first_goes_on() {
    let mut s = Setup::new();
    for _ in 0..50 {
        let second = VmGuard::on(s.companion.connect_control());
        second.assert_closed();
    }
    let lines = s.companion.log_lines("closed a second connection");
    assert!((1..20).contains(&lines), "{}", s.companion.log());
    s.assert_works();
}

#[test]
fn a_message_that_comes_byte_by_byte_delays_nobody() {
    let companion = Companion::start();
    let guest = Guest::new();
    let mut vm_guard = VmGuard::connect_silently(&companion);
    let mut front_end = FrontEnd::connect(&companion, &guest);
    let bytes = [hello(), states(0, 1, &[(1, 1, LOCKED)])].concat();
    for byte in bytes {
        vm_guard.stream.write_all(&[byte]).unwrap();
        front_end.config();
        // Somebody else who tries is still told.
        VmGuard::on(companion.connect_control()).assert_closed();
    }
    wait_for("STATE", || {
        (front_end.config().ranges_in_force() == 1).then_some(())
    });
}

#[test]
fn many_messages_in_one_write_are_all_taken() {
    let companion = Companion::start();
    let guest = Guest::new();
    let mut vm_guard = VmGuard::connect_silently(&companion);
    let mut bytes = [hello(), states(0, 1, &[])].concat();
    for _ in 0..3000 {
        bytes.extend(message(
            VIOLATION,
            0,
            &vm_guard::violation_payload(0, 0x1000, 1, 0),
        ));
    }
    vm_guard.stream.write_all(&bytes).unwrap();
    let mut front_end = FrontEnd::connect(&companion, &guest);
    wait_for("3000 violations", || {
        (front_end.config().violations() == 3000).then_some(())
    });
}

#[test]
fn the_largest_state_is_taken() {
    let companion = Companion::start();
    let guest = Guest::new();
    let count = ((1 << 20) - 16) / 24;
    let ranges: Vec<_> = (0..count).map(|i| (2 * i, 2 * i, LOCKED)).collect();
    let _vm_guard = VmGuard::connect_with(&companion, 1, &ranges);
    let mut front_end = FrontEnd::connect(&companion, &guest);
    assert_eq!(front_end.config().ranges_in_force(), count);
}

#[test]
fn a_request_under_way_when_the_channel_drops_is_sent_again() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    let before = s.vm_guard.protect();
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.vm_guard = VmGuard::connect_with(&s.companion, 1, &[(1, 1, LOCKED)]);
    let again = s.vm_guard.protect();
    assert_eq!(again.ranges, before.ranges);
    assert_eq!(s.guest.try_used(0), None);
    s.vm_guard.result(again.seq, 0, NO_INDEX);
    assert_eq!(s.guest.response(head).status, 0);
    s.vm_guard.assert_silent();
}

#[test]
fn a_result_with_another_seq_than_that_under_way_closes_the_connection() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.result(protect.seq + 1, 0, NO_INDEX);
    s.companion.wait_for_log("RESULT with seq");
    s.vm_guard.assert_closed();
    assert_eq!(
        s.guest.try_used(0),
        None,
        "answered with somebody else's result"
    );
    s.vm_guard = VmGuard::connect(&s.companion);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(head).status, 0);
}

#[test]
fn requests_made_while_the_channel_is_down_wait_for_it() {
    let mut s = Setup::new();
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.companion.wait_for_log("VM disconnected");
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    assert_eq!(
        s.front_end.config().deny_bits(),
        NOWRITE,
        "still the same VM"
    );
    s.vm_guard = VmGuard::connect(&s.companion);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(head).status, 0);
}

#[test]
fn nothing_is_sent_before_state() {
    let mut s = Setup::new();
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.companion.wait_for_log("VM disconnected");
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    s.vm_guard = VmGuard::connect_silently(&s.companion);
    s.vm_guard.send(HELLO, 0, &hello_payload(3, 1));
    wait_for("HELLO", || {
        (s.front_end.config().deny_bits() == 3).then_some(())
    });
    // Another request, so that the queue is looked at: avail_event tells when that is done.
    s.guest.lock(&[(3, 3, NOWRITE)]);
    s.front_end.kick(0);
    wait_for("both requests to be taken", || {
        (s.guest.avail_event(0) == 2).then_some(())
    });
    s.front_end.config();
    s.vm_guard.assert_silent();
    s.vm_guard.send_states(0, 1, &[]);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(head).status, 0);
}

#[test]
fn a_reset_answers_estale_to_all_that_wait_and_clears_the_table() {
    let mut s = Setup::new();
    s.assert_works();
    let heads = [1, 3, 5].map(|gfn| s.guest.lock(&[(gfn, gfn, NOWRITE)]));
    s.front_end.kick(0);
    let stale = s.vm_guard.protect();
    s.vm_guard
        .send(VIOLATION, 0, &vm_guard::violation_payload(0, 0x1000, 1, 0));
    s.vm_guard.reset();
    for head in heads {
        let response = s.guest.response(head);
        assert_eq!(
            response,
            Response {
                status: ESTALE,
                index: NO_INDEX,
                value: 0
            }
        );
    }
    let config = s.front_end.config();
    assert_eq!((config.generation(), config.ranges_in_force()), (2, 0));
    assert_eq!(config.violations(), 1, "what was counted stays counted");

    // The answer to the stale request still comes, and is nobody's.
    s.vm_guard.result(stale.seq, ESTALE, NO_INDEX);
    s.start_anew(0);
    s.assert_works();
    assert_eq!(s.front_end.config().ranges_in_force(), 1);
    // The event that waited was of the life before.
    s.guest.post_event_buffer(0, 64);
    s.front_end.kick(1);
    s.vm_guard
        .send(VIOLATION, 0, &vm_guard::violation_payload(7, 0x9000, 1, 0));
    s.guest.used(1);
    assert_eq!(s.guest.read::<u32>(0x30004), 7);
}

#[test]
fn what_is_in_a_ring_when_the_vm_is_reset_is_of_the_life_before() {
    let mut s = Setup::walks();
    s.assert_works();
    // The guest had no time left to tell of it.
    let head = s.guest.lock(&[(7, 7, NOWRITE)]);
    s.vm_guard.reset();
    assert_eq!(s.guest.response(head), refused(ESTALE, NO_INDEX));
    // Nor does it help to tell of it late: QEMU is about to stop the queues.
    let order = s.guest.lock(&[(9, 9, NOWRITE)]);
    let query = s.guest.request(&query_request(0, TOP));
    s.front_end.kick(0);
    for head in [order, query] {
        assert_eq!(s.guest.response(head), refused(ESTALE, NO_INDEX));
    }
    let walk = s.ask_walk(&kernel::KernelRequest::new(&[(0, 0, NOWRITE)]), 0);
    assert_eq!(walk, kernel::Answer::nothing_but(ESTALE, NO_INDEX));
    s.vm_guard.assert_silent();
    assert_eq!(s.front_end.config().ranges_in_force(), 0);
    s.start_anew(0);
    s.assert_works();
}

#[test]
fn a_reset_while_the_channel_was_down_is_noticed_from_the_generation() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    s.vm_guard.protect();
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.vm_guard = VmGuard::connect_with(&s.companion, 5, &[]);
    assert_eq!(s.guest.response(head).status, ESTALE);
    assert_eq!(s.front_end.config().generation(), 5);
    s.assert_works();
}

#[test]
fn another_vm_finds_nothing_of_the_one_before() {
    let mut s = Setup::new();
    s.assert_works();
    s.vm_guard
        .send(VIOLATION, 0, &vm_guard::violation_payload(0, 0x1000, 3, 2));
    wait_for("three violations told and two lost", || {
        (s.front_end.config().violations() == 5).then_some(())
    });
    let Setup {
        companion,
        front_end,
        vm_guard,
        guest,
    } = s;
    drop((front_end, vm_guard, guest));
    companion.wait_for_log("VM disconnected");
    companion.wait_for_log("front end disconnected");

    let mut guest = Guest::new();
    let mut vm_guard = VmGuard::connect(&companion);
    let mut front_end = FrontEnd::connect(&companion, &guest);
    let config = front_end.config();
    assert_eq!(
        (
            config.violations(),
            config.events_lost(),
            config.ranges_in_force()
        ),
        (0, 0, 0)
    );
    guest.post_event_buffer(0, 64);
    front_end.kick(1);
    vm_guard.send(VIOLATION, 0, &vm_guard::violation_payload(5, 0x2000, 1, 0));
    guest.used(1);
    assert_eq!(guest.read::<u32>(0x30004), 5, "an event of the VM before");
}

#[test]
fn a_peer_that_does_not_read_costs_nothing_but_its_own_answers() {
    let mut s = Setup::new();
    for i in 0..20 {
        s.guest.lock(&[(i, i, NOWRITE)]);
    }
    s.front_end.kick(0);
    for _ in 0..100 {
        s.front_end.config();
    }
    // One PROTECT is out, no more.
    let first = s.vm_guard.protect();
    s.vm_guard.assert_silent();
    s.vm_guard.succeed(&first);
    s.vm_guard.protect();
}

#[test]
fn the_sockets_are_for_their_owner_only() {
    let companion = Companion::start();
    for path in [companion.socket_path(), companion.control_path()] {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        UnixStream::connect(path).unwrap();
    }
}

#[test]
fn a_reset_that_was_told_before_the_ring_ran_is_heard_before_its_requests() {
    let mut s = Setup::new();
    // The thread that hears of the reset has much else to hear of first.
    let violations: Vec<u8> = (0..2000)
        .flat_map(|i| {
            let violation = vm_guard::violation_payload(0, i << 12, 1, 0);
            message(VIOLATION, 0, &violation)
        })
        .collect();
    for round in 0..20 {
        let base = s.front_end.stop(0);
        s.vm_guard.stream.write_all(&violations).unwrap();
        s.vm_guard.reset();
        let head = s.guest.lock(&[(1, 1, NOWRITE)]);
        s.front_end.start(0, &s.guest, base);
        s.front_end.kick(0);
        let protect = s.vm_guard.protect();
        assert_eq!(protect.generation, s.vm_guard.generation, "round {round}");
        s.vm_guard.succeed(&protect);
        assert_eq!(s.guest.response(head).status, 0, "round {round}");
    }
}
