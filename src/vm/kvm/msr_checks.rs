// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM would have checked of a guest's own access to an MSR, where it does not check the same
//! of the host's; and so which rules can be enforced to the letter (`docs/msr.md`, "What a deflected
//! access costs in exactness, on KVM").
//!
//! Pure: numbers, CPUID words and values, no ioctl. What is said of Linux' arch/x86/kvm/ holds for
//! v6.1 to v6.18.

use std::ops::RangeInclusive;

use kvm_bindings::kvm_cpuid_entry2;

use crate::protect::msr::{HostRule, MAX_PINS, MsrRange, OnRead, OnWrite, Rule};

pub(super) const SYSENTER_CS: u32 = 0x174;
pub(super) const SYSENTER_ESP: u32 = 0x175;
pub(super) const SYSENTER_EIP: u32 = 0x176;
pub(super) const PAT: u32 = 0x277;
pub(super) const PERF_CAPABILITIES: u32 = 0x345;
pub(super) const EFER: u32 = 0xc000_0080;
pub(super) const STAR: u32 = 0xc000_0081;
pub(super) const LSTAR: u32 = 0xc000_0082;
pub(super) const CSTAR: u32 = 0xc000_0083;
pub(super) const SFMASK: u32 = 0xc000_0084;
pub(super) const FS_BASE: u32 = 0xc000_0100;
pub(super) const GS_BASE: u32 = 0xc000_0101;
pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Bits of [`PERF_CAPABILITIES`] that are 0 in a guest without LBRs.
pub(super) const LBR_FORMAT: u64 = 0x3f;

const CR0_PG: u64 = 1 << 31;

const SCE: u64 = 1 << 0;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;
const SVME: u64 = 1 << 12;
const FFXSR: u64 = 1 << 14;
const TCE: u64 = 1 << 15;
const AUTOIBRS: u64 = 1 << 21;

/// Intel's LBRs. A guest that uses them has direct access, which a filter that is set later does not
/// end (vmx/vmx.c, `vmx_msr_filter_changed()`; vmx/pmu_intel.c, `vmx_passthrough_lbr_msrs()`).
const LBRS: [RangeInclusive<u32>; 6] = [
    0x40..=0x48,
    0x60..=0x68,
    0x1c8..=0x1c9,
    0x680..=0x69f,
    0x6c0..=0x6df,
    0xdc0..=0xddf,
];

/// Whether the guest's accesses and the host's read and write it alike, except for what is checked
/// here: in svm/svm.c and vmx/vmx.c nobody looks at `host_initiated` for these, nor for PAT in x86.c.
pub(super) fn is_plain(msr: u32) -> bool {
    matches!(
        msr,
        SYSENTER_CS
            | SYSENTER_ESP
            | SYSENTER_EIP
            | PAT
            | EFER
            | STAR
            | LSTAR
            | CSTAR
            | SFMASK
            | FS_BASE
            | GS_BASE
            | KERNEL_GS_BASE
    )
}

/// What can be found out about MSRs of vCPUs before there is one to ask.
pub(super) trait Probe {
    /// Whether KVM gives a value.
    fn is_readable(&self, msr: u32) -> bool;

    /// Whether what is written is there then. A KVM with `ignore_msrs=1` lets everything be written.
    fn is_kept(&self, msr: u32) -> bool;
}

/// Whether a rule of the guest's can be enforced to the letter; `lbrs`: there may be vCPUs that use
/// LBRs.
pub(super) fn can_enforce(rule: &Rule, probe: &impl Probe, lbrs: bool) -> bool {
    let free = matches!(rule.read(), None | Some(OnRead::Allow))
        && matches!(rule.write(), None | Some(OnWrite::ALLOW));
    (free || !lbrs || !speaks_of_lbrs(rule.range())) && can_carry_out(rule, probe)
}

/// The same of the host's, which is in force before a vCPU runs.
pub(super) fn can_enforce_host(rule: &HostRule, probe: &impl Probe) -> bool {
    match rule {
        HostRule::Limit(rule) => can_carry_out(rule, probe),
        // Given without asking KVM.
        HostRule::Emulate { .. } => true,
    }
}

fn speaks_of_lbrs(range: MsrRange) -> bool {
    LBRS.iter()
        .any(|lbrs| range.first() <= *lbrs.end() && *lbrs.start() <= range.last())
}

