// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The status socket, and `vhost-guard show`.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::guest::{LOCK, PROTECT, request};
use common::vm_guard::{VIOLATION, hello_with, violation_payload, violation_with};
use common::*;
use serde_json::{Value, json};

fn show(args: &[&str], path: &Path) -> Output {
    let mut command = Companion::command();
    command.arg("show").args(args).arg(path);
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// What is printed for a companion that answers.
fn shown(args: &[&str], path: &Path) -> String {
    let output = show(args, path);
    assert!(output.status.success(), "{}", text(output.stderr));
    assert!(output.stderr.is_empty());
    text(output.stdout)
}

/// A VM of which there is something of every kind to tell.
fn busy() -> Setup {
    let mut s = Setup::on(
        Companion::start(),
        &hello_with(NOWRITE | NOREAD, NOWRITE | NOEXEC, 7),
    );
    let (locked, mutable) = ((0x8000, 0x81ff, NOWRITE | NOREAD), (0x9000, 0x9000, 0x300));
    let mut one = |kind, range, in_force| {
        let head = s.guest.request(&request(kind, 0, 1, &[range]));
        s.front_end.kick(0);
        let seq = s.vm_guard.protect().seq;
        s.vm_guard.done(seq, in_force);
        assert_eq!(s.guest.response(head).status, 0);
    };
    one(LOCK, locked, 1);
    one(PROTECT, mutable, 2);
    let refused = s
        .guest
        .request(&request(PROTECT, 0, 1, &[(0x8000, 0x8000, 0)]));
    s.front_end.kick(0);
    assert_eq!(s.guest.response(refused).status, EPERM);
    s.vm_guard
        .send(VIOLATION, 0, &violation_payload(3, 0x800_0008, 2, 0));
    s.vm_guard
        .send(VIOLATION, 0, &violation_with(2, 5, !0, 0x900_0000, 1, 4));
    wait_for("violations", || {
        (s.front_end.config().violations() == 7).then_some(())
    });
    s
}

#[test]
fn the_document_says_what_is_known() {
    let s = busy();
    let mut status = s.companion.status();
    for violation in status["violations"].as_array_mut().unwrap() {
        let time = violation["time"].take();
        let time = time.as_str().unwrap();
        assert!(time.len() == 27 && time.ends_with('Z'), "{time}");
    }
    let expected = json!({
        "format": 1,
        "companion": env!("CARGO_PKG_VERSION"),
        "connected": true,
        "accel": "TCG",
        "generation": 7,
        "on_violation": "inject",
        "deny_bits": ["NOWRITE", "NOREAD"],
        "audit_bits": ["NOWRITE", "NOEXEC"],
        "limits": {
            "max_ranges": 1000, "max_request_ranges": 4096, "max_msr_ranges": 0,
            "max_msr_pins": 64,
        },
        "msr_default": null,
        "msr_rules": [],
        "ranges": [
            {
                "gfn_start": 0x8000, "gfn_end": 0x81ff, "pages": 0x200,
                "deny": ["NOWRITE", "NOREAD"], "audit": [], "immutable": true,
            },
            {
                "gfn_start": 0x9000, "gfn_end": 0x9000, "pages": 1,
                "deny": [], "audit": ["NOWRITE", "NOEXEC"], "immutable": false,
            },
        ],
        "counters": {
            "violations": 7, "events_lost": 4, "malformed": 0, "requests_ok": 2,
            "requests_refused": 1,
        },
        "violations": [
            {
                "time": null, "generation": 7, "access": "write", "source": "vcpu3",
                "gpa": "0x8000008", "gva": "0xffff800000001234", "rip": "0xffffffff81000000",
                "size": 8, "value": "0xabcd", "times": 2, "action": "inject", "lost": 0,
            },
            {
                "time": null, "generation": 7, "access": "fetch", "source": "device",
                "gpa": "0x9000000", "gva": "0xffff800000001234", "rip": "0xffffffff81000000",
                "size": 8, "value": "0xabcd", "times": 1, "action": "audit", "lost": 4,
            },
        ],
        "memory": [{ "gpa": 0, "size": guest::RAM_SIZE, "offset": 0, "fd": 0 }],
        "memory_left_out": 0,
    });
    assert_eq!(status, expected);
}

#[test]
fn it_answers_before_during_and_after_a_connection_of_qemu() {
    let companion = Companion::start();
    let status = companion.status();
    assert_eq!(status["connected"], false);
    for field in ["accel", "generation", "on_violation"] {
        assert_eq!(status[field], Value::Null, "{field}");
    }
    assert_eq!(status["ranges"], json!([]));
    assert_eq!(status["memory"], json!([]));
    let out = shown(&["--socket-path"], &companion.socket_path());
    assert!(
        out.contains("not connected") && out.contains("unknown"),
        "{out}"
    );

    let s = Setup::on(companion, &hello_with(1, 0, 3));
    assert_eq!(s.companion.status()["connected"], true);
    let Setup {
        companion,
        vm_guard,
        front_end,
        ..
    } = s;
    drop(vm_guard);
    companion.wait_for_log("VM disconnected");
    // What it said last still holds, as far as anybody knows.
    let status = companion.status();
    assert_eq!(
        (&status["connected"], &status["generation"]),
        (&false.into(), &3.into())
    );
    drop(front_end);
    companion.wait_for_log("front end disconnected");
    assert_eq!(companion.status()["generation"], Value::Null);
}

#[test]
fn the_last_64_violations_are_remembered_and_no_more() {
    let mut s = Setup::new();
    for i in 0..200 {
        s.vm_guard
            .send(VIOLATION, 0, &violation_payload(0, i << 12, 1, 0));
    }
    wait_for("violations", || {
        (s.front_end.config().violations() == 200).then_some(())
    });
    let status = s.companion.status();
    let told: Vec<_> = status["violations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|violation| violation["gpa"].as_str().unwrap().to_owned())
        .collect();
    let expected: Vec<_> = (136..200).map(|i| format!("{:#x}", i << 12)).collect();
    assert_eq!(told, expected);
}

#[test]
fn it_is_for_its_owner_only_and_goes_with_the_process() {
    let mut companion = Companion::start();
    let mode = fs::metadata(companion.status_path()).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    companion.signal("-TERM");
    companion.wait();
    assert_eq!(companion.files(), ["log"]);

    let companion = Companion::start_with(&["--status-path", "other"]);
    assert!(!companion.status_path().exists());
    let path = companion.dir.path().join("other");
    shown(&["--status-path"], &path);
    let second = Companion::command()
        .arg("--socket-path")
        .arg(companion.dir.path().join("s"))
        .arg("--status-path")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let error = text(second.stderr);
    assert!(
        error.contains("already in use by a running process"),
        "{error}"
    );
}

/// A document that no socket buffer holds. The pages are not those of the guest's rings.
fn large(companion: &Companion) -> VmGuard {
    let ranges: Vec<_> = (0x8000..0x8000 + 8_000)
        .map(|i| (2 * i, 2 * i, NOWRITE))
        .collect();
    VmGuard::connect_with(companion, 1, &ranges)
}

#[test]
fn clients_that_do_not_read_cost_the_guest_nothing_and_others_little() {
    let companion = Companion::start();
    let mut guest = Guest::new();
    let mut vm_guard = large(&companion);
    let mut front_end = FrontEnd::connect(&companion, &guest);
    let idle: Vec<_> = (0..2)
        .map(|_| UnixStream::connect(companion.status_path()).unwrap())
        .collect();
    // One that goes at once, one that talks, and one that is behind them all.
    drop(UnixStream::connect(companion.status_path()).unwrap());
    let mut talking = UnixStream::connect(companion.status_path()).unwrap();
    talking.write_all(&[b'x'; 1000]).unwrap();
    let before = companion.ticks();
    for i in 0..50u64 {
        let head = guest.lock(&[(i, i, 0x100)]);
        front_end.kick(0);
        assert_eq!(guest.response(head).status, EOPNOTSUPP);
        front_end.config();
    }
    let head = guest.lock(&[(1, 1, NOWRITE)]);
    front_end.kick(0);
    let seq = vm_guard.protect().seq;
    vm_guard.done(seq, 8_001);
    assert_eq!(guest.response(head).status, 0);
    assert!(companion.ticks() - before < 300, "it spins");
    drop(talking);
    let ranges = companion.status()["ranges"].as_array().unwrap().len();
    assert_eq!(ranges, 8_001);
    drop(idle);
}

/// Until they are read, the descriptors that come with a document are the kernel's to keep.
#[test]
fn clients_that_take_no_descriptors_leave_none_behind() {
    let s = busy();
    let before = s.companion.descriptors();
    let idle: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(s.companion.status_path()).unwrap())
        .collect();
    assert_eq!(s.companion.status()["memory"].as_array().unwrap().len(), 1);
    wait_for("the last connection to be closed", || {
        (s.companion.descriptors() == before).then_some(())
    });
    drop(idle);
}

/// A client of another user, if that can be had here.
#[test]
fn guest_memory_is_for_root_and_its_own_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let s = busy();
    let everybody = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    everybody(s.companion.dir.path(), 0o755);
    everybody(&s.companion.status_path(), 0o666);
    let program = s.companion.dir.path().join("program");
    fs::copy(env!("CARGO_BIN_EXE_vhost-guard"), &program).unwrap();
    for (uid, given) in [(0, true), (65534, false)] {
        let output = Command::new(&program)
            .uid(uid)
            .args(["show", "--json", "--status-path"])
            .arg(s.companion.status_path())
            .output()
            .unwrap();
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document.get("memory").is_some(), given, "{uid}");
        assert_eq!(document["generation"], 7);
    }
    let output = Command::new(&program)
        .uid(65534)
        .args(["pagetable", "--root", "0x1000", "--status-path"])
        .arg(s.companion.status_path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(output.stderr).contains("gives no guest memory"));
}

