// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is printed: tables for people, JSON for programs.

use std::fmt::Write;

use crate::device::{Entry, Event, Info, MsrEntry};
use crate::json::Json;
use crate::msr;
use crate::range::{Range, Rights};

/// A source, address or instruction pointer that is none.
const FROM_DEVICE: u32 = u32::MAX;
const UNKNOWN: u64 = u64::MAX;
/// An event's kind: an access to an MSR, whose number is where else the address is.
const OF_MSR: u32 = 2;

/// The configuration, as "name value" lines.
pub(crate) fn info_text(info: &Info) -> String {
    let rows = [
        ("can deny", Rights::denied(info.deny_bits).to_string()),
        ("can watch", Rights::denied(info.audit_bits).to_string()),
        ("generation", info.generation.to_string()),
        ("ranges in force", info.ranges_in_force.to_string()),
        ("ranges at most", info.max_ranges.to_string()),
        ("ranges in one request", info.max_request_ranges.to_string()),
        ("MSR ranges in force", info.msr_ranges_in_force.to_string()),
        (
            "MSR ranges at most",
            match info.max_msr_ranges {
                0 => "this host has no rules for MSRs".into(),
                most => most.to_string(),
            },
        ),
        ("violations", info.violations.to_string()),
        ("events lost", info.events_lost.to_string()),
        ("malformed chains", info.malformed.to_string()),
        ("page size", info.page_size.to_string()),
        ("device version", info.version.to_string()),
    ];
    rows.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "{name:<22} {value}");
        text
    })
}

/// The configuration.
pub(crate) fn info_json(info: &Info) -> Json {
    Json::Object(vec![
        ("deny", Json::names(Rights::denied(info.deny_bits).names())),
        (
            "audit",
            Json::names(Rights::denied(info.audit_bits).names()),
        ),
        ("generation", Json::Number(info.generation)),
        ("ranges_in_force", Json::Number(info.ranges_in_force.into())),
        ("max_ranges", Json::Number(info.max_ranges.into())),
        (
            "max_request_ranges",
            Json::Number(info.max_request_ranges.into()),
        ),
        (
            "msr_ranges_in_force",
            Json::Number(info.msr_ranges_in_force.into()),
        ),
        ("max_msr_ranges", Json::Number(info.max_msr_ranges.into())),
        ("violations", Json::Number(info.violations)),
        ("events_lost", Json::Number(info.events_lost)),
        ("malformed", Json::Number(info.malformed)),
        ("page_size", Json::Number(info.page_size.into())),
        ("version", Json::Number(info.version.into())),
    ])
}

/// What a request did, as a sentence.
pub(crate) fn done_text(verb: &str, ranges: &[Range], generation: u64) -> String {
    let pages = pages_of(ranges);
    let (count, s) = (ranges.len(), if ranges.len() == 1 { "" } else { "s" });
    let p = if pages == 1 { "" } else { "s" };
    format!("{verb} {count} range{s}, {pages} page{p}, in generation {generation}\n")
}

/// What a request did.
pub(crate) fn done_json(ranges: &[Range], generation: u64) -> Json {
    Json::Object(vec![
        ("ranges", Json::Number(ranges.len() as u64)),
        ("pages", Json::Number(pages_of(ranges))),
        ("generation", Json::Number(generation)),
    ])
}

fn pages_of(ranges: &[Range]) -> u64 {
    ranges
        .iter()
        .fold(0, |sum: u64, range| sum.saturating_add(range.pages()))
}

/// Byte addresses of an entry. The device's numbers are not ours to trust.
fn bounds(entry: &Entry) -> (u64, u64) {
    let first = entry.first.saturating_mul(4096);
    (first, entry.last.saturating_mul(4096).saturating_add(4095))
}

fn entry_pages(entry: &Entry) -> u64 {
    entry.last.saturating_sub(entry.first).saturating_add(1)
}

