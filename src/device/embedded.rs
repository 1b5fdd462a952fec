// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device in the process of a VMM: an [`Embedded`] has its queues started, kicked and stopped by
//! whatever virtio transport the VMM has, virtio-mmio or virtio-pci.
//!
//! Whoever owns the VM is an [`Enforcer`](crate::vm::enforcer::Enforcer), here as behind any other
//! front end. Knows threads and no transport: neither registers nor interrupt lines. All that a
//! transport passes on of what its guest said is checked here; what of it is an error the transport
//! tells its driver as virtio has it (`DEVICE_NEEDS_RESET`, or no `FEATURES_OK`), or leaves out.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use vhost_guard::device::Device;
//! use vhost_guard::device::embedded::{Embedded, EmbeddedError, QueueConfig};
//! use vhost_guard::vm::enforcer::Enforcer;
//! use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
//!
//! # fn interrupt() {}
//! # fn run(enforcer: Arc<dyn Enforcer>, memory: GuestMemoryMmap) -> Result<(), EmbeddedError> {
//! // `enforcer` carries out what guests ask for, and calls `VmEvents` of `device`.
//! let device = Device::new(enforcer, None, None);
//! let guard = Embedded::new(device, GuestMemoryAtomic::new(memory))?;
//!
//! // As the driver does through the transport: features, configuration, queues.
//! let offered = guard.features();
//! guard.set_features(offered)?;
//! let mut version = [0; 4];
//! guard.read_config(0, &mut version);
//! guard.start_queue(
//!     0,
//!     QueueConfig {
//!         size: 64,
//!         desc_table: GuestAddress(0x1_0000),
//!         avail_ring: GuestAddress(0x1_1000),
//!         used_ring: GuestAddress(0x1_2000),
//!         next_avail: 0,
//!         interrupt: Box::new(interrupt),
//!     },
//! )?;
//!
//! // The guest has written to the queue's notification register.
//! guard.kick(0)?;
//!
//! // The VM is to be saved: what was not answered is asked again from here on.
//! let next_avail = guard.stop_queue(0)?;
//! # let _ = next_avail;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};

use super::ring::{LockedVring, Vring};
use super::walker::what_was_said;
pub use super::wire::{CONFIG_SIZE, DEVICE_ID, MAX_QUEUE_SIZE};
use super::{Device, InUse, PATIENCE, QUEUES, features};
use crate::log_limit::{LogLimit, log_limited};

static FAILED: LogLimit = LogLimit::new(5);

/// Queues of the device: 0 is control, 1 events, 2 walk (`docs/device.md`, "Device ID and queues").
/// A driver need not set up all of them.
pub const NUM_QUEUES: usize = QUEUES;

/// Why something cannot be done. The numbers are those that a driver gave.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddedError {
    /// The device is served by somebody else, until that is dropped.
    #[error(transparent)]
    InUse(#[from] InUse),
    /// There is no thread to be had that would serve the queues.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The driver wants feature bits that it was not offered: these.
    #[error("features {0:#x} were not offered")]
    NotOffered(u64),
    /// The driver does without `VIRTIO_F_VERSION_1`, so it is none of virtio 1.x (virtio 1.3, 6.1).
    #[error("VIRTIO_F_VERSION_1 was not negotiated")]
    Legacy,
    /// The device has no such queue.
    #[error("there is no queue {0}")]
    NoQueue(u32),
    /// That cannot be done while this queue runs.
    #[error("queue {0} runs")]
    Runs(u32),
    /// That cannot be done with a queue that does not run.
    #[error("queue {0} does not run")]
    Stopped(u32),
    /// Not a power of 2 from 1 to [`MAX_QUEUE_SIZE`] (virtio 1.3, 2.7).
    #[error("a queue cannot have {0} entries")]
    Size(u16),
    /// A part of a queue does not begin where virtio allows it to (virtio 1.3, 2.7).
    #[error("the {part} at {at:#x} is not aligned")]
    Misaligned {
        /// Which.
        part: &'static str,
        /// Its guest-physical address.
        at: u64,
    },
    /// A part of a queue is not in the guest's memory, or not all of it.
    #[error("the {part} at {at:#x} lies outside guest memory")]
    Outside {
        /// Which.
        part: &'static str,
        /// Its guest-physical address.
        at: u64,
    },
}

