// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of a request: popped, checked, sent to the VM's owner one at a time or answered from
//! the table, in the order in which the driver made it available. Each queue has its own.
//!
//! That order is what makes "no request lost, none answered twice" true: after the death of a
//! companion QEMU has only the used index to go by. Knows the ring's rules and the enforcer; who
//! calls it holds the device's lock, and nothing here waits.

use std::collections::VecDeque;
use std::sync::Arc;

use super::chain::Answer;
use super::kernel_wire::{self, KernelRequest, Report};
use super::msr_wire;
use super::ring::{Fault, Left, Popped, Turn};
use super::wire::{self, Errno, Lane, Limits, QUEUE_SIZE, Refusal, Request};
use crate::protect::{Demand, msr};
use crate::vm::enforcer::Outcome;

/// An answer with so many ranges takes as long as a chain of the longest.
const RANGES_PER_TURN: usize = 1024;

/// What requests are held against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    /// The queue that they came by.
    pub(super) lane: Lane,
    pub(super) limits: Limits,
    /// The tables are known to be what is in force, and nothing is about to change them.
    pub(super) settled: bool,
    /// They are of a life of the VM that has ended.
    pub(super) over: bool,
    /// The guest's rules for MSRs.
    pub(super) msrs: &'a msr::Table,
}

/// Requests that were popped and not given back, oldest first.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pending: VecDeque<Pending>,
    /// Chains given back unanswered, since the VM is known.
    pub(super) malformed: u64,
    /// Requests answered with status 0, since the VM is known.
    pub(super) ok: u64,
    /// Requests answered with another.
    pub(super) refused: u64,
}

#[derive(Debug)]
struct Pending {
    /// Its place in the avail ring.
    position: u16,
    head: u16,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The VM's owner is to carry it out, or is about it; or the table has to settle first, or page
    /// tables be read.
    Asked { answer: Answer, request: Request },
    /// Only older requests are in the way.
    Answered {
        answer: Answer,
        response: Result<u64, Refusal>,
        /// What page tables were found to say.
        report: Option<Report>,
    },
    /// To be given back with nothing in it.
    Malformed,
}

impl Requests {
    /// Gives back what can be, and pops what there is, up to the queue's size.
    pub(super) fn serve(&mut self, turn: &mut Turn<'_>, known: Known<'_>) -> Result<Left, Fault> {
        self.give_back(turn, known)?;
        if self.is_full() {
            return Ok(Left::Nothing);
        }
        turn.drain(|turn, popped| {
            self.take(turn, popped, known);
            self.give_back(turn, known)?;
            Ok(!self.is_full())
        })
    }

    /// A guest that makes one chain available again and again cannot fill the memory here.
    fn is_full(&self) -> bool {
        self.pending.len() >= usize::from(QUEUE_SIZE)
    }

    fn take(&mut self, turn: &mut Turn<'_>, popped: Popped<'_>, known: Known<'_>) {
        let Known {
            lane, limits, over, ..
        } = known;
        let Popped {
            position,
            head,
            chain,
        } = popped;
        let state = match turn.walk(chain, lane.answer_size()) {
            Err(_) => State::Malformed,
            Ok(chain) => {
                let request = chain
                    .copy(turn.guest())
                    .map_err(Refusal::from)
                    .and_then(|bytes| wire::parse_request(lane, &bytes, chain.total(), limits))
                    .and_then(|request| {
                        if over {
                            Err(Errno::Estale.into())
                        } else {
                            Ok(request)
                        }
                    });
                let answer = chain.answer;
                match request {
                    Ok(request) => State::Asked { answer, request },
                    Err(refusal) => State::Answered {
                        answer,
                        response: Err(refusal),
                        report: None,
                    },
                }
            }
        };
        self.pending.push_back(Pending {
            position,
            head,
            state,
        });
    }

    fn give_back(&mut self, turn: &mut Turn<'_>, known: Known<'_>) -> Result<(), Fault> {
        while let Some(pending) = self.pending.front() {
            let (written, ok) = match &pending.state {
                State::Asked {
                    request: Request::Order { .. } | Request::Kernel(_),
                    ..
                } => break,
                State::Asked { .. } if !known.settled => break,
                State::Asked { answer, request } => (tell(turn, answer, request, known), true),
                State::Answered {
                    answer,
                    response,
                    report,
                } => {
                    let bytes = match known.lane {
                        Lane::Control => wire::encode_response(*response).to_vec(),
                        Lane::Walk => {
                            kernel_wire::encode(*response, report.as_ref(), answer.room())
                        }
                    };
                    turn.spend(report.as_ref().map_or(0, Report::told_len) / RANGES_PER_TURN);
                    let written = turn.write(answer, &bytes);
                    (written.then_some(bytes.len()), response.is_ok())
                }
                State::Malformed => (None, false),
            };
            turn.give_back(pending.head, written.unwrap_or(0))?;
            let counter = match (written, ok) {
                (None, _) => &mut self.malformed,
                (Some(_), true) => &mut self.ok,
                (Some(_), false) => &mut self.refused,
            };
            *counter += 1;
            self.pending.pop_front();
        }
        Ok(())
    }

