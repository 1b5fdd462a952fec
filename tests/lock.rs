// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a driver asks for and what it is answered: `docs/device.md`, requests.

mod common;

use common::front_end::F_NOWRITE;
use common::guest::{INDIRECT, NEXT, Used, WRITE, lock_request, request};
use common::*;

#[test]
fn a_lock_is_answered_after_the_vm_guard_has_enforced_it() {
    let mut s = Setup::new();
    let head = s
        .guest
        .lock(&[(0x100, 0x1ff, NOWRITE), (0x400, 0x400, NOWRITE)]);
    s.front_end.kick(0);

    let protect = s.vm_guard.protect();
    assert_eq!(protect.generation, 1);
    let locked = NOWRITE | IMMUTABLE;
    assert_eq!(
        protect.ranges,
        [(0x100, 0x1ff, locked), (0x400, 0x400, locked)]
    );
    assert_eq!(s.guest.try_used(0), None, "answered before it was enforced");

    s.vm_guard.succeed(&protect);
    let response = s.guest.response(head);
    assert_eq!(
        response,
        Response {
            status: 0,
            index: NO_INDEX,
            value: 1
        }
    );
    s.front_end.wait_for_interrupt(0);

    let config = s.front_end.config();
    assert_eq!(config.version(), 1);
    assert_eq!(config.page_size(), 4096);
    assert_eq!(config.deny_bits(), NOWRITE);
    assert_eq!(config.max_request_ranges(), 4096);
    assert_eq!(config.max_ranges(), 1000);
    assert_eq!(config.generation(), 1);
    assert_eq!(config.ranges_in_force(), 2);
    s.companion
        .wait_for_log("LOCK of 2 ranges is in force on 257 pages; 2 ranges in force");
}

/// One good entry.
const GOOD: (u64, u64, u64) = (0x100, 0x100, NOWRITE);

#[test]
fn each_wrong_request_gets_the_errno_and_index_of_the_specification() {
    let mut s = Setup::new();
    let with = |entry| lock_request(&[GOOD, entry, (1, 0, 0)]);
    let header = |kind, flags, count| request(kind, flags, count, &[]);
    let cases: Vec<(&str, Vec<u8>, u32, u32)> = vec![
        ("nothing readable", vec![], EINVAL, NO_INDEX),
        ("7 bytes", header(1, 0, 1)[..7].to_vec(), EINVAL, NO_INDEX),
        ("type 0", header(0, 0, 0), EOPNOTSUPP, NO_INDEX),
        ("type 5", header(5, 0, 1), EOPNOTSUPP, NO_INDEX),
        (
            "type before flags",
            header(0xffff, 1, !0),
            EOPNOTSUPP,
            NO_INDEX,
        ),
        ("flags", request(1, 1, 1, &[GOOD]), EINVAL, NO_INDEX),
        (
            "flags before count",
            header(1, 0x8000, !0),
            EINVAL,
            NO_INDEX,
        ),
        ("count 4097", header(1, 0, 4097), E2BIG, NO_INDEX),
        ("count all ones", header(1, 0, !0), E2BIG, NO_INDEX),
        ("count 0", header(1, 0, 0), EINVAL, NO_INDEX),
        (
            "count 0 with an entry",
            request(1, 0, 0, &[GOOD]),
            EINVAL,
            NO_INDEX,
        ),
        (
            "an entry missing",
            request(1, 0, 2, &[GOOD]),
            EINVAL,
            NO_INDEX,
        ),
        (
            "an entry too many",
            request(1, 0, 1, &[GOOD, GOOD]),
            EINVAL,
            NO_INDEX,
        ),
        (
            "a byte too many",
            [lock_request(&[GOOD]), vec![0]].concat(),
            EINVAL,
            NO_INDEX,
        ),
        (
            "a byte too few",
            lock_request(&[GOOD])[..31].to_vec(),
            EINVAL,
            NO_INDEX,
        ),
        (
            "start above 2^52 - 1",
            with((TOP + 1, TOP + 1, NOWRITE)),
            EINVAL,
            1,
        ),
        ("end above 2^52 - 1", with((0, !0, NOWRITE)), EINVAL, 1),
        ("start after end", with((5, 4, NOWRITE)), EINVAL, 1),
        ("no attributes", with((5, 5, 0)), EINVAL, 1),
        ("attribute bit 4", with((5, 5, 0x11)), EINVAL, 1),
        ("attribute bit 63", with((5, 5, IMMUTABLE | 1)), EINVAL, 1),
        ("NOEXEC", with((5, 5, 2)), EOPNOTSUPP, 1),
        ("NOREAD with NOWRITE", with((5, 5, 5)), EOPNOTSUPP, 1),
        ("NOEXEC_KERNEL", with((5, 5, 8)), EOPNOTSUPP, 1),
        (
            "the first of several",
            lock_request(&[(1, 0, 1), (0, 0, 0)]),
            EINVAL,
            0,
        ),
    ];
    for (name, bytes, status, index) in cases {
        let head = s.guest.request(&bytes);
        s.front_end.kick(0);
        assert_eq!(s.guest.response(head), refused(status, index), "{name}");
    }
    s.vm_guard.assert_silent();
    assert_eq!(s.front_end.config().malformed(), 0);
    s.assert_works();
}

