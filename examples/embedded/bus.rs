// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest reaches by port I/O and MMIO: as much of a serial port as polling takes, and the
//! window of the guard's transport.

use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;

use crate::lock;
use crate::virtio_mmio::{self, Transport};

/// What is on the bus.
pub(crate) struct Bus {
    pub(crate) transport: Mutex<Transport>,
    pub(crate) serial: Mutex<Serial>,
}

impl Bus {
    pub(crate) fn mmio_read(&self, at: u64, data: &mut [u8]) {
        match virtio_mmio::offset(at) {
            Some(offset) => lock(&self.transport).read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn mmio_write(&self, at: u64, data: &[u8]) {
        if let Some(offset) = virtio_mmio::offset(at) {
            lock(&self.transport).write(offset, data);
        }
    }

    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        lock(&self.serial).read(port, data);
    }

    pub(crate) fn port_write(&self, port: u16, data: &[u8]) {
        lock(&self.serial).write(port, data);
    }
}

/// As much of a serial port as polling takes.
pub(crate) struct Serial {
    input: Receiver<u8>,
    next: Option<u8>,
    /// The first registers are the divisor's.
    divisor: bool,
}

impl Serial {
    const DATA: u16 = 0x3f8;
    const LINE_CONTROL: u16 = 0x3fb;
    const LINE_STATUS: u16 = 0x3fd;

    pub(crate) fn new() -> io::Result<Self> {
        let (put, input) = mpsc::sync_channel(256);
        let read = move || read_input(&put);
        thread::Builder::new().name("stdin".into()).spawn(read)?;
        Ok(Self {
            input,
            next: None,
            divisor: false,
        })
    }

    fn read(&mut self, port: u16, data: &mut [u8]) {
        self.next = self.next.or_else(|| self.input.try_recv().ok());
        data.fill(match port {
            Self::DATA => self.next.take().unwrap_or(0),
            Self::LINE_STATUS => 0x20 | u8::from(self.next.is_some()),
            _ => 0xff,
        });
    }

    fn write(&mut self, port: u16, data: &[u8]) {
        match port {
            Self::DATA if !self.divisor => {
                // If nobody listens there is nobody to tell.
                let _ = io::stdout().write_all(data);
            }
            Self::LINE_CONTROL => self.divisor = data.first().is_some_and(|v| v & 0x80 != 0),
            _ => {}
        }
    }
}

/// What is typed, until there is no more of it or nobody wants it.
fn read_input(put: &SyncSender<u8>) {
    let bytes = io::stdin().lock().bytes().map_while(Result::ok);
    let _ = bytes.map(|byte| put.send(byte)).find(Result::is_err);
}
