// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be denied to a guest, on which of its pages: pure logic and data.
//!
//! Nothing here does I/O, takes a lock or reads a clock, and nothing here knows the virtio
//! device, QEMU or any wire format.

mod deny;
mod range;
mod table;

pub use deny::{Attributes, Deny, UnknownBits};
pub use range::{Gfn, GfnRange, PAGE_SHIFT, RangeError};
pub use table::{Protection, Table};
