// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's vhost-user front end, on the `vhost` crate's.

use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::QUEUE_SIZE;
use super::{Companion, Guest, wait_for};

pub const F_NOWRITE: u64 = 1;
pub const F_AUDIT: u64 = 1 << 4;
/// Bits 0 to 4.
pub const F_ALL: u64 = 0x1f;
pub const F_MSR: u64 = 1 << 5;
pub const F_KERNEL: u64 = 1 << 6;
pub const F_EVENT_IDX: u64 = 1 << 29;

pub struct FrontEnd {
    pub frontend: Frontend,
    pub features: u64,
    kick: [EventFd; 3],
    call: [EventFd; 3],
}

impl FrontEnd {
    /// Connects and starts the rings of requests and events where the guest's used rings are, as QEMU does with a
    /// companion that was started again.
    pub fn connect(companion: &Companion, guest: &Guest) -> Self {
        Self::connect_with(companion, guest, !0)
    }

    pub fn connect_with(companion: &Companion, guest: &Guest, wanted: u64) -> Self {
        let mut front_end = Self::negotiate(companion, wanted);
        front_end.frontend.set_mem_table(&regions(guest)).unwrap();
        for queue in 0..2 {
            front_end.start(queue, guest, guest.used_idx(queue));
        }
        front_end
    }

    pub fn negotiate(companion: &Companion, wanted: u64) -> Self {
        let mut front_end = Self::connect_only(companion);
        let frontend = &mut front_end.frontend;
        let features = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(
            protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ)
        );
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 3);
        frontend.set_owner().unwrap();
        frontend.set_features(features & wanted | 1 << 30).unwrap();
        front_end.features = features;
        front_end
    }

    pub fn connect_only(companion: &Companion) -> Self {
        let stream = UnixStream::connect(companion.socket_path()).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            frontend: Frontend::from_stream(stream, 3),
            features: 0,
            kick: [event(), event(), event()],
            call: [event(), event(), event()],
        }
    }

    /// Starts a ring at `base`, with a kick descriptor of its own as QEMU has.
    pub fn start(&mut self, queue: usize, guest: &Guest, base: u16) {
        let host = |at| guest.memory.get_host_address(GuestAddress(at)).unwrap() as u64;
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: host(guest.descriptors_at(queue)),
            used_ring_addr: host(guest.used_at(queue)),
            avail_ring_addr: host(guest.avail_at(queue)),
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(queue, QUEUE_SIZE).unwrap();
        frontend.set_vring_base(queue, base).unwrap();
        frontend.set_vring_addr(queue, &addresses).unwrap();
        frontend.set_vring_kick(queue, &self.kick[queue]).unwrap();
        frontend.set_vring_call(queue, &self.call[queue]).unwrap();
        frontend.set_vring_enable(queue, true).unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.kick[queue].write(1).unwrap();
    }

    /// Gives a ring another kick descriptor while it runs.
    pub fn replace_kick(&mut self, queue: usize) -> EventFd {
        let new = EventFd::new(EFD_NONBLOCK).unwrap();
        self.frontend.set_vring_kick(queue, &new).unwrap();
        std::mem::replace(&mut self.kick[queue], new)
    }

    pub fn wait_for_interrupt(&self, queue: usize) {
        wait_for("an interrupt", || self.call[queue].read().ok());
    }

    pub fn stop(&mut self, queue: usize) -> u16 {
        self.frontend.get_vring_base(queue).unwrap() as u16
    }

    pub fn config(&mut self) -> Config {
        Config(self.config_bytes(0, 80))
    }

    pub fn config_bytes(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let buf = vec![0; size as usize];
        self.frontend
            .get_config(offset, size, VhostUserConfigFlags::empty(), &buf)
            .unwrap()
            .1
    }

    /// The companion has closed the connection.
    pub fn assert_closed(&mut self) {
        wait_for("the end of the vhost-user connection", || {
            self.frontend.get_features().is_err().then_some(())
        });
    }
}

pub fn regions(guest: &Guest) -> Vec<VhostUserMemoryRegionInfo> {
    guest
        .memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect()
}

pub struct Config(Vec<u8>);

impl Config {
    fn field(&self, at: usize, n: usize) -> u64 {
        self.0[at..at + n]
            .iter()
            .rev()
            .fold(0, |v, &b| v << 8 | u64::from(b))
    }

    pub fn version(&self) -> u64 {
        self.field(0, 4)
    }
    pub fn page_size(&self) -> u64 {
        self.field(4, 4)
    }
    pub fn deny_bits(&self) -> u64 {
        self.field(8, 8)
    }
    pub fn max_request_ranges(&self) -> u64 {
        self.field(16, 4)
    }
    pub fn max_ranges(&self) -> u64 {
        self.field(20, 4)
    }
    pub fn generation(&self) -> u64 {
        self.field(24, 8)
    }
    pub fn ranges_in_force(&self) -> u64 {
        self.field(32, 4)
    }
    pub fn violations(&self) -> u64 {
        self.field(40, 8)
    }
    pub fn events_lost(&self) -> u64 {
        self.field(48, 8)
    }
    pub fn malformed(&self) -> u64 {
        self.field(56, 8)
    }
    pub fn audit_bits(&self) -> u64 {
        self.field(64, 8)
    }
    pub fn max_msr_ranges(&self) -> u64 {
        self.field(72, 4)
    }
    pub fn msr_ranges_in_force(&self) -> u64 {
        self.field(76, 4)
    }
}
