// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All that a guest can ask to have changed.

use super::{Order, msr};

/// What is to change, whole or not at all (`docs/device.md`, "Requests"). Exhaustive: an enforcer
/// that passed over a kind would have said OK to what nobody enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Rights on pages.
    Pages(Order),
    /// Rules for MSRs.
    Msrs(msr::Order),
    /// What holds now, on pages and on MSRs, is for good.
    Seal,
}
