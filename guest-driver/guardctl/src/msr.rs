// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs and rules for them, as they are written on the command line.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;

use crate::device::MsrEntry;

/// Those that the driver knows by name, and what it pins of them with `lock_msrs=default`.
const NAMES: [(&str, u32); 10] = [
    ("STAR", 0xc000_0081),
    ("LSTAR", 0xc000_0082),
    ("CSTAR", 0xc000_0083),
    ("SFMASK", 0xc000_0084),
    ("SYSENTER_CS", 0x174),
    ("SYSENTER_ESP", 0x175),
    ("SYSENTER_EIP", 0x176),
    ("PAT", 0x277),
    ("APIC_BASE", 0x1b),
    ("EFER", 0xc000_0080),
];

/// Bits of an entry's `access`.
const READ: u16 = 1;
const WRITE: u16 = 2;
/// Bits of an entry's `action`.
const LOG: u16 = 1;
const PIN: u16 = 2;
const DENY: u16 = 4;
/// Bit of an entry's `flags`.
const IMMUTABLE: u32 = 1 << 31;

/// MSRs, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Msrs {
    /// The first.
    pub(crate) first: u32,
    /// The last.
    pub(crate) last: u32,
}

impl Msrs {
    /// All there are.
    pub(crate) const ALL: Self = Self {
        first: 0,
        last: u32::MAX,
    };
}

/// The MSR as a number, and as a name where it has one.
pub(crate) fn name(msr: u32) -> Option<&'static str> {
    let named = NAMES.iter().find(|(_, number)| *number == msr);
    named.map(|(name, _)| *name)
}

impl fmt::Display for Msrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.first)?;
        if self.last != self.first {
            write!(f, "-{:#x}", self.last)?;
        }
        Ok(())
    }
}

impl FromStr for Msrs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self {
            first: number(first)?,
            last: number(last)?,
        };
        if range.first > range.last {
            return Err("it ends before it starts".into());
        }
        Ok(range)
    }
}

fn number(text: &str) -> Result<u32, String> {
    if let Some((_, number)) = NAMES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(text))
    {
        return Ok(*number);
    }
    u32::try_from(mask(text).map_err(|_| format!("\"{text}\" is no MSR: a number or a name"))?)
        .map_err(|_| format!("\"{text}\" is not a number of 32 bits"))
}

/// Decimal, or hexadecimal with 0x.
pub(crate) fn mask(text: &str) -> Result<u64, String> {
    let value = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16),
        None if text.bytes().all(|b| b.is_ascii_digit()) => text.parse(),
        _ => return Err(format!("\"{text}\" is not a number")),
    };
    value.map_err(|_| format!("\"{text}\" is not a number of 64 bits"))
}

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Action {
    /// It is carried out.
    Allow,
    /// It is carried out, and makes an event.
    Log,
    /// A write is refused that would change what the MSR holds.
    Pin,
    /// It is refused.
    Deny,
}

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Access {
    /// RDMSR
    Read,
    /// WRMSR
    Write,
    /// Both
    ReadWrite,
}

impl Access {
    /// An entry's `access`.
    pub(crate) fn bits(self) -> u16 {
        match self {
            Self::Read => READ,
            Self::Write => WRITE,
            Self::ReadWrite => READ | WRITE,
        }
    }
}

/// An entry.
///
/// # Errors
///
/// The rule makes no sense.
pub(crate) fn entry(
    msrs: Msrs,
    action: Action,
    access: Option<Access>,
    mask: Option<u64>,
    log: bool,
) -> Result<MsrEntry, String> {
    let pins = action == Action::Pin;
    let access = match access {
        None if pins => Access::Write,
        None => return Err("add --access: read, write or read-write".into()),
        Some(access) if pins && access != Access::Write => {
            return Err("only writes can be pinned".into());
        }
        Some(access) => access,
    };
    if !pins && (mask.is_some() || log) {
        return Err("--mask and --log belong to --action pin".into());
    }
    if mask == Some(0) {
        return Err("a mask of 0 pins nothing".into());
    }
    Ok(MsrEntry {
        first: msrs.first,
        last: msrs.last,
        access: access.bits(),
        action: match action {
            Action::Allow => 0,
            Action::Log => LOG,
            Action::Pin if log => PIN | LOG,
            Action::Pin => PIN,
            Action::Deny => DENY,
        },
        flags: 0,
        mask: if pins { mask.unwrap_or(u64::MAX) } else { 0 },
    })
}

