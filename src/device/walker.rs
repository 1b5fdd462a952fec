// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread that reads a guest's page tables, because that may take a second.
//!
//! It does one walk at a time, on what it was given, and hands back what it found. A walk that
//! nobody wants any more ends before its next table, and the one that took its place begins then.
//! Knows guest memory, and nothing of rings or of what has become of the request meanwhile: who
//! takes the result has to see whether it is still wanted.

use std::any::Any;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::guarded::Guarded;
use super::kernel_wire::{KernelRequest, Report};
use super::wire::{Errno, Refusal};
use crate::log_limit::{LogLimit, log_limited};
use crate::paging::{
    Collective, Limits, Plan, PlannedOrder, TooManyPieces, WalkError, collective, plan,
};
use crate::protect::{GfnRange, PAGE_SHIFT, Table};

static FAILED: LogLimit = LogLimit::new(5);

/// Most entries that are read: a second or so.
const ENTRIES: u64 = 1 << 28;
/// Most disjoint ranges that mappings may come to.
const RANGES: usize = 1 << 20;

/// A walk that is to be done.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) request: Arc<KernelRequest>,
    /// What the guest had when the walk was asked for.
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// What may not be read of it.
    pub(super) hidden: Arc<Table>,
    /// The walk is to end.
    pub(super) cancelled: Arc<AtomicBool>,
}

/// How a walk has ended: with what it found, or with a refusal that needs nothing to be known.
pub(super) type Ended = Result<Walked, Refusal>;

/// What a walk has found.
#[derive(Debug)]
pub(super) struct Walked {
    /// For the driver.
    pub(super) report: Report,
    /// That what was found is no good.
    pub(super) refusal: Option<Refusal>,
    /// The first pages that are written and executed in supervisor mode.
    pub(super) write_exec: Option<GfnRange>,
    pub(super) time: Duration,
    plan: Plan,
}

impl Walked {
    /// What is to be set on `table`, in at most so many ranges; `None` if the guest only wants to be
    /// told.
    ///
    /// # Errors
    ///
    /// It has to be refused.
    pub(super) fn order(
        &self,
        request: &KernelRequest,
        table: &Table,
        most: u32,
    ) -> Result<Option<PlannedOrder>, Refusal> {
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let order = match (request.dry_run, request.lock) {
            (true, _) => None,
            (false, true) => Some(self.plan.lock(most)),
            (false, false) => Some(self.plan.protect(table, most)),
        };
        let order = order
            .transpose()
            .map_err(|TooManyPieces(_)| Refusal::from(Errno::Eoverflow))?;
        if !request.lock
            && let Some(entry) = self.plan.loosens(table)
        {
            return Err(of_entry(Errno::Eperm, entry));
        }
        Ok(order)
    }
}

fn of_entry(errno: Errno, entry: usize) -> Refusal {
    Refusal {
        errno,
        index: u32::try_from(entry).ok(),
    }
}

/// The thread, as it is by default.
pub(super) fn thread() -> thread::Builder {
    thread::Builder::new().name("guard-walk".into())
}

/// Does a walk: all of it that takes time.
///
/// # Errors
///
/// The request is refused before anything is known that could be told.
pub(super) fn work(job: &Job) -> Ended {
    let began = Instant::now();
    let request = &*job.request;
    for (entry, index) in request.entries.iter().zip(0..) {
        if !entry.attributes.is_free() && !has(&job.memory, entry.range) {
            return Err(of_entry(Errno::Einval, index));
        }
    }
    let limits = Limits {
        entries: ENTRIES,
        ranges: RANGES,
        cancel: Some(&job.cancelled),
        ..Limits::default()
    };
    let memory = Guarded::new(&job.memory, &job.hidden);
    let found = collective(&memory, &request.space, &limits).map_err(|e| match e {
        WalkError::RootOutside(_) => Errno::Efault,
        WalkError::TooManyEntries(_) | WalkError::TooManyRanges(_) => Errno::Eoverflow,
        // Whoever cancels it takes no answer.
        WalkError::Cancelled => Errno::Eio,
    })?;
    let mut plan = plan(&found, &request.entries, request.policy);
    let report = report(&found, &mut plan);
    let refusal = if report.outside != 0 && !request.dry_run {
        Some(Errno::Efault.into())
    } else {
        plan.refused.map(|entry| of_entry(Errno::Eacces, entry))
    };
    Ok(Walked {
        report,
        refusal,
        write_exec: plan.first_write_exec,
        time: began.elapsed(),
        plan,
    })
}

