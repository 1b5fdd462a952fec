// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The status socket: whoever connects is sent one [`Status`] and the connection is closed.
//!
//! Nothing is read from clients, so there is nothing that one of them could ask for. They are
//! served one after another by one thread, and none for longer than [`PATIENCE`]. No lock is held
//! while a document is made or sent.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use super::{Snapshot, Status};
use crate::log_limit::{LogLimit, log_limited};

/// How long a client may take to read.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long to leave the listener alone when there is no descriptor left for a connection.
const RETRY: Duration = Duration::from_secs(1);

static FAILED: LogLimit = LogLimit::new(3);

/// Serves the status socket. `ask` is called once for each client.
pub fn serve(listener: &UnixListener, ask: impl Fn() -> Snapshot) -> ! {
    loop {
        let served = listener.accept().map(|(stream, _)| {
            // A client that is gone, or does not read, has itself to blame.
            let _ = send(&stream, &document(&ask()));
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

fn document(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(&Status::from(snapshot)).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn send(mut stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut rest = bytes;
    while !rest.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
