// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be denied to a guest, on which of its pages and MSRs: pure logic and data.
//!
//! Nothing here does I/O, takes a lock or reads a clock, and nothing here knows the virtio
//! device, QEMU or any wire format. An [`Order`] is checked against a [`Table`] as a whole and
//! becomes a [`Change`], or nothing; whoever enforces carries the change out before the table
//! takes it over.

mod demand;
mod deny;
pub mod msr;
mod plan;
mod range;
mod spans;
mod table;

pub use demand::Demand;
pub use deny::{Attributes, Deny, UnknownBits};
pub use plan::{Change, Loosens, Order};
pub use range::{Gfn, GfnRange, PAGE_SHIFT, RangeError};
pub use table::{Protection, Table};
