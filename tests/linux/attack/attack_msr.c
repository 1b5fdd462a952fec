// SPDX-License-Identifier: GPL-2.0-only
/*
 * Attacks on the MSRs that say where system calls go, and on others that Linux
 * sets once, as code that already runs in the kernel would make them. For test
 * guests only.
 *
 * Each is tried on each CPU: another value is written and read back, and what
 * was there is put back, with interrupts off, so that nothing makes a system
 * call in between. On a stock kernel each of them works, which is the control
 * experiment; but without the NX bit, or with its local APIC elsewhere, a
 * kernel does not live to tell: those two are tried only when they are named.
 *
 * What the MSR has is written, too. That must work, always.
 */
#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bits.h>
#include <linux/cpu.h>
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/smp.h>
#include <linux/string.h>

#include <asm/msr-index.h>
#include <asm/msr.h>

static char *msrs = "star,lstar,cstar,sfmask,sysenter_cs,sysenter_esp,sysenter_eip,pat,sce";
module_param(msrs, charp, 0444);
MODULE_PARM_DESC(msrs, "comma list: the default, and nxe, apic_base");

/* What is written is what is there with these bits the other way. */
static const struct {
	const char *name;
	u32 msr;
	u64 bits;
} attack_msrs[] = {
	{ "star", MSR_STAR, BIT_ULL(48) },
	{ "lstar", MSR_LSTAR, 0x1000 },
	{ "cstar", MSR_CSTAR, 0x1000 },
	{ "sfmask", MSR_SYSCALL_MASK, 0x200 },
	{ "sysenter_cs", MSR_IA32_SYSENTER_CS, 8 },
	{ "sysenter_esp", MSR_IA32_SYSENTER_ESP, 0x1000 },
	{ "sysenter_eip", MSR_IA32_SYSENTER_EIP, 0x1000 },
	/* The last type, of which nothing is mapped: WT becomes WB. */
	{ "pat", MSR_IA32_CR_PAT, BIT_ULL(57) },
	{ "sce", MSR_EFER, EFER_SCE },
	{ "nxe", MSR_EFER, EFER_NX },
	{ "apic_base", MSR_IA32_APICBASE, 0x100000 },
};

/* One attack on one CPU, and what came of it. */
struct attack_try {
	u32 msr;
	u64 bits;
	u64 before;
	u64 after;
	u64 at_last;
	int err;
	int same_err;
};

static void attack_msr_try(void *info)
{
	struct attack_try *try = info;
	unsigned long flags;

	local_irq_save(flags);
	rdmsrl(try->msr, try->before);
	try->err = wrmsrl_safe(try->msr, try->before ^ try->bits);
	rdmsrl(try->msr, try->after);
	try->same_err = wrmsrl_safe(try->msr, try->before);
	rdmsrl(try->msr, try->at_last);
	local_irq_restore(flags);
}

static void attack_msr_one(const char *name, u32 msr, u64 bits, unsigned int cpu)
{
	struct attack_try try = { .msr = msr, .bits = bits };
	int err = smp_call_function_single(cpu, attack_msr_try, &try, 1);

	if (err)
		pr_err("cpu %u: %s: could not be tried: error %d\n", cpu, name,
		       err);
	else if (try.after == (try.before ^ bits))
		pr_info("cpu %u: %s: SUCCEEDED: error %d, changed 0x%llx->0x%llx\n",
			cpu, name, try.err, try.before, try.after);
	else if (try.after != try.before)
		pr_info("cpu %u: %s: became another: error %d, 0x%llx->0x%llx\n",
			cpu, name, try.err, try.before, try.after);
	else if (try.err)
		pr_info("cpu %u: %s: refused with error %d: unchanged 0x%llx\n",
			cpu, name, try.err, try.before);
	else
		pr_info("cpu %u: %s: ignored: unchanged 0x%llx\n", cpu, name,
			try.before);
	if (!err && (try.same_err || try.at_last != try.before))
		pr_err("cpu %u: %s: CANNOT BE WRITTEN with what it had: error %d, 0x%llx\n",
		       cpu, name, try.same_err, try.at_last);
}

static bool attack_msr_wanted(const char *name)
{
	size_t len = strlen(name);
	const char *at = msrs;

	while ((at = strstr(at, name))) {
		if ((at == msrs || at[-1] == ',') &&
		    (!at[len] || at[len] == ','))
			return true;
		at += len;
	}
	return false;
}

static int __init attack_msr_init(void)
{
	unsigned int cpu, i;

	cpus_read_lock();
	for (i = 0; i < ARRAY_SIZE(attack_msrs); i++) {
		if (!attack_msr_wanted(attack_msrs[i].name))
			continue;
		for_each_online_cpu(cpu)
			attack_msr_one(attack_msrs[i].name, attack_msrs[i].msr,
				       attack_msrs[i].bits, cpu);
	}
	cpus_read_unlock();
	return 0;
}

static void __exit attack_msr_exit(void)
{
}

module_init(attack_msr_init);
module_exit(attack_msr_exit);

MODULE_DESCRIPTION("Write to MSRs that a kernel sets once (test guests only)");
MODULE_LICENSE("GPL");
