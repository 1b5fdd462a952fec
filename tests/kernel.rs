// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PROTECT_KERNEL: what a driver asks for on the queue "walk", and what it is told.

mod common;

use std::fs;
use std::net::Shutdown;

use common::front_end::{F_KERNEL, F_NOWRITE, regions};
use common::guest::{LOCK, PROTECT, PROTECT_KERNEL, Used, WRITE, request};
use common::kernel::{
    Answer, Counts, F_DRY_RUN, F_LOCK, KERNEL, KernelRequest, NX, P, PS, Tables, U, W,
};
use common::vm_guard::{Range, hello_payload, hello_with};
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

/// What all but the data get by [`all`].
const GIVEN: [Range; 3] = [
    (0x1000, 0x100f, NOWRITE),
    (0x1010, 0x101f, BOTH),
    (0x1020, 0x102f, NOEXEC_KERNEL),
];

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
    assert_eq!((protect.generation, &protect.ranges[..]), (1, &GIVEN[..]));
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
    assert_eq!(s.holds(), GIVEN);
    s.companion
        .wait_for_log("PROTECT_KERNEL: OK; read tables=5 mappings=57");
    s.companion.wait_for_log(
        "8 pages are written and executed in supervisor mode, the first at frames 0x1030-0x1037",
    );
}

/// A VM that can do everything, whose guest has mapped its kernel.
fn mapped() -> Setup {
    let s = Setup::walks();
    map_kernel(&s.guest);
    s
}

/// A guest on a VM of this kind, with its kernel mapped and the queue running.
fn mapped_on(hello: &[u8]) -> Setup {
    let mut s = Setup::on(Companion::start(), hello);
    map_kernel(&s.guest);
    s.front_end.start(2, &s.guest, 0);
    s
}

fn locked(ranges: &[Range]) -> Vec<Range> {
    let locked = |&(start, end, bits): &Range| (start, end, bits | IMMUTABLE);
    ranges.iter().map(locked).collect()
}

/// Makes a request that the vm-guard carries out as these ranges, and gives its counts.
fn enforce(s: &mut Setup, request: &KernelRequest, ranges: &[Range], in_force: u32) -> Counts {
    let head = s.walk(request, 0);
    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges, ranges);
    s.vm_guard.done(protect.seq, in_force);
    let answer = s.guest.walk_answer(head);
    assert_eq!((answer.outcome(), answer.value), ((0, NO_INDEX), 1));
    answer.counts
}

#[test]
fn with_lock_what_is_given_is_for_good_and_other_pages_stay_as_they_are() {
    let mut s = mapped();
    s.carry_out(PROTECT, &[(0x1030, 0x103f, NOREAD)], 1);
    let lock = all().flags(F_LOCK);
    assert_eq!(enforce(&mut s, &lock, &locked(&GIVEN), 4), COUNTS);
    let mut held = locked(&GIVEN);
    held.push((0x1030, 0x103f, NOREAD));
    assert_eq!(s.holds(), held);
    // What holds already is not asked for again.
    assert_eq!(s.ask_walk(&lock, 0).outcome(), (0, NO_INDEX));
    s.vm_guard.assert_silent();
    // To ask for less is no error with LOCK, and EPERM without.
    let less = KernelRequest::new(&[(0x1000, 0x101f, NOWRITE), (0x1030, 0x103f, BOTH)]);
    let answer = s.ask_walk(&less.clone().flags(F_LOCK), 0);
    assert_eq!((answer.outcome(), answer.value), ((0, NO_INDEX), 1));
    let refused = s.ask_walk(&less, 0);
    assert_eq!((refused.outcome(), refused.value), ((EPERM, 0), 0));
    assert_eq!(refused.counts, answer.counts, "counts are told");
    s.vm_guard.assert_silent();
}

#[test]
fn without_lock_pages_that_get_nothing_are_freed_where_something_holds() {
    let mut s = mapped();
    let before = [
        (0x1000, 0x1001, NOREAD),
        (0x102e, 0x1031, NOWRITE),
        (0x103f, 0x1040, NOEXEC),
    ];
    s.carry_out(PROTECT, &before, 3);
    let ranges = [
        GIVEN[0],
        GIVEN[1],
        GIVEN[2],
        (0x1030, 0x1031, 0),
        (0x103f, 0x103f, 0),
    ];
    assert_eq!(enforce(&mut s, &all(), &ranges, 4), COUNTS);
    let mut held = GIVEN.to_vec();
    held.push((0x1040, 0x1040, NOEXEC));
    assert_eq!(s.holds(), held);
    // A second time there is nothing left to change.
    assert_eq!(s.ask_walk(&all(), 0).outcome(), (0, NO_INDEX));
    s.vm_guard.assert_silent();
}

