// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which MSRs are pinned when a device is found: the module parameter
 * "lock_msrs", the lines about it in the kernel log, and the sysfs attribute
 * "locked_msrs".
 *
 * A pinned MSR can be written with what it holds, or held when it was pinned:
 * that is all that a CPU needs which goes offline and comes back, and all that
 * an attacker who wants another system call entry does not.
 */
#include "guard.h"

#include <linux/cpumask.h>
#include <linux/errno.h>
#include <linux/gfp.h>
#include <linux/kernel.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include <asm/cpufeature.h>
#include <asm/msr-index.h>

/* The host keeps no more than this. */
#define GUARD_MSRLOCK_MAX	64

#define GUARD_MSR_NAME_LEN	16

static char *lock_msrs = "none";
module_param(lock_msrs, charp, 0444);
MODULE_PARM_DESC(lock_msrs, "MSRs to pin until reset, comma separated: none, default (what a stock kernel never changes; kexec and kdump STOP WORKING), names or numbers, each with :MASK if not all of its bits are meant (default: none)");

/**
 * struct guard_msrlock_item - one MSR of the parameter
 * @name: its name, or its number in hexadecimal
 * @msr: its number
 * @mask: the bits that are pinned
 */
struct guard_msrlock_item {
	char name[GUARD_MSR_NAME_LEN];
	u32 msr;
	u64 mask;
};

/*
 * What Linux sets when a CPU comes up and leaves alone from then on: what
 * "default" means. The whole of EFER will not do: WRMSR cannot change LMA, and a
 * CPU that comes up writes it clear; SVME is kvm_amd's.
 */
static const struct guard_msrlock_item guard_msrlock_default[] = {
	{ "STAR", MSR_STAR, U64_MAX },
	{ "LSTAR", MSR_LSTAR, U64_MAX },
	{ "CSTAR", MSR_CSTAR, U64_MAX },
	{ "SFMASK", MSR_SYSCALL_MASK, U64_MAX },
	{ "SYSENTER_CS", MSR_IA32_SYSENTER_CS, U64_MAX },
	{ "SYSENTER_ESP", MSR_IA32_SYSENTER_ESP, U64_MAX },
	{ "SYSENTER_EIP", MSR_IA32_SYSENTER_EIP, U64_MAX },
	{ "PAT", MSR_IA32_CR_PAT, U64_MAX },
	{ "APIC_BASE", MSR_IA32_APICBASE, U64_MAX },
	{ "EFER", MSR_EFER, EFER_SCE | EFER_LME | EFER_NX },
};

/* What the parameter says; does not change after guard_msrlock_parse(). */
static struct guard_msrlock_item guard_msrlock_items[GUARD_MSRLOCK_MAX];
static unsigned int guard_msrlock_count;

/* What came of it. Protects the two; never held across a request. */
static DEFINE_MUTEX(guard_msrlock_mutex);
static bool guard_msrlock_tried;
static int guard_msrlock_err;

static int guard_msrlock_add(const struct guard_msrlock_item *item)
{
	if (guard_msrlock_count == GUARD_MSRLOCK_MAX)
		return -E2BIG;
	guard_msrlock_items[guard_msrlock_count++] = *item;
	return 0;
}

static int guard_msrlock_add_default(void)
{
	unsigned int i;
	int err = 0;

	for (i = 0; i < ARRAY_SIZE(guard_msrlock_default) && !err; i++)
		err = guard_msrlock_add(&guard_msrlock_default[i]);
	return err;
}

/* By its name, with the mask that goes with it, or by its number. */
static int guard_msrlock_find(const char *word, struct guard_msrlock_item *item)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(guard_msrlock_default); i++) {
		if (!strcasecmp(word, guard_msrlock_default[i].name)) {
			*item = guard_msrlock_default[i];
			return 0;
		}
	}
	if (kstrtou32(word, 0, &item->msr))
		return -EINVAL;
	snprintf(item->name, sizeof(item->name), "0x%x", item->msr);
	item->mask = U64_MAX;
	return 0;
}

static int guard_msrlock_parse_word(char *word)
{
	struct guard_msrlock_item item;
	char *mask;

	if (!*word || !strcmp(word, "none"))
		return 0;
	if (!strcmp(word, "default"))
		return guard_msrlock_add_default();

	mask = strchr(word, ':');
	if (mask)
		*mask++ = '\0';
	if (guard_msrlock_find(word, &item))
		return -EINVAL;
	if (mask && (kstrtou64(mask, 0, &item.mask) || !item.mask))
		return -EINVAL;
	return guard_msrlock_add(&item);
}

/**
 * guard_msrlock_parse - understand the module parameter
 *
 * Return: 0, or a negative errno after a line in the log.
 */
int guard_msrlock_parse(void)
{
	char *copy, *rest, *word;
	int err = 0;

	copy = kstrdup(lock_msrs, GFP_KERNEL);
	if (!copy)
		return -ENOMEM;

	rest = strim(copy);
	while (!err && (word = strsep(&rest, ",")) != NULL) {
		err = guard_msrlock_parse_word(word);
		if (err == -E2BIG)
			pr_err("lock_msrs=: more than %d MSRs\n",
			       GUARD_MSRLOCK_MAX);
		else if (err)
			pr_err("lock_msrs=: cannot understand \"%s\"\n", word);
	}
	kfree(copy);
	return err;
}

