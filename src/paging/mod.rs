// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! x86-64 page tables, read from outside the guest: what they map, and what each guest frame may be
//! used for over all its mappings.
//!
//! Knows guest memory through vm-memory's [`GuestMemory`](vm_memory::GuestMemory) and the types of
//! [`protect`](crate::protect), and nothing of devices or VMs. A [`Space`] says which tables to read
//! how; [`walk()`] tells its mappings one by one, [`collective()`] tells what they add up to, and
//! [`plan()`] turns that into what can be taken away. Everything in the tables is hostile:
//! `docs/paging.md` has the rules, with the SDM's sections.
//!
//! All of it works in the calling thread, which [`Limits`] bounds, and writes to no memory of the
//! guest's. Addresses and sizes are in bytes, frames are of 4096; the last address or frame of a
//! range belongs to it.

mod collective;
mod entry;
mod merge;
mod order;
mod plan;
mod runs;
mod space;
mod table;
mod walk;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod naive;

pub use collective::{Collective, WriteExecMapping, collective};
pub use entry::{Mistake, Rights};
pub use merge::{Extent, Merger};
pub use order::{PlannedOrder, TooManyPieces};
pub use plan::{Counts as PlanCounts, Piece, Plan, Policy, Unmapped, WriteExec, plan};
pub use space::{Levels, Paging, Space, SpaceError};
pub use table::{Counts, Limits, Malformed, WalkError};
pub use walk::{Mapping, Walked, walk};
