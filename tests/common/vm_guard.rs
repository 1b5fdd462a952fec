// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's vm-guard object: speaks the control channel as `docs/control-channel.md` has it, with
//! code of its own, so that a mistake in the crate's is seen.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::{Companion, DEADLINE, NO_INDEX, NOWRITE, wait_for};

pub const HELLO: u16 = 1;
pub const STATE: u16 = 2;
pub const RESULT: u16 = 3;
pub const VIOLATION: u16 = 4;
pub const RESET: u16 = 5;
pub const MSR_STATE: u16 = 6;

/// The host has no policy, in HELLO.
pub const NO_POLICY: u32 = u32::MAX;

pub type Range = (u64, u64, u64);

/// First and last MSR, access, action, flags, operand.
pub type Rule = (u32, u32, u16, u16, u32, u64);

pub struct VmGuard {
    pub stream: UnixStream,
    pub generation: u64,
    /// Disjoint ranges that it says are in force.
    pub in_force: u32,
    /// The same of MSRs.
    pub msrs_in_force: u32,
    /// The MSR_POLICY that came after HELLO: `seq`, payload.
    pub policy: Option<(u64, Vec<u8>)>,
}

#[derive(Debug)]
pub struct Protect {
    pub seq: u64,
    pub generation: u64,
    pub ranges: Vec<Range>,
}

pub fn message(kind: u16, seq: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(seq.to_le_bytes());
    bytes.extend(payload);
    bytes
}

pub fn hello_payload(deny: u64, generation: u64) -> Vec<u8> {
    hello_with(deny, 0, generation)
}

