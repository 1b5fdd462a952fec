// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The events file: what is in it, and that no guest fills a disk with it.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use common::vm_guard::{VIOLATION, hello_payload, message, violation_payload, violation_with};
use common::*;
use serde_json::{Value, json};

fn file_of(companion: &Companion) -> PathBuf {
    companion.dir.path().join("events")
}

fn setup() -> Setup {
    let companion = Companion::start_with(&["--events", "events"]);
    Setup::on(companion, &hello_payload(NOWRITE, 1))
}

fn lines(companion: &Companion) -> Vec<Value> {
    let text = fs::read_to_string(file_of(companion)).unwrap();
    // The last one may be half written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

fn sum(lines: &[Value], field: &str) -> u64 {
    lines.iter().map(|line| line[field].as_u64().unwrap()).sum()
}

#[test]
fn each_violation_is_a_line_with_all_that_is_known_of_it() {
    let mut s = setup();
    let mode = fs::metadata(file_of(&s.companion)).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    s.vm_guard
        .send(VIOLATION, 0, &violation_payload(3, 0x12345, 2, 0));
    let mut unknown = violation_with(3, 5, !0, 0x1000, 1, 9);
    unknown[16..32].fill(0xff);
    unknown[32..44].fill(0);
    s.vm_guard.send(VIOLATION, 0, &unknown);
    s.vm_guard.reset();
    s.vm_guard
        .send(VIOLATION, 0, &violation_with(2, 4, 0, 0x2000, 1, 9));
    let lines = wait_for("three lines", || {
        let lines = lines(&s.companion);
        (lines.len() == 3).then_some(lines)
    });
    let mut expected = [
        json!({
            "generation": 1, "access": "write", "source": "vcpu3", "gpa": "0x12345",
            "gva": "0xffff800000001234", "rip": "0xffffffff81000000", "size": 8,
            "value": "0xabcd", "times": 2, "action": "inject", "lost": 0, "suppressed": 0,
        }),
        json!({
            "generation": 1, "access": "read", "source": "device", "gpa": "0x1000", "gva": null,
            "rip": null, "size": null, "value": null, "times": 1, "action": "audit", "lost": 9,
            "suppressed": 0,
        }),
        json!({
            "generation": 2, "access": "fetch", "source": "vcpu0", "gpa": "0x2000",
            "gva": "0xffff800000001234", "rip": "0xffffffff81000000", "size": 8,
            "value": "0xabcd", "times": 1, "action": "shutdown", "lost": 9, "suppressed": 0,
        }),
    ];
    let mut before = String::new();
    for (line, expected) in lines.iter().zip(&mut expected) {
        let time = line["time"].as_str().unwrap();
        // 2026-11-21T09:34:29.123456Z: sorted as text, sorted in time.
        assert_eq!((time.len(), &time[10..11], &time[26..]), (27, "T", "Z"));
        assert!(*before <= *time, "{before} {time}");
        before = time.into();
        expected["time"] = time.into();
        assert_eq!(line, expected);
    }
}

#[test]
fn a_file_that_is_there_is_added_to_by_each_companion() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    fs::write(&path, "{\"from\":\"before\"}\n").unwrap();
    let mut companion = Companion::start_in_with(dir, &["--events", "events"]);
    for count in 2..4 {
        let mut vm_guard = VmGuard::connect(&companion);
        vm_guard.send(VIOLATION, 0, &violation_payload(0, 0x1000, 1, 0));
        wait_for("another line", || {
            (lines(&companion).len() == count).then_some(())
        });
        companion = companion.kill_and_restart_with(&["--events", "events"]);
    }
    assert_eq!(lines(&companion)[0]["from"], "before");
}

