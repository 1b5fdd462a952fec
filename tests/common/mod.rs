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
pub mod kernel;
pub mod msr;
pub mod owner;
pub mod qmp;
pub mod tables;
pub mod vm_guard;

use std::thread;
use std::time::{Duration, Instant};

pub use companion::Companion;
pub use front_end::FrontEnd;
pub use guest::{Guest, Response};
pub use vm_guard::VmGuard;

pub const DEADLINE: Duration = Duration::from_secs(20);

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const E2BIG: u32 = 7;
pub const EACCES: u32 = 13;
pub const EFAULT: u32 = 14;
pub const EBUSY: u32 = 16;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;
pub const EOPNOTSUPP: u32 = 95;
pub const ESTALE: u32 = 116;
pub const NO_INDEX: u32 = u32::MAX;
pub const IMMUTABLE: u64 = 1 << 63;
pub const NOWRITE: u64 = 1;
pub const NOEXEC: u64 = 2;
pub const NOREAD: u64 = 4;
pub const NOEXEC_KERNEL: u64 = 8;
pub const AUDIT_NOWRITE: u64 = 0x100;
pub const ALL: u64 = 0xf;
/// The highest frame number.
pub const TOP: u64 = (1 << 52) - 1;

/// The answer to an order that is in force in generation 1.
pub const OK: Response = Response {
    status: 0,
    index: NO_INDEX,
    value: 1,
};

pub fn refused(status: u32, index: u32) -> Response {
    Response {
        status,
        index,
        value: 0,
    }
}

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
        Self::on(Companion::start(), &vm_guard::hello_payload(NOWRITE, 1))
    }

    /// A VM that can deny and watch everything.
    pub fn able() -> Self {
        Self::on(Companion::start(), &vm_guard::hello_with(ALL, ALL, 1))
    }

    /// A VM that can have 100 ranges of MSRs, and no filter that could be full.
    pub fn msrs() -> Self {
        let hello = vm_guard::hello_msrs(100, u32::MAX, vm_guard::NO_POLICY);
        Self::on(Companion::start(), &hello)
    }

    pub fn on(companion: Companion, hello: &[u8]) -> Self {
        let vm_guard = VmGuard::connect_as(&companion, hello, &[]);
        Self::with(companion, vm_guard)
    }

    pub fn with(companion: Companion, vm_guard: VmGuard) -> Self {
        let guest = Guest::new();
        let front_end = FrontEnd::connect(&companion, &guest);
        Self {
            front_end,
            vm_guard,
            guest,
            companion,
        }
    }

    /// A VM that can do everything, with a queue "walk" that runs.
    pub fn walks() -> Self {
        let mut setup = Self::able();
        setup.front_end.start(2, &setup.guest, 0);
        setup
    }

    /// The guest stops a queue and starts it again, as all do after a reset of the VM.
    pub fn start_anew(&mut self, queue: usize) {
        let base = self.front_end.stop(queue);
        self.front_end.start(queue, &self.guest, base);
    }

    /// Makes a request of queue 2 with room for so many ranges, and kicks. Returns the head.
    pub fn walk(&mut self, request: &kernel::KernelRequest, told: u32) -> u16 {
        let head = self.guest.walk_request(&request.bytes(), 120 + 24 * told);
        self.front_end.kick(2);
        head
    }

    /// The same, with the answer, for what is answered without the vm-guard.
    pub fn ask_walk(&mut self, request: &kernel::KernelRequest, told: u32) -> kernel::Answer {
        let head = self.walk(request, told);
        self.guest.walk_answer(head)
    }

    /// Has a request carried out that comes to so many ranges in force.
    pub fn carry_out(&mut self, kind: u16, ranges: &[(u64, u64, u64)], in_force: u32) {
        let bytes = guest::request(kind, 0, ranges.len() as u32, ranges);
        let head = self.guest.request(&bytes);
        self.front_end.kick(0);
        let seq = if kind == guest::SEAL {
            self.vm_guard.seal().0
        } else {
            self.vm_guard.protect().seq
        };
        self.vm_guard.done(seq, in_force);
        assert_eq!(self.guest.response(head).status, 0);
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

    /// Makes a request that is answered without the vm-guard.
    pub fn ask(&mut self, bytes: &[u8]) -> Response {
        let head = self.guest.request(bytes);
        self.front_end.kick(0);
        self.guest.response(head)
    }

    pub fn protect(&mut self, ranges: &[vm_guard::Range]) -> Response {
        self.ask(&guest::request(
            guest::PROTECT,
            0,
            ranges.len() as u32,
            ranges,
        ))
    }

    /// A query with room for so many ranges: how many there are, and those told.
    pub fn query(&mut self, start: u64, end: u64, room: u32) -> (u64, Vec<vm_guard::Range>) {
        let head = self
            .guest
            .request_with_room(&guest::query_request(start, end), 16 + 24 * room);
        self.front_end.kick(0);
        self.guest.query_response(head)
    }

    pub fn holds(&mut self) -> Vec<vm_guard::Range> {
        let (count, ranges) = self.query(0, TOP, 100);
        assert_eq!(count, ranges.len() as u64);
        ranges
    }
}
