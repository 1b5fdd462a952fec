// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's requests for rules for MSRs.

mod common;

use common::front_end::{F_ALL, F_EVENT_IDX, F_KERNEL, F_MSR};
use common::guest::{LOCK, MSR_BITMAP, MSR_LOCK, MSR_PROTECT, MSR_QUERY, PROTECT, SEAL};
use common::msr::*;
use common::vm_guard::{NO_POLICY, Rule, VIOLATION, hello_msrs, violation_with};
use common::*;

const LSTAR: u32 = 0xc000_0082;

#[test]
fn rules_for_msrs_are_offered_where_there_can_be_some() {
    for (max, features) in [(0, F_ALL | F_KERNEL), (7, F_ALL | F_KERNEL | F_MSR)] {
        let hello = hello_msrs(max, 16, NO_POLICY);
        let mut s = Setup::on(Companion::start(), &hello);
        assert_eq!(s.front_end.features & 0xff, features);
        let config = s.front_end.config();
        assert_eq!(
            (config.max_msr_ranges(), config.msr_ranges_in_force()),
            (max.into(), 0)
        );
        for kind in [MSR_LOCK, MSR_PROTECT, MSR_BITMAP, MSR_QUERY] {
            // Not even an entry is there.
            let status = if max == 0 { EOPNOTSUPP } else { EINVAL };
            let bytes = with_header(kind, 0, 0, &[]);
            assert_eq!(s.ask(&bytes), refused(status, NO_INDEX), "{kind}");
        }
        s.vm_guard.assert_silent();
    }
    // Offered, and not negotiated.
    let companion = Companion::start();
    let vm_guard = VmGuard::connect_as(&companion, &hello_msrs(7, 16, NO_POLICY), &[]);
    let guest = Guest::new();
    let front_end = FrontEnd::connect_with(&companion, &guest, !F_MSR | F_EVENT_IDX);
    let mut s = Setup {
        front_end,
        vm_guard,
        guest,
        companion,
    };
    let bytes = request(MSR_LOCK, &[deny(1, 1, R)]);
    assert_eq!(s.ask(&bytes), refused(EOPNOTSUPP, NO_INDEX));
}

#[test]
fn orders_reach_the_vm_guard_in_the_guests_order_and_queries_tell_what_holds() {
    let mut s = Setup::msrs();
    let rules = [
        pin(LSTAR, LSTAR, !0),
        deny(0x10, 0x1f, RW),
        (0x20, 0x2f, W, PIN | LOG, 0, 0xff),
    ];
    let sent = s.msr_order(&request(MSR_LOCK, &rules), 4);
    assert_eq!(sent, rules.map(fixed));
    let more = [
        (0x30, 0x30, RW, LOG, 0, 0),
        (0x3f, 0x3f, RW, ALLOW, 0, 0),
        deny(0x20, 0x2f, W),
    ];
    let sent = s.msr_order(&request(MSR_PROTECT, &more), 6);
    assert_eq!(sent, more);
    // By first MSR, and reads before writes.
    let held = [
        fixed(deny(0x10, 0x1f, R)),
        // Neighbours that are the same are one.
        fixed(deny(0x10, 0x2f, W)),
        (0x30, 0x30, R, LOG, 0, 0),
        (0x30, 0x30, W, LOG, 0, 0),
        fixed(pin(LSTAR, LSTAR, !0)),
    ];
    // It said 6, so it is asked.
    let seq = s.vm_guard.get_state();
    let mut told = held;
    told.sort_by_key(|rule| (rule.2, rule.0));
    s.vm_guard.send(
        vm_guard::MSR_STATE,
        seq,
        &vm_guard::msr_state_payload(1, &told, &[]),
    );
    s.vm_guard
        .send(vm_guard::STATE, seq, &vm_guard::state_payload(1, &[]));
    assert_eq!(s.msr_rules(), held);
    assert_eq!(s.front_end.config().msr_ranges_in_force(), 5);
    assert_eq!(s.companion.log_lines("something else than asked"), 0);
    // Cut to the room, to the range, and to the access; what no rule can name may be asked for.
    assert_eq!(s.msr_query(0, !0, RW, 2), (5, held[..2].to_vec()));
    assert_eq!(s.msr_query(0, !0, RW, 0), (5, vec![]));
    assert_eq!(
        s.msr_query(0x1f, 0x20, W, 9),
        (1, vec![fixed(deny(0x1f, 0x20, W))])
    );
    assert_eq!(
        s.msr_query(0x1f, 0x2f, R, 9).1,
        [fixed(deny(0x1f, 0x1f, R))]
    );
    assert_eq!(s.msr_query(0x800, 0x8ff, RW, 9), (0, vec![]));
    assert_eq!(s.msr_query(0x31, 0xffff, RW, 9), (0, vec![]));
    s.vm_guard.assert_silent();
}

