// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as the devices of a VMM may use it: what the guest may not write, they may not
//! write for it. What is denied is not known here.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vm_memory::guest_memory::{
    Error as MemoryError, GuestMemorySliceIterator, Result as MemoryResult,
};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, Permissions};

use super::vm::Shared;

/// Held by devices while they use memory, and by whoever changes what they may do with it.
#[derive(Debug, Default)]
pub(super) struct Gate(RwLock<()>);

impl Gate {
    fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no device uses memory; none begins to until what is returned is dropped.
    pub(super) fn close(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guest memory for a device of the VMM, while it is at work. Made by
/// [`KvmVm::device_memory`](super::KvmVm::device_memory).
///
/// Asked for with [`Permissions::Write`], pages that the guest is denied to write are not there, and
/// what is refused or watched is told as a violation by a device. The rest is the guest's
/// memory. [`Bytes`](vm_memory::Bytes) and the readers and writers of the crate `virtio-queue` ask
/// for what they do.
///
/// No protection changes while there is one of these, so that a device that has been given a slice
/// of memory may use it until then: a guest that is told OK can be sure of devices, too. So it is
/// to be let go of before a device waits for anything. It stays with its thread, which has one at a
/// time: with a second one it could wait for ever, if a change waits in between. Reading is never
/// refused.
///
/// What is refused gives
/// [`InvalidGuestAddress`](vm_memory::guest_memory::Error::InvalidGuestAddress), as memory does
/// that is not there, and nothing is written then.
#[derive(Debug)]
pub struct DeviceMemory<'a> {
    shared: &'a Shared,
    _entered: RwLockReadGuard<'a, ()>,
}

impl<'a> DeviceMemory<'a> {
    pub(super) fn new(shared: &'a Shared, gate: &'a Gate) -> Self {
        let _entered = gate.enter();
        Self { shared, _entered }
    }

    fn memory(&self) -> &GuestMemoryMmap {
        self.shared.memory()
    }
}

impl GuestMemory for DeviceMemory<'_> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = <GuestMemoryMmap as GuestMemory>::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemoryBackend::check_range(self.memory(), addr, count)
            && !(access.has_write() && self.shared.denies_device(addr.0, count))
    }

    fn get_slices<'s>(
        &'s self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> MemoryResult<impl GuestMemorySliceIterator<'s, vm_memory::bitmap::BS<'s, Self::Bitmap>>>
    {
        if access.has_write() && !self.shared.device_stores(addr.0, count) {
            return Err(MemoryError::InvalidGuestAddress(addr));
        }
        Ok(GuestMemoryBackend::get_slices(self.memory(), addr, count))
    }
}
