// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Violations: logged, told over the event queue, and bounded in both.

mod common;

use common::guest::Used;
use common::vm_guard::{VIOLATION, violation_payload, violation_with};
use common::*;

impl Setup {
    fn violate(&mut self, source: u32, gpa: u64, times: u32) {
        self.vm_guard
            .send(VIOLATION, 0, &violation_payload(source, gpa, times, 0));
    }

    /// Waits until the companion has seen so many.
    fn wait_for_violations(&mut self, count: u64) {
        wait_for("violations", || {
            (self.front_end.config().violations() == count).then_some(())
        });
    }

    /// Posts a buffer and takes the event that comes: source, gpa, times, lost.
    fn take_event(&mut self, head: u16) -> (u32, u64, u32, u64) {
        let at = self.guest.post_event_buffer(head, 64);
        self.front_end.kick(1);
        assert_eq!(self.guest.used(1), Used { head, len: 64 });
        let g = &self.guest;
        (
            g.read(at + 4),
            g.read(at + 8),
            g.read(at + 44),
            g.read(at + 48),
        )
    }
}

#[test]
fn a_violation_fills_a_waiting_buffer_field_by_field() {
    let mut s = Setup::new();
    let at = s.guest.post_event_buffer(4, 100);
    s.front_end.kick(1);
    s.vm_guard
        .send(VIOLATION, 0, &violation_payload(3, 0x12345, 2, 0));
    assert_eq!(s.guest.used(1), Used { head: 4, len: 64 });
    s.front_end.wait_for_interrupt(1);
    let g = &s.guest;
    assert_eq!(g.read::<u16>(at), 1, "type");
    assert_eq!(g.read::<u16>(at + 2), 1, "access");
    assert_eq!(g.read::<u32>(at + 4), 3, "source");
    assert_eq!(g.read::<u64>(at + 8), 0x12345, "gpa");
    assert_eq!(g.read::<u64>(at + 16), 0xffff_8000_0000_1234, "gva");
    assert_eq!(g.read::<u64>(at + 24), 0xffff_ffff_8100_0000, "rip");
    assert_eq!(g.read::<u64>(at + 32), 0xabcd, "value");
    assert_eq!(g.read::<u32>(at + 40), 8, "size");
    assert_eq!(g.read::<u32>(at + 44), 2, "times");
    assert_eq!(g.read::<u64>(at + 48), 0, "lost");
    assert_eq!(g.read::<u32>(at + 56), 1, "action");
    assert_eq!(g.read::<u32>(at + 60), 0, "reserved");
    s.companion.wait_for_log(
        "violation: refused write by vcpu3 at gpa=0x12345 gva=0xffff800000001234 \
         rip=0xffffffff81000000 size=8 value=0xabcd times=2 action=inject",
    );
}

#[test]
fn the_same_access_to_the_same_address_coalesces_while_no_buffer_is_there() {
    let mut s = Setup::new();
    // Access, action, source, address, times.
    let seen = [
        (1, 1, 0, 0x1000, 1),
        (1, 1, 0, 0x1ff8, 2),
        (1, 1, 1, 0x1000, 1),
        (1, 1, 0, 0x2000, 0),
        (3, 1, 0, 0x1000, 1),
        (1, 5, 0, 0x1000, 1),
        (1, 1, 0, 0x1000, 4),
        (1, 5, 0, 0x1000, 2),
    ];
    for (access, action, source, gpa, times) in seen {
        let payload = violation_with(access, action, source, gpa, times, 0);
        s.vm_guard.send(VIOLATION, 0, &payload);
    }
    s.wait_for_violations(13);
    let told = [
        (0, 0x1000, 5, 0),
        (0, 0x1ff8, 2, 0),
        (1, 0x1000, 1, 0),
        (0, 0x2000, 1, 0),
        (0, 0x1000, 1, 0),
        (0, 0x1000, 3, 0),
    ];
    for (head, event) in (0..).zip(told) {
        assert_eq!(s.take_event(head), event, "{head}");
    }
    // What was told is not counted again.
    s.violate(0, 0x1000, 1);
    assert_eq!(s.take_event(7), (0, 0x1000, 1, 0));
}

