// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's rules for MSRs: --msr-policy, what QEMU says to it, and what is told of the rules that
//! are in force.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use common::msr::*;
use common::vm_guard::{
    HELLO, MSR_STATE, NO_POLICY, RESULT, Rule, STATE, VIOLATION, hello_msrs, message,
    msr_state_payload, read_rules, state_payload, violation_with,
};
use common::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Line by line, so that what is told of a line can be seen.
const FILE: &str = "\
default = \"deny\"
[[rule]]
msrs = [0x10, \"STAR-LSTAR\"]
access = \"read-write\"
action = \"allow\"
[[rule]]
msrs = [
  \"EFER\",
  0x277
]
action = \"pin\"
mask = 0xd01
log = true
[[rule]]
msrs = [0x8b]
action = \"emulate\"
value = 5
";

/// What that is on the channel.
const RULES: [Rule; 5] = [
    (0x10, 0x10, RW, ALLOW, 0, 0),
    (0xc000_0081, 0xc000_0082, RW, ALLOW, 0, 0),
    (0xc000_0080, 0xc000_0080, W, PIN | LOG, 0, 0xd01),
    (0x277, 0x277, W, PIN | LOG, 0, 0xd01),
    (0x8b, 0x8b, R, EMULATE, 0, 5),
];

fn companion_with(text: &str) -> Companion {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("rules.toml"), text).unwrap();
    Companion::start_in_with(dir, &["--msr-policy", "rules.toml"])
}

/// A vm-guard that says what it can do and what holds, and has yet to answer the policy.
fn connect(companion: &Companion) -> VmGuard {
    VmGuard::connect_msrs(companion, &hello_msrs(100, 16, NO_POLICY), &[], &[])
}