#[test]
fn many_clients_are_served_whole_and_leave_nothing_behind() {
    let s = busy();
    let first = s.companion.status();
    let before = s.companion.descriptors();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_eq!(s.companion.status(), first);
                }
            });
        }
    });
    wait_for("the last connection to be closed", || {
        (s.companion.descriptors() == before).then_some(())
    });
    assert_eq!(s.companion.log_lines("status:"), 0);
}

#[test]
fn show_prints_a_table_for_people() {
    let s = busy();
    let expected = "\
companion:     0.1.0
QEMU:          connected
accelerator:   TCG
generation:    7
on violation:  inject
can deny:      NOWRITE,NOREAD
can watch:     NOWRITE,NOEXEC
ranges:        2 in force, at most 1000
MSR rules:     not possible in this VM
requests:      2 carried out, 1 refused, 0 malformed
violations:    7, of which the guest was not told of 4

FIRST ADDRESS   LAST ADDRESS    SIZE   DENIED          WATCHED         CAN CHANGE
0x000008000000  0x0000081fffff  2 MiB  NOWRITE,NOREAD  -               grow only, until reset
0x000009000000  0x000009000fff  4 KiB  -               NOWRITE,NOEXEC  yes

LAST VIOLATIONS              TIMES  WHAT   BY      ADDRESS    RIP                 ACTION
(time)                       2      write  vcpu3   0x8000008  0xffffffff81000000  inject
(time)                       1      fetch  device  0x9000000  0xffffffff81000000  audit
";
    for (option, path) in [
        ("--socket-path", s.companion.socket_path()),
        ("--status-path", s.companion.status_path()),
        ("--control-path", s.companion.control_path()),
    ] {
        let out = shown(&[option], &path);
        // Times are the only thing that is not known before.
        let out: String = out
            .lines()
            .map(
                |line| match line.find('Z').filter(|_| line.starts_with("20")) {
                    Some(end) => format!("{:27}{}\n", "(time)", &line[end + 1..]),
                    None => format!("{line}\n"),
                },
            )
            .collect();
        assert_eq!(out, expected, "{option}");
    }
}

