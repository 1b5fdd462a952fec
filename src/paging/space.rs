// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a vCPU reads page tables, and which part of which tables is meant.
//!
//! Control registers, the root and linear addresses are checked here, once: a [`Space`] that exists
//! can be walked. Knows no memory, so whether the root is RAM is found out by the walk.

use std::ops::RangeInclusive;

use crate::protect::PAGE_SHIFT;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// What makes no sense as something to walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// The registers select another paging mode than that of 64-bit code.
    #[error("{0} is not set: this vCPU is not in 4-level or 5-level paging")]
    OtherMode(&'static str),
    /// There are neither 4 nor 5 levels.
    #[error("page tables have 4 or 5 levels, not {0}")]
    Levels(u8),
    /// No processor has physical addresses of that many bits.
    #[error("physical addresses have 32 to 52 bits, not {0}")]
    PhysicalBits(u8),
    /// The root does not lie on a page's start.
    #[error("root {0:#x} of the page tables is not a multiple of 4096")]
    RootMisaligned(u64),
    /// The root is above what a physical address can be.
    #[error("root {root:#x} of the page tables has more than {bits} bits")]
    RootTooHigh {
        /// The root asked for.
        root: u64,
        /// Bits of a physical address.
        bits: u8,
    },
    /// The range would end before it starts.
    #[error("linear addresses start at {start:#x}, after their end {last:#x}")]
    Reversed {
        /// First address asked for.
        start: u64,
        /// Last address asked for.
        last: u64,
    },
    /// The range does not begin and end with whole pages.
    #[error("linear addresses {start:#x} to {last:#x} (inclusive) are not whole pages")]
    NotPages {
        /// First address asked for.
        start: u64,
        /// Last address asked for.
        last: u64,
    },
    /// The address is not canonical with this number of levels.
    #[error("linear address {0:#x} is not canonical")]
    NonCanonical(u64),
}

/// How many levels page tables have: CR4.LA57. Exhaustive: the processor has no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 48-bit linear addresses.
    Four,
    /// 57-bit linear addresses.
    Five,
}

impl Levels {
    /// The number of levels, which is also the level of the root; level 1 has 4 KiB pages.
    pub fn number(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// Bits of a linear address that are translated.
    pub fn address_bits(self) -> u32 {
        match self {
            Self::Four => 48,
            Self::Five => 57,
        }
    }

    /// The translated bits of `va`, or `None` if the others do not repeat the highest of them.
    ///
    /// Keeps the order of addresses, and closes the gap between the halves.
    fn translated(self, va: u64) -> Option<u64> {
        let linear = va & ((1 << self.address_bits()) - 1);
        (self.canonical(linear) == va).then_some(linear)
    }

    /// The canonical address with these translated bits.
    pub(super) fn canonical(self, linear: u64) -> u64 {
        let above = 64 - self.address_bits();
        ((linear << above) as i64 >> above) as u64
    }
}

impl TryFrom<u8> for Levels {
    type Error = SpaceError;

    fn try_from(levels: u8) -> Result<Self, SpaceError> {
        match levels {
            4 => Ok(Self::Four),
            5 => Ok(Self::Five),
            _ => Err(SpaceError::Levels(levels)),
        }
    }
}

/// What of a vCPU's state decides how it reads page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Paging {
    /// CR4.LA57.
    pub levels: Levels,
    /// EFER.NXE: bit 63 of an entry takes execution away; otherwise it is reserved.
    pub nxe: bool,
    /// CR0.WP: supervisor mode obeys R/W, too.
    pub wp: bool,
    /// CR4.SMEP: supervisor mode does not execute user pages.
    pub smep: bool,
    /// Shadow stacks are in use (CR4.CET, and SH_STK_EN in IA32_S_CET or IA32_U_CET): a page that is
    /// dirty but not writable is written by them.
    pub shadow_stacks: bool,
    /// MAXPHYADDR, CPUID 0x80000008 EAX bits 7:0.
    pub physical_bits: u8,
    /// 1 GiB pages: CPUID 0x80000001 EDX bit 26. Otherwise PS is reserved at level 3.
    pub gib_pages: bool,
}