#[test]
fn a_hundred_thousand_violations_fill_neither_the_disk_nor_the_memory() {
    const COUNT: u64 = 100_000;
    let mut s = setup();
    let rss = |s: &Setup| {
        let status = fs::read_to_string(format!("/proc/{}/status", s.companion.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    // Each at an address of its own, so that nothing coalesces.
    let send = |s: &mut Setup, from: u64, to: u64| {
        for first in (from..to).step_by(1000) {
            let bytes: Vec<_> = (first..(first + 1000).min(to))
                .flat_map(|i| message(VIOLATION, 0, &violation_payload(0, i << 12, 1, 0)))
                .collect();
            std::io::Write::write_all(&mut s.vm_guard.stream, &bytes).unwrap();
        }
    };
    let seen = |s: &mut Setup, count| {
        wait_for("violations", || {
            (s.front_end.config().violations() == count).then_some(())
        });
    };
    send(&mut s, 0, 2000);
    seen(&mut s, 2000);
    let before = rss(&s);
    send(&mut s, 2000, COUNT);
    seen(&mut s, COUNT);
    let after = rss(&s);
    assert!(after < before + 4096, "{before} KiB before, {after} after");
    // Nobody was in the way of the guest meanwhile, and every access is told of in the end,
    // although nothing more happens.
    let lines = wait_for("the last line", || {
        let lines = lines(&s.companion);
        (sum(&lines, "times") + sum(&lines, "suppressed") == COUNT).then_some(lines)
    });
    assert!((200..600).contains(&lines.len()), "{} lines", lines.len());
    let size = fs::metadata(file_of(&s.companion)).unwrap().len();
    assert!(size < 200_000, "{size} bytes");
    s.assert_works();
}

#[test]
fn what_was_held_back_is_written_when_the_process_is_ended() {
    let mut s = setup();
    for i in 0..1000 {
        s.vm_guard
            .send(VIOLATION, 0, &violation_payload(0, i << 12, 1, 0));
    }
    wait_for("violations", || {
        (s.front_end.config().violations() == 1000).then_some(())
    });
    s.companion.signal("-TERM");
    assert_eq!(s.companion.wait().code(), Some(0));
    let lines = lines(&s.companion);
    assert_eq!(sum(&lines, "times") + sum(&lines, "suppressed"), 1000);
}

#[test]
fn a_file_that_cannot_grow_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A limit for each file of the process, 40 KiB; the log stays far below.
    let mut command = Command::new("bash");
    command
        .args(["-c", "ulimit -f 40; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_vhost-guard"));
    let companion = Companion::start_command(command, dir, &["--events", "events"]);
    let mut s = Setup::on(companion, &hello_payload(NOWRITE, 1));
    for i in 0..400 {
        s.vm_guard
            .send(VIOLATION, 0, &violation_payload(0, i << 12, 1, 0));
    }
    s.companion
        .wait_for_log("cannot write to the events file; going on without");
    s.assert_works();
    assert_eq!(fs::metadata(file_of(&s.companion)).unwrap().len(), 40 << 10);
    assert!(s.companion.log_lines("cannot write") < 10);
    // Somebody made room: what comes next is whole, and tells of the others.
    fs::write(file_of(&s.companion), "").unwrap();
    let last = wait_for("a line", || {
        s.vm_guard
            .send(VIOLATION, 0, &violation_payload(9, 0x9000, 1, 0));
        let text = fs::read_to_string(file_of(&s.companion)).unwrap();
        let line = text.lines().find(|line| line.contains("vcpu9"))?;
        serde_json::from_str::<Value>(line).ok()
    });
    assert!(last["suppressed"].as_u64().unwrap() > 100, "{last}");
}

#[test]
fn what_cannot_be_an_events_file_is_refused_at_start_with_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("target"), "").unwrap();
    symlink(at("target"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    fs::create_dir(at("directory")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let cases = [
        ("link", "is no regular file"),
        ("dangling", "is no regular file"),
        ("fifo", "is no regular file"),
        ("directory", "cannot open"),
        ("missing/events", "cannot open"),
        ("/dev/null", "is no regular file"),
    ];
    for (name, text) in cases {
        // One that starts all the same is to fail the test, not to hold it up.
        let output = Command::new("timeout")
            .arg(DEADLINE.as_secs().to_string())
            .arg(env!("CARGO_BIN_EXE_vhost-guard"))
            .arg("--socket-path")
            .arg(at("s"))
            .arg("--events")
            .arg(at(name))
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}: {error}");
        assert!(error.starts_with("vhost-guard: error: "), "{error}");
        assert!(error.contains(text) && error.contains(name), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert!(!at("s").exists() && !at("s.lock").exists());
    assert_eq!(fs::read_to_string(at("target")).unwrap(), "");
    assert!(!at("nowhere").exists());
}