#[test]
fn each_row_of_the_error_table_comes_in_its_place() {
    let mut s = Setup::msrs();
    s.msr_order(&request(MSR_LOCK, &[deny(0x50, 0x50, W)]), 1);
    let good = deny(1, 1, R);
    let loosens = (0x50, 0x50, W, LOG, 0, 0);
    let rule =
        |first, last, access, action, flags, mask| (first, last, access, action, flags, mask);
    // What is wrong with an entry, whatever is asked for with it, and what comes of it.
    let entries: [(Rule, u32); 27] = [
        (rule(2, 1, R, DENY, 0, 0), EINVAL),
        // An access, an action, or flags that there are not.
        (rule(1, 1, 0, DENY, 0, 0), EINVAL),
        (rule(1, 1, 4, DENY, 0, 0), EINVAL),
        (rule(1, 1, 7, DENY, 0, 0), EINVAL),
        (rule(1, 1, 0x101, DENY, 0, 0), EINVAL),
        (rule(1, 1, R, EMULATE, 0, 0), EINVAL),
        (rule(1, 1, R, EMULATE | LOG, 0, 5), EINVAL),
        (rule(1, 1, W, 16, 0, 0), EINVAL),
        (rule(1, 1, W, 0x8000, 0, 0), EINVAL),
        (rule(1, 1, R, DENY, 1, 0), EINVAL),
        (rule(1, 1, R, DENY, FIXED, 0), EINVAL),
        // Contradictions.
        (rule(1, 1, W, DENY | LOG, 0, 0), EINVAL),
        (rule(1, 1, W, DENY | PIN, 0, 1), EINVAL),
        (rule(1, 1, W, 7, 0, 1), EINVAL),
        (rule(1, 1, R, PIN, 0, 1), EINVAL),
        (rule(1, 1, RW, PIN, 0, 1), EINVAL),
        (rule(1, 1, W, PIN, 0, 0), EINVAL),
        (rule(1, 1, W, PIN | LOG, 0, 0), EINVAL),
        (rule(1, 1, W, DENY, 0, 1), EINVAL),
        (rule(1, 1, W, LOG, 0, 1 << 63), EINVAL),
        (rule(1, 1, W, ALLOW, 0, 1), EINVAL),
        // What no rule can speak of; but only if nothing else is wrong with it.
        (rule(0x800, 0x800, R, DENY, 0, 0), EOPNOTSUPP),
        (rule(0, 0x8ff, RW, LOG, 0, 0), EOPNOTSUPP),
        (rule(0x8ff, 0x8ff, R, PIN, 0, 0), EINVAL),
        (rule(0x6e0, 0x6e0, W, LOG, 0, 0), EOPNOTSUPP),
        (rule(0x600, 0x6ff, RW, DENY, 0, 0), EOPNOTSUPP),
        (rule(0x6e0, 0x6e0, W, PIN, 0, !0), EOPNOTSUPP),
    ];
    for (entry, status) in entries {
        for kind in [MSR_LOCK, MSR_PROTECT] {
            // Behind one that would loosen, and before one that is wrong as well.
            let last = rule(9, 8, R, DENY, 0, 0);
            let lists = [vec![entry], vec![good, loosens, entry, last]];
            for (list, index) in lists.iter().zip([0, 2]) {
                let response = s.ask(&request(kind, list));
                assert_eq!(response, refused(status, index), "{kind}: {entry:x?}");
            }
        }
    }
    // What is wrong for one type only.
    let free = rule(1, 1, RW, ALLOW, 0, 0);
    let cases: Vec<(Vec<u8>, u32, u32)> = vec![
        (request(MSR_LOCK, &[good, free]), EINVAL, 1),
        (request(MSR_QUERY, &[rule(1, 1, RW, LOG, 0, 0)]), EINVAL, 0),
        (request(MSR_QUERY, &[rule(1, 1, RW, 0, 0, 1)]), EINVAL, 0),
        (request(MSR_QUERY, &[rule(2, 1, RW, 0, 0, 0)]), EINVAL, 0),
        (request(MSR_QUERY, &[rule(1, 1, 0, 0, 0, 0)]), EINVAL, 0),
        (request(MSR_QUERY, &[rule(1, 1, R, 0, FIXED, 0)]), EINVAL, 0),
        (request(MSR_QUERY, &[free, free]), EINVAL, NO_INDEX),
        (request(MSR_QUERY, &[]), EINVAL, NO_INDEX),
        (request(MSR_LOCK, &[]), EINVAL, NO_INDEX),
        (request(MSR_PROTECT, &[]), EINVAL, NO_INDEX),
        (request(MSR_PROTECT, &vec![good; 4097]), E2BIG, NO_INDEX),
        (request(MSR_QUERY, &vec![free; 4097]), E2BIG, NO_INDEX),
        (with_header(MSR_LOCK, 1, 0, &[]), EINVAL, NO_INDEX),
        (with_header(MSR_LOCK, 1, 9999, &[]), EINVAL, NO_INDEX),
        (with_header(MSR_LOCK, 0, 1, &[0; 23]), EINVAL, NO_INDEX),
        (with_header(MSR_LOCK, 0, 1, &[0; 25]), EINVAL, NO_INDEX),
        (request(9, &[good]), EOPNOTSUPP, NO_INDEX),
        (request(MSR_PROTECT, &[good, loosens]), EPERM, 1),
        (
            request(MSR_PROTECT, &[loosens, deny(0x50, 0x50, W), free]),
            0,
            NO_INDEX,
        ),
    ];
    for (bytes, status, index) in cases {
        if status == 0 {
            // Only the last rule for an MSR counts.
            s.msr_order(&bytes, 1);
            continue;
        }
        assert_eq!(s.ask(&bytes), refused(status, index), "{:x?}", &bytes[..8]);
    }
    s.vm_guard.assert_silent();
    assert_eq!(s.msr_rules(), [fixed(deny(0x50, 0x50, W))]);
}