    /// What the VM's owner is to carry out next.
    pub(super) fn next(&self) -> Option<&Demand> {
        match &self.pending.front()?.state {
            State::Asked {
                request: Request::Order { demand, .. },
                ..
            } => Some(demand),
            _ => None,
        }
    }

    /// Whose page tables are to be read next.
    pub(super) fn kernel(&self) -> Option<&Arc<KernelRequest>> {
        match &self.pending.front()?.state {
            State::Asked {
                request: Request::Kernel(request),
                ..
            } => Some(request),
            _ => None,
        }
    }

    /// How the request that [`Requests::next`] or [`Requests::kernel`] named has ended, and what
    /// else is told of it.
    pub(super) fn finish(&mut self, response: Result<u64, Refusal>, report: Option<Report>) {
        if let Some(pending) = self.pending.front_mut() {
            pending.answer(response, report);
        }
    }

    /// Answers all that wait with `errno`.
    pub(super) fn refuse_all(&mut self, errno: Errno) {
        for pending in &mut self.pending {
            if matches!(pending.state, State::Asked { .. }) {
                pending.answer(Err(errno.into()), None);
            }
        }
    }

    /// The ring has stopped: forgets all requests. Returns the place of the oldest in the avail
    /// ring, from which on they are to be popped again.
    pub(super) fn give_up(&mut self) -> Option<u16> {
        let oldest = self.pending.front().map(|pending| pending.position);
        self.pending.clear();
        oldest
    }
}

impl Pending {
    /// The index of `response` is that of an entry of what is demanded.
    fn answer(&mut self, response: Result<u64, Refusal>, report: Option<Report>) {
        self.state = match std::mem::replace(&mut self.state, State::Malformed) {
            State::Asked { answer, request } => {
                let response = response.map_err(|refusal| Refusal {
                    index: refusal.index.and_then(|index| request.entry_of(index)),
                    ..refusal
                });
                State::Answered {
                    answer,
                    response,
                    report,
                }
            }
            other => other,
        };
    }
}

/// Answers a query from the tables. Returns how many bytes were written.
fn tell(
    turn: &mut Turn<'_>,
    answer: &Answer,
    request: &Request,
    known: Known<'_>,
) -> Option<usize> {
    let (bytes, found) = match request {
        Request::Query(range) => {
            let held = turn.guest().table().within(*range);
            wire::encode_query(held.map(wire::encode_range), answer.room())
        }
        Request::MsrQuery(query) => {
            let held = msr_wire::held(known.msrs, *query);
            wire::encode_query(held.into_iter(), answer.room())
        }
        Request::Order { .. } | Request::Kernel(_) => return None,
    };
    turn.spend(found as usize / RANGES_PER_TURN);
    turn.write(answer, &bytes).then_some(bytes.len())
}

