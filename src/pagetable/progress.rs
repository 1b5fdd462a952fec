// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far a walk is, on standard error: a line that is written over at a terminal, lines of their own
//! elsewhere. Knows a counter of entries, and nothing of what is read.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// What takes no longer needs no progress.
const EVERY: Duration = Duration::from_secs(1);
const ENTRIES: u64 = 512;

/// Shows progress until it is dropped.
pub(crate) struct Progress {
    shared: Arc<Shared>,
    /// Dropped, it ends the thread.
    _alive: Option<Sender<()>>,
}

struct Shared {
    read: AtomicU64,
    now: Mutex<Now>,
    terminal: bool,
    wanted: bool,
}

#[derive(Default)]
struct Now {
    phase: Option<&'static str>,
    /// There is something in the line.
    shown: bool,
}

impl Progress {
    /// Begins to show progress at a terminal, or anywhere if it is `wanted`.
    pub(crate) fn start(wanted: bool) -> Self {
        let shared = Arc::new(Shared {
            read: AtomicU64::new(0),
            now: Mutex::default(),
            terminal: io::stderr().is_terminal(),
            wanted,
        });
        if !shared.terminal && !wanted {
            return Self {
                shared,
                _alive: None,
            };
        }
        let (alive, ended) = mpsc::channel();
        let shown = Arc::clone(&shared);
        // Without a thread there is no progress to be seen, and all else is as it was.
        let thread = thread::Builder::new().spawn(move || {
            while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                shown.show();
            }
        });
        Self {
            shared,
            _alive: thread.is_ok().then_some(alive),
        }
    }

    /// Where walks count the entries they have read.
    pub(crate) fn read(&self) -> &AtomicU64 {
        &self.shared.read
    }

    /// Something begins that lasts until what is returned is dropped. While it `prints` to a
    /// terminal there is no progress between its lines.
    pub(crate) fn phase(&self, name: &'static str, prints: bool) -> Phase<'_> {
        self.shared.read.store(0, Ordering::Relaxed);
        let hidden = prints && self.shared.terminal && io::stdout().is_terminal();
        self.shared.now().phase = (!hidden).then_some(name);
        Phase(self)
    }
}

/// Something that is under way.
pub(crate) struct Phase<'a>(&'a Progress);

impl Drop for Phase<'_> {
    fn drop(&mut self) {
        self.0.shared.end();
    }
}

impl Shared {
    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self) {
        let mut now = self.now();
        if let Some(phase) = now.phase {
            self.line(phase, if self.terminal { "\r" } else { "" });
            now.shown = true;
        }
    }

    fn end(&self) {
        let mut now = self.now();
        match now.phase.take() {
            Some(phase) if self.wanted && !self.terminal => self.line(phase, ""),
            _ if now.shown && self.terminal => {
                // If nobody listens there is nobody to tell.
                let _ = write!(io::stderr(), "\r\x1b[K");
            }
            _ => {}
        }
        now.shown = false;
    }

    fn line(&self, phase: &str, before: &str) {
        let tables = self.read.load(Ordering::Relaxed) / ENTRIES;
        let end = if self.terminal { "\x1b[K" } else { "\n" };
        let _ = write!(
            io::stderr(),
            "{before}vhost-guard: {phase}: {tables} tables read{end}"
        );
    }
}
