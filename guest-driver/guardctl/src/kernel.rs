// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `guardctl kernel`: what the kernel's page tables say of its memory, and what to deny by them.

use std::fmt::Write;

use clap::{ArgGroup, Args, ValueEnum};

use crate::device::{Counts, Entry, Walk};
use crate::json::Json;
use crate::range::{Range, Rights};

/// What can follow from page tables.
const USABLE: u64 = 1 << 0 | 1 << 3;
/// A range that is told: pages that are written and executed.
const WRITE_EXEC: u64 = 1;

/// What becomes of pages that have no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Unmapped {
    /// Nothing.
    Leave,
    /// They are listed.
    Report,
    /// They are listed, and the request is refused.
    Refuse,
    /// They get all that is to be denied or watched.
    Deny,
}

/// What `kernel` takes.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("change").multiple(false).args(["lock", "protect"]))]
pub(crate) struct KernelRequest {
    /// Deny what the tables do not use, until the next system reset.
    #[arg(long, requires = "ranges")]
    pub(crate) lock: bool,

    /// The same, until told otherwise.
    #[arg(long, requires = "ranges")]
    pub(crate) protect: bool,

    /// What pages may be denied: write, exec-kernel [default: as much of both as this host can].
    #[arg(long, value_name = "RIGHTS")]
    deny: Option<Rights>,

    /// What goes through, but makes an event: the same names.
    #[arg(long, value_name = "RIGHTS")]
    audit: Option<Rights>,

    /// What becomes of pages without mapping.
    #[arg(long, value_enum, default_value = "leave")]
    unmapped: Unmapped,

    /// Fail if there are pages that the kernel can write and execute; nothing is changed then.
    #[arg(long)]
    pub(crate) fail_on_wx: bool,

    /// Where [default: all memory].
    #[arg(value_name = "RANGE")]
    pub(crate) ranges: Vec<Range>,
}

impl KernelRequest {
    /// Nothing is to be changed.
    pub(crate) fn is_dry(&self) -> bool {
        !self.lock && !self.protect
    }

    /// `struct guard_kernel`'s flags and policies.
    pub(crate) fn modes(&self) -> (u16, u8, u8) {
        // Nothing is changed by a dry run, and as a LOCK it is not refused where something is
        // locked that the kernel uses.
        let flags = u16::from(!self.protect) | u16::from(self.is_dry()) << 1;
        // What is only looked at is listed first, and fails then.
        let refuse = self.fail_on_wx && !self.is_dry();
        (flags, self.unmapped as u8, if refuse { 2 } else { 1 })
    }

    /// The entries, on a host that can deny `deny_bits`; none: all memory.
    ///
    /// # Errors
    ///
    /// The options make no sense together, or on this host.
    pub(crate) fn entries(&self, deny_bits: u64) -> Result<Vec<Entry>, String> {
        let audit = self.audit.unwrap_or_default();
        let deny = match self.deny {
            Some(deny) => deny,
            None => Rights(deny_bits & USABLE & !audit.0),
        };
        if (deny.0 | audit.0) & !USABLE != 0 {
            return Err(format!(
                "{} does not follow from the kernel's page tables: only write and exec-kernel do",
                Rights((deny.0 | audit.0) & !USABLE)
            ));
        }
        if deny.0 & audit.0 != 0 {
            return Err(format!(
                "{} cannot be both denied and watched: what is refused makes an event anyway",
                Rights(deny.0 & audit.0)
            ));
        }
        let attributes = Rights::attributes(deny, audit);
        if attributes == 0 {
            return Err("nothing is to be denied or watched".into());
        }
        if self.ranges.is_empty() && (self.deny.is_some() || self.audit.is_some()) {
            return Err("--deny and --audit are about ranges: name some".into());
        }
        let entry = |range: &Range| Entry {
            first: range.first,
            last: range.last,
            attributes,
        };
        Ok(self.ranges.iter().map(entry).collect())
    }
}

