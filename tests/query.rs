// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QUERY, and what lies in pages that may not be read.

mod common;

use std::net::Shutdown;

use common::guest::{
    INDIRECT, LOCK, PROTECT, SEAL, Used, WRITE, lock_request, query_request, request,
};
use common::vm_guard::{Range, hello_with};
use common::*;

#[test]
fn a_query_is_cut_to_its_range_and_to_the_room_there_is() {
    // Far from the guest's rings.
    let mut s = Setup::able();
    let (a, b, c) = ((110, 119, 1), (120, 129, 0x104), (140, 149, 8));
    s.carry_out(PROTECT, &[a, b, c], 3);
    assert_eq!(s.query(0, 109, 5), (0, vec![]));
    assert_eq!(s.query(130, 139, 5), (0, vec![]));
    assert_eq!(s.query(0, TOP, 5), (3, vec![a, b, c]));
    assert_eq!(s.query(0, TOP, 3), (3, vec![a, b, c]));
    assert_eq!(s.query(0, TOP, 2), (3, vec![a, b]));
    assert_eq!(s.query(0, TOP, 0), (3, vec![]));
    assert_eq!(s.query(115, 115, 5), (1, vec![(115, 115, 1)]));
    assert_eq!(
        s.query(119, 140, 5),
        (3, vec![(119, 119, 1), b, (140, 140, 8)])
    );
    // Room for a range and a bit is room for one; more bytes than are used stay as they are.
    for (room, told) in [(63, 1), (16 + 24 * 10, 3)] {
        let head = s.guest.request_with_room(&query_request(0, TOP), room);
        s.front_end.kick(0);
        let used = 16 + 24 * told;
        assert_eq!(s.guest.used(0), Used { head, len: used });
        let behind = s.guest.response_at(head) + u64::from(used);
        assert_eq!(s.guest.read::<u8>(behind), 0xee);
    }
    s.vm_guard.assert_silent();
}

#[test]
fn a_query_of_more_than_4096_ranges_tells_so_many_and_the_number_of_all() {
    const AT: u64 = 0x100_0000;
    let companion = Companion::start();
    let mut guest = Guest::new();
    let ranges: Vec<Range> = (0x8000..0x8000 + 5000)
        .map(|i| (2 * i, 2 * i, NOWRITE | IMMUTABLE))
        .collect();
    let _vm_guard = VmGuard::connect_with(&companion, 1, &ranges);
    let front_end = FrontEnd::connect(&companion, &guest);
    let at = guest.request_at(0);
    guest.write_bytes(at, &query_request(0x10001, TOP));
    // In two pieces that are cut in the middle of an entry.
    let parts = [(at, 32, 0), (AT, 100, WRITE), (AT + 100, 0x100_000, WRITE)];
    guest.write_chain(0, 0, &parts);
    guest.publish(0, 0);
    front_end.kick(0);
    assert_eq!(
        guest.used(0),
        Used {
            head: 0,
            len: 16 + 24 * 4096
        }
    );
    assert_eq!(guest.read_response(AT).value, 4999);
    for (i, range) in (0..4096u64).zip(&ranges[1..]) {
        let word = |n: u64| guest.read::<u64>(AT + 16 + 24 * i + 8 * n);
        assert_eq!((word(0), word(1), word(2)), *range);
    }
    assert_eq!(guest.read::<u64>(AT + 16 + 24 * 4096), 0);
}

#[test]
fn a_query_sees_what_the_requests_before_it_have_done_and_no_more() {
    let mut s = Setup::able();
    let ask = |s: &mut Setup| {
        s.guest
            .request_with_room(&query_request(0, TOP), 16 + 24 * 10)
    };
    let protect = |gfn| request(PROTECT, 0, 1, &[(gfn, gfn, NOWRITE)]);
    let before = ask(&mut s);
    let first = s.guest.request(&protect(1));
    let between = ask(&mut s);
    let seal = s.guest.request(&request(SEAL, 0, 0, &[]));
    let failing = s.guest.request(&protect(5));
    let loosening = s.guest.request(&request(PROTECT, 0, 1, &[(1, 1, 0)]));
    let last = ask(&mut s);
    s.front_end.kick(0);
    assert_eq!(s.guest.query_response(before), (0, vec![]));
    let seq = s.vm_guard.protect().seq;
    s.front_end.config();
    assert_eq!(s.guest.try_used(0), None, "a query overtook a request");
    s.vm_guard.done(seq, 1);
    assert_eq!(s.guest.response(first), OK);
    assert_eq!(s.guest.query_response(between), (1, vec![(1, 1, NOWRITE)]));
    let (seq, _) = s.vm_guard.seal();
    s.vm_guard.done(seq, 1);
    assert_eq!(s.guest.response(seal), OK);
    let seq = s.vm_guard.protect().seq;
    s.vm_guard.result(seq, ENOSPC, NO_INDEX);
    assert_eq!(s.guest.response(failing), refused(ENOSPC, NO_INDEX));
    // Held against the table as it is after the seal, not as it was when the request was taken.
    assert_eq!(s.guest.response(loosening), refused(EPERM, 0));
    let sealed = (1, 1, NOWRITE | IMMUTABLE);
    assert_eq!(s.guest.query_response(last), (1, vec![sealed]));
    s.vm_guard.assert_silent();
}

