// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file in which a host says what its guests may read and write of their MSRs.
//!
//! From bytes to a [`PolicyFile`], or one line that says where the file is wrong and why. The rules
//! themselves are [`protect::msr`](crate::protect::msr)'s; the format is in `docs/msr.md`.

mod names;

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::{fmt, iter};

use serde::Deserialize;
use serde::de::{self, Visitor};
use toml::Spanned;

use crate::protect::msr::{Access, Action, HostRule, MAX_PINS, MsrRange, Policy, Rule, Unlisted};

/// Largest file, in bytes (`docs/msr.md`, "The host's file"). A rule takes a hundred; there are not
/// ten thousand MSRs to speak of.
pub const MAX_FILE: u64 = 1 << 20;

/// Most rules: each entry of `msrs` is one. So many go into one message to QEMU.
pub const MAX_RULES: usize = 4096;

/// Longest reason, in characters: a parser's message may quote the file.
const MAX_REASON: usize = 200;

/// Where and why a file is no policy: one line for people, without control characters, whatever the
/// file says.
#[derive(Debug, thiserror::Error)]
#[error("{}:{}{reason}", path.display(), line.map_or(" ".into(), |line| format!("{line}: ")))]
pub struct PolicyFileError {
    path: PathBuf,
    line: Option<usize>,
    reason: String,
}

/// A file's policy, and where in the file its rules are.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    path: PathBuf,
    policy: Policy,
    /// Of each rule of the policy.
    lines: Vec<usize>,
}

impl PolicyFile {
    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Where the file says the rule with this number (its place in [`Policy::rules`], from 0), for
    /// people: `PATH:LINE`, lines counted from 1; the file, if there is no such rule.
    pub fn place(&self, rule: Option<u32>) -> String {
        let path = self.path.display();
        match rule.and_then(|rule| self.lines.get(rule as usize)) {
            Some(line) => format!("{path}:{line}"),
            None => path.to_string(),
        }
    }
}

