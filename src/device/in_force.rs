// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the VM's owner has said is in force, and what a demand comes to on it.
//!
//! Knows what a refusal looks like to the guest; neither rings nor who enforces.

use std::fmt;

use super::wire::{Errno, Refusal};
use crate::protect::msr::{self, Budget, MAX_FILTER_RANGES, Policy, Refused, Rules};
use crate::protect::{self, Attributes, Demand, Deny, Protection, Table};
use crate::vm::enforcer::{self, MsrInfo};

/// Pages and MSRs, with the host's rules.
#[derive(Debug)]
pub(super) struct InForce {
    /// On which page.
    pub(super) pages: Table,
    msrs: Rules,
    host: Option<Policy>,
    budget: Budget,
}

/// Why a demand comes to nothing. Its index is that of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unplanned {
    #[error(transparent)]
    Pages(#[from] protect::Loosens),
    #[error(transparent)]
    Msrs(#[from] Refused),
}

impl From<Unplanned> for Refusal {
    fn from(unplanned: Unplanned) -> Self {
        match unplanned {
            Unplanned::Pages(protect::Loosens { index })
            | Unplanned::Msrs(Refused::Loosens(msr::Loosens { index })) => Self {
                errno: Errno::Eperm,
                index: u32::try_from(index).ok(),
            },
            Unplanned::Msrs(Refused::NoRoom(_)) => Errno::Enospc.into(),
        }
    }
}

/// What a demand comes to.
#[derive(Debug)]
pub(super) enum Change {
    Pages(protect::Change),
    /// All rules of the guest, as they are then.
    Msrs(msr::Table),
    /// What is to hold on pages; all rules for MSRs are sealed, too.
    Seal(protect::Change),
}

impl Default for InForce {
    fn default() -> Self {
        Self::told(enforcer::InForce::default(), MsrInfo::default())
    }
}

impl InForce {
    /// What the owner of a VM that can do so much about MSRs says.
    pub(super) fn told(told: enforcer::InForce, can: MsrInfo) -> Self {
        let budget = Budget {
            filter_ranges: can
                .filter_ranges
                .map(|ranges| (ranges as usize).min(MAX_FILTER_RANGES)),
            ranges: can.max_ranges as usize,
            pins: can.max_pins.into(),
        };
        let policy = told.host.clone().unwrap_or_default();
        Self {
            pages: told.pages,
            msrs: Rules::told(policy, told.msrs, budget),
            host: told.host,
            budget,
        }
    }

    /// The guest's rules for MSRs.
    pub(super) fn msrs(&self) -> &msr::Table {
        self.msrs.table()
    }

    /// The host's, if it has any.
    pub(super) fn host(&self) -> Option<&Policy> {
        self.host.as_ref()
    }

    /// The host's rules are these, as the owner of the VM says.
    pub(super) fn set_host(&mut self, policy: Policy) {
        let table = self.msrs().clone();
        self.msrs = Rules::told(policy.clone(), table, self.budget);
        self.host = Some(policy);
    }

    /// The VM was reset: what the guest had asked for is gone.
    pub(super) fn reset(&mut self) {
        self.pages = Table::default();
        self.msrs.apply(msr::Table::default());
    }

    /// Whether the guest's tables are these.
    pub(super) fn is(&self, told: &enforcer::InForce) -> bool {
        self.pages == told.pages && *self.msrs() == told.msrs
    }

    /// Whether it comes to what is so already.
    pub(super) fn holds(&self, change: &Change) -> bool {
        match change {
            Change::Pages(change) => self.pages.holds(change),
            Change::Msrs(_) | Change::Seal(_) => false,
        }
    }

    /// The pages that may not be read.
    pub(super) fn hidden(&self) -> Table {
        let held = self.pages.iter();
        held.filter(|held| held.attributes.deny().contains(Deny::NOREAD))
            .map(|held| Protection {
                attributes: Attributes::new(Deny::NOREAD, Deny::empty()),
                ..held
            })
            .collect()
    }

    /// Disjoint ranges of pages.
    pub(super) fn ranges(&self) -> u32 {
        u32::try_from(self.pages.len()).unwrap_or(u32::MAX)
    }

    /// Disjoint ranges of MSRs that the guest's rules speak of.
    pub(super) fn msr_ranges(&self) -> u32 {
        u32::try_from(self.msrs().len()).unwrap_or(u32::MAX)
    }

    /// What `demand` comes to. Nothing changes.
    ///
    /// # Errors
    ///
    /// It loosens what is immutable, or there is no room for its rules.
    pub(super) fn plan(&self, demand: &Demand) -> Result<Change, Unplanned> {
        Ok(match demand {
            Demand::Pages(order) => Change::Pages(self.pages.plan(order)?),
            Demand::Msrs(order) => Change::Msrs(self.msrs.plan(order)?.table),
            Demand::Seal => Change::Seal(self.pages.seal()),
        })
    }

    /// Takes over a change that was planned on this, as it is now.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Pages(change) => self.pages.apply(change),
            Change::Msrs(table) => self.msrs.apply(table.clone()),
            Change::Seal(change) => {
                self.pages.apply(change);
                let mut table = self.msrs().clone();
                table.seal();
                self.msrs.apply(table);
            }
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pages(change) | Self::Seal(change) => write!(f, "on {} pages", change.pages()),
            Self::Msrs(_) => f.write_str("on all vCPUs"),
        }
    }
}

/// A demand, for the log.
pub(super) fn describe(demand: &Demand) -> String {
    match demand {
        Demand::Pages(protect::Order::Lock(entries)) => format!("LOCK of {} ranges", entries.len()),
        Demand::Pages(protect::Order::Protect(entries)) => {
            format!("PROTECT of {} ranges", entries.len())
        }
        Demand::Msrs(msr::Order::Lock(rules)) => format!("MSR_LOCK of {} rules", rules.len()),
        Demand::Msrs(msr::Order::Replace(rules)) => {
            format!("MSR_PROTECT of {} rules", rules.len())
        }
        Demand::Seal => "SEAL".into(),
    }
}
