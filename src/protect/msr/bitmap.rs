// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules as bitmaps, in the layout of the KVM_ADD_MSR_ALLOWLIST proposal (2020).
//!
//! A pure function over bytes that a guest chose: total, and what it makes of them is bounded by
//! how many they are.

use rangemap::RangeMap;

use super::{Access, Action, END, MsrRange, Rule, RuleError, X2APIC};

/// Most bitmaps that are looked at together: what a KVM filter has.
pub(crate) const MAX_BITMAPS: usize = 16;

/// Most rules that bitmaps may stand for together: as many as a request can have.
pub(crate) const MAX_BITMAP_RULES: usize = 4096;

/// Most bytes of one with its header.
pub(crate) const MAX_BITMAP_SIZE: usize = HEADER + MAX_LEN;

/// Most bytes of its bits: `KVM_MSR_ALLOWLIST_MAX_LEN`.
const MAX_LEN: usize = 0x600;

/// `struct kvm_msr_allowlist` without its bitmap.
const HEADER: usize = 16;

/// Why bytes are not a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BitmapError {
    /// The bytes end too early.
    #[error("the bytes end inside the bitmap")]
    Short,
    /// Bits of `flags` other than those of [`Access`], or none.
    #[error("flags {0:#x} are not 1 (read), 2 (write) or 3")]
    Flags(u32),
    /// A `pad` that is not 0.
    #[error("pad is not 0")]
    Pad,
    /// No MSR, or more than 0x600 bytes have bits for.
    #[error("a bitmap has bits for 1 to 12288 MSRs, not for {0}")]
    Size(u32),
    /// MSRs above 0xffffffff.
    #[error("the bitmap ends above MSR 0xffffffff")]
    End,
    /// A bitmap before it speaks of the same access to the same MSR.
    #[error("an earlier bitmap speaks of the same access to the same MSR")]
    Overlap,
    /// A bit that denies what KVM does not filter.
    #[error("the bit of MSR {0:#x} must be set: KVM does not filter it")]
    Unfiltered(u32),
    /// More than [`MAX_BITMAP_RULES`], with those of the bitmaps before it.
    #[error("the bitmaps stand for more than 4096 rules")]
    Rules,
}

/// Why bytes are not bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BitmapsRefused {
    /// More than [`MAX_BITMAPS`].
    #[error("more than 16 bitmaps")]
    TooMany,
    /// One is wrong.
    #[error("bitmap {index}: {error}")]
    Bitmap {
        /// The first that is.
        index: usize,
        /// Why.
        error: BitmapError,
    },
    /// The bytes go on behind the last.
    #[error("{0} bytes behind the last bitmap")]
    Behind(usize),
}

/// The rules that the `count` bitmaps in `bytes`, one after the other, come to, each with the
/// number of its bitmap: each access whose bit is set is allowed, each whose bit is not is denied.
/// Of MSRs without a bit no rule speaks.
///
/// # Errors
///
/// The first bitmap that is wrong, for the first reason in the order of `docs/msr.md`.
pub(crate) fn rules_of_bitmaps(
    mut bytes: &[u8],
    count: usize,
) -> Result<Vec<(usize, Rule)>, BitmapsRefused> {
    if count > MAX_BITMAPS {
        return Err(BitmapsRefused::TooMany);
    }
    let mut rules = Vec::new();
    let (mut reads, mut writes) = (RangeMap::new(), RangeMap::new());
    for index in 0..count {
        let refused = |error| BitmapsRefused::Bitmap { index, error };
        let (bitmap, rest) = Bitmap::parse(bytes).map_err(refused)?;
        let span = bitmap.base.into()..u64::from(bitmap.base) + u64::from(bitmap.nmsrs);
        for (access, seen) in [(Access::READ, &mut reads), (Access::WRITE, &mut writes)] {
            if bitmap.access.contains(access) {
                if seen.overlaps(&span) {
                    return Err(refused(BitmapError::Overlap));
                }
                seen.insert(span.clone(), ());
            }
        }
        let mut stands_for = Vec::new();
        bitmap.rules(&mut stands_for).map_err(refused)?;
        if rules.len() + stands_for.len() > MAX_BITMAP_RULES {
            return Err(refused(BitmapError::Rules));
        }
        rules.extend(stands_for.into_iter().map(|rule| (index, rule)));
        bytes = rest;
    }
    if !bytes.is_empty() {
        return Err(BitmapsRefused::Behind(bytes.len()));
    }
    Ok(rules)
}