/* " LSTAR EFER:0x901", in one line of the log; "..." where it has no room. */
static void guard_msrlock_names(char *buf, size_t size)
{
	size_t len = 0;
	unsigned int i;

	buf[0] = '\0';
	for (i = 0; i < guard_msrlock_count; i++) {
		const struct guard_msrlock_item *item = &guard_msrlock_items[i];

		if (size - len < 2 * GUARD_MSR_NAME_LEN + 16) {
			scnprintf(buf + len, size - len, " ...");
			return;
		}
		len += scnprintf(buf + len, size - len, " %s", item->name);
		if (item->mask != U64_MAX)
			len += scnprintf(buf + len, size - len, ":0x%llx",
					 item->mask);
	}
}

/* What is weaker than one may think, or works no more, with MSRs pinned. */
static void guard_msrlock_warn(void)
{
	cpumask_var_t absent;

	if (boot_cpu_has(X86_FEATURE_SVM) || boot_cpu_has(X86_FEATURE_VMX))
		pr_warn("this CPU has %s, a way round pinned MSRs: take it off the VM (-cpu ...,svm=off,vmx=off)\n",
			boot_cpu_has(X86_FEATURE_SVM) ? "SVM" : "VMX");

	if (guard_crash_kernel_reserved())
		pr_warn("a crash kernel is reserved: with MSRs pinned, kdump and kexec do not work\n");

	if (zalloc_cpumask_var(&absent, GFP_KERNEL)) {
		if (cpumask_andnot(absent, cpu_possible_mask, cpu_online_mask))
			pr_warn("CPUs %*pbl are not online: those that never were cannot come up with MSRs pinned, and reset the VM if they try\n",
				cpumask_pr_args(absent));
		free_cpumask_var(absent);
	}
}

/**
 * guard_msrlock_dry_run - say what the parameter names
 */
void guard_msrlock_dry_run(void)
{
	char names[512];

	if (!guard_msrlock_count)
		return;
	guard_msrlock_names(names, sizeof(names));
	pr_info("would pin%s\n", names);
	guard_msrlock_warn();
}

/* All of them in one request. */
static int guard_msrlock_ask(u32 *index, u64 *generation)
{
	struct guard_msr *rules;
	unsigned int i;
	int err;

	rules = kcalloc(guard_msrlock_count, sizeof(*rules), GFP_KERNEL);
	if (!rules)
		return -ENOMEM;
	for (i = 0; i < guard_msrlock_count; i++) {
		rules[i].first = guard_msrlock_items[i].msr;
		rules[i].last = guard_msrlock_items[i].msr;
		rules[i].access = VIRTIO_GUARD_MSR_WRITE;
		rules[i].action = VIRTIO_GUARD_MSR_PIN;
		rules[i].mask = guard_msrlock_items[i].mask;
	}
	err = virtio_guard_msr_lock(rules, guard_msrlock_count, index,
				    generation);
	kfree(rules);
	return err;
}

/**
 * guard_msrlock_run - pin what the parameter names
 *
 * Pinning twice is no error, and changes nothing.
 */
void guard_msrlock_run(void)
{
	u32 index = VIRTIO_GUARD_NO_INDEX;
	static bool warned;
	struct guard_info info;
	char names[512];
	u64 generation;
	int err;

	if (!guard_msrlock_count)
		return;

	err = guard_read_info(&info);
	if (!err && !info.max_msr_ranges)
		err = -EOPNOTSUPP;
	else if (!err)
		err = guard_msrlock_ask(&index, &generation);

	mutex_lock(&guard_msrlock_mutex);
	guard_msrlock_tried = true;
	guard_msrlock_err = err;
	mutex_unlock(&guard_msrlock_mutex);

	if (err == -EOPNOTSUPP && index == VIRTIO_GUARD_NO_INDEX) {
		pr_err("this host has no rules for MSRs: MSRs are NOT pinned\n");
		return;
	}
	if (err) {
		pr_err("MSRs are NOT pinned: error %d%s%s\n", err,
		       index < guard_msrlock_count ? " about " : "",
		       index < guard_msrlock_count ?
		       guard_msrlock_items[index].name : "");
		return;
	}
	guard_msrlock_names(names, sizeof(names));
	pr_info("pinned%s, generation %llu\n", names, generation);
	if (!warned)
		guard_msrlock_warn();
	warned = true;
}

/**
 * guard_msrlock_show - the sysfs attribute "locked_msrs"
 * @buf: one page
 *
 * One line for each MSR of the parameter: its name, its number, the mask, and
 * "locked", "waiting" or "failed" with the errno, which is the same for all.
 *
 * Return: the length of the text.
 */
ssize_t guard_msrlock_show(char *buf)
{
	bool tried;
	ssize_t len = 0;
	unsigned int i;
	int err;

	mutex_lock(&guard_msrlock_mutex);
	tried = guard_msrlock_tried;
	err = guard_msrlock_err;
	mutex_unlock(&guard_msrlock_mutex);

	for (i = 0; i < guard_msrlock_count; i++) {
		const struct guard_msrlock_item *item = &guard_msrlock_items[i];

		len += sysfs_emit_at(buf, len, "%s 0x%x 0x%llx ", item->name,
				     item->msr, item->mask);
		if (!tried)
			len += sysfs_emit_at(buf, len, "waiting\n");
		else if (err)
			len += sysfs_emit_at(buf, len, "failed %d\n", err);
		else
			len += sysfs_emit_at(buf, len, "locked\n");
	}
	return len;
}
