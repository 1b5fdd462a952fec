// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Good files, bad files, and things that are no files.

use std::io::Write;

use super::*;
use crate::protect::msr::{Answer, Decisions, Rules, Table, Verdict};

fn decisions(text: &str) -> Decisions {
    Decisions::new(&parse(text).unwrap().0, &Table::default())
}

/// What the error for a file with these bytes says after its path.
fn refused(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let path = file.path().display().to_string();
    let error = read(file.path()).unwrap_err().to_string();
    error
        .strip_prefix(&path)
        .expect("names the file")
        .to_owned()
}

const READ_FAULT: Answer = Answer {
    verdict: Verdict::Fault,
    report: true,
};

#[test]
fn every_kind_of_rule_does_what_it_says() {
    let text = r#"
        [[rule]]
        msrs = ["LSTAR", 0x10, "0x174-SYSENTER_EIP", "1_7"]
        access = "read-write"
        action = "deny"

        [[rule]]
        msrs = ["EFER"]
        action = "pin"
        mask = 0xd01
        log = true

        [[rule]]
        msrs = ["STAR"]
        action = "pin"

        [[rule]]
        msrs = ["MICROCODE_REV"]
        action = "emulate"
        value = "0xffff_ffff_0000_0000"

        [[rule]]
        msrs = ["MICROCODE_REV"]
        access = "write"
        action = "log"
    "#;
    let decisions = decisions(text);
    for msr in [0xc000_0082, 0x10, 0x174, 0x175, 0x176, 17] {
        assert_eq!(decisions.read(msr), READ_FAULT);
        assert_eq!(decisions.write(msr, 1, 1, 1), READ_FAULT);
    }
    let answer = |verdict, report| Answer { verdict, report };
    assert_eq!(
        decisions.write(0xc000_0080, 0xd01, 0xd01, 0x1d01),
        answer(Verdict::Allowed, true)
    );
    assert_eq!(
        decisions.write(0xc000_0080, 0xd01, 0xd01, 0xd01),
        answer(Verdict::Skip, true)
    );
    assert_eq!(
        decisions.write(0xc000_0080, 0xd01, 0xd01, 0x501),
        READ_FAULT
    );
    assert_eq!(
        decisions.write(0xc000_0081, 5, 5, 5),
        answer(Verdict::Skip, false)
    );
    assert_eq!(decisions.write(0xc000_0081, 5, 5, 1 << 63), READ_FAULT);
    let value = Verdict::Value(0xffff_ffff_0000_0000);
    assert_eq!(decisions.read(0x8b), answer(value, false));
    assert_eq!(
        decisions.write(0x8b, 0, 0, 0),
        answer(Verdict::Allowed, true)
    );
    assert_eq!(decisions.read(0x177), answer(Verdict::Allowed, false));
}

#[test]
fn what_is_not_listed_is_what_the_file_says() {
    let allowed = Verdict::Allowed;
    assert_eq!(decisions("").read(0x10).verdict, allowed);
    assert_eq!(decisions("default = \"allow\"").read(0x10).verdict, allowed);
    let deny = decisions(
        "default = \"deny\"\n[[rule]]\nmsrs = [\"TSC\"]\naccess = \"read\"\naction = \"allow\"",
    );
    assert_eq!(deny.read(0x10).verdict, allowed);
    assert_eq!(deny.write(0x10, 0, 0, 0), READ_FAULT);
    for msr in [0, 0x7ff, 0x900, 0x4b56_4d00, u32::MAX] {
        assert_eq!(deny.read(msr), READ_FAULT);
    }
    // KVM would let these through all the same.
    assert_eq!(deny.read(0x830).verdict, allowed);
    assert_eq!(deny.write(0x6e0, 0, 0, 1).verdict, allowed);
}

