// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each policy, and plans against the rule said page by page.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::collective::tests::from_runs;
use super::*;

const R: Rights = Rights::READ;
const RW: Rights = Rights::READ.union(Rights::WRITE);
const RX: Rights = Rights::READ.union(Rights::EXEC_SUPERVISOR);
const RWX: Rights = RW.union(RX);

const BOTH: Deny = Deny::NOWRITE.union(Deny::NOEXEC_KERNEL);

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(start, end).unwrap()
}

/// Data, code, constants, both, then nothing until frame 99; a device at 1000.
fn kernel() -> Collective {
    from_runs(&[
        (0, 9, RW),
        (10, 19, RX),
        (20, 29, R),
        (30, 39, RWX),
        (1000, 1000, RW),
    ])
}

fn planned(policy: Policy, offered: Deny) -> Result<Plan, Refused> {
    plan(&kernel(), &[range(0, 99)], policy, offered)
}

fn told(plan: &Plan) -> Vec<(u64, u64, Deny)> {
    let told = |p: &Protection| {
        (
            p.range.start().number(),
            p.range.end().number(),
            p.attributes.deny(),
        )
    };
    plan.protections.iter().map(told).collect()
}

#[test]
fn what_no_mapping_does_is_denied() {
    let plan = planned(Policy::default(), Deny::all()).unwrap();
    assert_eq!(
        told(&plan),
        [
            (0, 9, Deny::NOEXEC_KERNEL),
            (10, 19, Deny::NOWRITE),
            (20, 29, BOTH)
        ]
    );
    assert_eq!(
        plan.counts,
        Counts {
            pages: 100,
            unmapped: 60,
            not_written: 20,
            not_executed: 20,
            write_exec: 10,
            denied: 30,
            elsewhere: 1,
        }
    );
    assert!(
        plan.protections
            .iter()
            .all(|p| !p.attributes.is_immutable())
    );
}

#[test]
fn only_what_is_offered_is_denied_and_neighbours_are_joined() {
    let plan = planned(Policy::default(), Deny::NOWRITE).unwrap();
    assert_eq!(told(&plan), [(10, 29, Deny::NOWRITE)]);
    let plan = planned(Policy::default(), Deny::NOEXEC | Deny::NOREAD).unwrap();
    assert_eq!(told(&plan), []);
    assert_eq!((plan.counts.denied, plan.counts.not_written), (0, 20));
}

#[test]
fn each_policy_does_as_it_says() {
    let policy = |unmapped, write_exec| Policy {
        unmapped,
        write_exec,
    };
    let reported = planned(policy(Unmapped::Report, WriteExec::Report), BOTH).unwrap();
    assert_eq!(reported.unmapped, [range(40, 99)]);
    assert_eq!(reported.write_exec, [range(30, 39)]);
    let left = planned(policy(Unmapped::Leave, WriteExec::Leave), BOTH).unwrap();
    assert_eq!((&left.unmapped, &left.write_exec), (&vec![], &vec![]));
    assert_eq!(left.protections, reported.protections);
    let denied = planned(policy(Unmapped::Deny, WriteExec::Leave), BOTH).unwrap();
    assert_eq!(told(&denied).last(), Some(&(40, 99, BOTH)));
    assert_eq!(
        planned(policy(Unmapped::Refuse, WriteExec::Leave), BOTH),
        Err(Refused::Unmapped {
            pages: 60,
            first: range(40, 99),
        })
    );
    assert_eq!(
        planned(policy(Unmapped::Refuse, WriteExec::Refuse), BOTH),
        Err(Refused::WriteExec {
            pages: 10,
            first: range(30, 39),
        })
    );
}

#[test]
fn nothing_is_refused_for_pages_that_the_plan_is_not_about() {
    let policy = Policy {
        unmapped: Unmapped::Refuse,
        write_exec: WriteExec::Refuse,
    };
    let plan = plan(&kernel(), &[range(0, 29)], policy, BOTH).unwrap();
    assert_eq!((plan.counts.pages, plan.counts.elsewhere), (30, 11));
}

