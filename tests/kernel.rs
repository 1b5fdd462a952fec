// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PROTECT_KERNEL: what a driver asks for on the queue "walk", and what it is told.

mod common;

use common::kernel::{Answer, Counts, KERNEL, KernelRequest, NX, P, Tables, W};
use common::*;

const BOTH: u64 = NOWRITE | NOEXEC_KERNEL;

/// Code, constants, data and pages that are both, at frames 0x1000, 0x1010, 0x1020 and 0x1030, sixteen
/// of each, and a device's at 0x1_0000.
fn map_kernel(guest: &Guest) -> Tables {
    let mut tables = Tables::new(guest);
    tables.map_range(guest, 0x1000, 0x100f, P);
    tables.map_range(guest, 0x1010, 0x101f, P | NX);
    tables.map_range(guest, 0x1020, 0x102f, P | W | NX);
    tables.map_range(guest, 0x1030, 0x1037, P | W);
    tables.map(guest, KERNEL + (0x1_0000 << 12), 0x1_0000, P | W | NX);
    tables
}

/// What is found of it in frames 0x1000 to 0x103f.
const COUNTS: Counts = Counts {
    pages: 64,
    unmapped: 8,
    not_written: 32,
    not_executed: 32,
    write_exec: 8,
    given: 48,
    elsewhere: 1,
    ranges: 3,
    mappings: 57,
    reserved: 0,
    outside: 0,
    tables: 5,
    told: 0,
};

fn all() -> KernelRequest {
    KernelRequest::new(&[(0x1000, 0x103f, BOTH)])
}

#[test]
fn what_no_mapping_does_is_denied_once_the_vm_guard_has_enforced_it() {
    let mut s = Setup::walks();
    map_kernel(&s.guest);
    let head = s.walk(&all(), 0);
    let protect = s.vm_guard.protect();
    let given = [
        (0x1000, 0x100f, NOWRITE),
        (0x1010, 0x101f, BOTH),
        (0x1020, 0x102f, NOEXEC_KERNEL),
    ];
    assert_eq!((protect.generation, &protect.ranges[..]), (1, &given[..]));
    assert_eq!(s.guest.try_used(2), None, "answered before it was enforced");
    s.vm_guard.done(protect.seq, 3);
    let answer = s.guest.walk_answer(head);
    let expected = Answer {
        status: 0,
        index: NO_INDEX,
        value: 1,
        counts: COUNTS,
        told: vec![],
    };
    assert_eq!(answer, expected);
    s.front_end.wait_for_interrupt(2);
    assert_eq!(s.holds(), given);
    s.companion
        .wait_for_log("PROTECT_KERNEL: OK; read tables=5 mappings=57");
    s.companion.wait_for_log(
        "8 pages are written and executed in supervisor mode, the first at frames 0x1030-0x1037",
    );
}
