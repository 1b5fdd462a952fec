// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One virtqueue as the device uses it: pop without spinning, give back, tell the guest.
//!
//! Everything in a ring is the guest's and may be nonsense. A ring that makes no sense is left
//! alone, with one log line, until a kick finds it in order or it is started anew.

use std::fmt;
use std::io;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, Permissions};

use super::chain::{Answer, Chain, Malformed};
use super::guarded::Guarded;
use super::wire::{MAX_DESCRIPTORS, QUEUE_SIZE};
use crate::log_limit::{LogLimit, log_limited};
use crate::protect::Table;

static BROKEN: LogLimit = LogLimit::new(5);

/// What is wrong with a ring.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("it lies outside guest memory")]
    Outside,
    #[error("avail.idx is further ahead than the queue is long")]
    Index,
    #[error("its avail ring does not hold what avail.idx says")]
    Unreadable,
    #[error("its avail ring names descriptor {0}, which it does not have")]
    Head(u16),
    #[error("its used ring cannot be written")]
    Used,
    #[error("its used ring lies in a locked page")]
    Locked,
    #[error("its descriptors or its avail ring lie in a page that may not be read")]
    Hidden,
}

/// What a turn on a ring leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing, until a kick or a result.
    Nothing,
    /// More chains, when others have had their turn.
    Chains,
}

/// Where a front end keeps a queue, and how it reaches the driver. It may be started and stopped
/// there while nobody looks; who stops it says so by `Device::stop`.
pub(super) trait Vring: Send {
    /// Another handle of the same.
    fn share(&self) -> Box<dyn Vring>;

    /// Takes its lock, for as long as the result lives. Who calls may hold the device's lock, so
    /// who holds this one may not ask for that.
    fn lock(&self) -> Box<dyn LockedVring + '_>;
}

/// A [`Vring`] whose lock is held.
pub(super) trait LockedVring {
    /// Whether it is started and enabled.
    fn runs(&self) -> bool;

    fn queue_mut(&mut self) -> &mut Queue;

    /// Whether there is somebody to be interrupted.
    fn has_call(&self) -> bool;

    /// Interrupts the guest, if there is somebody to be interrupted. Does not wait.
    fn call(&self) -> io::Result<()>;
}

/// A ring of the connection.
pub(super) struct Ring {
    name: &'static str,
    vring: Box<dyn Vring>,
    /// Nothing was done with it since it was started.
    fresh: bool,
    broken: bool,
}

/// A ring that runs, with its lock held.
pub(super) struct Turn<'a> {
    queue: &'a mut Queue,
    guest: &'a Guarded<'a>,
    /// How many more chains may be popped before others get their turn.
    budget: usize,
    gave_back: bool,
}

/// A chain and where it was found.
pub(super) struct Popped<'a> {
    /// Its place in the avail ring.
    pub(super) position: u16,
    pub(super) head: u16,
    pub(super) chain: DescriptorChain<&'a Guarded<'a>>,
}

impl Ring {
    pub(super) fn new(name: &'static str, vring: Box<dyn Vring>) -> Self {
        Self {
            name,
            vring,
            fresh: true,
            broken: false,
        }
    }

    /// Whether the front end has started it.
    pub(super) fn runs(&self) -> bool {
        self.vring.lock().runs()
    }

    /// Does `work` with the ring, if it runs, and interrupts the guest if that is due.
    pub(super) fn turn(
        &mut self,
        memory: &GuestMemoryAtomic<GuestMemoryMmap>,
        table: &Table,
        work: impl FnOnce(&mut Turn<'_>) -> Result<Left, Fault>,
    ) -> Left {
        let mut vring = self.vring.lock();
        if !vring.runs() {
            return Left::Nothing;
        }
        let memory = memory.memory();
        let guest = Guarded::new(&memory, table);
        let mut turn = Turn::new(vring.queue_mut(), &guest);
        let outcome = if self.fresh && !turn.queue.is_valid(guest.memory()) {
            Err(Fault::Outside)
        } else {
            turn.check_rights().and_then(|()| work(&mut turn))
        };
        let gave_back = turn.gave_back;
        // A companion that was killed may have given chains back and not said so. One interrupt
        // too many does no harm.
        let announce = self.fresh && vring.has_call();
        let queue = vring.queue_mut();
        let due = gave_back && queue.needs_notification(&guest).unwrap_or(true);
        if (due || announce)
            && let Err(e) = vring.call()
        {
            log_limited!(
                BROKEN,
                Warn,
                "{} queue: cannot interrupt the guest: {e}",
                self.name
            );
        }
        if announce {
            self.fresh = false;
        }
        match outcome {
            Ok(left) => {
                if std::mem::take(&mut self.broken) {
                    log_limited!(BROKEN, Info, "{} queue is in order again", self.name);
                }
                left
            }
            Err(fault) => {
                if !std::mem::replace(&mut self.broken, true) {
                    log_limited!(
                        BROKEN,
                        Warn,
                        "{} queue is broken by the guest: {fault}; left alone until that is mended",
                        self.name
                    );
                }
                // So that a guest that mends it can say so. If that fails too, nothing is lost. It
                // writes to the used ring and reads the avail ring.
                if !matches!(fault, Fault::Locked | Fault::Hidden) {
                    let _ = vring.queue_mut().enable_notification(&guest);
                }
                Left::Nothing
            }
        }
    }

    /// The ring was stopped. Chains from `position` on were not served: what pops next, here or
    /// after a SET_VRING_BASE with what GET_VRING_BASE now tells, is the first of them.
    pub(super) fn stopped(&mut self, position: Option<u16>) {
        if let Some(position) = position {
            self.vring.lock().queue_mut().set_next_avail(position);
        }
        self.fresh = true;
        self.broken = false;
    }
}

impl<'a> Turn<'a> {
    pub(super) fn new(queue: &'a mut Queue, guest: &'a Guarded<'a>) -> Self {
        Self {
            queue,
            guest,
            budget: usize::from(QUEUE_SIZE),
            gave_back: false,
        }
    }

