// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The status socket: whoever connects is sent one [`Status`] and the connection is closed.
//!
//! Nothing is read from clients, so there is nothing that one of them could ask for. They are
//! served one after another by one thread, and none for longer than [`PATIENCE`]. No lock is held
//! while a document is made or sent. Guest memory comes with it for those who could get at it
//! anyway: root, and the companion's own user.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
use rustix::process::geteuid;

use super::memory::{MAX_FILES, Shared, share};
use super::{Snapshot, Status};
use crate::log_limit::{LogLimit, log_limited};

/// How long a client may take to read.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// How long to leave the listener alone when there is no descriptor left for a connection.
const RETRY: Duration = Duration::from_secs(1);

static FAILED: LogLimit = LogLimit::new(3);

/// Serves the status socket. `ask` is called once for each client.
pub(crate) fn serve(listener: &UnixListener, ask: impl Fn() -> Snapshot) -> ! {
    loop {
        let served = listener.accept().map(|(stream, _)| {
            // A client that is gone, or does not read, has itself to blame.
            let _ = answer(&stream, &ask());
        });
        match served {
            Ok(()) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) => {}
            Err(e) => {
                log_limited!(FAILED, Warn, "status: cannot accept a connection: {e}");
                thread::sleep(RETRY);
            }
        }
    }
}

fn answer(stream: &UnixStream, snapshot: &Snapshot) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut status = Status::from(snapshot);
    if may_read_memory(stream) {
        let Shared {
            pieces,
            files,
            left_out,
        } = share(&snapshot.memory);
        status.memory = Some(pieces);
        status.memory_left_out = Some(left_out);
        let bytes = document(&status);
        match send_with(stream, &bytes, &files, deadline) {
            Ok(sent) => return send(stream, &bytes[sent..], deadline),
            // Too many descriptors wait in sockets of clients that do not read, or may not be passed.
            Err(Errno::TOOMANYREFS | Errno::PERM | Errno::ACCESS | Errno::NOMEM) => {}
            Err(e) => return Err(e.into()),
        }
        status.memory = Some(Vec::new());
        status.memory_left_out = Some(snapshot.memory.len() as u64);
    }
    send(stream, &document(&status), deadline)
}

/// Guest memory has the guest's secrets.
fn may_read_memory(stream: &UnixStream) -> bool {
    let peer = sockopt::socket_peercred(stream);
    peer.is_ok_and(|peer| peer.uid.is_root() || peer.uid == geteuid())
}

fn document(status: &Status) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(status).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Sends the first bytes, and `files` with them. Tells how many.
fn send_with(
    stream: &UnixStream,
    bytes: &[u8],
    files: &[File],
    deadline: Instant,
) -> rustix::io::Result<usize> {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(Errno::TOOMANYREFS);
        }
        wait_until(stream, deadline).map_err(|_| Errno::TIMEDOUT)?;
        let sent = sendmsg(
            stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        if sent != Err(Errno::INTR) {
            return sent;
        }
    }
}

fn send(mut stream: &UnixStream, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        wait_until(stream, deadline)?;
        match stream.write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Has the next write end at `deadline`, if that is not over.
fn wait_until(stream: &UnixStream, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    stream.set_write_timeout(Some(left))
}