#[test]
fn each_kind_of_access_is_told_and_logged_by_its_name() {
    let mut s = Setup::new();
    let cases = [
        (1, 2, 0, "refused write by vcpu0", "action=drop"),
        (2, 3, 7, "refused fetch by vcpu7", "action=pause"),
        (3, 4, !0, "refused read by device", "action=shutdown"),
        (3, 5, 2, "watched read by vcpu2", "action=audit"),
        (1, 5, !0, "watched write by device", "action=audit"),
    ];
    for (head, (access, action, source, text, end)) in (0..).zip(cases) {
        let at = s.guest.post_event_buffer(head, 64);
        s.front_end.kick(1);
        let payload = violation_with(access, action, source, 0x5000, 1, 0);
        s.vm_guard.send(VIOLATION, 0, &payload);
        assert_eq!(s.guest.used(1), Used { head, len: 64 });
        assert_eq!(s.guest.read::<u16>(at + 2), u16::from(access));
        assert_eq!(s.guest.read::<u32>(at + 4), source);
        assert_eq!(s.guest.read::<u32>(at + 56), action);
        s.companion
            .wait_for_log(&format!("violation: {text} at gpa=0x5000"));
        let log = s.companion.log();
        let line = log.lines().find(|line| line.contains(text)).unwrap();
        assert!(line.ends_with(end), "{line}");
    }
}

#[test]
fn what_the_store_has_no_room_for_is_counted_as_lost() {
    let mut s = Setup::new();
    for page in 0..300u64 {
        s.violate(0, page << 12, 1);
    }
    s.wait_for_violations(300);
    assert_eq!(s.front_end.config().events_lost(), 44);
    for page in 0..256u64 {
        assert_eq!(s.take_event((page % 64) as u16), (0, page << 12, 1, 0));
    }
    s.violate(0, 0x0fff_f000, 1);
    assert_eq!(s.take_event(0), (0, 0x0fff_f000, 1, 44));
    s.assert_works();
}

#[test]
fn what_qemu_has_lost_counts_too() {
    let mut s = Setup::new();
    s.vm_guard
        .send(VIOLATION, 0, &violation_payload(0, 0x1000, 1, 17));
    assert_eq!(s.take_event(0), (0, 0x1000, 1, 17));
    assert_eq!(s.front_end.config().events_lost(), 17);
}

#[test]
fn a_buffer_that_is_too_short_is_given_back_empty_and_counted() {
    let mut s = Setup::new();
    s.guest.post_event_buffer(0, 63);
    s.violate(0, 0x1000, 1);
    s.front_end.kick(1);
    assert_eq!(s.guest.used(1), Used { head: 0, len: 0 });
    assert_eq!(s.take_event(1), (0, 0x1000, 1, 0));
    assert_eq!(s.front_end.config().malformed(), 1);
}

#[test]
fn events_wait_while_their_ring_is_stopped() {
    let mut s = Setup::new();
    s.guest.post_event_buffer(0, 64);
    assert_eq!(s.front_end.stop(1), 0);
    s.violate(0, 0x1000, 1);
    s.wait_for_violations(1);
    assert_eq!(s.guest.used_idx(1), 0);
    s.front_end.start(1, &s.guest, 0);
    assert_eq!(s.guest.used(1), Used { head: 0, len: 64 });
}

#[test]
fn a_flood_of_violations_does_not_flood_the_log() {
    let mut s = Setup::new();
    for i in 0..5000u64 {
        s.violate(0, i << 12, 1);
    }
    s.wait_for_violations(5000);
    let lines = s.companion.log_lines("violation:");
    assert!((10..1000).contains(&lines), "{lines} lines");
    // The next line says how many were held back.
    wait_for("a line that counts the others", || {
        s.violate(0, 0, 1);
        s.companion
            .log()
            .contains("such lines suppressed before")
            .then_some(())
    });
}

#[test]
fn a_flood_of_refused_requests_does_not_flood_the_log() {
    let mut s = Setup::new();
    for _ in 0..300 {
        let head = s.guest.lock(&[(1, 1, NOWRITE)]);
        s.front_end.kick(0);
        let protect = s.vm_guard.protect();
        s.vm_guard.result(protect.seq, EBUSY, 0);
        assert_eq!(s.guest.response(head).status, EBUSY);
    }
    assert!(
        (1..200).contains(&s.companion.log_lines("refused")),
        "{}",
        s.companion.log()
    );
}
