// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory for clients of the status socket: files that can be read and not written.
//!
//! QEMU's own descriptors can be written through, so they are never passed on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

use super::{Memory, Ram};

/// Most descriptors that come with a document. The kernel's limit is 253.
pub const MAX_FILES: usize = 64;

/// Guest memory to be passed.
pub(super) struct Shared {
    pub(super) pieces: Vec<Memory>,
    pub(super) files: Vec<File>,
    pub(super) left_out: u64,
}

/// Opens what can be passed. What has no file, cannot be opened again, or is one too many, is left
/// out.
pub(super) fn share(ram: &[Ram]) -> Shared {
    let mut shared = Shared {
        pieces: Vec::new(),
        files: Vec::new(),
        left_out: 0,
    };
    for Ram { gpa, size, backing } in ram {
        let file = backing
            .as_ref()
            .filter(|_| shared.files.len() < MAX_FILES)
            .and_then(|backing| Some((backing.start(), read_only(backing.file()).ok()?)));
        let Some((offset, file)) = file else {
            shared.left_out += 1;
            continue;
        };
        shared.pieces.push(Memory {
            gpa: *gpa,
            size: *size,
            offset,
            fd: shared.files.len() as u32,
        });
        shared.files.push(file);
    }
    shared
}

fn read_only(file: &File) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        // QEMU chose the file: nothing that waits for a writer is to be waited for.
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Write};
    use std::sync::Arc;

    use vm_memory::FileOffset;

    use super::*;

    fn ram(backing: Option<FileOffset>) -> Ram {
        Ram {
            gpa: 0x1000,
            size: 0x2000,
            backing,
        }
    }

    #[test]
    fn what_is_passed_can_be_read_and_not_written() {
        let file = FileOffset::new(tempfile::tempfile().unwrap(), 0x3000);
        let mut shared = share(&[ram(None), ram(Some(file))]);
        assert_eq!(shared.left_out, 1);
        let piece = Memory {
            gpa: 0x1000,
            size: 0x2000,
            offset: 0x3000,
            fd: 0,
        };
        assert_eq!(shared.pieces, [piece]);
        let refused = shared.files[0].write(b"x").unwrap_err();
        assert_eq!(
            refused.raw_os_error(),
            Some(rustix::io::Errno::BADF.raw_os_error())
        );
        assert_ne!(refused.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn more_pieces_than_descriptors_are_left_out() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let piece = || ram(Some(FileOffset::from_arc(file.clone(), 0)));
        let many: Vec<_> = (0..MAX_FILES + 3).map(|_| piece()).collect();
        let shared = share(&many);
        assert_eq!((shared.files.len(), shared.left_out), (MAX_FILES, 3));
    }
}
