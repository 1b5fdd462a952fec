// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One descriptor chain: walked once, and its readable bytes copied out of guest memory once.
//!
//! A guest that changes descriptors or bytes meanwhile therefore only lies to itself. Knows guest
//! memory and virtio's rules, and nothing of what a request means.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryLoadGuard, GuestMemoryMmap};

use crate::protect::{Deny, GfnRange, Table};

use super::wire::{Errno, MAX_DESCRIPTORS, MAX_REQUEST_SIZE, REQUEST_HEADER_SIZE};

/// A snapshot of the guest's memory map.
pub(super) type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// A chain whose device-writable part can hold an answer.
#[derive(Debug)]
pub(super) struct Chain {
    /// Where the answer goes.
    pub(super) answer: Answer,
    readable: Result<Vec<(GuestAddress, usize)>, Errno>,
    total: u64,
}

/// The first bytes of a chain's device-writable part, as many as an answer has.
#[derive(Debug)]
pub(super) struct Answer {
    pieces: Vec<(GuestAddress, usize)>,
}

/// The chain cannot hold an answer, and is returned with length 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Chain {
    /// Takes a chain apart that is to hold an answer of `answer_size` bytes.
    ///
    /// # Errors
    ///
    /// [`Malformed`] if it cannot: the writable part is too short or outside guest memory, a
    /// readable descriptor follows a writable one, or the chain loops or breaks off.
    pub(super) fn walk(
        memory: &Memory,
        chain: impl Iterator<Item = Descriptor>,
        answer_size: usize,
    ) -> Result<Self, Malformed> {
        let mut readable = Ok(Vec::new());
        let mut total = 0;
        let mut pieces = Vec::new();
        let mut missing = answer_size;
        let mut writable_seen = false;
        let mut descriptors = 0;
        let mut ends = false;

        for descriptor in chain {
            descriptors += 1;
            ends = !descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            let exists = memory.check_range(address, len);
            if descriptor.is_write_only() {
                writable_seen = true;
                if !exists {
                    return Err(Malformed);
                }
                let take = len.min(missing);
                if take > 0 {
                    pieces.push((address, take));
                    missing -= take;
                }
            } else if writable_seen {
                return Err(Malformed);
            } else {
                total += u64::from(descriptor.len());
                match &mut readable {
                    Ok(_) if !exists => readable = Err(Errno::Efault),
                    // What is beyond the limit is refused below, and need not be kept.
                    Ok(list) if descriptors <= MAX_DESCRIPTORS => list.push((address, len)),
                    _ => {}
                }
            }
        }
        if !ends || missing > 0 {
            return Err(Malformed);
        }
        if descriptors > MAX_DESCRIPTORS || total < REQUEST_HEADER_SIZE as u64 {
            readable = Err(Errno::Einval);
        }
        Ok(Self {
            answer: Answer { pieces },
            readable,
            total,
        })
    }

    /// How many device-readable bytes there are.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The device-readable bytes; of more than a request can have, only the header.
    ///
    /// # Errors
    ///
    /// The errno for a request that cannot be read.
    pub(super) fn copy(&self, memory: &Memory) -> Result<Vec<u8>, Errno> {
        let pieces = self.readable.as_ref().map_err(|&errno| errno)?;
        let size = match usize::try_from(self.total) {
            Ok(total) if total <= MAX_REQUEST_SIZE => total,
            _ => REQUEST_HEADER_SIZE,
        };
        let mut bytes = vec![0; size];
        let mut rest = bytes.as_mut_slice();
        for &(address, len) in pieces {
            let (piece, behind) = rest.split_at_mut(len.min(rest.len()));
            memory
                .read_slice(piece, address)
                .map_err(|_| Errno::Efault)?;
            rest = behind;
        }
        Ok(bytes)
    }
}

/// Whether the guest may not write some of the `len` bytes at `address`.
pub(super) fn is_locked(table: &Table, address: GuestAddress, len: usize) -> bool {
    GfnRange::of_bytes(address.0, len as u64)
        .is_some_and(|frames| table.denies(frames, Deny::NOWRITE))
}

impl Answer {
    /// Whether some of it is on a page that the guest may not write. This process can, so it must
    /// not be made to do it in the guest's place.
    pub(super) fn is_locked(&self, table: &Table) -> bool {
        self.pieces
            .iter()
            .any(|&(address, len)| is_locked(table, address, len))
    }

    /// Writes `bytes` into the memory that the guest has now. False if some of what the driver
    /// named is not there any more.
    pub(super) fn write(&self, memory: &Memory, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        self.pieces.iter().all(|&(address, len)| {
            let (piece, behind) = rest.split_at(len.min(rest.len()));
            rest = behind;
            memory.write_slice(piece, address).is_ok()
        })
    }
}
