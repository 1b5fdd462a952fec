// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::pagetable::Pagetable;

/// Companion process of QEMU that lets a guest lock its own memory.
///
/// QEMU connects to two UNIX sockets of it: --socket-path takes the virtio device's queues
/// (vhost-user), --control-path the requests to the object that enforces them (vm-guard).
/// Start it before QEMU; it serves one QEMU at a time, and the next when that one is gone. It may
/// be killed and started again under a running guest: what is locked stays locked. On a third
/// socket, --status-path, it tells whoever connects what is in force; `vhost-guard show` prints it.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    after_help = "\
Example:
  vhost-guard --socket-path /run/vm1/guard &
  qemu-system-x86_64 ... \\
    -chardev socket,id=guard,path=/run/vm1/guard,reconnect-ms=1000 \\
    -chardev socket,id=guardctl,path=/run/vm1/guard.ctl,reconnect-ms=1000 \\
    -object vm-guard,id=guard0,chardev=guardctl \\
    -device vhost-user-guard-pci,chardev=guard,guard=guard0

The sockets are made with mode 0600: run QEMU as the same user. SIGTERM or SIGINT ends the \
process at once and removes them. The log goes to standard error.

What is in force, and the last violations:
  vhost-guard show --socket-path /run/vm1/guard

What a guest's page tables map:
  vhost-guard pagetable --socket-path /run/vm1/guard --qmp /run/vm1/qmp --pause

Exit status: 0 after SIGTERM or SIGINT, 1 on an error, 2 on a wrong command line."
)]
#[command(group = ArgGroup::new("front-end").required(true).args(
    ["socket_path", "fd", "print_capabilities"]
))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// Listen for QEMU's vhost-user front end on a new UNIX socket at PATH.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: Option<PathBuf>,

    /// Listen on descriptor N instead: a listening UNIX socket passed by the parent, for example
    /// by systemd.
    #[arg(long, value_name = "N")]
    pub(crate) fd: Option<RawFd>,

    /// Listen for QEMU's vm-guard object on a new UNIX socket at PATH [default: the socket path
    /// with ".ctl" added].
    #[arg(long, value_name = "PATH", conflicts_with = "control_fd")]
    pub(crate) control_path: Option<PathBuf>,

    /// Listen on descriptor N instead, as with --fd.
    #[arg(long, value_name = "N")]
    pub(crate) control_fd: Option<RawFd>,

    /// Listen for `vhost-guard show` on a new UNIX socket at PATH [default: the socket path with
    /// ".status" added; with --fd, none].
    #[arg(long, value_name = "PATH")]
    pub(crate) status_path: Option<PathBuf>,

    /// Add a line of JSON for each violation to FILE, which is made with mode 0600 if it is not
    /// there. Of a flood 200 lines are written at once and 10 a second after that; what is held
    /// back is counted in the next line.
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,

    /// Have QEMU enforce the rules in FILE (TOML) on what the guest may read and write of its
    /// model-specific registers, from the start of the VM to its end, whatever the guest says.
    /// docs/msr.md has the format, examples/msr-*.toml are complete. QEMU does not start if it
    /// cannot enforce them; a VM that runs keeps the rules with which its QEMU was started.
    #[arg(long, value_name = "FILE")]
    pub(crate) msr_policy: Option<PathBuf>,

    /// Print what this program is, as JSON for QEMU and libvirt (vhost-user.json), and exit.
    #[arg(long)]
    pub(crate) print_capabilities: bool,

    /// How much to log.
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub(crate) log_level: LogLevel,
}

/// What to do instead of serving a VM.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Show(Show),
    Pagetable(Box<Pagetable>),
}

/// Print what a running companion knows: what is in force, what was counted, what was refused.
///
/// Asks the companion's status socket, which is named by its own path or by one of the other two.
/// Nothing is changed by it, and the guest does not notice.
#[derive(Args, Debug)]
#[command(
    group = ArgGroup::new("socket").required(true).args(
        ["socket_path", "status_path", "control_path"]
    ),
    after_help = "\
Examples:
  vhost-guard show --socket-path /run/vm1/guard
  vhost-guard show --socket-path /run/vm1/guard --json | jq .counters

