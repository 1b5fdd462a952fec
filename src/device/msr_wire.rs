// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules for MSRs in the formats of `docs/device.md`: entries, bitmaps and the answer to a query.
//!
//! Pure, as [`wire`](super::wire) is.

use super::wire::{
    Errno, RANGE_SIZE, Refusal, Request, TYPE_MSR_LOCK, TYPE_MSR_PROTECT, TYPE_MSR_QUERY,
    each_entry,
};
use crate::protect::Demand;
use crate::protect::msr::{
    Access, Action, BitmapError, BitmapsRefused, MsrRange, MsrRangeError, Order, Rule, RuleError,
    Table, rules_of_bitmaps,
};

/// The flag of an entry of an answer: it can only get stricter until system reset.
const IMMUTABLE: u32 = 1 << 31;

/// Which MSRs, and which accesses to them. Those that no rule can speak of may be among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsrQuery {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
    /// The accesses.
    pub access: Access,
}

/// An entry whose numbers and flags make sense.
struct Entry {
    query: MsrQuery,
    action: u16,
    mask: u64,
}

impl Entry {
    fn parse(entry: &[u8; RANGE_SIZE]) -> Result<Self, Errno> {
        let (words, _) = entry.as_chunks::<4>();
        let [first, last, what, flags, low, high] =
            [0, 1, 2, 3, 4, 5].map(|i| u32::from_le_bytes(words[i]));
        let access = Access::from_bits(what & 0xffff).filter(|access| !access.is_empty());
        let access = access.ok_or(Errno::Einval)?;
        if first > last || flags != 0 {
            return Err(Errno::Einval);
        }
        Ok(Self {
            query: MsrQuery {
                first,
                last,
                access,
            },
            action: (what >> 16) as u16,
            mask: u64::from(high) << 32 | u64::from(low),
        })
    }

    /// A rule. What is wrong with its fields counts before what no rule can speak of.
    fn rule(self, kind: u16) -> Result<Rule, Errno> {
        let MsrQuery {
            first,
            last,
            access,
        } = self.query;
        let action = Action::from_bits(self.action, self.mask).ok_or(Errno::Einval)?;
        let pins_reads = matches!(action, Action::Pin { .. }) && access.contains(Access::READ);
        if pins_reads || (kind == TYPE_MSR_LOCK && action == Action::Allow) {
            return Err(Errno::Einval);
        }
        let range = MsrRange::new(first, last).map_err(|e| match e {
            MsrRangeError::Reversed { .. } => Errno::Einval,
            MsrRangeError::X2apic { .. } => Errno::Eopnotsupp,
        })?;
        Rule::new(range, access, action).map_err(|e| match e {
            RuleError::TscDeadline => Errno::Eopnotsupp,
            RuleError::NoAccess | RuleError::PinsReads | RuleError::PinsNothing => Errno::Einval,
        })
    }

    fn query(self) -> Result<MsrQuery, Errno> {
        if self.action != 0 || self.mask != 0 {
            return Err(Errno::Einval);
        }
        Ok(self.query)
    }
}

/// Reads the entries of a request of this type: their number is right.
pub(super) fn parse_entries(entries: &[[u8; RANGE_SIZE]], kind: u16) -> Result<Request, Refusal> {
    if kind == TYPE_MSR_QUERY {
        let queries = each_entry(entries, |entry| Entry::parse(entry)?.query())?;
        let [query] = queries[..] else {
            return Err(Errno::Einval.into());
        };
        return Ok(Request::MsrQuery(query));
    }
    let rules = each_entry(entries, |entry| Entry::parse(entry)?.rule(kind))?;
    let order = match kind {
        TYPE_MSR_LOCK => Order::Lock(rules),
        TYPE_MSR_PROTECT => Order::Replace(rules),
        _ => return Err(Errno::Eopnotsupp.into()),
    };
    Ok(Demand::Msrs(order).into())
}

/// Reads bitmaps: at least one, and not too many.
pub(super) fn parse_bitmaps(bytes: &[u8], count: u32) -> Result<Request, Refusal> {
    let numbered = rules_of_bitmaps(bytes, count as usize).map_err(|refused| match refused {
        BitmapsRefused::TooMany
        | BitmapsRefused::Bitmap {
            error: BitmapError::Rules,
            ..
        } => Errno::E2big.into(),
        BitmapsRefused::Behind(_) => Errno::Einval.into(),
        BitmapsRefused::Bitmap { index, .. } => Refusal {
            errno: Errno::Einval,
            index: u32::try_from(index).ok(),
        },
    })?;
    let (bitmaps, rules) = numbered.into_iter().unzip();
    Ok(Request::Order {
        demand: Demand::Msrs(Order::Replace(rules)),
        bitmaps: Some(bitmaps),
    })
}

/// The entries of the answer to a query: cut to its MSRs, in ascending order, reads first.
pub(super) fn held(table: &Table, query: MsrQuery) -> Vec<[u8; RANGE_SIZE]> {
    let cut = |range: MsrRange| {
        let (first, last) = (query.first.max(range.first()), query.last.min(range.last()));
        (first <= last).then_some((first, last))
    };
    let mut held = Vec::new();
    if query.access.contains(Access::READ) {
        held.extend(table.reads().filter_map(|(range, read)| {
            let action = Action::from(read.on);
            Some((cut(range)?, Access::READ, action, read.immutable))
        }));
    }
    if query.access.contains(Access::WRITE) {
        held.extend(table.writes().filter_map(|(range, write)| {
            let action = Action::from(write.on);
            Some((cut(range)?, Access::WRITE, action, write.immutable))
        }));
    }
    held.sort_by_key(|&((first, _), access, ..)| (first, access.bits()));
    held.into_iter()
        .map(|(range, access, action, immutable)| encode(range, access, action, immutable))
        .collect()
}

fn encode(
    (first, last): (u32, u32),
    access: Access,
    action: Action,
    immutable: bool,
) -> [u8; RANGE_SIZE] {
    let (action, mask) = action.bits();
    let flags = if immutable { IMMUTABLE } else { 0 };
    let mut bytes = [0; RANGE_SIZE];
    bytes[..4].copy_from_slice(&first.to_le_bytes());
    bytes[4..8].copy_from_slice(&last.to_le_bytes());
    bytes[8..10].copy_from_slice(&(access.bits() as u16).to_le_bytes());
    bytes[10..12].copy_from_slice(&action.to_le_bytes());
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
    bytes[16..].copy_from_slice(&mask.to_le_bytes());
    bytes
}
