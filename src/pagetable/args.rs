// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of `vhost-guard pagetable`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, Args, ValueEnum};
use vhost_guard::paging::Levels;

use super::memory::Place;
use super::registers::Given;
use crate::cli::Companion;

/// Print what a guest's page tables map: from the outside, without the guest noticing.
///
/// Reads the tables of one root (CR3) as a processor would, and prints three things: each mapping of
/// the kernel's half of the addresses; what they add up to, page by page, over all mappings; and
/// what is writable and executable, by one mapping or by two together. Nothing is changed by it.
///
/// It needs guest memory (--memory, or a companion's socket) and registers (--qmp, --registers or
/// --root; an ELF dump has them).
#[derive(Args, Debug)]
#[command(
    group = ArgGroup::new("source").required(true).args(
        ["memory", "socket_path", "status_path", "control_path"]
    ),
    after_help = "\
RIGHTS are r (mapped, so it can be read), w (something writes), x (supervisor mode executes) and u \
(user mode executes), after all levels, CR0.WP and CR4.SMEP. They are an upper bound: what SMAP or \
protection keys forbid, supervisor mode can allow itself.

Examples:
  A VM that runs beside its companion, stopped for a moment:
    vhost-guard pagetable --socket-path /run/vm1/guard --qmp /run/vm1/qmp --pause

  The same of a VM that libvirt runs:
    virsh qemu-monitor-command VM --hmp info registers | \\
      vhost-guard pagetable --socket-path /run/vm1/guard --registers -

  A dump, by QEMU's monitor \"dump-guest-memory vm1.elf\" or by \"virsh dump --memory-only\":
    vhost-guard pagetable --memory vm1.elf

  Memory without registers (\"pmemsave 0 0x20000000 vm1.ram\"), of 5-level tables:
    vhost-guard pagetable --memory vm1.ram --root 0x2a10000 --levels 5

  Fail a test if anything is writable and executable:
    vhost-guard pagetable --memory vm1.elf --wx --fail-on-wx

Exit status: 0, 1 on an error, 2 on a wrong command line, 3 if something is writable and \
executable and --fail-on-wx was given."
)]
pub(crate) struct Pagetable {
    /// Read guest memory from FILE: an ELF core that QEMU's dump-guest-memory made, or a raw image.
    /// It is mapped, not read as a whole; it must not be cut short meanwhile.
    #[arg(long, value_name = "FILE", help_heading = "Guest memory")]
    pub(crate) memory: Option<PathBuf>,

    #[command(flatten, next_help_heading = "Guest memory")]
    pub(crate) of: Companion,