/// Pages by what mappings let the kernel do with them: r--, rw-, r-x, rwx.
fn by_rights(counts: &Counts) -> [(&'static str, &'static str, u64); 4] {
    // The numbers of a device are not ours to trust.
    let mapped = counts.pages.saturating_sub(counts.unmapped);
    let written = mapped.saturating_sub(counts.not_written);
    let executed = mapped.saturating_sub(counts.not_executed);
    let both = counts.write_exec;
    [
        (
            "r--",
            "read_only",
            counts
                .not_written
                .saturating_sub(executed.saturating_sub(both)),
        ),
        ("rw-", "written", written.saturating_sub(both)),
        ("r-x", "executed", executed.saturating_sub(both)),
        ("rwx", "write_exec", both),
    ]
}

fn what(told: &Entry) -> &'static str {
    if told.attributes == WRITE_EXEC {
        "written and executed"
    } else {
        "not mapped"
    }
}

fn bounds(told: &Entry) -> (u64, u64, u64) {
    (
        told.first.saturating_mul(4096),
        told.last.saturating_mul(4096).saturating_add(4095),
        told.last.saturating_sub(told.first).saturating_add(1),
    )
}

/// What the tables say, as a table.
pub(crate) fn text(walk: &Walk) -> String {
    let counts = &walk.counts;
    let mut text = String::new();
    let mut row = |name: &str, value: u64| {
        let _ = writeln!(text, "{name:<28} {value:>12}");
    };
    row("pages", counts.pages);
    for (name, _, pages) in by_rights(counts) {
        row(&format!("  {name}"), pages);
    }
    row("  not mapped", counts.unmapped);
    row("mapped pages elsewhere", counts.elsewhere);
    row("mappings", counts.mappings);
    row("tables", counts.tables);
    row("entries with reserved bits", counts.reserved);
    row("tables outside of memory", counts.outside);
    row("pages with something to deny", counts.given);
    row("in ranges", counts.ranges);
    if !walk.told.is_empty() {
        let _ = writeln!(
            text,
            "\n{:<18} {:<18} {:>10}  WHAT",
            "FIRST", "LAST", "PAGES"
        );
    }
    for told in &walk.told {
        let (first, last, pages) = bounds(told);
        let _ = writeln!(
            text,
            "{first:#018x} {last:#018x} {pages:>10}  {}",
            what(told)
        );
    }
    let more = counts.told.saturating_sub(walk.told.len() as u64);
    if more > 0 {
        let _ = writeln!(text, "(and {more} more)");
    }
    text
}

