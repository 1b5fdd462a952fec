// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's rules, which hold from the start and do not change.
//!
//! Unlike a guest's, they can say what becomes of every MSR that they do not list, and have reads
//! give a constant. Where they come from is not known here.

use std::fmt;
use std::ops::Range;

use rangemap::RangeMap;

use super::action::Restriction;
use super::{END, MsrRange, OnRead, OnWrite, Rule, TSC_DEADLINE, X2APIC};

/// What becomes of accesses to an MSR that no rule lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unlisted {
    /// They are carried out.
    #[default]
    Allow,
    /// They are denied, except those that KVM does not filter: of [`X2APIC`], and writes of
    /// [`TSC_DEADLINE`].
    Deny,
}

impl fmt::Display for Unlisted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// A rule of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostRule {
    /// One such as a guest may have, too.
    Limit(Rule),
    /// Reads of these MSRs give a constant.
    ///
    /// A guest cannot ask for that: of two constants none is the stricter, and a constant in the
    /// place of a value misleads whoever reads it.
    Emulate {
        /// The MSRs.
        range: MsrRange,
        /// What reads give.
        value: u64,
        /// Whether they are reported.
        log: bool,
    },
}

/// Two rules speak of the same access to the same MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {index} speaks of the same access to an MSR as rule {earlier}")]
#[non_exhaustive]
pub struct Overlap {
    /// The later of the two, counted from 0.
    pub index: usize,
    /// The earlier of the two.
    pub earlier: usize,
}

/// The host's rules. The default: none, and all is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    unlisted: Unlisted,
    rules: Vec<HostRule>,
    pub(super) reads: RangeMap<u64, OnRead>,
    pub(super) writes: RangeMap<u64, OnWrite>,
    pub(super) constants: RangeMap<u64, u64>,
}

impl Policy {
    /// The policy that `rules` are, and `unlisted` for all the rest.
    ///
    /// # Errors
    ///
    /// The first rule that overlaps one before it: no order among them has to be remembered.
    pub fn new(unlisted: Unlisted, rules: &[HostRule]) -> Result<Self, Overlap> {
        let mut policy = Self {
            unlisted,
            rules: rules.to_vec(),
            ..Self::default()
        };
        if unlisted == Unlisted::Deny {
            let deadline = u64::from(TSC_DEADLINE);
            let (x2apic, after) = (u64::from(*X2APIC.start()), u64::from(*X2APIC.end()) + 1);
            policy.reads.insert(0..x2apic, OnRead::Deny);
            policy.reads.insert(after..END, OnRead::Deny);
            policy.writes.insert(0..deadline, OnWrite::Deny);
            policy.writes.insert(deadline + 1..x2apic, OnWrite::Deny);
            policy.writes.insert(after..END, OnWrite::Deny);
        }
        let (mut reads, mut writes) = (Listed::default(), Listed::default());
        for (index, rule) in rules.iter().enumerate() {
            let (range, read, write) = match *rule {
                HostRule::Limit(rule) => (rule.range(), rule.read(), rule.write()),
                HostRule::Emulate { range, log, .. } => {
                    let read = if log { OnRead::Log } else { OnRead::Allow };
                    (range, Some(read), None)
                }
            };
            let span = range.span();
            if let Some(read) = read {
                reads.add(&span, index)?;
                set(&mut policy.reads, &span, read);
            }
            if let Some(write) = write {
                writes.add(&span, index)?;
                set(&mut policy.writes, &span, write);
            }
            if let HostRule::Emulate { value, .. } = *rule {
                policy.constants.insert(span, value);
            }
        }
        Ok(policy)
    }

    /// What becomes of accesses that no rule lists.
    pub fn unlisted(&self) -> Unlisted {
        self.unlisted
    }

    /// The rules, in the order in which they were given.
    pub fn rules(&self) -> &[HostRule] {
        &self.rules
    }
}

fn set<A: Restriction>(map: &mut RangeMap<u64, A>, span: &Range<u64>, on: A) {
    if on.is_free() {
        map.remove(span.clone());
    } else {
        map.insert(span.clone(), on);
    }
}

/// Which rule lists which MSR.
#[derive(Default)]
struct Listed(RangeMap<u64, usize>);

impl Listed {
    fn add(&mut self, span: &Range<u64>, index: usize) -> Result<(), Overlap> {
        if let Some((_, &earlier)) = self.0.overlapping(span).next() {
            return Err(Overlap { index, earlier });
        }
        self.0.insert(span.clone(), index);
        Ok(())
    }
}