#[test]
fn the_last_entry_counts_and_one_without_attributes_leaves_pages_alone() {
    let mut s = mapped();
    s.carry_out(LOCK, &[(0x1024, 0x1024, NOREAD)], 1);
    let request = KernelRequest::new(&[
        (0x1000, 0x102f, BOTH),
        (0x1008, 0x1013, NOWRITE << 8 | NOEXEC_KERNEL << 8),
        (0x1020, 0x1027, 0),
    ]);
    let ranges = [
        (0x1000, 0x1007, NOWRITE),
        (0x1008, 0x100f, NOWRITE << 8),
        (0x1010, 0x1013, BOTH << 8),
        (0x1014, 0x101f, BOTH),
        (0x1028, 0x102f, NOEXEC_KERNEL),
    ];
    let counts = enforce(&mut s, &request, &ranges, 6);
    let expected = Counts {
        pages: 40,
        unmapped: 0,
        not_written: 32,
        not_executed: 24,
        write_exec: 0,
        given: 40,
        // Eight left alone, eight that are both, the device.
        elsewhere: 17,
        ranges: 5,
        ..COUNTS
    };
    assert_eq!(counts, expected);
    assert_eq!(
        s.query(0x1024, 0x1024, 1),
        (1, vec![(0x1024, 0x1024, NOREAD | IMMUTABLE)])
    );
}

#[test]
fn an_error_names_the_entry_of_the_request() {
    let mut s = mapped();
    s.carry_out(
        LOCK,
        &[(0x1022, 0x1022, NOWRITE), (0x1033, 0x1033, NOEXEC)],
        2,
    );
    // The first entry that loosens, which is not that of the first page.
    let entries = [
        (0x1010, 0x101f, BOTH),
        (0x1030, 0x103f, BOTH),
        (0x1020, 0x102f, BOTH),
    ];
    let request = KernelRequest::new(&entries);
    for flags in [0, F_DRY_RUN] {
        assert_eq!(
            s.ask_walk(&request.clone().flags(flags), 0).outcome(),
            (EPERM, 1)
        );
    }
    s.vm_guard.assert_silent();
    // What the VM refuses is a piece of an entry.
    let request = KernelRequest::new(&[(0x1030, 0x1037, BOTH), (0x1000, 0x101f, BOTH)]);
    for (status, range, index) in [
        (EBUSY, 0, 1),
        (EINVAL, 1, 1),
        (ENOSPC, NO_INDEX, NO_INDEX),
        (EBUSY, 7, NO_INDEX),
        (999, 0, 1),
    ] {
        let head = s.walk(&request.clone().flags(F_LOCK), 0);
        let protect = s.vm_guard.protect();
        assert_eq!(protect.ranges, locked(&GIVEN[..2]));
        s.vm_guard.result(protect.seq, status, range);
        let answer = s.guest.walk_answer(head);
        let status = if status == 999 { EIO } else { status };
        assert_eq!(answer.outcome(), (status, index));
        assert_eq!((answer.counts.given, answer.value), (32, 0));
    }
    assert_eq!(s.holds().len(), 2, "nothing was set");
}

#[test]
fn a_dry_run_tells_the_same_and_sets_nothing() {
    let mut s = mapped();
    let dry = s.ask_walk(&all().flags(F_DRY_RUN).policy(1, 1), 9);
    assert_eq!((dry.outcome(), dry.value), ((0, NO_INDEX), 1));
    assert_eq!(dry.counts, Counts { told: 2, ..COUNTS });
    let told = [(0x1030, 0x1037, 1), (0x1038, 0x103f, 2)];
    assert_eq!(dry.told, told);
    assert_eq!(
        s.ask_walk(&all().flags(F_DRY_RUN | F_LOCK), 9).counts,
        COUNTS
    );
    s.vm_guard.assert_silent();
    assert_eq!(s.holds(), []);
}

