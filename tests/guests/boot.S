/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * From the PVH entry (32 bit, no paging) and from the start-up IPI (real mode) to 64-bit C; exception entry; the way into
 * CPL 3 and back.  Knows nothing of tests.
 */

#define KCODE	0x08
#define KDATA	0x10
#define UDATA	0x1b
#define UCODE	0x23

#define TRAMP	0x8000		/* where the start-up IPI lands */
#define REAL(l)	(TRAMP + (l) - tramp_start)

	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 4, 18		/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long pvh_entry

	.text
	.code32
	.globl pvh_entry
pvh_entry:
	cli
	cld
	movl $boot_stack_top, %esp
	movl %ebx, %edi			/* the start info, first argument of main */
	movl $0x620, %eax		/* PAE, OSFXSR, OSXMMEXCPT */
	movl %eax, %cr4
	movl $pml4, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx		/* EFER.LME */
	xorl %edx, %edx
	movl $0x100, %eax
	wrmsr
	movl $0x80010033, %eax		/* PG, WP, NE, ET, MP, PE */
	movl %eax, %cr0
	lgdt boot_gdtr
	ljmp $KCODE, $1f
	.code64
1:	movl $KDATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	movl $stacks + 0x8000, %esp
	movl %edi, %edi
	xorl %ebp, %ebp
	call main
2:	cli
	hlt
	jmp 2b

	/* Copied to TRAMP. As few instructions in real mode as will do: straight to long mode. */
	.section .rodata
	.code16
	.globl tramp_start, tramp_end
tramp_start:
	cli
	xorw %ax, %ax
	movw %ax, %ds
	movl $0x620, %eax
	movl %eax, %cr4
	movl $pml4, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx
	xorl %edx, %edx
	movl $0x100, %eax
	wrmsr
	lgdtl REAL(tramp_gdtr)
	movl $0x80010033, %eax
	movl %eax, %cr0
	ljmpl $KCODE, $ap_entry
	.balign 4
tramp_gdtr:
	.word boot_gdt_end - boot_gdt - 1
	.long boot_gdt
tramp_end:

	.text
	.code64
ap_entry:
	movl $KDATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	movq ap_stack, %rsp
	xorl %ebp, %ebp
	call ap_main
1:	cli
	hlt
	jmp 1b

	/* Exceptions: vectors 0-31, a uniform frame (struct frame), then C. */
	.altmacro
	.macro STUB n
stub_\n:
	.if (\n == 8) || (\n >= 10 && \n <= 14) || (\n == 17) || (\n == 21) || (\n == 29) || (\n == 30)
	.else
	pushq $0
	.endif
	pushq $\n
	jmp trap_entry
	.endm
	.set i, 0
	.rept 32
	STUB %i
	.set i, i + 1
	.endr

trap_entry:
	pushq %rax
	pushq %rbx
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %rbp
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	cld
	movq %rsp, %rdi
	movq %rsp, %rbx
	andq $-16, %rsp
	call trap
	movq %rbx, %rsp
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rbp
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rbx
	popq %rax
	addq $16, %rsp
	iretq

	/* u64 enter_user(u64 *saved_rsp, u64 rip, u64 rsp, u64 a0, u64 a1, u64 a2): returns through leave_user. */
	.globl enter_user
enter_user:
	pushq %rbx
	pushq %rbp
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	movq %rsp, (%rdi)
	movq %rsi, %rax
	movq %rdx, %r10
	movq %rcx, %rdi
	movq %r8, %rsi
	movq %r9, %rdx
	pushq $UDATA
	pushq %r10
	pushq $2
	pushq $UCODE
	pushq %rax
	iretq

	/* void leave_user(u64 saved_rsp, u64 result) */
	.globl leave_user
leave_user:
	movq %rdi, %rsp
	movl $KDATA, %eax
	movl %eax, %ss
	movl %eax, %ds
	movl %eax, %es
	movq %rsi, %rax
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %rbp
	popq %rbx
	ret

	.section .rodata
	.balign 8
	.globl trap_stubs
trap_stubs:
	.macro STUBREF n
	.quad stub_\n
	.endm
	.set i, 0
	.rept 32
	STUBREF %i
	.set i, i + 1
	.endr

	.data
	.balign 8
	.globl boot_gdt, boot_gdt_end
boot_gdt:
	.quad 0
	.quad 0x00af9a000000ffff	/* 0x08 kernel code, 64 bit */
	.quad 0x00cf92000000ffff	/* 0x10 kernel data */
	.quad 0x00cff2000000ffff	/* 0x18 user data */
	.quad 0x00affa000000ffff	/* 0x20 user code, 64 bit */
	.quad 0, 0			/* 0x28 TSS, filled in by C */
boot_gdt_end:
boot_gdtr:
	.word boot_gdt_end - boot_gdt - 1
	.long boot_gdt

	/* 4 GiB mapped to itself, CPL 0 only; the upper levels leave U and W to the leaves. */
	.balign 4096
	.globl pml4, pdpt
pml4:
	.quad pdpt + 7
	.fill 511, 8, 0
pdpt:
	.quad pds + 7, pds + 0x1007, pds + 0x2007, pds + 0x3007
	.fill 508, 8, 0
pds:
	.set i, 0
	.rept 2048
	.quad (i << 21) + 0x83
	.set i, i + 1
	.endr

	.bss
	.balign 4096
	.globl stacks, ap_stack
stacks:
	.skip 4 * 0x8000
	.skip 4096
boot_stack_top:
ap_stack:
	.skip 8
