// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Arbitrary bytes as a guest's memory and registers, and what must be true of its page tables
//! whatever they are. For the fuzz target, and for a test on random bytes.

use std::ops::ControlFlow;

use vhost_guard::paging::{
    Counts, Levels, Limits, Paging, Policy, Rights, Space, Unmapped, WriteExec, collective, plan,
    walk,
};
use vhost_guard::protect::{Attributes, Deny, GfnRange, Protection};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Pages of memory, the last of them only half there.
const PAGES: usize = 8;
const HEADER: usize = 20;
/// Bytes that become one entry: where it is (2), which frame it names (2), its flags (2).
const ENTRY: usize = 6;
const LIMITS: Limits<'static> = Limits {
    entries: 1 << 16,
    ranges: 1 << 16,
    cancel: None,
    progress: None,
};

/// Fails if something is wrong.
pub(crate) fn run(input: &[u8]) {
    let Some((header, entries)) = input.split_at_checked(HEADER) else {
        return;
    };
    let bits = header[0];
    let paging = Paging {
        levels: if bits & 1 == 0 {
            Levels::Four
        } else {
            Levels::Five
        },
        nxe: bits & 2 == 0,
        wp: bits & 4 == 0,
        smep: bits & 8 == 0,
        shadow_stacks: bits & 16 != 0,
        gib_pages: bits & 32 == 0,
        physical_bits: 32 + header[1] % 24,
    };
    let memory = memory(entries);
    let root = u64::from(header[2] % 9) << 12 | u64::from(header[3] == 1);
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let whole = bits & 64 == 0;
    let vas = if whole {
        0..=u64::MAX
    } else {
        number(4) & !0xfff..=number(12) | 0xfff
    };
    let Ok(space) = Space::new(paging, root, vas) else {
        return;
    };

    let mut highest = None;
    let mut seen = Counts::default();
    let mut rights = Vec::new();
    let walked = walk(&memory, &space, &LIMITS, |mapping| {
        assert!(mapping.size > 0 && mapping.size <= 1 << (3 + 9 * mapping.level));
        assert!((mapping.va | mapping.pa | mapping.size) & 0xfff == 0);
        assert!(mapping.pa + (mapping.size - 1) < 1 << paging.physical_bits);
        assert!(
            highest.is_none_or(|highest| highest < mapping.va),
            "in order"
        );
        highest = Some(mapping.va + (mapping.size - 1));
        seen.mappings[usize::from(mapping.level) - 1] += 1;
        rights.push((mapping.pa >> 12, mapping.rights));
        ControlFlow::Continue(())
    });
    let Ok(found) = collective(&memory, &space, &LIMITS) else {
        // It reads no table that the walk does not, or the same number of times.
        assert!(walked.is_err());
        return;
    };
    let mut before: Option<GfnRange> = None;
    for (frames, rights) in found.iter() {
        assert!(rights.contains(Rights::READ));
        assert!(before.is_none_or(|before| before.end() < frames.start()));
        before = Some(frames);
    }
    if let Ok(walked) = walked {
        seen.reserved = walked.counts.reserved;
        seen.outside = walked.counts.outside;
        assert_eq!(walked.counts, seen);
        assert_eq!(found.counts(), &seen);
        for (frame, rights) in rights {
            assert!(found.get(frame).contains(rights));
        }
    }

    let both = Deny::NOWRITE | Deny::NOEXEC_KERNEL;
    let ram = Protection {
        range: GfnRange::new(0, PAGES as u64 - 1).expect("in order"),
        attributes: Attributes::new(both, Deny::empty()),
    };
    let policy = Policy {
        unmapped: Unmapped::Deny,
        write_exec: WriteExec::Report,
    };
    let plan = plan(&found, &[ram, ram], policy);
    assert_eq!(plan.counts.pages, PAGES as u64);
    for piece in plan.given() {
        assert_eq!(piece.entry, 1);
        for frame in piece.range.start().number()..=piece.range.end().number() {
            let rights = found.get(frame);
            let denied = piece.attributes.deny();
            assert_eq!(
                denied.contains(Deny::NOWRITE),
                !rights.contains(Rights::WRITE)
            );
        }
    }
}

fn memory(entries: &[u8]) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGES * 4096 - 2048)])
        .expect("a few pages can be mapped");
    for entry in entries.chunks_exact(ENTRY) {
        let at =
            u64::from(u16::from_le_bytes([entry[0], entry[1]])) * 8 % (PAGES as u64 * 4096 - 2048);
        let [low, high, flags, more] = [2, 3, 4, 5].map(|n: usize| u64::from(entry[n]));
        // Mostly small frame numbers, so that tables lead to tables; sometimes any bit.
        let address = match high >> 5 {
            0..=5 => (low & 15) << 12,
            6 => (low | (high & 31) << 8) << 18,
            _ => 1 << (12 + low % 40),
        };
        // Present, most often; R/W, U/S, PS and NX as they come.
        let flags = flags | u64::from(flags & 0x18 != 0) | (more & 7) << 9 | (more >> 3) << 59;
        memory
            .write_obj((address | flags).to_le(), GuestAddress(at))
            .expect("inside of memory");
    }
    memory
}
