// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM of this very process: KVM's VM ioctls work in no other (`EIO`).
//!
//! [`slots`] plans memslots. Nothing here carries a plan out yet.

pub mod slots;
