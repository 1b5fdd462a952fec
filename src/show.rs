// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-guard show`: asks a companion's status socket and prints what it says, for people or
//! for programs.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use vhost_guard::protect::{GfnRange, PAGE_SHIFT};
use vhost_guard::report::{Event, MsrRule, Status};

use crate::columns::{aligned, size};
use crate::status_client::{self, Answer, StatusError};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShowError {
    #[error(transparent)]
    Status(#[from] StatusError),
    #[error("cannot print it")]
    Print(#[source] io::Error),
}

/// Prints what the companion at `path` says.
pub(crate) fn run(path: &Path, json: bool) -> Result<(), ShowError> {
    let Answer { document, .. } = status_client::ask(path)?;
    let status = status_client::read(&document, path)?;
    let text = if json {
        document
    } else {
        table(&status)
            .ok_or_else(|| StatusError::NotStatus(path.to_owned()))?
            .into_bytes()
    };
    let mut out = io::stdout().lock();
    match out.write_all(&text).and_then(|()| out.flush()) {
        // Whoever reads has seen enough.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(ShowError::Print),
    }
}

/// The document for people. `None` if a range in it is none.
fn table(status: &Status) -> Option<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".into());
    let number = |value: Option<u64>| value.map_or("unknown".into(), |n| n.to_string());
    let counters = &status.counters;
    let connected = if status.connected {
        "connected"
    } else {
        "not connected: what follows is what it said last"
    };
    let head = [
        ("companion", status.companion.clone()),
        ("QEMU", connected.into()),
        ("accelerator", text(&status.accel)),
        ("generation", number(status.generation)),
        ("on violation", text(&status.on_violation)),
        ("can deny", list(&status.deny_bits)),
        ("can watch", list(&status.audit_bits)),
        (
            "ranges",
            format!(
                "{} in force, at most {}",
                status.ranges.len(),
                status.limits.max_ranges
            ),
        ),
        ("MSR rules", msr_rules_in_short(status)),
        (
            "requests",
            format!(
                "{} carried out, {} refused, {} malformed",
                counters.requests_ok, counters.requests_refused, counters.malformed
            ),
        ),
        (
            "violations",
            format!(
                "{}, of which the guest was not told of {}",
                counters.violations, counters.events_lost
            ),
        ),
    ];
    let head = head.map(|(name, value)| vec![format!("{name}:"), value]);
    let mut out = aligned(&head);

    if !status.ranges.is_empty() {
        let mut rows = vec![
            [
                "FIRST ADDRESS",
                "LAST ADDRESS",
                "SIZE",
                "DENIED",
                "WATCHED",
                "CAN CHANGE",
            ]
            .map(String::from)
            .to_vec(),
        ];
        for range in &status.ranges {
            let frames = GfnRange::new(range.gfn_start, range.gfn_end).ok()?;
            let first = frames.start().number() << PAGE_SHIFT;
            let last = frames.end().number() << PAGE_SHIFT | ((1 << PAGE_SHIFT) - 1);
            let change = if range.immutable {
                "grow only, until reset"
            } else {
                "yes"
            };
            rows.push(vec![
                format!("{first:#014x}"),
                format!("{last:#014x}"),
                size(frames.pages()),
                list(&range.deny),
                list(&range.audit),
                change.into(),
            ]);
        }
        out.push('\n');
        out.push_str(&aligned(&rows));
    }

    if !status.msr_rules.is_empty() || status.msr_default.is_some() {
        let head = ["MSRS", "ACCESS", "RULE", "OF", "CAN CHANGE"];
        let mut rows = vec![head.map(String::from).to_vec()];
        rows.extend(status.msr_rules.iter().map(msr_row));
        if let Some(default) = &status.msr_default {
            let row = ["all others", "read-write", default, "host", "no"];
            rows.push(row.map(String::from).to_vec());
        }
        out.push('\n');
        out.push_str(&aligned(&rows));
    }

    if !status.violations.is_empty() {
        let mut rows = vec![
            [
                "LAST VIOLATIONS",
                "TIMES",
                "WHAT",
                "BY",
                "ADDRESS",
                "RIP",
                "ACTION",
            ]
            .map(String::from)
            .to_vec(),
        ];
        rows.extend(status.violations.iter().map(row));
        out.push('\n');
        out.push_str(&aligned(&rows));
    }
    Some(out)
}

fn row(event: &Event) -> Vec<String> {
    vec![
        event.time.clone(),
        event.times.to_string(),
        event.access.clone(),
        event.source.clone(),
        address_of(event),
        event.rip.clone().unwrap_or_else(|| "-".into()),
        event.action.clone(),
    ]
}

fn address_of(event: &Event) -> String {
    match (&event.gpa, &event.msr) {
        (Some(gpa), _) => gpa.clone(),
        (None, Some(msr)) => format!("msr {msr}"),
        (None, None) => "-".into(),
    }
}

fn msr_rules_in_short(status: &Status) -> String {
    if status.limits.max_msr_ranges == 0 {
        return "not possible in this VM".into();
    }
    let of = |who| {
        status
            .msr_rules
            .iter()
            .filter(|rule| rule.by == who)
            .count()
    };
    let host = match &status.msr_default {
        Some(_) => format!("{} of the host", of("host")),
        None => "none of the host".into(),
    };
    format!(
        "{} of the guest, at most {}; {host}",
        of("guest"),
        status.limits.max_msr_ranges
    )
}

fn msr_row(rule: &MsrRule) -> Vec<String> {
    let msrs = if rule.first == rule.last {
        format!("{:#x}", rule.first)
    } else {
        format!("{:#x}-{:#x}", rule.first, rule.last)
    };
    let mut what = rule.action.clone();
    for number in [&rule.mask, &rule.value].into_iter().flatten() {
        what.push(' ');
        what.push_str(number);
    }
    if rule.log && rule.action != "log" {
        what.push_str(", log");
    }
    let change = match (rule.by.as_str(), rule.immutable) {
        ("host", _) => "no",
        (_, true) => "grow only, until reset",
        (_, false) => "yes",
    };
    vec![
        msrs,
        rule.access.clone(),
        what,
        rule.by.clone(),
        change.into(),
    ]
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "-".into()
    } else {
        names.join(",")
    }
}