#[test]
fn show_prints_the_json_as_it_is() {
    let s = busy();
    let out = shown(&["--json", "--socket-path"], &s.companion.socket_path());
    let printed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(printed, s.companion.status());
    assert!(out.ends_with("}\n"));
}

#[test]
fn show_says_in_one_line_why_there_is_nothing_to_show() {
    let companion = Companion::start();
    let _vm_guard = VmGuard::connect(&companion);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    drop(UnixListener::bind(at("dead")).unwrap());
    fs::write(at("file"), "{}").unwrap();
    let cases = [
        ("--status-path", at("none"), 1, "no companion listens at"),
        ("--socket-path", at("none"), 1, "none.status"),
        ("--status-path", at("dead"), 1, "no companion listens at"),
        ("--status-path", at("file"), 1, "no companion listens at"),
        ("--control-path", at("control"), 2, "give --status-path"),
    ];
    for (option, path, code, expected) in cases {
        let output = show(&[option], &path);
        let error = text(output.stderr);
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(expected), "{error}");
        assert!(
            code == 2 || error.starts_with("vhost-guard: error: "),
            "{error}"
        );
        assert!(code == 2 || error.lines().count() == 1, "{error}");
        assert!(output.stdout.is_empty());
    }
    // Its own control socket, while QEMU is not there, greets; other things answer other things.
    drop(_vm_guard);
    companion.wait_for_log("VM disconnected");
    let mut answers: Vec<(&[u8], &str)> = vec![
        (b"", "is not a companion's status socket"),
        (b"VGRD", "is not a companion's status socket"),
        (b"{}", "is not a companion's status socket"),
        (b"{\"format\":1}", "is not a companion's status socket"),
        (b"{\"format\":2}", "format 2, and this is for format 1"),
    ];
    let mut status = companion.status();
    status["ranges"] = json!([{
        "gfn_start": 1u64 << 52, "gfn_end": 1u64 << 52, "pages": 1, "deny": [], "audit": [],
        "immutable": true,
    }]);
    let bytes = serde_json::to_vec(&status).unwrap();
    answers.push((&bytes, "is not a companion's status socket"));
    let listener = UnixListener::bind(at("fake")).unwrap();
    for (answer, expected) in answers {
        let output = std::thread::scope(|scope| {
            let output = scope.spawn(|| show(&["--status-path"], &at("fake")));
            listener.accept().unwrap().0.write_all(answer).unwrap();
            output.join().unwrap()
        });
        let error = text(output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(output.stdout.is_empty());
    }
    let output = show(&["--status-path"], &companion.control_path());
    assert!(text(output.stderr).contains("is not a companion's status socket"));
}

#[test]
fn show_ends_silently_when_nobody_reads_any_more() {
    let companion = Companion::start();
    let _vm_guard = large(&companion);
    for args in [&["--status-path"][..], &["--json", "--status-path"]] {
        let mut child = Companion::command()
            .arg("show")
            .args(args)
            .arg(companion.status_path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut some = [0; 100];
        child.stdout.take().unwrap().read_exact(&mut some).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(output.stderr), "");
        assert!(output.status.success());
    }
}

#[test]
fn help_teaches_show() {
    for (args, words) in [
        (&["--help"][..], &["show", "--status-path", "--events"][..]),
        (
            &["show", "--help"],
            &["--json", "Examples:", "--status-path"],
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-guard"))
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success());
        let help = text(output.stdout);
        for word in words {
            assert!(help.contains(word), "{word}: {help}");
        }
    }
}
