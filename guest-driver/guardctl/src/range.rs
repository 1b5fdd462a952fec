// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges of pages and rights, as they are written on the command line.

use std::fmt;
use std::str::FromStr;

/// Bytes of a page.
pub(crate) const PAGE_SIZE: u64 = 4096;
/// The last guest frame number that the device knows.
pub(crate) const LAST_FRAME: u64 = (1 << 52) - 1;

/// Guest frames, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// The first frame.
    pub(crate) first: u64,
    /// The last frame.
    pub(crate) last: u64,
}

impl Range {
    /// All of the guest's memory.
    pub(crate) const ALL: Self = Self {
        first: 0,
        last: LAST_FRAME,
    };

    /// How many pages it has.
    pub(crate) fn pages(self) -> u64 {
        self.last - self.first + 1
    }

    fn new(first: u64, last: u64) -> Result<Self, String> {
        if first > last {
            return Err("it ends before it starts".into());
        }
        if last > LAST_FRAME {
            return Err("it is beyond what a machine can have".into());
        }
        Ok(Self { first, last })
    }
}

/// As /proc/iomem shows it: the first and the last byte.
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.last * PAGE_SIZE + (PAGE_SIZE - 1);
        write!(f, "{:#x}-{:#x}", self.first * PAGE_SIZE, last)
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(frames) = text.strip_prefix("gfn:") {
            return match split(frames) {
                (start, None) => Self::new(number(start)?, number(start)?),
                (start, Some(('+', count))) => with_count(number(start)?, number(count)?),
                (start, Some((_, end))) => Self::new(number(start)?, number(end)?),
            };
        }
        let (start, rest) = split(text);
        let first = whole_pages(number(start)?, "its start")?;
        match rest {
            None => Err(format!("no end: write {start}+4K, or {start}-LAST_BYTE")),
            Some(('+', len)) => with_count(first, whole_pages(number(len)?, "its length")?),
            Some((_, end)) => Self::new(first, last_frame(number(end)?)?),
        }
    }
}

/// "START", "START-END" or "START+LEN" in parts.
fn split(text: &str) -> (&str, Option<(char, &str)>) {
    match text.find(['-', '+']) {
        Some(at) => {
            let sign = if text.as_bytes()[at] == b'+' {
                '+'
            } else {
                '-'
            };
            (&text[..at], Some((sign, &text[at + 1..])))
        }
        None => (text, None),
    }
}

fn with_count(first: u64, count: u64) -> Result<Range, String> {
    if count == 0 {
        return Err("it is empty".into());
    }
    let last = first.checked_add(count - 1);
    Range::new(first, last.unwrap_or(u64::MAX))
}

fn whole_pages(bytes: u64, what: &str) -> Result<u64, String> {
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(format!("{what}, {bytes:#x}, is not a multiple of 4096"));
    }
    Ok(bytes / PAGE_SIZE)
}

/// The frame whose last byte this is.
fn last_frame(byte: u64) -> Result<u64, String> {
    if byte % PAGE_SIZE == PAGE_SIZE - 1 {
        return Ok(byte / PAGE_SIZE);
    }
    let hint = match byte.checked_sub(1) {
        Some(before) if byte.is_multiple_of(PAGE_SIZE) => format!(": did you mean {before:#x}?"),
        _ => String::new(),
    };
    Err(format!(
        "{byte:#x} is not the last byte of a page, as the end in /proc/iomem is{hint}"
    ))
}

/// Decimal, or hexadecimal with 0x; with or without K, M or G behind it.
fn number(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.strip_suffix(['K', 'k', 'M', 'm', 'G', 'g']) {
        Some(digits) => match text.as_bytes()[digits.len()].to_ascii_uppercase() {
            b'K' => (digits, 1 << 10),
            b'M' => (digits, 1 << 20),
            _ => (digits, 1 << 30),
        },
        None => (text, 1),
    };
    let value = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16),
        // "01000000" is what /proc/iomem writes for 0x1000000.
        None if digits.len() > 1 && digits.starts_with('0') => {
            return Err(format!("write 0x{digits} if \"{text}\" is hexadecimal"));
        }
        None if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse(),
        _ => return Err(format!("\"{text}\" is not a number")),
    };
    value
        .ok()
        .and_then(|value| value.checked_mul(factor))
        .ok_or_else(|| format!("\"{text}\" is not a number of 64 bits"))
}

/// Some of the four rights to a page: bits 0-3 of an entry's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rights(pub(crate) u64);

impl Rights {
    const NAMES: [(&'static str, u64); 4] = [
        ("write", 1 << 0),
        ("exec", 1 << 1),
        ("read", 1 << 2),
        ("exec-kernel", 1 << 3),
    ];
    const ALL: u64 = 0xf;
    const AUDIT_SHIFT: u32 = 8;
    const IMMUTABLE: u64 = 1 << 63;

    /// What an entry's attributes deny.
    pub(crate) fn denied(attributes: u64) -> Self {
        Self(attributes & Self::ALL)
    }

    /// What an entry's attributes watch.
    pub(crate) fn audited(attributes: u64) -> Self {
        Self((attributes >> Self::AUDIT_SHIFT) & Self::ALL)
    }

    /// Whether an entry's attributes can only grow.
    pub(crate) fn immutable(attributes: u64) -> bool {
        attributes & Self::IMMUTABLE != 0
    }

    /// An entry's attributes.
    pub(crate) fn attributes(deny: Self, audit: Self) -> u64 {
        deny.0 | audit.0 << Self::AUDIT_SHIFT
    }

    /// The names of those that are in it.
    pub(crate) fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES
            .iter()
            .filter(move |(_, bit)| self.0 & bit != 0)
            .map(|(name, _)| *name)
    }
}

