// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-guard pagetable`, on memory that is built here.

mod common;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::qmp::{self, Monitor};
use common::tables::*;
use common::*;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const CR0: u64 = 0x8005_0033;
const CR4: u64 = 0x0010_06f0;
const LA57: u64 = 1 << 12;
/// Where the direct map begins, with 4 and with 5 levels.
const DIRECT: [u64; 2] = [0xffff_8880_0000_0000, 0xff11_0000_0000_0000];
const TEXT: u64 = 0xffff_ffff_8100_0000;

fn pagetable(args: &[&dyn AsRef<OsStr>]) -> Output {
    pagetable_with_input(args, "")
}

fn pagetable_with_input(args: &[&dyn AsRef<OsStr>], input: &str) -> Output {
    let mut child = Companion::command()
        .arg("pagetable")
        .args(args.iter().map(|arg| arg.as_ref()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Whoever does not read it has no use for it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What is printed when all is well.
fn printed(args: &[&dyn AsRef<OsStr>]) -> String {
    let output = pagetable(args);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    text(&output.stdout).to_owned()
}

fn document(args: &[&dyn AsRef<OsStr>]) -> Value {
    let args = [&[&"--json" as &dyn AsRef<OsStr>], args].concat();
    serde_json::from_str(&printed(&args)).unwrap()
}

fn without(mut document: Value, fields: &[&str]) -> Value {
    for field in fields {
        document.as_object_mut().unwrap().remove(*field).unwrap();
    }
    document
}

/// A small kernel: 4 MiB of direct map in large pages, text in small ones of which the second is mapped
/// writable, too, a read-only page, one for user mode in the lower half.
fn kernel(levels: u32) -> Image {
    let mut image = Image::new(levels, 1 << 20);
    let direct = DIRECT[levels as usize - 4];
    image.map(direct, 0, 2, 2, W | NX);
    image.map(TEXT, 0x80_0000, 1, 3, 0);
    image.map(TEXT + 0x3000, 0x10_0000, 1, 1, NX);
    image.map(TEXT + 0x8000, 0x80_1000, 1, 1, W | NX);
    image.map(TEXT + 0x9000, 0x90_0000, 1, 2, W);
    image.map(0x40_0000, 0x90_5000, 1, 1, U);
    image
}

fn kernel_document(levels: u32) -> Value {
    let direct = DIRECT[levels as usize - 4];
    let hex = |n: u64| format!("{n:#x}");
    let mapping = |va: u64, pa: u64, size: u64, page_size: u64, rights| {
        json!({
            "va": hex(va), "va_last": hex(va + (size - 1)), "pa": hex(pa), "size": size,
            "page_size": page_size, "rights": rights,
        })
    };
    let write_exec = mapping(TEXT + 0x9000, 0x90_0000, 0x2000, 4096, "rwx-");
    let first: u64 = if levels == 4 {
        0x1ffff << 47
    } else {
        0xff << 56
    };
    json!({
        "format": 1,
        "paging": {
            "root": "0x1000", "levels": levels, "wp": true, "nxe": true, "smep": true,
            "shadow_stacks": false, "physical_bits": 52, "gib_pages": true,
        },
        "addresses": { "first": hex(first), "last": hex(!0) },
        "mappings": [
            mapping(direct, 0, 4 << 20, 2 << 20, "rw--"),
            mapping(TEXT, 0x80_0000, 0x3000, 4096, "r-x-"),
            mapping(TEXT + 0x3000, 0x10_0000, 0x1000, 4096, "r---"),
            mapping(TEXT + 0x8000, 0x80_1000, 0x1000, 4096, "rw--"),
            write_exec.clone(),
        ],
        "summary": {
            "tables": 2 * levels - 2, "entries_read": 512 * (2 * levels - 2),
            "mappings": { "4K": 7, "2M": 2, "1G": 0 },
            "pages": [
                { "rights": "rw--", "pages": 1024 },
                { "rights": "r-x-", "pages": 2 },
                { "rights": "rwx-", "pages": 3 },
            ],
            "reserved": 0, "outside": 0, "malformed": [],
        },
        "write_exec": {
            "pages": 3,
            "mappings": [write_exec],
            "frames": [
                { "gpa": "0x801000", "size": 0x1000, "rights": "rwx-" },
                { "gpa": "0x900000", "size": 0x2000, "rights": "rwx-" },
            ],
        },
        "errors": [],
    })
}

#[test]
fn a_raw_image_and_an_elf_dump_of_four_and_five_levels_say_the_same() {
    for levels in [4, 5] {
        let dir = TempDir::new().unwrap();
        let image = kernel(levels);
        let (raw, elf_dir) = (image.raw(&dir), TempDir::new().unwrap());
        let cr4 = if levels == 4 { CR4 } else { CR4 | LA57 };
        let cpus = [[CR0, 0x5000, cr4, 0x10], [CR0, ROOT | 0x802, cr4, 0x33]];
        // As below and above the hole of a PC.
        let elf = image.elf(&elf_dir, &cpus, &[(0x4_0000, 0xc_0000), (0, 0x4_0000)]);
        let levels_arg = levels.to_string();
        let of_raw = document(&[
            &"--memory",
            &raw,
            &"--root",
            &"0x1000",
            &"--levels",
            &levels_arg,
        ]);
        let of_elf = document(&[&"--memory", &elf, &"--cpu", &"1"]);
        let parts = ["memory", "registers"];
        assert_eq!(without(of_raw.clone(), &parts), kernel_document(levels));
        assert_eq!(without(of_elf.clone(), &parts), kernel_document(levels));
        assert_eq!(
            of_elf["memory"],
            json!({
                "from": elf.to_str().unwrap(),
                "pieces": [{ "gpa": "0x0", "size": 0x4_0000 }, { "gpa": "0x40000", "size": 0xc_0000 }],
                "left_out": 0,
            })
        );
        let registers = &of_elf["registers"];
        assert_eq!(
            (&registers["cr3"], &registers["cpl"]),
            (&json!("0x1802"), &json!(3))
        );
        assert!(
            registers["note"]
                .as_str()
                .unwrap()
                .contains("give the kernel's --root")
        );
        assert_eq!(registers["assumed"], json!(["EFER"]));
        let registers = &of_raw["registers"];
        assert_eq!(
            (&registers["note"], &registers["from"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(registers["assumed"], json!(["CR0", "CR4", "EFER"]));
    }
}

#[test]
fn a_table_is_printed_for_people() {
    let dir = TempDir::new().unwrap();
    let elf = kernel(4).elf(&dir, &[[CR0, ROOT | 0x802, CR4, 0x33]], &[(0, 1 << 20)]);
    let expected = format!(
        "\
memory:     {}: 1 MiB in 1 piece
registers:  CPU 0 of 1 in the dump
            CR0 0x80050033  CR3 0x1802  CR4 0x1006f0  EFER 0xd01  CPL 3
            EFER: not known, taken as a Linux has it
root:       0x1000, which is CR3 without PCID and flags
paging:     4 levels; WP on, NXE on, SMEP on, shadow stacks off; physical addresses of 52 bits
addresses:  0xffff800000000000-0xffffffffffffffff
note:       this CPU was in user mode: with page-table isolation CR3 has the user's tables, which \
map little of the kernel (take another --cpu, or give the kernel's --root)

FIRST ADDRESS       LAST ADDRESS        PHYSICAL ADDRESS    SIZE        PAGE  RIGHTS
0xffff888000000000  0xffff8880003fffff  0x0000000000000000  4 MiB       2M    rw--
0xffffffff81000000  0xffffffff81002fff  0x0000000000800000  12 KiB      4K    r-x-
0xffffffff81003000  0xffffffff81003fff  0x0000000000100000  4 KiB       4K    r---
0xffffffff81008000  0xffffffff81008fff  0x0000000000801000  4 KiB       4K    rw--
0xffffffff81009000  0xffffffff8100afff  0x0000000000900000  8 KiB       4K    rwx-

tables:             6
mappings:           7 of 4K, 2 of 2M, 0 of 1G
malformed entries:  0
tables outside:     0

RIGHTS  PAGES  SIZE
rw--    1024   4 MiB
r-x-    2      8 KiB
rwx-    3      12 KiB  W+X

writable and executable: 3 pages, 12 KiB

BY ONE MAPPING
FIRST ADDRESS       LAST ADDRESS        PHYSICAL ADDRESS    SIZE        PAGE  RIGHTS
0xffffffff81009000  0xffffffff8100afff  0x0000000000900000  8 KiB       4K    rwx-

BY ALL MAPPINGS TOGETHER
FIRST PHYSICAL      LAST PHYSICAL       SIZE        RIGHTS
0x0000000000801000  0x0000000000801fff  4 KiB       rwx-
0x0000000000900000  0x0000000000901fff  8 KiB       rwx-
",
        elf.display()
    );
    assert_eq!(printed(&[&"--memory", &elf]), expected);
}

#[test]
fn parts_and_addresses_can_be_chosen() {
    let dir = TempDir::new().unwrap();
    let raw = kernel(4).raw(&dir);
    let base: [&dyn AsRef<OsStr>; 4] = [&"--memory", &raw, &"--root", &"0x1000"];
    for (option, present) in [
        ("--mappings", "mappings"),
        ("--summary", "summary"),
        ("--wx", "write_exec"),
    ] {
        let document = document(&[&base[..], &[&option]].concat());
        for part in ["mappings", "summary", "write_exec"] {
            assert_eq!(
                document.get(part).is_some(),
                part == present,
                "{option} {part}"
            );
        }
    }
    let vas: [&dyn AsRef<OsStr>; 2] = [&"--va", &"0xffffffff81001000-0xffffffff81002000"];
    let document = document(&[&base[..], &vas].concat());
    assert_eq!(document["mappings"].as_array().unwrap().len(), 1);
    assert_eq!(document["mappings"][0]["pa"], "0x801000");
    let lower: [&dyn AsRef<OsStr>; 3] = [&"--mappings", &"--va", &"0-0x7fffffffffff"];
    let out = printed(&[&base[..], &lower].concat());
    assert!(
        out.contains("0x0000000000905000  4 KiB       4K    r--u"),
        "{out}"
    );
    let nothing: [&dyn AsRef<OsStr>; 2] = [&"--va", &"0x1000-0x1fff"];
    let out = printed(&[&base[..], &nothing].concat());
    assert!(out.contains("nothing is mapped") && out.contains("writable and executable: no page"));
}

#[test]
fn a_raw_image_lies_where_it_is_said_to() {
    let dir = TempDir::new().unwrap();
    let mut bytes = vec![0xff; 0x5000];
    bytes.extend(&kernel(4).bytes);
    let raw = put(&dir, "ram", &bytes);
    let map: [&dyn AsRef<OsStr>; 6] = [
        &"--memory",
        &raw,
        &"--map",
        &"0:512K:0x5000",
        &"--map",
        &"4G:4K",
    ];
    let root: [&dyn AsRef<OsStr>; 2] = [&"--root", &"0x1000"];
    let document = document(&[&map[..], &root].concat());
    assert_eq!(document["mappings"], kernel_document(4)["mappings"]);
    assert_eq!(
        document["memory"]["pieces"],
        json!([{ "gpa": "0x0", "size": 0x8_0000 }, { "gpa": "0x100000000", "size": 4096 }])
    );
}

#[test]
fn registers_are_read_from_what_the_monitor_prints() {
    let dir = TempDir::new().unwrap();
    let raw = kernel(5).raw(&dir);
    let monitor = "CPU#0\nRIP=0 RFL=1 [-] CPL=0 II=0\nCR0=80050033 CR2=0 CR3=7000 CR4=1006f0\n\
        EFER=d01\n\nCPU#1\nCR0=80050033 CR2=0 CR3=1001 CR4=1016f0\nEFER=d01\n";
    let args: [&dyn AsRef<OsStr>; 7] = [
        &"--json",
        &"--memory",
        &raw,
        &"--registers",
        &"-",
        &"--cpu",
        &"1",
    ];
    let output = pagetable_with_input(&args, monitor);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        without(document, &["memory", "registers"]),
        kernel_document(5)
    );
    let file = put(&dir, "registers", monitor.as_bytes());
    let output = pagetable(&[&"--memory", &raw, &"--registers", &file, &"--cpu", &"2"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no CPU 2 in it"));
}

#[test]
fn what_registers_say_decides_how_tables_are_read() {
    let dir = TempDir::new().unwrap();
    let mut image = kernel(4);
    let dirty = 1 << 6;
    image.map(TEXT + 0x20_0000, 0x90_6000, 1, 1, NX | dirty);
    let raw = image.raw(&dir);
    let rights = |more: &[&str], pa: &str| {
        let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"--memory", &raw, &"--root", &"0x1000"];
        args.extend(more.iter().map(|arg| arg as &dyn AsRef<OsStr>));
        let document = document(&args);
        let mappings = document["mappings"].as_array().unwrap().iter();
        let mut found = mappings.filter(|mapping| mapping["pa"] == pa);
        found
            .next()
            .map(|mapping| mapping["rights"].as_str().unwrap().to_owned())
    };
    assert_eq!(rights(&[], "0x906000").unwrap(), "r---");
    assert_eq!(rights(&["--cr4", "0x9006f0"], "0x906000").unwrap(), "rw--");
    let off = ["--cr4", "0x9006f0", "--shadow-stacks", "off"];
    assert_eq!(rights(&off, "0x906000").unwrap(), "r---");
    assert_eq!(
        rights(&["--cr0", "0x80040033"], "0x800000").unwrap(),
        "rwx-"
    );
    // Without NXE, bit 63 is reserved.
    assert_eq!(rights(&["--efer", "0x500"], "0x906000"), None);
}

#[test]
fn a_page_that_is_writable_and_executable_fails_if_it_is_to() {
    let dir = TempDir::new().unwrap();
    let raw = kernel(4).raw(&dir);
    let code = |args: &[&str]| {
        let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"--memory", &raw, &"--root", &"0x1000"];
        all.extend(args.iter().map(|arg| arg as &dyn AsRef<OsStr>));
        let output = pagetable(&all);
        assert_eq!(text(&output.stderr), "");
        output.status.code()
    };
    assert_eq!(code(&[]), Some(0));
    assert_eq!(code(&["--fail-on-wx"]), Some(3));
    assert_eq!(code(&["--fail-on-wx", "--json", "--mappings"]), Some(3));
    let innocent = [
        "--fail-on-wx",
        "--va",
        "0xffffffff81000000-0xffffffff81008000",
    ];
    assert_eq!(code(&innocent), Some(0));
}

#[test]
fn malformed_entries_are_told() {
    let dir = TempDir::new().unwrap();
    let mut image = kernel(4);
    let at = image.entry_at(TEXT + 0x40_0000, 2);
    image.set(at, 0x40_1000 | 0x2000 | PS | P);
    image.set(at + 8, 0x7_0000_0000 | P | W);
    let raw = image.raw(&dir);
    let args: [&dyn AsRef<OsStr>; 5] = [&"--memory", &raw, &"--root", &"0x1000", &"--summary"];
    let out = printed(&args);
    assert!(out.contains("malformed entries:  1\n"), "{out}");
    assert!(
        out.contains("tables outside:     1; nothing is known of what they map\n"),
        "{out}"
    );
    assert!(
        out.contains("0xffffffff81400000  2      0x0000000000403081  large page is not"),
        "{out}"
    );
    assert!(out.contains("table lies outside guest memory"), "{out}");
    let summary = &document(&args)["summary"];
    assert_eq!(
        (&summary["reserved"], &summary["outside"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(summary["malformed"][0]["entry"], "0x403081");
}

/// Each entry of the root leads to the root: 512 to the power of 4 mappings, of one page.
#[test]
fn tables_without_end_are_listed_to_the_limit_and_added_up_all_the_same() {
    let dir = TempDir::new().unwrap();
    let mut image = Image::new(4, 0x4000);
    for index in 0..512 {
        image.set(ROOT + 8 * index, ROOT | P | W);
    }
    let raw = image.raw(&dir);
    let mut args: Vec<&dyn AsRef<OsStr>> = vec![
        &"--memory",
        &raw,
        &"--root",
        &"0x1000",
        &"--max-entries",
        &"10000",
    ];
    let output = pagetable(&args);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(
        error.starts_with("vhost-guard: error: the list of mappings is not complete: "),
        "{error}"
    );
    assert!(
        error.contains("--max-entries") && error.lines().count() == 1,
        "{error}"
    );
    let out = text(&output.stdout);
    assert!(out.contains("\nNOT COMPLETE: the list of mappings: page tables have more than 10000"));
    assert!(out.contains("34359738368 of 4K"), "{out}");
    args.extend([&"--json" as &dyn AsRef<OsStr>, &"--fail-on-wx"]);
    let output = pagetable(&args);
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["errors"].as_array().unwrap().len(), 2);
    assert_eq!(
        document["summary"]["pages"],
        json!([{ "rights": "rwx-", "pages": 1 }])
    );
    assert!(!document["mappings"].as_array().unwrap().is_empty());
}

#[test]
fn an_error_is_one_line_that_says_what_to_do() {
    let dir = TempDir::new().unwrap();
    let image = kernel(4);
    let raw = image.raw(&dir);
    let whole = image.elf_bytes(&[[CR0, ROOT, CR4, 0x10]], &[(0, 1 << 20)]);
    let cut = put(&dir, "cut", &whole[..whole.len() - 1]);
    let elf = put(&dir, "whole", &whole);
    let no_cpu = image.elf(&dir, &[], &[(0, 1 << 20)]);
    let real_mode = put(
        &dir,
        "real",
        &image.elf_bytes(&[[0x10, 0, 0, 0]], &[(0, 1 << 20)]),
    );
    let mut of_32_bits = whole.clone();
    of_32_bits[4] = 1;
    let of_32_bits = put(&dir, "32", &of_32_bits);
    let mut version = whole.clone();
    let at = whole
        .windows(5)
        .position(|bytes| bytes == b"QEMU\0")
        .unwrap();
    version[at + 8] = 2;
    let version = put(&dir, "version", &version);
    let kdump = put(&dir, "kdump", b"KDUMP   and so on");
    let empty = put(&dir, "empty", b"");
    let words = put(&dir, "words", b"hello\xff CR3=1");
    let none = dir.path().join("none");
    type Case<'a> = (&'a [&'a dyn AsRef<OsStr>], &'a str);
    let cases: &[Case<'_>] = &[
        (&[&"--memory", &none, &"--root", &"0"], "cannot open"),
        (
            &[&"--memory", &dir.path(), &"--root", &"0"],
            "is a directory",
        ),
        (&[&"--memory", &raw], "give --qmp, --registers or --root"),
        (&[&"--memory", &raw, &"--root", &"1G"], "is the root right"),
        (
            &[&"--memory", &raw, &"--root", &"0x1000", &"--cr0", &"0"],
            "CR0.PG is not set",
        ),
        (
            &[
                &"--memory",
                &raw,
                &"--root",
                &"0x1000",
                &"--va",
                &"0x1000-0x2fef",
            ],
            "not whole pages",
        ),
        (
            &[
                &"--memory",
                &raw,
                &"--root",
                &"0x1000",
                &"--va",
                &"0-1T",
                &"--map",
                &"0:2M",
            ],
            "cut short",
        ),
        (
            &[
                &"--memory",
                &raw,
                &"--root",
                &"0x1000",
                &"--map",
                &"0:1M",
                &"--map",
                &"0:1M:1K",
            ],
            "two pieces",
        ),
        (&[&"--memory", &empty, &"--root", &"0"], "has 0x0 bytes"),
        (&[&"--memory", &cut], "cut short"),
        (
            &[&"--memory", &elf, &"--cpu", &"1"],
            "the dump has no CPU 1: it has the registers of 1",
        ),
        (&[&"--memory", &no_cpu], "the dump has no CPU 0"),
        (&[&"--memory", &real_mode], "CR0.PG is not set"),
        (&[&"--memory", &of_32_bits], "is no 64-bit x86 core file"),
        (&[&"--memory", &version], "is of version 2"),
        (&[&"--memory", &kdump], "without -z"),
        (
            &[&"--memory", &raw, &"--registers", &words],
            "\"info registers\"",
        ),
        (
            &[&"--memory", &raw, &"--registers", &none],
            "cannot read registers",
        ),
    ];
    for (args, expected) in cases {
        let output = pagetable(args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.starts_with("vhost-guard: error: "), "{error}");
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(output.stdout.is_empty());
    }
    // Whoever gives the root needs no CPU.
    printed(&[&"--memory", &no_cpu, &"--root", &"0x1000"]);
}

#[test]
fn no_core_file_cut_short_anywhere_or_with_any_byte_changed_breaks_it() {
    let dir = TempDir::new().unwrap();
    let mut image = Image::new(4, 0x5000);
    image.map(TEXT, 0, 1, 1, 0);
    let whole = image.elf_bytes(&[[CR0, ROOT, CR4, 0x10]], &[(0, 0x5000)]);
    let headers = whole.len() - 0x5000;
    for n in (0..headers).step_by(9) {
        let mut changed = whole.clone();
        changed[n] ^= 0xff;
        for bytes in [&whole[..n], &changed] {
            let file = put(&dir, "elf", bytes);
            let output = pagetable(&[&"--memory", &file, &"--json"]);
            let code = output.status.code();
            assert!(
                matches!(code, Some(0 | 1)),
                "{n}: {code:?} {}",
                text(&output.stderr)
            );
        }
    }
}

#[test]
fn it_ends_silently_when_nobody_reads_any_more() {
    let dir = TempDir::new().unwrap();
    let mut image = Image::new(4, 1 << 20);
    for n in 0..50_000 {
        image.map(TEXT + n * 0x1000, n * 0x2000, 1, 1, 0);
    }
    let raw = image.raw(&dir);
    for format in [&[][..], &["--json"]] {
        let mut child = Companion::command()
            .args(["pagetable", "--root", "0x1000", "--memory"])
            .arg(&raw)
            .args(format)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut some = [0; 100];
        child.stdout.take().unwrap().read_exact(&mut some).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(&output.stderr), "");
        assert!(output.status.success());
    }
}

#[test]
fn progress_is_shown_where_it_is_wanted() {
    let dir = TempDir::new().unwrap();
    let raw = kernel(4).raw(&dir);
    let output = pagetable(&[&"--memory", &raw, &"--root", &"0x1000", &"--progress"]);
    let lines = text(&output.stderr);
    assert!(
        lines.contains("vhost-guard: adding up mappings: 6 tables read\n"),
        "{lines}"
    );
    assert!(
        lines.contains("vhost-guard: listing mappings: 6 tables read\n"),
        "{lines}"
    );
    assert!(output.status.success());
}

#[test]
fn help_teaches_pagetable() {
    let output = pagetable(&[&"--help"]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for word in [
        "dump-guest-memory",
        "--fail-on-wx",
        "info registers",
        "Examples:",
        "Exit status:",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

/// A VM whose guest has these tables, with a companion.
fn vm(image: &Image) -> Setup {
    let s = Setup::new();
    s.guest
        .write_bytes(ROOT, &image.bytes[ROOT as usize..0x1_0000]);
    s
}

#[test]
fn a_companion_passes_the_memory_of_its_guest() {
    let s = vm(&kernel(4));
    for (option, path) in [
        ("--socket-path", s.companion.socket_path()),
        ("--status-path", s.companion.status_path()),
        ("--control-path", s.companion.control_path()),
    ] {
        let document = document(&[&option, &path, &"--root", &"0x1000"]);
        assert_eq!(
            document["memory"]["pieces"],
            json!([{ "gpa": "0x0", "size": 32 << 20 }])
        );
        assert_eq!(
            without(document, &["memory", "registers"]),
            kernel_document(4)
        );
    }
}

#[test]
fn memory_that_was_passed_cannot_be_written() {
    use rustix::fs::OFlags;
    let s = vm(&kernel(4));
    let stream = UnixStream::connect(s.companion.status_path()).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut first = [0];
    recvmsg(
        &stream,
        &mut [IoSliceMut::new(&mut first)],
        &mut control,
        RecvFlags::empty(),
    )
    .unwrap();
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            files.extend(passed);
        }
    }
    assert_eq!((first, files.len()), (*b"{", 1));
    let flags = rustix::fs::fcntl_getfl(&files[0]).unwrap();
    assert_eq!(flags & OFlags::RWMODE, OFlags::RDONLY);
}

#[test]
fn what_answers_for_a_companion_is_not_trusted() {
    let dir = TempDir::new().unwrap();
    let s = vm(&kernel(4));
    let status = s.companion.status();
    let path = dir.path().join("fake");
    let listener = UnixListener::bind(&path).unwrap();
    let piece = |gpa: u64, size: u64, offset: u64, fd: u64| json!({ "gpa": gpa, "size": size, "offset": offset, "fd": fd });
    let not_status = "is not a companion's status socket";
    for (pieces, fds, expected) in [
        (json!(null), 0, "gives no guest memory"),
        (json!([]), 0, "has no guest memory"),
        (json!([piece(0, 4096, 0, 0)]), 0, not_status),
        (json!([piece(0, 4096, 0, 1)]), 1, not_status),
        (
            json!([piece(0, 4096, 0, 0), piece(8192, 4096, 0, 0)]),
            2,
            not_status,
        ),
        (json!([piece(0, 4096, 0, 0)]), 65, not_status),
        (json!([piece(0, 4097, 0, 0)]), 1, "cut short"),
        (json!([piece(0, 4096, u64::MAX, 0)]), 1, "cut short"),
        (
            json!([piece(u64::MAX, 4096, 0, 0)]),
            1,
            "more than addresses",
        ),
        (json!([piece(0, 0, 0, 0)]), 1, "0x0 bytes"),
        (
            json!([piece(0, 4096, 0, 0), piece(1, 4096, 0, 1)]),
            2,
            "two pieces",
        ),
    ] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mut document = status.clone();
        document["memory"] = pieces;
        let bytes = serde_json::to_vec(&document).unwrap();
        let output = std::thread::scope(|scope| {
            let output =
                scope.spawn(|| pagetable(&[&"--status-path", &path, &"--root", &"0x1000"]));
            let (stream, _) = listener.accept().unwrap();
            // At most 64 fit into what the client has room for at once.
            for n in 0..bytes.len().min(3) {
                let files = vec![
                    file.as_fd();
                    if n < 2 {
                        (fds as usize).saturating_sub(64 * n).min(64)
                    } else {
                        0
                    }
                ];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(&files)));
                let part = if n < 2 { &bytes[n..=n] } else { &bytes[n..] };
                // It may have seen enough.
                let _ = sendmsg(
                    &stream,
                    &[IoSlice::new(part)],
                    &mut control,
                    SendFlags::NOSIGNAL,
                );
            }
            drop(stream);
            output.join().unwrap()
        });
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_companion_without_a_guest_has_no_memory() {
    let companion = Companion::start();
    let output = pagetable(&[&"--socket-path", &companion.socket_path(), &"--root", &"0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("when the guest's driver starts"));
    let output = pagetable(&[&"--control-path", &"/run/control", &"--root", &"0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("give --status-path"));
}

#[test]
fn the_monitor_tells_registers_and_stops_a_vm_that_runs() {
    let s = vm(&kernel(4));
    let socket = s.companion.socket_path();
    for (running, pause, expected) in [
        (true, false, &["human-monitor-command"][..]),
        (
            true,
            true,
            &["query-status", "stop", "human-monitor-command", "cont"],
        ),
        (false, true, &["query-status", "human-monitor-command"]),
    ] {
        let monitor = Monitor::of_vm(running);
        let mut args: Vec<&dyn AsRef<OsStr>> =
            vec![&"--socket-path", &socket, &"--qmp", &monitor.path];
        if pause {
            args.push(&"--pause");
        }
        let document = document(&args);
        assert_eq!(document["registers"]["cr3"], "0x1802");
        assert_eq!(
            without(document, &["memory", "registers"]),
            kernel_document(4)
        );
        assert_eq!(
            monitor.commands(),
            [&["qmp_capabilities"], expected].concat()
        );
    }
}

#[test]
fn a_vm_goes_on_when_the_walk_fails() {
    let s = vm(&kernel(4));
    let socket = s.companion.socket_path();
    let monitor = Monitor::of_vm(true);
    let paused = |monitor: &Monitor, more: &[&dyn AsRef<OsStr>]| {
        let vm: [&dyn AsRef<OsStr>; 5] = [
            &"--pause",
            &"--socket-path",
            &socket,
            &"--qmp",
            &monitor.path,
        ];
        pagetable(&[&vm, more].concat())
    };
    let output = paused(&monitor, &[&"--root", &"1T"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("is the root right"));
    assert_eq!(monitor.commands().last().unwrap(), "cont");

    // No registers, after it was stopped.
    let monitor = Monitor::new(qmp::GREETING, |command| match command {
        "query-status" => Some(json!({ "running": true })),
        "human-monitor-command" => None,
        _ => Some(json!({})),
    });
    let output = paused(&monitor, &[]);
    assert!(text(&output.stderr).contains("QEMU refused human-monitor-command: no?[2J way"));
    assert_eq!(monitor.commands().last().unwrap(), "cont");

    // It cannot be said whether it was stopped.
    let monitor = Monitor::new(qmp::GREETING, |command| match command {
        "query-status" => Some(json!({ "running": true })),
        "stop" => None,
        _ => Some(json!({})),
    });
    let output = paused(&monitor, &[]);
    assert!(text(&output.stderr).contains("QEMU refused stop"));
    assert_eq!(monitor.commands().last().unwrap(), "cont");

    // It stays stopped: that has to be said.
    let monitor = Monitor::new(qmp::GREETING, |command| match command {
        "query-status" => Some(json!({ "running": true })),
        "human-monitor-command" => Some(json!(qmp::REGISTERS)),
        "cont" => None,
        _ => Some(json!({})),
    });
    let output = paused(&monitor, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("use the monitor's command cont"));
}

#[test]
fn a_vm_goes_on_when_nothing_can_be_printed() {
    let s = vm(&kernel(4));
    let monitor = Monitor::of_vm(true);
    let output = Companion::command()
        .args(["pagetable", "--pause", "--socket-path"])
        .arg(s.companion.socket_path())
        .arg("--qmp")
        .arg(&monitor.path)
        .stdout(File::options().write(true).open("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("vhost-guard: error: cannot print it: "));
    assert_eq!(monitor.commands().last().unwrap(), "cont");
}

#[test]
fn a_vm_goes_on_when_a_signal_ends_it() {
    // More to print than a pipe holds, and nobody who reads it.
    let mut image = Image::new(4, 0x1_0000);
    for index in 0..512 {
        image.set(ROOT + 8 * index, ROOT | P | W);
    }
    let s = vm(&image);
    for (signal, number) in [("-INT", 2), ("-TERM", 15), ("-HUP", 1)] {
        let monitor = Monitor::of_vm(true);
        let mut child = Companion::command()
            .args(["pagetable", "--pause", "--socket-path"])
            .arg(s.companion.socket_path())
            .arg("--qmp")
            .arg(&monitor.path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut some = [0; 10];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut some)
            .unwrap();
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.wait().unwrap().signal(), Some(number));
        assert_eq!(monitor.commands().last().unwrap(), "cont");
    }
}

#[test]
fn a_monitor_that_is_none_is_not_trusted() {
    let s = vm(&kernel(4));
    let socket = s.companion.socket_path();
    let ask = |path: &Path| {
        let output = pagetable(&[&"--socket-path", &socket, &"--qmp", &path]);
        let error = text(&output.stderr).to_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        error
    };
    let error = ask(Path::new("/nowhere"));
    assert!(
        error.contains("cannot connect to QEMU's monitor"),
        "{error}"
    );
    let long = format!(r#"{{"event": "{}"}}"#, "x".repeat(3 << 20)).leak();
    for (greeting, expected) in [
        ("VGRD", "does not speak QMP"),
        ("[]", "does not speak QMP"),
        (r#"{"error": 1}"#, "does not speak QMP"),
        (
            r#"{"error": {"desc": "busy"}}"#,
            "QEMU refused qmp_capabilities: busy",
        ),
        (long, "does not speak QMP"),
    ] {
        let monitor = Monitor::new(greeting, |_| Some(json!("")));
        let error = ask(&monitor.path);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    for (registers, expected) in [
        (json!("CR3=1000"), "told no registers"),
        (json!({}), "does not speak QMP"),
        (json!(null), "does not speak QMP"),
    ] {
        let monitor = Monitor::new(qmp::GREETING, move |_| Some(registers.clone()));
        let error = ask(&monitor.path);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