#[test]
fn what_the_vm_guard_refuses_is_told_as_it_says() {
    let mut s = Setup::msrs();
    let rules = [deny(1, 1, R), deny(3, 3, R)];
    for (said, index, told) in [
        (EOPNOTSUPP, 1, EOPNOTSUPP),
        (EPERM, 0, EPERM),
        (EINVAL, 1, EINVAL),
        (ENOSPC, NO_INDEX, ENOSPC),
        (ESTALE, NO_INDEX, ESTALE),
        (17, NO_INDEX, EIO),
    ] {
        let head = s.guest.request(&request(MSR_PROTECT, &rules));
        s.front_end.kick(0);
        let (seq, ..) = s.vm_guard.msr_rules();
        s.vm_guard.result(seq, said, index);
        assert_eq!(s.guest.response(head), refused(told, index));
    }
    assert_eq!(s.msr_rules(), []);
    s.vm_guard.assert_silent();
}

#[test]
fn what_there_is_no_room_for_is_refused_before_the_vm_guard_is_asked() {
    // The host pins two MSRs, of which the guest has denied none yet.
    let host = [pin(0x100, 0x101, 1)];
    let hello = hello_msrs(4, 2, 0);
    let companion = Companion::start();
    let vm_guard = VmGuard::connect_msrs(&companion, &hello, &[], &host);
    let mut s = Setup::with(companion, vm_guard);
    let full = refused(ENOSPC, NO_INDEX);
    let apart = [0x10, 0x12, 0x14, 0x16, 0x18].map(|msr| deny(msr, msr, R));
    assert_eq!(s.ask(&request(MSR_LOCK, &apart)), full, "ranges");
    assert_eq!(
        s.ask(&request(MSR_LOCK, &[pin(0x180, 0x1be, 1)])),
        full,
        "63 pins and two of the host's"
    );
    let far = [deny(0x10_0000, 0x10_0000, W), deny(0x20_0000, 0x20_0000, W)];
    assert_eq!(s.ask(&request(MSR_PROTECT, &far)), full, "filter");
    s.vm_guard.assert_silent();
    // What fits exactly is asked for.
    s.msr_order(&request(MSR_LOCK, &apart[..2]), 2);
    s.msr_order(&request(MSR_LOCK, &[pin(0x180, 0x1bd, 1)]), 3);
    // The host's count no more when they are denied as well.
    s.msr_order(&request(MSR_LOCK, &[deny(0x100, 0x101, W)]), 4);
    assert_eq!(s.ask(&request(MSR_LOCK, &[pin(0x1be, 0x1c0, 1)])), full);
    s.msr_order(&request(MSR_LOCK, &[pin(0x1be, 0x1bf, 1)]), 4);
}

