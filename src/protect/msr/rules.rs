// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host's rules, guest's rules, what they come to and what KVM is told of it, in step.
//!
//! An order that is refused, or that does not fit, changes none of them.

use super::{Decisions, Filter, FilterFull, Loosens, Order, Policy, Table};

/// Most MSRs that can be pinned at once, by the host and the guest together, because of what is
/// kept for each on each vCPU (`docs/msr.md`, "A rule").
pub const MAX_PINS: u32 = 64;

/// What a VM can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// How many ranges of KVM's filter nobody else needs: at most
    /// [`MAX_FILTER_RANGES`](super::MAX_FILTER_RANGES). `None` where there is no filter.
    pub filter_ranges: Option<usize>,
    /// How many disjoint ranges the guest's rules may be, of reads and of writes together.
    pub ranges: usize,
    /// How many MSRs may be pinned, by the host and the guest together.
    pub pins: u64,
}

/// There is no room for all rules together (ENOSPC).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoRoom {
    /// The guest's rules would be more ranges than they may be.
    #[error("more than {0} ranges of MSRs")]
    Ranges(usize),
    /// More MSRs would be pinned than can be.
    #[error("more than {0} pinned MSRs")]
    Pins(u64),
    /// The filter has too few ranges for it.
    #[error(transparent)]
    Filter(#[from] FilterFull),
}

/// Why an order changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// It would loosen a locked rule (EPERM).
    #[error(transparent)]
    Loosens(#[from] Loosens),
    /// There is no room for it (ENOSPC).
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// All rules of a VM.
#[derive(Clone, Debug)]
pub struct Rules {
    policy: Policy,
    table: Table,
    budget: Budget,
}

/// What an order comes to: what is in force when it is carried out. An enforcer puts all
/// of it in force, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[must_use = "what is planned holds when it is enforced and applied"]
pub struct Planned {
    /// The guest's rules then.
    pub table: Table,
    /// What user space answers then.
    pub decisions: Decisions,
    /// What KVM is told, where there is a filter.
    pub filter: Option<Filter>,
}

impl Rules {
    /// The rules of a VM whose guest has not asked for any, and what to put in force at once.
    ///
    /// # Errors
    ///
    /// The host's rules alone do not fit.
    pub fn new(policy: Policy, budget: Budget) -> Result<(Self, Planned), NoRoom> {
        let rules = Self::told(policy, Table::default(), budget);
        let planned = rules.planned(Table::default())?;
        Ok((rules, planned))
    }

    /// The rules of a VM whose owner says that they are in force: whether they fit is not asked.
    #[must_use]
    pub fn told(policy: Policy, table: Table, budget: Budget) -> Self {
        Self {
            policy,
            table,
            budget,
        }
    }

    /// What `order` comes to. Nothing changes.
    ///
    /// # Errors
    ///
    /// The first reason in the order of [`Refused`] and [`NoRoom`].
    pub fn plan(&self, order: &Order) -> Result<Planned, Refused> {
        let mut table = self.table.clone();
        table.apply(&self.table.plan(order)?);
        Ok(self.planned(table)?)
    }

    fn planned(&self, table: Table) -> Result<Planned, NoRoom> {
        let Budget {
            filter_ranges,
            ranges,
            pins,
        } = self.budget;
        if table.len() > ranges {
            return Err(NoRoom::Ranges(ranges));
        }
        let decisions = Decisions::new(&self.policy, &table);
        if decisions.pins() > pins {
            return Err(NoRoom::Pins(pins));
        }
        let filter = filter_ranges
            .map(|ranges| Filter::new(&decisions, ranges))
            .transpose()?;
        Ok(Planned {
            table,
            decisions,
            filter,
        })
    }

    /// Takes over the guest's rules that are in force now: [`Planned::table`], when it is enforced,
    /// or none after a reset.
    pub fn apply(&mut self, table: Table) {
        self.table = table;
    }

    /// The guest's rules in force.
    pub fn table(&self) -> &Table {
        &self.table
    }
}
