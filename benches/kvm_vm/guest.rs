// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest of a few bytes, in long mode: streams over memory and stores where it is told to, at CPL 3
//! or 0. It has no handlers: a fault ends it. Knows nothing of protections.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
pub(crate) const RAM: u64 = 64 << 20;
/// What is streamed over, and later protected in part.
pub(crate) const DATA: u64 = 16 << 20;
pub(crate) const DATA_SIZE: u64 = 16 << 20;
/// An address without memory: storing there ends a program.
pub(crate) const NOWHERE: u64 = 1 << 30;

// Pages with even numbers: what is protected here has odd ones, and page tables are written.
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x4000;
const CODE: u64 = 0xa000;

/// Bytes between two accesses: each is to another cache line.
const READ: &[u8] = &[
    0x48, 0x89, 0xfe, // pass: mov %rdi,%rsi
    0x48, 0x8b, 0x06, // next: mov (%rsi),%rax
    0x48, 0x83, 0xc6, 0x40, // add $64,%rsi
    0x48, 0x39, 0xd6, // cmp %rdx,%rsi
    0x72, 0xf4, // jb next
    0x48, 0xff, 0xc9, // dec %rcx
    0x75, 0xec, // jnz pass
    0x48, 0x89, 0x03, // mov %rax,(%rbx)
];

/// Stores to every second page.
const WRITE: &[u8] = &[
    0x48, 0x89, 0xfe, // pass: mov %rdi,%rsi
    0x41, 0xb8, 0x40, 0x00, 0x00, 0x00, // page: mov $64,%r8d
    0x48, 0x89, 0x06, // line: mov %rax,(%rsi)
    0x48, 0x83, 0xc6, 0x40, // add $64,%rsi
    0x41, 0xff, 0xc8, // dec %r8d
    0x75, 0xf4, // jnz line
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add $4096,%rsi
    0x48, 0x39, 0xd6, // cmp %rdx,%rsi
    0x72, 0xe2, // jb page
    0x48, 0xff, 0xc9, // dec %rcx
    0x75, 0xda, // jnz pass
    0x48, 0x89, 0x03, // mov %rax,(%rbx)
];

/// Stores to (%rbx) for ever.
const STORE: &[u8] = &[
    0x48, 0x89, 0x03, // again: mov %rax,(%rbx)
    0xeb, 0xfb, // jmp again
];

/// Counts at (%rdi) for ever.
const COUNT: &[u8] = &[
    0x48, 0xff, 0x07, // again: incq (%rdi)
    0xeb, 0xfb, // jmp again
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Loads from each cache line of the data.
    Read,
    /// Runs through each page of the data, which is code.
    Execute,
    /// Stores to each cache line of every second page of the data, from the first on.
    Write,
}

pub(crate) struct Guest {
    pub(crate) vcpu: VcpuFd,
}

impl Guest {
    /// With its page tables and programs in memory; each page of the data is there.
    pub(crate) fn new(vcpu: VcpuFd, memory: &GuestMemoryMmap) -> Self {
        let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("RAM");
        // Everything is mapped to itself, for CPL 3 too (bits 0 to 2), in pages of 2 MiB (bit 7).
        write(PML4, PDPT | 7);
        for (i, directory, gpa) in [(0, 0x6000, 0), (1, 0x8000, NOWHERE)] {
            write(PDPT + 8 * i, directory | 7);
            for page in 0..RAM / HUGE_PAGE {
                write(directory + 8 * page, (gpa + page * HUGE_PAGE) | 0x87);
            }
        }
        for (i, program) in [READ, WRITE, STORE, COUNT].into_iter().enumerate() {
            memory
                .write_slice(program, GuestAddress(CODE + 0x100 * i as u64))
                .expect("RAM");
        }
        for page in 0..DATA_SIZE / PAGE {
            memory
                .write_slice(&code(page), GuestAddress(code_at(page)))
                .expect("RAM");
        }
        Self { vcpu }
    }

    /// Goes over the data so many times.
    pub(crate) fn run(&mut self, program: Program, passes: u64) {
        let rip = match program {
            Program::Read => CODE,
            Program::Write => CODE + 0x100,
            Program::Execute => code_at(0),
        };
        self.set_up(3, rip, passes, NOWHERE);
        let exit = self.vcpu.run();
        let ended = matches!(exit, Ok(VcpuExit::MmioWrite(NOWHERE, _)));
        assert!(ended, "the program runs to its end");
    }

    /// Has it store to `gpa` for ever, from the next KVM_RUN on.
    pub(crate) fn store_to(&mut self, cpl: u8, gpa: u64) {
        self.set_up(cpl, CODE + 0x200, 0, gpa);
    }

    /// Has it count at [`DATA`] for ever, at CPL 3, from the next KVM_RUN on.
    pub(crate) fn count(&mut self) {
        self.set_up(3, CODE + 0x300, 0, 0);
    }

    fn set_up(&mut self, cpl: u8, rip: u64, passes: u64, rbx: u64) {
        let mut sregs = self.vcpu.get_sregs().expect("KVM tells");
        let segment = |selector: u16, type_| kvm_segment {
            limit: 0xffff_ffff,
            selector: selector | u16::from(cpl),
            type_,
            dpl: cpl,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            l: 1,
            ..segment(8, 11)
        };
        let data = kvm_segment {
            db: 1,
            ..segment(16, 3)
        };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8001_0011, PML4, 0x20);
        sregs.efer = 0x500;
        self.vcpu.set_sregs(&sregs).expect("KVM takes them");
        let regs = kvm_regs {
            rip,
            rdi: DATA,
            rdx: DATA + DATA_SIZE,
            rcx: passes,
            rbx,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).expect("KVM takes them");
    }
}

/// Where the code in a page of the data begins: not each in the same cache set.
fn code_at(page: u64) -> u64 {
    DATA + page * PAGE + page * 64 % PAGE
}

/// What it is: a few instructions, and a jump to the next page's.
fn code(page: u64) -> Vec<u8> {
    let mut code = [0x48, 0xff, 0xc0].repeat(8); // inc %rax
    let last = page + 1 == DATA_SIZE / PAGE;
    let next = if last { 0 } else { page + 1 };
    code.extend(if last {
        &[0x48, 0xff, 0xc9, 0x0f, 0x85][..] // dec %rcx; jnz first
    } else {
        &[0xe9] // jmp next
    });
    let from = code_at(page) + code.len() as u64 + 4;
    let distance = code_at(next).wrapping_sub(from) as u32;
    code.extend(distance.to_le_bytes());
    if last {
        code.extend([0x48, 0x89, 0x03]); // mov %rax,(%rbx)
    }
    code
}
