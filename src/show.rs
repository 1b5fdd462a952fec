// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-guard show`: asks a companion's status socket and prints what it says, for people or
//! for programs.
//!
//! What answers may be anything, and ends up on a terminal: it is bounded, read as a document
//! before any of it is printed, and stripped of what a terminal would obey.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use vhost_guard::protect::{GfnRange, PAGE_SHIFT};
use vhost_guard::report::{Event, FORMAT, MsrRule, Status};

use crate::columns::{aligned, size};

/// How long the companion may take. It serves one client after another, for 2 seconds each.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than a document with a million ranges has.
const MAX_SIZE: usize = 256 << 20;

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShowError {
    #[error(
        "no companion listens at {} (is it running, and with this socket?)",
        .0.display()
    )]
    Nobody(PathBuf),
    #[error("cannot ask {}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is not a companion's status socket (give its --socket-path, or its --status-path)",
        .0.display()
    )]
    NotStatus(PathBuf),
    #[error("the companion tells its status in format {0}, and this is for format {FORMAT}")]
    Format(u32),
    #[error("cannot print it")]
    Print(#[source] io::Error),
}

/// Prints what the companion at `path` says.
pub(crate) fn run(path: &Path, json: bool) -> Result<(), ShowError> {
    let document = ask(path)?;
    let status = read(&document, path)?;
    let text = if json {
        document
    } else {
        table(&status)
            .ok_or_else(|| ShowError::NotStatus(path.to_owned()))?
            .into_bytes()
    };
    let mut out = io::stdout().lock();
    match out.write_all(&text).and_then(|()| out.flush()) {
        // Whoever reads has seen enough.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(ShowError::Print),
    }
}

fn ask(path: &Path) -> Result<Vec<u8>, ShowError> {
    let failed = |source: io::Error| match source.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => ShowError::Nobody(path.to_owned()),
        _ => ShowError::Io {
            path: path.to_owned(),
            source,
        },
    };
    let not_status = || ShowError::NotStatus(path.to_owned());
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    let deadline = Instant::now() + PATIENCE;
    let mut document = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(not_status());
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(document),
            Ok(n) => document.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(not_status()),
            Err(e) => return Err(failed(e)),
        }
        // The other sockets greet with something else, and then wait.
        if document.first() != Some(&b'{') || document.len() > MAX_SIZE {
            return Err(not_status());
        }
    }
}

fn read(document: &[u8], path: &Path) -> Result<Status, ShowError> {
    #[derive(Deserialize)]
    struct Head {
        format: u32,
    }
    let not_status = |_| ShowError::NotStatus(path.to_owned());
    let Head { format } = serde_json::from_slice(document).map_err(not_status)?;
    if format != FORMAT {
        return Err(ShowError::Format(format));
    }
    serde_json::from_slice(document).map_err(not_status)
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