#[test]
fn each_policy_does_as_it_says_and_what_is_told_is_cut_to_the_room() {
    let mut s = mapped();
    // Every other page of eight is written and executed, those between are not mapped.
    for n in 0..4 {
        s.guest.write(leaf_at(0x1031 + 2 * n), 0u64);
    }
    let dry = |unmapped, write_exec| all().flags(F_DRY_RUN).policy(unmapped, write_exec);
    let told = [
        (0x1030, 0x1030, 1),
        (0x1032, 0x1032, 1),
        (0x1034, 0x1034, 1),
        (0x1036, 0x1036, 1),
        (0x1031, 0x1031, 2),
        (0x1033, 0x1033, 2),
        (0x1035, 0x1035, 2),
        (0x1037, 0x103f, 2),
    ];
    for room in 0..10 {
        let answer = s.ask_walk(&dry(1, 1), room);
        assert_eq!(answer.told, told[..told.len().min(room as usize)]);
        assert_eq!(answer.counts.told, 8);
    }
    // A room that is not a whole number of them.
    let head = s.guest.walk_request(&dry(1, 1).bytes(), 120 + 2 * 24 + 23);
    s.front_end.kick(2);
    assert_eq!(s.guest.walk_answer(head).told, told[..2]);
    assert_eq!(s.ask_walk(&dry(0, 1), 9).told, told[..4]);
    assert_eq!(s.ask_walk(&dry(1, 0), 9).told, told[4..]);
    assert_eq!(s.ask_walk(&dry(0, 0), 9).counts.told, 0);

    // Refused with the entry that has the first of them; what is asked for is told all the same.
    let two = |unmapped, write_exec| {
        let request = KernelRequest::new(&[(0x1010, 0x101f, BOTH), (0x1030, 0x103f, BOTH)]);
        request.policy(unmapped, write_exec)
    };
    for (unmapped, write_exec, told) in [(2, 0, 0), (0, 2, 0), (2, 2, 0), (1, 2, 4), (2, 1, 4)] {
        let answer = s.ask_walk(&two(unmapped, write_exec), 9);
        assert_eq!(answer.outcome(), (EACCES, 1));
        assert_eq!((answer.value, answer.counts.write_exec), (0, 4));
        assert_eq!((answer.told.len(), answer.counts.told), (told, told as u64));
    }
    s.vm_guard.assert_silent();

    let counts = enforce(
        &mut s,
        &KernelRequest::new(&[(0x1036, 0x103f, NOWRITE | NOEXEC_KERNEL << 8)]).policy(3, 0),
        &[(0x1037, 0x103f, NOWRITE | NOEXEC_KERNEL << 8)],
        1,
    );
    assert_eq!((counts.given, counts.ranges, counts.unmapped), (9, 1, 9));
}

/// Where the entry for a frame of [`map_kernel`] is: its tables are made in this order.
fn leaf_at(gfn: u64) -> u64 {
    (0x103 << 12) + 8 * (gfn & 0x1ff)
}

#[test]
fn a_page_that_two_mappings_write_and_execute_gets_nothing() {
    let mut s = mapped();
    let mut tables = map_kernel(&s.guest);
    // Data, by a second way, and constants by two that are as good as the first.
    tables.map(&s.guest, KERNEL + (7 << 39), 0x1020, P);
    tables.map(&s.guest, KERNEL + (8 << 39), 0x1010, P | NX);
    let answer = s.ask_walk(&all().flags(F_DRY_RUN).policy(0, 1), 9);
    assert_eq!(answer.told, [(0x1020, 0x1020, 1), (0x1030, 0x1037, 1)]);
    assert_eq!((answer.counts.write_exec, answer.counts.given), (9, 47));
    // By addresses that are not asked about it does not count.
    let request = KernelRequest {
        va_end: KERNEL + (7 << 39) - 1,
        ..all().flags(F_DRY_RUN)
    };
    assert_eq!(s.ask_walk(&request, 0).counts.write_exec, 8);
}