#[test]
fn while_the_table_is_in_doubt_nothing_is_held_against_it() {
    let mut s = Setup::able();
    let head = s.guest.lock(&[(1, 1, NOWRITE)]);
    let loosening = s.guest.request(&request(PROTECT, 0, 1, &[(7, 7, 0)]));
    let query = s.guest.request_with_room(&query_request(0, TOP), 64);
    s.front_end.kick(0);
    let seq = s.vm_guard.protect().seq;
    // One more than the companion knows of.
    s.vm_guard.done(seq, 2);
    assert_eq!(s.guest.response(head), OK);
    let seq = s.vm_guard.get_state();
    s.front_end.config();
    assert_eq!(s.guest.try_used(0), None);
    let held = [(1, 1, NOWRITE | IMMUTABLE), (7, 7, NOREAD | IMMUTABLE)];
    s.vm_guard.send_states(seq, 1, &held);
    assert_eq!(s.guest.response(loosening), refused(EPERM, 0));
    assert_eq!(s.guest.query_response(query), (2, held.to_vec()));
    s.vm_guard.assert_silent();

    // The same with a query as the first that waits.
    let head = s.guest.lock(&[(3, 3, NOWRITE)]);
    let query = s.guest.request_with_room(&query_request(0, TOP), 64);
    s.front_end.kick(0);
    let seq = s.vm_guard.protect().seq;
    s.vm_guard.done(seq, 2);
    assert_eq!(s.guest.response(head), OK);
    let seq = s.vm_guard.get_state();
    s.front_end.config();
    assert_eq!(s.guest.try_used(0), None);
    s.vm_guard.send_states(seq, 1, &held);
    assert_eq!(s.guest.query_response(query), (2, held.to_vec()));
}

#[test]
fn a_query_that_is_made_while_the_channel_is_down_waits_for_it() {
    let mut s = Setup::able();
    s.carry_out(PROTECT, &[(1, 1, NOWRITE)], 1);
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.companion.wait_for_log("VM disconnected");
    let query = s.guest.request_with_room(&query_request(0, TOP), 64);
    s.front_end.kick(0);
    wait_for("the query to be taken", || {
        (s.guest.avail_event(0) == 2).then_some(())
    });
    s.front_end.config();
    assert_eq!(s.guest.try_used(0), None, "answered with what may not hold");
    // Nobody knows why, but that is what QEMU says.
    let held = [(5, 9, NOEXEC)];
    s.vm_guard = VmGuard::connect_as(&s.companion, &hello_with(ALL, ALL, 1), &held);
    assert_eq!(s.guest.query_response(query), (1, held.to_vec()));
}