/// Tells the guest that a queue has something for it.
///
/// Called by a thread of the [`Embedded`], with no lock held: it may take the locks of the VMM and
/// call the [`Embedded`], or drop it. The interrupts and requests of all queues wait until it
/// returns. An interrupt too many does no harm. One that panics is logged, and lost.
pub type Interrupt = dyn Fn() + Send + Sync;

/// A split virtqueue as a driver has set it up. Nothing of it needs to have been checked.
pub struct QueueConfig {
    /// Entries of the queue: a power of 2 from 1 to [`MAX_QUEUE_SIZE`].
    pub size: u16,
    /// Guest-physical address of the descriptor table, a multiple of 16.
    pub desc_table: GuestAddress,
    /// Guest-physical address of the avail ring, a multiple of 2.
    pub avail_ring: GuestAddress,
    /// Guest-physical address of the used ring, a multiple of 4.
    pub used_ring: GuestAddress,
    /// The place in the avail ring from which on chains are taken, counted as `avail.idx` is: 0, or
    /// what [`Embedded::stop_queue`] has told. Every chain before it was given back, so it is also
    /// where the used ring goes on.
    pub next_avail: u16,
    /// How the driver learns of what is in the used ring.
    pub interrupt: Box<Interrupt>,
}

/// A device in a VMM's own process.
///
/// Its queues are served by a thread of its own, called `guard-queues`, which ends when this is
/// dropped. All methods may be called by any thread at any time, also by an [`Interrupt`]; they wait
/// for no guest, and only [`features`](Self::features) for the owner of the VM.
///
/// Dropping it leaves what the guest has locked in force: that is the enforcer's. From then on
/// no queue is touched, and no interrupt comes but one that is on its way.
#[must_use = "the queues are served until it is dropped"]
pub struct Embedded {
    device: Arc<Device>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Feature bits; they do not change while a driver may have seen them.
    offered: OnceLock<u64>,
    /// Feature bits that the driver has acknowledged. Locked while queues are started and stopped;
    /// the device's lock comes after it.
    acked: Mutex<u64>,
    vrings: [Arc<HostVring>; QUEUES],
    bell: Arc<Bell>,
}

impl Embedded {
    /// Serves `device` to a guest whose memory is in `memory`. When the guest's memory changes, what
    /// is to be put there: rings and requests are looked for in what is there at the time. Memory
    /// that is taken away stays mapped until page tables in it are no longer read.
    ///
    /// # Errors
    ///
    /// [`EmbeddedError::InUse`] while another serves the same device, [`EmbeddedError::Thread`].
    pub fn new(
        device: Arc<Device>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> Result<Self, EmbeddedError> {
        let bell = Arc::new(Bell::default());
        let vring = |queue| HostVring::new(queue, Arc::clone(&bell));
        let vrings = [vring(0), vring(1), vring(2)].map(Arc::new);
        let again = Arc::clone(&bell);
        device.attach(memory.clone(), move || {
            again.ring(|wanted| wanted.turn = [true; QUEUES])
        })?;
        // From here on it is detached if something fails.
        let embedded = Self {
            device,
            memory,
            offered: OnceLock::new(),
            acked: Mutex::default(),
            vrings,
            bell,
        };
        for (queue, vring) in (0..).zip(&embedded.vrings) {
            embedded.device.add_ring(queue, vring);
        }
        let worker = Worker {
            device: Arc::clone(&embedded.device),
            vrings: embedded.vrings.clone(),
            bell: Arc::clone(&embedded.bell),
        };
        thread::Builder::new()
            .name("guard-queues".into())
            .spawn(move || worker.run())
            .map_err(EmbeddedError::Thread)?;
        Ok(embedded)
    }

    /// The feature bits to offer to drivers (`docs/device.md`, "Feature bits"), those of the rings
    /// among them. The transport may add its own, which are not to be passed to
    /// [`set_features`](Self::set_features).
    ///
    /// The first call waits up to a second for the enforcer to say what it can enforce
    /// ([`connected`](crate::vm::enforcer::VmEvents::connected)); what is offered then stays so, that
    /// of an enforcer that has not said it too.
    #[must_use]
    pub fn features(&self) -> u64 {
        *self
            .offered
            .get_or_init(|| features(self.device.rights(PATIENCE)))
    }

    /// The driver has acknowledged these feature bits, and asks whether they will do
    /// (`FEATURES_OK`; virtio 1.3, 3.1.1). Counts until [`reset`](Self::reset); before it, the
    /// driver has none, and all that it asks for is refused. Waits as [`features`](Self::features)
    /// does, if that was not called before.
    ///
    /// # Errors
    ///
    /// Nothing changes with [`EmbeddedError::NotOffered`], [`EmbeddedError::Legacy`], or
    /// [`EmbeddedError::Runs`] for a driver that has started a queue already. `FEATURES_OK` is not to be
    /// set then.
    pub fn set_features(&self, acked: u64) -> Result<(), EmbeddedError> {
        let unknown = acked & !self.features();
        if unknown != 0 {
            return Err(EmbeddedError::NotOffered(unknown));
        }
        if acked & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(EmbeddedError::Legacy);
        }
        let mut held = self.acked();
        if let Some((queue, _)) = (0..).zip(&self.vrings).find(|(_, vring)| vring.runs()) {
            return Err(EmbeddedError::Runs(queue));
        }
        self.device.set_features(acked);
        *held = acked;
        Ok(())
    }