#[test]
fn tables_outside_of_memory_and_entries_with_reserved_bits_are_counted() {
    let mut s = mapped();
    // A large page that is not aligned, address bits that there are not, a table behind memory.
    s.guest
        .write((0x102 << 12) + 8 * 100, 0x20_1000 << 1 | PS | P | W | U);
    s.guest.write(leaf_at(0x1020), 1u64 << 45 | P);
    let reserved = s.ask_walk(&all().flags(F_DRY_RUN), 0).counts;
    assert_eq!(
        (reserved.reserved, reserved.mappings, reserved.unmapped),
        (2, 56, 9)
    );
    s.guest
        .write((0x102 << 12) + 8 * 101, guest::RAM_SIZE | P | W | U);
    let dry = s.ask_walk(&all().flags(F_DRY_RUN), 0);
    assert_eq!((dry.status, dry.counts.outside), (0, 1));
    let real = s.ask_walk(&all(), 0);
    assert_eq!(real.outcome(), (EFAULT, NO_INDEX));
    assert_eq!(real.counts, dry.counts);
    // It comes before what the policy says.
    let refused = s.ask_walk(&all().policy(2, 2), 0);
    assert_eq!(refused.outcome(), (EFAULT, NO_INDEX));
    let dry = s.ask_walk(&all().policy(2, 2).flags(F_DRY_RUN), 0);
    assert_eq!(dry.outcome(), (EACCES, 0));
    for root in [guest::RAM_SIZE, 0xff_ffff_f000] {
        let request = KernelRequest { root, ..all() };
        for flags in [0, F_DRY_RUN] {
            let answer = s.ask_walk(&request.clone().flags(flags), 9);
            assert_eq!(answer, Answer::nothing_but(EFAULT, NO_INDEX));
        }
    }
    s.vm_guard.assert_silent();
}

#[test]
fn a_table_in_a_page_that_may_not_be_read_is_as_good_as_not_there() {
    let mut s = mapped();
    s.carry_out(
        PROTECT,
        &[(0x103, 0x103, NOREAD), (0x102, 0x102, NOWRITE)],
        2,
    );
    assert_eq!(s.ask_walk(&all(), 0).outcome(), (EFAULT, NO_INDEX));
    let dry = s.ask_walk(&all().flags(F_DRY_RUN), 0);
    assert_eq!((dry.counts.outside, dry.counts.unmapped), (1, 64));
    s.carry_out(PROTECT, &[(0x103, 0x103, 0), (0x100, 0x100, NOREAD)], 2);
    let root = s.ask_walk(&all().flags(F_DRY_RUN), 0);
    assert_eq!(root, Answer::nothing_but(EFAULT, NO_INDEX));
    s.vm_guard.assert_silent();
}

#[test]
fn entries_with_attributes_have_to_be_guest_memory() {
    let mut s = mapped();
    let end = guest::RAM_SIZE >> 12;
    for (range, fits) in [
        ((end - 1, end - 1, 1), true),
        ((0, end - 1, 1), true),
        ((end - 1, end, 1), false),
        ((end, end, 1), false),
        ((0, TOP, 1), false),
        ((TOP, TOP, 1), false),
        ((0, TOP, 0), true),
    ] {
        let entries = [(0x1000, 0x1000, NOWRITE), range];
        let request = KernelRequest::new(&entries).flags(F_DRY_RUN);
        let answer = s.ask_walk(&request, 0);
        if fits {
            assert_eq!(answer.outcome(), (0, NO_INDEX), "{range:x?}");
        } else {
            assert_eq!(answer, Answer::nothing_but(EINVAL, 1), "{range:x?}");
        }
        // Before what is found of tables.
        let root = guest::RAM_SIZE;
        let status = s.ask_walk(&KernelRequest { root, ..request }, 0).status;
        assert_eq!(status, if fits { EFAULT } else { EINVAL });
    }
}

