// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PROTECT, SEAL and QUERY, what is watched, and what lies in pages that may not be read.

mod common;

use std::net::Shutdown;

use common::front_end::{F_ALL, F_AUDIT, F_NOWRITE};
use common::guest::{LOCK, PROTECT, QUERY, SEAL, query_request, request};
use common::vm_guard::{Range, hello_with};
use common::*;

#[test]
fn each_wrong_request_gets_the_errno_and_index_of_the_specification() {
    // Watches stores, and denies stores and loads.
    let mut s = Setup::on(
        Companion::start(),
        &hello_with(NOWRITE | NOREAD, NOWRITE, 1),
    );
    s.carry_out(LOCK, &[(0x8010, 0x801f, NOWRITE)], 1);
    let good = (0x100, 0x100, NOWRITE);
    let of = |kind, entries: &[Range]| request(kind, 0, entries.len() as u32, entries);
    let second = |kind, entry| of(kind, &[good, entry, (1, 0, 0)]);
    let many = |kind| request(kind, 0, 4097, &[]);
    let none = NO_INDEX;
    let cases: Vec<(&str, Vec<u8>, u32, u32)> = vec![
        (
            "PROTECT, flags",
            request(PROTECT, 1, 1, &[good]),
            EINVAL,
            none,
        ),
        ("SEAL, flags", request(SEAL, 0x80, 0, &[]), EINVAL, none),
        (
            "QUERY, flags",
            request(QUERY, 1, 1, &[(1, 1, 0)]),
            EINVAL,
            none,
        ),
        (
            "flags before count",
            request(SEAL, 1, !0, &[]),
            EINVAL,
            none,
        ),
        ("PROTECT, 4097 entries", many(PROTECT), E2BIG, none),
        ("SEAL, 4097 entries", many(SEAL), E2BIG, none),
        ("QUERY, 4097 entries", many(QUERY), E2BIG, none),
        ("PROTECT, no entry", of(PROTECT, &[]), EINVAL, none),
        ("SEAL, an entry", of(SEAL, &[good]), EINVAL, none),
        (
            "SEAL, a byte too many",
            [of(SEAL, &[]), vec![0]].concat(),
            EINVAL,
            none,
        ),
        ("QUERY, no entry", of(QUERY, &[]), EINVAL, none),
        (
            "QUERY, two entries",
            of(QUERY, &[(1, 1, 0); 2]),
            EINVAL,
            none,
        ),
        (
            "PROTECT, an entry missing",
            request(PROTECT, 0, 2, &[good]),
            EINVAL,
            none,
        ),
        (
            "frame too high",
            second(PROTECT, (TOP + 1, TOP + 1, 1)),
            EINVAL,
            1,
        ),
        ("start after end", second(PROTECT, (5, 4, 1)), EINVAL, 1),
        ("QUERY, start after end", of(QUERY, &[(5, 4, 0)]), EINVAL, 0),
        ("QUERY, frame too high", of(QUERY, &[(0, !0, 0)]), EINVAL, 0),
        ("bit 4", second(PROTECT, (5, 5, 0x11)), EINVAL, 1),
        ("bit 7", second(PROTECT, (5, 5, 0x80)), EINVAL, 1),
        ("bit 12", second(LOCK, (5, 5, 0x1001)), EINVAL, 1),
        ("bit 62", second(PROTECT, (5, 5, 1 << 62)), EINVAL, 1),
        (
            "IMMUTABLE is not asked for",
            second(PROTECT, (5, 5, IMMUTABLE | 1)),
            EINVAL,
            1,
        ),
        ("LOCK, no attributes", second(LOCK, (5, 5, 0)), EINVAL, 1),
        ("QUERY, attributes", of(QUERY, &[(5, 5, 1)]), EINVAL, 0),
        (
            "not enforced",
            second(PROTECT, (5, 5, NOEXEC)),
            EOPNOTSUPP,
            1,
        ),
        (
            "not watched",
            second(LOCK, (5, 5, NOREAD << 8)),
            EOPNOTSUPP,
            1,
        ),
        (
            "not watched, though denied as well",
            second(PROTECT, (5, 5, NOREAD | NOREAD << 8)),
            EOPNOTSUPP,
            1,
        ),
        (
            "numbers before rights in one entry",
            second(PROTECT, (5, 4, NOEXEC)),
            EINVAL,
            1,
        ),
        (
            "entry by entry: rights of the first before numbers of the second",
            of(PROTECT, &[(5, 5, NOEXEC), (5, 4, 1)]),
            EOPNOTSUPP,
            0,
        ),
        (
            "numbers of any entry before EPERM of the first",
            of(PROTECT, &[(0x8010, 0x8010, 0), (5, 5, NOEXEC)]),
            EOPNOTSUPP,
            1,
        ),
        (
            "loosened",
            of(PROTECT, &[good, (0x801f, 0x8030, 0)]),
            EPERM,
            1,
        ),
        (
            "watched instead of denied",
            of(PROTECT, &[(0x8010, 0x8010, AUDIT_NOWRITE)]),
            EPERM,
            0,
        ),
        (
            "another right instead",
            of(PROTECT, &[(0x8010, 0x8010, NOREAD)]),
            EPERM,
            0,
        ),
        (
            "the first of several that loosen",
            of(
                PROTECT,
                &[
                    (0x8012, 0x8012, 1),
                    (0x801f, 0x801f, 0),
                    (0x8011, 0x8011, 0),
                ],
            ),
            EPERM,
            1,
        ),
        (
            "the last entry on a page counts",
            of(PROTECT, &[(0x8010, 0x801f, 0), (0x8010, 0x801e, 1)]),
            EPERM,
            0,
        ),
    ];
    for (name, bytes, status, index) in cases {
        assert_eq!(s.ask(&bytes), refused(status, index), "{name}");
    }
    s.vm_guard.assert_silent();
    assert_eq!(s.front_end.config().malformed(), 0);
    assert_eq!(s.holds(), [(0x8010, 0x801f, NOWRITE | IMMUTABLE)]);
}