    /// FILE is a raw image, and has guest-physical addresses GPA to GPA+SIZE from OFFSET [default: 0]
    /// on; numbers as 4096, 0x1000, 4K, 3G. May be repeated [default: the whole file at address 0].
    #[arg(
        long,
        value_name = "GPA:SIZE[:OFFSET]",
        conflicts_with_all = ["socket_path", "status_path", "control_path"],
        help_heading = "Guest memory"
    )]
    pub(crate) map: Vec<Map>,

    /// Read registers from FILE (- is standard input): what QEMU's monitor prints for "info
    /// registers", or "info registers -a".
    #[arg(long, value_name = "FILE", help_heading = "Registers")]
    pub(crate) registers: Option<PathBuf>,

    /// Ask QEMU's monitor for registers, at the socket of its -qmp. It serves one client at a time.
    #[arg(
        long,
        value_name = "SOCKET",
        conflicts_with = "registers",
        help_heading = "Registers"
    )]
    pub(crate) qmp: Option<PathBuf>,

    /// Stop the VM meanwhile, if it runs, so that what is read is of one moment. It goes on when all is
    /// printed, and also after an error, SIGINT, SIGTERM or SIGHUP; not after SIGKILL.
    #[arg(long, requires = "qmp", help_heading = "Registers")]
    pub(crate) pause: bool,

    /// Take the registers of CPU N [default: the first].
    #[arg(long, value_name = "N", help_heading = "Registers")]
    pub(crate) cpu: Option<u32>,

    /// Read the tables whose root is at this guest-physical address. May be a whole CR3: PCID and
    /// flags (bits 0 to 11 and 52 to 63) are left out of it.
    #[arg(long, value_name = "GPA", value_parser = number, help_heading = "Registers")]
    pub(crate) root: Option<u64>,

    /// Take this for CR0; of interest is WP, bit 16. What of CR0, CR4 and EFER is neither given nor
    /// found anywhere is as a Linux has it: with WP, SMEP and NXE.
    #[arg(long, value_name = "VALUE", value_parser = number, help_heading = "Registers")]
    pub(crate) cr0: Option<u64>,

    /// Take this for CR4; of interest are LA57, bit 12, SMEP, bit 20, and CET, bit 23.
    #[arg(long, value_name = "VALUE", value_parser = number, help_heading = "Registers")]
    pub(crate) cr4: Option<u64>,

    /// Take this for EFER; of interest is NXE, bit 11. An ELF dump does not have it.
    #[arg(long, value_name = "VALUE", value_parser = number, help_heading = "Registers")]
    pub(crate) efer: Option<u64>,

    /// The tables have 4 or 5 levels, whatever CR4 says [default: by CR4, or 4].
    #[arg(
        long,
        value_name = "N",
        value_parser = levels,
        conflicts_with = "cr4",
        help_heading = "Registers"
    )]
    pub(crate) levels: Option<Levels>,

    /// Bits of a guest-physical address (CPUID 0x80000008). With fewer than 52, higher ones are
    /// reserved in entries.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 52,
        value_parser = clap::value_parser!(u8).range(32..=52),
        help_heading = "Registers"
    )]
    pub(crate) physical_bits: u8,

    /// The processor has no 1 GiB pages: an entry of one is taken for malformed.
    #[arg(long, help_heading = "Registers")]
    pub(crate) no_gib_pages: bool,

    /// Whether a page that is dirty and read-only may be a shadow stack, which is written; auto:
    /// if CR4.CET is set.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = ShadowStacks::Auto,
        help_heading = "Registers")]
    pub(crate) shadow_stacks: ShadowStacks,

    /// Look at addresses START to END only. END is the last one, or, if it is a multiple of 4096,
    /// the first after it [default: the upper half, which is the kernel's].
    #[arg(long, value_name = "START-END", help_heading = "Output")]
    pub(crate) va: Option<Vas>,

    /// Print the mappings, joined where they run on.
    #[arg(long, help_heading = "Output")]
    mappings: bool,

    /// Print how many pages there are of each kind, tables, and malformed entries.
    #[arg(long, help_heading = "Output")]
    summary: bool,

    /// Print what is writable and executable in supervisor mode: mappings that are both, and pages
    /// that are by all their mappings together.
    #[arg(long, help_heading = "Output")]
    wx: bool,

    /// Print one JSON document; README.md describes it.
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,

    /// End with status 3 if a page is writable and executable in supervisor mode.
    #[arg(long, help_heading = "Output")]
    pub(crate) fail_on_wx: bool,

    /// Read at most N entries of tables, 512 for each, before giving up. Tables that share tables
    /// can make a list of mappings as good as endless.
    #[arg(long, value_name = "N", default_value_t = 1 << 28, help_heading = "Output")]
    pub(crate) max_entries: u64,

    /// Show on standard error how far it is, even if that is no terminal.
    #[arg(long, help_heading = "Output")]
    pub(crate) progress: bool,
}

/// Which parts are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) mappings: bool,
    pub(crate) summary: bool,
    pub(crate) wx: bool,
}

impl Pagetable {
    /// All, unless some are asked for.
    pub(crate) fn parts(&self) -> Parts {
        let all = !(self.mappings || self.summary || self.wx);
        Parts {
            mappings: all || self.mappings,
            summary: all || self.summary,
            wx: all || self.wx,
        }
    }

    /// What is said of registers.
    pub(crate) fn given(&self) -> Given {
        Given {
            root: self.root,
            cr0: self.cr0,
            cr4: self.cr4,
            efer: self.efer,
            levels: self.levels,
            shadow_stacks: match self.shadow_stacks {
                ShadowStacks::Auto => None,
                ShadowStacks::On => Some(true),
                ShadowStacks::Off => Some(false),
            },
            physical_bits: self.physical_bits,
            gib_pages: !self.no_gib_pages,
        }
    }
}

/// Whether pages may be shadow stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShadowStacks {
    /// If CR4.CET is set.
    Auto,
    /// They may.
    On,
    /// There are none.
    Off,
}

