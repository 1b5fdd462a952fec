// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The owner of a VM in the device's own process: an enforcer that keeps a table and nothing else,
//! and speaks by a thread of its own, as the device asks of one.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;

use vhost_guard::device::Device;
use vhost_guard::protect::{self, Demand, Deny, Table};
use vhost_guard::vm::enforcer::{
    Accelerator, Enforcer, InForce, MsrInfo, Outcome, Policy, VmEvents, VmInfo,
};

use super::vm_guard::Range;
use super::{DEADLINE, IMMUTABLE};

type Act = Box<dyn FnOnce(&dyn VmEvents) + Send>;

/// What the thread is to do, in order.
enum Message {
    CatchUp(u64),
    State(u64),
    Order(Order),
    Act(Act),
}

/// An order that is to be carried out.
#[derive(Clone, Debug)]
pub struct Order {
    pub seq: u64,
    pub generation: u64,
    pub demand: Demand,
}

impl Order {
    /// As the control channel has them.
    pub fn ranges(&self) -> Vec<Range> {
        let Demand::Pages(order) = &self.demand else {
            panic!("{self:?}");
        };
        let lock = if matches!(order, protect::Order::Lock(_)) {
            IMMUTABLE
        } else {
            0
        };
        let entries = order.entries().iter();
        entries
            .map(|p| {
                let (start, end) = (p.range.start().number(), p.range.end().number());
                (start, end, p.attributes.bits() | lock)
            })
            .collect()
    }
}

pub struct Owner {
    messages: Sender<Message>,
    orders: Mutex<Receiver<Order>>,
    vm: Arc<Mutex<Vm>>,
}

struct Vm {
    generation: u64,
    table: Table,
    /// Carries orders out as they come, instead of handing them to the test.
    by_itself: bool,
    carried_out: u64,
}

impl Vm {
    /// Carries an order out.
    fn carry_out(&mut self, order: &Order) -> Outcome {
        self.carried_out += 1;
        let planned = match &order.demand {
            Demand::Pages(order) => self.table.plan(order),
            Demand::Seal => Ok(self.table.seal()),
            Demand::Msrs(_) => panic!("{order:?}"),
        };
        let (status, index) = match planned {
            Ok(change) => {
                self.table.apply(&change);
                (0, None)
            }
            Err(loosens) => (1, Some(loosens.index as u32)),
        };
        self.outcome(status, index)
    }

    fn outcome(&self, status: u32, index: Option<u32>) -> Outcome {
        Outcome {
            status,
            index,
            generation: self.generation,
            ranges_in_force: self.table.len() as u32,
            msr_ranges_in_force: 0,
        }
    }
}

impl Owner {
    /// A device with its owner, who has not said anything yet.
    pub fn silent() -> (Arc<Self>, Arc<Device>) {
        let (messages, inbox) = mpsc::channel();
        let (to_test, orders) = mpsc::channel();
        let vm = Vm {
            generation: 1,
            table: Table::default(),
            by_itself: false,
            carried_out: 0,
        };
        let owner = Arc::new(Self {
            messages,
            orders: Mutex::new(orders),
            vm: Arc::new(Mutex::new(vm)),
        });
        let device = Device::new(owner.clone(), None, None);
        let (vm, events) = (Arc::clone(&owner.vm), Arc::downgrade(&device));
        thread::spawn(move || run(&inbox, &to_test, &vm, &events));
        (owner, device)
    }

    /// The same, of a VM that can deny and watch everything.
    pub fn able() -> (Arc<Self>, Arc<Device>) {
        let (owner, device) = Self::silent();
        owner.connect();
        (owner, device)
    }

    pub fn connect(&self) {
        self.act(|events| {
            events.connected(VmInfo {
                accelerator: Accelerator::Kvm,
                deny: Deny::all(),
                audit: Deny::all(),
                policy: Policy::Inject,
                generation: 1,
                max_ranges: 1000,
                max_request_ranges: 4096,
                msrs: MsrInfo::default(),
            });
            events.state(0, 1, InForce::default()).unwrap();
        });
    }

    fn vm(&self) -> MutexGuard<'_, Vm> {
        self.vm.lock().unwrap()
    }

    pub fn by_itself(&self) {
        self.vm().by_itself = true;
    }

    pub fn carried_out(&self) -> u64 {
        self.vm().carried_out
    }

    pub fn act(&self, act: impl FnOnce(&dyn VmEvents) + Send + 'static) {
        self.messages.send(Message::Act(Box::new(act))).unwrap();
    }

    /// Waits until all that was to be said so far is said.
    pub fn settle(&self) {
        let (done, wait) = mpsc::channel();
        self.act(move |_| done.send(()).unwrap());
        wait.recv_timeout(DEADLINE).unwrap();
    }

    /// The next order that comes.
    pub fn order(&self) -> Order {
        let orders = self.orders.lock().unwrap();
        orders.recv_timeout(DEADLINE).expect("an order")
    }

    pub fn try_order(&self) -> Option<Order> {
        self.orders.lock().unwrap().try_recv().ok()
    }

    pub fn succeed(&self, order: &Order) {
        let outcome = self.vm().carry_out(order);
        assert_eq!(outcome.status, 0);
        self.answer(order, outcome);
    }

    pub fn refuse(&self, order: &Order, status: u32, index: Option<u32>) {
        let outcome = self.vm().outcome(status, index);
        self.answer(order, outcome);
    }

    fn answer(&self, order: &Order, outcome: Outcome) {
        let seq = order.seq;
        self.act(move |events| events.result(seq, outcome).unwrap());
    }

    /// The VM is reset.
    pub fn reset(&self) {
        let mut vm = self.vm();
        vm.generation += 1;
        vm.table = Table::default();
        let generation = vm.generation;
        drop(vm);
        self.act(move |events| events.reset(generation));
    }
}

impl Enforcer for Owner {
    fn carry_out(&self, seq: u64, generation: u64, demand: &Demand) {
        let order = Order {
            seq,
            generation,
            demand: demand.clone(),
        };
        self.messages.send(Message::Order(order)).unwrap();
    }

    fn request_state(&self, seq: u64) {
        self.messages.send(Message::State(seq)).unwrap();
    }

    fn catch_up(&self, seq: u64) {
        self.messages.send(Message::CatchUp(seq)).unwrap();
    }
}

/// Until the device is gone.
fn run(inbox: &Receiver<Message>, to_test: &Sender<Order>, vm: &Mutex<Vm>, device: &Weak<Device>) {
    for message in inbox {
        let Some(events) = device.upgrade() else {
            return;
        };
        match message {
            Message::CatchUp(seq) => events.caught_up(seq),
            Message::Act(act) => act(&*events),
            Message::State(seq) => {
                let vm = vm.lock().unwrap();
                let told = InForce {
                    pages: vm.table.clone(),
                    ..InForce::default()
                };
                let generation = vm.generation;
                drop(vm);
                events.state(seq, generation, told).unwrap();
            }
            Message::Order(order) => {
                let mut vm = vm.lock().unwrap();
                if vm.by_itself {
                    let outcome = vm.carry_out(&order);
                    drop(vm);
                    events.result(order.seq, outcome).unwrap();
                } else {
                    let _ = to_test.send(order);
                }
            }
        }
    }
}
