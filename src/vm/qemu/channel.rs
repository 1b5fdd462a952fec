// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control channel's socket: one thread, one `epoll`, at most one QEMU.
//!
//! It moves whole messages between QEMU and [`VmEvents`] and knows nothing of what they mean. No
//! read or write here blocks, so a peer that stops half-way through a message delays nobody but
//! itself; no lock is held while [`VmEvents`] is called.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::encode;
use super::session::{OutOfPlace, POLICY_SEQ, Session};
use super::wire::{HEADER_SIZE, Header, Message, WireError};
use crate::log_limit::{Chain, LogLimit, log_limited};
use crate::protect::Demand;
use crate::protect::msr::Policy;
use crate::vm::enforcer::{Enforcer, VmEvents};

const LISTENER: u64 = 0;
const CONNECTION: u64 = 1;
const OUTBOX: u64 = 2;

/// Bytes taken from the socket in one go.
const READ_SIZE: usize = 64 << 10;
/// Most of them before something else gets its turn.
const MOST_READS: u32 = 64;
/// How long to leave the listener alone when there is no descriptor left for a connection.
const ACCEPT_RETRY_MS: i32 = 1000;

static CLOSED: LogLimit = LogLimit::new(10);
static SECOND: LogLimit = LogLimit::new(3);
static ACCEPT: LogLimit = LogLimit::new(3);

/// Why the channel cannot go on at all.
#[derive(Debug, thiserror::Error)]
#[error("control channel: {what}")]
pub struct ChannelError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// Why one connection was closed.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error("QEMU has closed it")]
    ByPeer,
    #[error("it broke")]
    Io(#[source] io::Error),
    #[error("QEMU sent what the specification does not allow")]
    Wire(#[from] WireError),
    #[error(transparent)]
    OutOfPlace(#[from] OutOfPlace),
}

/// Messages on their way to QEMU. The way in for other threads.
#[derive(Debug)]
pub(crate) struct Outbox {
    bytes: Mutex<Vec<u8>>,
    catch_up: Mutex<Option<u64>>,
    wake: EventFd,
}

impl Outbox {
    /// An empty outbox.
    ///
    /// # Errors
    ///
    /// No descriptor is left.
    pub(crate) fn new() -> Result<Self, ChannelError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| ChannelError {
            what: "cannot create an eventfd",
            source,
        })?;
        Ok(Self {
            bytes: Mutex::default(),
            catch_up: Mutex::default(),
            wake,
        })
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, message: &[u8]) {
        self.bytes().extend_from_slice(message);
        self.wake();
    }

    fn catch_up(&self) -> MutexGuard<'_, Option<u64>> {
        self.catch_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is about to wake anyway.
        let _ = self.wake.write(1);
    }
}

// What waits here is bounded by Enforcer's rule: one order and one GET_STATE at a time.
impl Enforcer for Outbox {
    fn carry_out(&self, seq: u64, generation: u64, demand: &Demand) {
        self.post(&encode::encode_demand(seq, generation, demand));
    }

    fn request_state(&self, seq: u64) {
        self.post(&encode::encode_get_state(seq));
    }

    fn catch_up(&self, seq: u64) {
        *Outbox::catch_up(self) = Some(seq);
        self.wake();
    }
}

/// Serves the control channel on `listener`, and gives each QEMU that connects the host's `policy`
/// for its MSRs, if there is one.
///
/// # Errors
///
/// Returns only when the channel cannot go on at all.
pub(crate) fn serve(
    listener: UnixListener,
    outbox: &Outbox,
    events: &Arc<dyn VmEvents>,
    policy: Option<&Policy>,
) -> Result<std::convert::Infallible, ChannelError> {
    Server::new(listener, outbox, events.as_ref(), policy)?.run()
}

struct Server<'a> {
    epoll: Epoll,
    listener: UnixListener,
    listening: bool,
    connection: Option<Connection>,
    /// Somebody waits until all that has arrived is handed over.
    catching_up: Option<u64>,
    outbox: &'a Outbox,
    events: &'a dyn VmEvents,
    policy: Option<&'a Policy>,
}

struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    session: Session,
}

impl<'a> Server<'a> {
    fn new(
        listener: UnixListener,
        outbox: &'a Outbox,
        events: &'a dyn VmEvents,
        policy: Option<&'a Policy>,
    ) -> Result<Self, ChannelError> {
        let failed = |what| move |source| ChannelError { what, source };
        listener
            .set_nonblocking(true)
            .map_err(failed("cannot set up the listener"))?;
        let epoll = Epoll::new().map_err(failed("cannot create an epoll instance"))?;
        let wake = EpollEvent::new(EventSet::IN, OUTBOX);
        epoll
            .ctl(ControlOperation::Add, outbox.wake.as_raw_fd(), wake)
            .map_err(failed("cannot watch the outbox"))?;
        let mut server = Self {
            epoll,
            listener,
            listening: false,
            connection: None,
            catching_up: None,
            outbox,
            events,
            policy,
        };
        server.listen(true)?;
        Ok(server)
    }