/// A number as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("not a number below 2^64 such as 4096, 0x1000, 4K, 3G")]
    Number,
    #[error("not 4 or 5")]
    Levels,
    #[error("not GPA:SIZE or GPA:SIZE:OFFSET, such as 0x100000000:2G:0xc0000000")]
    Map,
    #[error("not START-END, such as 0xffffffff80000000-0xffffffffffffffff")]
    Vas,
    #[error("no addresses: the end is not after the start")]
    NoVas,
}

fn number(text: &str) -> Result<u64, Unreadable> {
    let (digits, radix) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (text, 10),
    };
    let (digits, shift) = match digits.as_bytes().last() {
        Some(b'k' | b'K') => (&digits[..digits.len() - 1], 10),
        Some(b'm' | b'M') => (&digits[..digits.len() - 1], 20),
        Some(b'g' | b'G') => (&digits[..digits.len() - 1], 30),
        Some(b't' | b'T') => (&digits[..digits.len() - 1], 40),
        _ => (digits, 0),
    };
    let known = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    let value = u64::from_str_radix(digits, radix).ok().filter(|_| known);
    let value = value.and_then(|value| value.checked_mul(1 << shift));
    value.ok_or(Unreadable::Number)
}

fn levels(text: &str) -> Result<Levels, Unreadable> {
    let levels: u8 = text.parse().map_err(|_| Unreadable::Levels)?;
    Levels::try_from(levels).map_err(|_| Unreadable::Levels)
}

/// Where a raw image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Map(pub(crate) Place);

impl FromStr for Map {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let numbers: Result<Vec<u64>, _> = text.split(':').map(number).collect();
        let (gpa, size, offset) = match numbers.map_err(|_| Unreadable::Map)?[..] {
            [gpa, size] => (gpa, size, 0),
            [gpa, size, offset] => (gpa, size, offset),
            _ => return Err(Unreadable::Map),
        };
        Ok(Self(Place { gpa, size, offset }))
    }
}

/// Linear addresses, the last inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vas {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl FromStr for Vas {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let (first, end) = text.split_once('-').ok_or(Unreadable::Vas)?;
        let first = number(first).map_err(|_| Unreadable::Vas)?;
        let end = number(end).map_err(|_| Unreadable::Vas)?;
        let last = if end % 4096 == 0 {
            end.checked_sub(1).ok_or(Unreadable::NoVas)?
        } else {
            end
        };
        if first > last {
            return Err(Unreadable::NoVas);
        }
        Ok(Self { first, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        for (text, value) in [
            ("4096", Ok(4096)),
            ("0x1000", Ok(4096)),
            ("4K", Ok(4096)),
            ("0x4k", Ok(4096)),
            ("3G", Ok(3 << 30)),
            ("1T", Ok(1 << 40)),
            ("0xffffffffffffffff", Ok(u64::MAX)),
            ("16777216T", Err(Unreadable::Number)),
            ("", Err(Unreadable::Number)),
            ("K", Err(Unreadable::Number)),
            ("0x", Err(Unreadable::Number)),
            ("+1", Err(Unreadable::Number)),
            ("1é", Err(Unreadable::Number)),
            ("ff", Err(Unreadable::Number)),
        ] {
            assert_eq!(number(text), value, "{text}");
        }
    }

    #[test]
    fn places_and_addresses_are_read() {
        let place = |gpa, size, offset| Ok(Map(Place { gpa, size, offset }));
        for (text, map) in [
            ("0:1M", place(0, 1 << 20, 0)),
            ("4G:0x1000:3G", place(4 << 30, 0x1000, 3 << 30)),
            ("0", Err(Unreadable::Map)),
            ("0:1:2:3", Err(Unreadable::Map)),
            ("0:x", Err(Unreadable::Map)),
        ] {
            assert_eq!(text.parse(), map, "{text}");
        }
        let vas = |first, last| Ok(Vas { first, last });
        for (text, read) in [
            ("0x1000-0x1fff", vas(0x1000, 0x1fff)),
            ("0x1000-0x2000", vas(0x1000, 0x1fff)),
            ("0-0xffffffffffffffff", vas(0, u64::MAX)),
            ("0x2000-0x1000", Err(Unreadable::NoVas)),
            ("0-0", Err(Unreadable::NoVas)),
            ("0x1000", Err(Unreadable::Vas)),
            ("-", Err(Unreadable::Vas)),
        ] {
            assert_eq!(text.parse(), read, "{text}");
        }
    }
}
