// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A rule: MSRs, the access it speaks of, and what becomes of that.
//!
//! A [`Rule`] that exists can be enforced, as far as its kind goes: it pins no reads and does not
//! restrict what KVM lets through unseen. Knows nothing of other rules.

use super::{Access, MsrRange, OnRead, OnWrite, TSC_DEADLINE};

/// What is asked for, as files and requests say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The access is carried out.
    Allow,
    /// The access is carried out and reported.
    Log,
    /// The access gets #GP(0) and is reported.
    Deny,
    /// A write that leaves the bits of `mask` as they are is carried out, or skipped when it
    /// changes nothing; any other gets #GP(0) and is reported.
    Pin {
        /// The bits.
        mask: u64,
        /// Whether a write that is not denied is reported, too.
        log: bool,
    },
}

/// The bits of an action in requests (`docs/device.md`).
const LOG: u16 = 1;
const PIN: u16 = 2;
const DENY: u16 = 4;

impl Action {
    /// The action with these bits and, for a pin, this mask; `None` if there is none.
    pub(crate) fn from_bits(bits: u16, mask: u64) -> Option<Self> {
        Some(match (bits, mask) {
            (0, 0) => Self::Allow,
            (LOG, 0) => Self::Log,
            (DENY, 0) => Self::Deny,
            (PIN, 1..) => Self::Pin { mask, log: false },
            (bits, 1..) if bits == PIN | LOG => Self::Pin { mask, log: true },
            _ => return None,
        })
    }

    /// Its bits, and its mask or 0.
    pub(crate) fn bits(self) -> (u16, u64) {
        match self {
            Self::Allow => (0, 0),
            Self::Log => (LOG, 0),
            Self::Deny => (DENY, 0),
            Self::Pin { mask, log } => (PIN | if log { LOG } else { 0 }, mask),
        }
    }
}

impl From<OnRead> for Action {
    fn from(on: OnRead) -> Self {
        match on {
            OnRead::Allow => Self::Allow,
            OnRead::Log => Self::Log,
            OnRead::Deny => Self::Deny,
        }
    }
}

impl From<OnWrite> for Action {
    fn from(on: OnWrite) -> Self {
        match on {
            OnWrite::ALLOW => Self::Allow,
            OnWrite::LOG => Self::Log,
            OnWrite::Pass { pinned, log } => Self::Pin { mask: pinned, log },
            OnWrite::Deny => Self::Deny,
        }
    }
}

/// Why an access and an action are not a rule (`docs/msr.md`, "What no rule can speak of").
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// Neither reads nor writes.
    #[error("a rule speaks of reads, of writes, or of both")]
    NoAccess,
    /// A pin is for writes.
    #[error("only writes can be pinned")]
    PinsReads,
    /// A pin without bits.
    #[error("a pin with mask 0 pins nothing")]
    PinsNothing,
    /// A restriction of writes to [`TSC_DEADLINE`].
    #[error(
        "KVM carries out writes of TSC_DEADLINE (0x6e0) before it looks at its filter; leave it out of the rule"
    )]
    TscDeadline,
}

/// MSRs, and what is to become of reads and writes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    range: MsrRange,
    read: Option<OnRead>,
    write: Option<OnWrite>,
}

impl Rule {
    /// The rule that `action` becomes of `access` to `range`.
    ///
    /// # Errors
    ///
    /// No such thing can be enforced.
    pub fn new(range: MsrRange, access: Access, action: Action) -> Result<Self, RuleError> {
        if access.is_empty() {
            return Err(RuleError::NoAccess);
        }
        let (read, write) = match action {
            Action::Allow => (OnRead::Allow, OnWrite::ALLOW),
            Action::Log => (OnRead::Log, OnWrite::LOG),
            Action::Deny => (OnRead::Deny, OnWrite::Deny),
            Action::Pin { .. } if access.contains(Access::READ) => {
                return Err(RuleError::PinsReads);
            }
            Action::Pin { mask: 0, .. } => return Err(RuleError::PinsNothing),
            Action::Pin { mask, log } => (OnRead::Allow, OnWrite::Pass { pinned: mask, log }),
        };
        let writes = access.contains(Access::WRITE);
        if writes && write != OnWrite::ALLOW && range.contains(TSC_DEADLINE) {
            return Err(RuleError::TscDeadline);
        }
        Ok(Self {
            range,
            read: access.contains(Access::READ).then_some(read),
            write: writes.then_some(write),
        })
    }

    /// The MSRs.
    pub fn range(&self) -> MsrRange {
        self.range
    }

    /// The accesses that the rule speaks of.
    pub fn access(&self) -> Access {
        let mut access = Access::empty();
        access.set(Access::READ, self.read.is_some());
        access.set(Access::WRITE, self.write.is_some());
        access
    }

    /// What is to become of them.
    pub fn action(&self) -> Action {
        let on_write = self.write.map(Action::from);
        on_write
            .or_else(|| self.read.map(Action::from))
            .unwrap_or(Action::Allow)
    }

    /// What is to become of reads, if the rule speaks of them.
    pub fn read(&self) -> Option<OnRead> {
        self.read
    }

    /// What is to become of writes, if the rule speaks of them.
    pub fn write(&self) -> Option<OnWrite> {
        self.write
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_says_what_it_was_made_of_and_bits_are_the_action() {
        let one = MsrRange::new(5, 5).unwrap();
        let mut good = 0;
        for (bits, mask) in (0..10).flat_map(|bits| [(bits, 0), (bits, 9)]) {
            let Some(action) = Action::from_bits(bits, mask) else {
                continue;
            };
            good += 1;
            assert_eq!(action.bits(), (bits, mask));
            for access in [Access::READ, Access::WRITE, Access::all()] {
                if let Ok(rule) = Rule::new(one, access, action) {
                    assert_eq!((rule.access(), rule.action()), (access, action));
                }
            }
        }
        assert_eq!(good, 5, "allow, log, deny, pin, pin and log");
    }

    #[test]
    fn what_cannot_be_enforced_is_no_rule() {
        let one = MsrRange::new(0xc000_0082, 0xc000_0082).unwrap();
        let deadline = MsrRange::new(0x6d0, 0x6e0).unwrap();
        let pin = |mask| Action::Pin { mask, log: false };
        for (range, access, action, expected) in [
            (one, Access::empty(), Action::Deny, RuleError::NoAccess),
            (one, Access::READ, pin(1), RuleError::PinsReads),
            (one, Access::all(), pin(1), RuleError::PinsReads),
            (one, Access::WRITE, pin(0), RuleError::PinsNothing),
            (deadline, Access::WRITE, pin(1), RuleError::TscDeadline),
            (deadline, Access::all(), Action::Log, RuleError::TscDeadline),
            (
                deadline,
                Access::all(),
                Action::Deny,
                RuleError::TscDeadline,
            ),
        ] {
            assert_eq!(Rule::new(range, access, action), Err(expected));
        }
        for (access, action) in [(Access::READ, Action::Deny), (Access::all(), Action::Allow)] {
            assert!(Rule::new(deadline, access, action).is_ok());
        }
    }
}
