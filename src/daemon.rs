// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ties the device to its sockets: a thread for the control channel, one for the status socket, and
//! the loop that serves one vhost-user connection after another.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::device::Device;
use crate::device::backend::{AGAIN, Backend};
use crate::log_limit::{Chain, LogLimit, log_limited};
use crate::msr_policy::PolicyFile;
use crate::report::{Witness, status};
use crate::vm::enforcer::VmEvents;
pub use crate::vm::qemu::channel::ChannelError;
use crate::vm::qemu::channel::{self, Outbox};

static CONNECTIONS: LogLimit = LogLimit::new(10);

/// How long to wait when there are no descriptors or threads left for a connection.
const RETRY: Duration = Duration::from_secs(1);

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The control channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No thread is to be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A thread met a bug of this program.
    #[error("the {0} thread panicked (please report it, with the log)")]
    Panicked(&'static str),
}

/// Why one connection could not be served.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("cannot set up a connection")]
    Setup(#[source] io::Error),
    // That type is no std::error::Error, so it cannot be a source.
    #[error("cannot serve a connection: {0}")]
    Serve(vhost_user_backend::Error),
}

/// Where a daemon listens.
#[derive(Debug)]
pub struct Listeners {
    /// For QEMU's vhost-user front end.
    pub front_end: UnixListener,
    /// For QEMU's `vm-guard` object.
    pub control: UnixListener,
    /// For whoever wants to know what is in force.
    pub status: Option<UnixListener>,
}

/// Serves a device on its sockets, has `policy` put in force in each VM, and tells `witness` of
/// each violation.
///
/// # Errors
///
/// Returns only if something fails without which nothing can be served.
pub fn run(
    listeners: Listeners,
    policy: Option<Arc<PolicyFile>>,
    witness: Option<Arc<dyn Witness>>,
) -> Result<Infallible, DaemonError> {
    let Listeners {
        front_end,
        control,
        status,
    } = listeners;
    let outbox = Arc::new(Outbox::new()?);
    let device = Device::new(outbox.clone(), policy.clone(), witness);
    let events: Arc<dyn VmEvents> = device.clone();
    let (ended, first_end) = mpsc::channel();
    spawn("control-channel", ended.clone(), move || {
        let policy = policy.as_deref().map(PolicyFile::policy);
        let Err(e) = channel::serve(control, &outbox, &events, policy);
        e.into()
    })?;
    if let Some(status) = status {
        let device = device.clone();
        spawn("status", ended.clone(), move || {
            status::serve(&status, || device.snapshot())
        })?;
    }
    spawn("front-ends", ended, move || {
        serve_front_ends(&device, front_end)
    })?;
    // None returns while all is well. Without one of the first two the other is of no use, and the
    // end of the third is a bug that is to be seen.
    Err(first_end.recv().unwrap_or(DaemonError::Panicked("daemon")))
}

/// Starts a thread that tells how it ended, even if it panicked.
fn spawn(
    name: &'static str,
    ended: mpsc::Sender<DaemonError>,
    body: impl FnOnce() -> DaemonError + Send + 'static,
) -> Result<(), DaemonError> {
    thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let end = panic::catch_unwind(AssertUnwindSafe(body));
            let _ = ended.send(end.unwrap_or(DaemonError::Panicked(name)));
        })
        .map(drop)
        .map_err(DaemonError::Thread)
}

fn serve_front_ends(device: &Arc<Device>, front_end: UnixListener) -> ! {
    let mut listener = Listener::from(front_end);
    loop {
        if let Err(e) = serve_one(device, &mut listener) {
            log_limited!(CONNECTIONS, Error, "vhost-user: {}", Chain(&e));
            thread::sleep(RETRY);
        }
    }
}

/// Waits for a connection and serves it until it ends. A daemon of the crate is good for one.
fn serve_one(device: &Arc<Device>, listener: &mut Listener) -> Result<(), ConnectionError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Backend::new(device.clone(), memory.clone()).map_err(ConnectionError::Setup)?;
    let backend = Arc::new(backend);
    let mut daemon = VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory)
        .map_err(ConnectionError::Serve)?;
    for handler in daemon.get_epoll_handlers() {
        handler
            .register_listener(backend.again(), EventSet::IN, AGAIN)
            .map_err(ConnectionError::Setup)?;
    }
    let served = daemon.start(listener).and_then(|()| {
        log_limited!(CONNECTIONS, Info, "vhost-user: front end connected");
        if let Some(connection) = daemon.shutdown_handle() {
            backend.watch_worker(connection);
        }
        daemon.wait()
    });
    backend.closing();
    let worker_died = backend.worker_died();
    // Only now is the device rid of this connection, and may say so.
    drop((daemon, backend));
    if worker_died {
        log_limited!(
            CONNECTIONS,
            Error,
            "vhost-user: the thread that serves the queues has died; closed the connection, so \
             that QEMU connects again"
        );
    }
    match served {
        Ok(()) => {}
        Err(vhost_user_backend::Error::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => {}
        Err(vhost_user_backend::Error::HandleRequest(e)) => {
            log_limited!(CONNECTIONS, Warn, "vhost-user: connection closed: {e}");
        }
        Err(e) => return Err(ConnectionError::Serve(e)),
    }
    log_limited!(
        CONNECTIONS,
        Info,
        "vhost-user: front end disconnected; waiting for the next"
    );
    Ok(())
}