#[test]
fn each_status_of_the_vm_guard_reaches_the_driver() {
    let mut s = Setup::new();
    let cases = [
        (EINVAL, 1, refused(EINVAL, 1)),
        (EBUSY, 0, refused(EBUSY, 0)),
        (EOPNOTSUPP, 1, refused(EOPNOTSUPP, 1)),
        (EPERM, 1, refused(EPERM, 1)),
        (ENOSPC, NO_INDEX, refused(ENOSPC, NO_INDEX)),
        (ESTALE, NO_INDEX, refused(ESTALE, NO_INDEX)),
        (EIO, NO_INDEX, refused(EIO, NO_INDEX)),
        // Not an errno that the specification has.
        (1234, NO_INDEX, refused(EIO, NO_INDEX)),
    ];
    for (status, index, expected) in cases {
        let head = s.guest.lock(&[GOOD, (0x200, 0x200, NOWRITE)]);
        s.front_end.kick(0);
        let protect = s.vm_guard.protect();
        s.vm_guard.result(protect.seq, status, index);
        assert_eq!(s.guest.response(head), expected);
        assert_eq!(
            s.front_end.config().ranges_in_force(),
            0,
            "a refused request changes nothing"
        );
    }
}

#[test]
fn a_deny_bit_that_was_not_negotiated_is_not_supported() {
    let companion = Companion::start();
    let mut guest = Guest::new();
    let mut vm_guard = VmGuard::connect(&companion);
    let front_end = FrontEnd::connect_with(&companion, &guest, !F_NOWRITE);
    assert_eq!(front_end.features & F_NOWRITE, F_NOWRITE, "it is offered");
    let head = guest.lock(&[GOOD]);
    front_end.kick(0);
    assert_eq!(guest.response(head), refused(EOPNOTSUPP, 0));
    vm_guard.assert_silent();
}

#[test]
fn what_the_vm_cannot_enforce_is_not_offered() {
    let companion = Companion::start();
    let guest = Guest::new();
    let mut vm_guard = VmGuard::connect_silently(&companion);
    vm_guard.send(vm_guard::HELLO, 0, &vm_guard::hello_payload(0, 1));
    vm_guard.send_states(0, 1, &[]);
    let mut front_end = FrontEnd::connect(&companion, &guest);
    assert_eq!(front_end.features & F_NOWRITE, 0);
    assert_eq!(front_end.config().deny_bits(), 0);
}

#[test]
fn without_a_vm_guard_nothing_is_offered_and_nothing_answered() {
    let companion = Companion::start();
    let mut guest = Guest::new();
    let mut front_end = FrontEnd::connect(&companion, &guest);
    assert_eq!(front_end.features & F_NOWRITE, 0);
    assert_eq!(front_end.config().deny_bits(), 0);
    let head = guest.lock(&[GOOD]);
    front_end.kick(0);
    front_end.config();
    assert_eq!(guest.try_used(0), None);
    let _vm_guard = VmGuard::connect(&companion);
    assert_eq!(guest.response(head), refused(EOPNOTSUPP, 0));
}

