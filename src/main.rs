// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program: command line, log, signals and sockets, in this order, and then the daemon.

mod cli;

use std::convert::Infallible;
use std::error::Error;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::thread;

use clap::{CommandFactory, Parser};
use log::{LevelFilter, info};
use rustix::fs::Mode;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vhost_guard::daemon::{self, DaemonError};
use vhost_guard::fd;
use vhost_guard::socket::{Socket, SocketError};

use cli::{Cli, Endpoint};

const CAPABILITIES: &str = r#"{
  "type": "guard",
  "features": []
}"#;

#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error("cannot handle signals")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot use descriptor {fd} (pass a listening UNIX stream socket)")]
    Fd {
        fd: RawFd,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Daemon(#[from] DaemonError),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (front_end, control) = match cli.endpoints() {
        Ok(Some(endpoints)) => endpoints,
        Ok(None) => {
            return match writeln!(io::stdout(), "{CAPABILITIES}") {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Err(e) => Cli::command()
            .error(clap::error::ErrorKind::MissingRequiredArgument, e)
            .exit(),
    };
    start_log(cli.log_level.into());
    let Err(error) = run(&front_end, &control);
    let mut line = format!("vhost-guard: error: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    // If nobody listens there is nobody to tell.
    let _ = writeln!(io::stderr(), "{line}");
    ExitCode::FAILURE
}

fn start_log(level: LevelFilter) {
    let mut log = env_logger::Builder::new();
    // Other crates write a line for each thing that a guest or a peer does wrong, as often as it
    // is done; what matters of that is said here, at a bounded rate.
    let others = if level < LevelFilter::Debug {
        LevelFilter::Off
    } else {
        level
    };
    log.filter_level(others);
    log.filter_module("virtio_queue", LevelFilter::Off);
    log.filter_module("vhost_guard", level);
    log.init();
}

fn run(front_end: &Endpoint, control: &Endpoint) -> Result<Infallible, MainError> {
    // Sockets are for their owner only. No other thread runs yet.
    rustix::process::umask(Mode::from_raw_mode(0o177));
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(MainError::Signals)?;
    let (front_end_socket, front_end_listener) = listen(front_end)?;
    let (control_socket, control_listener) = listen(control)?;
    info!("listening: front_end={front_end} control={control}");
    let sockets = Arc::new([front_end_socket, control_socket]);
    let remove = {
        let sockets = Arc::clone(&sockets);
        move || sockets.iter().flatten().for_each(Socket::remove)
    };
    let at_end = remove.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // Nothing has to be wound up: what is in force is QEMU's to keep, and a request
                // that is under way waits in the guest's ring for the next companion.
                info!("ended by signal {signal}");
                at_end();
                process::exit(0);
            }
        })
        .map_err(MainError::Signals)?;
    let Err(error) = daemon::run(front_end_listener, control_listener);
    remove();
    Err(error.into())
}

fn listen(endpoint: &Endpoint) -> Result<(Option<Socket>, UnixListener), MainError> {
    match *endpoint {
        Endpoint::Path(ref path) => {
            let (socket, listener) = Socket::bind(path)?;
            Ok((Some(socket), listener))
        }
        Endpoint::Fd(fd) => {
            let listener = fd::adopt_listener(fd).map_err(|source| MainError::Fd { fd, source })?;
            Ok((None, listener))
        }
    }
}