#[test]
fn nothing_is_read_from_a_page_that_may_not_be_read() {
    let mut s = Setup::able();
    let secret = s.guest.request_at(8) >> 12;
    let at = secret << 12;
    s.guest.write_bytes(at, &lock_request(&[(1, 1, NOWRITE)]));
    s.carry_out(PROTECT, &[(secret, secret, NOREAD)], 1);
    let response_at = s.guest.response_at(10);
    let fault = refused(EFAULT, NO_INDEX);
    // The request in it, its last byte, and none of it.
    let below = at - 31;
    s.guest
        .write_bytes(below, &lock_request(&[(1, 1, NOWRITE)])[..31]);
    for (start, len) in [(at, 32), (below, 32), (at + 0xfff, 8)] {
        s.guest
            .write_chain(0, 10, &[(start, len, 0), (response_at, 16, WRITE)]);
        s.guest.publish(0, 10);
        s.front_end.kick(0);
        assert_eq!(s.guest.used(0), Used { head: 10, len: 16 });
        assert_eq!(s.guest.read_response(response_at), fault, "{start:#x}");
    }
    s.vm_guard.assert_silent();
    // It may be written: a response can go there.
    let good = s.guest.request_at(10);
    s.guest.write_bytes(good, &query_request(5, 5));
    s.guest
        .write_chain(0, 10, &[(good, 32, 0), (at, 16, WRITE)]);
    s.guest.publish(0, 10);
    s.front_end.kick(0);
    assert_eq!(s.guest.used(0), Used { head: 10, len: 16 });

    // A chain whose indirect table is in it ends there.
    s.guest.write_bytes(good, &lock_request(&[(1, 1, NOWRITE)]));
    for (i, part) in [(good, 32, 1, 1), (response_at, 16, WRITE, 0)]
        .into_iter()
        .enumerate()
    {
        s.guest.write_descriptor(at, i as u16, part);
    }
    let queue_table = s.guest.descriptors_at(0);
    s.guest
        .write_descriptor(queue_table, 12, (at, 32, INDIRECT, 0));
    s.guest.publish(0, 12);
    s.front_end.kick(0);
    assert_eq!(s.guest.used(0), Used { head: 12, len: 0 });
    assert_eq!(s.front_end.config().malformed(), 1);
    s.vm_guard.assert_silent();

    // When it may be read again, all of this works.
    s.carry_out(PROTECT, &[(secret, secret, 0)], 0);
    s.guest.publish(0, 12);
    s.front_end.kick(0);
    let seq = s.vm_guard.protect().seq;
    s.vm_guard.done(seq, 1);
    assert_eq!(s.guest.used(0), Used { head: 12, len: 16 });
}

#[test]
fn a_ring_in_a_page_that_may_not_be_read_is_left_alone_until_that_is_over() {
    let places: [fn(&Guest) -> u64; 2] = [|g| g.descriptors_at(1), |g| g.avail_at(1)];
    for (case, place) in places.into_iter().enumerate() {
        let mut s = Setup::able();
        let page = place(&s.guest) >> 12;
        let at = s.guest.post_event_buffer(0, 64);
        s.carry_out(PROTECT, &[(page, page, NOREAD)], 1);
        let violation = vm_guard::violation_payload(3, 0x1000, 1, 0);
        s.vm_guard.send(vm_guard::VIOLATION, 0, &violation);
        s.companion
            .wait_for_log("events queue is broken by the guest: its descriptors or its avail ring");
        for _ in 0..100 {
            s.front_end.kick(1);
            s.front_end.config();
        }
        assert_eq!(s.guest.used_idx(1), 0, "{case}");
        assert_eq!(s.companion.log_lines("broken"), 1);
        // Nobody has to kick.
        s.carry_out(PROTECT, &[(page, page, 0)], 0);
        assert_eq!(s.guest.used(1), Used { head: 0, len: 64 });
        assert_eq!(s.guest.read::<u32>(at + 4), 3);
    }
}

#[test]
fn an_answer_to_a_query_never_goes_to_a_page_that_is_locked() {
    let mut s = Setup::able();
    let at = s.guest.request_at(8);
    let page = s.guest.response_at(8) >> 12;
    let locked = [(page + 1, page + 1, NOWRITE), (page + 3, page + 3, NOEXEC)];
    s.carry_out(LOCK, &locked, 2);
    s.guest.write_bytes(at, &query_request(0, TOP));
    // 40 bytes before the locked page: room for one range there, and for more behind.
    let locked_at = (page + 1) << 12;
    let response_at = locked_at - 40;
    // The length that is given back, and the first byte.
    let mut ask = |room: &[(u64, u32)]| {
        s.guest.write_bytes(response_at, &[0xee; 40]);
        let mut parts = vec![(at, 32, 0)];
        parts.extend(room.iter().map(|&(at, len)| (at, len, WRITE)));
        s.guest.write_chain(0, 8, &parts);
        s.guest.publish(0, 8);
        s.front_end.kick(0);
        let len = s.guest.used(0).len;
        (len, s.guest.read::<u8>(response_at))
    };
    assert_eq!(ask(&[(response_at, 40)]), (40, 0));
    // The two that there are do not fit before it, and the room goes on.
    assert_eq!(ask(&[(response_at, 64)]), (0, 0xee));
    assert_eq!(ask(&[(response_at, 4096)]), (0, 0xee));
    assert_eq!(ask(&[(response_at, 40), (locked_at, 24)]), (0, 0xee));
    // What is not used may be locked.
    assert_eq!(ask(&[(response_at, 63)]), (40, 0));
    assert_eq!(ask(&[(response_at, 40), (locked_at, 23)]), (40, 0));
    assert_eq!(s.front_end.config().malformed(), 3);
}