/// What holds, as a table.
pub(crate) fn entries_text(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "nothing is protected\n".into();
    }
    let mut text = format!(
        "{:<18} {:<18} {:>10}  {:<22} {:<22} {}\n",
        "FIRST", "LAST", "PAGES", "DENIED", "WATCHED", "FIXED"
    );
    for entry in entries {
        let (first, last) = bounds(entry);
        let _ = writeln!(
            text,
            "{first:#018x} {last:#018x} {:>10}  {:<22} {:<22} {}",
            entry_pages(entry),
            Rights::denied(entry.attributes),
            Rights::audited(entry.attributes),
            if Rights::immutable(entry.attributes) {
                "yes"
            } else {
                "no"
            },
        );
    }
    text
}

/// What holds.
pub(crate) fn entries_json(entries: &[Entry]) -> Json {
    let list = entries.iter().map(|entry| {
        let (first, last) = bounds(entry);
        let attributes = entry.attributes;
        Json::Object(vec![
            ("first", Json::address(first)),
            ("last", Json::address(last)),
            ("pages", Json::Number(entry_pages(entry))),
            ("deny", Json::names(Rights::denied(attributes).names())),
            ("audit", Json::names(Rights::audited(attributes).names())),
            ("fixed", Json::Bool(Rights::immutable(attributes))),
        ])
    });
    Json::Object(vec![("ranges", Json::List(list.collect()))])
}

/// What a request for MSRs did, as a sentence.
pub(crate) fn rules_done_text(what: &str, generation: u64) -> String {
    format!("{what}, in generation {generation}\n")
}

/// What a request for MSRs did.
pub(crate) fn rules_done_json(count: u64, generation: u64) -> Json {
    Json::Object(vec![
        ("rules", Json::Number(count)),
        ("generation", Json::Number(generation)),
    ])
}

/// The rules for MSRs, as a table.
pub(crate) fn rules_text(rules: &[MsrEntry]) -> String {
    if rules.is_empty() {
        return "there are no rules\n".into();
    }
    let mut text = format!(
        "{:<10} {:<10} {:<13} {:<10} {:<8} {:<18} {}\n",
        "FIRST", "LAST", "NAME", "ACCESS", "ACTION", "MASK", "FIXED"
    );
    for rule in rules {
        let named = if rule.first == rule.last {
            msr::name(rule.first)
        } else {
            None
        };
        let _ = writeln!(
            text,
            "{:#010x} {:#010x} {:<13} {:<10} {:<8} {:<18} {}",
            rule.first,
            rule.last,
            named.unwrap_or("-"),
            rule.access_name(),
            rule.actions().collect::<Vec<_>>().join(","),
            match rule.mask {
                0 => "-".into(),
                mask => format!("{mask:#018x}"),
            },
            if rule.immutable() { "yes" } else { "no" },
        );
    }
    text
}

/// The rules for MSRs.
pub(crate) fn rules_json(rules: &[MsrEntry]) -> Json {
    let list = rules.iter().map(|rule| {
        Json::Object(vec![
            ("first", Json::address(rule.first.into())),
            ("last", Json::address(rule.last.into())),
            ("access", Json::Text(rule.access_name().into())),
            ("action", Json::names(rule.actions())),
            (
                "mask",
                match rule.mask {
                    0 => Json::Null,
                    mask => Json::address(mask),
                },
            ),
            ("fixed", Json::Bool(rule.immutable())),
        ])
    });
    Json::Object(vec![("rules", Json::List(list.collect()))])
}

fn access_name(access: u32) -> &'static str {
    match access {
        1 => "write",
        2 => "exec",
        3 => "read",
        _ => "unknown",
    }
}

fn action_name(action: u32) -> &'static str {
    match action {
        1 => "inject",
        2 => "drop",
        3 => "pause",
        4 => "shutdown",
        5 => "audit",
        _ => "unknown",
    }
}

