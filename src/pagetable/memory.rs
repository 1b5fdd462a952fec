// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as pieces of files, mapped for reading only.
//!
//! Where pieces lie is said by a dump, a command line or a companion, and is checked here. Knows
//! neither of them, and no page tables.

use std::fs::File;
use std::io;
use std::iter::FusedIterator;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, MmapRegion,
    Permissions, VolatileMemory, VolatileSlice,
};

/// Guest-physical addresses have at most so many bits.
const ADDRESS_BITS: u32 = 52;
const PAGE_SIZE: u64 = 4096;

/// Where a piece of guest memory lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its first guest-physical address.
    pub(crate) gpa: u64,
    /// Bytes, not 0.
    pub(crate) size: u64,
    /// Of its first byte in the file.
    pub(crate) offset: u64,
}

impl Place {
    /// The address after the last.
    fn end(&self) -> u64 {
        self.gpa + self.size
    }
}

/// What is wrong with where memory is said to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("there is no guest memory in it")]
    Empty,
    #[error(
        "guest memory at {gpa:#x} has {size:#x} bytes, which is none, or more than addresses \
         of {ADDRESS_BITS} bits can have"
    )]
    Size { gpa: u64, size: u64 },
    #[error(
        "guest memory at {gpa:#x} needs bytes {offset:#x} to {end:#x} of a file that has {file:#x} \
         (is it cut short?)"
    )]
    Short {
        gpa: u64,
        offset: u64,
        end: u128,
        file: u64,
    },
    #[error("two pieces of guest memory have address {0:#x}")]
    Overlap(u64),
    #[error("cannot examine the file")]
    Examine(#[source] io::Error),
    #[error("cannot map the file")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
}

/// Guest memory: pieces that do not overlap, in ascending order.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug)]
struct Piece {
    gpa: u64,
    size: u64,
    mapping: Arc<MmapRegion>,
    /// Of its first byte in the mapping.
    skip: u64,
}

impl Memory {
    /// The pieces of `file` at `places`. Those that run on in the file and in the guest are one;
    /// the same piece may come twice.
    pub(crate) fn of_file(file: File, places: &[Place]) -> Result<Self, MemoryError> {
        let places = joined(places)?;
        check_length(&file, &places)?;
        // As much of the file as is needed.
        let start = places.iter().map(|place| place.offset).min();
        let start = start.ok_or(MemoryError::Empty)? & !(PAGE_SIZE - 1);
        let end = places.iter().map(|place| place.offset + place.size).max();
        let mapping = map(file, start, end.ok_or(MemoryError::Empty)? - start)?;
        let pieces = places
            .iter()
            .map(|place| Piece {
                gpa: place.gpa,
                size: place.size,
                mapping: mapping.clone(),
                skip: place.offset - start,
            })
            .collect();
        Ok(Self { pieces })
    }

    /// Pieces of files, each in its own.
    pub(crate) fn of_files(files: Vec<(File, Place)>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (file, place) in files {
            memory
                .pieces
                .append(&mut Self::of_file(file, &[place])?.pieces);
        }
        memory.pieces.sort_by_key(|piece| piece.gpa);
        for pair in memory.pieces.windows(2) {
            if pair[0].gpa + pair[0].size > pair[1].gpa {
                return Err(MemoryError::Overlap(pair[1].gpa));
            }
        }
        if memory.pieces.is_empty() {
            return Err(MemoryError::Empty);
        }
        Ok(memory)
    }

    /// First address and size of each piece, in ascending order.
    pub(crate) fn pieces(&self) -> impl ExactSizeIterator<Item = (u64, u64)> + '_ {
        self.pieces.iter().map(|piece| (piece.gpa, piece.size))
    }

    /// The `count` bytes at `addr`, if they lie in one piece.
    fn slice(&self, addr: u64, count: usize) -> Option<VolatileSlice<'_, BS<'_, ()>>> {
        let after = self.pieces.partition_point(|piece| piece.gpa <= addr);
        let piece = self.pieces[..after].last()?;
        let within = addr - piece.gpa;
        let left = piece.size.checked_sub(within)?;
        if left < count as u64 {
            return None;
        }
        let at = usize::try_from(piece.skip + within).ok()?;
        piece.mapping.get_slice(at, count).ok()
    }
}

/// The places in ascending order, with those that run on, or say the same, joined.
fn joined(places: &[Place]) -> Result<Vec<Place>, MemoryError> {
    let mut places = places.to_vec();
    for &Place { gpa, size, .. } in &places {
        let end = gpa.checked_add(size);
        if size == 0 || end.is_none_or(|end| end > 1 << ADDRESS_BITS) {
            return Err(MemoryError::Size { gpa, size });
        }
    }
    places.sort_by_key(|place| place.gpa);
    let mut joined: Vec<Place> = Vec::new();
    for place in places {
        match joined.last_mut() {
            Some(last) if place.gpa <= last.end() => {
                let same = last.offset.wrapping_add(place.gpa - last.gpa) == place.offset;
                if same {
                    last.size = last.size.max(place.end() - last.gpa);
                } else if place.gpa < last.end() {
                    return Err(MemoryError::Overlap(place.gpa));
                } else {
                    joined.push(place);
                }
            }
            _ => joined.push(place),
        }
    }
    Ok(joined)
}

