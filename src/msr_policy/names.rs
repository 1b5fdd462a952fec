// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs that a policy can call by name.
//!
//! Names are those of the manuals without their vendor's prefix; `IA32_` and `MSR_` may be put
//! before any of them.

/// Where a name and its number come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Intel SDM volume 4, table 2-2 (architectural MSRs).
    Sdm,
    /// AMD APM volume 2, appendix A (MSR cross-reference).
    Apm,
    /// Linux, arch/x86/include/uapi/asm/kvm_para.h.
    Kvm,
    /// Linux, arch/x86/include/asm/msr-index.h, for what has another name in the manuals.
    Linux,
    /// Nobody else's.
    Own,
}

use Source::{Apm, Kvm, Linux, Own, Sdm};

/// Ascending by number.
pub(super) const NAMES: &[(&str, u32, Source)] = &[
    ("TSC", 0x10, Linux),
    ("APIC_BASE", 0x1b, Sdm),
    ("FEATURE_CONTROL", 0x3a, Sdm),
    ("TSC_ADJUST", 0x3b, Sdm),
    ("SPEC_CTRL", 0x48, Sdm),
    ("PRED_CMD", 0x49, Sdm),
    ("BIOS_UPDT_TRIG", 0x79, Sdm),
    ("BIOS_SIGN_ID", 0x8b, Sdm),
    ("UCODE_REV", 0x8b, Linux),
    ("MICROCODE_REV", 0x8b, Own),
    ("SMBASE", 0x9e, Sdm),
    ("UMWAIT_CONTROL", 0xe1, Sdm),
    ("ARCH_CAPABILITIES", 0x10a, Sdm),
    ("FLUSH_CMD", 0x10b, Sdm),
    ("TSX_CTRL", 0x122, Sdm),
    ("SYSENTER_CS", 0x174, Sdm),
    ("SYSENTER_ESP", 0x175, Sdm),
    ("SYSENTER_EIP", 0x176, Sdm),
    ("MCG_CAP", 0x179, Sdm),
    ("MCG_STATUS", 0x17a, Sdm),
    ("MCG_CTL", 0x17b, Sdm),
    ("PERF_STATUS", 0x198, Sdm),
    ("PERF_CTL", 0x199, Sdm),
    ("MISC_ENABLE", 0x1a0, Sdm),
    ("ENERGY_PERF_BIAS", 0x1b0, Sdm),
    ("XFD", 0x1c4, Sdm),
    ("XFD_ERR", 0x1c5, Sdm),
    ("DEBUGCTL", 0x1d9, Sdm),
    ("PAT", 0x277, Sdm),
    ("MTRR_DEF_TYPE", 0x2ff, Sdm),
    ("PERF_CAPABILITIES", 0x345, Sdm),
    ("PERF_GLOBAL_CTRL", 0x38f, Sdm),
    ("DS_AREA", 0x600, Sdm),
    ("U_CET", 0x6a0, Sdm),
    ("S_CET", 0x6a2, Sdm),
    ("PL0_SSP", 0x6a4, Sdm),
    ("PL1_SSP", 0x6a5, Sdm),
    ("PL2_SSP", 0x6a6, Sdm),
    ("PL3_SSP", 0x6a7, Sdm),
    ("INTERRUPT_SSP_TABLE_ADDR", 0x6a8, Sdm),
    ("TSC_DEADLINE", 0x6e0, Sdm),
    ("XSS", 0xda0, Sdm),
    ("KVM_WALL_CLOCK_NEW", 0x4b56_4d00, Kvm),
    ("KVM_SYSTEM_TIME_NEW", 0x4b56_4d01, Kvm),
    ("KVM_ASYNC_PF_EN", 0x4b56_4d02, Kvm),
    ("KVM_STEAL_TIME", 0x4b56_4d03, Kvm),
    ("KVM_PV_EOI_EN", 0x4b56_4d04, Kvm),
    ("KVM_POLL_CONTROL", 0x4b56_4d05, Kvm),
    ("KVM_ASYNC_PF_INT", 0x4b56_4d06, Kvm),
    ("KVM_ASYNC_PF_ACK", 0x4b56_4d07, Kvm),
    ("KVM_MIGRATION_CONTROL", 0x4b56_4d08, Kvm),
    ("EFER", 0xc000_0080, Sdm),
    ("STAR", 0xc000_0081, Sdm),
    ("LSTAR", 0xc000_0082, Sdm),
    ("CSTAR", 0xc000_0083, Sdm),
    ("FMASK", 0xc000_0084, Sdm),
    ("SFMASK", 0xc000_0084, Apm),
    ("FS_BASE", 0xc000_0100, Sdm),
    ("GS_BASE", 0xc000_0101, Sdm),
    ("KERNEL_GS_BASE", 0xc000_0102, Sdm),
    ("TSC_AUX", 0xc000_0103, Sdm),
    ("SYSCFG", 0xc001_0010, Apm),
    ("HWCR", 0xc001_0015, Apm),
    ("VM_CR", 0xc001_0114, Apm),
    ("VM_HSAVE_PA", 0xc001_0117, Apm),
];

/// The number of the MSR that is called `name`.
pub(super) fn number(name: &str) -> Option<u32> {
    let name = name
        .strip_prefix("IA32_")
        .or_else(|| name.strip_prefix("MSR_"))
        .unwrap_or(name);
    let (_, number, _) = NAMES.iter().find(|(known, ..)| *known == name)?;
    Some(*number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_there_once_and_in_the_specification() {
        let specification = include_str!("../../docs/msr.md");
        for (i, (name, number, source)) in NAMES.iter().enumerate() {
            assert!(
                i == 0 || NAMES[i - 1].1 <= *number,
                "{name} is out of order"
            );
            assert!(NAMES[..i].iter().all(|(other, ..)| other != name), "{name}");
            let row = format!("| `{name}` | {number:#x} | {source:?} |");
            assert!(specification.contains(&row), "docs/msr.md lacks: {row}");
        }
    }

    #[test]
    fn prefixes_may_be_there() {
        for name in ["LSTAR", "IA32_LSTAR", "MSR_LSTAR"] {
            assert_eq!(number(name), Some(0xc000_0082));
        }
        for name in ["", "lstar", "LSTAR ", "IA32_MSR_LSTAR", "IA32_"] {
            assert_eq!(number(name), None);
        }
    }
}