/// What the tables say.
pub(crate) fn json(walk: &Walk, dry: bool) -> Json {
    let counts = &walk.counts;
    let mut fields = vec![
        ("dry_run", Json::Bool(dry)),
        (
            "generation",
            match walk.result {
                Ok(generation) => Json::Number(generation),
                Err(_) => Json::Null,
            },
        ),
        ("pages", Json::Number(counts.pages)),
    ];
    fields.extend(
        by_rights(counts)
            .into_iter()
            .map(|(_, name, pages)| (name, Json::Number(pages))),
    );
    fields.extend([
        ("unmapped", Json::Number(counts.unmapped)),
        ("elsewhere", Json::Number(counts.elsewhere)),
        ("mappings", Json::Number(counts.mappings)),
        ("tables", Json::Number(counts.tables)),
        ("reserved", Json::Number(counts.reserved)),
        ("outside", Json::Number(counts.outside)),
        ("given", Json::Number(counts.given)),
        ("ranges", Json::Number(counts.ranges)),
        ("told", Json::Number(counts.told)),
    ]);
    let list = walk.told.iter().map(|told| {
        let (first, last, pages) = bounds(told);
        Json::Object(vec![
            ("first", Json::address(first)),
            ("last", Json::address(last)),
            ("pages", Json::Number(pages)),
            ("what", Json::Text(what(told).into())),
        ])
    });
    fields.push(("found", Json::List(list.collect())));
    Json::Object(fields)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn request(args: &[&str]) -> KernelRequest {
        let cli = Cli::try_parse_from([&["guardctl", "kernel"], args].concat()).unwrap();
        match cli.command {
            Command::Kernel(request) => request,
            _ => unreachable!(),
        }
    }

    const COUNTS: Counts = Counts {
        pages: 100,
        unmapped: 10,
        not_written: 40,
        not_executed: 60,
        write_exec: 5,
        given: 80,
        elsewhere: 3,
        ranges: 7,
        mappings: 200,
        reserved: 1,
        outside: 2,
        tables: 9,
        told: 3,
    };

    fn walk() -> Walk {
        let entry = |first, attributes| Entry {
            first,
            last: first + 1,
            attributes,
        };
        Walk {
            result: Ok(4),
            counts: COUNTS,
            told: vec![entry(1, 1), entry(8, 2)],
        }
    }

    #[test]
    fn without_options_all_memory_is_looked_at() {
        let request = request(&[]);
        assert_eq!(request.modes(), (3, 0, 1));
        assert_eq!(request.entries(9), Ok(vec![]));
    }

    #[test]
    fn options_become_flags_and_policies() {
        let range = "gfn:1";
        assert_eq!(request(&["--lock", range]).modes(), (1, 0, 1));
        assert_eq!(
            request(&["--protect", "--unmapped=deny", range]).modes(),
            (0, 3, 1)
        );
        assert_eq!(request(&["--fail-on-wx", range]).modes(), (3, 0, 1));
        assert_eq!(
            request(&["--lock", "--fail-on-wx", range]).modes(),
            (1, 0, 2)
        );
    }

    #[test]
    fn what_is_denied_is_what_the_host_can() {
        let attributes = |args: &[&str], bits| {
            let entries = request(&[args, &["gfn:1"]].concat()).entries(bits)?;
            Ok::<_, String>(entries[0].attributes)
        };
        assert_eq!(attributes(&[], 0xf), Ok(9));
        assert_eq!(attributes(&[], 1), Ok(1));
        assert_eq!(attributes(&["--deny=exec-kernel"], 1), Ok(8));
        assert_eq!(attributes(&["--audit=write"], 0xf), Ok(0x108));
        assert!(attributes(&["--deny=read"], 0xf).is_err());
        assert!(attributes(&["--deny=write", "--audit=write"], 0xf).is_err());
        assert!(attributes(&["--deny=none"], 0xf).is_err());
        assert!(request(&["--deny=write"]).entries(9).is_err());
    }

    #[test]
    fn a_change_needs_ranges() {
        for args in [
            &["kernel", "--lock"][..],
            &["kernel", "--protect"],
            &["kernel", "--lock", "--protect", "gfn:1"],
        ] {
            let parsed = Cli::try_parse_from([&["guardctl"], args].concat());
            assert_eq!(parsed.unwrap_err().exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn pages_add_up() {
        let pages: u64 = by_rights(&COUNTS).iter().map(|row| row.2).sum();
        assert_eq!(pages + COUNTS.unmapped, COUNTS.pages);
        assert_eq!(
            by_rights(&COUNTS).map(|row| row.2),
            [15, 45, 25, 5],
            "r--, rw-, r-x, rwx"
        );
    }

    #[test]
    fn ranges_are_listed() {
        let text = text(&walk());
        for line in [
            "  r--                                  15",
            "0x0000000000001000 0x0000000000002fff          2  written and executed",
            "0x0000000000008000 0x0000000000009fff          2  not mapped",
            "(and 1 more)",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in:\n{text}");
        }
        let json = json(&walk(), true).to_string();
        assert!(json.starts_with(r#"{"dry_run":true,"generation":4,"pages":100,"read_only":15"#));
        assert!(json.contains(
            r#""found":[{"first":"0x1000","last":"0x2fff","pages":2,"what":"written and executed"}"#
        ));
    }

    #[test]
    fn nonsense_of_a_device_is_printed_and_no_more() {
        let walk = Walk {
            result: Ok(0),
            counts: Counts {
                pages: 0,
                write_exec: u64::MAX,
                not_written: 7,
                ..Counts::default()
            },
            told: vec![Entry {
                first: u64::MAX,
                last: 0,
                attributes: u64::MAX,
            }],
        };
        assert!(text(&walk).contains("rwx"));
        assert!(json(&walk, false).to_string().contains("write_exec"));
    }
}
