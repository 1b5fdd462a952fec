// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A small VMM with the device in its own process: no QEMU, no companion, no socket, just /dev/kvm.
//!
//!     cargo run --example embedded
//!
//! boots the bare-metal guest of `tests/guests`, which locks a page and attacks it from two CPUs.
//! The machine is the least that this guest runs on (`tests/guests/README.md`, "A small machine").
//! What any VMM does for the library is here, to be read from [`run`] on; what it needs of virtio is
//! in `embedded/virtio_mmio.rs`. Nothing in `boot.rs` and `bus.rs` beside it has to do with the guard.

#[path = "embedded/boot.rs"]
mod boot;
#[path = "embedded/bus.rs"]
mod bus;
#[path = "embedded/virtio_mmio.rs"]
mod virtio_mmio;

use std::error::Error;
use std::iter;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use env_logger::Env;
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use log::info;
use vhost_guard::device::Device;
use vhost_guard::device::embedded::Embedded;
use vhost_guard::vm::enforcer::{Policy, VmEvents};
use vhost_guard::vm::kvm::{KvmVcpu, KvmVm, Options, Vcpus, Verdict};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use bus::{Bus, Serial};
use virtio_mmio::{Line, Transport};

/// A byte written to this port ends the VM.
const EXIT_PORT: u16 = 0xf4;
/// Three pages that KVM wants on Intel's CPUs, where there is no memory.
const TSS: usize = 0xfffb_d000;

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;

/// Boots a bare-metal guest with the guard device in this process.
///
/// Exit status: 0 if the guest passes, 1 if it fails, 3 if it skips; 4 and 5 if a violation has paused
/// the VM or shut it down; 2 if there is no VM, or no going on with it.
#[derive(Parser)]
#[command(name = "embedded")]
struct Cli {
    /// vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    cpus: u8,
    /// Guest memory.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(32..=3072))]
    memory: u32,
    /// What becomes of a store to a page that is locked.
    #[arg(long, value_name = "POLICY", default_value = "inject", value_parser = policy())]
    on_violation: Policy,
    /// What is booted, an ELF with a PVH note; by default the guest of tests/guests, which is built if
    /// need be.
    elf: Option<PathBuf>,
    /// What the guest is told; words about the machine are added.
    #[arg(default_value = "test=demo")]
    command_line: String,
}

fn policy() -> impl TypedValueParser<Value = Policy> {
    PossibleValuesParser::new(["inject", "drop", "pause", "shutdown"]).map(|name| match &*name {
        "inject" => Policy::Inject,
        "drop" => Policy::Drop,
        "pause" => Policy::Pause,
        _ => Policy::Shutdown,
    })
}