    fn listen(&mut self, on: bool) -> Result<(), ChannelError> {
        if on != self.listening {
            let operation = if on {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            self.epoll
                .ctl(operation, self.listener.as_raw_fd(), event)
                .map_err(|source| ChannelError {
                    what: "cannot watch the listener",
                    source,
                })?;
            self.listening = on;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<std::convert::Infallible, ChannelError> {
        let mut ready = [EpollEvent::default(); 4];
        loop {
            let timeout = if self.listening { -1 } else { ACCEPT_RETRY_MS };
            let count = match self.epoll.wait(timeout, &mut ready) {
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(ChannelError {
                        what: "cannot wait for events",
                        source,
                    });
                }
            };
            let is_ready = |token| ready[..count].iter().any(|e| e.data() == token);
            if is_ready(OUTBOX) {
                let _ = self.outbox.wake.read();
                self.catching_up = self.outbox.catch_up().take().or(self.catching_up);
            }
            if is_ready(LISTENER) || count == 0 {
                // A QEMU that connects again closed its old socket before: see that first.
                self.step(Connection::receive_all);
                self.accept()?;
            } else if self.catching_up.is_some() {
                self.step(Connection::receive_all);
            } else if is_ready(CONNECTION) {
                self.step(|connection, events| connection.receive(events).map(drop));
            }
            // The rest of a message that is half there was said before as well.
            let half = self
                .connection
                .as_ref()
                .is_some_and(|c| !c.input.is_empty());
            if let Some(seq) = self.catching_up.take_if(|_| !half) {
                self.events.caught_up(seq);
            }
            let outbox = self.outbox;
            self.step(|connection, _| connection.send(outbox));
            self.watch()?;
        }
    }

    fn accept(&mut self) -> Result<(), ChannelError> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if is_transient(&e) || e.kind() == ErrorKind::ConnectionAborted => {
                return self.listen(true);
            }
            Err(e) => {
                log_limited!(
                    ACCEPT,
                    Warn,
                    "control channel: cannot accept a connection: {e}"
                );
                return self.listen(false);
            }
        };
        self.listen(true)?;
        if self.connection.is_some() {
            log_limited!(
                SECOND,
                Warn,
                "control channel: closed a second connection: one QEMU only"
            );
            return Ok(());
        }
        let event = EpollEvent::new(EventSet::IN, CONNECTION);
        if let Err(e) = stream.set_nonblocking(true).and_then(|()| {
            self.epoll
                .ctl(ControlOperation::Add, stream.as_raw_fd(), event)
        }) {
            log_limited!(
                ACCEPT,
                Warn,
                "control channel: cannot set up a connection: {e}"
            );
            return Ok(());
        }
        self.connection = Some(Connection {
            stream,
            input: Vec::new(),
            output: encode::encode_hello(self.policy.map(|policy| (POLICY_SEQ, policy))),
            session: Session::new(self.policy),
        });
        Ok(())
    }

    /// Does something with the connection, and closes it if that fails.
    fn step(&mut self, work: impl FnOnce(&mut Connection, &dyn VmEvents) -> Result<(), Closed>) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let Err(reason) = work(connection, self.events) else {
            return;
        };
        match reason {
            Closed::ByPeer => log_limited!(CLOSED, Info, "control channel closed: {reason}"),
            _ => log_limited!(CLOSED, Warn, "control channel closed: {}", Chain(&reason)),
        }
        self.connection = None;
        // In this order: once told, the other side posts nothing more.
        self.events.disconnected();
        self.outbox.bytes().clear();
    }

    /// Waits for room in the socket only while something waits for it.
    fn watch(&mut self) -> Result<(), ChannelError> {
        let Some(connection) = &self.connection else {
            return Ok(());
        };
        let mut set = EventSet::IN;
        set.set(EventSet::OUT, !connection.output.is_empty());
        let event = EpollEvent::new(set, CONNECTION);
        self.epoll
            .ctl(
                ControlOperation::Modify,
                connection.stream.as_raw_fd(),
                event,
            )
            .map_err(|source| ChannelError {
                what: "cannot watch the connection",
                source,
            })
    }
}

impl From<io::Error> for Closed {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            // A QEMU that ends without having read everything.
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::ByPeer,
            _ => Self::Io(e),
        }
    }
}

impl Connection {
    /// Takes what has arrived, at most [`READ_SIZE`] bytes so that a talkative peer cannot keep
    /// the thread; the rest makes the socket readable again. Returns whether there was anything.
    fn receive(&mut self, events: &dyn VmEvents) -> Result<bool, Closed> {
        let mut chunk = [0; READ_SIZE];
        let n = match self.stream.read(&mut chunk) {
            Ok(0) => return Err(Closed::ByPeer),
            Ok(n) => n,
            Err(e) if is_transient(&e) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        self.input.extend_from_slice(&chunk[..n]);
        let mut input = self.input.as_slice();
        while let Some((message, rest)) = split_message(input)? {
            self.session.take(message, events)?;
            input = rest;
        }
        let done = self.input.len() - input.len();
        self.input.drain(..done);
        Ok(true)
    }

    /// Takes all that has arrived, within the bounds of what a socket buffer holds.
    fn receive_all(&mut self, events: &dyn VmEvents) -> Result<(), Closed> {
        for _ in 0..MOST_READS {
            if !self.receive(events)? {
                break;
            }
        }
        Ok(())
    }

    fn send(&mut self, outbox: &Outbox) -> Result<(), Closed> {
        self.output.append(&mut outbox.bytes());
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Cuts the first message off `input`, or `None` if it is not complete yet.
fn split_message(input: &[u8]) -> Result<Option<(Message, &[u8])>, WireError> {
    let Some((header, rest)) = input.split_first_chunk::<HEADER_SIZE>() else {
        return Ok(None);
    };
    let header = Header::decode(header)?;
    let Some((payload, rest)) = rest.split_at_checked(header.payload_len()) else {
        return Ok(None);
    };
    Ok(Some((Message::decode(&header, payload)?, rest)))
}

fn is_transient(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