#[test]
fn a_bitmap_is_asked_for_as_rules_and_named_when_a_rule_of_it_is_wrong() {
    let mut s = Setup::msrs();
    let first = bitmap(3, 8, 0x100, 0, &[0b1111_0001, 0, 0, 0, 0, 0, 0, 0]);
    let second = bitmap(2, 3, 0x200, 0, &[0b101, 0, 0, 0, 0, 0, 0, 0]);
    let bytes = bitmaps(&[first.clone(), second.clone()]);
    let rules = [
        (0x100, 0x100, RW, ALLOW, 0, 0),
        deny(0x101, 0x103, RW),
        (0x104, 0x107, RW, ALLOW, 0, 0),
        (0x200, 0x200, W, ALLOW, 0, 0),
        deny(0x201, 0x201, W),
        (0x202, 0x202, W, ALLOW, 0, 0),
    ];
    // A rule that the vm-guard names is a bitmap to the guest; one that is none is nothing.
    for (named, told) in [
        (0, 0),
        (2, 0),
        (3, 1),
        (5, 1),
        (6, NO_INDEX),
        (NO_INDEX, NO_INDEX),
    ] {
        let head = s.guest.request(&bytes);
        s.front_end.kick(0);
        let (seq, _, sent) = s.vm_guard.msr_rules();
        assert_eq!(sent, rules);
        s.vm_guard.result(seq, EOPNOTSUPP, named);
        assert_eq!(s.guest.response(head), refused(EOPNOTSUPP, told));
    }
    assert_eq!(s.msr_order(&bytes, 3), rules);
    assert_eq!(
        s.msr_rules(),
        [
            deny(0x101, 0x103, R),
            deny(0x101, 0x103, W),
            deny(0x201, 0x201, W)
        ]
    );
    // Locked, they cannot be taken back by bitmaps: not by the second of these.
    s.carry_out_seal(0, 3);
    let all = bitmap(2, 3, 0x200, 0, &[0xff; 8]);
    let elsewhere = bitmap(2, 3, 0x300, 0, &[0; 8]);
    let loosening = bitmaps(&[elsewhere, all]);
    assert_eq!(s.ask(&loosening), refused(EPERM, 1));

    let e = |flags, nmsrs, base, pad, bits: &[u8]| bitmap(flags, nmsrs, base, pad, bits);
    let stripes = |base| bitmap(1, 4096, base, 0, &[0x55; 512]);
    let good = |base: u32| bitmap(3, 64, base, 0, &[0xff; 8]);
    let many: Vec<_> = (0..17).map(|i| good(64 * i)).collect();
    let cases = [
        (bitmaps(&[]), EINVAL, NO_INDEX),
        (bitmaps(&many), E2BIG, NO_INDEX),
        (with_header(MSR_BITMAP, 0, 17, &[]), E2BIG, NO_INDEX),
        (with_header(MSR_BITMAP, 0, 1, &[0; 24833]), E2BIG, NO_INDEX),
        (with_header(MSR_BITMAP, 3, 99, &[0; 9]), EINVAL, NO_INDEX),
        // Fewer and more bytes than so many bitmaps.
        (with_header(MSR_BITMAP, 0, 2, &good(0)), EINVAL, 1),
        (
            with_header(MSR_BITMAP, 0, 1, &many[..2].concat()),
            EINVAL,
            NO_INDEX,
        ),
        (with_header(MSR_BITMAP, 0, 1, &[0; 15]), EINVAL, 0),
        (
            bitmaps(&[good(0), e(4, 64, 0x99, 0, &[0xff; 8])]),
            EINVAL,
            1,
        ),
        (bitmaps(&[e(0, 64, 0, 0, &[0xff; 8])]), EINVAL, 0),
        (bitmaps(&[e(1, 64, 0, 1, &[0xff; 8])]), EINVAL, 0),
        (bitmaps(&[e(1, 0, 0, 0, &[])]), EINVAL, 0),
        (bitmaps(&[e(1, 12289, 0, 0, &[0xff; 1544])]), EINVAL, 0),
        (bitmaps(&[e(1, 2, u32::MAX, 0, &[0xff; 8])]), EINVAL, 0),
        (bitmaps(&[e(1, 65, 0, 0, &[0xff; 8])]), EINVAL, 0),
        (bitmaps(&[good(0), good(0x100), good(0x3f)]), EINVAL, 2),
        (bitmaps(&[good(0), e(1, 1, 0x800, 0, &[0; 8])]), EINVAL, 1),
        (bitmaps(&[e(3, 1, 0x6e0, 0, &[0; 8])]), EINVAL, 0),
        // Of too many rules, and of something worse before them.
        (bitmaps(&[stripes(0x1_0000), good(0)]), E2BIG, NO_INDEX),
        (bitmaps(&[good(0), good(0), stripes(0x1_0000)]), EINVAL, 1),
    ];
    for (bytes, status, index) in cases {
        assert_eq!(s.ask(&bytes), refused(status, index), "{:x?}", &bytes[..8]);
    }
    s.vm_guard.assert_silent();
}