Exit status: 0, 1 if no companion answers, 2 on a wrong command line."
)]
pub(crate) struct Show {
    #[command(flatten)]
    pub(crate) of: Companion,

    /// Print the JSON document as the companion sends it.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A companion that runs, by one of its sockets.
#[derive(Args, Debug)]
pub(crate) struct Companion {
    /// The companion's --socket-path; its status socket is PATH with ".status" added.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// The companion's --status-path.
    #[arg(long, value_name = "PATH")]
    status_path: Option<PathBuf>,

    /// The companion's control socket, if its name is that of the socket with ".ctl" added.
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,
}

/// From a control socket of another name than the default there is no way to the status socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--control-path does not end in \".ctl\", so it says nothing of the status socket: \
     give --status-path"
)]
pub(crate) struct NoStatus;

impl Companion {
    /// Where its status socket is.
    ///
    /// # Errors
    ///
    /// It cannot be derived from what was given.
    pub(crate) fn status_socket(&self) -> Result<PathBuf, NoStatus> {
        if let Some(path) = &self.status_path {
            return Ok(path.clone());
        }
        if let Some(path) = &self.socket_path {
            return Ok(beside(path, ".status"));
        }
        // Not by extension: "guard.ctl" and "ctl" are to be told apart, and "guard.sock.ctl" works.
        let control = self.control_path.as_deref().and_then(Path::to_str);
        let socket = control
            .and_then(|path| path.strip_suffix(".ctl"))
            .filter(|path| !path.is_empty() && !path.ends_with('/'));
        socket
            .map(|path| beside(Path::new(path), ".status"))
            .ok_or(NoStatus)
    }
}

/// The path with `end` added.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(end);
    path.into()
}

/// How much to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    /// Nothing.
    Off,
    /// What keeps the program from its work.
    Error,
    /// And violations, broken queues, peers that break the rules.
    Warn,
    /// And connections, locks, resets.
    Info,
    /// And what the vhost-user crates say.
    Debug,
    /// And everything.
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// Where a listening socket comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// It is made at this path.
    Path(PathBuf),
    /// It was passed as this descriptor.
    Fd(RawFd),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// With --fd there is no path to derive the control socket's from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--fd needs --control-path or --control-fd")]
pub(crate) struct NoControl;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoints {
    /// For the vhost-user front end.
    pub(crate) front_end: Endpoint,
    /// For the control channel.
    pub(crate) control: Endpoint,
    /// For the status socket, if there is to be one.
    pub(crate) status: Option<PathBuf>,
}

