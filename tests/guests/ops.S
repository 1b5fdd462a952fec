/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The stores that are tried on locked pages, one function each: u64 op(void *address, u64 value, const void *source).  They are
 * position independent, so that the same code runs at CPL 0 where it is linked and at CPL 3 where the section is mapped again.
 * TRY marks the one instruction that may be refused; the exception handler records what came and goes on after it.
 */

	.macro TRY insn:vararg
771:	\insn
772:
	.pushsection .extable, "a"
	.quad 771b, 772b
	.popsection
	.endm

	.macro OP name
	.balign 16
	.globl op_\name
op_\name:
	.endm

	.section .user, "ax"

	/* A function at CPL 3 returns to here; #UD ends the trip. */
	.globl user_exit
user_exit:
	ud2

	OP mov64
	TRY movq %rsi, (%rdi)
	ret

	OP mov32
	TRY movl %esi, (%rdi)
	ret

	OP mov16
	TRY movw %si, (%rdi)
	ret

	OP mov8
	TRY movb %sil, (%rdi)
	ret

	OP xadd
	TRY lock xaddq %rsi, (%rdi)
	ret

	OP xchg
	TRY xchgq %rsi, (%rdi)
	ret

	OP cmpxchg
	movq (%rdi), %rax
	TRY lock cmpxchgq %rsi, (%rdi)
	ret

	OP inc
	TRY incq (%rdi)
	ret

	OP or
	TRY lock orq %rsi, (%rdi)
	ret

	OP bts
	movq (%rdi), %rax
	notq %rax
	bsfq %rax, %rax			/* a bit that is clear */
	TRY lock btsq %rax, (%rdi)
	ret

	OP movnti
	TRY movnti %rsi, (%rdi)
	ret

	OP movsb
	movq %rdx, %rsi
	movl $16, %ecx
	TRY rep movsb
	ret

	OP stosb
	movl %esi, %eax
	movl $16, %ecx
	TRY rep stosb
	ret

	OP stosq
	movq %rsi, %rax
	movl $2, %ecx
	TRY rep stosq
	ret

	/* CPL 3 only: an exception at CPL 0 would push its frame onto the locked page. */
	OP push
	movq %rsp, %rdx
	leaq 8(%rdi), %rsp
	TRY pushq %rsi
	movq %rdx, %rsp
	ret

	/* CPL 3 only, so that an interpreter of CPL 0 code need not know SSE. */
	OP movups
	movq %rsi, %xmm0
	TRY movups %xmm0, (%rdi)
	ret

	/* Three that KVM's emulator does not know. */
	OP cmpxchg16b
	pushq %rbx
	movq (%rdi), %rax
	movq 8(%rdi), %rdx
	movq %rsi, %rbx
	movq %rsi, %rcx
	TRY lock cmpxchg16b (%rdi)
	popq %rbx
	ret

	OP fxsave
	TRY fxsave (%rdi)
	ret

	OP fistp
	fld1
	TRY fistpll (%rdi)
	fninit
	ret

	OP load8
	TRY movb (%rdi), %al
	ret

	OP load128
	xorps %xmm0, %xmm0
	TRY movups (%rdi), %xmm0
	movq %xmm0, %rax
	ret

	OP mov256
	vmovq %rsi, %xmm0
	vpbroadcastq %xmm0, %ymm0
	TRY vmovdqu %ymm0, (%rdi)
	vzeroupper
	ret

	OP vmload
	movq %rdi, %rax
	TRY vmload %rax
	ret

	OP vmsave
	movq %rdi, %rax
	TRY vmsave %rax
	ret

	/* Reads the operand by the one instruction only. */
	OP cas16
	pushq %rbx
	xorl %eax, %eax
	xorl %edx, %edx
	movq %rsi, %rbx
	movq %rsi, %rcx
	TRY lock cmpxchg16b (%rdi)
	popq %rbx
	ret

	OP fstp80
	fldpi
	TRY fstpt (%rdi)
	fninit
	ret

	OP fld80
	fninit
	TRY fldt (%rdi)
	fninit
	ret

	/* Three that take the number of bytes, and return how many are left. */
	OP copy
	movq %rsi, %rcx
	movq %rdx, %rsi
	TRY rep movsb
	movq %rcx, %rax
	ret

	OP set
	movq %rsi, %rcx
	movl $0x5a, %eax
	TRY rep stosb
	movq %rcx, %rax
	ret

	OP scan
	movq %rsi, %rcx
	movq %rdi, %rsi
	TRY rep lodsb
	movq %rcx, %rax
	ret

	OP load
	xorl %eax, %eax
	TRY movq (%rdi), %rax
	ret

	/*
	 * u64 op_race(u64 *word, struct race *r): counts up and stores each number in *word until r->stop.
	 * r->tries is how many stores were tried, refused or not.  op_race_xadd does it with a locked read-modify-write.
	 */
	OP race
	xorl %eax, %eax
1:	incq %rax
	TRY movq %rax, (%rdi)
	movq %rax, (%rsi)
	cmpq $0, 8(%rsi)
	je 1b
	ret

	OP race_xadd
	xorl %eax, %eax
1:	incq %rax
	movl $1, %ecx
	TRY lock xaddq %rcx, (%rdi)
	movq %rax, (%rsi)
	cmpq $0, 8(%rsi)
	je 1b
	ret

	/* u64 op_rdmsr(u32 msr), 0 if it faults; op_wrmsr(u32 msr, u64 value). For CPL 0. */
	OP rdmsr
	movl %edi, %ecx
	xorl %eax, %eax
	xorl %edx, %edx
	TRY rdmsr
	shlq $32, %rdx
	orq %rdx, %rax
	ret

	OP wrmsr
	movl %edi, %ecx
	movl %esi, %eax
	movq %rsi, %rdx
	shrq $32, %rdx
	TRY wrmsr
	ret