/// Whether what the rule lets through is carried out as it should be.
fn can_carry_out(rule: &Rule, probe: &impl Probe) -> bool {
    let plain = |msr| is_plain(msr) && is_known(msr, probe);
    let all = |is: &dyn Fn(u32) -> bool| {
        let (first, last) = (rule.range().first(), rule.range().last());
        // No more MSRs than that can be pinned, nor are so many plain.
        let last = last.min(first.saturating_add(MAX_PINS));
        (first..=last).all(is)
    };
    let reads = match rule.read() {
        None | Some(OnRead::Allow | OnRead::Deny) => true,
        Some(OnRead::Log) => all(&plain),
    };
    let writes = match rule.write() {
        None | Some(OnWrite::ALLOW | OnWrite::Deny) => true,
        // Nothing but what the MSR has or had is ever written.
        Some(OnWrite::Pass {
            pinned: u64::MAX,
            log: false,
        }) => all(&|msr| {
            if is_plain(msr) {
                is_known(msr, probe)
            } else {
                probe.is_readable(msr)
            }
        }),
        Some(OnWrite::Pass { .. }) => all(&plain),
    };
    reads && writes
}

/// Of plain MSRs, KVM may not know the bases: svm/svm.c has them in `KVM_GET_SREGS` only, but for
/// later versions.
fn is_known(msr: u32, probe: &impl Probe) -> bool {
    match msr {
        FS_BASE | GS_BASE => probe.is_kept(msr),
        _ => probe.is_readable(msr),
    }
}

/// CPUID as KVM has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpuid<'a>(pub(super) &'a [kvm_cpuid_entry2]);

impl Cpuid<'_> {
    fn leaf(&self, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let is = |leaf: &&kvm_cpuid_entry2| (leaf.function, leaf.index) == (function, index);
        self.0.iter().find(is).copied().unwrap_or_default()
    }

    fn vendor(&self) -> [u32; 3] {
        let leaf = self.leaf(0, 0);
        [leaf.ebx, leaf.edx, leaf.ecx]
    }
}

fn vendor(name: &[u8; 12]) -> [u32; 3] {
    let word = |at: usize| {
        name[at..at + 4]
            .iter()
            .rev()
            .fold(0, |word, &byte| word << 8 | u32::from(byte))
    };
    [word(0), word(4), word(8)]
}

/// The CPU that vCPUs are run by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// It is one of AMD's kind: its SYSENTER_ESP and SYSENTER_EIP have 32 bits.
    pub(super) amd: bool,
    /// It has linear addresses of 57 bits.
    pub(super) la57: bool,
}

impl Host {
    /// The host whose KVM supports this.
    pub(super) fn new(supported: Cpuid) -> Self {
        let amd = [vendor(b"AuthenticAMD"), vendor(b"HygonGenuine")];
        Self {
            amd: amd.contains(&supported.vendor()),
            la57: supported.leaf(7, 0).ecx & 1 << 16 != 0,
        }
    }
}

/// What a vCPU is, as far as it matters here. It cannot change once the vCPU has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guest {
    intel: bool,
    /// The bits of EFER that go with its CPUID.
    efer: u64,
}

impl Guest {
    pub(super) fn new(cpuid: Cpuid) -> Self {
        let leaf = cpuid.leaf(0x8000_0001, 0);
        let autoibrs = cpuid.leaf(0x8000_0021, 0).eax & 1 << 8 != 0;
        let has = [
            (SCE, true),
            (LME | LMA, leaf.edx & 1 << 29 != 0),
            (NXE, leaf.edx & 1 << 20 != 0),
            (FFXSR, leaf.edx & 1 << 25 != 0),
            (SVME, leaf.ecx & 1 << 2 != 0),
            (TCE, leaf.ecx & 1 << 17 != 0),
            (AUTOIBRS, autoibrs),
        ];
        let bits = has.iter().filter(|(_, has)| *has).map(|(bits, _)| bits);
        Self {
            intel: cpuid.vendor() == vendor(b"GenuineIntel"),
            efer: bits.fold(0, |all, bits| all | bits),
        }
    }

    /// The bits that an MSR has; what is written to others is lost. KVM gives and stores 64 of
    /// SYSENTER_* on AMD's CPUs if it makes believe that they are Intel's: svm/svm.c, `svm_set_msr()`.
    pub(super) fn width(&self, msr: u32, host: Host) -> u64 {
        match msr {
            SYSENTER_ESP | SYSENTER_EIP if host.amd && !self.intel => u32::MAX.into(),
            _ => u64::MAX,
        }
    }

