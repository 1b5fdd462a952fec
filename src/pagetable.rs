// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-guard pagetable`: reads a guest's page tables from outside and prints what they map.
//!
//! Guest memory comes from [`dump`] or a companion, registers from the same or from [`qmp`]; `vhost_guard::paging` reads the tables, and
//! [`print`] tells what it found, as it comes: there may be millions of mappings. All of what is
//! read, tables above all, is hostile.

mod args;
mod dump;
mod memory;
mod print;
mod progress;
mod qmp;
mod registers;

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use vhost_guard::paging::{
    Collective, Extent, Limits, Mapping, Merger, Space, SpaceError, WalkError, collective, walk,
};

pub(crate) use args::Pagetable;
use dump::DumpError;
use memory::{Memory, MemoryError, Place};
use print::{Head, Json, Report, Text};
use progress::Progress;
use qmp::{Monitor, Paused, QmpError};
use registers::{NoRegisters, Reading, Registers};

use crate::cli::NoStatus;
use crate::status_client::{self, StatusError};

/// Text with registers that is read: QEMU prints some 5 KiB for each CPU.
const REGISTERS_MAX: u64 = 16 << 20;

/// Why page tables are not printed, or not all of them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PagetableError {
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error(transparent)]
    NoStatus(#[from] NoStatus),
    #[error(transparent)]
    Status(#[from] StatusError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(
        "the companion at {} gives no guest memory (it does to root and its own user only, and older \
         ones do not)",
        .0.display()
    )]
    NotGiven(PathBuf),
    #[error(
        "the companion at {} has no guest memory to give (QEMU hands it over when the guest's driver \
         starts; {left_out} pieces are not in files)",
        .path.display()
    )]
    NoMemory { path: PathBuf, left_out: u64 },
    #[error("cannot take guest memory from the companion at {}", .path.display())]
    Companion {
        path: PathBuf,
        #[source]
        source: MemoryError,
    },
    #[error("no registers say where the page tables are: give --qmp, --registers or --root")]
    NoRoot,
    #[error("the dump has no CPU {cpu}: it has the registers of {cpus}")]
    NoCpu { cpu: u32, cpus: usize },
    #[error("cannot read registers from {}", .path.display())]
    ReadRegisters {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot take registers from {}", .path.display())]
    Registers {
        path: PathBuf,
        #[source]
        source: NoRegisters,
    },
    #[error(transparent)]
    Space(#[from] SpaceError),
    #[error("{0} (is the root right, and is this all of the memory?)")]
    Root(WalkError),
    #[error("{what} is not complete: {source} (--max-entries allows more, --va looks at less)")]
    Incomplete {
        what: &'static str,
        source: WalkError,
    },
    #[error("cannot print it")]
    Print(#[source] io::Error),
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// There is a page that is writable and executable in supervisor mode, if that was asked for.
    pub(crate) write_exec: bool,
}

/// Guest memory, and where it came from.
struct MemorySource {
    memory: Memory,
    from: String,
    /// Pieces that could not be had.
    left_out: u64,
}

/// Registers, and where they came from: nothing, if nobody told any.
#[derive(Default)]
struct RegistersSource {
    registers: Registers,
    from: String,
}

/// Prints what page tables map.
pub(crate) fn run(args: &Pagetable) -> Result<Found, PagetableError> {
    let (memory, cpus) = open(args)?;
    let (registers, paused) = registers(args, cpus)?;
    let found = print_all(args, &memory, &registers);
    // That a VM stands still is worse than anything before.
    paused.map_or(Ok(()), Paused::resume)?;
    found
}

fn print_all(
    args: &Pagetable,
    memory: &MemorySource,
    known: &RegistersSource,
) -> Result<Found, PagetableError> {
    let given = args.given();
    let reading = Reading::new(known.registers, &given).ok_or(PagetableError::NoRoot)?;
    let paging = reading.paging(&given)?;
    let space = match args.va {
        Some(vas) => Space::new(paging, reading.root(), vas.first..=vas.last)?,
        None => Space::kernel_half(paging, reading.root())?,
    };
    let progress = Progress::start(args.progress);
    let walker = Walker {
        memory: &memory.memory,
        space: &space,
        limits: Limits {
            entries: args.max_entries,
            progress: Some(progress.read()),
            ..Limits::default()
        },
        progress: &progress,
    };
    let parts = args.parts();
    let added_up = if parts.summary || parts.wx || args.fail_on_wx {
        Some(walker.add_up()?)
    } else {
        None
    };
    let found = Found {
        write_exec: added_up
            .as_ref()
            .and_then(|added_up| added_up.as_ref().ok())
            .is_some_and(|pages| print::write_exec_pages(pages) != 0),
    };
    let head = Head {
        memory,
        known,
        reading: &reading,
        space: &space,
        root_given: args.root.is_some(),
    };
    let out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let printed = if args.json {
        print(Json::new(out), &walker, parts, &head, added_up)
    } else {
        print(Text::new(out), &walker, parts, &head, added_up)
    };
    match printed {
        // Whoever reads has seen enough.
        Err(PagetableError::Print(e)) if e.kind() == ErrorKind::BrokenPipe => Ok(found),
        other => other.map(|()| found),
    }
}

/// Opens guest memory; with the registers of all CPUs, if they are there, too.
fn open(args: &Pagetable) -> Result<(MemorySource, Option<Vec<Registers>>), PagetableError> {
    let Some(path) = args.memory.as_deref() else {
        return Ok((of_companion(&args.of.status_socket()?)?, None));
    };
    let maps: Vec<_> = args.map.iter().map(|map| map.0).collect();
    let dump = dump::open(path, &maps)?;
    let source = MemorySource {
        memory: dump.memory,
        from: path.display().to_string(),
        left_out: 0,
    };
    Ok((source, dump.cpus))
}

fn of_companion(path: &Path) -> Result<MemorySource, PagetableError> {
    let answer = status_client::ask(path)?;
    let status = status_client::read(&answer.document, path)?;
    let pieces = status
        .memory
        .ok_or_else(|| PagetableError::NotGiven(path.to_owned()))?;
    let left_out = status.memory_left_out.unwrap_or(0);
    if pieces.is_empty() {
        return Err(PagetableError::NoMemory {
            path: path.to_owned(),
            left_out,
        });
    }
    // One descriptor for each; another number is no companion's.
    let not_status = || StatusError::NotStatus(path.to_owned());
    if pieces.len() != answer.files.len() {
        return Err(not_status().into());
    }
    let mut files: Vec<_> = answer.files.into_iter().map(Some).collect();
    let mut places = Vec::new();
    for piece in pieces {
        let file = usize::try_from(piece.fd)
            .ok()
            .and_then(|fd| files.get_mut(fd)?.take());
        let place = Place {
            gpa: piece.gpa,
            size: piece.size,
            offset: piece.offset,
        };
        places.push((file.ok_or_else(not_status)?.into(), place));
    }
    let memory = Memory::of_files(places).map_err(|source| PagetableError::Companion {
        path: path.to_owned(),
        source,
    })?;
    Ok(MemorySource {
        memory,
        from: path.display().to_string(),
        left_out,
    })
}

/// Registers, `cpus` being those that came with the memory; and the VM, if it was stopped for it.
fn registers(
    args: &Pagetable,
    cpus: Option<Vec<Registers>>,
) -> Result<(RegistersSource, Option<Paused>), PagetableError> {
    if let Some(path) = &args.qmp {
        let cpu = args.cpu.unwrap_or(0);
        let mut monitor = Monitor::connect(path)?;
        let (registers, paused) = if args.pause {
            let paused = Paused::new(monitor)?;
            (paused.registers(cpu)?, Some(paused))
        } else {
            (monitor.registers(cpu)?, None)
        };
        let from = format!("CPU {cpu} by QEMU's monitor at {}", path.display());
        return Ok((RegistersSource { registers, from }, paused));
    }
    let source = match (&args.registers, cpus) {
        (Some(path), _) => RegistersSource {
            registers: read_registers(path, args.cpu)?,
            from: path.display().to_string(),
        },
        (None, Some(cpus)) => of_dump(&cpus, args)?,
        (None, None) => RegistersSource::default(),
    };
    Ok((source, None))
}

/// The registers of the CPU that is asked for, and what they are called.
fn of_dump(cpus: &[Registers], args: &Pagetable) -> Result<RegistersSource, PagetableError> {
    let cpu = args.cpu.unwrap_or(0);
    match usize::try_from(cpu).ok().and_then(|cpu| cpus.get(cpu)) {
        Some(registers) => Ok(RegistersSource {
            registers: *registers,
            from: format!("CPU {cpu} of {} in the dump", cpus.len()),
        }),
        // Whoever says where the root is needs none.
        None if args.root.is_some() && args.cpu.is_none() => Ok(RegistersSource::default()),
        None => Err(PagetableError::NoCpu {
            cpu,
            cpus: cpus.len(),
        }),
    }
}

fn read_registers(path: &Path, cpu: Option<u32>) -> Result<Registers, PagetableError> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        io::stdin()
            .lock()
            .take(REGISTERS_MAX)
            .read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(REGISTERS_MAX).read_to_end(&mut bytes))
    };
    read.map_err(|source| PagetableError::ReadRegisters {
        path: path.to_owned(),
        source,
    })?;
    Registers::parse(&String::from_utf8_lossy(&bytes), cpu).map_err(|source| {
        PagetableError::Registers {
            path: path.to_owned(),
            source,
        }
    })
}

