// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The writer on a clock and a disk of the test's own.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::*;
use crate::vm::enforcer::{Access, Action, Policy, Source, Target, Violation};

fn seen(gpa: u64, times: u32) -> Seen {
    Seen {
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        generation: 2,
        violation: Violation {
            access: Access::Write,
            source: Source::Vcpu(3),
            target: Target::Memory(gpa),
            gva: Violation::UNKNOWN,
            rip: 0xffff_ffff_8100_0000,
            value: 0xab,
            size: 8,
            times,
            lost: 7,
            action: Action::Refused(Policy::Inject),
        },
    }
}

/// A disk with room for so many bytes.
#[derive(Default)]
struct Disk {
    bytes: Vec<u8>,
    room: usize,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.room);
        if n == 0 {
            return Err(ErrorKind::StorageFull.into());
        }
        self.bytes.extend(&bytes[..n]);
        self.room -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn writer(room: usize, now: Instant) -> Writer<Disk> {
    let disk = Disk {
        bytes: Vec::new(),
        room,
    };
    Writer::new(disk, Arc::default(), now)
}

/// Lines that are JSON, and how many are not.
fn lines(writer: &Writer<Disk>) -> (Vec<Value>, usize) {
    let text = String::from_utf8(writer.out.bytes.clone()).unwrap();
    let parsed: Vec<_> = text.lines().map(serde_json::from_str).collect();
    let torn = parsed.iter().filter(|line| line.is_err()).count();
    (parsed.into_iter().flatten().collect(), torn)
}

#[test]
fn a_line_has_every_field() {
    let now = Instant::now();
    let mut writer = writer(10_000, now);
    writer.take(seen(0x1234, 2), now);
    let mut other = seen(0x1234, 1);
    (other.violation.source, other.violation.size) = (Source::Device, 0);
    (other.violation.access, other.violation.action) = (Access::Read, Action::Audit);
    writer.take(other, now);
    let text = String::from_utf8(writer.out.bytes.clone()).unwrap();
    let expected = concat!(
        r#"{"time":"2023-11-14T22:13:20.000000Z","generation":2,"access":"write","#,
        r#""source":"vcpu3","gpa":"0x1234","gva":null,"rip":"0xffffffff81000000","size":8,"#,
        r#""value":"0xab","times":2,"action":"inject","lost":7,"suppressed":0}"#,
        "\n",
        r#"{"time":"2023-11-14T22:13:20.000000Z","generation":2,"access":"read","#,
        r#""source":"device","gpa":"0x1234","gva":null,"rip":"0xffffffff81000000","size":null,"#,
        r#""value":null,"times":1,"action":"audit","lost":7,"suppressed":0}"#,
        "\n",
    );
    assert_eq!(text, expected);
}

#[test]
fn a_flood_is_merged_and_every_access_is_told_in_the_end() {
    let start = Instant::now();
    let mut writer = writer(usize::MAX, start);
    for i in 0..50_000u32 {
        // Five seconds of it.
        writer.take(seen(i.into(), 2), start + Duration::from_micros(100) * i);
    }
    let (told, _) = lines(&writer);
    let most = (BURST + 5 * PER_SECOND) as usize;
    assert!(
        (most - 1..=most + 1).contains(&told.len()),
        "{}",
        told.len()
    );
    // Nothing more comes, and what was held back is told all the same.
    writer.overflow.fetch_add(17, Ordering::Relaxed);
    writer.tick(start + Duration::from_secs(6));
    let (told, torn) = lines(&writer);
    let sum = |field: &str| told.iter().map(|l| l[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("times") + sum("suppressed"), 2 * 50_000 + 17);
    assert_eq!(torn, 0);
    assert_eq!(told.last().unwrap()["gpa"], "0xc34f", "the newest is told");
}

#[test]
fn a_full_disk_costs_lines_and_no_number_and_the_next_line_is_whole() {
    let now = Instant::now();
    let mut writer = writer(300, now);
    for gpa in 0..10 {
        writer.take(seen(gpa, 1), now);
    }
    assert!(writer.torn);
    writer.out.room = 10_000;
    writer.take(seen(99, 1), now);
    let (told, torn) = lines(&writer);
    assert_eq!((told.len(), torn), (2, 1));
    assert_eq!(
        (&told[0]["gpa"], &told[1]["gpa"]),
        (&"0x0".into(), &"0x63".into())
    );
    assert_eq!(told[1]["suppressed"], 9);
}