/// The head of the table of events.
pub(crate) fn events_head() -> String {
    format!(
        "{:>14}  {:<7} {:<8} {:<8} {:<18} {:<18} {:<18} {:>6}  {}\n",
        "TIME", "ACCESS", "ACTION", "SOURCE", "ADDRESS", "LINEAR", "RIP", "TIMES", "VALUE"
    )
}

/// A line of the table of events, after what is missing before it. `host_lost` of those the host
/// had no room for.
pub(crate) fn event_text(event: &Event, host_lost: u64) -> String {
    let known = |value: u64| match value {
        UNKNOWN => "-".to_string(),
        value => format!("{value:#018x}"),
    };
    let mut text = String::new();
    if host_lost > 0 {
        let _ = writeln!(text, "(the host had no room for {host_lost} events)");
    }
    if event.dropped > 0 {
        let _ = writeln!(
            text,
            "({} events were not read in time and are lost)",
            event.dropped
        );
    }
    let source = match event.source {
        FROM_DEVICE => "device".to_string(),
        cpu => format!("vcpu {cpu}"),
    };
    let address = match event.kind {
        OF_MSR => format!("msr {:#010x}", event.gpa),
        _ => format!("{:#018x}", event.gpa),
    };
    let value = match event.size {
        0 => "-".to_string(),
        size => format!("{:#x} ({size} bytes)", event.value),
    };
    let _ = writeln!(
        text,
        "{:>7}.{:06}  {:<7} {:<8} {:<8} {:<18} {:<18} {:<18} {:>6}  {value}",
        event.time / 1_000_000_000,
        event.time % 1_000_000_000 / 1000,
        access_name(event.access),
        action_name(event.action),
        source,
        address,
        known(event.gva),
        known(event.rip),
        event.times,
    );
    text
}

