// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What went wrong, in one line, and what to do about it.

use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::device::{Info, Refusal};
use crate::msr::Msrs;
use crate::range::{Range, Rights};

/// The device could not be opened.
pub(crate) fn open(path: &Path, error: &io::Error) -> String {
    let hint = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => ": is the driver loaded? (modprobe virtio_guard)",
        Some(Errno::ACCESS | Errno::PERM) => ": this needs root",
        _ => "",
    };
    format!("{}: {error}{hint}", path.display())
}

/// A request was refused. `command` is its name, `info` what the host can do.
pub(crate) fn refusal(
    command: &str,
    refusal: Refusal,
    ranges: &[Range],
    info: Option<&Info>,
) -> String {
    let Some((index, range)) = refusal.index.and_then(|i| Some((i, ranges.get(i)?))) else {
        return format!("{command}: {}", whole(refusal.errno, info));
    };
    format!(
        "{command}: range {} ({range}): {}; nothing was changed",
        index + 1,
        entry(refusal.errno, info)
    )
}

/// A request about MSRs was refused. `command` is its name.
pub(crate) fn msr_refusal(
    command: &str,
    refusal: Refusal,
    msrs: &[Msrs],
    info: Option<&Info>,
) -> String {
    let errno = refusal.errno;
    let Some((index, msrs)) = refusal.index.and_then(|i| Some((i, msrs.get(i)?))) else {
        return format!("msr {command}: {}", msr_whole(errno, refusal.index, info));
    };
    let why = match errno {
        Errno::PERM => "it is locked or sealed, which this would loosen: only a system reset \
                        ends that"
            .into(),
        Errno::OPNOTSUPP => "this host cannot enforce that (see docs/msr.md)".into(),
        errno => msr_whole(errno, None, info),
    };
    format!(
        "msr {command}: MSR {} ({msrs}): {why}; nothing was changed",
        index + 1
    )
}

/// A request about page tables was refused.
pub(crate) fn kernel_refusal(refusal: Refusal, ranges: &[Range], info: &Info) -> String {
    let about = refusal.index.and_then(|i| Some((i, ranges.get(i)?)));
    let why = match (refusal.errno, about) {
        (Errno::ACCESS, _) => "there are pages that are to be refused".into(),
        (Errno::OPNOTSUPP, None) => {
            "this host does not read page tables, or this guest's memory is encrypted".into()
        }
        (Errno::FAULT, _) => "the page tables name tables outside of memory: nobody knows what \
                              they map"
            .into(),
        (Errno::OVERFLOW, _) => "the page tables are too many, or what follows from them is too \
                                 many ranges: name fewer pages"
            .into(),
        (errno, Some(_)) => entry(errno, Some(info)),
        (errno, None) => whole(errno, Some(info)),
    };
    match about {
        Some((index, range)) => format!(
            "kernel: range {} ({range}): {why}; nothing was changed",
            index + 1
        ),
        None => format!("kernel: {why}"),
    }
}

/// What an errno means that is about no MSR, but perhaps about a bitmap.
fn msr_whole(errno: Errno, bitmap: Option<usize>, info: Option<&Info>) -> String {
    let why = match errno {
        Errno::OPNOTSUPP if bitmap.is_none() => "this host has no rules for MSRs".into(),
        Errno::OPNOTSUPP => "this host cannot enforce that (see docs/msr.md)".into(),
        Errno::PERM if bitmap.is_some() => {
            "it would loosen a rule that is locked or sealed: only a system reset ends that".into()
        }
        Errno::TOOBIG => "more rules than one request takes".into(),
        Errno::INVAL => "the host calls it invalid (see docs/msr.md)".into(),
        Errno::NOSPC => "the host has no room for more: at most 64 MSRs can be pinned, and what \
                         rules speak of has to fit into KVM's filter"
            .into(),
        errno => whole(errno, info),
    };
    match bitmap {
        Some(index) => format!("bitmap {}: {why}; nothing was changed", index + 1),
        None => why,
    }
}

/// A call that is about no range failed.
pub(crate) fn failure(command: &str, errno: Errno) -> String {
    format!("{command}: {}", whole(errno, None))
}

/// What an errno means for one range.
fn entry(errno: Errno, info: Option<&Info>) -> String {
    match errno {
        // The rest of what the device calls EINVAL was seen to on the command line.
        Errno::INVAL => "not all of it is RAM (see /proc/iomem)".into(),
        Errno::PERM => "it is locked or sealed, which this would loosen: only a system reset \
                        ends that"
            .into(),
        Errno::OPNOTSUPP => match info {
            Some(info) => format!(
                "this host cannot do that: it can deny {} and watch {}",
                some(info.deny_bits),
                some(info.audit_bits)
            ),
            None => "this host cannot do that (see guardctl info)".into(),
        },
        Errno::BUSY => "an emulated device is using this memory at the moment: try again".into(),
        errno => whole(errno, info),
    }
}