impl Setup {
    fn carry_out_seal(&mut self, pages: u32, msrs: u32) {
        self.vm_guard.msrs_in_force = msrs;
        self.carry_out(SEAL, &[], pages);
    }
}

#[test]
fn a_seal_is_for_pages_and_msrs_and_a_reset_frees_both_but_not_the_hosts() {
    let host = [deny(0x99, 0x99, R), (0x9a, 0x9a, R, EMULATE | LOG, 0, 7)];
    let hello = hello_msrs(100, 16, 1);
    let companion = Companion::start();
    let vm_guard = VmGuard::connect_msrs(&companion, &hello, &[], &host);
    let mut s = Setup::with(companion, vm_guard);
    s.carry_out(PROTECT, &[(1, 1, NOWRITE)], 1);
    let mutable = (LSTAR, LSTAR, W, LOG, 0, 0);
    s.msr_order(&request(MSR_PROTECT, &[mutable]), 1);
    s.carry_out_seal(1, 1);
    assert_eq!(s.holds(), [(1, 1, NOWRITE | IMMUTABLE)]);
    assert_eq!(s.msr_rules(), [fixed(mutable)]);
    let free = (LSTAR, LSTAR, RW, ALLOW, 0, 0);
    assert_eq!(s.ask(&request(MSR_PROTECT, &[free])), refused(EPERM, 0));
    // What comes later can be taken back.
    s.msr_order(&request(MSR_PROTECT, &[deny(1, 1, R)]), 2);
    s.msr_order(&request(MSR_PROTECT, &[(1, 1, R, ALLOW, 0, 0)]), 1);

    let head = s.guest.request(&request(MSR_LOCK, &[mutable]));
    s.front_end.kick(0);
    let (stale, ..) = s.vm_guard.msr_rules();
    s.vm_guard.reset();
    assert_eq!(s.guest.response(head), refused(ESTALE, NO_INDEX));
    s.vm_guard.result(stale, ESTALE, NO_INDEX);
    s.start_anew(0);
    assert_eq!(s.msr_rules(), []);
    assert_eq!(s.front_end.config().msr_ranges_in_force(), 0);
    s.msr_order(&request(MSR_PROTECT, &[free, mutable]), 1);
    let rules = s.companion.status()["msr_rules"].clone();
    let of: Vec<_> = rules
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["by"].clone())
        .collect();
    assert_eq!(of, ["guest", "host", "host"]);
    s.vm_guard.assert_silent();
}