#[test]
fn nothing_is_written_before_it_is_known_what_is_locked() {
    let mut s = Setup::new();
    let head = s.guest.request(&request(9, 0, 0, &[]));
    let page = s.guest.response_at(head) >> 12;
    let event = s.guest.post_event_buffer(0, 64) >> 12;
    let Setup {
        companion,
        mut guest,
        ..
    } = s;
    // The other connection is there first, and so is half of this one.
    let companion = companion.kill_and_restart();
    let mut vm_guard = VmGuard::connect_silently(&companion);
    vm_guard.send(vm_guard::HELLO, 0, &vm_guard::hello_payload(NOWRITE, 1));
    let mut front_end = FrontEnd::connect(&companion, &guest);
    let violation = vm_guard::violation_payload(0, 0x1000, 1, 0);
    vm_guard.send(vm_guard::VIOLATION, 0, &violation);
    wait_for("the violation", || {
        (front_end.config().violations() == 1).then_some(())
    });
    front_end.kick(0);
    front_end.kick(1);
    front_end.config();
    assert_eq!((guest.used_idx(0), guest.used_idx(1)), (0, 0));
    let locked = NOWRITE | IMMUTABLE;
    vm_guard.send_states(0, 1, &[(event, event, locked), (page, page, locked)]);
    assert_eq!(guest.used(0), Used { head, len: 0 });
    assert_eq!(guest.used(1), Used { head: 0, len: 0 });
    let response = guest.read_response(guest.response_at(head));
    assert_eq!(response.status, 0xeeee_eeee);
}

#[test]
fn a_hello_that_comes_a_little_later_than_the_question_still_counts() {
    let companion = Companion::start();
    let mut vm_guard = VmGuard::connect_silently(&companion);
    std::thread::scope(|scope| {
        let front_end = scope.spawn(|| FrontEnd::negotiate(&companion, !0));
        companion.wait_for_log("front end connected");
        vm_guard.send(vm_guard::HELLO, 0, &vm_guard::hello_payload(NOWRITE, 1));
        assert_eq!(front_end.join().unwrap().features & F_NOWRITE, F_NOWRITE);
    });
}

#[test]
fn of_4096_entries_the_one_that_is_wrong_is_named() {
    // Every other page from 4 GiB on, where neither rings nor buffers are.
    let every_other = |i: u64| (0x10_0000 + 2 * i, 0x10_0000 + 2 * i, NOWRITE);
    let mut s = Setup::new();
    let mut seed = 12345u32;
    for _ in 0..20 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let bad = (seed >> 8) % 4096;
        let mut ranges: Vec<_> = (0..4096).map(every_other).collect();
        ranges[bad as usize].2 = 0x10;
        let head = s.guest.lock(&ranges);
        s.front_end.kick(0);
        assert_eq!(s.guest.response(head), refused(EINVAL, bad));
    }
    s.vm_guard.assert_silent();

    let ranges: Vec<_> = (0..4096).map(every_other).collect();
    let head = s.guest.lock(&ranges);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges.len(), 4096);
    assert_eq!(
        protect.ranges[4095],
        (0x10_1ffe, 0x10_1ffe, NOWRITE | IMMUTABLE)
    );
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(head).status, 0);
    assert_eq!(s.front_end.config().ranges_in_force(), 4096);
}

#[test]
fn nothing_is_written_into_a_page_that_is_locked() {
    let mut s = Setup::new();
    // The first request has head 0.
    let page = s.guest.response_at(0) >> 12;
    let head = s.guest.lock(&[(page, page, NOWRITE)]);
    assert_eq!(head, 0);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    // It was carried out, and there is nowhere to say so.
    assert_eq!(s.guest.used(0), Used { head, len: 0 });
    assert_eq!(
        s.guest.read_response(s.guest.response_at(head)).status,
        0xeeee_eeee
    );
    assert_eq!(s.front_end.config().malformed(), 1);
    assert_eq!(s.front_end.config().ranges_in_force(), 1);
}

#[test]
fn more_bytes_than_any_request_has_are_too_many_whatever_count_says() {
    let mut s = Setup::new();
    let size = 8 + 24 * 4096;
    for (kind, status) in [(1, E2BIG), (9, EOPNOTSUPP)] {
        let head = s.guest.next_head();
        let at = s.guest.request_at(head);
        s.guest.write_bytes(at, &request(kind, 0, 1, &[GOOD]));
        let response_at = s.guest.response_at(head);
        s.guest
            .write_chain(0, head, &[(at, size + 1, 0), (response_at, 16, WRITE)]);
        s.guest.publish(0, head);
        s.front_end.kick(0);
        assert_eq!(s.guest.response(head), refused(status, NO_INDEX));
    }
}

