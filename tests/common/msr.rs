// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests about MSRs, as a driver makes them.

use super::guest::{MSR_BITMAP, MSR_QUERY};
use super::vm_guard::{Rule, rule_bytes};
use super::{NO_INDEX, Response, Setup};

pub const R: u16 = 1;
pub const W: u16 = 2;
pub const RW: u16 = 3;
pub const ALLOW: u16 = 0;
pub const LOG: u16 = 1;
pub const PIN: u16 = 2;
pub const DENY: u16 = 4;
pub const EMULATE: u16 = 8;
/// The flag of a rule.
pub const FIXED: u32 = 1 << 31;

pub fn deny(first: u32, last: u32, access: u16) -> Rule {
    (first, last, access, DENY, 0, 0)
}

pub fn pin(first: u32, last: u32, mask: u64) -> Rule {
    (first, last, W, PIN, 0, mask)
}

/// A rule as it is told when it is locked.
pub fn fixed((first, last, access, action, flags, operand): Rule) -> Rule {
    (first, last, access, action, flags | FIXED, operand)
}

pub fn request(kind: u16, rules: &[Rule]) -> Vec<u8> {
    with_header(
        kind,
        0,
        rules.len() as u32,
        &rules.iter().flat_map(rule_bytes).collect::<Vec<_>>(),
    )
}

pub fn with_header(kind: u16, flags: u16, count: u32, bytes: &[u8]) -> Vec<u8> {
    let mut request = kind.to_le_bytes().to_vec();
    request.extend(flags.to_le_bytes());
    request.extend(count.to_le_bytes());
    request.extend(bytes);
    request
}

pub fn bitmap(flags: u32, nmsrs: u32, base: u32, pad: u32, bits: &[u8]) -> Vec<u8> {
    let header = [flags, nmsrs, base, pad].map(u32::to_le_bytes);
    [header.as_flattened(), bits].concat()
}

pub fn bitmaps(bitmaps: &[Vec<u8>]) -> Vec<u8> {
    with_header(MSR_BITMAP, 0, bitmaps.len() as u32, &bitmaps.concat())
}

impl Setup {
    /// Makes a request that the vm-guard carries out, so that it comes to so many ranges in force.
    /// Returns the rules that the vm-guard was asked for.
    pub fn msr_order(&mut self, bytes: &[u8], in_force: u32) -> Vec<Rule> {
        let head = self.guest.request(bytes);
        self.front_end.kick(0);
        let (seq, generation, rules) = self.vm_guard.msr_rules();
        assert_eq!(generation, self.vm_guard.generation);
        self.vm_guard.msrs_in_force = in_force;
        self.vm_guard.result(seq, 0, NO_INDEX);
        let value = self.vm_guard.generation;
        let ok = Response {
            status: 0,
            index: NO_INDEX,
            value,
        };
        assert_eq!(self.guest.response(head), ok);
        rules
    }

    /// A query with room for so many rules: how many there are, and those told.
    pub fn msr_query(&mut self, first: u32, last: u32, access: u16, room: u32) -> (u64, Vec<Rule>) {
        let bytes = request(MSR_QUERY, &[(first, last, access, 0, 0, 0)]);
        let head = self.guest.request_with_room(&bytes, 16 + 24 * room);
        self.front_end.kick(0);
        let (count, told) = self.guest.query_response(head);
        let told = told.into_iter().map(|(msrs, what, operand)| {
            let (first, last) = (msrs as u32, (msrs >> 32) as u32);
            let (access, action, flags) = (what as u16, (what >> 16) as u16, (what >> 32) as u32);
            (first, last, access, action, flags, operand)
        });
        (count, told.collect())
    }

    /// All rules of the guest.
    pub fn msr_rules(&mut self) -> Vec<Rule> {
        let (count, rules) = self.msr_query(0, u32::MAX, RW, 100);
        assert_eq!(count, rules.len() as u64);
        rules
    }
}