/// An event.
pub(crate) fn event_json(event: &Event) -> Json {
    let known = |value: u64| match value {
        UNKNOWN => Json::Null,
        value => Json::address(value),
    };
    let of_kind = |is: bool| {
        if is {
            Json::address(event.gpa)
        } else {
            Json::Null
        }
    };
    let of_store = |value: Json| if event.size == 0 { Json::Null } else { value };
    Json::Object(vec![
        ("time_ns", Json::Number(event.time)),
        ("access", Json::Text(access_name(event.access).into())),
        ("action", Json::Text(action_name(event.action).into())),
        (
            "vcpu",
            match event.source {
                FROM_DEVICE => Json::Null,
                cpu => Json::Number(cpu.into()),
            },
        ),
        ("address", of_kind(event.kind != OF_MSR)),
        ("msr", of_kind(event.kind == OF_MSR)),
        ("linear", known(event.gva)),
        ("rip", known(event.rip)),
        ("value", of_store(Json::address(event.value))),
        ("size", of_store(Json::Number(event.size.into()))),
        ("times", Json::Number(event.times.into())),
        ("dropped", Json::Number(event.dropped)),
        ("lost", Json::Number(event.lost)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Event = Event {
        kind: 1,
        access: 1,
        source: 2,
        action: 5,
        gpa: 0x1008,
        gva: UNKNOWN,
        rip: 0xffff_ffff_8100_0000,
        value: 0x41,
        size: 1,
        times: 3,
        dropped: 7,
        lost: 9,
        time: 1_002_003_004,
    };

    #[test]
    fn an_event() {
        let text = event_text(&EVENT, 4);
        let mut lines = text.lines();
        assert_eq!(lines.next().unwrap(), "(the host had no room for 4 events)");
        assert!(lines.next().unwrap().starts_with("(7 events"));
        let words: Vec<_> = lines.next().unwrap().split_whitespace().collect();
        assert_eq!(
            words,
            [
                "1.002003",
                "write",
                "audit",
                "vcpu",
                "2",
                "0x0000000000001008",
                "-",
                "0xffffffff81000000",
                "3",
                "0x41",
                "(1",
                "bytes)"
            ]
        );
        assert_eq!(
            event_json(&EVENT).to_string(),
            r#"{"time_ns":1002003004,"access":"write","action":"audit","vcpu":2,"address":"0x1008","msr":null,"linear":null,"rip":"0xffffffff81000000","value":"0x41","size":1,"times":3,"dropped":7,"lost":9}"#
        );
    }

    #[test]
    fn an_event_of_a_device() {
        let event = Event {
            source: FROM_DEVICE,
            size: 0,
            dropped: 0,
            ..EVENT
        };
        assert_eq!(event_text(&event, 0).lines().count(), 1);
        assert!(event_text(&event, 0).contains(" device "));
        let json = event_json(&event).to_string();
        assert!(json.contains(r#""vcpu":null"#), "{json}");
        assert!(json.contains(r#""value":null,"size":null"#), "{json}");
    }

    #[test]
    fn an_event_of_an_msr() {
        let event = Event {
            kind: OF_MSR,
            gpa: 0xc000_0082,
            size: 8,
            ..EVENT
        };
        assert!(event_text(&event, 0).contains(" vcpu 2   msr 0xc0000082     -  "));
        let json = event_json(&event).to_string();
        assert!(
            json.contains(r#""address":null,"msr":"0xc0000082","linear":null"#),
            "{json}"
        );
    }

    #[test]
    fn rules() {
        assert_eq!(rules_text(&[]), "there are no rules\n");
        let rules = [
            MsrEntry {
                first: 0xc000_0080,
                last: 0xc000_0080,
                access: 2,
                action: 3,
                flags: 1 << 31,
                mask: 0x901,
            },
            MsrEntry {
                first: 1,
                last: 2,
                access: 3,
                action: 4,
                flags: 0,
                mask: 0,
            },
        ];
        assert_eq!(
            rules_text(&rules).lines().skip(1).collect::<Vec<_>>(),
            [
                "0xc0000080 0xc0000080 EFER          write      pin,log  0x0000000000000901 yes",
                "0x00000001 0x00000002 -             read-write deny     -                  no",
            ]
        );
        assert_eq!(
            rules_json(&rules).to_string(),
            concat!(
                r#"{"rules":[{"first":"0xc0000080","last":"0xc0000080","access":"write","#,
                r#""action":["pin","log"],"mask":"0x901","fixed":true},{"first":"0x1","#,
                r#""last":"0x2","access":"read-write","action":["deny"],"mask":null,"fixed":false}]}"#
            )
        );
    }

    #[test]
    fn what_holds() {
        assert_eq!(entries_text(&[]), "nothing is protected\n");
        let entries = [Entry {
            first: 1,
            last: 2,
            attributes: 0x201 | 1 << 63,
        }];
        assert!(entries_text(&entries).contains(
            "0x0000000000001000 0x0000000000002fff          2  write                  exec                   yes\n"
        ));
        assert_eq!(
            entries_json(&entries).to_string(),
            r#"{"ranges":[{"first":"0x1000","last":"0x2fff","pages":2,"deny":["write"],"audit":["exec"],"fixed":true}]}"#
        );
    }

    #[test]
    fn nonsense_of_a_device_is_printed_and_no_more() {
        let entries = [
            Entry {
                first: 2,
                last: 1,
                attributes: 0,
            },
            Entry {
                first: 0,
                last: u64::MAX,
                attributes: u64::MAX,
            },
        ];
        assert_eq!(entries_text(&entries).lines().count(), 3);
    }

    #[test]
    fn what_was_done() {
        let ranges = ["gfn:1-2".parse().unwrap(), "gfn:9".parse().unwrap()];
        assert_eq!(
            done_text("locked", &ranges, 4),
            "locked 2 ranges, 3 pages, in generation 4\n"
        );
        assert_eq!(
            done_json(&ranges[1..], 4).to_string(),
            r#"{"ranges":1,"pages":1,"generation":4}"#
        );
    }
}
