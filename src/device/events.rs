// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bounded store of violations that wait for a driver to take them.
//!
//! What the same source does to the same address counts as one event; when the store is full, the
//! newest is dropped and counted. Nothing waits for the driver. Knows no locks and no threads.

use std::collections::VecDeque;

use super::chain::{Chain, Malformed};
use super::ring::{Fault, Left, Turn};
use super::wire::{self, EVENT_SIZE};
use crate::vm::enforcer::Violation;

/// Most events that wait.
const CAPACITY: usize = 256;

/// Events that wait, and what has been counted since the VM is known.
#[derive(Debug, Default)]
pub(super) struct Events {
    waiting: VecDeque<Event>,
    /// Accesses refused or watched.
    pub(super) violations: u64,
    /// Buffers given back because they are too short.
    pub(super) malformed: u64,
    dropped: u64,
    /// What the VM's owner has dropped on its side.
    dropped_by_owner: u64,
}

#[derive(Debug)]
struct Event {
    violation: Violation,
    /// Events lost before this one.
    lost: u64,
}

impl Events {
    /// Takes a violation in.
    pub(super) fn push(&mut self, violation: Violation) {
        let violation = Violation {
            times: violation.times.max(1),
            ..violation
        };
        let lost = violation.lost.saturating_sub(self.dropped_by_owner);
        self.violations = self
            .violations
            .saturating_add(u64::from(violation.times))
            .saturating_add(lost);
        self.dropped_by_owner += lost;
        let same = |event: &&mut Event| event.violation.is_same(&violation);
        if let Some(event) = self.waiting.iter_mut().find(same) {
            event.violation.times = event.violation.times.saturating_add(violation.times);
        } else if self.waiting.len() < CAPACITY {
            self.waiting.push_back(Event {
                violation,
                lost: self.lost(),
            });
        } else {
            self.dropped += 1;
        }
    }

    /// Events that no driver will see.
    pub(super) fn lost(&self) -> u64 {
        self.dropped.saturating_add(self.dropped_by_owner)
    }

    /// Drops what waits, uncounted: it is of a life of the VM that has ended.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Hands events to the driver, as many as it has posted buffers for.
    pub(super) fn serve(&mut self, turn: &mut Turn<'_>) -> Result<Left, Fault> {
        if self.waiting.is_empty() {
            return Ok(Left::Nothing);
        }
        turn.drain(|turn, popped| {
            let len = match turn.walk(popped.chain, EVENT_SIZE) {
                Ok(chain) => self.tell(turn, &chain),
                Err(Malformed) => 0,
            };
            self.malformed += u64::from(len == 0);
            turn.give_back(popped.head, len)?;
            Ok(!self.waiting.is_empty())
        })
    }

    fn tell(&mut self, turn: &Turn<'_>, buffer: &Chain) -> usize {
        let Some(Event { violation, lost }) = self.waiting.front() else {
            return 0;
        };
        if !turn.write(&buffer.answer, &wire::encode_event(violation, *lost)) {
            return 0;
        }
        self.waiting.pop_front();
        EVENT_SIZE
    }
}