    /// What `set_efer()` of x86.c checks if it is the guest's doing: the bits that go with CPUID
    /// (`__kvm_valid_efer()`), and that LME does not change while paging. Bits that the host does not
    /// have, it checks for everybody, and LMA it does not change for anybody. It lets guests set LMSLE
    /// if KVM can nest, whatever their CPUID says; this and bits that are not known here can only be
    /// cleared.
    pub(super) fn may_set_efer(&self, value: u64, now: u64, cr0: u64) -> bool {
        const KNOWN: u64 = SCE | LME | LMA | NXE | SVME | FFXSR | TCE | AUTOIBRS;
        value & KNOWN & !self.efer == 0
            && value & !KNOWN & !now == 0
            && (cr0 & CR0_PG == 0 || (value ^ now) & LME == 0)
    }
}

/// Whether a guest may write this to a plain MSR other than [`EFER`], as far as KVM does not look
/// itself: what it checks of PAT, LSTAR, CSTAR and the bases it checks of the host's writes, too.
pub(super) fn may_write(msr: u32, value: u64, host: Host) -> bool {
    match msr {
        // The guest writes these without an exit, and an Intel CPU checks that they are canonical.
        // `__kvm_set_msr()` makes them so instead. AMD's CPUs do not look.
        SYSENTER_ESP | SYSENTER_EIP => host.amd || is_canonical(value, host),
        _ => true,
    }
}