#[test]
fn responses_come_in_the_order_of_the_requests() {
    let mut s = Setup::new();
    let first = s.guest.lock(&[(0x10, 0x10, NOWRITE)]);
    let wrong = s.guest.lock(&[(0x10, 0x10, 0)]);
    let second = s.guest.lock(&[(0x20, 0x20, NOWRITE)]);
    let unknown = s.guest.request(&request(7, 0, 0, &[]));
    s.front_end.kick(0);

    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges[0].0, 0x10);
    s.front_end.config(); // The errors have been found by now, if anything.
    s.vm_guard.assert_silent();
    assert_eq!(s.guest.try_used(0), None, "an error overtook a request");
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(first).status, 0);
    assert_eq!(s.guest.response(wrong), refused(EINVAL, 0));

    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges[0].0, 0x20);
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(second).status, 0);
    assert_eq!(s.guest.response(unknown), refused(EOPNOTSUPP, NO_INDEX));
}

#[test]
fn how_a_request_is_cut_into_descriptors_does_not_matter() {
    let mut s = Setup::new();
    let head = 0;
    let (at, response_at) = (s.guest.request_at(0), s.guest.response_at(0));
    s.guest.write_bytes(at, &lock_request(&[GOOD]));
    let parts = [
        (at, 1, 0),
        (at + 1, 0, 0),
        (at + 1, 7, 0),
        (at + 8, 24, 0),
        (response_at, 3, WRITE),
        (response_at + 3, 0, WRITE),
        (response_at + 3, 13, WRITE),
        (response_at + 16, 1000, WRITE),
    ];
    s.guest.write_chain(0, head, &parts);
    s.guest.write_bytes(response_at, &[0xee; 32]);
    s.guest.publish(0, head);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(
        s.guest.response(head),
        Response {
            status: 0,
            index: NO_INDEX,
            value: 1
        }
    );
    assert_eq!(
        s.guest.read::<u64>(response_at + 16),
        0xeeee_eeee_eeee_eeee,
        "wrote too much"
    );
}

/// Puts an indirect table of `parts` at a place of its own, and makes it available.
fn publish_indirect(s: &mut Setup, head: u16, parts: &[(u64, u32, u16)]) {
    const TABLE: u64 = 0x10_0000;
    for (i, &(addr, len, flags)) in (0..).zip(parts) {
        let next = if usize::from(i) + 1 < parts.len() {
            NEXT
        } else {
            0
        };
        s.guest
            .write_descriptor(TABLE, i, (addr, len, flags | next, i + 1));
    }
    let queue_table = s.guest.descriptors_at(0);
    s.guest.write_descriptor(
        queue_table,
        head,
        (TABLE, 16 * parts.len() as u32, INDIRECT, 0),
    );
    s.guest.publish(0, head);
    s.front_end.kick(0);
}

#[test]
fn indirect_chains_are_followed_up_to_256_descriptors() {
    let mut s = Setup::new();
    let (at, response_at) = (s.guest.request_at(0), s.guest.response_at(0));
    let bytes = request(1, 0, 10, &[(1, 1, NOWRITE); 10]);
    assert_eq!(bytes.len(), 248);
    s.guest.write_bytes(at, &bytes);
    let byte_each = |n: u64| (0..n).map(|i| (at + i, 1, 0)).collect::<Vec<_>>();

    let mut parts = byte_each(247);
    parts.push((at + 247, 1, 0));
    parts.push((response_at, 16, WRITE));
    publish_indirect(&mut s, 2, &parts);
    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges.len(), 10);
    s.vm_guard.in_force = 1;
    s.vm_guard.result(protect.seq, 0, NO_INDEX);
    assert_eq!(s.guest.used(0), Used { head: 2, len: 16 });
    assert_eq!(s.guest.read_response(response_at).status, 0);

    // A request that would be right, but for how it is cut. The response is among what is too much.
    let bytes = request(1, 0, 11, &[(1, 1, NOWRITE); 11]);
    assert_eq!(bytes.len(), 272);
    s.guest.write_bytes(at, &bytes);
    let mut parts = byte_each(272);
    parts.push((response_at, 16, WRITE));
    publish_indirect(&mut s, 2, &parts);
    assert_eq!(s.guest.used(0), Used { head: 2, len: 16 });
    assert_eq!(
        s.guest.read_response(response_at),
        refused(EINVAL, NO_INDEX)
    );
    s.vm_guard.assert_silent();
}

