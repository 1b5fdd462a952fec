// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program: command line, log, signals, files and sockets, in this order, and then the daemon;
//! or `show`, which asks one, or `pagetable`, which reads a guest's page tables.

mod cli;
mod columns;
mod pagetable;
mod show;
mod status_client;

use std::convert::Infallible;
use std::error::Error;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use clap::{CommandFactory, Parser};
use log::{LevelFilter, info};
use rustix::fs::Mode;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use vhost_guard::daemon::{self, DaemonError, Listeners};
use vhost_guard::fd;
use vhost_guard::msr_policy::{self, PolicyFileError};
use vhost_guard::report::Witness;
use vhost_guard::report::events_file::{EventsFile, EventsFileError};
use vhost_guard::socket::{Socket, SocketError};

use cli::{Cli, Command, Endpoint, Endpoints};
use pagetable::PagetableError;
use show::ShowError;

/// Exit status of `pagetable --fail-on-wx`.
const WRITE_EXEC: u8 = 3;

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
    Events(#[from] EventsFileError),
    #[error(transparent)]
    MsrPolicy(#[from] PolicyFileError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    Show(#[from] ShowError),
    #[error(transparent)]
    Pagetable(#[from] PagetableError),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match &cli.command {
        Some(Command::Show(show)) => match show.of.status_socket() {
            Ok(path) => show::run(&path, show.json).map_err(MainError::from),
            Err(e) => wrong_command_line(&e),
        },
        Some(Command::Pagetable(args)) => match pagetable::run(args) {
            Ok(found) if found.write_exec && args.fail_on_wx => return ExitCode::from(WRITE_EXEC),
            Err(PagetableError::NoStatus(e)) => wrong_command_line(&e),
            other => other.map(drop).map_err(MainError::from),
        },
        None => match cli.endpoints() {
            Ok(Some(endpoints)) => {
                start_log(cli.log_level.into());
                let Err(error) = run(&endpoints, cli.events.as_deref(), cli.msr_policy.as_deref());
                Err(error)
            }
            Ok(None) => {
                return match writeln!(io::stdout(), "{CAPABILITIES}") {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(_) => ExitCode::FAILURE,
                };
            }
            Err(e) => wrong_command_line(&e),
        },
    };
    let Err(error) = ended else {
        return ExitCode::SUCCESS;
    };
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

fn wrong_command_line(error: &dyn Error) -> ! {
    Cli::command()
        .error(clap::error::ErrorKind::MissingRequiredArgument, error)
        .exit()
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

fn run(
    endpoints: &Endpoints,
    events: Option<&Path>,
    msr_policy: Option<&Path>,
) -> Result<Infallible, MainError> {
    let policy = msr_policy.map(msr_policy::read).transpose()?.map(Arc::new);
    // What is made here is for its owner only. No other thread runs yet.
    rustix::process::umask(Mode::from_raw_mode(0o177));
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(MainError::Signals)?;
    // A file that may not grow is an error of write(), as a full disk is, and not the end.
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map_err(MainError::Signals)?;
    let events = events.map(EventsFile::open).transpose()?.map(Arc::new);
    let Endpoints {
        front_end,
        control,
        status,
    } = endpoints;
    let (front_end_socket, front_end_listener) = listen(front_end)?;
    let (control_socket, control_listener) = listen(control)?;
    let (status_socket, status_listener) = status.as_deref().map(Socket::bind).transpose()?.unzip();
    info!(
        "listening: front_end={front_end} control={control} status={}",
        status.as_deref().unwrap_or(Path::new("none")).display()
    );
    let sockets = Arc::new([front_end_socket, control_socket, status_socket]);
    let remove = {
        let sockets = Arc::clone(&sockets);
        move || sockets.iter().flatten().for_each(Socket::remove)
    };
    let (at_end, last_events) = (remove.clone(), events.clone());
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // Nothing has to be wound up: what is in force is QEMU's to keep, and a request
                // that is under way waits in the guest's ring for the next companion.
                info!("ended by signal {signal}");
                at_end();
                if let Some(events) = last_events {
                    events.finish();
                }
                process::exit(0);
            }
        })
        .map_err(MainError::Signals)?;
    let listeners = Listeners {
        front_end: front_end_listener,
        control: control_listener,
        status: status_listener,
    };
    let events = events.map(|events| events as Arc<dyn Witness>);
    let Err(error) = daemon::run(listeners, policy, events);
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