fn some(bits: u64) -> String {
    match Rights::denied(bits) {
        Rights(0) => "nothing".into(),
        rights => rights.to_string(),
    }
}

/// What an errno means that is about no range.
fn whole(errno: Errno, info: Option<&Info>) -> String {
    match errno {
        Errno::PERM | Errno::ACCESS => "this needs root (CAP_SYS_ADMIN)".into(),
        Errno::NODEV => "there is no guard device, or it went away: is it among the VM's devices, \
                         and bound to the driver?"
            .into(),
        Errno::NOTTY => "not a guard device, or its driver is of another version".into(),
        Errno::OPNOTSUPP => "this host knows no such request".into(),
        Errno::TOOBIG => match info {
            Some(info) => format!(
                "more ranges than one request takes: at most {}",
                info.max_request_ranges
            ),
            None => "more ranges than one request takes".into(),
        },
        Errno::NOSPC => match info {
            Some(info) => format!(
                "the host has no room for more ranges: {} of at most {} are in force; \
                 adjoining ones count as one",
                info.ranges_in_force, info.max_ranges
            ),
            None => "the host has no room for more ranges".into(),
        },
        Errno::STALE => "the VM was reset meanwhile: try again".into(),
        Errno::IO => "the host failed: see the logs of vhost-guard and QEMU".into(),
        Errno::PROTO => "the driver's answer makes no sense".into(),
        errno => io::Error::from(errno).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(errno: Errno, index: Option<usize>) -> String {
        let ranges = ["gfn:1".parse().unwrap(), "gfn:2-3".parse().unwrap()];
        refusal("lock", Refusal { errno, index }, &ranges, None)
    }

    #[test]
    fn the_range_at_fault_is_named() {
        assert_eq!(
            said(Errno::INVAL, Some(1)),
            "lock: range 2 (0x2000-0x3fff): not all of it is RAM (see /proc/iomem); \
             nothing was changed"
        );
    }

    #[test]
    fn an_errno_means_another_thing_without_a_range() {
        assert!(said(Errno::PERM, Some(0)).contains("sealed"));
        assert!(said(Errno::PERM, None).contains("root"));
        assert!(said(Errno::OPNOTSUPP, Some(0)).contains("cannot do that"));
        assert!(said(Errno::OPNOTSUPP, None).contains("no such request"));
    }

    #[test]
    fn an_index_that_makes_no_sense_is_no_index() {
        assert!(said(Errno::PERM, Some(2)).contains("root"));
    }

    fn msr_said(errno: Errno, index: Option<usize>) -> String {
        let msrs = ["LSTAR".parse().unwrap()];
        msr_refusal("lock", Refusal { errno, index }, &msrs, None)
    }

    #[test]
    fn the_msr_at_fault_is_named() {
        assert_eq!(
            msr_said(Errno::OPNOTSUPP, Some(0)),
            "msr lock: MSR 1 (0xc0000082): this host cannot enforce that (see docs/msr.md); \
             nothing was changed"
        );
        assert!(msr_said(Errno::OPNOTSUPP, None).contains("no rules for MSRs"));
        assert!(msr_said(Errno::PERM, None).contains("root"));
        let bitmap = msr_refusal(
            "bitmap",
            Refusal {
                errno: Errno::INVAL,
                index: Some(2),
            },
            &[],
            None,
        );
        assert!(bitmap.starts_with("msr bitmap: bitmap 3: "), "{bitmap}");
    }

    fn kernel_said(errno: Errno, index: Option<usize>) -> String {
        let info = Info {
            deny_bits: 1,
            ..Info::default()
        };
        kernel_refusal(Refusal { errno, index }, &["gfn:1".parse().unwrap()], &info)
    }

    #[test]
    fn page_tables_have_errors_of_their_own() {
        assert_eq!(
            kernel_said(Errno::ACCESS, Some(0)),
            "kernel: range 1 (0x1000-0x1fff): there are pages that are to be refused; \
             nothing was changed"
        );
        assert!(kernel_said(Errno::OPNOTSUPP, None).contains("does not read page tables"));
        assert!(kernel_said(Errno::OPNOTSUPP, Some(0)).contains("it can deny write"));
        assert!(kernel_said(Errno::PERM, None).contains("root"));
    }

    #[test]
    fn every_line_is_one_line() {
        for n in 1..200 {
            for index in [None, Some(0)] {
                let errno = Errno::from_raw_os_error(n);
                let line =
                    said(errno, index) + &msr_said(errno, index) + &kernel_said(errno, index);
                assert!(!line.contains('\n') && !line.contains("  "), "{line}");
            }
        }
    }
}