#[test]
fn a_request_in_memory_that_the_guest_does_not_have_is_a_fault() {
    let mut s = Setup::new();
    let response_at = s.guest.response_at(0);
    for (at, len) in [
        (guest::RAM_SIZE, 32),
        (guest::RAM_SIZE - 16, 32),
        (!0 - 15, 32),
        (!0, 32),
    ] {
        s.guest
            .write_chain(0, 0, &[(at, len, 0), (response_at, 16, WRITE)]);
        s.guest.publish(0, 0);
        s.front_end.kick(0);
        assert_eq!(s.guest.used(0), Used { head: 0, len: 16 }, "{at:#x}");
        assert_eq!(
            s.guest.read_response(response_at),
            refused(EFAULT, NO_INDEX),
            "{at:#x}"
        );
    }
    // So is a writable descriptor behind what the answer needs.
    let at = s.guest.request_at(0);
    s.guest.write_bytes(at, &lock_request(&[GOOD]));
    let parts = [(at, 32, 0), (response_at, 16, WRITE), (1 << 40, 1, WRITE)];
    s.guest.write_chain(0, 0, &parts);
    s.guest.publish(0, 0);
    s.front_end.kick(0);
    assert_eq!(s.guest.used(0), Used { head: 0, len: 16 });
    assert_eq!(
        s.guest.read_response(response_at),
        refused(EFAULT, NO_INDEX)
    );
    s.vm_guard.assert_silent();
}

#[test]
fn a_chain_that_cannot_hold_a_response_is_given_back_empty_and_counted() {
    let mut s = Setup::new();
    let (at, response_at) = (s.guest.request_at(0), s.guest.response_at(0));
    s.guest.write_bytes(at, &lock_request(&[GOOD]));
    let table = s.guest.descriptors_at(0);
    let chains: [(&str, &[guest::Descriptor]); 8] = [
        ("no writable part", &[(at, 32, 0, 0)]),
        (
            "15 writable bytes",
            &[(at, 32, NEXT, 1), (response_at, 15, WRITE, 0)],
        ),
        (
            "outside memory",
            &[(at, 32, NEXT, 1), (guest::RAM_SIZE - 8, 16, WRITE, 0)],
        ),
        (
            "end of the address space",
            &[(at, 32, NEXT, 1), (!0 - 7, 16, WRITE, 0)],
        ),
        (
            "readable after writable",
            &[(response_at, 16, WRITE | NEXT, 1), (at, 32, 0, 0)],
        ),
        ("a loop", &[(response_at, 16, WRITE | NEXT, 0)]),
        (
            "a next that is not there",
            &[(response_at, 16, WRITE | NEXT, 999)],
        ),
        (
            "an indirect table outside memory",
            &[(1 << 40, 64, INDIRECT, 0)],
        ),
    ];
    for (count, (name, descriptors)) in (1..).zip(chains) {
        for (i, &descriptor) in (0..).zip(descriptors) {
            s.guest.write_descriptor(table, i, descriptor);
        }
        s.guest.publish(0, 0);
        s.front_end.kick(0);
        assert_eq!(s.guest.used(0), Used { head: 0, len: 0 }, "{name}");
        assert_eq!(s.front_end.config().malformed(), count, "{name}");
    }
    s.vm_guard.assert_silent();
    s.assert_works();
}

#[test]
fn a_guest_that_changes_its_request_afterwards_changes_nothing() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[GOOD]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    // The chain now names other memory for the response.
    let at = s.guest.request_at(head);
    s.guest.write_bytes(at, &lock_request(&[(0, TOP, NOWRITE)]));
    s.guest
        .write_chain(0, head, &[(at, 32, 0), (0x50000, 16, WRITE)]);
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(head).status, 0);
    assert_eq!(s.guest.read::<u64>(0x50000), 0);
}

#[test]
fn when_the_counts_differ_the_vm_guard_is_asked_what_is_in_force() {
    let mut s = Setup::new();
    let head = s.guest.lock(&[GOOD]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.in_force = 7;
    s.vm_guard.result(protect.seq, 0, NO_INDEX);
    assert_eq!(s.guest.response(head).status, 0);
    let seq = s.vm_guard.get_state();
    let locked = NOWRITE | IMMUTABLE;
    let state = [(1, 1, locked), (3, 9, locked), (0x100, 0x100, locked)];
    s.vm_guard.send_states(seq, 1, &state);
    wait_for("the new state", || {
        (s.front_end.config().ranges_in_force() == 3).then_some(())
    });
    s.vm_guard.assert_silent();
}