#[test]
fn regions_side_by_side_are_one_and_a_hole_is_none() {
    let mut s = mapped();
    let regions = regions(&s.guest);
    let mut parts = vec![regions[0]; 3];
    let at = |part: &mut vhost::VhostUserMemoryRegionInfo, from: u64, to: u64| {
        part.guest_phys_addr = from;
        part.memory_size = to - from;
        part.userspace_addr += from;
        part.mmap_offset += from;
    };
    at(&mut parts[0], 0, 0x101_8000);
    at(&mut parts[1], 0x101_8000, 0x180_0000);
    at(&mut parts[2], 0x180_1000, guest::RAM_SIZE);
    use vhost::VhostBackend;
    s.front_end.frontend.set_mem_table(&parts).unwrap();
    assert_eq!(s.ask_walk(&all().flags(F_DRY_RUN), 0).counts, COUNTS);
    for (range, status) in [
        ((0x1000, 0x17ff, 1), 0),
        ((0x17ff, 0x1800, 1), EINVAL),
        ((0x1800, 0x1800, 1), EINVAL),
        ((0x17ff, 0x1801, 1), EINVAL),
        ((0x1801, 0x1fff, 1), 0),
    ] {
        let request = KernelRequest::new(&[range]).flags(F_DRY_RUN);
        assert_eq!(s.ask_walk(&request, 0).status, status, "{range:x?}");
    }
}

#[test]
fn more_ranges_than_fit_into_one_request_are_eoverflow_and_told() {
    let mut hello = hello_with(ALL, ALL, 1);
    hello[36..40].copy_from_slice(&3u32.to_le_bytes());
    let mut s = mapped_on(&hello);
    s.carry_out(PROTECT, &[(0x1033, 0x1033, NOREAD)], 1);
    assert_eq!(
        s.ask_walk(&all(), 0).outcome(),
        (EOVERFLOW, NO_INDEX),
        "what is freed counts"
    );
    assert_eq!(s.ask_walk(&all(), 0).counts, COUNTS);
    s.carry_out(PROTECT, &[(0x1033, 0x1033, 0)], 0);
    s.guest.write(leaf_at(0x1018), 0x1018u64 << 12 | P);
    for flags in [0, F_LOCK] {
        let answer = s.ask_walk(&all().flags(flags), 0);
        assert_eq!(answer.outcome(), (EOVERFLOW, NO_INDEX));
        assert_eq!((answer.value, answer.counts.ranges), (0, 5));
        let dry = s.ask_walk(&all().flags(flags | F_DRY_RUN), 0);
        assert_eq!((dry.outcome(), dry.counts), ((0, NO_INDEX), answer.counts));
    }
    s.vm_guard.assert_silent();
    s.guest.write(leaf_at(0x1018), 0x1018u64 << 12 | P | NX);
    enforce(&mut s, &all(), &GIVEN, 3);
    let many = KernelRequest::new(&[(1, 1, 1); 4]);
    assert_eq!(s.ask_walk(&many, 0), Answer::nothing_but(E2BIG, NO_INDEX));
}

#[test]
fn tables_beyond_all_measure_are_eoverflow_with_nothing_told() {
    let mut s = Setup::walks();
    // Frames in no order that joins: two million leaves, of which no two go together.
    let (root, directories, leaves) = (0x100u64, 0x102u64, 0x800u64);
    s.guest
        .write((root << 12) + 8 * 256, 0x101u64 << 12 | P | W);
    for n in 0..8 {
        s.guest
            .write((0x101 << 12) + 8 * n, (directories + n) << 12 | P | W);
    }
    for table in 0..4096u64 {
        let at = (directories << 12) + 8 * table;
        s.guest.write(at, (leaves + table) << 12 | P | W);
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|n| ((2 * (512 * table + n)) << 12 | P).to_le_bytes())
            .collect();
        s.guest.write_bytes((leaves + table) << 12, &entries);
    }
    // The request lies behind that.
    let bytes = KernelRequest::new(&[(0, 0x1fff, BOTH)])
        .flags(F_DRY_RUN)
        .bytes();
    let at = 0x1f0_0000;
    s.guest.write_bytes(at, &bytes);
    let parts = [(at, bytes.len() as u32, 0), (at + 0x1000, 120, WRITE)];
    s.guest.write_chain(2, 0, &parts);
    s.guest.publish(2, 0);
    s.front_end.kick(2);
    assert_eq!(s.guest.used(2), Used { head: 0, len: 120 });
    let answer = Answer::read(&s.guest, at + 0x1000, 120);
    assert_eq!(answer, Answer::nothing_but(EOVERFLOW, NO_INDEX));
}

