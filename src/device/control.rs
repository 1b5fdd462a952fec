// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of a request: popped, checked, sent to the VM's owner one at a time, answered in the
//! order in which the driver made it available.
//!
//! That order is what makes "no request lost, none answered twice" true: after the death of a
//! companion QEMU has only the used index to go by. Knows the ring's rules and the enforcer; who
//! calls it holds the device's lock, and nothing here waits.

use std::collections::VecDeque;

use super::chain::{Answer, Chain};
use super::ring::{Fault, Left, Popped, Turn};
use super::wire::{self, Errno, Limits, QUEUE_SIZE, RESPONSE_SIZE, Refusal};
use crate::protect::Protection;
use crate::vm::enforcer::Outcome;

/// Requests that were popped and not given back, oldest first.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pending: VecDeque<Request>,
    /// Chains given back unanswered, since the VM is known.
    pub(super) malformed: u64,
}

#[derive(Debug)]
struct Request {
    /// Its place in the avail ring.
    position: u16,
    head: u16,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The VM's owner is to carry it out, or is about it.
    Asked {
        answer: Answer,
        protections: Vec<Protection>,
    },
    /// Only older requests are in the way.
    Answered {
        answer: Answer,
        response: Result<u64, Refusal>,
    },
    /// To be given back with nothing in it.
    Malformed,
}

impl Requests {
    /// Gives back what can be, and pops what there is, up to the queue's size.
    pub(super) fn serve(&mut self, turn: &mut Turn<'_>, limits: Limits) -> Result<Left, Fault> {
        self.give_back(turn)?;
        if self.is_full() {
            return Ok(Left::Nothing);
        }
        turn.drain(|turn, popped| {
            self.take(turn, popped, limits);
            self.give_back(turn)?;
            Ok(!self.is_full())
        })
    }

    /// A guest that makes one chain available again and again cannot fill the memory here.
    fn is_full(&self) -> bool {
        self.pending.len() >= usize::from(QUEUE_SIZE)
    }

    fn take(&mut self, turn: &Turn<'_>, popped: Popped, limits: Limits) {
        let Popped {
            position,
            head,
            chain,
        } = popped;
        let state = match Chain::walk(turn.memory, chain, RESPONSE_SIZE) {
            Err(_) => State::Malformed,
            Ok(chain) => {
                let request = chain
                    .copy(turn.memory)
                    .map_err(Refusal::from)
                    .and_then(|bytes| wire::parse_request(&bytes, chain.total(), limits));
                let answer = chain.answer;
                match request {
                    Ok(protections) => State::Asked {
                        answer,
                        protections,
                    },
                    Err(refusal) => State::Answered {
                        answer,
                        response: Err(refusal),
                    },
                }
            }
        };
        self.pending.push_back(Request {
            position,
            head,
            state,
        });
    }

    fn give_back(&mut self, turn: &mut Turn<'_>) -> Result<(), Fault> {
        while let Some(request) = self.pending.front() {
            let written = match &request.state {
                State::Asked { .. } => break,
                State::Answered { answer, response } => {
                    answer.write(turn.memory, &wire::encode_response(*response))
                }
                State::Malformed => false,
            };
            turn.give_back(request.head, if written { RESPONSE_SIZE } else { 0 })?;
            self.malformed += u64::from(!written);
            self.pending.pop_front();
        }
        Ok(())
    }

    /// The request that the VM's owner is to carry out next.
    pub(super) fn next(&self) -> Option<&[Protection]> {
        match &self.pending.front()?.state {
            State::Asked { protections, .. } => Some(protections),
            _ => None,
        }
    }

    /// How the request that [`Requests::next`] names has ended. Returns what is in force now
    /// because of it.
    pub(super) fn finish(&mut self, outcome: Outcome) {
        if let Some(request) = self.pending.front_mut() {
            request.answer(response_of(outcome));
        }
    }

    /// Answers all that wait for the VM's owner with `errno`.
    pub(super) fn refuse_all(&mut self, errno: Errno) {
        for request in &mut self.pending {
            if matches!(request.state, State::Asked { .. }) {
                request.answer(Err(errno.into()));
            }
        }
    }

    /// The ring has stopped: forgets all requests. Returns the place of the oldest in the avail
    /// ring, from which on they are to be popped again.
    pub(super) fn give_up(&mut self) -> Option<u16> {
        let oldest = self.pending.front().map(|request| request.position);
        self.pending.clear();
        oldest
    }
}

impl Request {
    fn answer(&mut self, response: Result<u64, Refusal>) {
        self.state = match std::mem::replace(&mut self.state, State::Malformed) {
            State::Asked { answer, .. } => State::Answered { answer, response },
            other => other,
        };
    }
}

/// What the driver is told. A status that the device's specification does not have becomes EIO.
fn response_of(outcome: Outcome) -> Result<u64, Refusal> {
    match outcome.status {
        0 => Ok(outcome.generation),
        status => Err(Refusal {
            errno: Errno::from_number(status).unwrap_or(Errno::Eio),
            index: outcome.index,
        }),
    }
}
