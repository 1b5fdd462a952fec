// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The oldest request of the queue "walk", from when it is taken to when it is answered.
//!
//! Its tables are read by the walker, and what they say waits until it is known what is in force, to
//! become an order like any other. It is forgotten when the queue stops and when the VM is reset.
//! Who calls holds the device's lock, and nothing here waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::GuestAddressSpace;

use super::in_force::describe;
use super::walker::{Ended, Job, Walked, Walker};
use super::wire::{Errno, Lane, Refusal};
use super::{State, UnderWay};
use crate::log_limit::{LogLimit, log_limited};
use crate::protect::{Demand, Table};
use crate::vm::enforcer::Enforcer;

static WALKED: LogLimit = LogLimit::new(10);
static WRITE_EXEC: LogLimit = LogLimit::new(5);
static NO_WALK: LogLimit = LogLimit::new(5);

/// How far the oldest request of the queue "walk" has come.
#[derive(Debug, Default)]
pub(super) enum Progress {
    /// There is none, or page tables are not looked at yet.
    #[default]
    Waits,
    /// They are being read.
    Walks(Walk),
    /// They were, and what they say is to be set as soon as it is known what holds now.
    Walked(Box<Walked>),
}

/// A walk that goes on.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) id: u64,
    cancelled: Arc<AtomicBool>,
    /// What may not be read, as far as it knows.
    hidden: Arc<Table>,
}

impl State {
    /// Begins to read page tables for the oldest request that wants it, unless it has begun.
    pub(super) fn start_walk(&mut self, walker: &Walker) {
        let (Progress::Waits, Some(request)) = (&self.walked, self.walk.requests.kernel()) else {
            return;
        };
        let Some(front_end) = &self.front_end else {
            return;
        };
        let (request, memory) = (Arc::clone(request), front_end.memory.memory().into_inner());
        let walk = Walk {
            id: self.next_seq(),
            cancelled: Arc::default(),
            hidden: Arc::new(self.in_force.hidden()),
        };
        let job = Job {
            id: walk.id,
            request,
            memory,
            hidden: Arc::clone(&walk.hidden),
            cancelled: Arc::clone(&walk.cancelled),
        };
        match walker.start(job) {
            Ok(()) => self.walked = Progress::Walks(walk),
            Err(e) => {
                log_limited!(NO_WALK, Error, "no thread that could read page tables: {e}");
                self.finish_walk(Err(Errno::Eio.into()));
            }
        }
    }

    /// Ends a walk that goes on, and forgets what one has found.
    pub(super) fn forget_walk(&mut self) {
        if let Progress::Walks(walk) = std::mem::take(&mut self.walked) {
            walk.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Something else may not be read now: a walk that goes on has to begin anew.
    pub(super) fn check_hidden(&mut self) {
        if let Progress::Walks(walk) = &self.walked
            && *walk.hidden != self.in_force.hidden()
        {
            self.forget_walk();
        }
    }

    pub(super) fn take_walked(&mut self, ended: Ended) {
        match ended {
            Ok(walked) => self.walked = Progress::Walked(Box::new(walked)),
            Err(refusal) => self.finish_walk(Err(refusal)),
        }
    }

    /// Deals with what page tables were found to say, if that is known.
    pub(super) fn send_walked(&mut self, enforcer: &dyn Enforcer) -> bool {
        let (Progress::Walked(walked), Some(request)) = (&self.walked, self.walk.requests.kernel())
        else {
            return false;
        };
        let most = self.limits().max_request_ranges;
        let planned = match walked.order(request, &self.in_force.pages, most) {
            Ok(Some(planned)) => planned,
            Ok(None) => {
                self.finish_walk(Ok(self.generation()));
                return true;
            }
            Err(refusal) => {
                self.finish_walk(Err(refusal));
                return true;
            }
        };
        let origins = planned.origins;
        let demand = Demand::Pages(planned.order);
        match self.in_force.plan(&demand) {
            Ok(change) if self.in_force.holds(&change) => {
                self.finish_walk(Ok(self.generation()));
            }
            Ok(change) => {
                self.last_seq += 1;
                enforcer.carry_out(self.last_seq, self.generation(), &demand);
                self.under_way = Some(UnderWay {
                    seq: self.last_seq,
                    lane: Lane::Walk,
                    origins,
                    change: Some(change),
                    what: format!("PROTECT_KERNEL: {}", describe(&demand)),
                    orphaned: false,
                });
            }
            Err(unplanned) => {
                let refusal = Refusal::from(unplanned);
                self.finish_walk(Err(from_order(refusal, &origins)));
            }
        }
        true
    }

    /// Answers the oldest request of the queue "walk"; it is given back at the worker's next turn.
    pub(super) fn finish_walk(&mut self, response: Result<u64, Refusal>) {
        let report = match std::mem::take(&mut self.walked) {
            Progress::Walked(walked) => {
                log_walk(&walked, response);
                Some(walked.report)
            }
            Progress::Waits | Progress::Walks(_) => {
                if let Err(Refusal { errno, index }) = response {
                    let index = index.map_or("none".into(), |i| i.to_string());
                    log_limited!(
                        WALKED,
                        Info,
                        "PROTECT_KERNEL refused: errno={} index={index}",
                        errno as u32
                    );
                }
                None
            }
        };
        self.walk.requests.finish(response, report);
        self.again();
    }
}

/// A refusal of an order, told of the request that it comes from.
pub(super) fn from_order(refusal: Refusal, origins: &[usize]) -> Refusal {
    let origin = |index: u32| u32::try_from(*origins.get(index as usize)?).ok();
    Refusal {
        index: refusal.index.and_then(origin),
        ..refusal
    }
}

fn log_walk(walked: &Walked, response: Result<u64, Refusal>) {
    let outcome = match response {
        Ok(_) => "OK".into(),
        Err(Refusal { errno, index: None }) => format!("errno={}", errno as u32),
        Err(Refusal {
            errno,
            index: Some(index),
        }) => format!("errno={} index={index}", errno as u32),
    };
    let report = &walked.report;
    log_limited!(
        WALKED,
        Info,
        "PROTECT_KERNEL: {outcome}; read tables={} mappings={} reserved={} outside={} in {:.1} ms; \
         pages={} given={} unmapped={} not_written={} not_executed={} write_exec={} elsewhere={} \
         ranges={}",
        report.tables,
        report.mappings,
        report.reserved,
        report.outside,
        walked.time.as_secs_f64() * 1e3,
        report.pages,
        report.given,
        report.unmapped,
        report.not_written,
        report.not_executed,
        report.write_exec,
        report.elsewhere,
        report.ranges
    );
    if let Some(first) = walked.write_exec {
        log_limited!(
            WRITE_EXEC,
            Warn,
            "PROTECT_KERNEL: {} pages are written and executed in supervisor mode, the first at \
             frames {first}",
            report.write_exec
        );
    }
}
