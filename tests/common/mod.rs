// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Doubles of everything around the companion, which itself is the real program: a guest with its
//! driver, QEMU's vhost-user front end, QEMU's vm-guard object.
//!
//! No double waits for a time: each waits for what it expects, and panics at a deadline.

// Each test program uses a part of this.
#![allow(dead_code, unused_imports, unreachable_pub, missing_docs)]

pub mod companion;
pub mod front_end;
pub mod guest;
pub mod vm_guard;

use std::thread;
use std::time::{Duration, Instant};

pub use companion::Companion;
pub use front_end::FrontEnd;
pub use guest::{Guest, Response};
pub use vm_guard::VmGuard;

pub const DEADLINE: Duration = Duration::from_secs(20);

pub const EIO: u32 = 5;
pub const E2BIG: u32 = 7;
pub const EFAULT: u32 = 14;
pub const EBUSY: u32 = 16;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOPNOTSUPP: u32 = 95;
pub const ESTALE: u32 = 116;
pub const NO_INDEX: u32 = u32::MAX;
pub const IMMUTABLE: u64 = 1 << 63;
pub const NOWRITE: u64 = 1;

/// Asks `what` until it has an answer.
pub fn wait_for<T>(name: &str, mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = what() {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain for {name}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A companion with a vm-guard and a front end whose rings run.
pub struct Setup {
    pub front_end: FrontEnd,
    pub vm_guard: VmGuard,
    pub guest: Guest,
    pub companion: Companion,
}

impl Setup {
    pub fn new() -> Self {
        let companion = Companion::start();
        let guest = Guest::new();
        let vm_guard = VmGuard::connect(&companion);
        let front_end = FrontEnd::connect(&companion, &guest);
        Self {
            front_end,
            vm_guard,
            guest,
            companion,
        }
    }

    /// Locks one page and answers for the vm-guard: everything works.
    pub fn assert_works(&mut self) {
        let head = self.guest.lock(&[(0x777, 0x777, NOWRITE)]);
        self.front_end.kick(0);
        let protect = self.vm_guard.protect();
        assert_eq!(protect.ranges, [(0x777, 0x777, NOWRITE | IMMUTABLE)]);
        self.vm_guard.succeed(&protect);
        assert_eq!(self.guest.response(head).status, 0);
    }
}
