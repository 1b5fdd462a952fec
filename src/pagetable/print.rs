// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was found in page tables, for people and for programs, written as it comes.
//!
//! README.md describes the JSON document. Knows results, and not how they were found.

use std::io::{self, Write};

use serde::{Serialize, Serializer};
use vhost_guard::paging::{Collective, Extent, Malformed, Paging, Rights, Space, WalkError};
use vhost_guard::protect::PAGE_SHIFT;

use super::registers::Reading;
use super::{MemorySource, RegistersSource};
use crate::columns::{aligned, printable, size};

/// Says which document it is. Fields may be added to one; anything else changes it.
const FORMAT: u32 = 1;
/// Malformed entries that people are told of.
const MALFORMED_TOLD: usize = 10;

/// What was read, and how.
pub(crate) struct Head<'a> {
    pub(super) memory: &'a MemorySource,
    pub(super) known: &'a RegistersSource,
    pub(super) reading: &'a Reading,
    pub(super) space: &'a Space,
    pub(super) root_given: bool,
}

/// What did not come to its end, and why.
pub(crate) type Incomplete = (&'static str, WalkError);

/// Something that results are written to, in this order; each part may be left out.
pub(crate) trait Report {
    fn head(&mut self, head: &Head<'_>) -> io::Result<()>;
    fn begin_mappings(&mut self) -> io::Result<()>;
    /// One of the mappings, or of those that are writable and executable.
    fn mapping(&mut self, extent: &Extent) -> io::Result<()>;
    fn end_mappings(&mut self) -> io::Result<()>;
    fn summary(&mut self, pages: &Collective) -> io::Result<()>;
    fn begin_write_exec(&mut self, pages: &Collective) -> io::Result<()>;
    fn end_write_exec(&mut self, pages: &Collective) -> io::Result<()>;
    fn finish(&mut self, incomplete: &[Incomplete]) -> io::Result<()>;
}

/// How many pages are writable and executable in supervisor mode.
pub(super) fn write_exec_pages(pages: &Collective) -> u64 {
    by_rights(pages)
        .filter(|(rights, _)| rights.is_write_exec())
        .map(|(_, count)| count)
        .sum()
}

/// Kinds of pages that there are, and how many.
fn by_rights(pages: &Collective) -> impl Iterator<Item = (Rights, u64)> {
    let kinds = (0u8..).map(Rights::from_bits_truncate);
    kinds.zip(pages.pages()).filter(|(_, count)| *count != 0)
}

/// Frames that are writable and executable: first address, bytes, rights.
fn write_exec_frames(pages: &Collective) -> impl Iterator<Item = (u64, u64, Rights)> {
    pages
        .iter()
        .filter(|(_, rights)| rights.is_write_exec())
        .map(|(frames, rights)| {
            let gpa = frames.start().number() << PAGE_SHIFT;
            (gpa, frames.pages() << PAGE_SHIFT, rights)
        })
}

fn page_size(level: u8) -> (&'static str, u64) {
    match level {
        1 => ("4K", 4 << 10),
        2 => ("2M", 2 << 20),
        _ => ("1G", 1 << 30),
    }
}

fn pages_of(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT
}

/// For people.
pub(crate) struct Text<W> {
    out: W,
    /// Lines of the list that is being written.
    lines: u64,
}

impl<W: Write> Text<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, lines: 0 }
    }
}

const MAPPINGS_HEAD: &str =
    "FIRST ADDRESS       LAST ADDRESS        PHYSICAL ADDRESS    SIZE        PAGE  RIGHTS";

