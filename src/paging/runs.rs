// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs of frames and the rights on them, where a frame may come any number of times.
//!
//! Runs are collected as they come, neighbours joined, and now and then sorted and merged, so that
//! memory is in proportion to the disjoint runs and not to what was added. Knows no page tables.

use super::Rights;

/// Runs that wait to be merged, at least; and how many more than there are merged ones.
const WAITING_MIN: usize = 1 << 16;
const WAITING_FACTOR: usize = 2;

/// Frames from `start` to before `end`. Frame numbers have 40 bits at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Run {
    /// `start` above the rights: 16 bytes instead of 24, and sorted as one number.
    start_rights: u64,
    end: u64,
}

impl Run {
    pub(super) fn new(start: u64, end: u64, rights: Rights) -> Self {
        debug_assert!(start < end && end <= 1 << 40);
        Self {
            start_rights: start << 8 | u64::from(rights.bits()),
            end,
        }
    }

    pub(super) fn start(self) -> u64 {
        self.start_rights >> 8
    }

    pub(super) fn end(self) -> u64 {
        self.end
    }

    pub(super) fn rights(self) -> Rights {
        Rights::from_bits_truncate(self.start_rights as u8)
    }
}

/// More disjoint runs than allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMany;

/// Collects runs.
#[derive(Debug)]
pub(super) struct Runs {
    /// Disjoint, ascending, neighbours differ.
    merged: Vec<Run>,
    /// As they came, after `merged`.
    waiting: Vec<Run>,
    waiting_min: usize,
    max: usize,
}

impl Runs {
    /// For at most `max` disjoint runs.
    pub(super) fn new(max: usize) -> Self {
        Self::with_waiting(max, WAITING_MIN)
    }

    fn with_waiting(max: usize, waiting_min: usize) -> Self {
        Self {
            merged: Vec::new(),
            waiting: Vec::new(),
            waiting_min,
            max,
        }
    }

    /// Adds `rights` on `pages` frames from `start` on.
    #[inline]
    pub(super) fn add(&mut self, start: u64, pages: u64, rights: Rights) -> Result<(), TooMany> {
        let end = start + pages;
        if let Some(last) = self.waiting.last_mut()
            && last.end == start
            && last.rights() == rights
        {
            last.end = end;
            return Ok(());
        }
        if self.waiting.len() >= self.waiting_min.max(WAITING_FACTOR * self.merged.len()) {
            self.merge()?;
        }
        self.waiting.push(Run::new(start, end, rights));
        Ok(())
    }

    /// All that was added: disjoint, ascending, and neighbours that touch differ in their rights.
    pub(super) fn finish(mut self) -> Result<Vec<Run>, TooMany> {
        self.merge()?;
        Ok(self.merged)
    }

    fn merge(&mut self) -> Result<(), TooMany> {
        self.waiting.sort_unstable();
        let mut sweep = Sweep::new(self.max, self.merged.len() + self.waiting.len());
        let mut old = self.merged.iter().copied().peekable();
        for &new in &self.waiting {
            while let Some(run) = old.next_if(|run| *run <= new) {
                sweep.take(run)?;
            }
            sweep.take(new)?;
        }
        for run in old {
            sweep.take(run)?;
        }
        self.merged = sweep.finish()?;
        self.waiting.clear();
        Ok(())
    }
}

/// Goes over runs that are sorted by their starts and joins the rights of those that overlap.
///
/// Of all runs that have begun, only the last end for each right matters.
struct Sweep {
    out: Vec<Run>,
    max: usize,
    /// A run that nothing before it overlaps, for as long as nothing after it does.
    alone: Option<Run>,
    /// Up to here everything is in `out`.
    at: u64,
    /// Where each right ends, as far as is known.
    until: [u64; RIGHTS],
}

const RIGHTS: usize = Rights::all().bits().count_ones() as usize;

impl Sweep {
    fn new(max: usize, about: usize) -> Self {
        Self {
            out: Vec::with_capacity(about.min(max)),
            max,
            alone: None,
            at: 0,
            until: [0; RIGHTS],
        }
    }

