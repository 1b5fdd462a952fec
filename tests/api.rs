// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VMM may count on of the library's types, whatever they are made of: threads that they may
//! go to, that they can be shown, and that errors are errors. Mostly for the compiler.

use std::error::Error;
use std::fmt::Debug;
use std::sync::Arc;

use vhost_guard::device::embedded::{Embedded, EmbeddedError, QueueConfig};
use vhost_guard::device::{Device, InUse};
use vhost_guard::msr_policy::{PolicyFile, PolicyFileError};
use vhost_guard::paging::{self, Collective, SpaceError, TooManyPieces, WalkError};
use vhost_guard::protect::{self, Demand, RangeError, Table, UnknownBits, msr};
use vhost_guard::report::{Seen, Snapshot, Status, Witness};
use vhost_guard::vm::enforcer::{
    Enforcer, HostPolicyOutcome, InForce, Outcome, Unexpected, Violation, VmEvents, VmInfo,
};
use vhost_guard::vm::kvm::slots::{NoSlots, PlanError, RegionsError, Slots};
use vhost_guard::vm::kvm::{DeviceMemory, KvmVcpu, KvmVm, NewError, Options, Vcpus, Verdict};

/// Threads may share it, and hand it on.
fn shared<T: Send + Sync + ?Sized>() {}

/// The same, and it can be shown.
fn shown<T: Send + Sync + Debug>() {}

/// What `?` and `anyhow` ask of an error, of any thread.
fn error<T: Error + Send + Sync + 'static>() {}

#[test]
fn types_go_to_any_thread_and_can_be_shown() {
    shown::<Device>();
    shown::<Embedded>();
    shown::<KvmVm>();
    shown::<KvmVcpu>();
    shown::<Options>();
    shown::<Verdict>();
    shown::<Slots>();
    shown::<Table>();
    shown::<Demand>();
    shown::<protect::Change>();
    shown::<msr::Table>();
    shown::<msr::Rules>();
    shown::<msr::Planned>();
    shown::<PolicyFile>();
    shown::<Collective>();
    shown::<paging::Plan>();
    shown::<paging::Space>();
    shown::<Snapshot>();
    shown::<Status>();
    shown::<Seen>();
    shown::<(VmInfo, InForce, Outcome, HostPolicyOutcome, Violation)>();
    shared::<QueueConfig>();
    shared::<dyn Enforcer>();
    shared::<dyn VmEvents>();
    shared::<dyn Vcpus>();
    shared::<dyn Witness>();
    // What a device holds while it is at work stays with its thread; it can be shown.
    fn debug<T: Debug>() {}
    debug::<DeviceMemory<'_>>();
    debug::<QueueConfig>();
}

#[test]
fn errors_are_errors_of_any_thread() {
    error::<InUse>();
    error::<EmbeddedError>();
    error::<NewError>();
    error::<NoSlots>();
    error::<RegionsError>();
    error::<PlanError>();
    error::<Unexpected>();
    error::<PolicyFileError>();
    error::<RangeError>();
    error::<UnknownBits>();
    error::<protect::Loosens>();
    error::<msr::Loosens>();
    error::<msr::MsrRangeError>();
    error::<msr::RuleError>();
    error::<msr::Overlap>();
    error::<msr::FilterFull>();
    error::<msr::NoRoom>();
    error::<msr::Refused>();
    error::<SpaceError>();
    error::<WalkError>();
    error::<TooManyPieces>();
}

/// An enforcer is told of by the device, which is one of its [`VmEvents`]; a [`KvmVm`] is one.
#[test]
fn the_device_hears_of_the_vm_and_a_kvm_vm_enforces() {
    fn events(device: Arc<Device>) -> Arc<dyn VmEvents> {
        device
    }
    fn enforcer(vm: Arc<KvmVm>) -> Arc<dyn Enforcer> {
        vm
    }
    let _ = (events, enforcer);
}