/// What the driver is told. A status that the device's specification does not have becomes EIO.
pub(super) fn response_of(outcome: Outcome) -> Result<u64, Refusal> {
    match outcome.status {
        0 => Ok(outcome.generation),
        status => Err(Refusal {
            errno: Errno::from_number(status).unwrap_or(Errno::Eio),
            index: outcome.index,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

    use super::*;
    use crate::device::guarded::Guarded;
    use crate::device::wire::Rights;
    use crate::protect::{Attributes, Deny, GfnRange, Protection, Table};

    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const REQUEST: u64 = 0x3000;
    const RESPONSE: u64 = 0x4000;
    const LIMITS: Limits = Limits {
        rights: Rights {
            deny: Deny::NOWRITE,
            audit: Deny::empty(),
            msrs: false,
            kernel: false,
        },
        max_request_ranges: 4096,
    };

    /// A guest that makes one chain available again and again: a LOCK of one page.
    struct Guest {
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        queue: Queue,
        table: Table,
    }

    impl Guest {
        fn new(attributes: u64) -> Self {
            let ram = [(GuestAddress(0), 0x10000)];
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ram).unwrap());
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
            queue
                .try_set_avail_ring_address(GuestAddress(AVAIL))
                .unwrap();
            queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
            queue.set_ready(true);
            let guest = Self {
                memory,
                queue,
                table: Table::default(),
            };
            guest.write(0, [REQUEST, 32 | (1 << 32) | (1 << 48)]);
            guest.write(16, [RESPONSE, 16 | (2 << 32)]);
            guest.write(REQUEST, [1 | (1 << 32), 7, 7, attributes]);
            guest
        }

        fn write<const N: usize>(&self, at: u64, words: [u64; N]) {
            for (i, word) in (0..).zip(words) {
                self.memory
                    .memory()
                    .write_obj(word, GuestAddress(at + 8 * i))
                    .unwrap();
            }
        }

        fn set_avail_idx(&self, idx: u16) {
            self.memory
                .memory()
                .write_obj(idx, GuestAddress(AVAIL + 2))
                .unwrap();
        }

        fn used_idx(&self) -> u16 {
            self.memory
                .memory()
                .read_obj(GuestAddress(USED + 2))
                .unwrap()
        }

        fn serve(&mut self, requests: &mut Requests) -> Result<Left, Fault> {
            let memory = self.memory.memory();
            let guest = Guarded::new(&memory, &self.table);
            let known = Known {
                lane: Lane::Control,
                limits: LIMITS,
                settled: true,
                over: false,
                msrs: &msr::Table::default(),
            };
            requests.serve(&mut Turn::new(&mut self.queue, &guest), known)
        }
    }

    #[test]
    fn an_answer_never_goes_to_a_locked_page() {
        const DONE: Outcome = Outcome {
            status: 0,
            index: None,
            generation: 1,
            ranges_in_force: 1,
            msr_ranges_in_force: 0,
        };
        let lock = Protection {
            range: GfnRange::of_bytes(RESPONSE, 16).unwrap(),
            attributes: Attributes::new(Deny::NOWRITE, Deny::empty()),
        };
        let answer = |guest: &Guest| -> [u64; 2] {
            guest
                .memory
                .memory()
                .read_obj(GuestAddress(RESPONSE))
                .unwrap()
        };
        for locked_before in [true, false] {
            let mut guest = Guest::new(1);
            guest.write(RESPONSE, [!0, !0]);
            if locked_before {
                guest.table.tell(&lock);
            }
            let mut requests = Requests::default();
            guest.set_avail_idx(1);
            guest.serve(&mut requests).unwrap();
            assert_eq!(
                requests.next().is_none(),
                locked_before,
                "it is not carried out"
            );
            if !locked_before {
                guest.table.tell(&lock);
                requests.finish(response_of(DONE), None);
                guest.serve(&mut requests).unwrap();
            }
            assert_eq!(guest.used_idx(), 1);
            assert_eq!(requests.malformed, 1);
            assert_eq!(answer(&guest), [!0, !0]);
        }
    }

    #[test]
    fn no_more_requests_are_held_than_the_queue_has_entries() {
        let mut guest = Guest::new(1);
        let mut requests = Requests::default();
        guest.set_avail_idx(QUEUE_SIZE);
        assert_eq!(guest.serve(&mut requests), Ok(Left::Nothing));
        assert_eq!(guest.queue.next_avail(), QUEUE_SIZE);

        guest.set_avail_idx(2 * QUEUE_SIZE);
        assert_eq!(guest.serve(&mut requests), Ok(Left::Nothing));
        assert_eq!(
            guest.queue.next_avail(),
            QUEUE_SIZE,
            "the ring keeps the rest"
        );

        let done = Outcome {
            status: 0,
            index: None,
            generation: 1,
            ranges_in_force: 1,
            msr_ranges_in_force: 0,
        };
        requests.finish(response_of(done), None);
        assert_eq!(guest.serve(&mut requests), Ok(Left::Nothing));
        assert_eq!(
            (guest.used_idx(), guest.queue.next_avail()),
            (1, QUEUE_SIZE + 1)
        );
        assert_eq!(requests.give_up(), Some(1));
    }

    #[test]
    fn others_get_their_turn_after_as_many_chains_as_the_queue_has_entries() {
        let mut guest = Guest::new(0);
        let mut requests = Requests::default();
        guest.set_avail_idx(QUEUE_SIZE);
        // Answered at once, so the ring never fills.
        assert_eq!(guest.serve(&mut requests), Ok(Left::Chains));
        assert_eq!(guest.used_idx(), QUEUE_SIZE);
        assert_eq!(guest.serve(&mut requests), Ok(Left::Nothing));
        assert_eq!(requests.give_up(), None);
    }

    #[test]
    fn a_chain_that_comes_just_when_the_ring_was_found_empty_is_no_fault() {
        const CHAINS: u16 = 20_000;
        let mut guest = Guest::new(0);
        let mut requests = Requests::default();
        let memory = guest.memory.memory();
        let load = |at| u16::from_le(memory.load(GuestAddress(at), Ordering::Acquire).unwrap());
        let failed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for idx in 1..=CHAINS {
                    while idx.wrapping_sub(load(USED + 2)) > QUEUE_SIZE
                        && !failed.load(Ordering::Relaxed)
                    {
                        std::hint::spin_loop();
                    }
                    memory
                        .store(idx.to_le(), GuestAddress(AVAIL + 2), Ordering::Release)
                        .unwrap();
                }
            });
            while load(USED + 2) != CHAINS && !failed.load(Ordering::Relaxed) {
                failed.store(guest.serve(&mut requests).is_err(), Ordering::Relaxed);
            }
        });
        assert!(!failed.into_inner());
    }

    #[test]
    fn a_guest_that_takes_an_available_index_back_does_not_make_it_spin() {
        let mut guest = Guest::new(0);
        let mut requests = Requests::default();
        guest.queue.set_next_avail(5);
        guest.set_avail_idx(4);
        assert_eq!(guest.serve(&mut requests), Err(Fault::Index));
    }
}