fn report(found: &Collective, plan: &mut Plan) -> Report {
    let (pages, entries) = (plan.counts, found.counts());
    let ranges = plan.given().len() as u64;
    Report {
        pages: pages.pages,
        unmapped: pages.unmapped,
        not_written: pages.not_written,
        not_executed: pages.not_executed,
        write_exec: pages.write_exec,
        given: pages.given,
        elsewhere: pages.elsewhere,
        ranges,
        mappings: entries.mappings.iter().sum(),
        reserved: entries.reserved,
        outside: entries.outside,
        tables: found.tables(),
        told_write_exec: std::mem::take(&mut plan.write_exec),
        told_unmapped: std::mem::take(&mut plan.unmapped),
    }
}

/// Whether every byte of these pages is there; regions may lie side by side.
fn has(memory: &GuestMemoryMmap, pages: GfnRange) -> bool {
    let mut at = pages.start().number() << PAGE_SHIFT;
    let last = pages.end().number() << PAGE_SHIFT | 0xfff;
    // Regions are sorted.
    for region in memory.iter() {
        if region.start_addr().0 <= at && at <= region.last_addr().0 {
            if region.last_addr().0 >= last {
                return true;
            }
            at = region.last_addr().0 + 1;
        }
    }
    false
}

/// Takes what a walk has come to.
pub(super) type Take = dyn Fn(u64, Ended) + Send + Sync;
/// Does a walk.
pub(super) type Work = dyn Fn(&Job) -> Ended + Send + Sync;
/// Says what the thread is to be like.
pub(super) type Thread = dyn Fn() -> thread::Builder + Send + Sync;

/// The thread, which is made when there is a first walk.
pub(super) struct Walker {
    shared: Arc<Shared>,
    thread: Box<Thread>,
}

struct Shared {
    slot: Mutex<Slot>,
    filled: Condvar,
    work: Box<Work>,
    take: Box<Take>,
}

#[derive(Default)]
struct Slot {
    /// The walk to be done next.
    next: Option<Job>,
    runs: bool,
    ends: bool,
}

impl Walker {
    /// One whose walks are done by `work` on a `thread`. `take` is called with each walk's number and what it came
    /// to, by the thread, with no lock held.
    pub(super) fn new(thread: Box<Thread>, work: Box<Work>, take: Box<Take>) -> Self {
        Self {
            shared: Arc::new(Shared {
                slot: Mutex::default(),
                filled: Condvar::new(),
                work,
                take,
            }),
            thread,
        }
    }

    /// Hands over a walk and returns. One before it that was not begun is dropped: whoever asks for
    /// another has cancelled it.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub(super) fn start(&self, job: Job) -> io::Result<()> {
        let mut slot = self.shared.lock();
        if !slot.runs {
            let shared = Arc::clone(&self.shared);
            (self.thread)().spawn(move || shared.run())?;
            slot.runs = true;
        }
        slot.next = Some(job);
        drop(slot);
        self.shared.filled.notify_one();
        Ok(())
    }
}

impl Drop for Walker {
    /// Does not wait for the thread: it may be the one that does this.
    fn drop(&mut self) {
        let mut slot = self.shared.lock();
        slot.ends = true;
        slot.next = None;
        drop(slot);
        self.shared.filled.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(job) = self.next() {
            let ended = panic::catch_unwind(AssertUnwindSafe(|| (self.work)(&job)));
            let ended = ended.unwrap_or_else(|panic| {
                log_limited!(
                    FAILED,
                    Error,
                    "a walk of page tables panicked (please report it, with the log): {}",
                    what_was_said(&*panic)
                );
                Err(Errno::Eio.into())
            });
            let (id, wanted) = (job.id, !job.cancelled.load(Ordering::Relaxed));
            // The guest's memory is let go of before anybody hears of the result.
            drop(job);
            if wanted {
                (self.take)(id, ended);
            }
        }
    }

    /// The next walk, or `None` at the end.
    fn next(&self) -> Option<Job> {
        let mut slot = self
            .filled
            .wait_while(self.lock(), |slot| slot.next.is_none() && !slot.ends)
            .unwrap_or_else(PoisonError::into_inner);
        slot.next.take()
    }
}

/// What a panic says of itself.
pub(super) fn what_was_said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it did not say why")
}
