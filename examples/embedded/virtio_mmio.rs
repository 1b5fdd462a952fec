// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transport: a window of virtio-mmio, version 2 (virtio 1.2, section 4.2).
//!
//! What the guest writes to it is kept as it is; [`Embedded`] checks it when it comes to count.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_ioctls::VmFd;
use log::debug;
use vhost_guard::device::embedded::{
    CONFIG_SIZE, DEVICE_ID, Embedded, EmbeddedError, MAX_QUEUE_SIZE, NUM_QUEUES, QueueConfig,
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BASE: u64 = 0xd000_0000;
const SIZE: u64 = 0x200;
const IRQ: u32 = 5;

/// What a kernel is told of it.
pub(crate) fn words() -> String {
    format!("virtio_mmio.device={SIZE:#x}@{BASE:#x}:{IRQ}")
}

/// Where in the window it is.
pub(crate) fn offset(gpa: u64) -> Option<u64> {
    gpa.checked_sub(BASE).filter(|offset| *offset < SIZE)
}

/// The interrupt of the transport.
#[derive(Clone)]
pub(crate) struct Line {
    /// `InterruptStatus`.
    status: Arc<AtomicU32>,
    irq: Arc<EventFd>,
}

impl Line {
    const USED_BUFFER: u32 = 1;

    pub(crate) fn new(vm: &VmFd) -> Result<Self, Box<dyn Error>> {
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        vm.register_irqfd(&irq, IRQ)?;
        let status = Arc::default();
        Ok(Self { status, irq })
    }

    fn raise(&self) {
        self.status.fetch_or(Self::USED_BUFFER, Ordering::SeqCst);
        let _ = self.irq.write(1);
    }
}

/// The window's registers.
pub(crate) struct Transport {
    guard: Embedded,
    line: Line,
    status: u32,
    /// What was written last to each register, and to those that each queue has of its own.
    written: [u32; REGISTERS],
    queues: [[u32; REGISTERS]; NUM_QUEUES],
    acked: [u32; 2],
    /// Configuration space as it was when the driver last asked for its generation.
    config: [u8; CONFIG_SIZE],
    generation: u32,
}

/// Registers, of 4 bytes each. Behind them is the configuration space.
const REGISTERS: usize = 64;
// By their offsets.
const MAGIC_VALUE: u64 = 0x00;
const VERSION: u64 = 0x04;
const ID: u64 = 0x08;
const OFFERED: u64 = 0x10;
const OFFERED_HALF: u64 = 0x14;
const ACKED: u64 = 0x20;
const ACKED_HALF: u64 = 0x24;
const SELECTED_QUEUE: u64 = 0x30;
const QUEUE_MAX_SIZE: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_AVAIL: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;
const SHARED_MEMORY: u64 = 0xb0;
const SHARED_MEMORY_END: u64 = 0xc0;
const GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

/// The place of a register among those that were written.
const fn at(offset: u64) -> usize {
    offset as usize / 4
}

// Bits of `Status`.
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;

impl Transport {
    pub(crate) fn new(guard: Embedded, line: Line) -> Self {
        Self {
            guard,
            line,
            status: 0,
            written: [0; REGISTERS],
            queues: [[0; REGISTERS]; NUM_QUEUES],
            acked: [0; 2],
            config: [0; CONFIG_SIZE],
            generation: 0,
        }
    }

    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.guard.read_config(offset, data);
        }
        data.fill(0);
        // Registers are read whole.
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(offset).to_le_bytes();
        }
    }

    fn register(&mut self, offset: u64) -> u32 {
        let queue = self.queues.get(self.written[at(SELECTED_QUEUE)] as usize);
        match offset {
            MAGIC_VALUE => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            ID => DEVICE_ID,
            OFFERED => match self.written[at(OFFERED_HALF)] {
                0 => self.guard.features() as u32,
                1 => (self.guard.features() >> 32) as u32,
                _ => 0,
            },
            QUEUE_MAX_SIZE => queue.map_or(0, |_| MAX_QUEUE_SIZE.into()),
            QUEUE_READY => queue.map_or(0, |queue| (queue[at(QUEUE_READY)] != 0).into()),
            INTERRUPT_STATUS => self.line.status.load(Ordering::SeqCst),
            STATUS => self.status,
            GENERATION => self.generation(),
            // There is none.
            SHARED_MEMORY..SHARED_MEMORY_END => u32::MAX,
            _ => 0,
        }
    }

    /// Another one if configuration space has changed since the driver asked last: what it has read
    /// meanwhile may be of both.
    fn generation(&mut self) -> u32 {
        let mut config = [0; CONFIG_SIZE];
        self.guard.read_config(0, &mut config);
        if config != self.config {
            self.config = config;
            self.generation = self.generation.wrapping_add(1);
        }
        self.generation
    }

    /// A register is written whole, and the configuration space not at all.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        if offset >= CONFIG || !offset.is_multiple_of(4) {
            return;
        }
        self.written[at(offset)] = value;
        let selected = self.written[at(SELECTED_QUEUE)];
        if let Some(queue) = self.queues.get_mut(selected as usize) {
            queue[at(offset)] = value;
        }
        match offset {
            ACKED => {
                if let Some(half) = self.acked.get_mut(self.written[at(ACKED_HALF)] as usize) {
                    *half = value;
                }
            }
            QUEUE_READY => self.ready(selected),
            // Of a queue that there is not: nothing to do.
            QUEUE_NOTIFY => drop(self.guard.kick(value)),
            INTERRUPT_ACK => drop(self.line.status.fetch_and(!value, Ordering::SeqCst)),
            STATUS => self.set_status(value),
            _ => {}
        }
    }

    fn set_status(&mut self, status: u32) {
        let newly = status & !self.status;
        self.status = status | self.status & NEEDS_RESET;
        if status == 0 {
            self.guard.reset();
            self.line.status.store(0, Ordering::SeqCst);
            self.status = 0;
            self.acked = [0; 2];
            self.written = [0; REGISTERS];
            self.queues = [[0; REGISTERS]; NUM_QUEUES];
        }
        if newly & FEATURES_OK != 0 {
            let acked = u64::from(self.acked[1]) << 32 | u64::from(self.acked[0]);
            if let Err(error) = self.guard.set_features(acked) {
                debug!("{error}");
                self.status &= !FEATURES_OK;
            }
        }
        if newly & DRIVER_OK != 0 {
            (0..).take(NUM_QUEUES).for_each(|queue| self.ready(queue));
        }
    }

    /// Starts a queue that the driver has made ready, unless it is not ready itself yet, or stops one.
    fn ready(&mut self, index: u32) {
        let Some(queue) = self.queues.get(index as usize) else {
            return;
        };
        if queue[at(QUEUE_READY)] == 0 {
            // If it was started.
            let _ = self.guard.stop_queue(index);
            return;
        }
        if self.status & DRIVER_OK == 0 {
            return;
        }
        let address = |low| {
            let (low, high) = (queue[at(low)], queue[at(low + 4)]);
            GuestAddress(u64::from(high) << 32 | u64::from(low))
        };
        let line = self.line.clone();
        let config = QueueConfig {
            // One that is too large is as wrong as any other.
            size: u16::try_from(queue[at(QUEUE_SIZE)]).unwrap_or(u16::MAX),
            desc_table: address(QUEUE_DESC),
            avail_ring: address(QUEUE_AVAIL),
            used_ring: address(QUEUE_USED),
            next_avail: 0,
            interrupt: Box::new(move || line.raise()),
        };
        match self.guard.start_queue(index, config) {
            Ok(()) | Err(EmbeddedError::Runs(_)) => {}
            Err(error) => {
                debug!("{error}");
                self.status |= NEEDS_RESET;
            }
        }
    }
}