/// How the VM has ended.
enum End {
    /// The guest has written this to its exit port.
    Guest(u8),
    /// A store was refused, and such is the policy.
    Paused,
    Shutdown,
    /// It cannot go on.
    Failed(String),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The library logs what was enforced and what was refused, at a bounded rate; crates below it log
    // whatever a guest does wrong.
    let log = Env::default().default_filter_or("vhost_guard=info,embedded=info");
    env_logger::init_from_env(log);
    let (status, why) = match run(&cli) {
        Ok(End::Guest(0x10)) => (0, "the guest passes".into()),
        Ok(End::Guest(0x11)) => (1, "the guest fails".into()),
        Ok(End::Guest(0x12)) => (3, "the guest skips this".into()),
        Ok(End::Paused) => (4, "a violation has paused the VM".into()),
        Ok(End::Shutdown) => (
            5,
            "the VM was shut down, by a violation if the log says nothing else".into(),
        ),
        Ok(End::Guest(code)) => (2, format!("error: the guest ends with {code:#x}")),
        Ok(End::Failed(why)) => (2, format!("error: {why}")),
        Err(error) => (2, format!("error: {}", with_causes(&*error))),
    };
    eprintln!("embedded: {why}");
    ExitCode::from(status)
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |&error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// What it is that KVM refuses.
fn refused(what: &str) -> impl Fn(kvm_ioctls::Error) -> String {
    move |e| format!("KVM refuses {what}: {e}")
}

/// Makes the VM, runs it to its end, and takes it apart.
fn run(cli: &Cli) -> Result<End, Box<dyn Error>> {
    // All that a kick has to do is to end KVM_RUN.
    signal_hook::flag::register(SIGRTMIN(), Arc::default())?;

    // A VM without memory: its memslots are the library's.
    let kvm = Kvm::new().map_err(|e| format!("cannot open /dev/kvm: {e}"))?;
    let vm = Arc::new(kvm.create_vm().map_err(refused("a VM"))?);
    vm.set_tss_address(TSS)
        .map_err(refused("a place for TSSs"))?;
    vm.create_irq_chip()
        .map_err(refused("interrupt controllers"))?;
    let size = u64::from(cli.memory) << 20;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)])?;
    let entry = boot::load(cli.elf.as_deref(), &told(cli), &memory)?;

    // Who enforces. All slot numbers are its own, as this VMM has no memory but the guest's.
    let slots = u16::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(u16::MAX);
    let options = Options {
        on_violation: cli.on_violation,
        max_ranges: 8192,
        ..Options::new(0..slots)
    };
    let kvm_vm = KvmVm::new(Arc::clone(&vm), Arc::new(memory.clone()), options)?;
    let kvm_vm = Arc::new(kvm_vm);

    // The device, which asks it to, and hears of what happens.
    let device = Device::new(kvm_vm.clone(), None, None);
    let events: Arc<dyn VmEvents> = device.clone();
    let (ends, ended) = mpsc::channel();
    let door = Arc::new(Door::new(ends.clone()));
    kvm_vm.start(Arc::downgrade(&events), door.clone())?;

    // What the guest sees of it, and the rest of the machine.
    let guard = Embedded::new(device.clone(), GuestMemoryAtomic::new(memory))?;
    let bus = Arc::new(Bus {
        transport: Mutex::new(Transport::new(guard, Line::new(&vm)?)),
        serial: Mutex::new(Serial::new()?),
    });
    let vcpu = |index| -> Result<_, kvm_ioctls::Error> {
        Ok(Vcpu {
            fd: boot::new_vcpu(&kvm, &vm, index, entry)?,
            guarded: kvm_vm.vcpu(index.into()),
            door: Arc::clone(&door),
            bus: Arc::clone(&bus),
        })
    };
    let vcpus = (0..cli.cpus).map(vcpu).collect::<Result<Vec<_>, _>>();
    let vcpus = vcpus.map_err(refused("a vCPU"))?;
    for (index, vcpu) in vcpus.into_iter().enumerate() {
        let ends = ends.clone();
        let run = move || {
            if let Some(end) = vcpu.run() {
                // The first one counts.
                let _ = ends.send(end);
            }
        };
        let thread = thread::Builder::new().name(format!("vcpu{index}"));
        door.add(thread.spawn(run)?);
    }

    // One vCPU says how it ends, and then all of them are brought to an end.
    let end = ended.recv()?;
    door.close();
    // What was in force ends with the VM. Violations that were seen have been told when this returns.
    kvm_vm.reset()?;
    let counted = device.snapshot().counters;
    info!(
        "requests: {} carried out, {} refused; violations: {}",
        counted.requests_ok, counted.requests_refused, counted.violations
    );
    Ok(end)
}

/// The guest's command line, with words about the machine.
fn told(cli: &Cli) -> String {
    // To the guest, each policy but inject is one: its store does not land.
    let policy = match cli.on_violation {
        Policy::Inject => "inject",
        _ => "drop",
    };
    let device = virtio_mmio::words();
    format!(
        "{} policy={policy} cpus={} {device}",
        cli.command_line, cli.cpus
    )
}

/// The door that vCPU threads go through on their way into KVM_RUN. Shut, it keeps all of them out:
/// that is what the library needs to change memslots.
struct Door {
    state: Mutex<DoorState>,
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
    ends: Sender<End>,
}

#[derive(Default)]
struct DoorState {
    inside: u32,
    /// For a while.
    shut: bool,
    /// For good.
    closed: bool,
}

