/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A 32-bit program that enters the kernel as the C library does, where the
 * kernel says (AT_SYSINFO): SYSENTER on Intel, SYSCALL on AMD. Exit status 0 when
 * it gets the answer that INT 0x80 gets, 1000 times; 1 when it does not, 2
 * when the kernel says nothing.
 */
#define AT_SYSINFO	32
#define NR_exit		1
#define NR_getppid	64

	.text
	.globl	_start
_start:
	movl	(%esp), %ecx
	leal	8(%esp,%ecx,4), %esi		/* the environment */
1:	lodsl
	testl	%eax, %eax
	jnz	1b
2:	lodsl					/* the auxiliary vector */
	movl	%eax, %edx
	testl	%edx, %edx
	jz	no_entry
	lodsl
	cmpl	$AT_SYSINFO, %edx
	jne	2b
	movl	%eax, %edi

	movl	$NR_getppid, %eax
	int	$0x80
	movl	%eax, %ebx
	movl	$1000, %esi
3:	movl	$NR_getppid, %eax
	call	*%edi
	cmpl	%ebx, %eax
	jne	differs
	decl	%esi
	jnz	3b
	xorl	%ebx, %ebx
	jmp	leave
differs:
	movl	$1, %ebx
	jmp	leave
no_entry:
	movl	$2, %ebx
leave:
	movl	$NR_exit, %eax
	int	$0x80

	.section .note.GNU-stack, "", @progbits
