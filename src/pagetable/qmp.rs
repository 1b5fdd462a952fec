// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's monitor, as far as it takes to ask for registers and to stop a VM for a while.
//!
//! What answers may be anything: lines are bounded, and so is the time that it may take. A VM that was
//! stopped here goes on when this ends, however it does, short of SIGKILL.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Deserialize;
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::registers::{NoRegisters, Registers};
use crate::columns::printable;

/// How long one command may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest line: the registers of one CPU are some 5 KiB.
const LINE_MAX: usize = 1 << 20;

/// What went wrong with the monitor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("cannot connect to QEMU's monitor at {}", .path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot ask QEMU's monitor")]
    Io(#[source] io::Error),
    #[error(
        "QEMU's monitor does not answer (it serves one client at a time; is it -qmp, and does \
         something else hold it?)"
    )]
    Silent,
    #[error("QEMU's monitor has closed the connection")]
    Closed,
    #[error("what answers does not speak QMP (give the socket of QEMU's -qmp)")]
    NotQmp,
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        command: &'static str,
        reason: String,
    },
    #[error("QEMU's monitor told no registers")]
    Registers(#[from] NoRegisters),
    #[error("cannot handle signals")]
    Signals(#[source] io::Error),
    #[error("the VM was stopped and could not be resumed: use the monitor's command cont")]
    NotResumed(#[source] Box<QmpError>),
}

/// A connection to QEMU's monitor.
pub(crate) struct Monitor {
    stream: UnixStream,
    input: Vec<u8>,
    commands: u64,
}

/// A line of QMP, as far as it matters here.
#[derive(Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    returned: Option<Value>,
    error: Option<ErrorLine>,
}

#[derive(Deserialize)]
struct ErrorLine {
    desc: String,
}

/// A null is an answer, too.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Monitor {
    /// Connects to a socket of `-qmp unix:PATH,server=on`.
    pub(crate) fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = open(path).map_err(|e| QmpError::Connect {
            path: path.to_owned(),
            source: e.into(),
        })?;
        let mut monitor = Self {
            stream,
            input: Vec::new(),
            commands: 0,
        };
        monitor.command("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Registers of one CPU.
    pub(crate) fn registers(&mut self, cpu: u32) -> Result<Registers, QmpError> {
        let arguments = json!({ "command-line": "info registers", "cpu-index": cpu });
        let told = self.command("human-monitor-command", arguments)?;
        let text = told.as_str().ok_or(QmpError::NotQmp)?;
        Ok(Registers::parse(text, None)?)
    }

    fn is_running(&mut self) -> Result<bool, QmpError> {
        let status = self.command("query-status", json!({}))?;
        status["running"].as_bool().ok_or(QmpError::NotQmp)
    }

    /// Has a command carried out. Events that come in between are passed over.
    fn command(&mut self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        let deadline = Instant::now() + PATIENCE;
        self.commands += 1;
        let id = self.commands;
        let line = json!({ "execute": command, "arguments": arguments, "id": id });
        let mut bytes = line.to_string().into_bytes();
        bytes.push(b'\n');
        self.stream.write_all(&bytes).map_err(failed)?;
        loop {
            let line = self.line(deadline)?;
            let line: Line = serde_json::from_slice(&line).map_err(|_| QmpError::NotQmp)?;
            match line {
                // An answer to a line that was not understood has no id.
                Line { error: Some(e), .. } => {
                    return Err(QmpError::Refused {
                        command,
                        reason: printable(&e.desc),
                    });
                }
                Line {
                    id: Some(answered),
                    returned: Some(value),
                    ..
                } if answered == id => return Ok(value),
                _ => {}
            }
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, QmpError> {
        let mut chunk = [0; 4096];
        let mut searched = 0;
        loop {
            let end = self.input[searched..].iter().position(|&b| b == b'\n');
            if let Some(end) = end {
                let rest = self.input.split_off(searched + end + 1);
                return Ok(std::mem::replace(&mut self.input, rest));
            }
            searched = self.input.len();
            if searched > LINE_MAX {
                return Err(QmpError::NotQmp);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Silent);
            }
            self.stream
                .set_read_timeout(Some(left))
                .map_err(QmpError::Io)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }
}

/// As `UnixStream::connect()` does, which waits without end if too many others wait.
fn open(path: &Path) -> rustix::io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

fn failed(error: io::Error) -> QmpError {
    match error.kind() {
        ErrorKind::WouldBlock => QmpError::Silent,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => QmpError::Closed,
        _ => QmpError::Io(error),
    }
}

/// A VM that is stopped, if it ran. Dropped, it goes on.
pub(crate) struct Paused(Arc<Mutex<Held>>);

struct Held {
    monitor: Monitor,
    /// It has to be told to go on.
    stopped: bool,
}

impl Paused {
    /// Stops the VM, and from now on has it go on before a signal ends this process.
    pub(crate) fn new(monitor: Monitor) -> Result<Self, QmpError> {
        let paused = Self(Arc::new(Mutex::new(Held {
            monitor,
            stopped: false,
        })));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(QmpError::Signals)?;
        let held = Arc::clone(&paused.0);
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    // Kept, so that nothing is stopped again.
                    let mut held = lock(&held);
                    tell(held.resume());
                    let _ = emulate_default_handler(signal);
                }
            })
            .map_err(QmpError::Signals)?;
        {
            let mut held = paused.held();
            if held.monitor.is_running()? {
                // It may be stopped even if no answer comes.
                held.stopped = true;
                held.monitor.command("stop", json!({}))?;
            }
        }
        Ok(paused)
    }

    /// Registers of one CPU.
    pub(crate) fn registers(&self, cpu: u32) -> Result<Registers, QmpError> {
        self.held().monitor.registers(cpu)
    }

    /// Lets the VM go on.
    pub(crate) fn resume(self) -> Result<(), QmpError> {
        self.held().resume()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.0)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        tell(self.held().resume());
    }
}

impl Held {
    /// Tries once.
    fn resume(&mut self) -> Result<(), QmpError> {
        if !std::mem::take(&mut self.stopped) {
            return Ok(());
        }
        let resumed = self.monitor.command("cont", json!({}));
        resumed
            .map(drop)
            .map_err(|e| QmpError::NotResumed(Box::new(e)))
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where there is no way to return an error.
fn tell(resumed: Result<(), QmpError>) {
    if let Err(e) = resumed {
        let _ = writeln!(io::stderr(), "vhost-guard: error: {e}");
    }
}