    /// Takes a chain apart. A long one uses up the turn faster, so that a guest with chains of
    /// 65535 descriptors does not keep others waiting for longer than one of them takes.
    pub(super) fn walk(
        &mut self,
        chain: DescriptorChain<&Guarded<'_>>,
        answer_size: usize,
    ) -> Result<Chain, Malformed> {
        let mut descriptors = 0;
        let counted = chain.inspect(|_| descriptors += 1);
        let walked = Chain::walk(self.guest, counted, answer_size);
        self.spend(descriptors / MAX_DESCRIPTORS);
        walked
    }

    /// Guest memory, as far as the guest may use it.
    pub(super) fn guest(&self) -> &'a Guarded<'a> {
        self.guest
    }

    /// What was done took as long as so many more chains.
    pub(super) fn spend(&mut self, chains: usize) {
        self.budget = self.budget.saturating_sub(chains);
    }

    /// Writes an answer, unless it would go to a page that was locked since the chain was taken
    /// apart, or is not there any more.
    pub(super) fn write(&self, answer: &Answer, bytes: &[u8]) -> bool {
        answer.write(self.guest, bytes)
    }

    /// Whether the guest may itself do with its ring what is about to be done for it. Without
    /// this the first access would fail just as well, but say less.
    ///
    /// For `n` entries there are 16 * n bytes of descriptors, 6 + 2 * n of avail ring and
    /// 6 + 8 * n of used ring (virtio 1.3, 2.7).
    fn check_rights(&self) -> Result<(), Fault> {
        let n = usize::from(self.queue.size());
        let allows = |at, len, access| self.guest.allows(GuestAddress(at), len, access);
        if !allows(self.queue.used_ring(), 6 + 8 * n, Permissions::Write) {
            return Err(Fault::Locked);
        }
        if !allows(self.queue.desc_table(), 16 * n, Permissions::Read)
            || !allows(self.queue.avail_ring(), 6 + 2 * n, Permissions::Read)
        {
            return Err(Fault::Hidden);
        }
        Ok(())
    }

    /// Pops chains and hands each to `take`, until `take` wants no more, none is left, or it is
    /// somebody else's turn. `take` returns whether it wants another.
    ///
    /// # Errors
    ///
    /// The ring makes no sense. It ends at once then; and what makes sense uses up the turn, so a
    /// guest cannot make it spin.
    pub(super) fn drain(
        &mut self,
        mut take: impl FnMut(&mut Self, Popped<'a>) -> Result<bool, Fault>,
    ) -> Result<Left, Fault> {
        loop {
            self.queue
                .disable_notification(self.guest)
                .map_err(|_| Fault::Used)?;
            while let Some(popped) = self.pop()? {
                self.spend(1);
                if !take(self, popped)? {
                    return Ok(Left::Nothing);
                }
                if self.budget == 0 {
                    return Ok(Left::Chains);
                }
            }
            let more = self
                .queue
                .enable_notification(self.guest)
                .map_err(|_| Fault::Used)?;
            if !more {
                return Ok(Left::Nothing);
            }
            // A chain came just now, and the driver may not kick for it. Or the guest plays with
            // avail.idx: that costs it its turn.
            self.spend(1);
            if self.budget == 0 {
                return Ok(Left::Chains);
            }
        }
    }

    fn pop(&mut self) -> Result<Option<Popped<'a>>, Fault> {
        let position = self.queue.next_avail();
        let available = self
            .queue
            .avail_idx(self.guest, Ordering::Acquire)
            .map_err(|_| Fault::Unreadable)?;
        if available.0 == position {
            return Ok(None);
        }
        let mut chains = self.queue.iter(self.guest).map_err(|_| Fault::Index)?;
        let chain = chains.next().ok_or(Fault::Unreadable)?;
        let head = chain.head_index();
        if head >= self.queue.size() {
            self.queue.set_next_avail(position);
            return Err(Fault::Head(head));
        }
        Ok(Some(Popped {
            position,
            head,
            chain,
        }))
    }

    /// Gives a chain back to the driver, with `len` bytes written.
    pub(super) fn give_back(&mut self, head: u16, len: usize) -> Result<(), Fault> {
        self.gave_back = true;
        self.queue
            .add_used(self.guest, head, len as u32)
            .map_err(|_| Fault::Used)
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("name", &self.name)
            .field("fresh", &self.fresh)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}