impl Paging {
    /// What control registers say (SDM vol. 3A, 4.1.1). `physical_bits` and `gib_pages` are from
    /// CPUID; shadow stacks are taken to be off.
    ///
    /// # Errors
    ///
    /// [`SpaceError::OtherMode`] if the registers select another paging mode than 4-level or
    /// 5-level, and [`SpaceError::PhysicalBits`] outside of 32 to 52.
    pub fn from_registers(
        cr0: u64,
        cr4: u64,
        efer: u64,
        physical_bits: u8,
        gib_pages: bool,
    ) -> Result<Self, SpaceError> {
        for (register, bit, name) in [
            (cr0, CR0_PG, "CR0.PG"),
            (cr4, CR4_PAE, "CR4.PAE"),
            (efer, EFER_LMA, "EFER.LMA"),
        ] {
            if register & bit == 0 {
                return Err(SpaceError::OtherMode(name));
            }
        }
        let levels = if cr4 & CR4_LA57 == 0 {
            Levels::Four
        } else {
            Levels::Five
        };
        let paging = Self {
            levels,
            nxe: efer & EFER_NXE != 0,
            wp: cr0 & CR0_WP != 0,
            smep: cr4 & CR4_SMEP != 0,
            shadow_stacks: false,
            physical_bits,
            gib_pages,
        };
        paging.check()?;
        Ok(paging)
    }

    fn check(&self) -> Result<(), SpaceError> {
        if (32..=52).contains(&self.physical_bits) {
            Ok(())
        } else {
            Err(SpaceError::PhysicalBits(self.physical_bits))
        }
    }
}