impl<W: Write> Report for Text<W> {
    fn head(&mut self, head: &Head<'_>) -> io::Result<()> {
        let Head {
            memory,
            known,
            reading,
            space,
            root_given,
        } = head;
        let paging = space.paging();
        let pieces: Vec<_> = memory.memory.pieces().collect();
        let bytes: u64 = pieces.iter().map(|(_, size)| size).sum();
        let mut ram = format!(
            "{}: {} in {} piece{}",
            memory.from,
            size(pages_of(bytes)),
            pieces.len(),
            if pieces.len() == 1 { "" } else { "s" }
        );
        if memory.left_out != 0 {
            ram.push_str(&format!("; {} more could not be had", memory.left_out));
        }
        let registers = match (known.from.as_str(), root_given) {
            ("", _) => "as given, and as a Linux has them".into(),
            (from, true) => format!("{from}, but the root as given"),
            (from, false) => from.to_owned(),
        };
        let cpl = reading.cpl.map_or("unknown".into(), |cpl| cpl.to_string());
        let values = format!(
            "CR0 {:#x}  CR3 {:#x}  CR4 {:#x}  EFER {:#x}  CPL {cpl}",
            reading.cr0, reading.cr3, reading.cr4, reading.efer
        );
        let mut root = format!("{:#x}", reading.root());
        if reading.root() != reading.cr3 {
            root.push_str(", which is CR3 without PCID and flags");
        }
        let (first, last) = addresses(space);
        let mut rows = vec![
            ("memory", ram),
            ("registers", registers),
            ("", values),
            ("root", root),
            ("paging", describe(paging)),
            ("addresses", format!("{first:#018x}-{last:#018x}")),
        ];
        if !known.from.is_empty() && !reading.assumed.is_empty() {
            let names = reading.assumed.join(", ");
            let note = format!("{names}: not known, taken as a Linux has it");
            rows.insert(3, ("", note));
        }
        if let Some(note) = user_mode(reading) {
            rows.push(("note", note.into()));
        }
        let rows: Vec<_> = rows
            .into_iter()
            .map(|(name, value)| match name {
                "" => vec![String::new(), value],
                name => vec![format!("{name}:"), value],
            })
            .collect();
        self.out.write_all(aligned(&rows).as_bytes())
    }

    fn begin_mappings(&mut self) -> io::Result<()> {
        self.lines = 0;
        writeln!(self.out, "\n{MAPPINGS_HEAD}")
    }

    fn mapping(&mut self, extent: &Extent) -> io::Result<()> {
        self.lines += 1;
        writeln!(
            self.out,
            "{:#018x}  {:#018x}  {:#018x}  {:<10}  {:<4}  {}",
            extent.va,
            extent.last(),
            extent.pa,
            size(pages_of(extent.size)),
            page_size(extent.level).0,
            extent.rights,
        )
    }

    fn end_mappings(&mut self) -> io::Result<()> {
        match self.lines {
            0 => writeln!(self.out, "nothing is mapped"),
            _ => Ok(()),
        }
    }

    fn summary(&mut self, pages: &Collective) -> io::Result<()> {
        let counts = pages.counts();
        let [small, large, huge] = counts.mappings;
        let head = [
            ("tables", pages.tables().to_string()),
            (
                "mappings",
                format!("{small} of 4K, {large} of 2M, {huge} of 1G"),
            ),
            ("malformed entries", counts.reserved.to_string()),
            (
                "tables outside",
                match counts.outside {
                    0 => "0".into(),
                    n => format!("{n}; nothing is known of what they map"),
                },
            ),
        ];
        let head = head.map(|(name, value)| vec![format!("{name}:"), value]);
        write!(self.out, "\n{}", aligned(&head))?;
        let mut rows = vec![["RIGHTS", "PAGES", "SIZE", ""].map(String::from).to_vec()];
        rows.extend(by_rights(pages).map(|(rights, count)| {
            let note = if rights.is_write_exec() { "W+X" } else { "" };
            vec![
                rights.to_string(),
                count.to_string(),
                size(count),
                note.into(),
            ]
        }));
        write!(self.out, "\n{}", aligned(&rows))?;
        if pages.malformed().is_empty() {
            return Ok(());
        }
        let mut rows = vec![
            ["MALFORMED AT", "LEVEL", "ENTRY", "WHY"]
                .map(String::from)
                .to_vec(),
        ];
        rows.extend(pages.malformed().iter().take(MALFORMED_TOLD).map(|bad| {
            vec![
                format!("{:#018x}", bad.va),
                bad.level.to_string(),
                format!("{:#018x}", bad.entry),
                bad.mistake.to_string(),
            ]
        }));
        write!(self.out, "\n{}", aligned(&rows))
    }

    fn begin_write_exec(&mut self, pages: &Collective) -> io::Result<()> {
        self.lines = 0;
        match write_exec_pages(pages) {
            0 => writeln!(self.out, "\nwritable and executable: no page"),
            count => writeln!(
                self.out,
                "\nwritable and executable: {count} page{}, {}\n\nBY ONE MAPPING\n{MAPPINGS_HEAD}",
                if count == 1 { "" } else { "s" },
                size(count)
            ),
        }
    }

