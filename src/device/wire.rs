// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The formats of `docs/device.md`: requests, responses, events and the configuration space.
//!
//! Pure: bytes that were copied out of guest memory come in, a validated request or the errno
//! that the specification gives comes out. Knows neither rings nor who enforces.

use crate::protect::{Attributes, Deny, GfnRange, Protection};
use crate::vm::enforcer::Violation;

/// Virtio device ID: the end of the range that virtio-pci can express, left to experiments.
pub const DEVICE_ID: u32 = 63;
/// Most entries that a driver may give a queue. QEMU lets a guest choose up to this many, whatever the device asks for.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Chains that are served at once; more wait in the ring.
pub const QUEUE_SIZE: u16 = 64;
/// Most descriptors in a chain that is served.
pub const MAX_DESCRIPTORS: usize = 256;
/// Most entries in one request.
pub const MAX_REQUEST_RANGES: u32 = 4096;
/// Bytes of a request before its entries.
pub const REQUEST_HEADER_SIZE: usize = 8;
/// Most device-readable bytes that a request can use.
pub const MAX_REQUEST_SIZE: usize = REQUEST_HEADER_SIZE + RANGE_SIZE * MAX_REQUEST_RANGES as usize;
/// Bytes of a response.
pub const RESPONSE_SIZE: usize = 16;
/// Bytes of an event.
pub const EVENT_SIZE: usize = 64;
/// Bytes of the configuration space.
pub const CONFIG_SIZE: usize = 64;

const RANGE_SIZE: usize = 24;
const TYPE_LOCK: u16 = 1;
const EVENT_VIOLATION: u16 = 1;
const CONFIG_VERSION: u32 = 1;
const NO_INDEX: u32 = u32::MAX;

/// Feature bits of the device, each a deny bit that this host enforces.
const DENY_FEATURES: [(u32, Deny); 1] = [(0, Deny::NOWRITE)];

/// The feature bits to offer on a host that enforces `deny`.
pub fn features_of(deny: Deny) -> u64 {
    DENY_FEATURES
        .iter()
        .filter(|(_, d)| deny.contains(*d))
        .map(|(bit, _)| 1 << bit)
        .sum()
}

/// The deny bits that a driver may use that negotiated `features`.
pub fn deny_of(features: u64) -> Deny {
    DENY_FEATURES
        .iter()
        .filter(|(bit, _)| features & (1 << bit) != 0)
        .map(|&(_, d)| d)
        .collect()
}

/// The status of a response that is not 0: a Linux errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// The VM's side failed for a reason of its own.
    Eio = 5,
    /// Too many entries.
    E2big = 7,
    /// The request lies in memory that the guest does not have.
    Efault = 14,
    /// An emulated device is writing to a range.
    Ebusy = 16,
    /// The request makes no sense.
    Einval = 22,
    /// No room for more ranges.
    Enospc = 28,
    /// Not something that this device or this host does.
    Eopnotsupp = 95,
    /// The VM was reset meanwhile.
    Estale = 116,
}

impl Errno {
    /// The errno with this number, if the device's specification has it.
    pub fn from_number(number: u32) -> Option<Self> {
        use Errno::*;
        [
            Eio, E2big, Efault, Ebusy, Einval, Enospc, Eopnotsupp, Estale,
        ]
        .into_iter()
        .find(|&e| e as u32 == number)
    }
}

/// Why a request is refused: the status and index of its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub errno: Errno,
    /// The first entry that is wrong, where one is.
    pub index: Option<u32>,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, index: None }
    }
}

/// What a driver may ask for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Deny bits that are enforced and were negotiated.
    pub deny: Deny,
    /// Most entries in one request: at most [`MAX_REQUEST_RANGES`].
    pub max_request_ranges: u32,
}