/// The linear addresses of one root that are to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub(super) paging: Paging,
    /// Frame of the root.
    pub(super) root: u64,
    /// Translated bits of the first and the last address.
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Space {
    /// The pages from address `*vas.start()` to address `*vas.end()` (the last byte, inclusive)
    /// below the root at guest-physical address `root`: CR3 without PCID and flags.
    ///
    /// Addresses may begin in the lower half and end in the upper: what is not canonical in between
    /// is not there.
    ///
    /// # Errors
    ///
    /// The first that is wrong: physical bits, root, order of the addresses, whole pages, canonical.
    pub fn new(paging: Paging, root: u64, vas: RangeInclusive<u64>) -> Result<Self, SpaceError> {
        paging.check()?;
        let bits = paging.physical_bits;
        let (start, last) = vas.into_inner();
        if root & 0xfff != 0 {
            return Err(SpaceError::RootMisaligned(root));
        }
        if root >> bits != 0 {
            return Err(SpaceError::RootTooHigh { root, bits });
        }
        if start > last {
            return Err(SpaceError::Reversed { start, last });
        }
        if start & 0xfff != 0 || last & 0xfff != 0xfff {
            return Err(SpaceError::NotPages { start, last });
        }
        let linear = |va| {
            let linear = paging.levels.translated(va);
            linear.ok_or(SpaceError::NonCanonical(va))
        };
        Ok(Self {
            paging,
            root: root >> PAGE_SHIFT,
            first: linear(start)?,
            last: linear(last)?,
        })
    }

    /// Every canonical address below the root at guest-physical address `root`.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]: physical bits, root.
    pub fn whole(paging: Paging, root: u64) -> Result<Self, SpaceError> {
        Self::new(paging, root, 0..=u64::MAX)
    }

    /// The upper half of the addresses, which is the kernel's by convention.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]: physical bits, root.
    pub fn kernel_half(paging: Paging, root: u64) -> Result<Self, SpaceError> {
        let start = paging
            .levels
            .canonical(1 << (paging.levels.address_bits() - 1));
        Self::new(paging, root, start..=u64::MAX)
    }

    /// The first and the last linear address.
    pub fn addresses(&self) -> RangeInclusive<u64> {
        let canonical = |linear| self.paging.levels.canonical(linear);
        canonical(self.first)..=canonical(self.last)
    }

    /// How the tables are read.
    pub fn paging(&self) -> &Paging {
        &self.paging
    }

    /// Bytes that one entry of a table at `level` stands for, as a power of two.
    pub(super) fn shift(level: u8) -> u32 {
        PAGE_SHIFT + 9 * u32::from(level - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paging(levels: Levels) -> Paging {
        Paging {
            levels,
            nxe: true,
            wp: true,
            smep: true,
            shadow_stacks: false,
            physical_bits: 40,
            gib_pages: true,
        }
    }

    #[test]
    fn registers_of_a_running_linux_are_read() {
        let cr4 = 0x0075_0ef0;
        let read = Paging::from_registers(0x8005_0033, cr4, 0xd01, 40, true);
        assert_eq!(read, Ok(paging(Levels::Four)));
        let five = Paging::from_registers(0x8005_0033, cr4 | CR4_LA57, 0xd01, 40, true);
        assert_eq!(five, Ok(paging(Levels::Five)));
        let none = Paging::from_registers(CR0_PG, CR4_PAE, EFER_LMA, 40, false).unwrap();
        assert!(!(none.nxe || none.wp || none.smep || none.gib_pages));
    }

    #[test]
    fn registers_of_another_mode_are_refused_by_name() {
        for (cr0, cr4, efer, name) in [
            (0, CR4_PAE, EFER_LMA, "CR0.PG"),
            (CR0_PG, 0, EFER_LMA, "CR4.PAE"),
            (CR0_PG, CR4_PAE, 0, "EFER.LMA"),
        ] {
            let refused = Paging::from_registers(cr0, cr4, efer, 40, true);
            assert_eq!(refused, Err(SpaceError::OtherMode(name)));
        }
    }

    #[test]
    fn levels_are_four_or_five() {
        for levels in 0..=255u8 {
            match Levels::try_from(levels) {
                Ok(known) => assert_eq!(known.number(), levels),
                Err(err) => assert_eq!(err, SpaceError::Levels(levels)),
            }
        }
        assert!(Levels::try_from(4).is_ok() && Levels::try_from(5).is_ok());
        assert!(Levels::try_from(3).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_reason() {
        use SpaceError::{
            NonCanonical, NotPages, PhysicalBits, Reversed, RootMisaligned, RootTooHigh,
        };
        let four = paging(Levels::Four);
        let space = |paging, root, start, last| Space::new(paging, root, start..=last).map(|_| ());
        let few = Paging {
            physical_bits: 31,
            ..four
        };
        let many = Paging {
            physical_bits: 53,
            ..four
        };
        let (root, bits) = (1 << 40, 40);
        let high = 0xffff_8000_0000_0000;
        for (paging, root, start, last, outcome) in [
            (four, 0x1000, 0, 0xfff, Ok(())),
            (four, 0x1000, 0, u64::MAX, Ok(())),
            (few, 0x1000, 0, 0xfff, Err(PhysicalBits(31))),
            (many, 0x1000, 0, 0xfff, Err(PhysicalBits(53))),
            (four, 0x1018, 0, 0xfff, Err(RootMisaligned(0x1018))),
            (four, root, 0, 0xfff, Err(RootTooHigh { root, bits })),
            (
                four,
                0x1000,
                0x2000,
                0x1fff,
                Err(Reversed {
                    start: 0x2000,
                    last: 0x1fff,
                }),
            ),
            (
                four,
                0x1000,
                0x1000,
                0x2000,
                Err(NotPages {
                    start: 0x1000,
                    last: 0x2000,
                }),
            ),
            (four, 0, 0, high - 1, Err(NonCanonical(high - 1))),
            (four, 0, 1 << 47, u64::MAX, Err(NonCanonical(1 << 47))),
            (four, 0, high, u64::MAX, Ok(())),
            (paging(Levels::Five), 0, 1 << 47, u64::MAX, Ok(())),
            (
                paging(Levels::Five),
                0,
                1 << 56,
                u64::MAX,
                Err(NonCanonical(1 << 56)),
            ),
        ] {
            assert_eq!(
                space(paging, root, start, last),
                outcome,
                "{start:#x}-{last:#x}"
            );
        }
    }

    #[test]
    fn the_kernel_half_is_the_upper_one() {
        for (levels, first) in [(Levels::Four, 1u64 << 47), (Levels::Five, 1 << 56)] {
            let space = Space::kernel_half(paging(levels), 0).unwrap();
            assert_eq!((space.first, space.last), (first, 2 * first - 1));
            assert_eq!(space.addresses(), first.wrapping_neg()..=u64::MAX);
        }
    }
}
