// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Control registers of a vCPU: what QEMU prints of them, what is taken where nothing is known, and
//! how tables are read by them. Knows numbers and text, and not where they come from.

use serde::Serialize;
use vhost_guard::paging::{Levels, Paging, SpaceError};

/// PE, MP, ET, NE, WP, AM, PG: as a Linux has it.
const LINUX_CR0: u64 = 0x8005_0033;
/// PAE, PGE, SMEP and what of CR4 does not matter here.
const LINUX_CR4: u64 = 0x0010_06f0;
/// SCE, LME, LMA, NXE.
const LINUX_EFER: u64 = 0xd01;
const CR4_LA57: u64 = 1 << 12;
const CR4_CET: u64 = 1 << 23;
/// Where the root is in CR3. The rest are PCID or PWT and PCD, LAM's bits, and reserved.
const CR3_ROOT: u64 = 0x000f_ffff_ffff_f000;

/// What is known of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) cr0: Option<u64>,
    pub(crate) cr3: Option<u64>,
    pub(crate) cr4: Option<u64>,
    pub(crate) efer: Option<u64>,
    pub(crate) cpl: Option<u8>,
}

/// Text that has no registers in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRegisters {
    #[error(
        "no CR0, CR3, CR4 and EFER in it (it should be what QEMU's monitor prints for \
         \"info registers\")"
    )]
    None,
    #[error("no CPU {0} in it, or not all of its CR0, CR3, CR4 and EFER")]
    Cpu(u32),
}

impl Registers {
    /// Reads what QEMU's monitor prints for `info registers`, with `-a` for all CPUs. Takes the
    /// CPU with number `cpu`, or the first there is.
    pub(crate) fn parse(text: &str, cpu: Option<u32>) -> Result<Self, NoRegisters> {
        let mut found = Self::default();
        // Some versions of QEMU print no line with the number if there is one CPU only.
        let mut number = None;
        for line in text.lines() {
            let line = line.trim();
            if let Some(next) = line.strip_prefix("CPU#") {
                if found.is_complete() && cpu.is_none_or(|cpu| number.unwrap_or(0) == cpu) {
                    break;
                }
                found = Self::default();
                number = Some(next.trim().parse().unwrap_or(u32::MAX));
            } else if cpu.is_none_or(|cpu| number.unwrap_or(0) == cpu) {
                line.split_whitespace().for_each(|word| found.take(word));
            }
        }
        match cpu {
            _ if found.is_complete() => Ok(found),
            Some(cpu) => Err(NoRegisters::Cpu(cpu)),
            None => Err(NoRegisters::None),
        }
    }

    /// Takes `NAME=NUMBER`, where the first of a name counts.
    fn take(&mut self, word: &str) {
        let Some((name, number)) = word.split_once('=') else {
            return;
        };
        let register = match name {
            "CR0" => &mut self.cr0,
            "CR3" => &mut self.cr3,
            "CR4" => &mut self.cr4,
            "EFER" => &mut self.efer,
            "CPL" => {
                let cpl = number.parse().ok().filter(|cpl| *cpl <= 3);
                self.cpl = self.cpl.or(cpl);
                return;
            }
            _ => return,
        };
        let is_hex = number.bytes().all(|digit| digit.is_ascii_hexdigit());
        let value = u64::from_str_radix(number, 16).ok().filter(|_| is_hex);
        *register = register.or(value);
    }

    fn is_complete(&self) -> bool {
        self.cr0
            .and(self.cr3)
            .and(self.cr4)
            .and(self.efer)
            .is_some()
    }
}

/// What a command line says of registers; it outweighs all else.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Given {
    pub(crate) root: Option<u64>,
    pub(crate) cr0: Option<u64>,
    pub(crate) cr4: Option<u64>,
    pub(crate) efer: Option<u64>,
    pub(crate) levels: Option<Levels>,
    pub(crate) shadow_stacks: Option<bool>,
    pub(crate) physical_bits: u8,
    pub(crate) gib_pages: bool,
}

/// How tables are to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Reading {
    #[serde(serialize_with = "super::print::hex")]
    pub(crate) cr0: u64,
    #[serde(serialize_with = "super::print::hex")]
    pub(crate) cr3: u64,
    #[serde(serialize_with = "super::print::hex")]
    pub(crate) cr4: u64,
    #[serde(serialize_with = "super::print::hex")]
    pub(crate) efer: u64,
    pub(crate) cpl: Option<u8>,
    /// Names of those that nobody told.
    pub(crate) assumed: Vec<&'static str>,
}

impl Reading {
    /// From what is known and what was given, and what a Linux has for the rest. `None` without a root.
    pub(crate) fn new(known: Registers, given: &Given) -> Option<Self> {
        let mut assumed = Vec::new();
        let mut told = |name, given: Option<u64>, known: Option<u64>, linux| {
            given.or(known).unwrap_or_else(|| {
                assumed.push(name);
                linux
            })
        };
        let cr0 = told("CR0", given.cr0, known.cr0, LINUX_CR0);
        let mut cr4 = told("CR4", given.cr4, known.cr4, LINUX_CR4);
        let efer = told("EFER", given.efer, known.efer, LINUX_EFER);
        match given.levels {
            Some(Levels::Four) => cr4 &= !CR4_LA57,
            Some(Levels::Five) => cr4 |= CR4_LA57,
            None => {}
        }
        Some(Self {
            cr0,
            cr3: given.root.or(known.cr3)?,
            cr4,
            efer,
            // It says whose tables CR3 has, and nothing of those that were named.
            cpl: known.cpl.filter(|_| given.root.is_none()),
            assumed,
        })
    }