impl Door {
    fn new(ends: Sender<End>) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            threads: Mutex::default(),
            ends,
        }
    }

    /// Adds a thread that goes through it.
    fn add(&self, thread: JoinHandle<()>) {
        lock(&self.threads).push(thread);
    }

    /// Waits until it is open; false if it never will be.
    fn enter(&self) -> bool {
        let shut = |state: &mut DoorState| state.shut && !state.closed;
        let state = self.changed.wait_while(lock(&self.state), shut);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.inside += u32::from(!state.closed);
        !state.closed
    }

    fn leave(&self) {
        lock(&self.state).inside -= 1;
        self.changed.notify_all();
    }

    /// Kicks vCPUs until all are out, and returns with the door's lock held.
    fn all_out<'a>(&'a self, mut state: MutexGuard<'a, DoorState>) -> MutexGuard<'a, DoorState> {
        while state.inside != 0 {
            for thread in &*lock(&self.threads) {
                // One that has ended needs no kick.
                let _ = thread.kill(SIGRTMIN());
            }
            // A kick that comes just before KVM_RUN does nothing: again, then.
            let wait = Duration::from_millis(1);
            let waited = self.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    /// Ends all threads.
    fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        drop(self.all_out(state));
        self.changed.notify_all();
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Vcpus for Door {
    fn while_out(&self, work: &mut dyn FnMut()) {
        let mut state = lock(&self.state);
        state.shut = true;
        // Nobody enters without the lock.
        let mut state = self.all_out(state);
        work();
        state.shut = false;
        drop(state);
        self.changed.notify_all();
    }

    fn pause(&self) {
        let _ = self.ends.send(End::Paused);
    }

    fn shut_down(&self) {
        let _ = self.ends.send(End::Shutdown);
    }
}

/// A vCPU is in; whatever becomes of its thread, it comes out.
struct Inside<'a>(&'a Door);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A vCPU, and what its exits lead to.
struct Vcpu {
    fd: VcpuFd,
    guarded: KvmVcpu,
    door: Arc<Door>,
    bus: Arc<Bus>,
}

impl Vcpu {
    /// Runs until the door is closed, or until it has the VM end.
    fn run(mut self) -> Option<End> {
        while self.door.enter() {
            let inside = Inside(&self.door);
            // If the library has a fault for this vCPU, it gets it here.
            let ready = self.guarded.before_run(&mut self.fd);
            let exit = ready.and_then(|()| self.fd.run());
            drop(inside);
            let (store, what) = match exit {
                Ok(VcpuExit::IoOut(EXIT_PORT, &[code, ..])) => return Some(End::Guest(code)),
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.bus.port_write(port, data);
                    continue;
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.bus.port_read(port, data);
                    continue;
                }
                Ok(VcpuExit::MmioRead(at, data)) => {
                    self.bus.mmio_read(at, data);
                    continue;
                }
                // A kick, or a vCPU that another one has started.
                Ok(VcpuExit::Intr) => continue,
                Err(e) if matches!(e.errno(), EINTR | EAGAIN) => continue,
                Err(e) => return self.failed(&format!("KVM_RUN: {e}")),
                Ok(VcpuExit::MmioWrite(at, data)) => (Some((at, data.to_vec())), String::new()),
                Ok(VcpuExit::Shutdown) => return self.failed("triple fault"),
                Ok(other) => (None, format!("{other:?}")),
            };
            // A store, or something that is none of this VMM's business: about what is protected?
            match (self.guarded.after_exit(&mut self.fd), store) {
                (Verdict::Done, _) => {}
                (Verdict::Pause, _) => return Some(End::Paused),
                (Verdict::Shutdown, _) => return Some(End::Shutdown),
                (Verdict::NotMine, Some((at, data))) => self.bus.mmio_write(at, &data),
                (Verdict::NotMine, None) => return self.failed(&what),
            }
        }
        None
    }

    fn failed(&self, what: &str) -> Option<End> {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let name = thread::current().name().unwrap_or_default().to_owned();
        Some(End::Failed(format!("{name} at rip={rip:#x}: {what}")))
    }
}

/// A thread that has panicked leaves nothing here half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
