// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a vhost-user backend: one [`Backend`] for each connection.
//!
//! Translates the calls of the `vhost-user-backend` crate. Two of its rules shape what is here:
//! an error from `handle_event` ends the worker thread and nobody hears of it, and an error from
//! any other call closes the connection. So what a guest does is never an error.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use log::error;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VringMutex, VringState, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::{LockedVring, Vring};
use super::wire::{MAX_QUEUE_SIZE, Rights};
use super::{Device, PATIENCE, QUEUES, features};
use crate::fd;
use crate::log_limit::{LogLimit, log_limited};

static REFUSED: LogLimit = LogLimit::new(5);

/// Queues of the device: control, events and walk.
pub(crate) const NUM_QUEUES: usize = QUEUES;
/// The id under which the worker's epoll reports [`Backend::again`]; ids up to the number of
/// queues belong to the crate.
pub(crate) const AGAIN: u64 = NUM_QUEUES as u64 + 1;

/// One vhost-user connection to the device.
pub(crate) struct Backend {
    device: Arc<Device>,
    again: EventFd,
    /// What this connection was offered: it must not change while it lasts.
    offered: OnceLock<Rights>,
    worker: Arc<Worker>,
    exit_event: Mutex<Option<RawFd>>,
}

impl Backend {
    /// Begins a connection whose guest memory will be in `memory`.
    ///
    /// # Errors
    ///
    /// No descriptor is left, or the device has another front end.
    pub(crate) fn new(
        device: Arc<Device>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> io::Result<Self> {
        let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let call = again.try_clone()?;
        let wake = move || {
            // Fails only when the counter is full, and then the worker is about to wake anyway.
            let _ = call.write(1);
        };
        device.attach(memory, wake).map_err(io::Error::other)?;
        Ok(Self {
            device,
            again,
            offered: OnceLock::new(),
            worker: Arc::default(),
            exit_event: Mutex::default(),
        })
    }

    /// Wakes the worker when chains were left for later; to be put into its epoll as [`AGAIN`].
    pub(crate) fn again(&self) -> RawFd {
        self.again.as_raw_fd()
    }

    /// Has the connection closed if its worker dies.
    pub(crate) fn watch_worker(&self, connection: ShutdownHandle) {
        self.worker.watch(connection);
    }

    /// Whether the worker died while the connection was there.
    pub(crate) fn worker_died(&self) -> bool {
        self.worker.died.load(Ordering::SeqCst)
    }

    /// The connection has ended and its `VhostUserDaemon` is about to be dropped: what its worker
    /// does now is no accident.
    pub(crate) fn closing(&self) {
        self.worker.closing.store(true, Ordering::SeqCst);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.device.detach();
        let exit_event = self
            .exit_event
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(raw) = exit_event.take() {
            drop(fd::adopt_leaked_by_exit_event(raw));
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        let rights = *self.offered.get_or_init(|| self.device.rights(PATIENCE));
        features(rights) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.device.set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn reset_device(&self) {
        self.device.set_features(0);
        (0..QUEUES as u32).for_each(|queue| self.device.stop(queue));
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut bytes = vec![0; size as usize];
        self.device.config().read(offset.into(), &mut bytes);
        bytes
    }

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Ok(())
    }

    /// A region that is larger than its file would be SIGBUS on the first touch, so it is
    /// refused; a file that its owner makes shorter later is beyond what can be checked here.
    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        memory
            .memory()
            .iter()
            .try_for_each(check_backing)
            .inspect_err(|e| {
                log_limited!(
                    REFUSED,
                    Error,
                    "vhost-user: guest memory refused, connection closed: {e}"
                );
            })
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
                .inspect_err(|e| error!("cannot create an exit event: {e}"))
                .ok()?;
        let mut leaked = self
            .exit_event
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *leaked = Some(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    /// Called when the ring is no longer ready, and before its next_avail is read for the answer.
    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.device.stop(queue);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        Sentinel::post(&self.worker);
        if u64::from(event) == AGAIN {
            let _ = self.again.read();
            (0..QUEUES as u32).for_each(|queue| self.device.serve(queue, None));
        } else if let Some(vring) = vrings.get(usize::from(event)) {
            self.device.serve(u32::from(event), Some(vring));
        }
        Ok(())
    }
}

impl Vring for VringMutex {
    fn share(&self) -> Box<dyn Vring> {
        Box::new(self.clone())
    }

    fn lock(&self) -> Box<dyn LockedVring + '_> {
        Box::new(self.get_mut())
    }
}

impl LockedVring for MutexGuard<'_, VringState> {
    fn runs(&self) -> bool {
        self.get_queue().ready() && self.is_enabled()
    }

    fn queue_mut(&mut self) -> &mut Queue {
        self.get_queue_mut()
    }

    fn has_call(&self) -> bool {
        self.get_call().is_some()
    }

    fn call(&self) -> io::Result<()> {
        self.signal_used_queue()
    }
}

fn check_backing(region: &GuestRegionMmap) -> io::Result<()> {
    let Some(backing) = region.file_offset() else {
        return Ok(());
    };
    let file = backing.file().metadata()?;
    // A device has no length to compare with.
    if file.is_file() && backing.start().saturating_add(region.len()) > file.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "region at {:#x} has {} bytes from offset {} on, its file has {}",
                region.start_addr().0,
                region.len(),
                backing.start(),
                file.len()
            ),
        ));
    }
    Ok(())
}

/// What is known of the thread that serves the rings.
#[derive(Default)]
struct Worker {
    closing: AtomicBool,
    died: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Worker {
    fn watch(&self, connection: ShutdownHandle) {
        let mut watched = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.died.load(Ordering::SeqCst) {
            connection.shutdown();
        }
        *watched = Some(connection);
    }

    fn ended(&self) {
        if self.closing.load(Ordering::SeqCst) {
            return;
        }
        let watched = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.died.store(true, Ordering::SeqCst);
        if let Some(connection) = &*watched {
            connection.shutdown();
        }
    }
}

/// Lives in the worker thread's local storage and is dropped when that thread ends, however it
/// does: the crate itself tells nobody.
struct Sentinel(Arc<Worker>);

thread_local! {
    static SENTINEL: RefCell<Option<Sentinel>> = const { RefCell::new(None) };
}

impl Sentinel {
    fn post(worker: &Arc<Worker>) {
        SENTINEL.with_borrow_mut(|sentinel| {
            sentinel.get_or_insert_with(|| Self(Arc::clone(worker)));
        });
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.0.ended();
    }
}
