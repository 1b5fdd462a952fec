// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host's rules, guest's rules, what they come to and what KVM is told of it, in step.
//!
//! An order that is refused, or that does not fit, changes none of them.

use super::{Decisions, Filter, FilterFull, Loosens, Order, Policy, Table};

/// What a VM can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// How many ranges of KVM's filter nobody else needs: at most
    /// [`MAX_FILTER_RANGES`](super::MAX_FILTER_RANGES).
    pub filter_ranges: usize,
    /// How many disjoint ranges the guest's rules may be, of reads and of writes together.
    pub ranges: usize,
}

/// Why an order changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It would loosen a locked rule (EPERM).
    #[error(transparent)]
    Loosens(#[from] Loosens),
    /// The filter has too few ranges for it (ENOSPC).
    #[error(transparent)]
    Filter(#[from] FilterFull),
    /// There would be more ranges than there may be (ENOSPC).
    #[error("more than {0} ranges of MSRs")]
    Ranges(usize),
}

/// All rules of a VM.
#[derive(Clone, Debug)]
pub struct Rules {
    policy: Policy,
    table: Table,
    budget: Budget,
}

/// What an order comes to: what is in force when it is carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The guest's rules then.
    pub table: Table,
    /// What user space answers then.
    pub decisions: Decisions,
    /// What KVM is told.
    pub filter: Filter,
}

impl Rules {
    /// The rules of a VM whose guest has not asked for any, and what to put in force at once.
    ///
    /// # Errors
    ///
    /// The host's rules alone do not fit.
    pub fn new(policy: Policy, budget: Budget) -> Result<(Self, Planned), FilterFull> {
        let rules = Self {
            policy,
            table: Table::default(),
            budget,
        };
        let planned = rules.planned(Table::default())?;
        Ok((rules, planned))
    }

    /// What `order` comes to. Nothing changes.
    ///
    /// # Errors
    ///
    /// The first reason in the order of [`Refused`].
    pub fn plan(&self, order: &Order) -> Result<Planned, Refused> {
        let mut table = self.table.clone();
        table.apply(&self.table.plan(order)?);
        if table.len() > self.budget.ranges {
            return Err(Refused::Ranges(self.budget.ranges));
        }
        Ok(self.planned(table)?)
    }

    fn planned(&self, table: Table) -> Result<Planned, FilterFull> {
        let decisions = Decisions::new(&self.policy, &table);
        let filter = Filter::new(&decisions, self.budget.filter_ranges)?;
        Ok(Planned {
            table,
            decisions,
            filter,
        })
    }

    /// Takes over what is in force now.
    pub fn apply(&mut self, planned: Planned) {
        self.table = planned.table;
    }

    /// The guest's rules in force.
    pub fn table(&self) -> &Table {
        &self.table
    }
}