/// Reads the policy in the file at `path`, which is a regular one. Blocks for that; opens nothing else.
///
/// # Errors
///
/// One line that names the file, the line in it if there is one, and the reason.
pub fn read(path: &Path) -> Result<PolicyFile, PolicyFileError> {
    let refused = |reason: String| PolicyFileError {
        path: path.to_owned(),
        line: None,
        reason,
    };
    let bytes = bytes_of(path).map_err(|e| refused(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(refused(format!("is larger than {MAX_FILE} bytes")));
    }
    let text = str::from_utf8(&bytes).map_err(|e| PolicyFileError {
        line: Some(line_of(&bytes, e.valid_up_to())),
        ..refused("is not UTF-8".into())
    })?;
    let (policy, places) = parse(text).map_err(|Wrong { at, reason }| PolicyFileError {
        line: at.map(|at| line_of(&bytes, at)),
        ..refused(one_line(&reason))
    })?;
    let lines = places.iter().map(|place| line_of(&bytes, place.start));
    Ok(PolicyFile {
        path: path.to_owned(),
        policy,
        lines: lines.collect(),
    })
}

/// At most one byte more than is taken. Nothing but a regular file is opened: a pipe might never
/// say anything.
fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The line of the byte at `at`, counted from 1.
fn line_of(bytes: &[u8], at: usize) -> usize {
    1 + bytes[..at.min(bytes.len())]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
}

/// A reason that stays on its line and leaves the reader's terminal alone, whatever it quotes.
fn one_line(reason: &str) -> String {
    let shown = reason.trim().chars().flat_map(|c| {
        let escaped = c.is_control().then(|| c.escape_default());
        let plain = (!c.is_control()).then_some(c);
        escaped.into_iter().flatten().chain(plain)
    });
    let mut line: String = shown.take(MAX_REASON + 1).collect();
    if line.chars().count() > MAX_REASON {
        line.pop();
        line.push_str("...");
    }
    line
}

/// What is wrong, and at which byte.
#[derive(Debug)]
struct Wrong {
    at: Option<usize>,
    reason: String,
}

impl Wrong {
    fn new(span: &Range<usize>, reason: impl fmt::Display) -> Self {
        Self {
            at: Some(span.start),
            reason: reason.to_string(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRoot {
    #[serde(default)]
    default: FileUnlisted,
    #[serde(default)]
    rule: Vec<Spanned<FileRule>>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FileUnlisted {
    #[default]
    Allow,
    Deny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    msrs: Spanned<Vec<Spanned<Msrs>>>,
    access: Option<Spanned<FileAccess>>,
    action: FileAction,
    mask: Option<Spanned<Number>>,
    value: Option<Spanned<Number>>,
    log: Option<Spanned<bool>>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FileAccess {
    Read,
    Write,
    ReadWrite,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FileAction {
    Allow,
    Log,
    Deny,
    Pin,
    Emulate,
}

/// A 64-bit number: an integer, or a string for what TOML's integers, which are signed, cannot
/// say.
#[derive(Clone, Copy)]
struct Number(u64);

/// An MSR by number or name, or a range of either.
#[derive(Clone, Copy)]
struct Msrs(MsrRange);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of 64 bits, as an integer or as a string such as \"0xffff\"")
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<Number, E> {
        let n = u64::try_from(n).map_err(|_| E::custom(format!("{n} is below 0")))?;
        Ok(Number(n))
    }

    fn visit_u64<E: de::Error>(self, n: u64) -> Result<Number, E> {
        Ok(Number(n))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Number, E> {
        let n = number(text)
            .ok_or_else(|| E::custom(format!("\"{text}\" is not a number of 64 bits")))?;
        Ok(Number(n))
    }
}

impl<'de> Deserialize<'de> for Msrs {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MsrsVisitor)
    }
}

struct MsrsVisitor;

impl Visitor<'_> for MsrsVisitor {
    type Value = Msrs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an MSR: a number, a name such as \"LSTAR\", or a range \"0x174-0x176\"")
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<Msrs, E> {
        let n = u32::try_from(n)
            .map_err(|_| E::custom(format!("{n} is no MSR: they are 0 to 0xffffffff")))?;
        one(n, n)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Msrs, E> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        one(msr(first.trim())?, msr(last.trim())?)
    }
}

fn one<E: de::Error>(first: u32, last: u32) -> Result<Msrs, E> {
    MsrRange::new(first, last).map(Msrs).map_err(E::custom)
}

fn msr<E: de::Error>(text: &str) -> Result<u32, E> {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        number(text)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| E::custom(format!("\"{text}\" is no MSR: they are 0 to 0xffffffff")))
    } else {
        names::number(text).ok_or_else(|| {
            E::custom(format!(
                "\"{text}\" is not an MSR that has a name here; use its number"
            ))
        })
    }
}

/// Decimal, or hexadecimal with 0x; digits may be grouped with underscores, as in TOML.
fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let digits = digits.replace('_', "");
    // from_str_radix() would take a sign.
    let plain = digits.starts_with(|c: char| c.is_digit(radix));
    plain.then(|| u64::from_str_radix(&digits, radix).ok())?
}