impl Cli {
    /// Where to listen. `None` when the program only prints something.
    ///
    /// # Errors
    ///
    /// The control channel's place is neither given nor to be derived.
    pub(crate) fn endpoints(&self) -> Result<Option<Endpoints>, NoControl> {
        let front_end = match (&self.socket_path, self.fd) {
            (Some(path), _) => Endpoint::Path(path.clone()),
            (None, Some(fd)) => Endpoint::Fd(fd),
            (None, None) => return Ok(None),
        };
        let control = match (&self.control_path, self.control_fd, &self.socket_path) {
            (Some(path), ..) => Endpoint::Path(path.clone()),
            (None, Some(fd), _) => Endpoint::Fd(fd),
            (None, None, Some(path)) => Endpoint::Path(beside(path, ".ctl")),
            (None, None, None) => return Err(NoControl),
        };
        let default_status = || Some(beside(self.socket_path.as_deref()?, ".status"));
        Ok(Some(Endpoints {
            front_end,
            control,
            status: self.status_path.clone().or_else(default_status),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Cli {
        Cli::try_parse_from([&["vhost-guard"], args].concat()).unwrap()
    }

    fn endpoints(
        args: &[&str],
    ) -> Result<Option<(Endpoint, Endpoint, Option<PathBuf>)>, NoControl> {
        let endpoints = parse(args).endpoints()?;
        Ok(endpoints.map(|e| (e.front_end, e.control, e.status)))
    }

    #[test]
    fn the_definition_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn the_other_sockets_lie_beside_the_first_unless_told() {
        let path = |p: &str| Endpoint::Path(p.into());
        let status = |p: &str| Some(PathBuf::from(p));
        assert_eq!(
            endpoints(&["--socket-path", "a"]),
            Ok(Some((path("a"), path("a.ctl"), status("a.status"))))
        );
        assert_eq!(
            endpoints(&["--socket-path", "a", "--control-path", "b"]),
            Ok(Some((path("a"), path("b"), status("a.status"))))
        );
        assert_eq!(
            endpoints(&["--fd", "3", "--control-fd", "4"]),
            Ok(Some((Endpoint::Fd(3), Endpoint::Fd(4), None)))
        );
        assert_eq!(
            endpoints(&["--fd", "3", "--control-fd", "4", "--status-path", "s"]),
            Ok(Some((Endpoint::Fd(3), Endpoint::Fd(4), status("s"))))
        );
        assert_eq!(endpoints(&["--fd", "3"]), Err(NoControl));
        assert_eq!(endpoints(&["--print-capabilities"]), Ok(None));
    }

    #[test]
    fn show_finds_the_status_socket_from_each_of_the_three() {
        let socket = |args: &[&str]| match parse(&[&["show"], args].concat()).command {
            Some(Command::Show(show)) => show.of.status_socket(),
            _ => panic!("not show"),
        };
        for (option, path, found) in [
            ("--socket-path", "/run/g", Ok("/run/g.status")),
            ("--status-path", "/run/s", Ok("/run/s")),
            ("--control-path", "/run/g.ctl", Ok("/run/g.status")),
            ("--control-path", "g.sock.ctl", Ok("g.sock.status")),
            ("--control-path", "/run/control", Err(NoStatus)),
            ("--control-path", "/run/.ctl", Err(NoStatus)),
            ("--control-path", ".ctl", Err(NoStatus)),
        ] {
            assert_eq!(socket(&[option, path]), found.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for args in [
            &[][..],
            &["--socket-path", "a", "--fd", "3"],
            &[
                "--socket-path",
                "a",
                "--control-path",
                "b",
                "--control-fd",
                "4",
            ],
            &["--fd", "x"],
            &["--socket-path", "a", "--log-level", "loud"],
            &["show"],
            &["show", "--json"],
            &["show", "--socket-path", "a", "--status-path", "b"],
            &["--socket-path", "a", "show", "--socket-path", "a"],
            &["display", "--socket-path", "a"],
            &["pagetable"],
            &["pagetable", "--root", "0x1000"],
            &["pagetable", "--memory", "a", "--socket-path", "b"],
            &["pagetable", "--socket-path", "a", "--map", "0:1"],
            &[
                "pagetable",
                "--memory",
                "a",
                "--qmp",
                "b",
                "--registers",
                "c",
            ],
            &["pagetable", "--memory", "a", "--pause"],
            &["pagetable", "--memory", "a", "--root", "x"],
            &["pagetable", "--memory", "a", "--levels", "3"],
            &[
                "pagetable",
                "--memory",
                "a",
                "--levels",
                "5",
                "--cr4",
                "0x20",
            ],
            &["pagetable", "--memory", "a", "--physical-bits", "53"],
            &["pagetable", "--memory", "a", "--va", "0x1000"],
            &["pagetable", "--memory", "a", "--map", "0"],
            &["--socket-path", "a", "pagetable", "--memory", "a"],
        ] {
            let error = Cli::try_parse_from([&["vhost-guard"], args].concat()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
        }
    }
}