    #[inline]
    fn take(&mut self, run: Run) -> Result<(), TooMany> {
        match self.alone {
            Some(alone) if alone.end <= run.start() => {
                self.put(alone.start(), alone.end, alone.rights())?;
                self.alone = Some(run);
                return Ok(());
            }
            Some(alone) => {
                self.alone = None;
                self.at = alone.start();
                self.open(alone);
            }
            None => {}
        }
        self.advance(run.start())?;
        if self.until.iter().all(|&until| until <= run.start()) {
            self.alone = Some(run);
        } else {
            self.open(run);
        }
        Ok(())
    }

    fn open(&mut self, run: Run) {
        for (bit, until) in self.until.iter_mut().enumerate() {
            if run.rights().bits() >> bit & 1 != 0 {
                *until = run.end.max(*until);
            }
        }
    }

    fn finish(mut self) -> Result<Vec<Run>, TooMany> {
        match self.alone.take() {
            Some(alone) => self.put(alone.start(), alone.end, alone.rights())?,
            None => self.advance(u64::MAX)?,
        }
        Ok(self.out)
    }

    /// Puts out what is before `to`: no run that is still to come begins there.
    fn advance(&mut self, to: u64) -> Result<(), TooMany> {
        while self.at < to {
            let mut rights = 0;
            let mut next = to;
            for (bit, &until) in self.until.iter().enumerate() {
                if until > self.at {
                    rights |= 1 << bit;
                    next = next.min(until);
                }
            }
            if rights != 0 {
                self.put(self.at, next, Rights::from_bits_truncate(rights))?;
            }
            self.at = next;
        }
        Ok(())
    }

    fn put(&mut self, start: u64, end: u64, rights: Rights) -> Result<(), TooMany> {
        let full = self.out.len() == self.max;
        match self.out.last_mut() {
            Some(last) if last.end == start && last.rights() == rights => last.end = end,
            _ if full => return Err(TooMany),
            _ => self.out.push(Run::new(start, end, rights)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Each frame with its rights.
    fn frames(runs: impl IntoIterator<Item = Run>) -> BTreeMap<u64, Rights> {
        let mut frames = BTreeMap::new();
        for run in runs {
            for frame in run.start()..run.end() {
                *frames.entry(frame).or_default() |= run.rights();
            }
        }
        frames
    }

    fn run() -> impl Strategy<Value = Run> {
        let top = (1 << 40) - 80;
        (0..64u64, 1..16u64, 1..16u8, any::<bool>()).prop_map(
            move |(start, pages, rights, high)| {
                let start = start + if high { top } else { 0 };
                Run::new(start, start + pages, Rights::from_bits_truncate(rights))
            },
        )
    }

    proptest! {
        #[test]
        fn every_frame_has_all_rights_that_were_added(
            added in prop::collection::vec(run(), 0..60),
            waiting in 1..40usize,
        ) {
            let mut runs = Runs::with_waiting(usize::MAX, waiting);
            for run in &added {
                runs.add(run.start(), run.end() - run.start(), run.rights()).unwrap();
            }
            let merged = runs.finish().unwrap();
            for pair in merged.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].start());
                prop_assert!(
                    pair[0].end() < pair[1].start() || pair[0].rights() != pair[1].rights()
                );
            }
            prop_assert_eq!(frames(merged), frames(added));
        }
    }

    #[test]
    fn neighbours_that_come_one_after_the_other_take_no_memory() {
        let mut runs = Runs::new(1);
        for frame in 0..1_000_000 {
            runs.add(frame, 1, Rights::READ).unwrap();
        }
        assert_eq!(runs.waiting.len(), 1);
        assert_eq!(
            runs.finish(),
            Ok(vec![Run::new(0, 1_000_000, Rights::READ)])
        );
    }

    #[test]
    fn the_same_scattered_frames_again_and_again_take_bounded_memory() {
        let mut runs = Runs::with_waiting(usize::MAX, 16);
        for round in 0..1000 {
            for frame in 0..100 {
                runs.add(frame * 2, 1, Rights::READ).unwrap();
            }
            assert!(runs.merged.len() <= 100, "round {round}");
            assert!(runs.waiting.len() <= 200, "round {round}");
        }
    }

    #[test]
    fn more_disjoint_runs_than_allowed_are_an_error() {
        for frames in [3u64, 4] {
            let mut runs = Runs::new(3);
            for frame in 0..frames {
                runs.add(frame * 2, 1, Rights::READ).unwrap();
            }
            assert_eq!(runs.finish().is_ok(), frames == 3);
        }
    }
}
