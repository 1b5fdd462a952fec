// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What one QEMU has said on its connection so far: which message may come next, and what belongs
//! together. Whole messages come in, calls of [`VmEvents`] go out. Knows no socket.

use super::msr_wire::MsrState;
use super::wire::{Hello, Message};
use crate::protect::msr::{Policy, Unlisted};
use crate::vm::enforcer::{HostPolicyOutcome, InForce, Outcome, Unexpected, VmEvents};

/// The `seq` of `MSR_POLICY`. Requests count from 1.
pub(super) const POLICY_SEQ: u64 = u64::MAX;

const EEXIST: u32 = 17;

/// Why a message may not come now.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutOfPlace {
    #[error("QEMU sent an answer to nothing")]
    Unexpected(#[from] Unexpected),
    #[error("the first message was not HELLO")]
    NoHello,
    #[error("QEMU sent a second HELLO")]
    SecondHello,
    #[error("STATE with seq {seq} without the MSR_STATE that belongs to it")]
    NoMsrState { seq: u64 },
    #[error("MSR_STATE with rules of the host, who has no policy")]
    NoPolicy,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Session {
    greeted: bool,
    /// The policy that was sent and not answered yet: what it says of MSRs that it does not list.
    asked: Option<Unlisted>,
    /// The same of the policy in force.
    unlisted: Option<Unlisted>,
    /// Waits for its `STATE`: `seq`, generation, rules.
    msr_state: Option<(u64, u64, MsrState)>,
}

impl Session {
    /// One that begins with `policy` being sent, if there is one.
    pub(super) fn new(policy: Option<&Policy>) -> Self {
        Self {
            greeted: false,
            asked: policy.map(Policy::unlisted),
            unlisted: None,
            msr_state: None,
        }
    }

    /// Hands one message on.
    pub(super) fn take(
        &mut self,
        message: Message,
        events: &dyn VmEvents,
    ) -> Result<(), OutOfPlace> {
        if self.greeted == matches!(message, Message::Hello(_)) {
            return Err(if self.greeted {
                OutOfPlace::SecondHello
            } else {
                OutOfPlace::NoHello
            });
        }
        match message {
            Message::Hello(Hello { vm, unlisted }) => {
                self.greeted = true;
                self.unlisted = unlisted;
                events.connected(vm);
            }
            Message::MsrState {
                seq,
                generation,
                state,
            } => self.msr_state = Some((seq, generation, state)),
            Message::State {
                seq,
                generation,
                table,
            } => {
                let rules = self
                    .msr_state
                    .take()
                    .filter(|&(s, g, _)| (s, g) == (seq, generation))
                    .map(|(.., rules)| rules)
                    .ok_or(OutOfPlace::NoMsrState { seq })?;
                if self.unlisted.is_none() && rules.has_host_rules() {
                    return Err(OutOfPlace::NoPolicy);
                }
                let state = InForce {
                    pages: table,
                    host: self.unlisted.map(|unlisted| rules.host(unlisted)),
                    msrs: rules.table,
                };
                events.state(seq, generation, state)?;
            }
            Message::Result {
                seq: POLICY_SEQ,
                outcome,
            } => self.policy_answered(outcome, events)?,
            Message::Result { seq, outcome } => events.result(seq, outcome)?,
            Message::Violation(violation) => events.violation(violation),
            Message::Reset { generation } => events.reset(generation),
        }
        Ok(())
    }

    fn policy_answered(
        &mut self,
        outcome: Outcome,
        events: &dyn VmEvents,
    ) -> Result<(), Unexpected> {
        let unlisted = self.asked.take().ok_or(Unexpected {
            what: "RESULT",
            seq: POLICY_SEQ,
        })?;
        events.host_policy(match outcome.status {
            0 => {
                self.unlisted = Some(unlisted);
                HostPolicyOutcome::InForce
            }
            EEXIST => HostPolicyOutcome::Others,
            status => HostPolicyOutcome::Refused {
                status,
                index: outcome.index,
            },
        });
        Ok(())
    }
}
