// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages of the control channel that go to QEMU, `docs/control-channel.md`: values to bytes.

use super::msr_wire;
use super::wire::{HEADER_SIZE, MAGIC, RANGE_SIZE, VERSION};
use crate::protect::msr::{self, Unlisted};
use crate::protect::{Attributes, Demand, Order, Protection};

const TYPE_COMPANION_HELLO: u16 = 0x101;
const TYPE_PROTECT: u16 = 0x102;
const TYPE_GET_STATE: u16 = 0x103;
const TYPE_SEAL: u16 = 0x104;
const TYPE_MSR_POLICY: u16 = 0x105;
const TYPE_MSR_RULES: u16 = 0x106;

/// In the companion's `HELLO`: an `MSR_POLICY` is the next message.
const FLAG_MSR_POLICY: u32 = 1;

/// The companion's `HELLO`, and the host's policy with this `seq`, if there is one.
pub(crate) fn encode_hello(policy: Option<(u64, &msr::Policy)>) -> Vec<u8> {
    let flags = if policy.is_some() { FLAG_MSR_POLICY } else { 0 };
    let mut bytes = header(TYPE_COMPANION_HELLO, 16, 0);
    for field in [MAGIC, VERSION, flags, 0] {
        bytes.extend(field.to_le_bytes());
    }
    if let Some((seq, policy)) = policy {
        let rules = policy.rules();
        bytes.extend(rules_header(TYPE_MSR_POLICY, seq, rules.len()));
        let unlisted: u32 = match policy.unlisted() {
            Unlisted::Allow => 0,
            Unlisted::Deny => 1,
        };
        bytes.extend(unlisted.to_le_bytes());
        bytes.extend((rules.len() as u32).to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(rules.iter().flat_map(msr_wire::encode_host_rule));
    }
    bytes
}

/// `PROTECT`, `MSR_RULES` or `SEAL`.
pub(crate) fn encode_demand(seq: u64, generation: u64, demand: &Demand) -> Vec<u8> {
    match demand {
        Demand::Pages(Order::Lock(entries)) => {
            encode_protect(seq, generation, entries, Attributes::IMMUTABLE)
        }
        Demand::Pages(Order::Protect(entries)) => encode_protect(seq, generation, entries, 0),
        Demand::Msrs(order) => {
            let rules = order.rules();
            let immutable = matches!(order, msr::Order::Lock(_));
            let mut bytes = rules_header(TYPE_MSR_RULES, seq, rules.len());
            bytes.extend(generation.to_le_bytes());
            bytes.extend((rules.len() as u32).to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
            let encode = |rule| msr_wire::encode_rule(rule, immutable);
            bytes.extend(rules.iter().flat_map(encode));
            bytes
        }
        Demand::Seal => {
            let mut bytes = header(TYPE_SEAL, 16, seq);
            bytes.extend(generation.to_le_bytes());
            bytes.extend(0u64.to_le_bytes());
            bytes
        }
    }
}

/// `PROTECT`, with the ranges in the guest's order, and the mark of their kind on all of them.
fn encode_protect(seq: u64, generation: u64, entries: &[Protection], mark: u64) -> Vec<u8> {
    let count = u32::try_from(entries.len()).expect("at most 4096 ranges in a request");
    let mut bytes = header(TYPE_PROTECT, 16 + count * RANGE_SIZE, seq);
    bytes.extend(generation.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    for Protection { range, attributes } in entries {
        bytes.extend(range.start().number().to_le_bytes());
        bytes.extend(range.end().number().to_le_bytes());
        let bits = attributes.bits() & !Attributes::IMMUTABLE | mark;
        bytes.extend(bits.to_le_bytes());
    }
    bytes
}

/// The header of a message with so many rules behind 16 bytes.
fn rules_header(kind: u16, seq: u64, rules: usize) -> Vec<u8> {
    let count = u32::try_from(rules).expect("at most 4096 rules in a message");
    header(kind, 16 + count * RANGE_SIZE, seq)
}

/// `GET_STATE`.
pub(crate) fn encode_get_state(seq: u64) -> Vec<u8> {
    header(TYPE_GET_STATE, 0, seq)
}

pub(super) fn header(kind: u16, length: u32, seq: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE + length as usize);
    bytes.extend(kind.to_le_bytes());
    bytes.extend(0u16.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(seq.to_le_bytes());
    bytes
}
