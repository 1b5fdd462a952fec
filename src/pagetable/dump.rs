// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory out of a file: an ELF core as QEMU's `dump-guest-memory` makes it, with the control
//! registers of each CPU, or a raw image.
//!
//! The file may be anything. Of an ELF file only headers and notes are read here, within bounds.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, ET_CORE, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};

use super::memory::{Memory, MemoryError, Place};
use super::registers::Registers;

/// Headers of a core file that are read. QEMU makes one for each block of memory, or with
/// `paging=true` for each stretch of virtual addresses.
const HEADERS_MAX: u32 = 1 << 20;
/// Bytes of notes that are read: QEMU writes less than 1 KiB for each CPU.
const NOTES_MAX: u64 = 16 << 20;

/// What there is in a file.
#[derive(Debug)]
pub(crate) struct Dump {
    /// Guest memory.
    pub(crate) memory: Memory,
    /// Control registers by CPU, if it is an ELF core.
    pub(crate) cpus: Option<Vec<Registers>>,
}

/// Why a file is no guest memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DumpError {
    #[error("cannot open {}", .path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is a compressed dump: make it with dump-guest-memory without -z, -l, -s, -R and -w",
        .0.display()
    )]
    Compressed(PathBuf),
    #[error(
        "{} is no 64-bit x86 core file of QEMU's dump-guest-memory: {what}", .path.display()
    )]
    Elf { path: PathBuf, what: String },
    #[error("cannot take guest memory from {}", .path.display())]
    Memory {
        path: PathBuf,
        #[source]
        source: MemoryError,
    },
}

