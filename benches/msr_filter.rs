// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The yardstick for installing MSR rules on KVM: what KVM_X86_SET_MSR_FILTER costs when a process does nothing else.
//! Prints one line for each set of rules. `scripts/bench` sets it beside the latency that a guest sees.

use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};
use vhost_guard::protect::msr::{
    Access, Action, Budget, Filter, HostRule, MAX_FILTER_RANGES, MsrRange, Policy, Rule, Rules,
    Unlisted,
};

fn main() {
    let runs: usize = std::env::var("RUNS")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(101);
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(err) => {
            println!("SKIP msr_filter: /dev/kvm cannot be opened: {err}");
            return;
        }
    };
    let vm = kvm.create_vm().expect("a VM can be created");
    let _vcpu = vm.create_vcpu(0).expect("a vCPU can be created");
    // What the driver pins by default, and what takes every range that there is.
    let pins = [
        (0x1b, 0x1b),
        (0x174, 0x176),
        (0x277, 0x277),
        (0xc000_0080, 0xc000_0084),
    ];
    let wide: Vec<_> = (0..MAX_FILTER_RANGES as u32)
        .map(|i| (i << 24, (i << 24) + 0x2fff))
        .filter(|&(first, _)| first != 0)
        .chain([(0x900, 0x38ff)])
        .collect();
    for (name, rules) in [("pins", &pins[..]), ("wide", &wide)] {
        let filter = filter_of(rules);
        let ranges: Vec<_> = filter
            .ranges
            .iter()
            .map(|range| MsrFilterRange {
                flags: MsrFilterRangeFlags::from_bits_truncate(range.access.bits()),
                base: range.base,
                msr_count: range.nmsrs,
                bitmap: &range.bitmap,
            })
            .collect();
        let mut times: Vec<Duration> = (0..runs)
            .map(|_| {
                let start = Instant::now();
                vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
                    .expect("KVM takes the filter");
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        println!(
            "BARE msr={name} ranges={} ns={}",
            ranges.len(),
            times[runs / 2].as_nanos()
        );
    }
}

/// The filter that deflects writes of these MSRs.
fn filter_of(msrs: &[(u32, u32)]) -> Filter {
    let rules: Vec<_> = msrs
        .iter()
        .map(|&(first, last)| {
            let range = MsrRange::new(first, last).expect("the bench knows its MSRs");
            HostRule::Limit(
                Rule::new(range, Access::WRITE, Action::Deny).expect("writes can be denied"),
            )
        })
        .collect();
    let policy = Policy::new(Unlisted::Allow, &rules).expect("no two rules overlap");
    let budget = Budget {
        filter_ranges: Some(MAX_FILTER_RANGES),
        ranges: 0,
        pins: 0,
    };
    let (_, planned) = Rules::new(policy, budget).expect("the rules fit");
    planned.filter.expect("a filter was asked for")
}
