// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages of the control channel that come from QEMU, `docs/control-channel.md`: bytes to
//! values.
//!
//! Pure. Every length is checked when the header is there, before a byte of payload is kept;
//! what comes out of [`Message::decode`] needs no more checking.

use super::msr_wire::{self, MsrState, MsrStateError};
use crate::protect::msr::Unlisted;
use crate::protect::{
    Attributes, Deny, GfnRange, PAGE_SHIFT, Protection, RangeError, Table, UnknownBits,
};
use crate::vm::enforcer::{
    Accelerator, Access, Action, MsrInfo, Outcome, Policy, Source, Target, Violation, VmInfo,
};

/// "VGRD", the first field of a `HELLO`.
pub(crate) const MAGIC: u32 = 0x4452_4756;
/// The version of the channel that is spoken here.
pub(crate) const VERSION: u32 = 3;
/// Bytes of a message header.
pub(crate) const HEADER_SIZE: usize = 16;
/// Most payload bytes in a message from QEMU.
pub(crate) const MAX_PAYLOAD: u32 = 1 << 20;

const HELLO_SIZE: u32 = 72;
const STATE_HEADER_SIZE: u32 = 16;
const RESULT_SIZE: u32 = 24;
const VIOLATION_SIZE: u32 = 64;
const RESET_SIZE: u32 = 8;
/// Bytes of a range, and of a rule.
pub(super) const RANGE_SIZE: u32 = 24;

const TYPE_HELLO: u16 = 0x01;
const TYPE_STATE: u16 = 0x02;
const TYPE_RESULT: u16 = 0x03;
const TYPE_VIOLATION: u16 = 0x04;
const TYPE_RESET: u16 = 0x05;
const TYPE_MSR_STATE: u16 = 0x06;

const VIOLATION_MEMORY: u16 = 1;
const VIOLATION_MSR: u16 = 2;

const SOURCE_DEVICE: u32 = u32::MAX;

/// Why a message is not one of the specification's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    /// No message has this type.
    #[error("message of unknown type {0:#x}")]
    UnknownType(u16),
    /// No message has flags.
    #[error("message of type {kind:#x} with flags {flags:#x}")]
    Flags {
        /// Type of the message.
        kind: u16,
        /// Its flags.
        flags: u16,
    },
    /// The type does not allow this length.
    #[error("message of type {kind:#x} with {length} bytes of payload")]
    Length {
        /// Type of the message.
        kind: u16,
        /// Its payload in bytes.
        length: u32,
    },
    /// A `HELLO` of something else.
    #[error("HELLO with magic {0:#x}")]
    Magic(u32),
    /// A `HELLO` of another version.
    #[error("HELLO of version {0}; this is version {VERSION}")]
    Version(u32),
    /// A field holds a value that the specification does not give it.
    #[error("{field} is {value:#x}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A range in a `STATE` is not one.
    #[error("range {index} in STATE")]
    Range {
        /// Which range.
        index: usize,
        /// What is wrong.
        #[source]
        source: RangeError,
    },
    /// A range in a `STATE` has attributes that nobody knows.
    #[error("attributes of range {index} in STATE")]
    Attributes {
        /// Which range.
        index: usize,
        /// What is wrong.
        #[source]
        source: UnknownBits,
    },
    /// A range in a `STATE` has attributes that no page has: none, or one that is both denied and
    /// watched.
    #[error("range {index} in STATE has attributes {bits:#x}, as no page has")]
    Impossible {
        /// Which range.
        index: usize,
        /// Its attributes.
        bits: u64,
    },
    /// The ranges in a `STATE` are not sorted and disjoint.
    #[error("range {0} in STATE does not lie above the one before it")]
    Unsorted(usize),
    /// An `MSR_STATE` is not one.
    #[error(transparent)]
    MsrState(#[from] MsrStateError),
}