#[test]
fn a_request_under_way_when_the_channel_drops_is_sent_again() {
    let mut s = Setup::msrs();
    let head = s.guest.request(&request(MSR_LOCK, &[deny(5, 5, R)]));
    s.front_end.kick(0);
    let first = s.vm_guard.msr_rules();
    let hello = hello_msrs(100, u32::MAX, NO_POLICY);
    s.vm_guard
        .stream
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    // It has been done, as it turns out.
    let held = [fixed(deny(5, 5, R))];
    s.vm_guard = VmGuard::connect_msrs(&s.companion, &hello, &held, &[]);
    let (seq, _, rules) = s.vm_guard.msr_rules();
    assert_eq!(rules, first.2);
    s.vm_guard.result(seq, 0, NO_INDEX);
    assert_eq!(s.guest.response(head), OK);
    assert_eq!(s.msr_rules(), held);
    // A new companion learns what holds, and refuses what loosens it.
    let Setup {
        companion,
        guest,
        front_end,
        ..
    } = s;
    drop(front_end);
    let companion = companion.kill_and_restart();
    let vm_guard = VmGuard::connect_msrs(&companion, &hello, &held, &[]);
    let front_end = FrontEnd::connect(&companion, &guest);
    let mut s = Setup {
        front_end,
        vm_guard,
        guest,
        companion,
    };
    assert_eq!(s.msr_rules(), held);
    let free = request(MSR_PROTECT, &[(5, 5, R, ALLOW, 0, 0)]);
    assert_eq!(s.ask(&free), refused(EPERM, 0));
    s.vm_guard.assert_silent();
}

#[test]
fn a_violation_of_a_rule_is_an_event_of_its_own_type() {
    let mut s = Setup::on(
        Companion::start_with(&["--events", "events"]),
        &hello_msrs(9, 16, NO_POLICY),
    );
    // The same number as an address, and as an MSR; refused and logged.
    let mut msr = violation_with(1, 1, 3, LSTAR.into(), 2, 0);
    msr[0] = 2;
    msr[16..24].fill(0xff);
    let memory = violation_with(1, 1, 3, LSTAR.into(), 1, 0);
    let mut read = violation_with(3, 5, 0, 0x10, 1, 0);
    read[0] = 2;
    for payload in [&msr, &memory, &msr, &read] {
        s.vm_guard.send(VIOLATION, 0, payload);
    }
    wait_for("violations", || {
        (s.front_end.config().violations() == 6).then_some(())
    });
    for head in 0..3 {
        s.guest.post_event_buffer(head, 64);
    }
    s.front_end.kick(1);
    let events: Vec<(u16, u16, u32, u64, u64, u32, u32)> = (0..3)
        .map(|head| {
            assert_eq!(s.guest.used(1).len, 64);
            let at = 0x30000 + 256 * head;
            let field = |offset| s.guest.read::<u64>(at + offset);
            (
                s.guest.read(at),
                s.guest.read(at + 2),
                s.guest.read(at + 4),
                field(8),
                field(16),
                s.guest.read(at + 44),
                s.guest.read(at + 56),
            )
        })
        .collect();
    let (at, gva) = (u64::from(LSTAR), 0xffff_8000_0000_1234);
    assert_eq!(
        events,
        [
            (2, 1, 3, at, !0, 4, 1),
            (1, 1, 3, at, gva, 1, 1),
            (2, 3, 0, 0x10, gva, 1, 5)
        ]
    );
    s.companion
        .wait_for_log("refused write by vcpu3 at msr=0xc0000082 rip=");
    s.companion
        .wait_for_log("watched read by vcpu0 at msr=0x10 ");
    let file = s.companion.dir.path().join("events");
    let lines = wait_for("the lines", || {
        let text = std::fs::read_to_string(&file).unwrap();
        let whole = text.ends_with('\n') && text.lines().count() == 4;
        whole.then_some(text)
    });
    let lines: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let place = |line: &serde_json::Value| (line.get("msr").cloned(), line.get("gpa").cloned());
    assert_eq!(place(&lines[0]), (Some("0xc0000082".into()), None));
    assert_eq!(place(&lines[1]), (None, Some("0xc0000082".into())));
    assert_eq!(lines[3]["value"], "0xabcd");
}

#[test]
fn requests_for_pages_and_for_msrs_are_carried_out_in_one_order() {
    let mut s = Setup::msrs();
    let lock = s.guest.lock(&[(1, 1, NOWRITE)]);
    let msrs = s.guest.request(&request(MSR_LOCK, &[deny(5, 5, R)]));
    let second = s
        .guest
        .request(&guest::request(LOCK, 0, 1, &[(3, 3, NOWRITE)]));
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.assert_silent();
    s.vm_guard.succeed(&protect);
    let (seq, ..) = s.vm_guard.msr_rules();
    assert_eq!(s.guest.response(lock), OK);
    s.vm_guard.assert_silent();
    s.vm_guard.msrs_in_force = 1;
    s.vm_guard.result(seq, 0, NO_INDEX);
    assert_eq!(s.guest.response(msrs), OK);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(second), OK);
}
