// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One descriptor chain: walked once, and its readable bytes copied out of guest memory once.
//!
//! A guest that changes descriptors or bytes meanwhile therefore only lies to itself. Knows guest
//! memory and virtio's rules, and nothing of what a request means.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::guarded::Guarded;
use super::wire::{Errno, MAX_DESCRIPTORS, MAX_REQUEST_SIZE, REQUEST_HEADER_SIZE};

/// A chain whose device-writable part can hold an answer.
#[derive(Debug)]
pub(super) struct Chain {
    /// Where the answer goes.
    pub(super) answer: Answer,
    readable: Result<Vec<(GuestAddress, usize)>, Errno>,
    total: u64,
}

/// A chain's device-writable part.
#[derive(Debug)]
pub(super) struct Answer {
    pieces: Vec<(GuestAddress, usize)>,
    room: u64,
}

/// The chain cannot hold an answer, and is returned with length 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Chain {
    /// Takes a chain apart that is to hold an answer of at least `answer_size` bytes.
    ///
    /// # Errors
    ///
    /// [`Malformed`] if it cannot: the writable part is too short, or so many bytes of it are
    /// outside guest memory or in a locked page; a readable descriptor follows a writable one; or
    /// the chain loops or breaks off.
    pub(super) fn walk(
        guest: &Guarded<'_>,
        chain: impl Iterator<Item = Descriptor>,
        answer_size: usize,
    ) -> Result<Self, Malformed> {
        let mut readable = Ok(Vec::new());
        let mut total = 0;
        let mut answer = Answer {
            pieces: Vec::new(),
            room: 0,
        };
        let mut writable_seen = false;
        let mut descriptors = 0;
        let mut ends = false;

        for descriptor in chain {
            descriptors += 1;
            ends = !descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            // What is beyond the limit is refused below, and need not be kept.
            let keep = descriptors <= MAX_DESCRIPTORS;
            if descriptor.is_write_only() {
                writable_seen = true;
                if !guest.exists(address, len) {
                    readable = Err(Errno::Efault);
                }
                if len > 0 && (keep || answer.room < answer_size as u64) {
                    answer.pieces.push((address, len));
                    answer.room += len as u64;
                }
            } else if writable_seen {
                return Err(Malformed);
            } else {
                total += u64::from(descriptor.len());
                match &mut readable {
                    Ok(_) if !guest.check_range(address, len, Permissions::Read) => {
                        readable = Err(Errno::Efault);
                    }
                    Ok(list) if keep => list.push((address, len)),
                    _ => {}
                }
            }
        }
        if !ends || !answer.can_take(guest, answer_size) {
            return Err(Malformed);
        }
        if descriptors > MAX_DESCRIPTORS || total < REQUEST_HEADER_SIZE as u64 {
            readable = Err(Errno::Einval);
        }
        Ok(Self {
            answer,
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
    pub(super) fn copy(&self, guest: &Guarded<'_>) -> Result<Vec<u8>, Errno> {
        let pieces = self.readable.as_ref().map_err(|&errno| errno)?;
        let size = match usize::try_from(self.total) {
            Ok(total) if total <= MAX_REQUEST_SIZE => total,
            _ => REQUEST_HEADER_SIZE,
        };
        let mut bytes = vec![0; size];
        let mut rest = bytes.as_mut_slice();
        for &(address, len) in pieces {
            let (piece, behind) = rest.split_at_mut(len.min(rest.len()));
            guest
                .read_slice(piece, address)
                .map_err(|_| Errno::Efault)?;
            rest = behind;
        }
        Ok(bytes)
    }
}

impl Answer {
    /// How many bytes it can hold, if all of it is there and may be written.
    pub(super) fn room(&self) -> u64 {
        self.room
    }

    /// Whether its first `len` bytes are in memory that the guest has and may write. This process
    /// can write the rest too, so it must not be made to do it in the guest's place.
    fn can_take(&self, guest: &Guarded<'_>, len: usize) -> bool {
        self.room >= len as u64
            && self
                .first(len)
                .all(|(address, len)| guest.check_range(address, len, Permissions::Write))
    }

    /// Writes `bytes` into the memory that the guest has now. False, and nothing is written, if
    /// some of what the driver named is too little, locked, or not there any more.
    pub(super) fn write(&self, guest: &Guarded<'_>, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        self.can_take(guest, bytes.len())
            && self.first(bytes.len()).all(|(address, len)| {
                let (piece, behind) = rest.split_at(len);
                rest = behind;
                guest.write_slice(piece, address).is_ok()
            })
    }

    /// The pieces that hold the first `len` bytes.
    fn first(&self, len: usize) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let mut missing = len;
        self.pieces.iter().map_while(move |&(address, len)| {
            let take = len.min(missing);
            missing -= take;
            (take > 0).then_some((address, take))
        })
    }
}