#[test]
fn of_many_ranges_the_first_are_told_and_all_are_counted() {
    let runs: Vec<_> = (0..10_000).map(|n| (2 * n, 2 * n, RWX)).collect();
    let policy = Policy {
        unmapped: Unmapped::Report,
        write_exec: WriteExec::Report,
    };
    let plan = plan(&from_runs(&runs), &[range(0, 19_999)], policy, BOTH).unwrap();
    assert_eq!((plan.unmapped.len(), plan.write_exec.len()), (4096, 4096));
    assert_eq!(
        (plan.counts.unmapped, plan.counts.write_exec),
        (10_000, 10_000)
    );
}

proptest! {
    #[test]
    fn every_page_is_denied_what_the_rule_says(
        runs in prop::collection::vec((0..8u64, 0..8u64, 1..16u8), 0..12),
        within in prop::collection::vec((0..150u64, 0..40u64), 0..6),
        deny_unmapped: bool,
        offered in 0..16u64,
    ) {
        let mut at = 0;
        let mut pages = BTreeMap::new();
        let mut disjoint = Vec::new();
        for (gap, more, rights) in runs {
            let rights = R | Rights::from_bits_truncate(rights);
            let start = at + gap;
            disjoint.push((start, start + more, rights));
            pages.extend((start..=start + more).map(|page| (page, rights)));
            at = start + more + 1;
        }
        let asked: BTreeSet<u64> =
            within.iter().flat_map(|&(start, more)| start..=start + more).collect();
        let within: Vec<_> = within.iter().map(|&(start, more)| range(start, start + more)).collect();
        let offered = Deny::from_bits_truncate(offered);
        let policy = Policy {
            unmapped: if deny_unmapped { Unmapped::Deny } else { Unmapped::Report },
            write_exec: WriteExec::Report,
        };
        let plan = plan(&from_runs(&disjoint), &within, policy, offered).unwrap();

        let mut found = BTreeMap::new();
        for p in &plan.protections {
            for page in p.range.start().number()..=p.range.end().number() {
                prop_assert_eq!(found.insert(page, p.attributes.deny()), None);
            }
        }
        for pair in plan.protections.windows(2) {
            prop_assert!(
                !touches(pair[0].range, pair[1].range) || pair[0].attributes != pair[1].attributes
            );
        }
        let mut expected = BTreeMap::new();
        for &page in &asked {
            let deny = match pages.get(&page) {
                None if deny_unmapped => BOTH,
                None => Deny::empty(),
                Some(rights) => {
                    let mut deny = Deny::empty();
                    deny.set(Deny::NOWRITE, !rights.contains(Rights::WRITE));
                    deny.set(Deny::NOEXEC_KERNEL, !rights.contains(Rights::EXEC_SUPERVISOR));
                    deny
                }
            };
            if !(deny & offered).is_empty() {
                expected.insert(page, deny & offered);
            }
        }
        prop_assert_eq!(&found, &expected);
        let count = |wanted: &dyn Fn(Option<&Rights>) -> bool| {
            asked.iter().filter(|page| wanted(pages.get(page))).count() as u64
        };
        prop_assert_eq!(plan.counts.pages, asked.len() as u64);
        prop_assert_eq!(plan.counts.unmapped, count(&|rights| rights.is_none()));
        prop_assert_eq!(
            plan.counts.write_exec,
            count(&|rights| rights.is_some_and(|rights| rights.is_write_exec()))
        );
        prop_assert_eq!(plan.counts.denied, expected.len() as u64);
        let elsewhere = pages.keys().filter(|page| !asked.contains(page)).count() as u64;
        prop_assert_eq!(plan.counts.elsewhere, elsewhere);
        let told: u64 = plan.write_exec.iter().map(|range| range.pages()).sum();
        prop_assert_eq!(told, plan.counts.write_exec);
    }
}
