// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Asks a companion's status socket.
//!
//! What answers may be anything, and ends up on a terminal: it is bounded, and read as a document
//! before any of it is used.

use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;
use vhost_guard::report::{FORMAT, MAX_FILES, Status};

/// How long the companion may take. It serves one client after another, for 2 seconds each.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than a document with a million ranges has.
const MAX_SIZE: usize = 256 << 20;

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error(
        "no companion listens at {} (is it running, and with this socket?)",
        .0.display()
    )]
    Nobody(PathBuf),
    #[error("cannot ask {}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is not a companion's status socket (give its --socket-path, or its --status-path)",
        .0.display()
    )]
    NotStatus(PathBuf),
    #[error(
        "{} did not answer in {} seconds: the companion is stopped or very busy, or this is not its \
         status socket",
        .0.display(),
        PATIENCE.as_secs()
    )]
    Silent(PathBuf),
    #[error("the companion tells its status in format {0}, and this is for format {FORMAT}")]
    Format(u32),
}

/// What came.
pub(crate) struct Answer {
    pub(crate) document: Vec<u8>,
    /// At most [`MAX_FILES`].
    pub(crate) files: Vec<OwnedFd>,
}

/// Asks the socket at `path`.
pub(crate) fn ask(path: &Path) -> Result<Answer, StatusError> {
    let failed = |source: io::Error| match source.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => StatusError::Nobody(path.to_owned()),
        _ => StatusError::Io {
            path: path.to_owned(),
            source,
        },
    };
    let not_status = || StatusError::NotStatus(path.to_owned());
    let stream = UnixStream::connect(path).map_err(failed)?;
    let deadline = Instant::now() + PATIENCE;
    let mut answer = Answer {
        document: Vec::new(),
        files: Vec::new(),
    };
    let mut chunk = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(StatusError::Silent(path.to_owned()));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match receive(&stream, &mut chunk, &mut answer.files) {
            Ok(0) => return Ok(answer),
            Ok(n) => answer.document.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                return Err(StatusError::Silent(path.to_owned()));
            }
            Err(e) => return Err(failed(e)),
        }
        // The other sockets greet with something else, and then wait.
        if answer.document.first() != Some(&b'{')
            || answer.document.len() > MAX_SIZE
            || answer.files.len() > MAX_FILES
        {
            return Err(not_status());
        }
    }
}

fn receive(stream: &UnixStream, chunk: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let chunk = &mut [IoSliceMut::new(chunk)];
    let received = recvmsg(stream, chunk, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            files.extend(passed);
        }
    }
    Ok(received.bytes)
}

/// Reads the document that came from `path`.
pub(crate) fn read(document: &[u8], path: &Path) -> Result<Status, StatusError> {
    #[derive(Deserialize)]
    struct Head {
        format: u32,
    }
    let not_status = |_| StatusError::NotStatus(path.to_owned());
    let Head { format } = serde_json::from_slice(document).map_err(not_status)?;
    if format != FORMAT {
        return Err(StatusError::Format(format));
    }
    serde_json::from_slice(document).map_err(not_status)
}