/// Reads a request.
///
/// `bytes` is the device-readable part of the chain, of which `total` bytes were there; more
/// than [`MAX_REQUEST_SIZE`] are not copied. The order of the checks is that of the
/// specification.
///
/// # Errors
///
/// The status and index of the response.
pub fn parse_request(bytes: &[u8], total: u64, limits: Limits) -> Result<Vec<Protection>, Refusal> {
    let (header, entries) = bytes
        .split_first_chunk::<REQUEST_HEADER_SIZE>()
        .ok_or(Errno::Einval)?;
    let [t0, t1, f0, f1, count @ ..] = *header;
    let count = u32::from_le_bytes(count);
    if u16::from_le_bytes([t0, t1]) != TYPE_LOCK {
        return Err(Errno::Eopnotsupp.into());
    }
    if u16::from_le_bytes([f0, f1]) != 0 {
        return Err(Errno::Einval.into());
    }
    let size_of = |count: u32| (REQUEST_HEADER_SIZE + RANGE_SIZE * count as usize) as u64;
    let most = limits.max_request_ranges.min(MAX_REQUEST_RANGES);
    if count > most || total > size_of(most) {
        return Err(Errno::E2big.into());
    }
    if count == 0 || total != size_of(count) {
        return Err(Errno::Einval.into());
    }
    let (entries, _) = entries.as_chunks::<RANGE_SIZE>();
    entries
        .iter()
        .zip(0..)
        .map(|(entry, index)| {
            parse_entry(entry, limits.deny).map_err(|errno| Refusal {
                errno,
                index: Some(index),
            })
        })
        .collect()
}

fn parse_entry(entry: &[u8; RANGE_SIZE], offered: Deny) -> Result<Protection, Errno> {
    let (words, _) = entry.as_chunks::<8>();
    let [start, end, attributes] = [0, 1, 2].map(|i| u64::from_le_bytes(words[i]));
    let range = GfnRange::new(start, end).map_err(|_| Errno::Einval)?;
    let deny = Deny::from_bits(attributes)
        .filter(|d| !d.is_empty())
        .ok_or(Errno::Einval)?;
    if !offered.contains(deny) {
        return Err(Errno::Eopnotsupp);
    }
    Ok(Protection {
        range,
        attributes: Attributes::locked(deny),
    })
}

/// The answer to a request. `Ok` carries the generation in which the lock holds.
pub fn encode_response(response: Result<u64, Refusal>) -> [u8; RESPONSE_SIZE] {
    let (status, index, value) = match response {
        Ok(generation) => (0, NO_INDEX, generation),
        Err(Refusal { errno, index }) => (errno as u32, index.unwrap_or(NO_INDEX), 0),
    };
    let mut bytes = [0; RESPONSE_SIZE];
    put(&mut bytes, 0, &status.to_le_bytes());
    put(&mut bytes, 4, &index.to_le_bytes());
    put(&mut bytes, 8, &value.to_le_bytes());
    bytes
}

/// A violation as an event; `lost` is the device's own count, not that of the violation.
pub fn encode_event(violation: &Violation, lost: u64) -> [u8; EVENT_SIZE] {
    let mut bytes = [0; EVENT_SIZE];
    put(&mut bytes, 0, &EVENT_VIOLATION.to_le_bytes());
    put(&mut bytes, 2, &violation.access.to_le_bytes());
    put(&mut bytes, 4, &violation.source.to_le_bytes());
    put(&mut bytes, 8, &violation.gpa.to_le_bytes());
    put(&mut bytes, 16, &violation.gva.to_le_bytes());
    put(&mut bytes, 24, &violation.rip.to_le_bytes());
    put(&mut bytes, 32, &violation.value.to_le_bytes());
    put(&mut bytes, 40, &violation.size.to_le_bytes());
    put(&mut bytes, 44, &violation.times.to_le_bytes());
    put(&mut bytes, 48, &lost.to_le_bytes());
    put(&mut bytes, 56, &violation.action.to_le_bytes());
    bytes
}

/// The fields of the configuration space that are not constant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Deny bits that the host enforces now.
    pub deny: Deny,
    /// Most entries in one request.
    pub max_request_ranges: u32,
    /// Most disjoint ranges in force at once.
    pub max_ranges: u32,
    /// Grows with every system reset.
    pub generation: u64,
    /// Disjoint ranges denied now.
    pub ranges_in_force: u32,
    /// Accesses refused.
    pub violations: u64,
    /// Events dropped because nobody took them.
    pub events_lost: u64,
    /// Chains that could not hold a response.
    pub malformed: u64,
}

impl Config {
    /// The configuration space.
    pub fn encode(&self) -> [u8; CONFIG_SIZE] {
        let mut bytes = [0; CONFIG_SIZE];
        put(&mut bytes, 0, &CONFIG_VERSION.to_le_bytes());
        put(&mut bytes, 4, &4096u32.to_le_bytes());
        put(&mut bytes, 8, &self.deny.bits().to_le_bytes());
        put(&mut bytes, 16, &self.max_request_ranges.to_le_bytes());
        put(&mut bytes, 20, &self.max_ranges.to_le_bytes());
        put(&mut bytes, 24, &self.generation.to_le_bytes());
        put(&mut bytes, 32, &self.ranges_in_force.to_le_bytes());
        put(&mut bytes, 40, &self.violations.to_le_bytes());
        put(&mut bytes, 48, &self.events_lost.to_le_bytes());
        put(&mut bytes, 56, &self.malformed.to_le_bytes());
        bytes
    }