/// Reads the tables of one space, again and again if need be.
struct Walker<'a> {
    memory: &'a Memory,
    space: &'a Space,
    limits: Limits<'a>,
    progress: &'a Progress,
}

impl Walker<'_> {
    /// An error is that nothing can be read at all.
    fn add_up(&self) -> Result<Result<Collective, WalkError>, PagetableError> {
        let _phase = self.progress.phase("adding up mappings", false);
        match collective(self.memory, self.space, &self.limits) {
            Err(e @ WalkError::RootOutside(_)) => Err(PagetableError::Root(e)),
            added_up => Ok(added_up),
        }
    }

    /// Hands over the mappings that are `wanted`, joined where they run on. The error inside is
    /// why these are not all.
    fn list(
        &self,
        wanted: impl Fn(&Mapping) -> bool,
        mut tell: impl FnMut(&Extent) -> io::Result<()>,
    ) -> Result<Result<(), WalkError>, PagetableError> {
        let _phase = self.progress.phase("listing mappings", true);
        let mut merger = Merger::default();
        let mut told = Ok(());
        let walked = walk(self.memory, self.space, &self.limits, |mapping| {
            if wanted(mapping)
                && let Some(extent) = merger.add(mapping)
            {
                told = tell(&extent);
            }
            match told {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        if told.is_ok() {
            told = merger.finish().iter().try_for_each(&mut tell);
        }
        told.map_err(PagetableError::Print)?;
        match walked {
            Err(e @ WalkError::RootOutside(_)) => Err(PagetableError::Root(e)),
            other => Ok(other.map(drop)),
        }
    }
}

fn print(
    mut report: impl Report,
    walker: &Walker<'_>,
    parts: args::Parts,
    head: &Head<'_>,
    added_up: Option<Result<Collective, WalkError>>,
) -> Result<(), PagetableError> {
    let failed = PagetableError::Print;
    let mut incomplete = Vec::new();
    report.head(head).map_err(failed)?;
    if parts.mappings {
        report.begin_mappings().map_err(failed)?;
        if let Err(e) = walker.list(|_| true, |extent| report.mapping(extent))? {
            incomplete.push(("the list of mappings", e));
        }
        report.end_mappings().map_err(failed)?;
    }
    match added_up {
        Some(Ok(pages)) => {
            if parts.summary {
                report.summary(&pages).map_err(failed)?;
            }
            if parts.wx {
                report.begin_write_exec(&pages).map_err(failed)?;
                // There is none to be looked for if no page is.
                if print::write_exec_pages(&pages) != 0
                    && let Err(e) = walker.list(
                        |mapping| mapping.rights.is_write_exec(),
                        |extent| report.mapping(extent),
                    )?
                {
                    incomplete.push(("the list of writable and executable mappings", e));
                }
                report.end_write_exec(&pages).map_err(failed)?;
            }
        }
        Some(Err(e)) => incomplete.push(("the summary", e)),
        None => {}
    }
    report.finish(&incomplete).map_err(failed)?;
    match incomplete.into_iter().next() {
        None => Ok(()),
        Some((what, source)) => Err(PagetableError::Incomplete { what, source }),
    }
}