#[test]
fn what_was_not_negotiated_cannot_be_asked_for_and_all_that_is_there_is_offered() {
    for (deny, audit, offered) in [(ALL, ALL, F_ALL), (1, 1, 0x11), (1, 0, 1), (0, 1, 0x10)] {
        let mut s = Setup::on(Companion::start(), &hello_with(deny, audit, 1));
        assert_eq!(s.front_end.features & F_ALL, offered);
        let config = s.front_end.config();
        assert_eq!((config.deny_bits(), config.audit_bits()), (deny, audit));
    }
    let companion = Companion::start();
    let mut guest = Guest::new();
    let mut vm_guard = VmGuard::connect_as(&companion, &hello_with(ALL, ALL, 1), &[]);
    let wanted = !(F_AUDIT | 1 << 2);
    let front_end = FrontEnd::connect_with(&companion, &guest, wanted);
    for bits in [AUDIT_NOWRITE, NOREAD, NOWRITE | NOEXEC << 8] {
        let head = guest.lock(&[(1, 1, F_NOWRITE), (2, 2, bits)]);
        front_end.kick(0);
        assert_eq!(guest.response(head), refused(EOPNOTSUPP, 1));
    }
    let head = guest.lock(&[(1, 1, NOWRITE | NOEXEC | NOEXEC_KERNEL)]);
    front_end.kick(0);
    let seq = vm_guard.protect().seq;
    vm_guard.done(seq, 1);
    assert_eq!(guest.response(head), OK);
}

