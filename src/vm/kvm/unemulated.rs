// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where an instruction stores to, when KVM has given up on it.
//!
//! KVM has to emulate all that stores to a read-only slot, and its emulator does not know `fxsave`,
//! say, or AVX. Pure: bytes and registers in, addresses out. The bytes are the guest's, which may be
//! hostile: any bytes give an answer, and none is trusted for more than who gets a fault.

use iced_x86::{
    Decoder, DecoderOptions, InstructionInfoFactory, MemorySize, OpAccess, Register, UsedMemory,
};

use crate::protect::PAGE_SHIFT;

/// Most bytes of an instruction.
pub(super) const MAX_LEN: usize = 15;

/// Most bytes that one instruction is taken to store, whatever CPUID says of XSAVE.
const MAX_STORE: u64 = 1 << 14;

/// Least that XSAVE stores: its legacy region and its header.
const MIN_XSAVE: u32 = 512 + 64;

const PAGE: u64 = 1 << PAGE_SHIFT;

/// Whose instruction it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registers {
    /// In the order of the encoding: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub(super) gpr: [u64; 16],
    pub(super) rip: u64,
    /// Of ES, CS, SS, DS, FS and GS.
    pub(super) bases: [u64; 6],
    /// 16, 32 or 64.
    pub(super) bits: u32,
}

/// An instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    /// RIP behind it.
    pub(super) next_rip: u64,
    /// Linear address of the first byte that it stores, of each page that it stores to. Nothing is
    /// said of what cannot be found out: scatters and tiles.
    pub(super) stores: Vec<u64>,
}

impl Registers {
    /// 64-bit code has linear addresses of 64 bits, other code of 32.
    pub(super) fn linear(&self, address: u64) -> u64 {
        if self.bits == 64 {
            address
        } else {
            address & 0xffff_ffff
        }
    }

    /// Linear address of the instruction's byte `at`.
    pub(super) fn code(&self, at: u64) -> u64 {
        let base = if self.bits == 64 { 0 } else { self.bases[1] };
        self.linear(base.wrapping_add(self.rip).wrapping_add(at))
    }

    /// What a register that addresses are made of holds; of a segment, its base.
    fn value(&self, register: Register) -> Option<u64> {
        let base = |segment: usize| {
            if self.bits == 64 && segment < 4 {
                0
            } else {
                self.bases[segment]
            }
        };
        Some(match register {
            Register::ES => base(0),
            Register::CS => base(1),
            Register::SS => base(2),
            Register::DS => base(3),
            Register::FS => base(4),
            Register::GS => base(5),
            _ if register.is_gpr() => {
                let all = *self.gpr.get(register.full_register().number())?;
                match register.size() {
                    8 => all,
                    4 => all & 0xffff_ffff,
                    2 => all & 0xffff,
                    _ => return None,
                }
            }
            _ => return None,
        })
    }

    /// The instruction that `bytes` begin with; `None` if they are none. `xsave_size` is the most that
    /// XSAVE stores.
    pub(super) fn decode(&self, bytes: &[u8], xsave_size: u32) -> Option<Decoded> {
        let bytes = &bytes[..bytes.len().min(MAX_LEN)];
        let mut decoder = Decoder::with_ip(self.bits, bytes, self.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return None;
        }
        let mut factory = InstructionInfoFactory::new();
        let mut stores = Vec::new();
        for memory in factory.info(&instruction).used_memory() {
            if is_store(memory.access())
                && let Some(size) = size(memory, xsave_size)
                && let Some(at) = memory.virtual_address(0, |register, _, _| self.value(register))
            {
                stores.extend(self.parts(at, size));
            }
        }
        Some(Decoded {
            next_rip: self.linear(instruction.next_ip()),
            stores,
        })
    }

    fn parts(&self, at: u64, size: u64) -> impl Iterator<Item = u64> + '_ {
        let first = PAGE - at % PAGE;
        let starts = (0..1).chain((first..size).step_by(PAGE as usize));
        starts.map(move |done| self.linear(at.wrapping_add(done)))
    }
}