    /// Where the root is.
    pub(crate) fn root(&self) -> u64 {
        self.cr3 & CR3_ROOT
    }

    /// How tables are read. Shadow stacks are taken to be on if they can be: then a page may have a
    /// right too many, never one too few.
    pub(crate) fn paging(&self, given: &Given) -> Result<Paging, SpaceError> {
        let (bits, gib_pages) = (given.physical_bits, given.gib_pages);
        let read = Paging::from_registers(self.cr0, self.cr4, self.efer, bits, gib_pages)?;
        Ok(Paging {
            shadow_stacks: given.shadow_stacks.unwrap_or(self.cr4 & CR4_CET != 0),
            ..read
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As QEMU 10 prints it, less what is of no interest.
    const TEXT: &str = "\r
CPU#0\r
RAX=0000000000000000 RBX=CR3=1 RCX=0000000000000000 RDX=0000000000000000\r
RIP=ffffffff81e0a4cf RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\r
CR0=80050033 CR2=0000000000000000 CR3=0000000002a10000 CR4=000006f0\r
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \r
EFER=0000000000000d01\r

CPU#1
RIP=0000000000401000 RFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0
CR0=80050033 CR2=0000000000000000 CR3=000000000505a802 CR4=00750ef0
EFER=0000000000000d01
";

    fn registers(cr3: u64, cr4: u64, cpl: u8) -> Registers {
        Registers {
            cr0: Some(0x8005_0033),
            cr3: Some(cr3),
            cr4: Some(cr4),
            efer: Some(0xd01),
            cpl: Some(cpl),
        }
    }

    #[test]
    fn registers_of_each_cpu_are_read() {
        let (first, second) = (
            registers(0x2a1_0000, 0x6f0, 0),
            registers(0x505_a802, 0x75_0ef0, 3),
        );
        assert_eq!(Registers::parse(TEXT, None), Ok(first));
        assert_eq!(Registers::parse(TEXT, Some(0)), Ok(first));
        assert_eq!(Registers::parse(TEXT, Some(1)), Ok(second));
        assert_eq!(Registers::parse(TEXT, Some(2)), Err(NoRegisters::Cpu(2)));
        let headless = TEXT.split_once("CPU#0").unwrap().1;
        let headless = headless.split_once("CPU#1").unwrap().0;
        assert_eq!(Registers::parse(headless, None), Ok(first));
        assert_eq!(Registers::parse(headless, Some(0)), Ok(first));
        assert_eq!(
            Registers::parse(headless, Some(1)),
            Err(NoRegisters::Cpu(1))
        );
    }

    #[test]
    fn what_is_not_all_there_is_none() {
        for text in ["", "CR3=1000", "CPU#0\nCR0=1 CR3=2 CR4=3\nCPU#1\nEFER=4"] {
            assert_eq!(
                Registers::parse(text, None),
                Err(NoRegisters::None),
                "{text}"
            );
        }
        for number in ["+1", "", "10000000000000000", "0x1", "g"] {
            let text = format!("CR0=1 CR3={number} CR4=3 EFER=4");
            assert_eq!(
                Registers::parse(&text, None),
                Err(NoRegisters::None),
                "{text}"
            );
        }
    }

    #[test]
    fn what_was_given_outweighs_what_is_known_and_a_linux_fills_the_rest() {
        let known = registers(0x505_a802, 0x75_0ef0, 3);
        let given = Given {
            physical_bits: 52,
            ..Given::default()
        };
        assert_eq!(Reading::new(Registers::default(), &given), None);
        let reading = Reading::new(known, &given).unwrap();
        assert_eq!((reading.root(), reading.cpl), (0x505_a000, Some(3)));
        assert!(reading.assumed.is_empty());
        let given = Given {
            root: Some(1 << 63 | 0x1234_5018),
            levels: Some(Levels::Five),
            ..given
        };
        let reading = Reading::new(known, &given).unwrap();
        assert_eq!((reading.root(), reading.cpl), (0x1234_5000, None));
        assert_eq!(reading.cr4, 0x75_1ef0);
        let reading = Reading::new(Registers::default(), &given).unwrap();
        assert_eq!(reading.assumed, ["CR0", "CR4", "EFER"]);
        let paging = reading.paging(&given).unwrap();
        assert!(paging.wp && paging.nxe && paging.smep && !paging.shadow_stacks);
        assert_eq!(paging.levels, Levels::Five);
    }

    #[test]
    fn shadow_stacks_are_on_if_they_can_be_unless_told_otherwise() {
        for (cr4, told, on) in [
            (0x20, None, false),
            (0x80_0020, None, true),
            (0x80_0020, Some(false), false),
            (0x20, Some(true), true),
        ] {
            let given = Given {
                cr4: Some(cr4),
                root: Some(0),
                shadow_stacks: told,
                physical_bits: 52,
                ..Given::default()
            };
            let reading = Reading::new(Registers::default(), &given).unwrap();
            assert_eq!(reading.paging(&given).unwrap().shadow_stacks, on);
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(
            text in r"((CPU#|CR[034]=|EFER=|CPL=)[0-9a-fx+-]{0,18}[ \n\r]|\PC{0,8})*",
            cpu in proptest::option::of(0..3u32),
        ) {
            if let Ok(found) = Registers::parse(&text, cpu) {
                prop_assert!(found.is_complete() && found.cpl.is_none_or(|cpl| cpl <= 3));
            }
        }
    }
}
