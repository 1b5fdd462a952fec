// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `KvmVm` costs on this machine's KVM: changes of memslots beside the ioctls alone, what a
//! guest gets done on protected pages beside what it does on others, and a store that is refused
//! beside an exit for a device. Criterion has the times of the changes; the lines of name=value at
//! the end have all of it, each as a ratio of two things that were measured in turns.
//!
//! `ROUNDS` is how many runs each figure is the median of, at least. With the words `changes`,
//! `guest` or `stores` behind `--` there are the lines of these only, and no criterion.

mod bare;
mod changes;
#[path = "../common/mod.rs"]
mod common;
mod door;
mod enforced;
mod guest;
mod throughput;

use std::time::Duration;

use common::median;
use criterion::Criterion;
use kvm_ioctls::Kvm;

/// Times of two things that were measured in turns.
#[derive(Default)]
struct Compared {
    base: Vec<f64>,
    other: Vec<f64>,
}

impl Compared {
    /// One after the other, in microseconds.
    fn add(&mut self, base: f64, other: f64) {
        self.base.push(base);
        self.other.push(other);
    }

    /// Medians and their ratio; the least and the most that it was in a single turn.
    fn columns(self, base: &str, other: &str) -> String {
        let pairs = self.base.iter().zip(&self.other);
        let mut ratios: Vec<f64> = pairs.map(|(base, other)| other / base).collect();
        ratios.sort_by(f64::total_cmp);
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let (rounds, [a, b]) = (ratios.len(), [self.base, self.other].map(median));
        format!(
            "{base}_us={a:.2} {other}_us={b:.2} ratio={:.3} least={least:.3} most={most:.3} \
             rounds={rounds}",
            b / a
        )
    }
}

/// Prints a part of the table.
type Print = fn(&Kvm, usize);

fn micros_of(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn main() {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            println!("SKIP kvm_vm: /dev/kvm cannot be opened: {e}");
            return;
        }
    };
    let given = |word: &str| std::env::args().any(|arg| arg == word);
    let parts: [(&str, Print); 3] = [
        ("changes", changes::table),
        ("guest", throughput::table),
        ("stores", throughput::violations),
    ];
    let some = parts.iter().any(|(name, _)| given(name));
    if !some {
        let mut criterion = Criterion::default().configure_from_args();
        changes::times(&kvm, &mut criterion);
        criterion.final_summary();
    }
    // Without `--bench` this is a test, which only wants to know whether it runs.
    if given("--bench") {
        let rounds = std::env::var("ROUNDS").ok().and_then(|n| n.parse().ok());
        let rounds = rounds.unwrap_or(5usize).max(1);
        for (name, print) in parts {
            if !some || given(name) {
                print(&kvm, rounds);
            }
        }
    }
}