/// "write,exec", or "-".
impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names().collect();
        f.pad(&if names.is_empty() {
            "-".into()
        } else {
            names.join(",")
        })
    }
}

impl FromStr for Rights {
    type Err = String;

    /// A comma list. The names of docs/device.md, "nowrite", mean the same.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(0));
        }
        text.split(',').try_fold(Self(0), |sum, word| {
            let name = word.strip_prefix("no").unwrap_or(word);
            Self::NAMES
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, bit)| Self(sum.0 | bit))
                .ok_or_else(|| {
                    format!("\"{word}\" is none of write, exec, read, exec-kernel; or none")
                })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Result<(u64, u64), String> {
        text.parse::<Range>().map(|r| (r.first, r.last))
    }

    #[test]
    fn ranges_of_bytes() {
        assert_eq!(range("0x1000-0x2fff"), Ok((1, 2)));
        assert_eq!(range("0X1000+8K"), Ok((1, 2)));
        assert_eq!(range("4096+8192"), Ok((1, 2)));
        assert_eq!(range("0x1000000+16M"), Ok((0x1000, 0x1fff)));
        assert_eq!(range("1G+4k"), Ok((1 << 18, 1 << 18)));
        assert_eq!(range("0+4K"), Ok((0, 0)));
        assert_eq!(
            range("0-0xffffffffffffffff"),
            Ok((0, LAST_FRAME)),
            "all there is"
        );
    }

    #[test]
    fn ranges_of_frames() {
        assert_eq!(range("gfn:5"), Ok((5, 5)));
        assert_eq!(range("gfn:0x5-9"), Ok((5, 9)));
        assert_eq!(range("gfn:5+1K"), Ok((5, 5 + 1023)));
        assert_eq!(range("gfn:0-0xfffffffffffff"), Ok((0, LAST_FRAME)));
    }

    #[test]
    fn what_is_no_range_says_why() {
        for (text, why) in [
            ("", "not a number"),
            ("0x1000", "no end"),
            ("0x-0xfff", "not a number"),
            ("0x+1-0xfff", "not a number"),
            ("0x1000-", "not a number"),
            ("-0xfff", "not a number"),
            ("0x1000+0", "is empty"),
            ("0x1001-0x1fff", "not a multiple"),
            ("0x1000+1", "not a multiple"),
            ("0x1000-0x2000", "did you mean 0x1fff?"),
            ("0x1000-0x1ffe", "not the last byte"),
            ("0x2000-0x1fff", "ends before it starts"),
            ("01000000-01ffffff", "write 0x01000000"),
            ("1T+4K", "not a number"),
            ("K+4K", "not a number"),
            ("0x10000000000000000+4K", "64 bits"),
            ("0xffffffffffffffffK+4K", "64 bits"),
            ("0xfffffffffffff000+8K", "beyond"),
            ("gfn:0x10000000000000", "beyond"),
            ("gfn:0xffffffffffffffff+2", "beyond"),
            ("gfn:1-0", "ends before it starts"),
            ("gfn:1+0", "is empty"),
            ("gfn:", "not a number"),
        ] {
            let error = range(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_range_reads_back() {
        for text in ["0x1000-0x2fff", "0x0-0xffffffffffffffff"] {
            assert_eq!(text.parse::<Range>().unwrap().to_string(), text);
        }
        assert_eq!(Range::ALL.pages(), 1 << 52);
    }

    #[test]
    fn rights() {
        let rights = |text: &str| text.parse::<Rights>().map(|r| r.0);
        assert_eq!(rights("none"), Ok(0));
        assert_eq!(rights("write"), Ok(1));
        assert_eq!(rights("nowrite,noexec,noread,noexec-kernel"), Ok(0xf));
        assert_eq!(rights("exec-kernel,exec-kernel"), Ok(8));
        for bad in ["", "write,", "none,write", "rw", "Write", "no"] {
            assert!(rights(bad).is_err(), "{bad}");
        }
        assert_eq!(Rights(0).to_string(), "-");
        assert_eq!(Rights(0b1011).to_string(), "write,exec,exec-kernel");
    }

    #[test]
    fn attributes() {
        let attributes = Rights::attributes(Rights(0b0001), Rights(0b0110));
        assert_eq!(attributes, 0x601);
        let told = attributes | 1 << 63;
        assert_eq!(Rights::denied(told), Rights(0b0001));
        assert_eq!(Rights::audited(told), Rights(0b0110));
        assert!(Rights::immutable(told));
        assert!(!Rights::immutable(attributes));
    }
}