    /// Reads the configuration space (`docs/device.md`, "Configuration space") from `offset` bytes
    /// on, as many bytes as there is room for: zeros behind its end, which is at [`CONFIG_SIZE`].
    /// What a driver writes to it is to be ignored.
    ///
    /// Fields move without a configuration change interrupt. A transport with a configuration
    /// generation (virtio 1.3, 2.5) changes it when what is read differs from what was read last.
    pub fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        self.device.config().read(offset, bytes);
    }

    /// The driver has set up a queue and enabled it. What is in it already is looked at without a
    /// kick, and the guest gets an interrupt that it may not need.
    ///
    /// Rings in memory that the guest may not use itself are no error here: such a queue stands
    /// still, as one does whose rings make no sense.
    ///
    /// # Errors
    ///
    /// The queue is not started with [`EmbeddedError::NoQueue`], [`EmbeddedError::Runs`],
    /// [`EmbeddedError::Size`], [`EmbeddedError::Misaligned`] and [`EmbeddedError::Outside`].
    pub fn start_queue(&self, queue: u32, config: QueueConfig) -> Result<(), EmbeddedError> {
        let vring = self.vring(queue)?;
        let acked = self.acked();
        if vring.runs() {
            return Err(EmbeddedError::Runs(queue));
        }
        let mut new = config.queue(&self.memory.memory())?;
        new.set_event_idx(*acked & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        vring.start(new, config.interrupt.into());
        self.bell.ring(|wanted| wanted.turn[vring.queue] = true);
        Ok(())
    }

    /// The driver has made something available in a queue (virtio 1.3, 2.9; of notification data,
    /// nothing is wanted). Returns at once. A kick of a queue that does not run is none.
    ///
    /// # Errors
    ///
    /// [`EmbeddedError::NoQueue`].
    pub fn kick(&self, queue: u32) -> Result<(), EmbeddedError> {
        let vring = self.vring(queue)?;
        self.bell.ring(|wanted| wanted.turn[vring.queue] = true);
        Ok(())
    }

    /// Stops a queue. Once it returns, nothing is written to it, and no interrupt comes but one that
    /// is on its way. Returns where to start it again: all chains before that place were given back,
    /// and none from there on.
    ///
    /// What the enforcer is carrying out just now is carried out, but nobody is told. Started again,
    /// the queue has its request carried out once more, which changes nothing.
    ///
    /// # Errors
    ///
    /// [`EmbeddedError::NoQueue`], [`EmbeddedError::Stopped`].
    pub fn stop_queue(&self, queue: u32) -> Result<u16, EmbeddedError> {
        let vring = self.vring(queue)?;
        let _acked = self.acked();
        if !vring.runs() {
            return Err(EmbeddedError::Stopped(queue));
        }
        vring.halt();
        self.device.stop(queue);
        Ok(vring.clear())
    }

    /// The driver has reset the device (virtio 1.3, 2.4): stops all queues, as
    /// [`stop_queue`](Self::stop_queue) does, and forgets its features. What it has
    /// locked stays in force; only a reset of the VM
    /// ([`VmEvents::reset`](crate::vm::enforcer::VmEvents::reset)) ends that.
    pub fn reset(&self) {
        let mut acked = self.acked();
        *acked = 0;
        self.vrings.iter().for_each(|vring| vring.halt());
        self.device.set_features(0);
        (0..QUEUES as u32).for_each(|queue| self.device.stop(queue));
        for vring in &self.vrings {
            vring.clear();
        }
    }

    fn vring(&self, queue: u32) -> Result<&HostVring, EmbeddedError> {
        let vring = usize::try_from(queue).ok().and_then(|n| self.vrings.get(n));
        vring.map(|v| &**v).ok_or(EmbeddedError::NoQueue(queue))
    }

    fn acked(&self) -> MutexGuard<'_, u64> {
        self.acked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedded")
            .field("offered", &self.offered)
            .field("vrings", &self.vrings)
            .finish_non_exhaustive()
    }
}

