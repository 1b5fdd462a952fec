// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};

use crate::device::MsrEntry;
use crate::kernel::KernelRequest;
use crate::msr::{self, Access, Action, Msrs};
use crate::range::{Range, Rights};

/// Protects this guest's memory, from outside the guest's kernel.
///
/// The hypervisor refuses, or watches, accesses to the pages that are named, whatever runs in
/// this guest and whatever its page tables say. Needs the virtio_guard driver, and root.
///
/// RANGE is guest-physical memory, whole pages; several of them are one request, which is carried
/// out whole or not at all:
///
///   0x1000000-0x1ffffff     first and last byte, as in /proc/iomem
///   0x1000000+16M           first byte and length; K, M and G are powers of 1024
///   gfn:0x1000-0x1fff       first and last frame (address / 4096); gfn:A+COUNT, gfn:A
///
/// Numbers are decimal, or hexadecimal with 0x.
///
/// RIGHTS is a comma list of
///
///   write         stores
///   exec          instruction fetches
///   read          loads
///   exec-kernel   instruction fetches in kernel mode
#[derive(Debug, Parser)]
#[command(
    version,
    verbatim_doc_comment,
    disable_help_subcommand = true,
    after_help = "\
Examples:
  guardctl info                                       what this host can do
  guardctl lock --deny write 0x1000000+16M            read-only until the next reset
  guardctl protect --deny write --audit exec gfn:5+2  the same for as long as you want; tell of exec
  guardctl protect --deny none gfn:5+2                and back
  guardctl query                                      what is protected
  guardctl kernel --fail-on-wx                        does the kernel execute what it can write?
  guardctl msr lock --action pin LSTAR                the system call entry, until the next reset
  guardctl events --follow                            what was tried

Exit status: 0 done, 1 refused or failed (one line says why), 2 a wrong command line."
)]
pub(crate) struct Cli {
    /// The driver's device.
    #[arg(long, global = true, value_name = "PATH", default_value = "/dev/guard")]
    pub(crate) device: PathBuf,

    /// Print JSON: one object, or, of events, one on each line.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what this host can deny and watch, its limits and counters.
    Info,

    /// Deny or watch accesses, until the next system reset.
    ///
    /// Adds to what holds on the pages already. Nothing but a system reset takes it back: lock
    /// only pages that nobody, their owner included, needs that way again, and that are never
    /// freed. (What locks all that is protected so far is `seal`.)
    Lock(Request),

    /// Deny or watch accesses, until told otherwise.
    ///
    /// Takes the place of what holds on the pages; `--deny none` frees them. Whoever is root in
    /// this guest can take it back the same way, until the pages are locked or sealed: from then
    /// on rights can only be taken away, for what else would loosen them is refused.
    Protect(Request),

    /// Make all that is protected now last until the next system reset.
    ///
    /// For the end of boot. Each page that has a protection becomes as if it had been locked. Pages
    /// that get one later can be freed again.
    Seal {
        /// Yes: this cannot be undone.
        #[arg(long)]
        yes: bool,
    },

    /// Show what is protected.
    ///
    /// Of all memory, or of the ranges. "fixed" pages are locked or sealed.
    Query {
        /// Where to look [default: everywhere].
        #[arg(value_name = "RANGE")]
        ranges: Vec<Range>,
    },

    /// Show what the kernel's page tables allow, and deny what they do not.
    ///
    /// The host reads the tables and adds up, for each page, what all mappings of the kernel's half
    /// of addresses let kernel mode do with it. Changes nothing, unless told to: then the pages of
    /// the ranges are denied what no mapping uses. A page that the kernel maps otherwise later, as
    /// it does with memory that it frees, cannot be used that way.
    Kernel(KernelRequest),

    /// Rules for MSRs.
    ///
    /// MSR is a number or one of STAR, LSTAR, CSTAR, SFMASK, SYSENTER_CS, SYSENTER_ESP,
    /// SYSENTER_EIP, PAT, APIC_BASE, EFER; or a range of either, A-B. docs/msr.md says what rules
    /// mean, and what a Linux can do without.
    #[command(subcommand)]
    Msr(MsrCommand),

    /// Show accesses that were refused or watched.
    ///
    /// Those from now on: what happened before is in the kernel's log. Waits for the first, prints
    /// those that came with it, and ends, unless told otherwise.
    Events {
        /// Go on until interrupted.
        #[arg(short, long)]
        follow: bool,

        /// End after N events.
        #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
}

/// What to do about MSRs.
#[derive(Debug, Subcommand)]
pub(crate) enum MsrCommand {
    /// Add rules, until the next system reset.
    ///
    /// Rules that hold already only get stricter.
    Lock(MsrRequest),

