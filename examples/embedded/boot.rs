// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest booted by PVH: its ELF in memory, and vCPUs in the state that it begins in. Knows nothing
//! of the guard.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use object::Endianness::{self, Little};
use object::elf::{FileHeader64, NoteType, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

// Where things are in the guest's physical memory.
const START_INFO: u64 = 0x1000;
const MEMORY_MAP: u64 = 0x1040;
const COMMAND_LINE: u64 = 0x2000;
/// With a zero at its end, which is there already.
const MAX_COMMAND_LINE: usize = 1024;

/// Puts a program and its command line into memory, all of which is the guest's; returns where it
/// begins. Without a path it is the guest of `tests/guests`.
pub(crate) fn load(
    elf: Option<&Path>,
    command_line: &str,
    memory: &GuestMemoryMmap,
) -> Result<u64, Box<dyn Error>> {
    let path = elf.map_or_else(built_guest, |path| Ok(path.to_owned()))?;
    let file = fs::read(&path).map_err(Into::into);
    let entry = file.and_then(|file| load_elf(&file, memory));
    let entry = entry.map_err(|e| format!("cannot load {}: {e}", path.display()))?;
    if command_line.len() >= MAX_COMMAND_LINE {
        return Err("the command line is too long".into());
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    let end = memory.last_addr().0 + 1;
    // struct hvm_memmap_table_entry and hvm_start_info of the PVH boot protocol, 8 bytes at a time.
    memory.write_obj::<[u64; 3]>([0, end, 1], GuestAddress(MEMORY_MAP))?;
    let start_info = [1 << 32 | 0x336e_c578, 0, 0, COMMAND_LINE, 0, MEMORY_MAP, 1];
    memory.write_obj::<[u64; 7]>(start_info, GuestAddress(START_INFO))?;
    Ok(entry)
}

/// The guest of `tests/guests`, which `make` builds unless it is there.
fn built_guest() -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = root.join("build/guests");
    let make = Command::new("make")
        .args(["-s", "-C"])
        .arg(root.join("tests/guests"))
        .arg(format!("OUT={}", out.display()))
        .status();
    match make {
        Ok(status) if status.success() => Ok(out.join("guard-guest.elf")),
        Ok(_) => Err("cannot build the guest (see above; it needs gcc and ld)".into()),
        Err(e) => Err(format!("cannot run make to build the guest: {e}")),
    }
}

/// Loads an ELF; returns the entry point of its PVH note.
fn load_elf(file: &[u8], memory: &GuestMemoryMmap) -> Result<u64, Box<dyn Error>> {
    const XEN_ELFNOTE_PHYS32_ENTRY: NoteType = NoteType(18);
    let header = FileHeader64::<Endianness>::parse(file)?;
    let mut entry = None;
    for segment in header.program_headers(Little, file)? {
        if segment.p_type(Little) == PT_LOAD {
            let data = segment.data(Little, file);
            let data = data.map_err(|()| "a segment is not in the file")?;
            let at = GuestAddress(segment.p_paddr(Little));
            // Memory is zero, so there is nothing to do for what is not in the file.
            memory.write_slice(data, at)?;
        } else if let Some(mut notes) = segment.notes(Little, file)? {
            while let Some(note) = notes.next()? {
                if note.name() == b"Xen" && note.n_type(Little) == XEN_ELFNOTE_PHYS32_ENTRY {
                    let address = note.desc().first_chunk().copied();
                    entry = address.map(u32::from_le_bytes);
                }
            }
        }
    }
    Ok(entry.ok_or("no PVH entry point")?.into())
}

/// Bit of CPUID's leaf 1, ECX: there is a hypervisor, whose leaves say which.
const HYPERVISOR: u32 = 1 << 31;

/// vCPU 0 begins at `entry`, in 32-bit protected mode; the others wait for it to start them.
pub(crate) fn new_vcpu(
    kvm: &Kvm,
    vm: &VmFd,
    index: u8,
    entry: u64,
) -> Result<VcpuFd, kvm_ioctls::Error> {
    let vcpu = vm.create_vcpu(index.into())?;
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => {
                leaf.ebx = leaf.ebx & 0x00ff_ffff | u32::from(index) << 24;
                leaf.ecx |= HYPERVISOR;
            }
            0xb | 0x1f => leaf.edx = index.into(),
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid)?;
    if index != 0 {
        return Ok(vcpu);
    }
    let flat = |selector, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    let data = flat(16, 3);
    (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (flat(8, 11), data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        ..flat(24, 11)
    };
    (sregs.cr0, sregs.cr4, sregs.efer) = (1, 0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(vcpu)
}