impl Drop for Embedded {
    /// Does not wait for the thread: it may be the one that does this, or wait in an interrupt for a
    /// lock that is held here.
    fn drop(&mut self) {
        self.vrings.iter().for_each(|vring| vring.halt());
        self.device.detach();
        for vring in &self.vrings {
            vring.clear();
        }
        self.bell.ring(|wanted| wanted.end = true);
    }
}

impl QueueConfig {
    /// What it describes, if that can be a queue in this memory.
    fn queue(&self, memory: &GuestMemoryMmap) -> Result<Queue, EmbeddedError> {
        let size = |_| EmbeddedError::Size(self.size);
        let mut queue = Queue::new(MAX_QUEUE_SIZE).map_err(size)?;
        queue.try_set_size(self.size).map_err(size)?;
        // Virtio 1.3, 2.7.
        let n = usize::from(self.size);
        let desc_table = ("descriptor table", self.desc_table, 16 * n);
        let avail_ring = ("avail ring", self.avail_ring, 6 + 2 * n);
        let used_ring = ("used ring", self.used_ring, 6 + 8 * n);
        for (part, at, len) in [desc_table, avail_ring, used_ring] {
            if !memory.check_range(at, len) {
                return Err(EmbeddedError::Outside { part, at: at.0 });
            }
        }
        let misaligned = |(part, at, _): (_, GuestAddress, _)| {
            move |_| EmbeddedError::Misaligned { part, at: at.0 }
        };
        queue
            .try_set_desc_table_address(self.desc_table)
            .map_err(misaligned(desc_table))?;
        queue
            .try_set_avail_ring_address(self.avail_ring)
            .map_err(misaligned(avail_ring))?;
        queue
            .try_set_used_ring_address(self.used_ring)
            .map_err(misaligned(used_ring))?;
        queue.set_next_avail(self.next_avail);
        // Chains are given back in the order in which they were taken.
        queue.set_next_used(self.next_avail);
        queue.set_ready(true);
        Ok(queue)
    }
}

impl fmt::Debug for QueueConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueConfig")
            .field("size", &self.size)
            .field("desc_table", &self.desc_table)
            .field("avail_ring", &self.avail_ring)
            .field("used_ring", &self.used_ring)
            .field("next_avail", &self.next_avail)
            .finish_non_exhaustive()
    }
}

/// A queue, as long as it is attached to the device.
struct HostVring {
    /// Its number.
    queue: usize,
    bell: Arc<Bell>,
    /// Changes without the lock, so that a guest that keeps the worker busy with its queue cannot
    /// keep it from being stopped.
    runs: AtomicBool,
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    queue: Queue,
    /// There is one while it runs.
    interrupt: Option<Arc<Interrupt>>,
}

