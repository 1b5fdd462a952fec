// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest may read and write of its MSRs: pure logic and data.
//!
//! A [`Policy`] is the host's, and stays. A [`Table`] is the guest's, and is changed by an
//! [`Order`] as a whole or not at all. Both together, the stricter of the two for each MSR, are
//! [`Decisions`]: what user space answers. A [`Filter`] is what KVM is told, so that just the
//! accesses that user space has something to say about reach it. [`Rules`] keeps all of these in
//! step. `docs/msr.md` is the specification.
//!
//! For an enforcer of one's own: [`Rules`] are told each order and what is in force, [`Planned`]
//! has the filter to install before the answer is OK, and [`Decisions`] says what becomes of each
//! access that KVM hands over. MSR numbers are those of RDMSR's ECX; ranges have an inclusive end.
//!
//! Nothing here knows files, the virtio device, QEMU, or what value an MSR has.

mod action;
mod bitmap;
mod decide;
mod filter;
mod policy;
mod range;
mod rule;
mod rules;
mod table;

pub use action::{OnRead, OnWrite};
pub(crate) use bitmap::{
    BitmapError, BitmapsRefused, MAX_BITMAP_SIZE, MAX_BITMAPS, rules_of_bitmaps,
};
pub use decide::{Answer, Decisions, Verdict};
pub use filter::{Filter, FilterFull, FilterRange, MAX_FILTER_MSRS, MAX_FILTER_RANGES};
pub use policy::{HostRule, Overlap, Policy, Unlisted};
pub use range::{Access, MsrRange, MsrRangeError, TSC_DEADLINE, X2APIC};
pub use rule::{Action, Rule, RuleError};
pub use rules::{Budget, MAX_PINS, NoRoom, Planned, Refused, Rules};
pub use table::{Change, Held, Loosens, Order, Table};

/// One more than the highest MSR number.
const END: u64 = 1 << 32;

#[cfg(test)]
mod model;