fn answer(vm_guard: &mut VmGuard, status: u32, index: u32) {
    let (seq, _) = vm_guard.policy.take().unwrap();
    vm_guard.result(seq, status, index);
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

#[test]
fn the_policy_is_announced_and_is_the_next_message_on_each_connection() {
    let companion = companion_with(FILE);
    let mut first = None;
    for round in 1..4 {
        // Before the vm-guard has said anything.
        let mut vm_guard = VmGuard::connect_silently(&companion);
        let (seq, payload) = vm_guard.policy.clone().unwrap();
        let head = [1u32, 5, 0, 0].map(u32::to_le_bytes);
        assert_eq!(payload[..16], *head.as_flattened());
        assert_eq!(read_rules(&payload[16..]), RULES);
        // Byte for byte the same again, or QEMU would take it for another.
        assert_eq!(*first.get_or_insert_with(|| payload.clone()), payload);
        vm_guard.send(HELLO, 0, &hello_msrs(100, 16, NO_POLICY));
        vm_guard.send_states(0, 1, &[]);
        vm_guard.result(seq, 0, NO_INDEX);
        companion.wait_for_log_lines("MSR rules of rules.toml are in force: rules=5", round);
        vm_guard.assert_silent();
        drop(vm_guard);
        companion.wait_for_log_lines("VM disconnected", round);
    }
    assert_eq!(companion.log_lines("WARN"), 0, "{}", companion.log());
    assert_eq!(companion.log_lines("ERROR"), 0, "{}", companion.log());
    let none = Companion::start();
    assert_eq!(VmGuard::connect_silently(&none).policy, None);
    let empty = companion_with("");
    let (_, payload) = VmGuard::connect_silently(&empty).policy.unwrap();
    assert_eq!(payload, [0; 16]);
}

#[test]
fn what_qemu_says_to_the_policy_is_told_once_and_is_no_answer_to_anything_else() {
    for (status, index, level, told) in [
        (
            0,
            NO_INDEX,
            "INFO",
            "MSR rules of rules.toml are in force: rules=5 default=deny",
        ),
        (
            17,
            NO_INDEX,
            "WARN",
            "rules.toml are NOT in force: the VM keeps those with which",
        ),
        (
            EOPNOTSUPP,
            3,
            "ERROR",
            "rules.toml:9 are NOT in force: this host cannot enforce this rule",
        ),
        (EOPNOTSUPP, 1, "ERROR", "rules.toml:3 are NOT in force"),
        (
            EOPNOTSUPP,
            NO_INDEX,
            "ERROR",
            "rules.toml are NOT in force: this VM cannot enforce",
        ),
        (
            ENOSPC,
            NO_INDEX,
            "ERROR",
            "rules.toml are NOT in force: together the rules do not fit",
        ),
        (
            EINVAL,
            99,
            "ERROR",
            "rules.toml are NOT in force: the owner of the VM refused them: errno=22",
        ),
        (
            EIO,
            4,
            "ERROR",
            "rules.toml:15 are NOT in force: the owner of the VM refused them: errno=5",
        ),
    ] {
        let companion = companion_with(FILE);
        let vm_guard = connect(&companion);
        let mut s = Setup::with(companion, vm_guard);
        // The guest's request is under way when the answer to the policy comes.
        let head = s.guest.request(&request(guest::MSR_LOCK, &[deny(5, 5, R)]));
        s.front_end.kick(0);
        let (seq, ..) = s.vm_guard.msr_rules();
        answer(&mut s.vm_guard, status, index);
        s.companion.wait_for_log(told);
        s.front_end.config();
        assert_eq!(s.guest.try_used(0), None);
        s.vm_guard.msrs_in_force = 1;
        s.vm_guard.result(seq, 0, NO_INDEX);
        assert_eq!(s.guest.response(head), OK);
        let log = s.companion.log();
        let line = log.lines().find(|line| line.contains(told)).unwrap();
        assert!(line.contains(level), "{line}");
        assert_eq!(log.matches("rules.toml").count(), 1, "{log}");
        // Only what is in force is told of.
        let status_now = s.companion.status();
        let default = if status == 0 {
            json!("deny")
        } else {
            Value::Null
        };
        assert_eq!(status_now["msr_default"], default);
        // It is answered once.
        s.vm_guard.result(u64::MAX, 0, NO_INDEX);
        s.companion
            .wait_for_log("RESULT with seq 18446744073709551615");
        s.vm_guard.assert_closed();
    }
}

#[test]
fn the_hosts_pins_count_as_soon_as_they_are_in_force() {
    let companion = companion_with("[[rule]]\nmsrs=['0x100-0x13f']\naction='pin'\n");
    let mut vm_guard = connect(&companion);
    answer(&mut vm_guard, 0, NO_INDEX);
    companion.wait_for_log("are in force: rules=1 default=allow");
    let mut s = Setup::with(companion, vm_guard);
    let one_more = request(guest::MSR_LOCK, &[pin(0x200, 0x200, 1)]);
    assert_eq!(s.ask(&one_more), refused(ENOSPC, NO_INDEX));
    s.msr_order(&request(guest::MSR_LOCK, &[pin(0x100, 0x100, 1)]), 1);
}

#[test]
fn a_companion_without_a_policy_says_that_there_is_one() {
    let companion = Companion::start();
    let hello = hello_msrs(100, 16, 1);
    let mut vm_guard = VmGuard::connect_msrs(&companion, &hello, &[], &[deny(1, 1, R)]);
    companion.wait_for_log("the VM has MSR rules of its host: rules=1 default=deny");
    // It was asked for none, so it has none to answer.
    vm_guard.result(u64::MAX, 0, NO_INDEX);
    vm_guard.assert_closed();
    companion.wait_for_log("control channel closed");
    let none = Companion::start();
    VmGuard::connect(&none);
    assert_eq!(none.log_lines("MSR rules of its host"), 0);
}

fn start_with_policy(path: &Path) -> Output {
    let dir = TempDir::new().unwrap();
    Command::new(env!("CARGO_BIN_EXE_vhost-guard"))
        .arg("--socket-path")
        .arg(dir.path().join("s"))
        .arg("--msr-policy")
        .arg(path)
        .output()
        .unwrap()
}

#[test]
fn a_bad_file_is_refused_at_start_in_one_line() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("rules.toml");
    let many: String = (0..4097).map(|i| format!("{},\n", 0x1_0000 + i)).collect();
    for (text_of, line, reason) in [
        ("default = 1\n", ":1: ", ""),
        (
            "\n[[rule]]\nmsrs=[0x800]\naccess='read'\naction='deny'\n",
            ":3: ",
            "x2APIC",
        ),
        (
            "[[rule]]\nmsrs=[1]\naction='deny'\n",
            ":1: ",
            "access is missing",
        ),
        (
            "[[rule]]\nmsrs=[1]\naction='pin'\n[[rule]]\nmsrs=[2,\n'0x100-0x13f']\naction='pin'\n",
            ":6: ",
            "with this, more than 64 MSRs are pinned",
        ),
        (
            &format!("[[rule]]\nmsrs=[\n{many}]\naccess='read'\naction='log'\n"),
            ":4099: ",
            "more than 4096 rules",
        ),
    ] {
        fs::write(&path, text_of).unwrap();
        let output = start_with_policy(&path);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        let begin = format!("vhost-guard: error: {}{line}", path.display());
        assert!(error.starts_with(&begin), "{error}");
        assert!(error.contains(reason), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let output = start_with_policy(&dir.path().join("none"));
    let error = text(&output.stderr);
    assert_eq!(
        (output.status.code(), error.lines().count()),
        (Some(1), 1),
        "{error}"
    );
    assert!(error.contains("none: cannot be read"), "{error}");
    let help = Command::new(env!("CARGO_BIN_EXE_vhost-guard"))
        .arg("--help")
        .output()
        .unwrap();
    for word in ["--msr-policy <FILE>", "docs/msr.md", "examples/msr-"] {
        assert!(text(&help.stdout).contains(word), "{word}");
    }
}

#[test]
fn a_state_of_msrs_that_breaks_the_rules_closes_the_connection_with_one_line() {
    let hello = |default| message(HELLO, 0, &hello_msrs(100, 16, default));
    let state = message(STATE, 0, &state_payload(1, &[]));
    let both = |guest: &[Rule], host: &[Rule]| {
        let rules = message(MSR_STATE, 0, &msr_state_payload(1, guest, host));
        [hello(0), rules, state.clone()].concat()
    };
    let guest = |rules: &[Rule]| both(rules, &[]);
    let host = |rules: &[Rule]| both(&[], rules);
    let counts = |guest: u32, host: u32| {
        let mut payload = msr_state_payload(1, &[deny(1, 1, R)], &[]);
        payload[8..12].copy_from_slice(&guest.to_le_bytes());
        payload[12..16].copy_from_slice(&host.to_le_bytes());
        [hello(0), message(MSR_STATE, 0, &payload)].concat()
    };
    let many: Vec<_> = (0..8193)
        .map(|i| deny(0x1_0000 + 2 * i, 0x1_0000 + 2 * i, R))
        .collect();
    let none = msr_state_payload(1, &[], &[]);
    let unsorted = "does not lie above the one before it";
    let bits = "no such rule has action";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        (unsorted, guest(&[deny(5, 5, R), deny(1, 1, R)])),
        (
            "rule 1 of the guest in MSR_STATE",
            guest(&[deny(1, 5, R), deny(5, 9, R)]),
        ),
        (unsorted, guest(&[deny(5, 5, W), deny(6, 6, R)])),
        (
            "rule 2 of the host in MSR_STATE",
            host(&[deny(1, 1, R), deny(1, 1, W), deny(1, 1, W)]),
        ),
        ("8193 of the host", host(&many)),
        ("2 rules of the guest and 0 of", counts(2, 0)),
        ("0 rules of the guest and 0 of", counts(0, 0)),
        ("4294967295 rules of the guest and 2 of", counts(!0, 2)),
        ("access is 0x3, not 1 or 2", guest(&[deny(1, 1, RW)])),
        ("access is 0x0", host(&[deny(1, 1, 0)])),
        ("starts at MSR 0x2, after its end", guest(&[deny(2, 1, R)])),
        ("x2APIC", guest(&[deny(0x7ff, 0x800, R)])),
        ("TSC_DEADLINE", host(&[deny(0x6e0, 0x6e0, W)])),
        (bits, guest(&[(1, 1, R, ALLOW, 0, 0)])),
        (bits, guest(&[(1, 1, R, EMULATE, 0, 0)])),
        (bits, guest(&[(1, 1, R, 16, 0, 0)])),
        (bits, guest(&[(1, 1, R, DENY | LOG, 0, 0)])),
        (bits, guest(&[(1, 1, R, DENY, 1, 0)])),
        (bits, guest(&[(1, 1, W, DENY, 0, 1)])),
        (bits, guest(&[(1, 1, W, PIN, 0, 0)])),
        ("only writes can be pinned", guest(&[(1, 1, R, PIN, 0, 1)])),
        (bits, host(&[fixed(deny(1, 1, R))])),
        (bits, host(&[(1, 1, W, EMULATE, 0, 0)])),
        (bits, host(&[(1, 1, R, EMULATE | DENY, 0, 0)])),
        (
            "STATE with seq 0 without the MSR_STATE",
            [hello(0), state.clone()].concat(),
        ),
        (
            "STATE with seq 0 without the MSR_STATE",
            [hello(0), message(MSR_STATE, 1, &none), state.clone()].concat(),
        ),
        (
            "STATE with seq 0 without the MSR_STATE",
            [
                hello(0),
                message(MSR_STATE, 0, &msr_state_payload(2, &[], &[])),
                state.clone(),
            ]
            .concat(),
        ),
        (
            "with rules of the host, who has no policy",
            [
                hello(NO_POLICY),
                message(MSR_STATE, 0, &msr_state_payload(1, &[], &[deny(1, 1, R)])),
                state.clone(),
            ]
            .concat(),
        ),
        ("first message was not HELLO", message(MSR_STATE, 0, &none)),
        (
            "type 0x6 with 17 bytes",
            [hello(0), message(MSR_STATE, 0, &[0; 17])].concat(),
        ),
        (
            "RESULT with seq 0",
            [hello(0), message(RESULT, 0, &[0; 24])].concat(),
        ),
    ];
    for (reason, bytes) in cases {
        let companion = Companion::start();
        let mut vm_guard = VmGuard::connect_silently(&companion);
        // It may be closed before all of it is there.
        let _ = vm_guard.stream.write_all(&bytes);
        vm_guard.assert_closed();
        companion.wait_for_log("control channel closed");
        let log = companion.log();
        assert_eq!(companion.log_lines("WARN"), 1, "{reason}: {log}");
        assert_eq!(companion.log_lines(reason), 1, "{reason}: {log}");
        VmGuard::connect(&companion);
    }
}

#[test]
fn what_is_in_force_is_shown_to_people_and_to_programs() {
    let companion = companion_with(FILE);
    let guest = [
        (0x11, 0x1f, R, LOG, 0, 0),
        fixed((0xc000_0080, 0xc000_0080, W, PIN | LOG, 0, 1 << 63)),
    ];
    let mut vm_guard =
        VmGuard::connect_msrs(&companion, &hello_msrs(256, 9, NO_POLICY), &guest, &[]);
    answer(&mut vm_guard, 0, NO_INDEX);
    companion.wait_for_log("are in force: rules=5");
    let mut violation = violation_with(1, 1, 2, 0x277, 1, 0);
    violation[0] = 2;
    vm_guard.send(VIOLATION, 0, &violation);
    let status = wait_for("the violation", || {
        let status = companion.status();
        (status["counters"]["violations"] == 1).then_some(status)
    });
    assert_eq!(status["limits"]["max_msr_ranges"], 256);
    assert_eq!(status["limits"]["max_msr_pins"], 64);
    assert_eq!(status["msr_default"], "deny");
    assert_eq!(status["violations"][0]["msr"], "0x277");
    assert_eq!(status["violations"][0].get("gpa"), None);
    let rules = status["msr_rules"].as_array().unwrap();
    assert_eq!(rules.len(), 7);
    assert_eq!(
        rules[1],
        json!({
            "by": "guest", "first": 0xc000_0080u32, "last": 0xc000_0080u32, "access": "write",
            "action": "pin", "mask": "0x8000000000000000", "value": null, "log": true,
            "immutable": true,
        })
    );
    assert_eq!(
        rules[6],
        json!({
            "by": "host", "first": 0x8b, "last": 0x8b, "access": "read", "action": "emulate",
            "mask": null, "value": "0x5", "log": false, "immutable": true,
        })
    );
    let output = Companion::command()
        .args(["show", "--status-path"])
        .arg(companion.status_path())
        .output()
        .unwrap();
    let shown = text(&output.stdout);
    let expected = "\
MSRS                   ACCESS      RULE                         OF     CAN CHANGE
0x11-0x1f              read        log                          guest  yes
0xc0000080             write       pin 0x8000000000000000, log  guest  grow only, until reset
0x10                   read-write  allow                        host   no
0xc0000081-0xc0000082  read-write  allow                        host   no
0xc0000080             write       pin 0xd01, log               host   no
0x277                  write       pin 0xd01, log               host   no
0x8b                   read        emulate 0x5                  host   no
all others             read-write  deny                         host   no
";
    assert!(shown.contains(expected), "{shown}");
    let short = "MSR rules:     2 of the guest, at most 256; 5 of the host\n";
    assert!(shown.contains(short), "{shown}");
    assert!(
        shown.contains("write  vcpu2  msr 0x277  0xffffffff81000000  inject\n"),
        "{shown}"
    );
}