#[test]
fn each_kind_of_order_reaches_the_vm_guard_as_its_own_and_in_the_guests_order() {
    let mut s = Setup::able();
    let entries = [(9, 9, 0x102), (3, 5, 0), (3, 3, 0xf0f), (2, 2, 4)];
    let head = s.guest.request(&request(PROTECT, 0, 4, &entries));
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    let sent = [(9, 9, 0x102), (3, 5, 0), (3, 3, 0xf), (2, 2, 4)];
    assert_eq!(protect.ranges, sent);
    assert_eq!(s.guest.try_used(0), None, "answered before it was enforced");
    s.vm_guard.done(protect.seq, 3);
    assert_eq!(s.guest.response(head), OK);
    assert_eq!(s.holds(), [(2, 2, 4), (3, 3, 0xf), (9, 9, 0x102)]);

    let head = s.guest.lock(&[(3, 4, 0x100), (9, 9, 2)]);
    s.front_end.kick(0);
    let lock = s.vm_guard.protect();
    let locked = [(3, 4, 0x100 | IMMUTABLE), (9, 9, 2 | IMMUTABLE)];
    assert_eq!(lock.ranges, locked);
    s.vm_guard.done(lock.seq, 4);
    assert_eq!(s.guest.response(head), OK);
    let in_force = [
        (2, 2, 4),
        (3, 3, 0xf | IMMUTABLE),
        (4, 4, 0x100 | IMMUTABLE),
        (9, 9, 0x102 | IMMUTABLE),
    ];
    assert_eq!(s.holds(), in_force);

    let head = s.guest.request(&request(SEAL, 0, 0, &[]));
    s.front_end.kick(0);
    let (seq, generation) = s.vm_guard.seal();
    assert_eq!(generation, 1);
    assert_eq!(s.guest.try_used(0), None, "answered before it was sealed");
    s.vm_guard.done(seq, 4);
    assert_eq!(s.guest.response(head), OK);
    let sealed = in_force.map(|(start, end, bits)| (start, end, bits | IMMUTABLE));
    assert_eq!(s.holds(), sealed);
    assert_eq!(s.protect(&[(2, 2, 0)]), refused(EPERM, 0));
    s.companion
        .wait_for_log("SEAL is in force on 1 pages; 4 ranges in force");
    s.companion
        .wait_for_log("PROTECT of 1 ranges refused: entry 0 would loosen an immutable page");
}

#[test]
fn mutable_pages_can_be_loosened_and_freed_and_immutable_ones_can_grow() {
    let mut s = Setup::able();
    s.carry_out(PROTECT, &[(0, 9, NOWRITE | NOEXEC)], 1);
    s.carry_out(PROTECT, &[(0, 4, NOWRITE)], 2);
    s.carry_out(PROTECT, &[(4, 5, 0)], 2);
    assert_eq!(s.holds(), [(0, 3, NOWRITE), (6, 9, NOWRITE | NOEXEC)]);
    s.carry_out(SEAL, &[], 2);
    // Pages that get attributes after the seal are mutable again.
    s.carry_out(PROTECT, &[(0, 5, NOWRITE | NOREAD)], 3);
    s.carry_out(PROTECT, &[(4, 5, 0)], 2);
    let expected = [
        (0, 3, NOWRITE | NOREAD | IMMUTABLE),
        (6, 9, NOWRITE | NOEXEC | IMMUTABLE),
    ];
    assert_eq!(s.holds(), expected);
    // From watched to denied is growth.
    s.carry_out(LOCK, &[(20, 20, AUDIT_NOWRITE)], 3);
    s.carry_out(PROTECT, &[(20, 20, NOWRITE)], 3);
    assert_eq!(s.protect(&[(20, 20, AUDIT_NOWRITE)]), refused(EPERM, 0));
    // What the vm-guard refuses changes nothing here either.
    let head = s.guest.request(&request(PROTECT, 0, 1, &[(30, 30, 1)]));
    s.front_end.kick(0);
    let seq = s.vm_guard.protect().seq;
    s.vm_guard.result(seq, EBUSY, 0);
    assert_eq!(s.guest.response(head), refused(EBUSY, 0));
    assert_eq!(s.holds().len(), 3);
    s.vm_guard.assert_silent();
}

