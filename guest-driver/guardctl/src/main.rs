// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `guardctl`: protects a guest's memory by way of `/dev/guard`, and shows what is protected.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, error::ErrorKind};
use rustix::io::Errno;

mod cli;
mod device;
mod explain;
mod json;
mod kernel;
mod msr;
mod range;
mod report;

use cli::{Cli, Command, MsrCommand, MsrRequest, Request};
use device::{Device, Entry, MsrEntry, Refusal};
use json::Json;
use kernel::KernelRequest;
use msr::Msrs;
use range::Range;

/// Why the program ends early.
enum Failure {
    /// The command line makes no sense: one that the parser lets through.
    Usage(String),
    /// It was refused, or failed.
    Refused(String),
    /// Nobody reads what is printed.
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(why)) => Cli::command().error(ErrorKind::ValueValidation, why).exit(),
        Err(Failure::Refused(why)) => {
            eprintln!("guardctl: {why}");
            ExitCode::FAILURE
        }
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(Failure::Output(error)) => {
            eprintln!("guardctl: standard output: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Info => {
            let info = open(cli)?.info().map_err(failure("info"))?;
            print(cli, report::info_text(&info), report::info_json(&info))
        }
        Command::Lock(request) => {
            let entries = entries(request, false)?;
            let device = open(cli)?;
            change(cli, "lock", "locked", &device, request, |device| {
                device.lock(&entries)
            })
        }
        Command::Protect(request) => {
            let entries = entries(request, true)?;
            let device = open(cli)?;
            let frees = entries.iter().all(|entry| entry.attributes == 0);
            let verb = if frees { "freed" } else { "protected" };
            change(cli, "protect", verb, &device, request, |device| {
                device.protect(&entries)
            })
        }
        Command::Seal { yes: false } => Err(Failure::Usage(
            "what is sealed stays until the next system reset: add --yes if that is what you want"
                .into(),
        )),
        Command::Seal { yes: true } => {
            let generation = open(cli)?.seal().map_err(failure("seal"))?;
            let text = format!("sealed what is protected, in generation {generation}\n");
            let json = Json::Object(vec![("generation", Json::Number(generation))]);
            print(cli, text, json)
        }
        Command::Query { ranges } => {
            let device = open(cli)?;
            let mut found = Vec::new();
            let all = [Range::ALL];
            for range in if ranges.is_empty() { &all } else { &ranges[..] } {
                found.extend(device.query(*range).map_err(failure("query"))?);
            }
            print(
                cli,
                report::entries_text(&found),
                report::entries_json(&found),
            )
        }
        Command::Kernel(request) => run_kernel(cli, request),
        Command::Msr(command) => run_msr(cli, command),
        Command::Events { follow, count } => events(cli, *follow, *count),
    }
}

fn run_kernel(cli: &Cli, request: &KernelRequest) -> Result<(), Failure> {
    let device = open(cli)?;
    let info = device.info().map_err(failure("kernel"))?;
    let entries = request.entries(info.deny_bits).map_err(Failure::Usage)?;
    let walk = device.kernel(&entries, request.modes());
    // Refused or not: what was found is what one wants to see.
    if walk.result.is_ok() || walk.counts.pages > 0 {
        let json = kernel::json(&walk, request.is_dry());
        print(cli, kernel::text(&walk), json)?;
    }
    if let Err(refusal) = walk.result {
        let why = explain::kernel_refusal(refusal, &request.ranges, &info);
        return Err(Failure::Refused(why));
    }
    match walk.counts.write_exec {
        pages if pages > 0 && request.fail_on_wx => Err(Failure::Refused(format!(
            "kernel: pages that the kernel both writes and executes: {pages}"
        ))),
        _ => Ok(()),
    }
}