/// A [`HostVring`] with its lock held.
struct LockedSlot<'a> {
    vring: &'a HostVring,
    slot: MutexGuard<'a, Slot>,
}

impl HostVring {
    fn new(queue: usize, bell: Arc<Bell>) -> Self {
        Self {
            queue,
            bell,
            runs: AtomicBool::new(false),
            slot: Mutex::default(),
        }
    }

    fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, queue: Queue, interrupt: Arc<Interrupt>) {
        let mut slot = self.slot();
        *slot = Slot {
            queue,
            interrupt: Some(interrupt),
        };
        self.runs.store(true, Ordering::SeqCst);
    }

    /// It does not run any more. A turn that has begun goes on until the device's lock can be had.
    fn halt(&self) {
        self.runs.store(false, Ordering::SeqCst);
    }

    /// Forgets the queue, which the device has heard is stopped. Returns the place of the first
    /// chain that was not given back.
    fn clear(&self) -> u16 {
        let stopped = std::mem::take(&mut *self.slot());
        // The VMM's interrupt is let go of without the lock.
        stopped.queue.next_avail()
    }

    fn interrupt(&self) -> Option<Arc<Interrupt>> {
        self.slot().interrupt.clone()
    }
}

impl fmt::Debug for HostVring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostVring")
            .field("queue", &self.queue)
            .field("runs", &self.runs)
            .finish_non_exhaustive()
    }
}

impl Vring for Arc<HostVring> {
    fn share(&self) -> Box<dyn Vring> {
        Box::new(Self::clone(self))
    }

    fn lock(&self) -> Box<dyn LockedVring + '_> {
        Box::new(LockedSlot {
            vring: self,
            slot: self.slot(),
        })
    }
}

impl LockedVring for LockedSlot<'_> {
    fn runs(&self) -> bool {
        self.vring.runs()
    }

    fn queue_mut(&mut self) -> &mut Queue {
        &mut self.slot.queue
    }

    fn has_call(&self) -> bool {
        self.slot.interrupt.is_some()
    }

    /// Leaves it to the worker, who holds no lock.
    fn call(&self) -> io::Result<()> {
        let Self { vring, .. } = self;
        vring.bell.ring(|wanted| wanted.call[vring.queue] = true);
        Ok(())
    }
}

/// What the worker is called with. Its lock is the last to be taken.
#[derive(Debug, Default)]
struct Bell {
    wanted: Mutex<Wanted>,
    rung: Condvar,
}

/// What the worker is to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// Interrupt the guest, by queue.
    call: [bool; QUEUES],
    /// Look at the queue.
    turn: [bool; QUEUES],
    end: bool,
}

impl Bell {
    fn ring(&self, want: impl FnOnce(&mut Wanted)) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        want(&mut wanted);
        drop(wanted);
        self.rung.notify_one();
    }

    /// Waits until something is wanted; `None` at the end.
    fn wait(&self) -> Option<Wanted> {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut wanted = self
            .rung
            .wait_while(wanted, |wanted| *wanted == Wanted::default())
            .unwrap_or_else(PoisonError::into_inner);
        (!wanted.end).then(|| std::mem::take(&mut *wanted))
    }
}

/// The thread that serves the queues and interrupts the guest.
struct Worker {
    device: Arc<Device>,
    vrings: [Arc<HostVring>; QUEUES],
    bell: Arc<Bell>,
}

impl Worker {
    fn run(&self) {
        while let Some(Wanted { call, turn, .. }) = self.bell.wait() {
            for (vring, _) in self.vrings.iter().zip(call).filter(|(_, call)| *call) {
                if let Some(interrupt) = vring.interrupt() {
                    survive("the interrupt of a queue", move || interrupt());
                }
            }
            for (queue, _) in (0..).zip(turn).filter(|(_, turn)| *turn) {
                survive("serving a queue", || self.device.serve(queue, None));
            }
        }
    }
}

/// Does `what`, and goes on if it panics: there is nobody who would start the thread anew.
fn survive(name: &str, what: impl FnOnce()) {
    if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(what)) {
        log_limited!(
            FAILED,
            Error,
            "{name} panicked (please report it, with the log): {}",
            what_was_said(&*panic)
        );
    }
}