#[test]
fn requests_under_way_when_the_channel_drops_are_sent_again() {
    let mut s = Setup::able();
    s.guest.request(&request(PROTECT, 0, 1, &[(1, 1, NOWRITE)]));
    s.guest.request(&request(SEAL, 0, 0, &[]));
    let query = s.guest.request_with_room(&query_request(0, TOP), 64);
    s.front_end.kick(0);
    let hello = hello_with(ALL, ALL, 1);
    let before = s.vm_guard.protect();
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    // It had been carried out.
    s.vm_guard = VmGuard::connect_as(&s.companion, &hello, &[(1, 1, NOWRITE)]);
    let again = s.vm_guard.protect();
    assert_eq!(again.ranges, before.ranges);
    s.vm_guard.done(again.seq, 1);
    assert_eq!(s.guest.used(0).len, 16);

    let (seq, _) = s.vm_guard.seal();
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    let sealed = [(1, 1, NOWRITE | IMMUTABLE)];
    s.vm_guard = VmGuard::connect_as(&s.companion, &hello, &sealed);
    let (again, generation) = s.vm_guard.seal();
    assert_eq!(generation, 1);
    assert_ne!(again, seq);
    assert_eq!(s.guest.try_used(0), None, "answered without a RESULT");
    s.vm_guard.done(again, 1);
    assert_eq!(s.guest.used(0).len, 16);
    assert_eq!(s.guest.query_response(query), (1, sealed.to_vec()));
    s.vm_guard.assert_silent();
}

#[test]
fn a_companion_that_is_killed_with_a_protect_and_a_seal_under_way_loses_neither() {
    let mut s = Setup::able();
    let first = s
        .guest
        .request(&request(PROTECT, 0, 2, &[(1, 9, 3), (1, 4, 1)]));
    let seal = s.guest.request(&request(SEAL, 0, 0, &[]));
    let query = s.guest.request_with_room(&query_request(0, TOP), 100);
    s.front_end.kick(0);
    s.vm_guard.protect();
    let Setup {
        companion,
        mut guest,
        front_end,
        ..
    } = s;
    let companion = companion.kill_and_restart();
    drop(front_end);
    let held = [(1, 4, 1), (5, 9, 3)];
    let mut vm_guard = VmGuard::connect_as(&companion, &hello_with(ALL, ALL, 1), &held);
    let _front_end = FrontEnd::connect(&companion, &guest);
    let again = vm_guard.protect();
    assert_eq!(again.ranges, [(1, 9, 3), (1, 4, 1)]);
    vm_guard.done(again.seq, 2);
    assert_eq!(guest.response(first), OK);
    let (seq, _) = vm_guard.seal();
    vm_guard.done(seq, 2);
    assert_eq!(guest.response(seal), OK);
    let sealed = held.map(|(start, end, bits)| (start, end, bits | IMMUTABLE));
    assert_eq!(guest.query_response(query), (2, sealed.to_vec()));
}

#[test]
fn a_reset_answers_estale_to_what_waits_and_frees_what_was_sealed() {
    let mut s = Setup::able();
    s.carry_out(LOCK, &[(1, 1, NOWRITE)], 1);
    let heads = [
        request(PROTECT, 0, 1, &[(1, 1, 3)]),
        request(SEAL, 0, 0, &[]),
        query_request(0, TOP),
    ]
    .map(|bytes| s.guest.request(&bytes));
    s.front_end.kick(0);
    let stale = s.vm_guard.protect();
    s.vm_guard.reset();
    for head in heads {
        assert_eq!(s.guest.response(head), refused(ESTALE, NO_INDEX));
    }
    // Even a RESULT that says otherwise does not bring the table of before back.
    s.vm_guard.result(stale.seq, 0, NO_INDEX);
    s.start_anew(0);
    s.carry_out(PROTECT, &[(1, 1, AUDIT_NOWRITE)], 1);
    assert_eq!(s.holds(), [(1, 1, AUDIT_NOWRITE)]);
}

#[test]
fn a_guest_that_asks_for_nothing_but_what_is_refused_keeps_nobody_waiting() {
    let mut s = Setup::able();
    let all: Vec<Range> = (0x8000..0x9000).map(|i| (2 * i, 2 * i, NOWRITE)).collect();
    s.carry_out(LOCK, &all, 4096);
    let loosen: Vec<Range> = all.iter().map(|&(start, end, _)| (start, end, 0)).collect();
    let heads: Vec<_> = (0..32)
        .map(|_| s.guest.request(&request(PROTECT, 0, 4096, &loosen)))
        .collect();
    s.front_end.kick(0);
    for head in heads {
        s.front_end.config();
        assert_eq!(s.guest.response(head), refused(EPERM, 0));
    }
    s.vm_guard.assert_silent();
    assert!(s.companion.log_lines("refused") < 30, "the log is flooded");
}