#[test]
fn bad_files_are_refused_with_line_and_reason() {
    let rule = |lines: &str| format!("[[rule]]\nmsrs = [0x10]\n{lines}\n");
    let msrs =
        |msrs: &str| format!("[[rule]]\naccess = \"read\"\naction = \"deny\"\nmsrs = [\n{msrs}]\n");
    let both = "access = \"read-write\"\naction = \"deny\"";
    for (text, line, part) in [
        ("default = \"maybe\"".into(), 1, "unknown variant `maybe`"),
        (
            "\n\ndefaults = \"deny\"".into(),
            3,
            "unknown field `defaults`",
        ),
        ("rule = 5".into(), 1, "invalid type: integer `5`"),
        ("[[rule]\n".into(), 1, ""),
        (
            "default = \"deny\"\ndefault = \"deny\"".into(),
            2,
            "duplicate key",
        ),
        (rule("access = \"read\""), 1, "missing field `action`"),
        (rule("action = \"deny\""), 1, "access is missing"),
        (
            rule("access = \"exec\"\naction = \"deny\""),
            3,
            "unknown variant `exec`",
        ),
        (rule("access = 3\naction = \"deny\""), 3, ""),
        (
            rule("access = \"read\"\naction = \"drop\""),
            4,
            "unknown variant `drop`",
        ),
        (
            rule("access = \"read\"\naction = \"pin\""),
            3,
            "only writes can be pinned",
        ),
        (rule("action = \"pin\"\nmask = 0"), 2, "mask 0 pins nothing"),
        (rule("action = \"pin\"\nmask = -1"), 4, "-1 is below 0"),
        (
            rule("action = \"pin\"\nmask = \"0x1ffffffffffffffff\""),
            4,
            "not a number of 64 bits",
        ),
        (
            rule("action = \"pin\"\nmask = \"+1\""),
            4,
            "not a number of 64 bits",
        ),
        (
            rule("action = \"pin\"\nmask = \"0x\""),
            4,
            "not a number of 64 bits",
        ),
        (
            rule("action = \"pin\"\nmask = 1.5"),
            4,
            "invalid type: floating point",
        ),
        (rule("action = \"pin\"\nvalue = 1"), 4, "\"emulate\" only"),
        (rule("action = \"emulate\""), 1, "value is missing"),
        (
            rule("action = \"emulate\"\nmask = 1\nvalue = 1"),
            4,
            "\"pin\" only",
        ),
        (
            rule("action = \"emulate\"\nvalue = 1\naccess = \"read-write\""),
            5,
            "only reads can be emulated",
        ),
        (rule(&format!("{both}\nlog = true")), 5, "action \"log\""),
        (
            rule(&format!("{both}\ncolour = 1")),
            5,
            "unknown field `colour`",
        ),
        (
            "[[rule]]\nmsrs = []\naccess = \"read\"\naction = \"deny\"".into(),
            2,
            "names none",
        ),
        (
            "[[rule]]\nmsrs = 5\naccess = \"read\"\naction = \"deny\"".into(),
            2,
            "expected a sequence",
        ),
        (
            msrs("1,\n\"LSTARR\""),
            6,
            "\"LSTARR\" is not an MSR that has a name here",
        ),
        (msrs("0x1_0000_0000"), 5, "4294967296 is no MSR"),
        (msrs("-1"), 5, "-1 is no MSR"),
        (msrs("9223372036854775808"), 5, ""),
        (msrs("\"0x100000000\""), 5, "is no MSR"),
        (msrs("\"5-\""), 5, "\"\" is not an MSR"),
        (msrs("\"5-4\""), 5, "after its end"),
        (msrs("\"1-2-3\""), 5, "\"2-3\" is no MSR"),
        (
            msrs("true"),
            5,
            "invalid type: boolean `true`, expected an MSR",
        ),
        (msrs("0x830"), 5, "0x830 has x2APIC MSRs"),
        (msrs("\"0x0-0x2fff\""), 5, "0x0-0x2fff has x2APIC MSRs"),
        (
            "[[rule]]\nmsrs = [\"TSC_DEADLINE\"]\naccess = \"write\"\naction = \"log\"".into(),
            2,
            "TSC_DEADLINE",
        ),
        (
            msrs("1,\n\"0-3\","),
            6,
            "line 5 has a rule for the same access",
        ),
        (
            rule(both) + &rule("action = \"pin\""),
            6,
            "line 2 has a rule for the same access",
        ),
        (
            rule(both) + &rule("action = \"emulate\"\nvalue = 0"),
            6,
            "line 2 has a rule",
        ),
    ] {
        let error = refused(text.as_bytes());
        assert!(
            error.starts_with(&format!(":{line}: ")) && error.contains(part),
            "{text:?}: {error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn the_same_msr_for_the_other_access_is_no_overlap() {
    let text = "[[rule]]\nmsrs = [1]\naccess = \"read\"\naction = \"deny\"\n\
                [[rule]]\nmsrs = [1]\naccess = \"write\"\naction = \"log\"\n";
    assert!(parse(text).is_ok());
}

#[test]
fn hostile_bytes_are_refused_in_one_line() {
    assert_eq!(refused(b"default = \"deny\"\n# \xff\n"), ":2: is not UTF-8");
    let quoted = refused("\"\\u001b[2J\\n\" = 1".as_bytes());
    assert!(
        quoted.starts_with(":1: unknown field `\\u{1b}[2J\\n`"),
        "{quoted}"
    );
    let long = refused(format!("{} = 1", "x".repeat(100_000)).as_bytes());
    assert!(long.len() < 300 && long.ends_with("..."), "{long}");
    let deep = refused(format!("rule = {}", "[".repeat(100_000)).as_bytes());
    assert!(deep.starts_with(":1: "), "{deep}");
    let nul = refused(b"\0");
    assert!(nul.starts_with(":1: "), "{nul}");
}

#[test]
fn what_is_no_small_regular_file_is_refused() {
    let error = |path: &Path| read(path).unwrap_err().to_string();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let said = format!(
        "{}: cannot be read: not a regular file",
        dir.path().display()
    );
    assert_eq!(error(dir.path()), said);
    assert!(error(Path::new("/dev/zero")).ends_with("not a regular file"));
    assert!(error(&at("none")).contains("No such file"));
    // Sparse: 100 MB that are not there.
    File::create(at("large"))
        .unwrap()
        .set_len(100 << 20)
        .unwrap();
    assert!(error(&at("large")).ends_with(": is larger than 1048576 bytes"));
    fs::write(at("full"), "#".repeat(MAX_FILE as usize)).unwrap();
    assert!(read(&at("full")).is_ok());
}

#[test]
fn the_examples_are_good_and_fit() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut seen = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !(name.starts_with("msr-") && name.ends_with(".toml")) {
            continue;
        }
        let file = read(&path).unwrap_or_else(|e| panic!("{e}"));
        // With RAPL, QEMU needs five of KVM's sixteen ranges itself.
        let budget = crate::protect::msr::Budget {
            filter_ranges: Some(11),
            ranges: 0,
            pins: 64,
        };
        let (_, planned) =
            Rules::new(file.policy().clone(), budget).unwrap_or_else(|e| panic!("{name}: {e}"));
        let denied = |msr| planned.decisions.write(msr, 0, 0, 0x1000).verdict == Verdict::Fault;
        let default_deny = planned.filter.as_ref().unwrap().default_deny;
        let fault = denied(0x79) && denied(0xc001_0020) && !denied(0xc000_0102);
        let revision = planned.decisions.read(0x8b).verdict;
        match name {
            "msr-deny.toml" => {
                assert!(fault && denied(0xc000_0080) && !default_deny)
            }
            "msr-allow.toml" => assert!(fault && default_deny),
            "msr-emulate.toml" => assert_eq!(revision, Verdict::Value(0xffff_ffff_0000_0000)),
            _ => panic!("{name} is not tested"),
        }
        seen += 1;
    }
    assert_eq!(seen, 3);
}