struct Bitmap<'a> {
    access: Access,
    base: u32,
    nmsrs: u32,
    bits: &'a [u8],
}

impl<'a> Bitmap<'a> {
    /// The bitmap that `bytes` begin with, and what follows it.
    fn parse(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), BitmapError> {
        let (header, bytes) = bytes.split_at_checked(HEADER).ok_or(BitmapError::Short)?;
        let field = |at: usize| {
            let field = header[at..at + 4].try_into().expect("4 bytes of 16");
            u32::from_le_bytes(field)
        };
        let (flags, nmsrs, base, pad) = (field(0), field(4), field(8), field(12));
        let access = Access::from_bits(flags)
            .filter(|access| !access.is_empty())
            .ok_or(BitmapError::Flags(flags))?;
        if pad != 0 {
            return Err(BitmapError::Pad);
        }
        let len = nmsrs.div_ceil(64) as usize * 8;
        if len == 0 || len > MAX_LEN {
            return Err(BitmapError::Size(nmsrs));
        }
        if u64::from(base) + u64::from(nmsrs) > END {
            return Err(BitmapError::End);
        }
        let (bits, rest) = bytes.split_at_checked(len).ok_or(BitmapError::Short)?;
        let bitmap = Self {
            access,
            base,
            nmsrs,
            bits,
        };
        Ok((bitmap, rest))
    }

    fn allows(&self, bit: u32) -> bool {
        self.bits[(bit / 8) as usize] >> (bit % 8) & 1 != 0
    }

