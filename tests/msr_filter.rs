// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The filters that rules are compiled to, in a real KVM: it takes them, and deflects what they
//! say. `docs/msr.md`, what KVM is told.
//!
//! Skipped, and said so, where there is no /dev/kvm; with `VHOST_GUARD_REQUIRE_KVM` set it fails
//! there instead.

// The memslot ioctl takes the address of memory that it cannot check.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Kvm, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit,
    VcpuFd, VmFd,
};
use vhost_guard::protect::msr::{
    Access, Action, Budget, Filter, HostRule, MAX_FILTER_MSRS, MAX_FILTER_RANGES, MsrRange, Policy,
    Rule, Rules, Unlisted,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const CODE: u64 = 0x1000;
const HLT: u64 = 0x2000;
const GP_VECTOR: u64 = 13;

/// A VM with one vCPU in real mode, whose #GP handler halts.
struct Guest {
    vm: VmFd,
    vcpu: VcpuFd,
    memory: GuestMemoryMmap,
}

impl Guest {
    fn new(kvm: &Kvm) -> Self {
        let vm = kvm.create_vm().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: 0x10000,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: the memory is mapped, and lives as long as the VM: both are the guest's.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        cap.args[0] = MsrExitReason::Filter.bits().into();
        vm.enable_cap(&cap).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        memory.write_obj(0xf4u8, GuestAddress(HLT)).unwrap();
        memory
            .write_obj(HLT as u32, GuestAddress(4 * GP_VECTOR))
            .unwrap();
        Self { vm, vcpu, memory }
    }

    fn install(&self, filter: &Filter) {
        let ranges: Vec<_> = filter
            .ranges
            .iter()
            .map(|range| MsrFilterRange {
                flags: MsrFilterRangeFlags::from_bits(range.access.bits()).unwrap(),
                base: range.base,
                msr_count: range.nmsrs,
                bitmap: &range.bitmap,
            })
            .collect();
        let default = if filter.default_deny {
            MsrFilterDefaultAction::DENY
        } else {
            MsrFilterDefaultAction::ALLOW
        };
        self.vm.set_msr_filter(default, &ranges).unwrap();
    }

    /// Whether an access to `msr` comes to user space.
    fn deflects(&mut self, msr: u32, access: Access) -> bool {
        // mov ecx, msr; xor eax, eax; xor edx, edx; rdmsr or wrmsr; hlt
        let mut code = vec![0x66, 0xb9];
        code.extend(msr.to_le_bytes());
        code.extend([0x66, 0x31, 0xc0, 0x66, 0x31, 0xd2]);
        code.extend([0x0f, if access == Access::READ { 0x32 } else { 0x30 }, 0xf4]);
        self.memory.write_slice(&code, GuestAddress(CODE)).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (CODE, 0x8000, 2);
        self.vcpu.set_regs(&regs).unwrap();
        let mut deflected = false;
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::X86Rdmsr(exit) => {
                    assert_eq!((exit.index, access), (msr, Access::READ));
                    deflected = true;
                }
                VcpuExit::X86Wrmsr(exit) => {
                    assert_eq!((exit.index, access), (msr, Access::WRITE));
                    deflected = true;
                }
                VcpuExit::Hlt => return deflected,
                exit => panic!("{access:?} of {msr:#x}: {exit:?}"),
            }
        }
    }
}

fn rule(first: u32, last: u32, access: Access, action: Action) -> HostRule {
    let range = MsrRange::new(first, last).unwrap();
    HostRule::Limit(Rule::new(range, access, action).unwrap())
}

#[test]
fn the_limits_are_those_of_kvm() {
    assert_eq!(MAX_FILTER_RANGES, KVM_MSR_FILTER_MAX_RANGES as usize);
    assert_eq!(MAX_FILTER_MSRS, 8 * KVM_MSR_FILTER_MAX_BITMAP_SIZE);
}

#[test]
fn kvm_deflects_what_the_rules_speak_of_and_nothing_else() {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) if std::env::var_os("VHOST_GUARD_REQUIRE_KVM").is_none() => {
            eprintln!("skipped: /dev/kvm cannot be opened: {e}");
            return;
        }
        Err(e) => panic!("/dev/kvm cannot be opened: {e}"),
    };
    let pin = Action::Pin {
        mask: 1,
        log: false,
    };
    let lists = [
        vec![],
        vec![
            rule(0x174, 0x176, Access::all(), Action::Deny),
            rule(0x8b, 0x8b, Access::READ, Action::Log),
            rule(0x900, 0x2fff, Access::WRITE, Action::Deny),
            rule(0x4000_0000, 0x4000_2fff, Access::all(), Action::Deny),
            rule(0xc000_0081, 0xc000_0084, Access::WRITE, pin),
            rule(0xc001_0000, 0xc001_2fff, Access::all(), Action::Log),
        ],
        vec![
            rule(0x174, 0x176, Access::all(), Action::Allow),
            rule(0x10, 0x10, Access::READ, Action::Allow),
            rule(0xc000_0080, 0xc000_0084, Access::READ, Action::Allow),
            rule(0xc000_0082, 0xc000_0082, Access::WRITE, Action::Allow),
        ],
    ];
    let budget = Budget {
        filter_ranges: Some(MAX_FILTER_RANGES),
        ranges: 0,
        pins: 64,
    };
    let mut seen = [0, 0];
    for list in &lists {
        for unlisted in [Unlisted::Allow, Unlisted::Deny] {
            let policy = Policy::new(unlisted, list).unwrap();
            let (_, planned) = Rules::new(policy, budget).unwrap();
            let filter = planned.filter.unwrap();
            assert_eq!(filter.default_deny, unlisted == Unlisted::Deny);
            let mut guest = Guest::new(&kvm);
            guest.install(&filter);
            for msr in [
                0x0,
                0x10,
                0x8b,
                0x173,
                0x174,
                0x176,
                0x177,
                0x7ff,
                0x800,
                0x830,
                0x8ff,
                0x900,
                0x2fff,
                0x3000,
                0x3fff_ffff,
                0x4000_0000,
                0x4000_2fff,
                0x4000_3000,
                0x4b56_4d00,
                0xc000_0081,
                0xc000_0082,
                0xc000_0084,
                0xc000_0085,
                0xc001_0000,
                0xc001_2fff,
                0xc001_3000,
                0xffff_fffe,
                0xffff_ffff,
            ] {
                for access in [Access::READ, Access::WRITE] {
                    let says = if access == Access::READ {
                        planned
                            .decisions
                            .reads()
                            .any(|(range, _)| range.contains(msr))
                    } else {
                        planned
                            .decisions
                            .writes()
                            .any(|(range, _)| range.contains(msr))
                    };
                    assert_eq!(guest.deflects(msr, access), says, "{access:?} of {msr:#x}");
                    seen[usize::from(says)] += 1;
                }
            }
        }
    }
    assert!(seen.iter().all(|&n| n > 50), "{seen:?}");
}