/// A piece that is longer than its file would be SIGBUS when it is read.
fn check_length(file: &File, places: &[Place]) -> Result<(), MemoryError> {
    let metadata = file.metadata().map_err(MemoryError::Examine)?;
    for place in places {
        let end = u128::from(place.offset) + u128::from(place.size);
        // A device has no length to compare with.
        let file = if metadata.is_file() {
            metadata.len()
        } else {
            i64::MAX as u64
        };
        if end > u128::from(file) {
            return Err(MemoryError::Short {
                gpa: place.gpa,
                offset: place.offset,
                end,
                file,
            });
        }
    }
    Ok(())
}

fn map(file: File, offset: u64, size: u64) -> Result<Arc<MmapRegion>, MemoryError> {
    let size = usize::try_from(size).map_err(|_| MemoryError::Size { gpa: 0, size })?;
    MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(ProtFlags::READ.bits() as i32)
        .with_mmap_flags(MapFlags::SHARED.bits() as i32)
        .build()
        .map(Arc::new)
        .map_err(MemoryError::Map)
}

impl GuestMemory for Memory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        access == Permissions::Read && self.slice(addr.0, count).is_some()
    }

    /// In one slice, or not at all.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        if access != Permissions::Read {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let slice = self.slice(addr.0, count);
        let slice = slice.ok_or(GuestMemoryError::InvalidGuestAddress(addr))?;
        Ok(One(Some(slice)))
    }
}

struct One<'a>(Option<VolatileSlice<'a, BS<'a, ()>>>);

impl<'a> Iterator for One<'a> {
    type Item = Result<VolatileSlice<'a, BS<'a, ()>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl FusedIterator for One<'_> {}

impl<'a> GuestMemorySliceIterator<'a, BS<'a, ()>> for One<'a> {}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<_> = (0..bytes).map(|n| (n / 4096) as u8).collect();
        file.write_all(&bytes).unwrap();
        file
    }

    fn place(gpa: u64, size: u64, offset: u64) -> Place {
        Place { gpa, size, offset }
    }

    /// The first byte of `count` at `addr`.
    fn byte(memory: &Memory, addr: u64, count: usize) -> Option<u8> {
        let slice = memory.slice(addr, count)?;
        let mut bytes = vec![0u8; count];
        assert_eq!(slice.copy_to(&mut bytes[..]), count);
        Some(bytes[0])
    }

    #[test]
    fn bytes_are_found_where_their_piece_says_and_nowhere_else() {
        // Not on page boundaries of the file, as in a dump.
        let places = [place(0x10_0000, 0x2000, 0x3010), place(0, 0x1000, 0x1010)];
        let memory = Memory::of_file(file(0x6000), &places).unwrap();
        for (addr, count, found) in [
            (0, 4096, Some(1)),
            (1, 4096, None),
            (0xff0, 16, Some(2)),
            (0x1000, 1, None),
            (0xf_f000, 4096, None),
            (0x10_0000, 4096, Some(3)),
            (0x10_1000, 4096, Some(4)),
            (0x10_1ff0, 16, Some(5)),
            (0x10_2000, 1, None),
            (u64::MAX, 1, None),
        ] {
            assert_eq!(byte(&memory, addr, count), found, "{addr:#x}");
        }
    }

    #[test]
    fn pieces_that_run_on_or_say_the_same_are_one() {
        let same = [
            place(0x1000, 0x1000, 0x1000),
            place(0x2000, 0x1000, 0x2000),
            place(0x1000, 0x2000, 0x1000),
            place(0x3000, 0x1000, 0x5000),
        ];
        let memory = Memory::of_file(file(0x6000), &same).unwrap();
        let pieces: Vec<_> = memory.pieces().collect();
        assert_eq!(pieces, [(0x1000, 0x2000), (0x3000, 0x1000)]);
    }

    #[test]
    fn what_cannot_be_is_refused_and_not_touched() {
        let of = |places: &[Place]| Memory::of_file(file(0x2000), places).map(|_| ());
        for (places, expected) in [
            (&[][..], "there is no guest memory"),
            (&[place(0, 0, 0)], "has 0x0 bytes"),
            (&[place(u64::MAX, 2, 0)], "more than addresses"),
            (&[place(1 << 52, 1, 0)], "more than addresses"),
            (&[place(0, 0x2001, 0)], "cut short"),
            (&[place(0, 0x1000, u64::MAX)], "cut short"),
            (&[place(0, 0x1000, 0x1001)], "cut short"),
            (
                &[place(0, 0x1000, 0), place(0xfff, 0x1000, 0x1000)],
                "two pieces of guest memory have address 0xfff",
            ),
        ] {
            let error = of(places).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(Memory::of_files(Vec::new()).is_err());
        let twice = vec![
            (file(0x1000), place(0, 0x1000, 0)),
            (file(0x1000), place(0xfff, 0x1000, 0)),
        ];
        assert!(Memory::of_files(twice).is_err());
    }
}
