// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the host has to know to read page tables as this CPU does, and which memory
 * to ask about where nobody says.
 */
#include "guard.h"

#include <linux/cc_platform.h>
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include <asm/cpufeature.h>
#include <asm/msr.h>
#include <asm/pgtable.h>
#include <asm/processor.h>
#include <asm/special_insns.h>

/* Bit 0 of both, IA32_U_CET and IA32_S_CET; 6.1 has no name for it. */
#define GUARD_CET_SHSTK_EN	1

static u32 guard_control(unsigned long cr4)
{
	u32 control = 0;
	u64 msr;

	if (!rdmsrl_safe(MSR_EFER, &msr) && (msr & EFER_NX))
		control |= VIRTIO_GUARD_CONTROL_NXE;
	if (read_cr0() & X86_CR0_WP)
		control |= VIRTIO_GUARD_CONTROL_WP;
	if (cr4 & X86_CR4_SMEP)
		control |= VIRTIO_GUARD_CONTROL_SMEP;
	/* A CPU without CET has neither the bit nor the MSRs. */
	if ((cr4 & X86_CR4_CET) &&
	    ((!rdmsrl_safe(MSR_IA32_S_CET, &msr) && (msr & GUARD_CET_SHSTK_EN)) ||
	     (!rdmsrl_safe(MSR_IA32_U_CET, &msr) && (msr & GUARD_CET_SHSTK_EN))))
		control |= VIRTIO_GUARD_CONTROL_SHSTK;
	if (boot_cpu_has(X86_FEATURE_GBPAGES))
		control |= VIRTIO_GUARD_CONTROL_GBPAGES;
	return control;
}

/**
 * guard_walk_begin - name the page tables of this CPU, the kernel's half
 * @req: out: the fields that say so
 *
 * The tables must not be freed while the host reads them. A kernel thread runs on
 * those of whoever ran before it, which nothing keeps once it sleeps. What is
 * loaded is either them, and kept from here on, or init_mm's, which stay.
 *
 * With page table isolation that is the kernel's CR3: the user's is loaded on the
 * way out of the kernel only.
 *
 * Return: what to give to guard_walk_end(), or an ERR_PTR() after a line in the
 * log.
 */
struct mm_struct *guard_walk_begin(struct virtio_guard_kernel_req *req)
{
	struct mm_struct *mm;
	unsigned long cr4, flags, start;

	/*
	 * What page table entries have of encryption, SME's bit or TDX's, the host
	 * would take for an address, and be wrong about every page.
	 */
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT)) {
		pr_err_once("this guest's memory is encrypted: its page tables cannot be read\n");
		return ERR_PTR(-EOPNOTSUPP);
	}

	local_irq_save(flags);
	mm = current->active_mm;
	mmgrab(mm);
	req->root = cpu_to_le64(read_cr3_pa());
	cr4 = __read_cr4();
	req->control = cpu_to_le32(guard_control(cr4));
	local_irq_restore(flags);

	req->levels = (cr4 & X86_CR4_LA57) ? 5 : 4;
	/* The upper half of what 9 bits for each level, and 12, can address. */
	start = ~0UL << (PAGE_SHIFT + 9 * req->levels - 1);
	req->va_start = cpu_to_le64(start);
	req->va_end = cpu_to_le64(U64_MAX);
	req->physical_bits = boot_cpu_data.x86_phys_bits;
	return mm;
}

/**
 * guard_walk_end - the host reads them no more
 * @mm: of guard_walk_begin()
 */
void guard_walk_end(struct mm_struct *mm)
{
	mmdrop(mm);
}

/**
 * guard_walk_ram - what could be denied of all memory
 * @kernel: what is asked, but for @kernel->ranges, and what the host says
 *
 * Return: as virtio_guard_protect_kernel().
 */
int guard_walk_ram(struct virtio_guard_kernel *kernel)
{
	struct guard_range *ranges;
	struct guard_info info;
	int err;

	kernel->index = VIRTIO_GUARD_NO_INDEX;
	err = guard_read_info(&info);
	if (err)
		return err;
	ranges = kvmalloc_array(GUARD_MAX_RANGES, sizeof(*ranges), GFP_KERNEL);
	if (!ranges)
		return -ENOMEM;
	err = guard_find_ram(info.deny_bits & GUARD_KERNEL_BITS, ranges,
			     GUARD_MAX_RANGES, &kernel->count);
	if (!err) {
		kernel->ranges = ranges;
		/* A PROTECT would be refused if something is locked that is used. */
		kernel->flags |= VIRTIO_GUARD_KERNEL_DRY_RUN |
				 VIRTIO_GUARD_KERNEL_LOCK;
		err = virtio_guard_protect_kernel(kernel);
		kernel->ranges = NULL;
	}
	kvfree(ranges);
	return err;
}