fn is_store(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// How many bytes: 1 to [`MAX_STORE`].
fn size(memory: &UsedMemory, xsave_size: u32) -> Option<u64> {
    let size = match memory.memory_size() {
        MemorySize::Xsave | MemorySize::Xsave64 => xsave_size.max(MIN_XSAVE).into(),
        other => other.size() as u64,
    };
    (size != 0).then_some(size.min(MAX_STORE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RDI: usize = 7;

    fn registers(bits: u32) -> Registers {
        let mut registers = Registers {
            gpr: [0; 16],
            rip: 0x40_0000,
            bases: [0, 0, 0, 0, 0x1000_0000, 0x2000_0000],
            bits,
        };
        registers.gpr[RDI] = 0x1234_5400;
        registers.gpr[1] = 4;
        registers
    }

    fn stores(registers: &Registers, bytes: &[u8]) -> Vec<u64> {
        let decoded = registers.decode(bytes, 0).unwrap();
        let end = registers.rip + bytes.len() as u64;
        assert_eq!(decoded.next_rip, end, "{bytes:x?}");
        decoded.stores
    }

    #[test]
    fn what_kvms_emulator_lacks_is_found_in_64_bit_code() {
        let at = 0x1234_5400;
        for (name, bytes, expected) in [
            (
                "lock cmpxchg16b (%rdi)",
                &[0xf0, 0x48, 0x0f, 0xc7, 0x0f][..],
                at,
            ),
            ("fxsave (%rdi)", &[0x0f, 0xae, 0x07], at),
            (
                "fxsave64 -0x200(%rdi,%rcx,8)",
                &[0x48, 0x0f, 0xae, 0x84, 0xcf, 0, 0xfe, 0xff, 0xff],
                at + 32 - 0x200,
            ),
            ("fistpll (%rdi)", &[0xdf, 0x3f], at),
            ("fstpt 7(%rdi)", &[0xdb, 0x7f, 7], at + 7),
            ("fnstenv -0x40(%rdi)", &[0xd9, 0x77, 0xc0], at - 0x40),
            ("fnsave (%rdi)", &[0xdd, 0x37], at),
            (
                "pextrb $3,%xmm0,0x11(%rdi)",
                &[0x66, 0x0f, 0x3a, 0x14, 0x47, 0x11, 3],
                at + 0x11,
            ),
            ("maskmovdqu %xmm1,%xmm0", &[0x66, 0x0f, 0xf7, 0xc1], at),
            (
                "vmovdqu %ymm0,0x21(%rdi)",
                &[0xc5, 0xfe, 0x7f, 0x47, 0x21],
                at + 0x21,
            ),
            ("xsave (%rdi)", &[0x0f, 0xae, 0x27], at),
            (
                "fxsave %fs:(%rdi)",
                &[0x64, 0x0f, 0xae, 0x07],
                at + 0x1000_0000,
            ),
            ("fxsave %es:(%rdi)", &[0x26, 0x0f, 0xae, 0x07], at),
            ("fxsave (%edi)", &[0x67, 0x0f, 0xae, 0x07], at),
            (
                "fxsave 0x100(%rip)",
                &[0x0f, 0xae, 0x05, 0, 1, 0, 0],
                0x40_0000 + 7 + 0x100,
            ),
            (
                "fxsave 0x100(%eip)",
                &[0x67, 0x0f, 0xae, 0x05, 0, 1, 0, 0],
                0x40_0000 + 8 + 0x100,
            ),
        ] {
            let mut registers = registers(64);
            registers.bases[0] = 0x7777_0000;
            assert_eq!(stores(&registers, bytes), [expected], "{name}");
        }
    }

    #[test]
    fn other_code_has_segments_and_addresses_of_32_bits() {
        let mut registers = registers(32);
        registers.bases[3] = 0xf000_0000;
        registers.bases[1] = 0x5000_0000;
        assert_eq!(registers.code(2), 0x5040_0002);
        // fxsave (%edi)
        assert_eq!(stores(&registers, &[0x0f, 0xae, 0x07]), [0x0234_5400]);
        registers.gpr[RDI] |= 0xabcd << 32;
        assert_eq!(stores(&registers, &[0x0f, 0xae, 0x07]), [0x0234_5400]);
        // fxsave (%di), by 16-bit addressing: ModRM 5.
        let of_16 = [0x67, 0x0f, 0xae, 0x05];
        assert_eq!(stores(&registers, &of_16), [0xf000_5400]);
    }

    #[test]
    fn a_store_has_a_part_on_each_page_that_it_touches() {
        let mut registers = registers(64);
        let xsave = [0x0f, 0xae, 0x27];
        for (rdi, size, expected) in [
            (0x2_0000, 0, &[0x2_0000][..]),
            (0x2_0f00, 0, &[0x2_0f00, 0x2_1000]),
            (0x2_0dc0, 0, &[0x2_0dc0]),
            (0x2_0dc1, 0, &[0x2_0dc1, 0x2_1000]),
            (0x2_0fff, 4098, &[0x2_0fff, 0x2_1000, 0x2_2000]),
            (0xffff_ffff_ffff_ffc0, 0, &[0xffff_ffff_ffff_ffc0, 0]),
        ] {
            registers.gpr[RDI] = rdi;
            let decoded = registers.decode(&xsave, size).unwrap();
            assert_eq!(decoded.stores, expected, "{rdi:#x} {size}");
        }
        registers.gpr[RDI] = 0xfff;
        assert_eq!(registers.decode(&xsave, u32::MAX).unwrap().stores.len(), 5);
    }

    #[test]
    fn what_stores_nothing_or_cannot_be_found_out_has_no_part() {
        let registers = registers(64);
        // fxrstor (%rdi); fld1; vpscatterdd %zmm0,(%rdi,%zmm1){%k1}; tilestored %tmm0,(%rdi,%rcx)
        for bytes in [
            &[0x0f, 0xae, 0x0f][..],
            &[0xd9, 0xe8],
            &[0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x0f],
            &[0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x0f],
        ] {
            assert_eq!(stores(&registers, bytes), [0; 0], "{bytes:x?}");
        }
        for bytes in [&[][..], &[0x0f], &[0x0f, 0xae, 0x84], &[0x06], &[0x66; 15]] {
            assert_eq!(registers.decode(bytes, 0), None, "{bytes:x?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_and_registers_give_an_answer_of_a_few_parts(
            bytes in proptest::collection::vec(any::<u8>(), 0..20),
            prefix in proptest::sample::select(vec![vec![], vec![0x0f], vec![0x0f, 0xae], vec![0xc5], vec![0x62], vec![0x8f]]),
            gpr in any::<[u64; 16]>(),
            bases in any::<[u64; 6]>(),
            rip in any::<u64>(),
            bits in proptest::sample::select(vec![16, 32, 64]),
            xsave_size in any::<u32>(),
        ) {
            let registers = Registers { gpr, rip, bases, bits };
            let bytes = [prefix, bytes].concat();
            if let Some(decoded) = registers.decode(&bytes, xsave_size) {
                prop_assert!(decoded.stores.len() <= 64);
                prop_assert!(bits == 64 || decoded.stores.iter().all(|at| at >> 32 == 0));
            }
        }
    }
}
