// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptors that come in as bare numbers: unsafe code, and nothing else.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::net::{AddressFamily, SocketType, sockopt};

/// Takes over a listening UNIX stream socket that was passed to this process as number `raw`.
///
/// To be called once for a number, before this process opens anything of its own.
///
/// # Errors
///
/// The number is not open, or not such a socket.
pub fn adopt_listener(raw: RawFd) -> io::Result<UnixListener> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    if raw <= 2 {
        return Err(invalid("it is not above 2, where standard streams end"));
    }
    // SAFETY: `raw` is not -1. It is only asked for its flags, and may be closed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    rustix::io::fcntl_getfd(borrowed)?;
    let listens = sockopt::socket_acceptconn(borrowed)?;
    if sockopt::socket_domain(borrowed)? != AddressFamily::UNIX
        || sockopt::socket_type(borrowed)? != SocketType::STREAM
        || !listens
    {
        return Err(invalid("it is not a listening UNIX stream socket"));
    }
    // SAFETY: `raw` is open, and whoever started this process passed it for this use; nothing else
    // in this process has been given it.
    Ok(unsafe { UnixListener::from_raw_fd(raw) })
}

/// Takes over the descriptor of an exit event that `vhost-user-backend` 0.24.0 leaks with every
/// daemon (`VringEpollHandler::new` calls `into_raw_fd` and forgets the number). To be called once
/// the daemon is gone. `Cargo.toml` pins that version: in one that closes it, this must go.
pub(crate) fn adopt_leaked_by_exit_event(raw: RawFd) -> OwnedFd {
    // SAFETY: the number was that of an EventConsumer which the crate has turned into a bare
    // number and dropped, so it is open and nobody owns it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
