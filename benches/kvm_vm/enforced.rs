// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM with a `KvmVm`, asked as the device asks it, and when it answered.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VmFd};
use vhost_guard::protect::{Attributes, Demand, Deny, GfnRange, Order, Protection};
use vhost_guard::vm::enforcer::{
    Enforcer, HostPolicyOutcome, InForce, Outcome, Policy, Unexpected, Violation, VmEvents, VmInfo,
};
use vhost_guard::vm::kvm::{KvmVm, Options};
use vm_memory::GuestMemoryMmap;

use crate::bare::IDS;
use crate::door::{Door, Stand};

enum Heard {
    Result(Outcome, Instant),
    Violation(Instant),
    Other,
}

struct Ear(Sender<Heard>);

impl Ear {
    fn hear(&self, heard: Heard) {
        let _ = self.0.send(heard);
    }
}

impl VmEvents for Ear {
    fn connected(&self, _vm: VmInfo) {
        self.hear(Heard::Other);
    }

    fn state(&self, _seq: u64, _generation: u64, _state: InForce) -> Result<(), Unexpected> {
        self.hear(Heard::Other);
        Ok(())
    }

    fn result(&self, _seq: u64, outcome: Outcome) -> Result<(), Unexpected> {
        self.hear(Heard::Result(outcome, Instant::now()));
        Ok(())
    }

    fn host_policy(&self, _outcome: HostPolicyOutcome) {}

    fn violation(&self, _violation: Violation) {
        self.hear(Heard::Violation(Instant::now()));
    }

    fn reset(&self, _generation: u64) {}

    fn caught_up(&self, _seq: u64) {}

    fn disconnected(&self) {}
}

/// What one change took, from the call until the answer.
#[derive(Default)]
pub(crate) struct Cost {
    pub(crate) all: Duration,
    /// Until the vCPUs are asked to stand: the way to the other thread, checks, plans.
    pub(crate) before: Duration,
    /// Until they do.
    pub(crate) stopping: Duration,
    /// While they stand: the ioctls, and taking over.
    pub(crate) standing: Duration,
}

pub(crate) struct Enforced {
    pub(crate) kvm_vm: KvmVm,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) door: Arc<Door>,
    heard: Receiver<Heard>,
    _ear: Arc<dyn VmEvents>,
    seq: u64,
}

impl Enforced {
    pub(crate) fn new(kvm: &Kvm, memory: &Arc<GuestMemoryMmap>) -> Self {
        let vm = Arc::new(kvm.create_vm().expect("a VM can be created"));
        let options = Options {
            on_violation: Policy::Drop,
            max_ranges: u32::from(IDS),
            ..Options::new(0..IDS)
        };
        let kvm_vm =
            KvmVm::new(Arc::clone(&vm), Arc::clone(memory), options).expect("KVM takes the memory");
        let (tell, heard) = channel();
        let ear: Arc<dyn VmEvents> = Arc::new(Ear(tell));
        let door = Arc::new(Door::default());
        let weak: Weak<dyn VmEvents> = Arc::downgrade(&ear);
        kvm_vm
            .start(weak, door.clone())
            .expect("there is a thread to be had");
        let enforced = Self {
            kvm_vm,
            vm,
            door,
            heard,
            _ear: ear,
            seq: 0,
        };
        // What it can do, and what is in force.
        enforced.heard();
        enforced.heard();
        enforced
    }

    fn heard(&self) -> Heard {
        self.heard.recv().expect("the thread of KvmVm is there")
    }

    /// Makes a change: what it took is added to `cost`.
    pub(crate) fn change(&mut self, order: Order, cost: &mut Cost) {
        let demand = Demand::Pages(order);
        self.seq += 1;
        let start = Instant::now();
        self.kvm_vm.carry_out(self.seq, 1, &demand);
        let end = loop {
            if let Heard::Result(outcome, at) = self.heard() {
                assert_eq!(outcome.status, 0, "the change is carried out");
                break at;
            }
        };
        let Stand {
            asked,
            began,
            ended,
        } = self.door.last();
        cost.all += end - start;
        cost.before += asked - start;
        cost.stopping += began - asked;
        cost.standing += ended - began;
    }

    /// When the next violation was told of.
    pub(crate) fn violation(&self) -> Instant {
        loop {
            if let Heard::Violation(at) = self.heard() {
                return at;
            }
        }
    }

    /// Forgets violations that were told of.
    pub(crate) fn forget_violations(&mut self) {
        while self.heard.try_recv().is_ok() {}
    }
}

/// Frames by their numbers.
pub(crate) fn gfns(numbers: Range<u64>) -> GfnRange {
    GfnRange::new(numbers.start, numbers.end - 1).expect("frame numbers")
}

/// The order for all frames of these ranges to be write-protected, or free.
pub(crate) fn order(ranges: &[GfnRange], protect: bool) -> Order {
    let deny = if protect {
        Deny::NOWRITE
    } else {
        Deny::empty()
    };
    let attributes = Attributes::new(deny, Deny::empty());
    let entry = |&range| Protection { range, attributes };
    Order::Protect(ranges.iter().map(entry).collect())
}