    fn end_write_exec(&mut self, pages: &Collective) -> io::Result<()> {
        if write_exec_pages(pages) == 0 {
            return Ok(());
        }
        if self.lines == 0 {
            writeln!(self.out, "none")?;
        }
        writeln!(
            self.out,
            "\nBY ALL MAPPINGS TOGETHER\n\
             FIRST PHYSICAL      LAST PHYSICAL       SIZE        RIGHTS"
        )?;
        for (gpa, bytes, rights) in write_exec_frames(pages) {
            let last = gpa + (bytes - 1);
            let size = size(pages_of(bytes));
            writeln!(self.out, "{gpa:#018x}  {last:#018x}  {size:<10}  {rights}")?;
        }
        Ok(())
    }

    fn finish(&mut self, incomplete: &[Incomplete]) -> io::Result<()> {
        for (what, why) in incomplete {
            writeln!(self.out, "\nNOT COMPLETE: {what}: {why}")?;
        }
        self.out.flush()
    }
}

/// Rows are for lines; this is one, and its text from elsewhere.
fn describe(paging: &Paging) -> String {
    let on = |what: bool| if what { "on" } else { "off" };
    format!(
        "{} levels; WP {}, NXE {}, SMEP {}, shadow stacks {}; physical addresses of {} bits{}",
        paging.levels.number(),
        on(paging.wp),
        on(paging.nxe),
        on(paging.smep),
        on(paging.shadow_stacks),
        paging.physical_bits,
        if paging.gib_pages {
            ""
        } else {
            ", no 1 GiB pages"
        },
    )
}

fn user_mode(reading: &Reading) -> Option<&'static str> {
    (reading.cpl == Some(3)).then_some(
        "this CPU was in user mode: with page-table isolation CR3 has the user's tables, which map \
         little of the kernel (take another --cpu, or give the kernel's --root)",
    )
}

fn addresses(space: &Space) -> (u64, u64) {
    let vas = space.addresses();
    (*vas.start(), *vas.end())
}

/// For `serialize_with`.
pub(super) fn hex<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{number:#x}"))
}

/// A number that is an address or a register: a hexadecimal string, because not all readers of JSON have
/// 64 bits.
#[derive(Serialize)]
struct Hex(#[serde(serialize_with = "hex")] u64);

/// For programs.
pub(crate) struct Json<W> {
    out: W,
    /// Something is before this in the list or object that is being written.
    follows: bool,
}

impl<W: Write> Json<W> {
    pub(crate) fn new(out: W) -> Self {
        Self {
            out,
            follows: false,
        }
    }

    fn value(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, value).map_err(io::Error::from)
    }

    fn field(&mut self, name: &str, value: &impl Serialize) -> io::Result<()> {
        write!(self.out, ",\n\"{name}\":")?;
        self.value(value)
    }

    fn element(&mut self, value: &impl Serialize) -> io::Result<()> {
        let before: &[u8] = if self.follows { b",\n" } else { b"\n" };
        self.out.write_all(before)?;
        self.follows = true;
        self.value(value)
    }
}

#[derive(Serialize)]
struct MemoryDocument<'a> {
    from: &'a str,
    pieces: Vec<PieceDocument>,
    left_out: u64,
}

#[derive(Serialize)]
struct PieceDocument {
    gpa: Hex,
    size: u64,
}

#[derive(Serialize)]
struct RegistersDocument<'a> {
    from: Option<&'a str>,
    #[serde(flatten)]
    values: &'a Reading,
    note: Option<&'static str>,
}

#[derive(Serialize)]
struct PagingDocument {
    root: Hex,
    levels: u8,
    wp: bool,
    nxe: bool,
    smep: bool,
    shadow_stacks: bool,
    physical_bits: u8,
    gib_pages: bool,
}

#[derive(Serialize)]
struct AddressesDocument {
    first: Hex,
    last: Hex,
}

#[derive(Serialize)]
struct MappingDocument {
    va: Hex,
    va_last: Hex,
    pa: Hex,
    size: u64,
    page_size: u64,
    rights: String,
}

#[derive(Serialize)]
struct SummaryDocument {
    tables: u64,
    entries_read: u64,
    mappings: MappingCounts,
    pages: Vec<KindDocument>,
    reserved: u64,
    outside: u64,
    malformed: Vec<MalformedDocument>,
}