#[test]
fn what_the_host_cannot_enforce_or_was_not_negotiated_cannot_be_asked_for() {
    let mut s = mapped_on(&hello_payload(NOWRITE, 1));
    assert_eq!(s.front_end.features & F_KERNEL, F_KERNEL);
    for bits in [BOTH, NOEXEC_KERNEL, NOWRITE << 8] {
        let request = KernelRequest::new(&[(1, 1, NOWRITE), (1, 1, bits)]);
        let answer = s.ask_walk(&request, 0);
        assert_eq!(answer, Answer::nothing_but(EOPNOTSUPP, 1), "{bits:#x}");
    }
    let only = KernelRequest::new(&[(0x1000, 0x103f, NOWRITE)]);
    enforce(&mut s, &only, &[(0x1000, 0x101f, NOWRITE)], 1);

    let s = mapped_on(&hello_with(NOEXEC_KERNEL, ALL, 1));
    assert_eq!(
        s.front_end.features & F_KERNEL,
        0,
        "offered with NOWRITE only"
    );

    let companion = Companion::start();
    let guest = Guest::new();
    let vm_guard = VmGuard::connect_as(&companion, &hello_with(ALL, ALL, 1), &[]);
    let mut front_end = FrontEnd::connect_with(&companion, &guest, !F_KERNEL);
    front_end.start(2, &guest, 0);
    let mut s = Setup {
        front_end,
        vm_guard,
        guest,
        companion,
    };
    assert_eq!(s.front_end.features & F_NOWRITE, F_NOWRITE);
    let answer = s.ask_walk(&all(), 0);
    assert_eq!(answer, Answer::nothing_but(EOPNOTSUPP, NO_INDEX));
}

#[test]
fn each_queue_takes_its_own_requests_only() {
    let mut s = mapped();
    let on_control = [all().bytes(), request(PROTECT_KERNEL, 0, 1, &[(1, 1, 1)])];
    for bytes in on_control {
        assert_eq!(s.ask(&bytes), refused(EOPNOTSUPP, NO_INDEX));
    }
    for kind in (0..9).chain([10, 0x900, 0xffff]) {
        let answer = s.ask_walk(&KernelRequest { kind, ..all() }, 0);
        assert_eq!(answer, Answer::nothing_but(EOPNOTSUPP, NO_INDEX), "{kind}");
        let head = s
            .guest
            .walk_request(&request(kind, 0, 1, &[(1, 1, 1)]), 120);
        s.front_end.kick(2);
        assert_eq!(s.guest.walk_answer(head).status, EOPNOTSUPP, "{kind}");
    }
    // On queue 2, an answer has 120 bytes.
    let (ok, refused) = requests(&s);
    for room in [0, 16, 119] {
        let head = s.guest.walk_request(&all().bytes(), room);
        s.front_end.kick(2);
        assert_eq!(s.guest.used(2), Used { head, len: 0 });
    }
    assert_eq!(s.front_end.config().malformed(), 3);
    assert_eq!(s.ask_walk(&all().flags(F_DRY_RUN), 0).status, 0);
    let too_short = s.guest.walk_request(&all().bytes()[..7], 120);
    s.front_end.kick(2);
    assert_eq!(s.guest.walk_answer(too_short).outcome(), (EINVAL, NO_INDEX));
    assert_eq!(requests(&s), (ok + 1, refused + 1));
    s.vm_guard.assert_silent();
    s.assert_works();
}

/// Requests answered with status 0, and with another.
fn requests(s: &Setup) -> (u64, u64) {
    let status = s.companion.status();
    let counter = |name: &str| status["counters"][name].as_u64().unwrap();
    (counter("requests_ok"), counter("requests_refused"))
}

#[test]
fn requests_are_answered_in_their_order() {
    let mut s = mapped();
    let heads = [
        s.guest.walk_request(&all().bytes(), 120),
        s.guest
            .walk_request(&KernelRequest { levels: 3, ..all() }.bytes(), 120),
        s.guest.walk_request(&all().flags(F_DRY_RUN).bytes(), 120),
        s.guest.walk_request(&all().flags(F_LOCK).bytes(), 120),
    ];
    s.front_end.kick(2);
    let protect = s.vm_guard.protect();
    assert_eq!(protect.ranges, GIVEN);
    assert_eq!(s.guest.try_used(2), None);
    s.vm_guard.done(protect.seq, 3);
    for (head, status) in heads.into_iter().zip([0, EINVAL, 0]) {
        assert_eq!(s.guest.walk_answer(head).status, status);
    }
    let lock = s.vm_guard.protect();
    assert_eq!(lock.ranges, locked(&GIVEN));
    s.vm_guard.done(lock.seq, 3);
    assert_eq!(s.guest.walk_answer(heads[3]).status, 0);
}

