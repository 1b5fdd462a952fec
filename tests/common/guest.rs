// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest: its memory and the driver's side of three split virtqueues, without a device.
//!
//! It outlives companions, as a real one does.

use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::kernel::Answer;
use super::wait_for;

pub const RAM_SIZE: u64 = 32 << 20;
pub const QUEUE_SIZE: u16 = 64;
pub const WRITE: u16 = 2;
pub const NEXT: u16 = 1;
pub const INDIRECT: u16 = 4;

pub const LOCK: u16 = 1;
pub const PROTECT: u16 = 2;
pub const SEAL: u16 = 3;
pub const QUERY: u16 = 4;
pub const MSR_LOCK: u16 = 5;
pub const MSR_PROTECT: u16 = 6;
pub const MSR_BITMAP: u16 = 7;
pub const MSR_QUERY: u16 = 8;
pub const PROTECT_KERNEL: u16 = 9;

pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub queues: [Queue; 3],
    used_heads: Vec<u16>,
}

/// What the driver knows of a queue.
pub struct Queue {
    pub base: u64,
    pub avail: u16,
    pub used: u16,
    next_slot: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u32,
    pub index: u32,
    pub value: u64,
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub len: u32,
}

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

const SLOT_SIZE: u64 = 128 << 10;
const SLOTS: u64 = 0x40_0000;
/// The same for requests of queue 2.
const WALK_SLOTS: u64 = 0x80_0000;
const RESPONSE_AT: u64 = SLOT_SIZE - 0x1000;