/// A message header that passed the checks that need no payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    kind: u16,
    length: u32,
    seq: u64,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// Unknown type, flags, or a payload length that the type does not allow.
    pub(crate) fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let (kind, flags) = (fields.u16(), fields.u16());
        let (length, seq) = (fields.u32(), fields.u64());
        let length_fits = match kind {
            TYPE_HELLO => length == HELLO_SIZE,
            TYPE_STATE | TYPE_MSR_STATE => {
                (STATE_HEADER_SIZE..=MAX_PAYLOAD).contains(&length)
                    && (length - STATE_HEADER_SIZE).is_multiple_of(RANGE_SIZE)
            }
            TYPE_RESULT => length == RESULT_SIZE,
            TYPE_VIOLATION => length == VIOLATION_SIZE,
            TYPE_RESET => length == RESET_SIZE,
            _ => return Err(WireError::UnknownType(kind)),
        };
        if flags != 0 {
            return Err(WireError::Flags { kind, flags });
        }
        if !length_fits {
            return Err(WireError::Length { kind, length });
        }
        Ok(Self { kind, length, seq })
    }

    /// Bytes of payload that follow: at most [`MAX_PAYLOAD`].
    pub(crate) fn payload_len(&self) -> usize {
        self.length as usize
    }
}

/// What QEMU says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// What this VM is and can enforce.
    pub vm: VmInfo,
    /// What the host's policy says of MSRs that it does not list; `None` if there is no policy.
    pub unlisted: Option<Unlisted>,
}

/// A message from QEMU.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// What this VM is and can enforce, and whether it has a policy.
    Hello(Hello),
    /// All rules for MSRs; a `STATE` with this `seq` and this generation follows.
    MsrState {
        /// 0, or that of a `GET_STATE`.
        seq: u64,
        /// The VM's generation.
        generation: u64,
        /// The rules.
        state: MsrState,
    },
    /// Everything in force.
    State {
        /// 0, or that of a `GET_STATE`.
        seq: u64,
        /// The VM's generation.
        generation: u64,
        /// What holds where.
        table: Table,
    },
    /// The answer to anything else that was asked for.
    Result {
        /// That of the request.
        seq: u64,
        /// How it ended.
        outcome: Outcome,
    },
    /// A refused or watched access.
    Violation(Violation),
    /// The VM was reset.
    Reset {
        /// The new generation.
        generation: u64,
    },
}

impl Message {
    /// Reads the payload that belongs to `header`: exactly [`Header::payload_len`] bytes.
    ///
    /// # Errors
    ///
    /// A field holds what the specification does not allow.
    ///
    /// # Panics
    ///
    /// `payload` has another length.
    pub(crate) fn decode(header: &Header, payload: &[u8]) -> Result<Self, WireError> {
        assert_eq!(
            payload.len(),
            header.payload_len(),
            "the caller cuts the stream"
        );
        let mut fields = Fields(payload);
        let seq = header.seq;
        Ok(match header.kind {
            TYPE_HELLO => Self::Hello(decode_hello(&mut fields)?),
            TYPE_STATE => {
                let generation = fields.u64();
                let table = decode_state(&mut fields)?;
                Self::State {
                    seq,
                    generation,
                    table,
                }
            }
            TYPE_MSR_STATE => Self::MsrState {
                seq,
                generation: fields.u64(),
                state: msr_wire::decode_state(&mut fields)?,
            },
            TYPE_RESULT => {
                let (status, index) = (fields.u32(), fields.u32());
                let generation = fields.u64();
                let (ranges_in_force, msr_ranges_in_force) = (fields.u32(), fields.u32());
                let index = (index != u32::MAX).then_some(index);
                Self::Result {
                    seq,
                    outcome: Outcome {
                        status,
                        index,
                        generation,
                        ranges_in_force,
                        msr_ranges_in_force,
                    },
                }
            }
            TYPE_VIOLATION => Self::Violation(decode_violation(&mut fields)?),
            TYPE_RESET => Self::Reset {
                generation: fields.u64(),
            },
            other => return Err(WireError::UnknownType(other)),
        })
    }
}