#[test]
fn one_order_is_under_way_at_a_time_and_a_query_sees_those_of_both_queues() {
    let mut s = mapped();
    let walk = s.walk(&all(), 0);
    let protect = s.vm_guard.protect();
    let lock = s.guest.lock(&[(0x10, 0x10, NOWRITE)]);
    s.front_end.kick(0);
    s.front_end.config();
    s.vm_guard.assert_silent();
    s.vm_guard.done(protect.seq, 3);
    assert_eq!(s.guest.walk_answer(walk).status, 0);
    let order = s.vm_guard.protect();
    assert_eq!(order.ranges, [(0x10, 0x10, NOWRITE | IMMUTABLE)]);
    s.vm_guard.done(order.seq, 4);
    assert_eq!(s.guest.response(lock), OK);
    assert_eq!(s.holds().len(), 4);
}

#[test]
fn a_queue_that_stops_gives_its_request_back_and_it_is_answered_once() {
    let mut s = mapped();
    let head = s.walk(&all(), 0);
    // Whatever it is about just now, and then with its order under way.
    for _ in 0..20 {
        assert_eq!(s.front_end.stop(2), 0);
        s.front_end.start(2, &s.guest, 0);
    }
    let mut protect = s.vm_guard.protect();
    assert_eq!(s.front_end.stop(2), 0);
    s.front_end.start(2, &s.guest, 0);
    // As often as an order was sent and nobody was left to be told.
    loop {
        assert_eq!(protect.ranges, GIVEN);
        s.vm_guard.done(protect.seq, 3);
        let answered = wait_for("an answer or another PROTECT", || {
            if s.guest.used_idx(2) == 1 {
                return Some(true);
            }
            s.vm_guard.has_input().then_some(false)
        });
        if answered {
            break;
        }
        protect = s.vm_guard.protect();
    }
    assert_eq!(s.guest.walk_answer(head).status, 0);
    s.front_end.kick(2);
    s.front_end.config();
    assert_eq!(s.guest.used_idx(2), 1, "answered twice");
    s.assert_works();
}

#[test]
fn a_device_reset_drops_what_waits() {
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;

    let mut s = mapped();
    let head = s.walk(&all(), 0);
    let protect = s.vm_guard.protect();
    s.front_end.frontend.reset_device().unwrap();
    s.vm_guard.done(protect.seq, 3);
    wait_for("the late RESULT", || {
        (s.front_end.config().ranges_in_force() == 3).then_some(())
    });
    assert_eq!(s.guest.used_idx(2), 0, "the driver that asked is gone");
    // A ring that is only enabled again has what was not answered, asked by a driver that has
    // negotiated less.
    let features = s.front_end.features | 1 << 30;
    let less = features & !F_KERNEL;
    s.front_end.frontend.set_features(less).unwrap();
    s.front_end.frontend.set_vring_enable(2, true).unwrap();
    let answer = s.guest.walk_answer(head);
    assert_eq!(answer, Answer::nothing_but(EOPNOTSUPP, NO_INDEX));
    // The next driver begins with an empty ring.
    s.front_end.stop(2);
    s.guest.write(s.guest.used_at(2) + 2, 0u16);
    s.guest.queues[2].used = 0;
    s.guest.queues[2].avail = 0;
    s.guest.write_avail_idx(2, 0);
    s.front_end.frontend.set_features(features).unwrap();
    s.front_end.start(2, &s.guest, 0);
    let answer = s.ask_walk(&all().flags(F_DRY_RUN | F_LOCK).policy(0, 1), 1);
    assert_eq!((answer.status, answer.told.len()), (0, 1));
    assert_eq!(s.guest.used_idx(2), 1);
    assert_eq!(s.front_end.config().ranges_in_force(), 3);
}

