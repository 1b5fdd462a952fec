// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The events file: a line of JSON for each violation, as far as a guest may fill a disk with it.
//!
//! A thread of its own writes, so a disk that is slow or full delays nobody; what it cannot keep
//! up with, or may not write, is merged into a number that the next line tells. Knows nothing of
//! the device.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::Serialize;

use super::{Event, Seen, Witness};
use crate::log_limit::{LogLimit, log_limited};
use crate::token_bucket::TokenBucket;

/// Lines that are written at once.
const BURST: u32 = 200;
/// Lines a second after that.
const PER_SECOND: u32 = 10;
/// Violations that wait for the thread.
const QUEUE: usize = 1024;
/// How often to look whether what was held back may be written.
const TICK: Duration = Duration::from_millis(100);
/// How long the end of the process waits for what was held back.
const PATIENCE: Duration = Duration::from_millis(500);

static FAILED: LogLimit = LogLimit::new(3);

/// Why there is no events file.
#[derive(Debug, thiserror::Error)]
pub enum EventsFileError {
    /// It cannot be opened.
    #[error("cannot open {} for events (check the directory and its permissions)", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else has this name.
    #[error("{} is no regular file, so events cannot be kept in it (give another path)", .0.display())]
    NotAFile(PathBuf),
    /// No thread is to be had.
    #[error("cannot start the thread that writes events")]
    Thread(#[source] io::Error),
}

/// The way to the thread that writes.
#[derive(Debug)]
pub struct EventsFile {
    queue: SyncSender<Message>,
    /// Accesses for which there was no room in the queue.
    overflow: Arc<AtomicU64>,
}

enum Message {
    Seen(Seen),
    /// Write what is held back, and say so.
    Finish(SyncSender<()>),
}

impl EventsFile {
    /// Opens a file to add to, or makes it with mode 0600, and starts the thread that writes.
    ///
    /// A symbolic link is not followed: in a directory that others may write to, it could have
    /// this process write into any file of its user. Neither is anything else taken that is no
    /// regular file, which could block or be read by others.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or is no regular file.
    pub fn open(path: &Path) -> Result<Self, EventsFileError> {
        let failed = |source: io::Error| {
            // What a FIFO, a socket and a symbolic link say.
            let raw = source
                .raw_os_error()
                .map(rustix::io::Errno::from_raw_os_error);
            match raw {
                Some(rustix::io::Errno::NXIO | rustix::io::Errno::LOOP) => {
                    EventsFileError::NotAFile(path.to_owned())
                }
                _ => EventsFileError::Open {
                    path: path.to_owned(),
                    source,
                },
            }
        };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)
            .map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(EventsFileError::NotAFile(path.to_owned()));
        }
        Self::start(file)
    }

    fn start(file: File) -> Result<Self, EventsFileError> {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let overflow = Arc::<AtomicU64>::default();
        let mut writer = Writer::new(file, Arc::clone(&overflow), Instant::now());
        thread::Builder::new()
            .name("events-file".into())
            .spawn(move || writer.run(&messages))
            .map_err(EventsFileError::Thread)?;
        Ok(Self { queue, overflow })
    }

    /// The process is about to end: has what was held back written, if that does not take long.
    pub fn finish(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.queue.try_send(Message::Finish(done)).is_ok() {
            let _ = wait.recv_timeout(PATIENCE);
        }
    }
}

impl Witness for EventsFile {
    fn seen(&self, seen: &Seen) {
        if self.queue.try_send(Message::Seen(*seen)).is_err() {
            self.overflow.fetch_add(times(seen), Ordering::Relaxed);
        }
    }
}

fn times(seen: &Seen) -> u64 {
    seen.violation.times.max(1).into()
}

/// A line.
#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    event: Event,
    suppressed: u64,
}

struct Writer<W> {
    out: W,
    bucket: TokenBucket,
    /// The newest that was held back.
    held: Option<Seen>,
    /// Accesses of which no line tells so far, but for those of `held`.
    suppressed: u64,
    overflow: Arc<AtomicU64>,
    /// The last line was cut short.
    torn: bool,
}

impl<W: Write> Writer<W> {
    fn new(out: W, overflow: Arc<AtomicU64>, now: Instant) -> Self {
        Self {
            out,
            bucket: TokenBucket::new(BURST, PER_SECOND, now),
            held: None,
            suppressed: 0,
            overflow,
            torn: false,
        }
    }

    fn run(&mut self, messages: &Receiver<Message>) {
        loop {
            let message = if self.held.is_some() {
                messages.recv_timeout(TICK)
            } else {
                messages.recv().map_err(RecvTimeoutError::from)
            };
            match message {
                Ok(Message::Seen(seen)) => self.take(seen, Instant::now()),
                Ok(Message::Finish(done)) => {
                    self.flush();
                    let _ = done.send(());
                }
                Err(RecvTimeoutError::Timeout) => self.tick(Instant::now()),
                Err(RecvTimeoutError::Disconnected) => return self.flush(),
            }
        }
    }

    /// Holds a violation back, in the place of another, and writes it if it may.
    fn take(&mut self, seen: Seen, now: Instant) {
        if let Some(other) = self.held.replace(seen) {
            self.suppressed = self.suppressed.saturating_add(times(&other));
        }
        self.tick(now);
    }

    /// Writes what was held back, if it may.
    fn tick(&mut self, now: Instant) {
        if self.held.is_some() && self.bucket.take(now) {
            self.flush();
        }
    }

    /// Writes what was held back.
    fn flush(&mut self) {
        let Some(seen) = self.held.take() else {
            return;
        };
        let overflow = self.overflow.swap(0, Ordering::Relaxed);
        self.suppressed = self.suppressed.saturating_add(overflow);
        match self.write(&seen) {
            Ok(()) => self.suppressed = 0,
            Err(e) => {
                self.suppressed = self.suppressed.saturating_add(times(&seen));
                log_limited!(
                    FAILED,
                    Error,
                    "cannot write to the events file; going on without: {e}"
                );
            }
        }
    }

    fn write(&mut self, seen: &Seen) -> io::Result<()> {
        // What is left of a line that was cut short is to spoil no other.
        let mut bytes = if self.torn { vec![b'\n'] } else { Vec::new() };
        let line = Line {
            event: seen.into(),
            suppressed: self.suppressed,
        };
        serde_json::to_writer(&mut bytes, &line)?;
        bytes.push(b'\n');
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match self.out.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    rest = &rest[n..];
                    self.torn = !rest.is_empty();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "events_file_tests.rs"]
mod tests;