/// Opens guest memory. `maps` is where a raw image lies; if it says nothing, at address 0.
pub(crate) fn open(path: &Path, maps: &[Place]) -> Result<Dump, DumpError> {
    let read = |source| DumpError::Read {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(|source| DumpError::Open {
        path: path.to_owned(),
        source,
    })?;
    let metadata = file.metadata().map_err(read)?;
    if metadata.is_dir() {
        return Err(read(io::ErrorKind::IsADirectory.into()));
    }
    let mut magic = Vec::new();
    (&mut file).take(8).read_to_end(&mut magic).map_err(read)?;
    file.rewind().map_err(read)?;
    // A raw image begins with the guest's page 0, which is the guest's to fill: --map says what it is.
    if magic.starts_with(b"\x7fELF") && maps.is_empty() {
        return core_file(file, path);
    }
    let compressed: [&[u8]; 3] = [b"KDUMP   ", b"makedump", b"PAGEDU64"];
    if maps.is_empty() && compressed.contains(&magic.as_slice()) {
        return Err(DumpError::Compressed(path.to_owned()));
    }
    let whole = [Place {
        gpa: 0,
        size: metadata.len(),
        offset: 0,
    }];
    let places = if maps.is_empty() { &whole } else { maps };
    Ok(Dump {
        memory: mapped(file, places, path)?,
        cpus: None,
    })
}

fn mapped(file: File, places: &[Place], path: &Path) -> Result<Memory, DumpError> {
    Memory::of_file(file, places).map_err(|source| DumpError::Memory {
        path: path.to_owned(),
        source,
    })
}

fn core_file(file: File, path: &Path) -> Result<Dump, DumpError> {
    let wrong = |what: &dyn std::fmt::Display| DumpError::Elf {
        path: path.to_owned(),
        what: what.to_string(),
    };
    let read = |source| DumpError::Read {
        path: path.to_owned(),
        source,
    };
    let cache = ReadCache::new(io::BufReader::new(file.try_clone().map_err(read)?));
    let Parsed { places, cpus } = parse(&cache).map_err(|what| wrong(&what))?;
    Ok(Dump {
        memory: mapped(file, &places, path)?,
        cpus: Some(cpus),
    })
}

#[derive(Debug)]
struct Parsed {
    places: Vec<Place>,
    cpus: Vec<Registers>,
}

/// What is wrong with a core file.
#[derive(Debug, PartialEq, thiserror::Error)]
enum ElfError {
    #[error(transparent)]
    Object(#[from] object::read::Error),
    #[error("it is of another kind, or of another machine")]
    Kind,
    #[error("it has more than {HEADERS_MAX} program headers")]
    Headers,
    #[error("it has more than {NOTES_MAX} bytes of notes")]
    Notes,
    #[error("a note of QEMU's is of version {0}, and this is for version 1")]
    Version(u32),
    #[error("a note of QEMU's is too short")]
    ShortNote,
}

fn parse<'a>(data: impl ReadRef<'a>) -> Result<Parsed, ElfError> {
    let header = FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let (kind, machine) = (header.e_type(endian), header.e_machine(endian));
    if endian != Endianness::Little || kind != ET_CORE || machine != EM_X86_64 {
        return Err(ElfError::Kind);
    }
    if header.phnum(endian, data)? > HEADERS_MAX {
        return Err(ElfError::Headers);
    }
    let mut places = Vec::new();
    let mut cpus = Vec::new();
    let mut notes_left = NOTES_MAX;
    for program in header.program_headers(endian, data)? {
        match program.p_type(endian) {
            PT_LOAD => {
                let (offset, size) = program.file_range(endian);
                let gpa = program.p_paddr(endian);
                // Memory that is not in the file, for instance when only a part was dumped.
                if size != 0 {
                    places.push(Place { gpa, size, offset });
                }
            }
            PT_NOTE => {
                let (_, size) = program.file_range(endian);
                notes_left = notes_left.checked_sub(size).ok_or(ElfError::Notes)?;
                let Some(mut notes) = program.notes(endian, data)? else {
                    continue;
                };
                while let Some(note) = notes.next()? {
                    if note.name() == b"QEMU" && note.n_type(endian).0 == 0 {
                        cpus.push(cpu_state(note.desc())?);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(Parsed { places, cpus })
}

/// `QEMUCPUState` of QEMU's target/i386/arch_dump.c: version and size (4 bytes each), 16 registers,
/// RIP and RFLAGS, 10 segments of 24 bytes with the selector first, CR0 to CR4. More may follow.
fn cpu_state(state: &[u8]) -> Result<Registers, ElfError> {
    const CS: usize = 8 + 18 * 8;
    const CR0: usize = CS + 10 * 24;
    let word = |at: usize| -> Option<u32> {
        let bytes = state.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let control = |n: usize| -> Option<u64> {
        let bytes = state.get(CR0 + 8 * n..CR0 + 8 * n + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let version = word(0).ok_or(ElfError::ShortNote)?;
    if version != 1 {
        return Err(ElfError::Version(version));
    }
    let size = word(4).ok_or(ElfError::ShortNote)?;
    if usize::try_from(size).is_ok_and(|size| size < CR0 + 5 * 8) || control(4).is_none() {
        return Err(ElfError::ShortNote);
    }
    Ok(Registers {
        cr0: control(0),
        cr3: control(3),
        cr4: control(4),
        efer: None,
        cpl: word(CS).map(|selector| (selector & 3) as u8),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An ELF header, a note of QEMU's, and a piece of memory.
    fn core() -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(16, 0);
        out.extend([4, 0, 62, 0, 1, 0, 0, 0]);
        out.extend([0u64, 64, 0].map(u64::to_le_bytes).concat());
        out.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        for (kind, offset, gpa, size) in [(4u32, 176u64, 0u64, 460u64), (1, 636, 0x1000, 16)] {
            out.extend([kind, 0].map(u32::to_le_bytes).concat());
            out.extend(
                [offset, 0, gpa, size, size, 0]
                    .map(u64::to_le_bytes)
                    .concat(),
            );
        }
        out.extend([5u32, 440, 0].map(u32::to_le_bytes).concat());
        out.extend(b"QEMU\0\0\0\0");
        let mut state = vec![0x11; 440];
        state[..8].copy_from_slice(&[1, 0, 0, 0, 0xb8, 1, 0, 0]);
        out.extend(state);
        out.extend([0; 16]);
        out
    }

    #[test]
    fn registers_and_places_are_read() {
        let Parsed { places, cpus } = parse(core().as_slice()).unwrap();
        let place = Place {
            gpa: 0x1000,
            size: 16,
            offset: 636,
        };
        assert_eq!(places, [place]);
        let number = Some(0x1111_1111_1111_1111);
        let registers = Registers {
            cr0: number,
            cr3: number,
            cr4: number,
            efer: None,
            cpl: Some(1),
        };
        assert_eq!(cpus, [registers]);
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_parser(
            changes in prop::collection::vec((0..652usize, any::<u8>()), 0..20),
            length in 0..=652usize,
        ) {
            let mut bytes = core();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.truncate(length.max(64));
            if let Ok(parsed) = parse(bytes.as_slice()) {
                prop_assert!(parsed.cpus.len() <= bytes.len() / 440);
            }
        }
    }
}
