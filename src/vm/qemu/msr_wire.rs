// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules for MSRs on the control channel, `docs/control-channel.md`: bytes to values and back.
//!
//! Pure. What comes out is what the specification allows, and needs no more checking.

use super::wire::{Fields, RANGE_SIZE};
use crate::protect::msr::{
    Access, Action, Held, HostRule, MsrRange, MsrRangeError, Policy, Rule, RuleError, Table,
    Unlisted,
};

/// Bytes of a rule.
const SIZE: usize = RANGE_SIZE as usize;
/// Most rules of the host: 4096, each for one access.
const MAX_HOST_RULES: u32 = 2 * 4096;

const LOG: u16 = 1;
const EMULATE: u16 = 8;
const IMMUTABLE: u32 = 1 << 31;

/// Whose rule it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// The guest's.
    Guest,
    /// The host's.
    Host,
}

impl std::fmt::Display for Whose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest",
            Self::Host => "host",
        })
    }
}

/// Why an `MSR_STATE` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MsrStateError {
    /// The numbers of rules are not what the length says, or there are too many of the host.
    #[error("MSR_STATE with {guest} rules of the guest and {host} of the host")]
    Count {
        /// Of the guest.
        guest: u32,
        /// Of the host.
        host: u32,
    },
    /// A rule is none that can hold.
    #[error("rule {index} of the {whose} in MSR_STATE")]
    Rule {
        /// Which rule.
        index: u32,
        /// Whose.
        whose: Whose,
        /// What is wrong.
        #[source]
        source: Wrong,
    },
}

/// What is wrong with a rule that is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Wrong {
    /// These are no MSRs.
    #[error(transparent)]
    Range(#[from] MsrRangeError),
    /// It speaks of neither access, of both, or of another.
    #[error("access is {0:#x}, not 1 or 2")]
    Access(u16),
    /// Unknown or contradicting bits, or an operand that they do not take.
    #[error("no such rule has action {action:#x} with operand {operand:#x} and flags {flags:#x}")]
    Action {
        /// Its action.
        action: u16,
        /// Its flags.
        flags: u32,
        /// Its operand.
        operand: u64,
    },
    /// Nobody can have such a rule.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// They are not sorted and disjoint.
    #[error("it does not lie above the one before it")]
    Unsorted,
}

/// All rules for MSRs of a VM, but for the default of the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MsrState {
    /// The guest's.
    pub table: Table,
    host: Vec<HostRule>,
}

impl MsrState {
    /// Whether the host has rules.
    pub(crate) fn has_host_rules(&self) -> bool {
        !self.host.is_empty()
    }

    /// The host's rules with this default.
    pub(crate) fn host(&self, unlisted: Unlisted) -> Policy {
        Policy::new(unlisted, &self.host).expect("sorted and disjoint")
    }
}

/// Reads an `MSR_STATE` behind its generation.
pub(super) fn decode_state(fields: &mut Fields<'_>) -> Result<MsrState, MsrStateError> {
    let (guest, host) = (fields.u32(), fields.u32());
    let told = (u64::from(guest) + u64::from(host)) * u64::from(RANGE_SIZE);
    if fields.0.len() as u64 != told || host > MAX_HOST_RULES {
        return Err(MsrStateError::Count { guest, host });
    }
    let mut state = MsrState::default();
    for (whose, count) in [(Whose::Guest, guest), (Whose::Host, host)] {
        let mut before = None;
        for index in 0..count {
            let refused = |source| MsrStateError::Rule {
                index,
                whose,
                source,
            };
            let told = Told::decode(fields).map_err(refused)?;
            // Those of reads come first.
            let place = (told.access.bits(), told.range.first());
            if before.is_some_and(|before| place <= before) {
                return Err(refused(Wrong::Unsorted));
            }
            before = Some((told.access.bits(), told.range.last()));
            match whose {
                Whose::Guest => told.tell(&mut state.table).map_err(refused)?,
                Whose::Host => state.host.push(told.host_rule().map_err(refused)?),
            }
        }
    }
    Ok(state)
}

/// A rule as it is told: of one access.
#[derive(Clone, Copy)]
struct Told {
    range: MsrRange,
    access: Access,
    action: u16,
    flags: u32,
    operand: u64,
}

impl Told {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, Wrong> {
        let (first, last) = (fields.u32(), fields.u32());
        let (access, action, flags) = (fields.u16(), fields.u16(), fields.u32());
        let operand = fields.u64();
        let range = MsrRange::new(first, last)?;
        let access = match access {
            1 => Access::READ,
            2 => Access::WRITE,
            other => return Err(Wrong::Access(other)),
        };
        Ok(Self {
            range,
            access,
            action,
            flags,
            operand,
        })
    }

    fn wrong(self) -> Wrong {
        Wrong::Action {
            action: self.action,
            flags: self.flags,
            operand: self.operand,
        }
    }

    fn rule(self) -> Result<Rule, Wrong> {
        let action = Action::from_bits(self.action, self.operand).ok_or(self.wrong())?;
        Ok(Rule::new(self.range, self.access, action)?)
    }

    /// Tells it as the guest's, who has no rules that allow.
    fn tell(self, table: &mut Table) -> Result<(), Wrong> {
        if self.flags & !IMMUTABLE != 0 || self.action == 0 {
            return Err(self.wrong());
        }
        let (rule, immutable) = (self.rule()?, self.flags & IMMUTABLE != 0);
        if let Some(on) = rule.read() {
            table.tell_read(self.range, Held { on, immutable });
        }
        if let Some(on) = rule.write() {
            table.tell_write(self.range, Held { on, immutable });
        }
        Ok(())
    }

    fn host_rule(self) -> Result<HostRule, Wrong> {
        if self.flags != 0 {
            return Err(self.wrong());
        }
        if self.action & EMULATE == 0 {
            return Ok(HostRule::Limit(self.rule()?));
        }
        if self.action & !LOG != EMULATE || self.access != Access::READ {
            return Err(self.wrong());
        }
        Ok(HostRule::Emulate {
            range: self.range,
            value: self.operand,
            log: self.action & LOG != 0,
        })
    }
}

/// A rule of the guest.
pub(super) fn encode_rule(rule: &Rule, immutable: bool) -> [u8; SIZE] {
    let flags = if immutable { IMMUTABLE } else { 0 };
    encode(rule.range(), rule.access(), rule.action().bits(), flags)
}

/// A rule of the host.
pub(super) fn encode_host_rule(rule: &HostRule) -> [u8; SIZE] {
    match rule {
        HostRule::Limit(rule) => encode_rule(rule, false),
        &HostRule::Emulate { range, value, log } => {
            let action = EMULATE | if log { LOG } else { 0 };
            encode(range, Access::READ, (action, value), 0)
        }
    }
}

fn encode(
    range: MsrRange,
    access: Access,
    (action, operand): (u16, u64),
    flags: u32,
) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    bytes[..4].copy_from_slice(&range.first().to_le_bytes());
    bytes[4..8].copy_from_slice(&range.last().to_le_bytes());
    bytes[8..10].copy_from_slice(&(access.bits() as u16).to_le_bytes());
    bytes[10..12].copy_from_slice(&action.to_le_bytes());
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
    bytes[16..].copy_from_slice(&operand.to_le_bytes());
    bytes
}
