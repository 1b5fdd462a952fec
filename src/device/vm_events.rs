// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device does when it hears of the VM: from its owner, by one thread.
//!
//! The owner's word counts. What it says is in force replaces what was believed, and requests are
//! held against nothing else.

use std::time::SystemTime;

use super::control::response_of;
use super::in_force::InForce;
use super::walk::from_order;
use super::wire::{Errno, Lane};
use super::{Device, Link, REMEMBERED};
use crate::log_limit::{LogLimit, log_limited};
use crate::report::Seen;
use crate::vm::enforcer::{
    self, HostPolicyOutcome, Outcome, Unexpected, Violation, VmEvents, VmInfo,
};

static VIOLATIONS: LogLimit = LogLimit::new(10);
static CONNECTIONS: LogLimit = LogLimit::new(10);
static POLICY: LogLimit = LogLimit::new(10);

/// What a host's policy was refused for, for people.
fn why_refused(status: u32, names_rule: bool) -> &'static str {
    match Errno::from_number(status) {
        Some(Errno::Eopnotsupp) if names_rule => {
            "this host cannot enforce this rule to the letter (docs/msr.md says which it can)"
        }
        Some(Errno::Eopnotsupp) => "this VM cannot enforce rules for MSRs",
        Some(Errno::Enospc) => {
            "together the rules do not fit into KVM's filter, or pin too many MSRs (docs/msr.md)"
        }
        _ => "the owner of the VM refused them",
    }
}

impl VmEvents for Device {
    fn connected(&self, vm: VmInfo) {
        let mut state = self.lock();
        if state
            .vm
            .is_some_and(|known| known.generation != vm.generation)
        {
            state.begin_generation(vm.generation);
            // It may be another VM. What is in force in it is about to be told.
            state.told = false;
        }
        state.vm = Some(vm);
        state.link = Link::Greeted;
        drop(state);
        self.greeted.notify_all();
    }

    fn state(&self, seq: u64, generation: u64, told: enforcer::InForce) -> Result<(), Unexpected> {
        let mut state = self.lock();
        if seq == 0 && state.link == Link::Greeted {
            state.link = Link::Up;
            if let Some(vm) = &state.vm {
                log_limited!(
                    CONNECTIONS,
                    Info,
                    "VM connected: accelerator={} deny=\"{}\" audit=\"{}\" \
                     generation={generation} ranges_in_force={} msr_ranges_in_force={}",
                    vm.accelerator,
                    vm.deny,
                    vm.audit,
                    told.pages.len(),
                    told.msrs.len()
                );
            }
            if let (Some(policy), None) = (&told.host, &self.policy) {
                log_limited!(
                    CONNECTIONS,
                    Info,
                    "the VM has MSR rules of its host: rules={} default={}; they stay in force",
                    policy.rules().len(),
                    policy.unlisted()
                );
            }
        } else if state.state_asked == Some(seq) {
            state.state_asked = None;
            if !state.in_force.is(&told) {
                log_limited!(
                    CONNECTIONS,
                    Warn,
                    "the owner of the VM enforces something else than asked; its word counts"
                );
            }
        } else {
            return Err(Unexpected { what: "STATE", seq });
        }
        if state.generation() != generation {
            state.begin_generation(generation);
        }
        let can = state.vm.map(|vm| vm.msrs).unwrap_or_default();
        state.in_force = InForce::told(told, can);
        state.told = true;
        state.check_hidden();
        self.serve_requests(&mut state);
        state.serve_events();
        Ok(())
    }

    fn result(&self, seq: u64, outcome: Outcome) -> Result<(), Unexpected> {
        let mut state = self.lock();
        let under_way = state
            .under_way
            .take_if(|under_way| under_way.seq == seq)
            .ok_or(Unexpected {
                what: "RESULT",
                seq,
            })?;
        state.apply(&under_way, &outcome);
        let told = (outcome.ranges_in_force, outcome.msr_ranges_in_force);
        if told != (state.in_force.ranges(), state.in_force.msr_ranges()) {
            state.ask_state(&*self.enforcer);
        }
        if !under_way.orphaned {
            let response = response_of(outcome);
            match under_way.lane {
                Lane::Control => state.control.requests.finish(response, None),
                Lane::Walk => {
                    let response = response.map_err(|e| from_order(e, &under_way.origins));
                    state.finish_walk(response);
                }
            }
        }
        self.serve_requests(&mut state);
        // Its ring may have been where it could not be served.
        state.serve_events();
        Ok(())
    }

    fn host_policy(&self, outcome: HostPolicyOutcome) {
        let Some(file) = &self.policy else {
            return;
        };
        let place = |rule| file.place(rule);
        match outcome {
            HostPolicyOutcome::InForce => {
                let policy = file.policy();
                log_limited!(
                    POLICY,
                    Info,
                    "MSR rules of {} are in force: rules={} default={}",
                    place(None),
                    policy.rules().len(),
                    policy.unlisted()
                );
                self.lock().in_force.set_host(policy.clone());
            }
            HostPolicyOutcome::Others => log_limited!(
                POLICY,
                Warn,
                "MSR rules of {} are NOT in force: the VM keeps those with which it was \
                 started; to change them, start it anew",
                place(None)
            ),
            HostPolicyOutcome::Refused { status, index } => log_limited!(
                POLICY,
                Error,
                "MSR rules of {} are NOT in force: {}: errno={status}",
                place(index),
                why_refused(status, index.is_some())
            ),
        }
    }

    fn violation(&self, violation: Violation) {
        log_limited!(VIOLATIONS, Warn, "violation: {violation}");
        let time = SystemTime::now();
        let mut state = self.lock();
        let seen = Seen {
            time,
            generation: state.generation(),
            violation,
        };
        if state.recent.len() >= REMEMBERED {
            state.recent.pop_front();
        }
        state.recent.push_back(seen);
        state.events.push(violation);
        state.serve_events();
        drop(state);
        if let Some(witness) = &self.witness {
            witness.seen(&seen);
        }
    }

    fn reset(&self, generation: u64) {
        log_limited!(
            CONNECTIONS,
            Info,
            "the VM was reset: generation={generation}, nothing that the guest asked for is in force any more"
        );
        let mut state = self.lock();
        state.begin_generation(generation);
        state.end_rings();
        self.serve_requests(&mut state);
    }

    fn caught_up(&self, seq: u64) {
        let mut state = self.lock();
        state.heard(seq);
        self.serve_requests(&mut state);
    }

    fn disconnected(&self) {
        let mut state = self.lock();
        if state.link == Link::Up {
            log_limited!(
                CONNECTIONS,
                Info,
                "VM disconnected: what is in force stays in force"
            );
        }
        state.link = Link::Down;
        // A request that was under way is sent again: asking twice changes nothing.
        state.under_way = None;
        state.state_asked = None;
        state.forget_unconnected();
    }
}