pub fn hello_with(deny: u64, audit: u64, generation: u64) -> Vec<u8> {
    let mut bytes = b"VGRD".to_vec();
    for field in [3u32, 2, 12] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(deny.to_le_bytes());
    bytes.extend(generation.to_le_bytes());
    for field in [1000, 4096, u32::MAX, 1] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(audit.to_le_bytes());
    for field in [0, u32::MAX, 64, NO_POLICY] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

/// A VM that can do everything, and can have so many ranges of MSRs.
pub fn hello_msrs(max_ranges: u32, filter_ranges: u32, default: u32) -> Vec<u8> {
    let mut bytes = hello_with(0xf, 0xf, 1);
    bytes.truncate(56);
    for field in [max_ranges, filter_ranges, 64, default] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

pub fn rule_bytes(&(first, last, access, action, flags, operand): &Rule) -> Vec<u8> {
    let mut bytes = first.to_le_bytes().to_vec();
    bytes.extend(last.to_le_bytes());
    bytes.extend(access.to_le_bytes());
    bytes.extend(action.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(operand.to_le_bytes());
    bytes
}

pub fn read_rules(bytes: &[u8]) -> Vec<Rule> {
    assert!(bytes.len().is_multiple_of(24), "{bytes:x?}");
    let rules = bytes.chunks(24).map(|bytes| {
        let field = |at: usize, n: usize| {
            let bytes = bytes[at..at + n].iter().rev();
            bytes.fold(0u64, |v, &b| v << 8 | u64::from(b))
        };
        let (first, last) = (field(0, 4) as u32, field(4, 4) as u32);
        let (access, action) = (field(8, 2) as u16, field(10, 2) as u16);
        (
            first,
            last,
            access,
            action,
            field(12, 4) as u32,
            field(16, 8),
        )
    });
    rules.collect()
}

pub fn msr_state_payload(generation: u64, guest: &[Rule], host: &[Rule]) -> Vec<u8> {
    let mut bytes = generation.to_le_bytes().to_vec();
    bytes.extend((guest.len() as u32).to_le_bytes());
    bytes.extend((host.len() as u32).to_le_bytes());
    bytes.extend(guest.iter().chain(host).flat_map(rule_bytes));
    bytes
}

/// MSR_STATE with no rules, and STATE.
pub fn states(seq: u64, generation: u64, ranges: &[Range]) -> Vec<u8> {
    [
        message(MSR_STATE, seq, &msr_state_payload(generation, &[], &[])),
        message(STATE, seq, &state_payload(generation, ranges)),
    ]
    .concat()
}

pub fn state_payload(generation: u64, ranges: &[Range]) -> Vec<u8> {
    let mut bytes = generation.to_le_bytes().to_vec();
    bytes.extend((ranges.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    for (start, end, attributes) in ranges {
        for field in [start, end, attributes] {
            bytes.extend(field.to_le_bytes());
        }
    }
    bytes
}

pub fn violation_payload(source: u32, gpa: u64, times: u32, lost: u64) -> Vec<u8> {
    violation_with(1, 1, source, gpa, times, lost)
}

pub fn violation_with(
    access: u8,
    action: u32,
    source: u32,
    gpa: u64,
    times: u32,
    lost: u64,
) -> Vec<u8> {
    let mut bytes = vec![1, 0, access, 0];
    bytes.extend(source.to_le_bytes());
    for field in [gpa, 0xffff_8000_0000_1234, 0xffff_ffff_8100_0000, 0xabcd] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(8u32.to_le_bytes());
    bytes.extend(times.to_le_bytes());
    bytes.extend(lost.to_le_bytes());
    bytes.extend(action.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

impl VmGuard {
    /// Connects and says HELLO and an empty STATE, of generation 1.
    pub fn connect(companion: &Companion) -> Self {
        Self::connect_with(companion, 1, &[])
    }

    pub fn connect_with(companion: &Companion, generation: u64, ranges: &[Range]) -> Self {
        Self::connect_as(companion, &hello_payload(NOWRITE, generation), ranges)
    }

    /// Connects as the VM that `hello` describes.
    pub fn connect_as(companion: &Companion, hello: &[u8], ranges: &[Range]) -> Self {
        let greeted = companion.log_lines("VM connected:");
        let mut vm_guard = Self::connect_silently(companion);
        let generation = u64::from_le_bytes(hello[24..32].try_into().unwrap());
        vm_guard.generation = generation;
        vm_guard.send(HELLO, 0, hello);
        vm_guard.send_states(0, generation, ranges);
        vm_guard.in_force = ranges.len() as u32;
        companion.wait_for_log_lines("VM connected:", greeted + 1);
        vm_guard
    }

    /// Connects as a VM with rules for MSRs: those of the guest and those of the host.
    pub fn connect_msrs(
        companion: &Companion,
        hello: &[u8],
        guest: &[Rule],
        host: &[Rule],
    ) -> Self {
        let greeted = companion.log_lines("VM connected:");
        let mut vm_guard = Self::connect_silently(companion);
        vm_guard.send(HELLO, 0, hello);
        vm_guard.msrs_in_force = guest.len() as u32;
        vm_guard.send(MSR_STATE, 0, &msr_state_payload(1, guest, host));
        vm_guard.send(STATE, 0, &state_payload(1, &[]));
        companion.wait_for_log_lines("VM connected:", greeted + 1);
        vm_guard
    }

    pub fn on(stream: UnixStream) -> Self {
        Self {
            stream,
            generation: 1,
            in_force: 0,
            msrs_in_force: 0,
            policy: None,
        }
    }

    /// Connects, takes the companion's HELLO and MSR_POLICY, and says nothing.
    pub fn connect_silently(companion: &Companion) -> Self {
        // A connection that replaces one that was just closed may come too early.
        wait_for("HELLO of the companion", || {
            let stream = companion.connect_control();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut vm_guard = Self::on(stream);
            let (kind, seq, payload) = vm_guard.try_receive()?;
            assert_eq!((kind, seq), (0x101, 0));
            assert_eq!(payload[..8], *b"VGRD\x03\0\0\0");
            assert_eq!((payload.len(), &payload[9..]), (16, &[0; 7][..]));
            if payload[8] == 1 {
                let (kind, seq, payload) = vm_guard.try_receive()?;
                assert_eq!(kind, 0x105, "MSR_POLICY");
                vm_guard.policy = Some((seq, payload));
            } else {
                assert_eq!(payload[8], 0);
            }
            Some(vm_guard)
        })
    }

    /// Sends a MSR_STATE without rules and a STATE.
    pub fn send_states(&mut self, seq: u64, generation: u64, ranges: &[Range]) {
        let bytes = states(seq, generation, ranges);
        self.stream.write_all(&bytes).unwrap();
    }

    /// `seq`, generation and rules of a MSR_RULES.
    pub fn msr_rules(&mut self) -> (u64, u64, Vec<Rule>) {
        let (kind, seq, payload) = self.try_receive().expect("MSR_RULES, not the end");
        assert_eq!(kind, 0x106, "MSR_RULES");
        let rules = read_rules(&payload[16..]);
        let head = [rules.len() as u32, 0].map(u32::to_le_bytes);
        assert_eq!(payload[8..16], *head.as_flattened());
        let generation = u64::from_le_bytes(payload[..8].try_into().unwrap());
        (seq, generation, rules)
    }

    pub fn send(&mut self, kind: u16, seq: u64, payload: &[u8]) {
        self.stream.write_all(&message(kind, seq, payload)).unwrap();
    }

    /// The next message, or `None` when the companion has closed the connection.
    pub fn try_receive(&mut self) -> Option<(u16, u64, Vec<u8>)> {
        let mut header = [0; 16];
        if self.stream.read_exact(&mut header).is_err() {
            return None;
        }
        let field = |at: usize, n: usize| {
            header[at..at + n]
                .iter()
                .rev()
                .fold(0u64, |v, &b| v << 8 | u64::from(b))
        };
        assert_eq!(field(2, 2), 0, "flags");
        let mut payload = vec![0; field(4, 4) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Some((field(0, 2) as u16, field(8, 8), payload))
    }

    pub fn assert_closed(mut self) {
        let mut rest = Vec::new();
        // A reset counts: the companion does not read what it does not want.
        let _ = self.stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{rest:x?}");
    }

    /// That nothing was sent.
    pub fn assert_silent(&mut self) {
        assert!(!self.has_input(), "{:x?}", self.try_receive());
    }

    /// Whether something has been sent that was not received yet.
    pub fn has_input(&self) -> bool {
        rustix::io::ioctl_fionread(&self.stream).unwrap() > 0
    }

    pub fn protect(&mut self) -> Protect {
        let (kind, seq, payload) = self.try_receive().expect("PROTECT, not the end");
        assert_eq!(kind, 0x102, "PROTECT");
        let words: Vec<_> = payload
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let ranges: Vec<_> = words[2..].chunks(3).map(|r| (r[0], r[1], r[2])).collect();
        assert_eq!(words[1], ranges.len() as u64);
        Protect {
            seq,
            generation: words[0],
            ranges,
        }
    }

    /// The sequence number and generation of a SEAL.
    pub fn seal(&mut self) -> (u64, u64) {
        let (kind, seq, payload) = self.try_receive().expect("SEAL, not the end");
        assert_eq!((kind, payload.len()), (0x104, 16));
        assert_eq!(payload[8..], [0; 8]);
        (seq, u64::from_le_bytes(payload[..8].try_into().unwrap()))
    }

    /// The sequence number of a GET_STATE.
    pub fn get_state(&mut self) -> u64 {
        let (kind, seq, payload) = self.try_receive().expect("GET_STATE, not the end");
        assert_eq!((kind, payload.len()), (0x103, 0));
        seq
    }

    pub fn result(&mut self, seq: u64, status: u32, index: u32) {
        let mut payload = status.to_le_bytes().to_vec();
        payload.extend(index.to_le_bytes());
        payload.extend(self.generation.to_le_bytes());
        payload.extend(self.in_force.to_le_bytes());
        payload.extend(self.msrs_in_force.to_le_bytes());
        self.send(RESULT, seq, &payload);
    }

    /// Answers that all ranges are enforced; they are to be new, apart from each other.
    pub fn succeed(&mut self, protect: &Protect) {
        assert_eq!(protect.generation, self.generation);
        self.in_force += protect.ranges.len() as u32;
        self.result(protect.seq, 0, NO_INDEX);
    }

    /// Answers that it is done, and that so many ranges are in force now.
    pub fn done(&mut self, seq: u64, in_force: u32) {
        self.in_force = in_force;
        self.result(seq, 0, NO_INDEX);
    }

    pub fn reset(&mut self) {
        self.generation += 1;
        (self.in_force, self.msrs_in_force) = (0, 0);
        let generation = self.generation.to_le_bytes();
        self.send(RESET, 0, &generation);
    }
}