/// By what the CPU has, not by CR4.LA57: so does a CPU's own WRMSR.
fn is_canonical(address: u64, host: Host) -> bool {
    let unused = if host.la57 { 64 - 57 } else { 64 - 48 };
    ((address << unused) as i64 >> unused) as u64 == address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protect::msr::{Access, Action};

    const INTEL: Host = Host {
        amd: false,
        la57: false,
    };
    const AMD: Host = Host {
        amd: true,
        la57: false,
    };

    /// MSRs below 0x1000 and the plain ones can be read, and FS_BASE is kept, GS_BASE is not.
    struct Known;

    impl Probe for Known {
        fn is_readable(&self, msr: u32) -> bool {
            msr < 0x1000 || is_plain(msr)
        }

        fn is_kept(&self, msr: u32) -> bool {
            msr == FS_BASE
        }
    }

    fn rule(first: u32, last: u32, access: Access, action: Action) -> Rule {
        Rule::new(MsrRange::new(first, last).unwrap(), access, action).unwrap()
    }

    fn pin(mask: u64, log: bool) -> Action {
        Action::Pin { mask, log }
    }

    #[test]
    fn only_plain_msrs_take_rules_that_let_a_guest_write_what_it_likes() {
        let (r, w, rw) = (Access::READ, Access::WRITE, Access::all());
        for (first, last, access, action, expected) in [
            (0, u32::from(u16::MAX) / 64, rw, Action::Deny, true),
            (0xffff_0000, u32::MAX, rw, Action::Deny, true),
            (0x8b, 0x8b, w, pin(u64::MAX, false), true),
            (0x8b, 0x8b, w, pin(u64::MAX, true), false),
            (0x8b, 0x8b, w, pin(1, false), false),
            (0x8b, 0x8b, r, Action::Log, false),
            (0x8b, 0x8b, w, Action::Log, false),
            (0x1000, 0x1000, w, pin(u64::MAX, false), false),
            (0xfff, 0x1000, w, pin(u64::MAX, false), false),
            (0xfffe, u32::MAX, w, pin(u64::MAX, false), false),
            (SYSENTER_CS, SYSENTER_EIP, rw, Action::Log, true),
            (SYSENTER_CS, SYSENTER_EIP + 1, rw, Action::Log, false),
            (EFER, SFMASK, w, pin(1, true), true),
            (FS_BASE, FS_BASE, w, pin(u64::MAX, false), true),
            (GS_BASE, GS_BASE, w, pin(u64::MAX, false), false),
            (GS_BASE, GS_BASE, r, Action::Log, false),
            (GS_BASE, GS_BASE, rw, Action::Deny, true),
            (u32::MAX, u32::MAX, r, Action::Log, false),
        ] {
            let rule = rule(first, last, access, action);
            assert_eq!(can_enforce(&rule, &Known, false), expected, "{rule:?}");
            let host = HostRule::Limit(rule);
            assert_eq!(can_enforce_host(&host, &Known), expected, "{rule:?}");
        }
        let constant = HostRule::Emulate {
            range: MsrRange::new(0x1234, 0x1234).unwrap(),
            value: 1,
            log: true,
        };
        assert!(can_enforce_host(&constant, &Known));
    }

    #[test]
    fn lbrs_that_may_be_in_use_take_no_rule_but_the_hosts() {
        let all = Access::all();
        for (first, last, lbr) in [
            (0x3f, 0x3f, false),
            (0x3f, 0x40, true),
            (0x1c9, 0x1c9, true),
            (0x6df, 0x6df, true),
            (0xde0, 0xde0, false),
        ] {
            let deny = rule(first, last, all, Action::Deny);
            assert_eq!(can_enforce(&deny, &Known, true), !lbr);
            assert!(can_enforce(&deny, &Known, false));
            assert!(can_enforce_host(&HostRule::Limit(deny), &Known));
            let allow = rule(first, last, all, Action::Allow);
            assert!(can_enforce(&allow, &Known, true));
        }
    }

    #[test]
    fn addresses_of_sysenter_are_canonical_by_what_the_host_has() {
        let la57 = Host {
            la57: true,
            ..INTEL
        };
        for (value, by_48, by_57) in [
            (0, true, true),
            (0x7fff_ffff_ffff, true, true),
            (0x8000_0000_0000, false, true),
            (0xffff_8000_0000_0000, true, true),
            (0xff00_0000_0000_0000, false, true),
            (0xfe00_0000_0000_0000, false, false),
            (1 << 63, false, false),
            (u64::MAX, true, true),
        ] {
            for msr in [SYSENTER_ESP, SYSENTER_EIP] {
                assert_eq!(may_write(msr, value, INTEL), by_48, "{value:#x}");
                assert_eq!(may_write(msr, value, la57), by_57, "{value:#x}");
                assert!(may_write(msr, value, AMD));
            }
            for msr in [SYSENTER_CS, STAR, LSTAR, SFMASK, PAT] {
                assert!(may_write(msr, value, INTEL));
            }
        }
    }

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn bits_of_efer_go_with_cpuid() {
        let everything = [
            leaf(0x8000_0001, [0, 0, u32::MAX, u32::MAX]),
            leaf(0x8000_0021, [u32::MAX, 0, 0, 0]),
        ];
        let all = Guest::new(Cpuid(&everything));
        let none = Guest::new(Cpuid(&[]));
        for bit in 0..64 {
            let value = 1 << bit;
            let known = [0, 8, 10, 11, 12, 14, 15, 21].contains(&bit);
            assert_eq!(all.may_set_efer(value, 0, 0), known, "{bit}");
            assert_eq!(none.may_set_efer(value, 0, 0), bit == 0, "{bit}");
            // It can stay, and be cleared, if it is not one that CPUID is asked for.
            assert_eq!(none.may_set_efer(value, value, 0), !known || bit == 0);
            assert!(none.may_set_efer(0, value, 0));
            for (value, now) in [(value, 0), (0, value)] {
                assert_eq!(
                    all.may_set_efer(value, now, CR0_PG),
                    bit != 8 && (known || value == 0),
                    "{bit}"
                );
            }
        }
    }

    #[test]
    fn amds_cpus_have_32_bits_of_sysenter_unless_they_pass_for_intels() {
        let name = |name: &[u8; 12]| {
            let [ebx, edx, ecx] = vendor(name);
            [leaf(0, [1, ebx, ecx, edx])]
        };
        let (amd, intel) = (name(b"AuthenticAMD"), name(b"GenuineIntel"));
        assert_eq!(intel[0].ebx, 0x756e_6547);
        assert_eq!(Host::new(Cpuid(&amd)), AMD);
        assert_eq!(Host::new(Cpuid(&name(b"HygonGenuine"))), AMD);
        assert_eq!(Host::new(Cpuid(&intel)), INTEL);
        let (as_amd, as_intel) = (Guest::new(Cpuid(&amd)), Guest::new(Cpuid(&intel)));
        let half = u64::from(u32::MAX);
        for (guest, host, expected) in [
            (as_amd, AMD, half),
            (as_intel, AMD, u64::MAX),
            (as_amd, INTEL, u64::MAX),
        ] {
            assert_eq!(guest.width(SYSENTER_EIP, host), expected);
            assert_eq!(guest.width(SYSENTER_ESP, host), expected);
            assert_eq!(guest.width(LSTAR, host), u64::MAX);
        }
    }
}