fn run_msr(cli: &Cli, command: &MsrCommand) -> Result<(), Failure> {
    match command {
        MsrCommand::Lock(request) => change_rules(cli, "lock", "locked", request, Device::msr_lock),
        MsrCommand::Protect(request) => {
            change_rules(cli, "protect", "set", request, Device::msr_protect)
        }
        MsrCommand::Query { msrs } => {
            let device = open(cli)?;
            let mut found = Vec::new();
            let all = [Msrs::ALL];
            for msrs in if msrs.is_empty() { &all } else { &msrs[..] } {
                found.extend(device.msr_query(*msrs).map_err(|errno| {
                    Failure::Refused(explain::msr_refusal("query", errno.into(), &[], None))
                })?);
            }
            print(cli, report::rules_text(&found), report::rules_json(&found))
        }
        MsrCommand::Bitmap { file } => {
            let broken = |why: String| Failure::Refused(format!("{}: {why}", file.display()));
            let bytes = std::fs::read(file).map_err(|error| broken(error.to_string()))?;
            let count = msr::count_bitmaps(&bytes).map_err(broken)?;
            let device = open(cli)?;
            let generation = device.msr_bitmap(&bytes, count).map_err(|refusal| {
                let info = device.info().ok();
                Failure::Refused(explain::msr_refusal("bitmap", refusal, &[], info.as_ref()))
            })?;
            let s = if count == 1 { "" } else { "s" };
            print(
                cli,
                report::rules_done_text(&format!("set what {count} bitmap{s} say"), generation),
                report::rules_done_json(count.into(), generation),
            )
        }
    }
}

/// One request for MSRs, and what became of it.
fn change_rules(
    cli: &Cli,
    command: &str,
    verb: &str,
    request: &MsrRequest,
    ask: impl Fn(&Device, &[MsrEntry]) -> Result<u64, Refusal>,
) -> Result<(), Failure> {
    let entries = request.entries().map_err(Failure::Usage)?;
    let device = open(cli)?;
    let generation = ask(&device, &entries).map_err(|refusal| {
        let info = device.info().ok();
        Failure::Refused(explain::msr_refusal(
            command,
            refusal,
            &request.msrs,
            info.as_ref(),
        ))
    })?;
    let (count, s) = (entries.len(), if entries.len() == 1 { "" } else { "s" });
    print(
        cli,
        report::rules_done_text(&format!("{verb} {count} rule{s}"), generation),
        report::rules_done_json(count as u64, generation),
    )
}

fn open(cli: &Cli) -> Result<Device, Failure> {
    Device::open(&cli.device).map_err(|error| Failure::Refused(explain::open(&cli.device, &error)))
}

fn failure(command: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::Refused(explain::failure(command, errno))
}

fn entries(request: &Request, may_free: bool) -> Result<Vec<Entry>, Failure> {
    let attributes = request.attributes(may_free).map_err(Failure::Usage)?;
    let entry = |range: &Range| Entry {
        first: range.first,
        last: range.last,
        attributes,
    };
    Ok(request.ranges.iter().map(entry).collect())
}

/// One request, and what became of it.
fn change(
    cli: &Cli,
    command: &str,
    verb: &str,
    device: &Device,
    request: &Request,
    ask: impl Fn(&Device) -> Result<u64, Refusal>,
) -> Result<(), Failure> {
    let ranges = &request.ranges;
    let generation = ask(device).map_err(|refusal| {
        let info = device.info().ok();
        Failure::Refused(explain::refusal(command, refusal, ranges, info.as_ref()))
    })?;
    print(
        cli,
        report::done_text(verb, ranges, generation),
        report::done_json(ranges, generation),
    )
}

fn print(cli: &Cli, text: String, json: Json) -> Result<(), Failure> {
    let text = if cli.json { format!("{json}\n") } else { text };
    Ok(io::stdout().write_all(text.as_bytes())?)
}

fn events(cli: &Cli, follow: bool, count: Option<u64>) -> Result<(), Failure> {
    let mut device = open(cli)?;
    let mut out = io::stdout().lock();
    let mut left = count.unwrap_or(u64::MAX);
    // The host counts from long before: only what is added while this runs is of interest.
    let mut lost_before = None;
    if !cli.json {
        out.write_all(report::events_head().as_bytes())?;
        out.flush()?;
    }
    loop {
        let events = device.events().map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            Failure::Refused(explain::failure("events", errno))
        })?;
        for event in events {
            if cli.json {
                writeln!(out, "{}", report::event_json(&event))?;
            } else {
                let lost = event.lost.saturating_sub(lost_before.unwrap_or(event.lost));
                out.write_all(report::event_text(&event, lost).as_bytes())?;
            }
            lost_before = Some(event.lost);
            left -= 1;
            if left == 0 {
                break;
            }
        }
        out.flush()?;
        if left == 0 || !(follow || count.is_some()) {
            return Ok(());
        }
    }
}