    /// `size` bytes of the configuration space from `offset` on, zeros behind its end.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut bytes = vec![0; size as usize];
        let config = self.encode();
        if let Some(there) = config.get(offset as usize..) {
            let n = there.len().min(bytes.len());
            bytes[..n].copy_from_slice(&there[..n]);
        }
        bytes
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        deny: Deny::NOWRITE,
        max_request_ranges: 100,
    };

    fn request(header: [u8; 8], entries: &[[u64; 3]]) -> Vec<u8> {
        let words = entries
            .as_flattened()
            .iter()
            .flat_map(|word| word.to_le_bytes());
        header.into_iter().chain(words).collect()
    }

    /// The table of the specification, said once more: entry by entry, check by check.
    fn expected(entries: &[[u64; 3]]) -> Result<(), Refusal> {
        const TOP: u64 = (1 << 52) - 1;
        for (&[start, end, attributes], index) in entries.iter().zip(0..) {
            let no_range = start > TOP || end > TOP || start > end;
            let errno = if no_range || attributes == 0 || attributes > 15 {
                Errno::Einval
            } else if attributes != 1 {
                Errno::Eopnotsupp
            } else {
                continue;
            };
            return Err(Refusal {
                errno,
                index: Some(index),
            });
        }
        Ok(())
    }

    fn frame() -> impl Strategy<Value = u64> {
        prop_oneof![8 => 0u64..100, 1 => (1u64 << 52) - 2..(1 << 52) + 1, 1 => any::<u64>()]
    }

    fn attributes() -> impl Strategy<Value = u64> {
        prop_oneof![20 => Just(1), 1 => 0u64..20, 1 => any::<u64>()]
    }

    proptest! {
        #[test]
        fn entries_are_refused_as_the_specification_says(
            entries in prop::collection::vec(
                (frame(), 0u64..50, attributes()).prop_map(|(s, n, a)| [s, s.wrapping_add(n), a]),
                1..20,
            ),
        ) {
            let header = [1, 0, 0, 0, entries.len() as u8, 0, 0, 0];
            let bytes = request(header, &entries);
            let parsed = parse_request(&bytes, bytes.len() as u64, LIMITS);
            match expected(&entries) {
                Err(refusal) => prop_assert_eq!(parsed, Err(refusal)),
                Ok(()) => {
                    let read: Vec<_> = parsed
                        .unwrap()
                        .iter()
                        .map(|p| [p.range.start().number(), p.range.end().number(), p.attributes.deny.bits()])
                        .collect();
                    prop_assert_eq!(read, entries);
                }
            }
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            start in prop::option::of(0u8..8),
            more in prop_oneof![3 => Just(0u64), 1 => any::<u32>().prop_map(u64::from)],
        ) {
            let mut bytes = bytes;
            if let (Some(count), true) = (start, bytes.len() >= 8) {
                bytes[..8].copy_from_slice(&[1, 0, 0, 0, count, 0, 0, 0]);
            }
            let total = bytes.len() as u64 + more;
            let parsed = parse_request(&bytes, total, LIMITS);
            prop_assert!(parsed.is_err() || more == 0);
        }

        #[test]
        fn any_part_of_the_configuration_space_has_the_size_asked_for(
            offset in prop_oneof![0u32..100, any::<u32>()],
            size in 0u32..300,
        ) {
            let read = Config::default().read(offset, size);
            prop_assert_eq!(read.len(), size as usize);
        }
    }

    #[test]
    fn each_errno_is_found_by_its_number() {
        for number in [5, 7, 14, 16, 22, 28, 95, 116] {
            assert_eq!(Errno::from_number(number).map(|e| e as u32), Some(number));
        }
        assert_eq!(Errno::from_number(0), None);
        assert_eq!(Errno::from_number(1), None);
    }

    #[test]
    fn a_vm_that_takes_fewer_ranges_at_once_lowers_the_limit() {
        let limits = Limits {
            max_request_ranges: 1,
            ..LIMITS
        };
        let bytes = request([1, 0, 0, 0, 2, 0, 0, 0], &[[1, 1, 1]; 2]);
        let refusal = parse_request(&bytes, bytes.len() as u64, limits).unwrap_err();
        assert_eq!(
            refusal,
            Refusal {
                errno: Errno::E2big,
                index: None
            }
        );
    }
}
