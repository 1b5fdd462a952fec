// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the design stands on: only the process that made a VM can change it. That is why the
//! companion asks QEMU, and why `KvmVm` lives in the VMM's own process.

// A VM's descriptor that comes from elsewhere is a number.
#![allow(unsafe_code)]

use std::env;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const EIO: i32 = 5;
/// In the child: the descriptor of the VM that it inherits, and the socket by which it gets another.
const INHERITED: &str = "KVM_FACTS_INHERITED";
const SOCKET: &str = "KVM_FACTS_SOCKET";
const CHILD: &str = "the_other_process";

/// KVM, or `None` where there is none and nobody has said that there must be.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(e) if env::var_os("VHOST_GUARD_REQUIRE_KVM").is_none() => {
            eprintln!("skipped: /dev/kvm cannot be opened: {e}");
            None
        }
        Err(e) => panic!("/dev/kvm cannot be opened: {e}"),
    }
}

/// Errors of three ioctls on a VM: 0 is none.
fn ask(kvm: &Kvm, vm: RawFd) -> [i32; 3] {
    // SAFETY: the descriptor is that of a VM, is this process's own, and is given to nobody else.
    let vm = unsafe { kvm.create_vmfd_from_rawfd(vm) }.expect("a size that /dev/kvm tells");
    let errno = |result: Result<(), kvm_ioctls::Error>| result.err().map_or(0, |e| e.errno());
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let page = kvm_userspace_memory_region {
        memory_size: 4096,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    [
        // SAFETY: no vCPU runs, so nothing touches the page after `memory` is gone.
        errno(unsafe { vm.set_user_memory_region(page) }),
        errno(vm.create_irq_chip()),
        errno(vm.create_vcpu(0).map(drop)),
    ]
}

/// Another descriptor of the VM, which a child inherits.
fn duplicate(vm: &VmFd) -> OwnedFd {
    // SAFETY: `vm` keeps its descriptor open for longer than this call.
    rustix::io::dup(unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }).unwrap()
}

fn pass(socket: &UnixStream, vm: &impl AsFd) {
    let fds = [vm.as_fd()];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(
        socket,
        &[IoSlice::new(b"v")],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(1));
}

fn receive(socket: &UnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::empty(),
    )
    .unwrap();
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.next().expect("a descriptor was passed")
}

#[test]
fn another_process_cannot_change_a_vm_whose_descriptor_it_has() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm().unwrap();
    let (mine, theirs) = UnixStream::pair().unwrap();
    let inherited = duplicate(&vm);
    let socket = rustix::io::dup(&theirs).unwrap();
    pass(&mine, &inherited);
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", CHILD, "--ignored", "--nocapture"])
        .env(INHERITED, inherited.as_raw_fd().to_string())
        .env(SOCKET, socket.as_raw_fd().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(
        child.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&child.stderr)
    );
    assert!(
        said.contains(&format!("inherited: {:?}", [EIO; 3])),
        "{said}"
    );
    assert!(said.contains(&format!("passed: {:?}", [EIO; 3])), "{said}");
    // It is not that these fail anyway.
    assert_eq!(ask(&kvm, duplicate(&vm).into_raw_fd()), [0; 3]);
}

#[test]
#[ignore = "the other half of the test above"]
fn the_other_process() {
    let fd = |name| -> RawFd { env::var(name).unwrap().parse().unwrap() };
    let kvm = Kvm::new().unwrap();
    println!("inherited: {:?}", ask(&kvm, fd(INHERITED)));
    // SAFETY: the parent left this descriptor open for nothing else.
    let socket = unsafe { UnixStream::from_raw_fd(fd(SOCKET)) };
    println!("passed: {:?}", ask(&kvm, receive(&socket).into_raw_fd()));
}
