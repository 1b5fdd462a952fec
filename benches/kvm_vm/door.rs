// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How this benchmark brings its vCPU to a stand, if it runs, and when that was. Knows nothing of
//! what is done meanwhile.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vhost_guard::vm::kvm::Vcpus;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

const EINTR: i32 = 4;

/// A signal that comes just before KVM_RUN does nothing: again, after this time.
const AGAIN: Duration = Duration::from_micros(100);

/// When a change began to wait for the vCPU, when it stood, and when it might go on.
#[derive(Clone, Copy)]
pub(crate) struct Stand {
    pub(crate) asked: Instant,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

#[derive(Default)]
struct Inner {
    shut: bool,
    inside: bool,
    ends: bool,
    vcpu: Option<JoinHandle<()>>,
    last: Option<Stand>,
}

/// What the vCPU's thread goes through to KVM_RUN.
#[derive(Default)]
pub(crate) struct Door {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Door {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody has panicked")
    }

    /// Has `vcpu` run in a thread, until [`Self::end`].
    pub(crate) fn run(self: &Arc<Self>, mut vcpu: VcpuFd) {
        // All that it has to do is to end KVM_RUN.
        signal_hook::flag::register(SIGRTMIN(), Arc::default()).expect("a handler can be had");
        let door = Arc::clone(self);
        let run = move || {
            while door.enter() {
                let exit = vcpu.run();
                door.leave();
                assert!(
                    exit.is_err_and(|e| e.errno() == EINTR),
                    "nothing but a signal ends it"
                );
            }
        };
        self.inner().vcpu = Some(thread::spawn(run));
    }

    /// Whether the vCPU is to run.
    fn enter(&self) -> bool {
        let wait = |inner: &mut Inner| inner.shut && !inner.ends;
        let mut inner = self
            .changed
            .wait_while(self.inner(), wait)
            .expect("nobody has panicked");
        inner.inside = !inner.ends;
        inner.inside
    }

    fn leave(&self) {
        self.inner().inside = false;
        self.changed.notify_all();
    }

    /// Waits until the vCPU is out.
    fn wait_out<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) {
        while inner.inside {
            if let Some(vcpu) = &inner.vcpu {
                vcpu.kill(SIGRTMIN()).expect("the thread is there");
            }
            let waited = self.changed.wait_timeout(inner, AGAIN);
            inner = waited.expect("nobody has panicked").0;
        }
    }

    /// Ends the vCPU's thread.
    pub(crate) fn end(&self) {
        let mut inner = self.inner();
        inner.ends = true;
        self.wait_out(inner);
        self.changed.notify_all();
        let vcpu = self.inner().vcpu.take();
        vcpu.map(JoinHandle::join);
    }

    /// When the vCPU stood for the last change.
    pub(crate) fn last(&self) -> Stand {
        let last = self.inner().last.take();
        last.expect("memslots have changed")
    }
}

impl Vcpus for Door {
    fn while_out(&self, work: &mut dyn FnMut()) {
        let asked = Instant::now();
        let mut inner = self.inner();
        inner.shut = true;
        self.wait_out(inner);
        let began = Instant::now();
        work();
        let ended = Instant::now();
        let mut inner = self.inner();
        inner.shut = false;
        inner.last = Some(Stand {
            asked,
            began,
            ended,
        });
        drop(inner);
        self.changed.notify_all();
    }

    fn pause(&self) {}

    fn shut_down(&self) {
        panic!("KVM has refused a memslot that was there before");
    }
}