impl MsrEntry {
    /// "read", "write", ...
    pub(crate) fn access_name(&self) -> &'static str {
        match self.access & (READ | WRITE) {
            READ => "read",
            WRITE => "write",
            0 => "-",
            _ => "read-write",
        }
    }

    /// The names of its actions.
    pub(crate) fn actions(&self) -> impl Iterator<Item = &'static str> {
        let names = [("pin", PIN), ("deny", DENY), ("log", LOG)];
        let action = self.action;
        names
            .into_iter()
            .filter(move |(_, bit)| action & bit != 0)
            .map(|(name, _)| name)
    }

    /// Whether it can only get stricter.
    pub(crate) fn immutable(&self) -> bool {
        self.flags & IMMUTABLE != 0
    }
}

/// How many bitmaps of docs/msr.md these bytes are.
///
/// # Errors
///
/// They are none. What else is wrong with them is for the host to say.
pub(crate) fn count_bitmaps(bytes: &[u8]) -> Result<u32, String> {
    const HEAD: usize = 16;
    let (mut at, mut count) = (0, 0);
    while at < bytes.len() {
        count += 1;
        let head = bytes.get(at..at + HEAD).ok_or_else(|| {
            format!("bitmap {count} ends early: its head, at byte {at}, has {HEAD} bytes")
        })?;
        let nmsrs = u32::from_le_bytes(head[4..8].try_into().unwrap());
        let words = usize::try_from(nmsrs.div_ceil(64)).unwrap_or(usize::MAX);
        at = words.saturating_mul(8).saturating_add(at + HEAD);
        if at > bytes.len() {
            return Err(format!(
                "bitmap {count} ends early: {nmsrs} MSRs are more bytes"
            ));
        }
    }
    match count {
        0 => Err("it is empty".into()),
        count => Ok(count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msrs(text: &str) -> Result<(u32, u32), String> {
        text.parse::<Msrs>().map(|m| (m.first, m.last))
    }

    #[test]
    fn numbers_names_and_ranges() {
        assert_eq!(msrs("lstar"), Ok((0xc000_0082, 0xc000_0082)));
        assert_eq!(msrs("STAR-CSTAR"), Ok((0xc000_0081, 0xc000_0083)));
        assert_eq!(msrs("0x174-0x176"), Ok((0x174, 0x176)));
        assert_eq!(msrs("27"), Ok((27, 27)));
        for (text, why) in [
            ("", "number"),
            ("nostar", "no MSR"),
            ("0x100000000", "32 bits"),
            ("2-1", "ends before"),
            ("1-", "number"),
            ("0x", "no MSR"),
        ] {
            let error = msrs(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert_eq!("lstar".parse::<Msrs>().unwrap().to_string(), "0xc0000082");
        assert_eq!("1-0x10".parse::<Msrs>().unwrap().to_string(), "0x1-0x10");
        assert_eq!(name(0x277), Some("PAT"));
    }

    #[test]
    fn rules() {
        let all = Msrs::ALL;
        let pin = entry(all, Action::Pin, None, None, false).unwrap();
        assert_eq!((pin.access, pin.action, pin.mask), (2, 2, u64::MAX));
        let pin = entry(all, Action::Pin, Some(Access::Write), Some(0x901), true).unwrap();
        assert_eq!((pin.access, pin.action, pin.mask), (2, 3, 0x901));
        let deny = entry(all, Action::Deny, Some(Access::ReadWrite), None, false).unwrap();
        assert_eq!((deny.access, deny.action, deny.mask), (3, 4, 0));
        let allow = entry(all, Action::Allow, Some(Access::Read), None, false).unwrap();
        assert_eq!((allow.access, allow.action), (1, 0));

        assert!(entry(all, Action::Deny, None, None, false).is_err());
        assert!(entry(all, Action::Pin, Some(Access::Read), None, false).is_err());
        assert!(entry(all, Action::Pin, None, Some(0), false).is_err());
        assert!(entry(all, Action::Log, Some(Access::Read), Some(1), false).is_err());
        assert!(entry(all, Action::Log, Some(Access::Read), None, true).is_err());
    }

    #[test]
    fn bitmaps_are_counted() {
        let bitmap = |nmsrs: u32, bytes: usize| {
            let mut all = vec![0; 16 + bytes];
            all[4..8].copy_from_slice(&nmsrs.to_le_bytes());
            all
        };
        assert_eq!(count_bitmaps(&bitmap(1, 8)), Ok(1));
        assert_eq!(
            count_bitmaps(&[bitmap(64, 8), bitmap(65, 16), bitmap(0, 0)].concat()),
            Ok(3)
        );
        for bad in [&[][..], &[0; 15], &bitmap(65, 8), &bitmap(u32::MAX, 8)] {
            assert!(count_bitmaps(bad).is_err());
        }
    }
}