fn decode_hello(fields: &mut Fields<'_>) -> Result<Hello, WireError> {
    let (magic, version) = (fields.u32(), fields.u32());
    if magic != MAGIC {
        return Err(WireError::Magic(magic));
    }
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    let accelerator = match fields.u32() {
        1 => Accelerator::Kvm,
        2 => Accelerator::Tcg,
        other => return Err(field("accel", other)),
    };
    let page_shift = fields.u32();
    if page_shift != PAGE_SHIFT {
        return Err(field("page_shift", page_shift));
    }
    // A VM that can enforce more than is known here is no worse for it.
    let deny = Deny::from_bits_truncate(fields.u64());
    let generation = fields.u64();
    let (max_ranges, max_request_ranges) = (fields.u32(), fields.u32());
    if max_request_ranges == 0 {
        return Err(field("max_request_ranges", 0u32));
    }
    let _slots_free = fields.u32();
    let policy = fields.u32();
    let policy = decode_policy(policy).ok_or_else(|| field("policy", policy))?;
    let audit = Deny::from_bits_truncate(fields.u64());
    let (max_msr_ranges, filter_ranges) = (fields.u32(), fields.u32());
    let max_pins = fields.u32();
    let unlisted = match fields.u32() {
        0 => Some(Unlisted::Allow),
        1 => Some(Unlisted::Deny),
        u32::MAX => None,
        other => return Err(field("msr_default", other)),
    };
    let vm = VmInfo {
        accelerator,
        deny,
        audit,
        policy,
        generation,
        max_ranges,
        max_request_ranges,
        msrs: MsrInfo {
            max_ranges: max_msr_ranges,
            max_pins,
            filter_ranges: (filter_ranges != u32::MAX).then_some(filter_ranges),
        },
    };
    Ok(Hello { vm, unlisted })
}

fn decode_state(fields: &mut Fields<'_>) -> Result<Table, WireError> {
    let (count, _reserved) = (fields.u32(), fields.u32());
    if fields.0.len() as u64 != u64::from(count) * u64::from(RANGE_SIZE) {
        return Err(field("count in STATE", count));
    }
    let mut table = Table::default();
    let mut above = None;
    for index in 0..count as usize {
        let (start, end, bits) = (fields.u64(), fields.u64(), fields.u64());
        let range =
            GfnRange::new(start, end).map_err(|source| WireError::Range { index, source })?;
        let attributes = Attributes::from_bits(bits)
            .map_err(|source| WireError::Attributes { index, source })?;
        if above.is_some_and(|above| range.start() <= above) {
            return Err(WireError::Unsorted(index));
        }
        if attributes.is_free() || attributes.bits() != bits {
            return Err(WireError::Impossible { index, bits });
        }
        above = Some(range.end());
        table.tell(&Protection { range, attributes });
    }
    Ok(table)
}

fn decode_violation(fields: &mut Fields<'_>) -> Result<Violation, WireError> {
    let kind = fields.u16();
    if !matches!(kind, VIOLATION_MEMORY | VIOLATION_MSR) {
        return Err(field("type of VIOLATION", kind));
    }
    let access = match fields.u16() {
        1 => Access::Write,
        2 if kind == VIOLATION_MEMORY => Access::Fetch,
        3 => Access::Read,
        other => return Err(field("access of VIOLATION", other)),
    };
    let source = match fields.u32() {
        SOURCE_DEVICE => Source::Device,
        vcpu => Source::Vcpu(vcpu),
    };
    let [target, gva, rip, value] = [0; 4].map(|_| fields.u64());
    let target = match kind {
        VIOLATION_MSR => {
            let number = u32::try_from(target).map_err(|_| field("MSR of VIOLATION", target))?;
            Target::Msr(number)
        }
        _ => Target::Memory(target),
    };
    let [size, times] = [0; 2].map(|_| fields.u32());
    let lost = fields.u64();
    let action = match fields.u32() {
        5 => Action::Audit,
        other => decode_policy(other)
            .map(Action::Refused)
            .ok_or_else(|| field("action of VIOLATION", other))?,
    };
    Ok(Violation {
        access,
        source,
        target,
        gva,
        rip,
        value,
        size,
        times,
        lost,
        action,
    })
}

fn decode_policy(number: u32) -> Option<Policy> {
    use Policy::*;
    [(1, Inject), (2, Drop), (3, Pause), (4, Shutdown)]
        .into_iter()
        .find_map(|(n, policy)| (n == number).then_some(policy))
}

pub(super) fn field(field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::Field {
        field,
        value: value.into(),
    }
}

/// Little-endian fields, one after another, out of bytes whose length was checked before.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, tail) = self.0.split_first_chunk().expect("the length was checked");
        self.0 = tail;
        *head
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
