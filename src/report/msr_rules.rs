// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules for MSRs in the document of the status socket.

use serde::{Deserialize, Serialize};

use crate::protect::msr::{Access, Action, HostRule, MsrRange, Policy, Table};

/// A rule in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MsrRule {
    /// Whose it is: "guest" or "host".
    pub by: String,
    /// Its first MSR.
    pub first: u32,
    /// Its last MSR.
    pub last: u32,
    /// "read", "write", or "read-write".
    pub access: String,
    /// "allow", "log", "deny", "pin" or "emulate".
    pub action: String,
    /// The bits that are pinned; null if none are.
    pub mask: Option<String>,
    /// What reads give; null if that is not emulated.
    pub value: Option<String>,
    /// Whether what the rule lets through is reported.
    pub log: bool,
    /// Whether it holds until system reset; the host's hold longer.
    pub immutable: bool,
}

/// The guest's rules, reads first, and the host's, in the order in which they were given.
pub(super) fn of(table: &Table, host: Option<&Policy>) -> Vec<MsrRule> {
    let guests = table
        .reads()
        .map(|(range, held)| (range, Access::READ, Action::from(held.on), held.immutable))
        .chain(table.writes().map(|(range, held)| {
            let action = Action::from(held.on);
            (range, Access::WRITE, action, held.immutable)
        }))
        .map(|(range, access, action, immutable)| MsrRule {
            immutable,
            ..limit("guest", range, access, action)
        });
    let hosts = host.map_or(&[][..], Policy::rules).iter().map(|rule| {
        let rule = match rule {
            HostRule::Limit(rule) => limit("host", rule.range(), rule.access(), rule.action()),
            &HostRule::Emulate { range, value, log } => MsrRule {
                action: "emulate".into(),
                value: Some(format!("{value:#x}")),
                log,
                ..limit("host", range, Access::READ, Action::Allow)
            },
        };
        MsrRule {
            immutable: true,
            ..rule
        }
    });
    guests.chain(hosts).collect()
}

fn limit(by: &str, range: MsrRange, access: Access, action: Action) -> MsrRule {
    let (name, mask, log) = match action {
        Action::Allow => ("allow", None, false),
        Action::Log => ("log", None, true),
        Action::Deny => ("deny", None, false),
        Action::Pin { mask, log } => ("pin", Some(mask), log),
    };
    let access = match (
        access.contains(Access::READ),
        access.contains(Access::WRITE),
    ) {
        (true, false) => "read",
        (false, true) => "write",
        _ => "read-write",
    };
    MsrRule {
        by: by.into(),
        first: range.first(),
        last: range.last(),
        access: access.into(),
        action: name.into(),
        mask: mask.map(|mask| format!("{mask:#x}")),
        value: None,
        log,
        immutable: false,
    }
}