#[derive(Serialize)]
struct MappingCounts {
    #[serde(rename = "4K")]
    small: u64,
    #[serde(rename = "2M")]
    large: u64,
    #[serde(rename = "1G")]
    huge: u64,
}

#[derive(Serialize)]
struct KindDocument {
    rights: String,
    pages: u64,
}

#[derive(Serialize)]
struct MalformedDocument {
    va: Hex,
    level: u8,
    entry: Hex,
    why: String,
}

impl From<&Malformed> for MalformedDocument {
    fn from(bad: &Malformed) -> Self {
        Self {
            va: Hex(bad.va),
            level: bad.level,
            entry: Hex(bad.entry),
            why: bad.mistake.to_string(),
        }
    }
}

#[derive(Serialize)]
struct FramesDocument {
    gpa: Hex,
    size: u64,
    rights: String,
}

impl<W: Write> Report for Json<W> {
    fn head(&mut self, head: &Head<'_>) -> io::Result<()> {
        let Head {
            memory,
            known,
            reading,
            space,
            ..
        } = head;
        let paging = space.paging();
        let (first, last) = addresses(space);
        let pieces = memory.memory.pieces().map(|(gpa, size)| PieceDocument {
            gpa: Hex(gpa),
            size,
        });
        let from = known.from.as_str();
        write!(self.out, "{{\"format\":{FORMAT}")?;
        self.field(
            "memory",
            &MemoryDocument {
                from: &printable(&memory.from),
                pieces: pieces.collect(),
                left_out: memory.left_out,
            },
        )?;
        self.field(
            "registers",
            &RegistersDocument {
                from: (!from.is_empty()).then_some(from),
                values: reading,
                note: user_mode(reading),
            },
        )?;
        self.field(
            "paging",
            &PagingDocument {
                root: Hex(reading.root()),
                levels: paging.levels.number(),
                wp: paging.wp,
                nxe: paging.nxe,
                smep: paging.smep,
                shadow_stacks: paging.shadow_stacks,
                physical_bits: paging.physical_bits,
                gib_pages: paging.gib_pages,
            },
        )?;
        let addresses = AddressesDocument {
            first: Hex(first),
            last: Hex(last),
        };
        self.field("addresses", &addresses)
    }

    fn begin_mappings(&mut self) -> io::Result<()> {
        self.follows = false;
        write!(self.out, ",\n\"mappings\":[")
    }

    fn mapping(&mut self, extent: &Extent) -> io::Result<()> {
        self.element(&MappingDocument {
            va: Hex(extent.va),
            va_last: Hex(extent.last()),
            pa: Hex(extent.pa),
            size: extent.size,
            page_size: page_size(extent.level).1,
            rights: extent.rights.to_string(),
        })
    }

    fn end_mappings(&mut self) -> io::Result<()> {
        write!(self.out, "]")
    }

    fn summary(&mut self, pages: &Collective) -> io::Result<()> {
        let counts = pages.counts();
        let [small, large, huge] = counts.mappings;
        let kinds = by_rights(pages).map(|(rights, pages)| KindDocument {
            rights: rights.to_string(),
            pages,
        });
        self.field(
            "summary",
            &SummaryDocument {
                tables: pages.tables(),
                entries_read: pages.entries_read(),
                mappings: MappingCounts { small, large, huge },
                pages: kinds.collect(),
                reserved: counts.reserved,
                outside: counts.outside,
                malformed: pages.malformed().iter().map(Into::into).collect(),
            },
        )
    }

    fn begin_write_exec(&mut self, pages: &Collective) -> io::Result<()> {
        self.follows = false;
        let count = write_exec_pages(pages);
        write!(
            self.out,
            ",\n\"write_exec\":{{\"pages\":{count},\"mappings\":["
        )
    }

    fn end_write_exec(&mut self, pages: &Collective) -> io::Result<()> {
        write!(self.out, "],\"frames\":[")?;
        self.follows = false;
        for (gpa, size, rights) in write_exec_frames(pages) {
            self.element(&FramesDocument {
                gpa: Hex(gpa),
                size,
                rights: rights.to_string(),
            })?;
        }
        write!(self.out, "]}}")
    }

    fn finish(&mut self, incomplete: &[Incomplete]) -> io::Result<()> {
        let errors = incomplete
            .iter()
            .map(|(what, why)| format!("{what}: {why}"));
        self.field("errors", &errors.collect::<Vec<_>>())?;
        self.out.write_all(b"}\n")?;
        self.out.flush()
    }
}