#[test]
fn a_system_reset_answers_estale_to_what_waits() {
    let mut s = mapped();
    let heads = [all(), all().flags(F_LOCK), all().flags(F_DRY_RUN)]
        .map(|request| s.guest.walk_request(&request.bytes(), 120));
    s.front_end.kick(2);
    let stale = s.vm_guard.protect();
    s.vm_guard.reset();
    for head in heads {
        let answer = s.guest.walk_answer(head);
        assert_eq!(answer, Answer::nothing_but(ESTALE, NO_INDEX));
    }
    s.vm_guard.result(stale.seq, 0, NO_INDEX);
    s.start_anew(0);
    s.start_anew(2);
    let head = s.walk(&all(), 0);
    let protect = s.vm_guard.protect();
    assert_eq!(protect.generation, 2);
    s.vm_guard.done(protect.seq, 3);
    let answer = s.guest.walk_answer(head);
    assert_eq!((answer.status, answer.value), (0, 2));
    assert_eq!(s.holds(), GIVEN);
}

#[test]
fn an_order_under_way_when_the_channel_drops_is_sent_again() {
    let mut s = mapped();
    let head = s.walk(&all(), 0);
    let before = s.vm_guard.protect();
    let hello = hello_with(ALL, ALL, 1);
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.vm_guard = VmGuard::connect_as(&s.companion, &hello, &[]);
    let again = s.vm_guard.protect();
    assert_ne!(again.seq, before.seq);
    assert_eq!(again.ranges, before.ranges);
    // This time it had been carried out, so there is nothing left to ask for.
    s.vm_guard.stream.shutdown(Shutdown::Both).unwrap();
    s.vm_guard = VmGuard::connect_as(&s.companion, &hello, &GIVEN);
    let answer = s.guest.walk_answer(head);
    assert_eq!((answer.outcome(), answer.counts), ((0, NO_INDEX), COUNTS));
    s.vm_guard.assert_silent();
}

#[test]
fn a_companion_that_is_killed_loses_no_request_and_answers_none_twice() {
    let mut s = mapped();
    let heads = [all(), all().flags(F_DRY_RUN), all().flags(F_LOCK)]
        .map(|request| s.guest.walk_request(&request.bytes(), 120));
    s.front_end.kick(2);
    // The first is with QEMU; later it is killed whatever it is about.
    s.vm_guard.protect();
    let Setup {
        mut companion,
        mut guest,
        mut front_end,
        mut vm_guard,
    } = s;
    for _ in 0..3 {
        companion = companion.kill_and_restart();
        drop(front_end);
        vm_guard = VmGuard::connect_as(&companion, &hello_with(ALL, ALL, 1), &[]);
        front_end = FrontEnd::connect(&companion, &guest);
        front_end.start(2, &guest, guest.used_idx(2));
    }
    let protect = vm_guard.protect();
    assert_eq!(protect.ranges, GIVEN);
    vm_guard.done(protect.seq, 3);
    assert_eq!(guest.walk_answer(heads[0]).counts, COUNTS);
    assert_eq!(guest.walk_answer(heads[1]).counts, COUNTS);
    let lock = vm_guard.protect();
    vm_guard.done(lock.seq, 3);
    assert_eq!(guest.walk_answer(heads[2]).status, 0);
    front_end.kick(2);
    front_end.config();
    assert_eq!(guest.used_idx(2), 3, "answered twice");
}

#[test]
fn there_is_one_thread_that_walks_and_none_before_the_first() {
    let mut s = mapped();
    let walkers = |s: &Setup| {
        let tasks = fs::read_dir(format!("/proc/{}/task", s.companion.pid())).unwrap();
        let names =
            tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap());
        names.filter(|name| name.trim() == "guard-walk").count()
    };
    s.assert_works();
    assert_eq!(walkers(&s), 0);
    for _ in 0..3 {
        s.ask_walk(&all().flags(F_DRY_RUN), 0);
        s.front_end.stop(2);
        let used = s.guest.used_idx(2);
        s.front_end.start(2, &s.guest, used);
        assert_eq!(walkers(&s), 1);
    }
}

#[test]
fn a_guest_that_asks_again_and_again_floods_no_log() {
    let mut s = mapped();
    for _ in 0..50 {
        s.ask_walk(&all().flags(F_DRY_RUN), 0);
        s.ask_walk(
            &KernelRequest {
                root: guest::RAM_SIZE,
                ..all()
            },
            0,
        );
    }
    assert!(
        s.companion.log_lines("PROTECT_KERNEL") < 40,
        "the log is flooded"
    );
}
