// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};

/// Companion process of QEMU that lets a guest lock its own memory.
///
/// QEMU connects to two UNIX sockets of it: --socket-path takes the virtio device's queues
/// (vhost-user), --control-path the requests to the object that enforces them (vm-guard).
/// Start it before QEMU; it serves one QEMU at a time, and the next when that one is gone. It may
/// be killed and started again under a running guest: what is locked stays locked.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Example:
  vhost-guard --socket-path /run/vm1/guard &
  qemu-system-x86_64 ... \\
    -chardev socket,id=guard,path=/run/vm1/guard,reconnect-ms=1000 \\
    -chardev socket,id=guardctl,path=/run/vm1/guard.ctl,reconnect-ms=1000 \\
    -object vm-guard,id=guard0,chardev=guardctl \\
    -device vhost-user-guard-pci,chardev=guard,guard=guard0

Both sockets are made with mode 0600: run QEMU as the same user. SIGTERM or SIGINT ends the \
process at once and removes them. The log goes to standard error.

Exit status: 0 after SIGTERM or SIGINT, 1 on an error, 2 on a wrong command line."
)]
#[command(group = ArgGroup::new("front-end").required(true).args(
    ["socket_path", "fd", "print_capabilities"]
))]
pub(crate) struct Cli {
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

    /// Print what this program is, as JSON for QEMU and libvirt (vhost-user.json), and exit.
    #[arg(long)]
    pub(crate) print_capabilities: bool,

    /// How much to log.
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub(crate) log_level: LogLevel,
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

impl Cli {
    /// Where to listen, for the front end and for the control channel. `None` when the program
    /// only prints something.
    ///
    /// # Errors
    ///
    /// The control channel's place is neither given nor to be derived.
    pub(crate) fn endpoints(&self) -> Result<Option<(Endpoint, Endpoint)>, NoControl> {
        let front_end = match (&self.socket_path, self.fd) {
            (Some(path), _) => Endpoint::Path(path.clone()),
            (None, Some(fd)) => Endpoint::Fd(fd),
            (None, None) => return Ok(None),
        };
        let control = match (&self.control_path, self.control_fd, &self.socket_path) {
            (Some(path), ..) => Endpoint::Path(path.clone()),
            (None, Some(fd), _) => Endpoint::Fd(fd),
            (None, None, Some(path)) => {
                let mut path = path.clone().into_os_string();
                path.push(".ctl");
                Endpoint::Path(path.into())
            }
            (None, None, None) => return Err(NoControl),
        };
        Ok(Some((front_end, control)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(args: &[&str]) -> Result<Option<(Endpoint, Endpoint)>, NoControl> {
        Cli::try_parse_from([&["vhost-guard"], args].concat())
            .unwrap()
            .endpoints()
    }

    #[test]
    fn the_definition_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn the_control_socket_lies_beside_the_other_unless_told() {
        let path = |p: &str| Endpoint::Path(p.into());
        assert_eq!(
            endpoints(&["--socket-path", "a"]),
            Ok(Some((path("a"), path("a.ctl"))))
        );
        assert_eq!(
            endpoints(&["--socket-path", "a", "--control-path", "b"]),
            Ok(Some((path("a"), path("b"))))
        );
        assert_eq!(
            endpoints(&["--fd", "3", "--control-fd", "4"]),
            Ok(Some((Endpoint::Fd(3), Endpoint::Fd(4))))
        );
        assert_eq!(endpoints(&["--fd", "3"]), Err(NoControl));
        assert_eq!(endpoints(&["--print-capabilities"]), Ok(None));
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
        ] {
            let error = Cli::try_parse_from([&["vhost-guard"], args].concat()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
        }
    }
}