    /// Set rules, until told otherwise.
    ///
    /// `--action allow` removes what holds, as long as it is neither locked nor sealed.
    Protect(MsrRequest),

    /// Show the guest's rules. What the host's own say is not told.
    Query {
        /// Of which MSRs [default: all].
        #[arg(value_name = "MSR")]
        msrs: Vec<Msrs>,
    },

    /// Set rules by the bitmaps in a file: allow where a bit is set, deny where it is clear.
    Bitmap {
        /// The bitmaps, one after the other, as in docs/msr.md.
        file: PathBuf,
    },
}

/// What `msr lock` and `msr protect` take.
#[derive(Args, Debug)]
pub(crate) struct MsrRequest {
    /// What becomes of the accesses.
    #[arg(long, value_enum)]
    action: Action,

    /// Which accesses [default, and all there is, of pin: write].
    #[arg(long, value_enum)]
    access: Option<Access>,

    /// The bits that are pinned [default: all].
    #[arg(long, value_name = "BITS", value_parser = msr::mask)]
    mask: Option<u64>,

    /// Report the writes that a pin lets through, too.
    #[arg(long)]
    log: bool,

    /// Which MSRs; see `guardctl msr --help`.
    #[arg(value_name = "MSR", required = true)]
    pub(crate) msrs: Vec<Msrs>,
}

impl MsrRequest {
    /// The entries.
    ///
    /// # Errors
    ///
    /// The options make no sense together.
    pub(crate) fn entries(&self) -> Result<Vec<MsrEntry>, String> {
        self.msrs
            .iter()
            .map(|msrs| msr::entry(*msrs, self.action, self.access, self.mask, self.log))
            .collect()
    }
}

/// What `lock` and `protect` take.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("rights").required(true).multiple(true).args(["deny", "audit"]))]
pub(crate) struct Request {
    /// What the host refuses: write, exec, read, exec-kernel; or none.
    #[arg(long, value_name = "RIGHTS")]
    deny: Option<Rights>,

    /// What goes through, but makes an event: the same names.
    #[arg(long, value_name = "RIGHTS")]
    audit: Option<Rights>,

    /// Where; see `guardctl --help`.
    #[arg(value_name = "RANGE", required = true)]
    pub(crate) ranges: Vec<Range>,
}

impl Request {
    /// The attributes of each entry. `may_free`: none at all is something to ask for.
    ///
    /// # Errors
    ///
    /// The two lists make no sense together.
    pub(crate) fn attributes(&self, may_free: bool) -> Result<u64, String> {
        let deny = self.deny.unwrap_or_default();
        let audit = self.audit.unwrap_or_default();
        let both = Rights(deny.0 & audit.0);
        if both.0 != 0 {
            return Err(format!(
                "{both} cannot be both denied and watched: what is refused makes an event anyway"
            ));
        }
        match Rights::attributes(deny, audit) {
            0 if !may_free => Err("nothing is to be denied or watched".into()),
            attributes => Ok(attributes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Command, clap::Error> {
        Cli::try_parse_from([&["guardctl"], args].concat()).map(|cli| cli.command)
    }

    fn attributes(args: &[&str]) -> Result<u64, String> {
        match parse(args).unwrap() {
            Command::Lock(request) => request.attributes(false),
            Command::Protect(request) => request.attributes(true),
            _ => unreachable!(),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn rights_become_attributes() {
        let range = "gfn:1";
        assert_eq!(attributes(&["lock", "--deny", "write", range]), Ok(1));
        assert_eq!(
            attributes(&["lock", "--deny=nowrite", "--audit=exec,read", range, range]),
            Ok(0x601)
        );
        assert_eq!(attributes(&["protect", "--deny", "none", range]), Ok(0));
        assert!(attributes(&["lock", "--deny", "none", range]).is_err());
        assert!(attributes(&["lock", "--deny", "write", "--audit", "write", range]).is_err());
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for args in [
            &[][..],
            &["lock"],
            &["lock", "gfn:1"],
            &["lock", "--deny", "write"],
            &["lock", "--deny", "rw", "gfn:1"],
            &["protect", "--audit", "exec", "1-2"],
            &["query", "0x1000"],
            &["events", "--count", "0"],
            &["info", "more"],
            &["msr"],
            &["msr", "lock", "LSTAR"],
            &["msr", "lock", "--action", "pin"],
            &["msr", "lock", "--action", "emulate", "LSTAR"],
            &["msr", "lock", "--action", "pin", "--mask", "x", "LSTAR"],
            &["msr", "bitmap"],
        ] {
            assert_eq!(parse(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }
}
