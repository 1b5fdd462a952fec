// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Violations on their way from vCPU threads to the thread that tells of them.
//!
//! Bounded: a guest that violates as fast as it can fills nothing. Knows no locks and no threads.

use std::collections::VecDeque;
use std::mem;

use crate::vm::enforcer::Violation;

/// Most that wait; as in QEMU's `vm-guard`.
const CAPACITY: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Violations {
    waiting: VecDeque<Violation>,
    /// Dropped, in all.
    lost: u64,
}

impl Violations {
    /// Takes one in: the same as one that waits counts there, and one too many is lost.
    pub(super) fn push(&mut self, violation: Violation) {
        let same = |waiting: &&mut Violation| waiting.is_same(&violation);
        if let Some(waiting) = self.waiting.iter_mut().find(same) {
            waiting.times = waiting.times.saturating_add(violation.times);
        } else if self.waiting.len() < CAPACITY {
            let lost = self.lost;
            self.waiting.push_back(Violation { lost, ..violation });
        } else {
            self.lost = self.lost.saturating_add(violation.times.into());
        }
    }

    /// All that wait, oldest first.
    pub(super) fn take(&mut self) -> VecDeque<Violation> {
        mem::take(&mut self.waiting)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The VM was reset: what waits is of a life that has ended.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::enforcer::{Access, Action, Policy, Source, Target};

    fn at(gpa: u64) -> Violation {
        Violation {
            access: Access::Write,
            source: Source::Vcpu(0),
            target: Target::Memory(gpa),
            gva: Violation::UNKNOWN,
            rip: 1,
            value: 2,
            size: 1,
            times: 1,
            lost: 0,
            action: Action::Refused(Policy::Drop),
        }
    }

    #[test]
    fn the_same_again_is_counted_and_one_too_many_is_lost() {
        let mut violations = Violations::default();
        for gpa in 0..CAPACITY as u64 + 3 {
            violations.push(at(gpa));
            violations.push(at(0));
        }
        let all = violations.take();
        assert_eq!(all.len(), CAPACITY);
        assert_eq!((all[0].times, all[0].lost), (CAPACITY as u32 + 4, 0));
        violations.push(at(1 << 40));
        let later = violations.take();
        assert_eq!((later.len(), later[0].lost), (1, 3));
    }
}