impl Guest {
    pub fn new() -> Self {
        let memfd: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, RAM_SIZE).unwrap();
        let file = FileOffset::new(memfd.into(), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            RAM_SIZE as usize,
            Some(file),
        )])
        .unwrap();
        Self::starting_on(memory)
    }

    /// A driver that starts on this memory, with empty rings.
    pub fn starting_on(memory: GuestMemoryMmap) -> Self {
        let queue = |base| Queue {
            base,
            avail: 0,
            used: 0,
            next_slot: 0,
        };
        let guest = Self {
            memory,
            queues: [queue(0x10000), queue(0x20000), queue(0x38000)],
            used_heads: Vec::new(),
        };
        for queue in 0..3 {
            guest.write_bytes(guest.queues[queue].base, &[0; 0x3000]);
        }
        guest
    }

    pub fn descriptors_at(&self, queue: usize) -> u64 {
        self.queues[queue].base
    }

    pub fn avail_at(&self, queue: usize) -> u64 {
        self.queues[queue].base + 0x1000
    }

    pub fn used_at(&self, queue: usize) -> u64 {
        self.queues[queue].base + 0x2000
    }

    pub fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn write_bytes(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn write_descriptor(&self, table: u64, index: u16, (addr, len, flags, next): Descriptor) {
        let at = table + 16 * u64::from(index);
        self.write(at, addr);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Puts descriptors into the queue's table from `head` on, chained.
    pub fn write_chain(&self, queue: usize, head: u16, parts: &[(u64, u32, u16)]) {
        let table = self.descriptors_at(queue);
        for (i, &(addr, len, flags)) in parts.iter().enumerate() {
            let index = head + i as u16;
            let chained = if i + 1 < parts.len() { NEXT } else { 0 };
            self.write_descriptor(table, index, (addr, len, flags | chained, index + 1));
        }
    }

    /// Makes a chain available.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let avail = self.avail_at(queue);
        let q = &mut self.queues[queue];
        let slot = u64::from(q.avail % QUEUE_SIZE);
        q.avail = q.avail.wrapping_add(1);
        let idx = q.avail;
        self.write(avail + 4 + 2 * slot, head);
        fence(Ordering::SeqCst);
        self.write_avail_idx(queue, idx);
        fence(Ordering::SeqCst);
    }

    pub fn write_avail_idx(&self, queue: usize, idx: u16) {
        self.memory
            .store(
                idx.to_le(),
                GuestAddress(self.avail_at(queue) + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Which chain the device wants to be kicked for.
    pub fn avail_event(&self, queue: usize) -> u16 {
        self.read(self.used_at(queue) + 4 + 8 * u64::from(QUEUE_SIZE))
    }

    pub fn used_idx(&self, queue: usize) -> u16 {
        self.memory
            .load(GuestAddress(self.used_at(queue) + 2), Ordering::Acquire)
            .unwrap()
    }

    /// The next element that the device gives back.
    pub fn used(&mut self, queue: usize) -> Used {
        wait_for("an element in the used ring", || self.try_used(queue))
    }

    pub fn try_used(&mut self, queue: usize) -> Option<Used> {
        let at = self.used_at(queue);
        let q = &self.queues[queue];
        if self.used_idx(queue) == q.used {
            return None;
        }
        let element = at + 4 + 8 * u64::from(q.used % QUEUE_SIZE);
        let (head, len): (u32, u32) = (self.read(element), self.read(element + 4));
        let q = &mut self.queues[queue];
        q.used = q.used.wrapping_add(1);
        // used_event: an interrupt is wanted for each element.
        let used = q.used;
        let used_event = self.avail_at(queue) + 4 + 2 * u64::from(QUEUE_SIZE);
        self.write(used_event, used);
        fence(Ordering::SeqCst);
        Some(Used {
            head: head as u16,
            len,
        })
    }

    /// Where the request of a head lies: heads are multiples of two.
    pub fn request_at(&self, head: u16) -> u64 {
        SLOTS + u64::from(head / 2) * SLOT_SIZE
    }

    pub fn response_at(&self, head: u16) -> u64 {
        self.request_at(head) + RESPONSE_AT
    }

    /// A head that is not in use, taken in turn.
    pub fn next_head(&mut self) -> u16 {
        let q = &mut self.queues[0];
        let head = 2 * (q.next_slot % u64::from(QUEUE_SIZE / 2)) as u16;
        q.next_slot += 1;
        head
    }

    /// Makes `request` available, with 16 bytes for the response. Returns the head.
    pub fn request(&mut self, request: &[u8]) -> u16 {
        self.request_with_room(request, 16)
    }

    /// The same, with room for so many bytes: at most 4096.
    pub fn request_with_room(&mut self, request: &[u8], room: u32) -> u16 {
        let head = self.next_head();
        let (at, response_at) = (self.request_at(head), self.response_at(head));
        self.write_bytes(at, request);
        self.write_bytes(response_at, &vec![0xee; room as usize]);
        let parts = [(at, request.len() as u32, 0), (response_at, room, WRITE)];
        let parts = if request.is_empty() {
            &parts[1..]
        } else {
            &parts[..]
        };
        self.write_chain(0, head, parts);
        self.publish(0, head);
        head
    }

    pub fn lock(&mut self, ranges: &[(u64, u64, u64)]) -> u16 {
        self.request(&lock_request(ranges))
    }

    /// The response to the request with this head, which is the next to come.
    pub fn response(&mut self, head: u16) -> Response {
        assert_eq!(self.used(0), Used { head, len: 16 });
        self.read_response(self.response_at(head))
    }

    /// The answer to a QUERY, which is the next to come: how many there are, and those told.
    pub fn query_response(&mut self, head: u16) -> (u64, Vec<(u64, u64, u64)>) {
        let used = self.used(0);
        assert_eq!(used.head, head);
        assert!(
            used.len >= 16 && (used.len - 16).is_multiple_of(24),
            "{used:?}"
        );
        let at = self.response_at(head);
        let response = self.read_response(at);
        assert_eq!((response.status, response.index), (0, u32::MAX));
        let told = (0..u64::from(used.len - 16) / 24)
            .map(|i| [0, 8, 16].map(|word| self.read::<u64>(at + 16 + 24 * i + word)))
            .map(|[start, end, attributes]| (start, end, attributes))
            .collect();
        (response.value, told)
    }

    pub fn read_response(&self, at: u64) -> Response {
        Response {
            status: self.read(at),
            index: self.read(at + 4),
            value: self.read(at + 8),
        }
    }

    /// Makes a request of queue 2 available, with room for so many bytes: at most 4096. Returns the
    /// head.
    pub fn walk_request(&mut self, request: &[u8], room: u32) -> u16 {
        let q = &mut self.queues[2];
        let head = 2 * (q.next_slot % u64::from(QUEUE_SIZE / 2)) as u16;
        q.next_slot += 1;
        let at = WALK_SLOTS + u64::from(head / 2) * SLOT_SIZE;
        let response_at = at + RESPONSE_AT;
        self.write_bytes(at, request);
        self.write_bytes(response_at, &vec![0xee; room as usize]);
        let parts = [(at, request.len() as u32, 0), (response_at, room, WRITE)];
        self.write_chain(2, head, &parts);
        self.publish(2, head);
        head
    }

    /// The answer to the request of queue 2 with this head, which is the next to come.
    pub fn walk_answer(&mut self, head: u16) -> Answer {
        let used = self.used(2);
        assert_eq!(used.head, head);
        let at = WALK_SLOTS + u64::from(head / 2) * SLOT_SIZE + RESPONSE_AT;
        Answer::read(self, at, used.len)
    }

    /// Posts a buffer for an event. Returns its address.
    pub fn post_event_buffer(&mut self, head: u16, len: u32) -> u64 {
        let at = 0x30000 + u64::from(head) * 256;
        self.write_chain(1, head, &[(at, len, WRITE)]);
        self.publish(1, head);
        at
    }
}

pub fn lock_request(ranges: &[(u64, u64, u64)]) -> Vec<u8> {
    request(1, 0, ranges.len() as u32, ranges)
}

pub fn query_request(start: u64, end: u64) -> Vec<u8> {
    request(QUERY, 0, 1, &[(start, end, 0)])
}

pub fn request(kind: u16, flags: u16, count: u32, ranges: &[(u64, u64, u64)]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(flags.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    for (start, end, attributes) in ranges {
        for field in [start, end, attributes] {
            bytes.extend(field.to_le_bytes());
        }
    }
    bytes
}
