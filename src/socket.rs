// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The listening sockets that this process makes itself: safe against a second instance, against
//! what a killed one left behind, and against deleting what is not a socket.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process serves this path.
    #[error(
        "{} is already in use by a running process (stop it, or choose another path)",
        .0.display()
    )]
    InUse(PathBuf),
    /// Something that is not a socket has this name.
    #[error("{} exists and is not a socket (remove it, or choose another path)", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot {action} {} (check the directory and its permissions)", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A listening socket in the file system, and the lock that keeps others from taking its name.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Socket {
    /// Makes a listening socket at `path`, where one that nobody listens on any more may lie.
    /// Its mode is what the process's umask leaves of 0777.
    ///
    /// # Errors
    ///
    /// Somebody listens there, something else is there, or it cannot be made.
    pub fn bind(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = lock(path, &lock_path)?;
        let bound = remove_stale(path)
            .and_then(|()| UnixListener::bind(path).map_err(failed("bind", path)));
        match bound {
            Ok(listener) => Ok((
                Self {
                    path: path.to_owned(),
                    lock_path,
                    _lock: lock,
                },
                listener,
            )),
            Err(e) => {
                let _ = fs::remove_file(&lock_path);
                Err(e)
            }
        }
    }

    /// Removes the socket and its lock file, as dropping it does.
    pub fn remove(&self) {
        for path in [&self.path, &self.lock_path] {
            if let Err(e) = fs::remove_file(path)
                && e.kind() != ErrorKind::NotFound
            {
                log::warn!("cannot remove {}: {e}", path.display());
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SocketError + 'a {
    move |source| SocketError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Takes the lock beside a socket. Held until the file is closed, so death releases it.
fn lock(path: &Path, lock_path: &Path) -> Result<File, SocketError> {
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(lock_path)
            .map_err(failed("open", lock_path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(SocketError::InUse(path.to_owned())),
            Err(e) => return Err(failed("lock", lock_path)(e.into())),
        }
        // The holder before may have removed the file between our open and our lock.
        let ours = file.metadata().map_err(failed("examine", lock_path))?;
        match fs::symlink_metadata(lock_path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => return Ok(file),
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(failed("examine", lock_path)(e)),
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Ok(file) if file.file_type().is_socket() => {}
        Ok(_) => return Err(SocketError::NotASocket(path.to_owned())),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("examine", path)(e)),
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove", path))
        }
        Err(e) => Err(failed("connect to", path)(e)),
    }
}