    /// A rule for each run of MSRs with equal bits. What KVM does not filter is in none.
    fn rules(&self, rules: &mut Vec<Rule>) -> Result<(), BitmapError> {
        let msr = |bit| self.base + bit;
        let mut from = 0;
        while from < self.nmsrs {
            let allows = self.allows(from);
            let x2apic = X2APIC.contains(&msr(from));
            if x2apic && !allows {
                return Err(BitmapError::Unfiltered(msr(from)));
            }
            let to = (from..self.nmsrs)
                .find(|&bit| self.allows(bit) != allows || X2APIC.contains(&msr(bit)) != x2apic)
                .unwrap_or(self.nmsrs);
            if !x2apic {
                let range = MsrRange::new(msr(from), msr(to - 1)).expect("ascending, not x2APIC");
                let action = if allows { Action::Allow } else { Action::Deny };
                let rule = Rule::new(range, self.access, action).map_err(|e| match e {
                    RuleError::TscDeadline => BitmapError::Unfiltered(super::TSC_DEADLINE),
                    RuleError::NoAccess | RuleError::PinsReads | RuleError::PinsNothing => {
                        unreachable!("it has an access and does not pin")
                    }
                })?;
                rules.push(rule);
            }
            from = to;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::OnRead;
    use super::*;

    fn bitmap(flags: u32, nmsrs: u32, base: u32, pad: u32, bits: &[u8]) -> Vec<u8> {
        let header = [flags, nmsrs, base, pad].map(u32::to_le_bytes);
        [header.as_flattened(), bits].concat()
    }

    fn error(bytes: &[u8], count: usize) -> (usize, BitmapError) {
        match rules_of_bitmaps(bytes, count).unwrap_err() {
            BitmapsRefused::Bitmap { index, error } => (index, error),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn bits_become_runs_of_rules() {
        // Bits beyond nmsrs mean nothing.
        let bytes = bitmap(1, 10, 0x170, 0, &[0x0f, 0xfc, 0, 0, 0, 0, 0, 0xff]);
        let rules: Vec<_> = rules_of_bitmaps(&bytes, 1)
            .unwrap()
            .iter()
            .map(|(bitmap, rule)| {
                assert_eq!((*bitmap, rule.write()), (0, None));
                (rule.range().first(), rule.range().last(), rule.read())
            })
            .collect();
        let expected = [
            (0x170, 0x173, Some(OnRead::Allow)),
            (0x174, 0x179, Some(OnRead::Deny)),
        ];
        assert_eq!(rules, expected);
        assert_eq!(rules_of_bitmaps(&[], 0), Ok(vec![]));
        let two = [bytes, bitmap(2, 1, 9, 0, &[0; 8])].concat();
        let numbers: Vec<_> = rules_of_bitmaps(&two, 2).unwrap();
        assert_eq!(numbers.iter().map(|n| n.0).collect::<Vec<_>>(), [0, 0, 1]);
    }

    #[test]
    fn what_kvm_does_not_filter_must_be_allowed() {
        let all = bitmap(3, 0x3000, 0, 0, &[0xff; 0x600]);
        let ranges: Vec<_> = rules_of_bitmaps(&all, 1)
            .unwrap()
            .iter()
            .map(|(_, rule)| (rule.range().first(), rule.range().last()))
            .collect();
        assert_eq!(ranges, [(0, 0x7ff), (0x900, 0x2fff)]);
        for (msr, flags, refused) in [
            (0x800, 1, true),
            (0x8ff, 2, true),
            (0x7ff, 3, false),
            (0x900, 3, false),
            (0x6e0, 2, true),
            (0x6e0, 3, true),
            (0x6e0, 1, false),
        ] {
            let mut bytes = all.clone();
            bytes[0] = flags;
            bytes[HEADER + msr / 8] &= !(1 << (msr % 8));
            let expected = BitmapsRefused::Bitmap {
                index: 0,
                error: BitmapError::Unfiltered(msr as u32),
            };
            let got = rules_of_bitmaps(&bytes, 1);
            assert_eq!(got.err(), refused.then_some(expected), "{msr:#x}");
        }
    }

    #[test]
    fn hostile_bytes_are_refused_with_the_first_reason() {
        let good = bitmap(3, 64, 0x10, 0, &[0xff; 8]);
        let other = |base| bitmap(3, 64, base, 0, &[0xff; 8]);
        for (bytes, index, reason) in [
            (vec![0; 15], 0, BitmapError::Short),
            (bitmap(4, 64, 0, 0, &[0; 8]), 0, BitmapError::Flags(4)),
            (bitmap(0, 64, 0, 0, &[0; 8]), 0, BitmapError::Flags(0)),
            (
                bitmap(0x8000_0001, 64, 0, 1, &[]),
                0,
                BitmapError::Flags(0x8000_0001),
            ),
            (bitmap(1, 64, 0, 1, &[0; 8]), 0, BitmapError::Pad),
            (bitmap(1, 0, 0, 0, &[]), 0, BitmapError::Size(0)),
            (
                bitmap(1, 12289, 0, 0, &[0; 0x608]),
                0,
                BitmapError::Size(12289),
            ),
            (
                bitmap(1, u32::MAX, 0, 0, &[]),
                0,
                BitmapError::Size(u32::MAX),
            ),
            (bitmap(1, 2, u32::MAX, 0, &[0; 8]), 0, BitmapError::End),
            (bitmap(1, 65, 0, 0, &[0; 15]), 0, BitmapError::Short),
            ([good.clone(), vec![0]].concat(), 1, BitmapError::Short),
            (
                [good.clone(), other(0x4f)].concat(),
                1,
                BitmapError::Overlap,
            ),
            (good.clone(), 1, BitmapError::Short),
        ] {
            assert_eq!(error(&bytes, index + 1), (index, reason));
        }
        let many: Vec<u8> = (0..17).flat_map(|i| other(64 * i)).collect();
        assert_eq!(rules_of_bitmaps(&many, 17), Err(BitmapsRefused::TooMany));
        let sixteen = &many[..16 * good.len()];
        assert_eq!(rules_of_bitmaps(sixteen, 16).unwrap().len(), 16);
        let behind = BitmapsRefused::Behind(good.len());
        assert_eq!(rules_of_bitmaps(&many, 16), Err(behind));
        // The same MSRs, another access.
        let mut apart = [good.clone(), good].concat();
        apart[0] = 1;
        apart[24] = 2;
        assert!(rules_of_bitmaps(&apart, 2).is_ok());
        assert!(rules_of_bitmaps(&bitmap(1, 1, u32::MAX, 0, &[0; 8]), 1).is_ok());
    }

    #[test]
    fn more_rules_than_a_request_has_are_refused() {
        let stripes = |base, nmsrs: u32| bitmap(1, nmsrs, base, 0, &vec![0x55; nmsrs as usize / 8]);
        let full = stripes(0xc000_0000, 4096);
        assert_eq!(rules_of_bitmaps(&full, 1).unwrap().len(), MAX_BITMAP_RULES);
        let one_more = [full, bitmap(2, 1, 0, 0, &[0; 8])].concat();
        assert_eq!(error(&one_more, 2), (1, BitmapError::Rules));
        assert_eq!(
            error(&stripes(0xc000_0000, 12288), 1),
            (0, BitmapError::Rules)
        );
    }
}