/// The policy, and the place of each of its rules.
fn parse(text: &str) -> Result<(Policy, Vec<Range<usize>>), Wrong> {
    let file: FileRoot = toml::from_str(text).map_err(|e| Wrong {
        at: e.span().map(|span| span.start),
        reason: e.message().to_owned(),
    })?;
    // Each with where the file says it.
    let mut rules: Vec<(HostRule, Range<usize>)> = Vec::new();
    let mut pins = 0;
    for rule in &file.rule {
        let of = kind(rule)?;
        for msrs in rule.get_ref().msrs.get_ref() {
            let range = msrs.get_ref().0;
            let rule = match of {
                Kind::Limit(access, action) => HostRule::Limit(
                    Rule::new(range, access, action).map_err(|e| Wrong::new(&msrs.span(), e))?,
                ),
                Kind::Emulate { value, log } => HostRule::Emulate { range, value, log },
            };
            if let Kind::Limit(_, Action::Pin { .. }) = of {
                pins += u64::from(range.last() - range.first()) + 1;
            }
            if pins > u64::from(MAX_PINS) {
                return Err(Wrong::new(
                    &msrs.span(),
                    format!("with this, more than {MAX_PINS} MSRs are pinned"),
                ));
            }
            if rules.len() == MAX_RULES {
                return Err(Wrong::new(
                    &msrs.span(),
                    format!("with this, there are more than {MAX_RULES} rules"),
                ));
            }
            rules.push((rule, msrs.span()));
        }
    }
    let unlisted = match file.default {
        FileUnlisted::Allow => Unlisted::Allow,
        FileUnlisted::Deny => Unlisted::Deny,
    };
    let (rules, spans): (Vec<_>, Vec<_>) = rules.into_iter().unzip();
    let policy = Policy::new(unlisted, &rules).map_err(|overlap| {
        let earlier = line_of(text.as_bytes(), spans[overlap.earlier].start);
        Wrong::new(
            &spans[overlap.index],
            format!("line {earlier} has a rule for the same access to one of these MSRs already"),
        )
    })?;
    Ok((policy, spans))
}

/// A rule of the file, without its MSRs.
#[derive(Clone, Copy)]
enum Kind {
    Limit(Access, Action),
    Emulate { value: u64, log: bool },
}

fn kind(spanned: &Spanned<FileRule>) -> Result<Kind, Wrong> {
    let rule = spanned.get_ref();
    let wrong = |reason: &str| Err(Wrong::new(&spanned.span(), reason));
    if rule.msrs.get_ref().is_empty() {
        return Err(Wrong::new(&rule.msrs.span(), "msrs names none"));
    }
    let (pin, emulate) = (
        rule.action == FileAction::Pin,
        rule.action == FileAction::Emulate,
    );
    let stray = iter::empty()
        .chain(
            rule.mask
                .as_ref()
                .filter(|_| !pin)
                .map(|mask| (mask.span(), "mask is for action \"pin\" only")),
        )
        .chain(
            rule.value
                .as_ref()
                .filter(|_| !emulate)
                .map(|value| (value.span(), "value is for action \"emulate\" only")),
        )
        .chain(rule.log.as_ref().filter(|_| !pin && !emulate).map(|log| {
            (
                log.span(),
                "log is for actions \"pin\" and \"emulate\"; action \"log\" allows and reports",
            )
        }))
        .next();
    if let Some((span, reason)) = stray {
        return Err(Wrong::new(&span, reason));
    }
    let log = rule.log.as_ref().is_some_and(|log| *log.get_ref());
    let implied = match rule.action {
        FileAction::Pin => Some((FileAccess::Write, "only writes can be pinned")),
        FileAction::Emulate => Some((FileAccess::Read, "only reads can be emulated")),
        FileAction::Allow | FileAction::Log | FileAction::Deny => None,
    };
    let access = match (&rule.access, implied) {
        (Some(access), Some((only, reason))) if *access.get_ref() != only => {
            return Err(Wrong::new(&access.span(), reason));
        }
        (Some(access), _) => *access.get_ref(),
        (None, Some((only, _))) => only,
        (None, None) => return wrong("access is missing: \"read\", \"write\" or \"read-write\""),
    };
    let access = match access {
        FileAccess::Read => Access::READ,
        FileAccess::Write => Access::WRITE,
        FileAccess::ReadWrite => Access::all(),
    };
    let action = match rule.action {
        FileAction::Allow => Action::Allow,
        FileAction::Log => Action::Log,
        FileAction::Deny => Action::Deny,
        FileAction::Pin => Action::Pin {
            mask: rule.mask.as_ref().map_or(u64::MAX, |mask| mask.get_ref().0),
            log,
        },
        FileAction::Emulate => {
            return match &rule.value {
                Some(value) => Ok(Kind::Emulate {
                    value: value.get_ref().0,
                    log,
                }),
                None => wrong("value is missing: what reads give"),
            };
        }
    };
    Ok(Kind::Limit(access, action))
}

#[cfg(test)]
mod tests;
