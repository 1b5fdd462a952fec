// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the word "kernel" of the module parameter "lock" means: the pages, the
 * request, whether all of it came to be, and the lines about it in the log.
 *
 * The host takes away what the page tables do not use now. Asked for is what a
 * stock kernel will not use later either:
 *
 *   rodata, the IDT    neither written nor executed in kernel mode. User space
 *                      executes the vDSO, which is in rodata.
 *                      Locked in the end whatever is mapped: a mapping that
 *                      writes there is an attack.
 *   data, bss          not executed in kernel mode: code that has to be made or
 *                      moved, a kernel puts elsewhere (modules, BPF, probes,
 *                      trampolines: pages of their own; the real-mode trampoline:
 *                      low memory; kexec, hibernation: pages that they allocate).
 *                      The legacy vsyscall page is here: user space executes it.
 *
 * And not:
 *
 *   text               it is patched while the kernel runs (static keys, static
 *                      calls, ftrace), by way of mappings in the lower half.
 *   anything else      modules, BPF, vmalloc, page tables, the gaps between the
 *                      sections, .init, unused parts of .bss: such pages are freed,
 *                      and used for anything then, the text of a module too. A lock
 *                      would still be there.
 */
#include "guard.h"

#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/slab.h>

/* Of data and of bss, which freed pages may cut; one each is usual. */
#define GUARD_KERNELLOCK_PIECES	64
#define GUARD_KERNELLOCK_RANGES	(2 * GUARD_KERNELLOCK_PIECES + 2)

/* A mapping may come or go while the host reads the tables. */
#define GUARD_KERNELLOCK_TRIES	3

/* Ranges of pages that are written and executed, in the log. */
#define GUARD_KERNELLOCK_SHOWN	4

/* Ranges that one query asks for. */
#define GUARD_KERNELLOCK_QUERY	64

enum {
	/* In the order of entries: where they overlap the last one counts. */
	GUARD_PART_RODATA,
	GUARD_PART_DATA,
	GUARD_PART_BSS,
	GUARD_PART_IDT,
	GUARD_PARTS
};

static const char * const guard_part_names[GUARD_PARTS] = {
	[GUARD_PART_RODATA] = "rodata",
	[GUARD_PART_DATA] = "data",
	[GUARD_PART_BSS] = "bss",
	[GUARD_PART_IDT] = "idt",
};

/**
 * struct guard_part - one kind of pages
 * @attributes: what is asked for
 * @first: its first entry in guard_kernellock.ranges
 * @count: how many these are
 * @pages: how many pages they have
 * @used: of these, not locked for what is mapped
 * @missing: of these, not locked in the end
 */
struct guard_part {
	u64 attributes;
	u32 first;
	u32 count;
	u64 pages;
	u64 used;
	u64 missing;
};

struct guard_kernellock {
	struct guard_part parts[GUARD_PARTS];
	u32 count;
	struct guard_range ranges[GUARD_KERNELLOCK_RANGES];
	struct guard_range found[GUARD_KERNELLOCK_QUERY];
};

static int guard_part_find(unsigned int which, u64 attributes,
			   struct guard_range *ranges, u32 *count)
{
	int err;

	*count = 1;
	switch (which) {
	case GUARD_PART_RODATA:
		err = guard_find_rodata(ranges);
		break;
	case GUARD_PART_DATA:
		return guard_find_data("Kernel data", attributes, ranges,
				       GUARD_KERNELLOCK_PIECES, count);
	case GUARD_PART_BSS:
		return guard_find_data("Kernel bss", attributes, ranges,
				       GUARD_KERNELLOCK_PIECES, count);
	default:
		err = guard_find_idt(ranges);
		break;
	}
	ranges->attributes = attributes;
	return err;
}

/*
 * All parts, with as much of what they may get as there is in @offered. Rodata
 * first: it is not yet read-only while parts of .bss may still be given back.
 */
static int guard_kernellock_find(struct guard_kernellock *lock, u64 offered)
{
	unsigned int i;
	int err, first_err = 0;
	u32 n;

	lock->count = 0;
	memset(lock->parts, 0, sizeof(lock->parts));
	for (i = 0; i < GUARD_PARTS; i++) {
		struct guard_part *part = &lock->parts[i];

		part->first = lock->count;
		part->attributes = offered;
		if (i == GUARD_PART_DATA || i == GUARD_PART_BSS)
			part->attributes &= VIRTIO_GUARD_NOEXEC_KERNEL;
		if (!part->attributes)
			continue;
		err = guard_part_find(i, part->attributes,
				      &lock->ranges[part->first], &part->count);
		if (err) {
			part->count = 0;
			first_err = first_err ?: err;
		}
		lock->count += part->count;
		for (n = part->first; n < lock->count; n++)
			part->pages += lock->ranges[n].gfn_end -
				       lock->ranges[n].gfn_start + 1;
	}
	return first_err;
}

/* Pages of @range that are locked with all of its attributes. */
static int guard_kernellock_held(struct guard_kernellock *lock,
				 const struct guard_range *range, u64 *pages)
{
	const u64 want = range->attributes | VIRTIO_GUARD_IMMUTABLE;
	u64 from = range->gfn_start, total;
	u32 count, i;
	int err;

	*pages = 0;
	do {
		count = GUARD_KERNELLOCK_QUERY;
		err = virtio_guard_query(from, range->gfn_end, lock->found,
					 &count, &total);
		if (err)
			return err;
		for (i = 0; i < count; i++) {
			const struct guard_range *found = &lock->found[i];

			/* Sorted, disjoint, and of what was asked for. */
			if (found->gfn_start < from ||
			    found->gfn_end < found->gfn_start ||
			    found->gfn_end > range->gfn_end)
				return -EIO;
			from = found->gfn_end + 1;
			if ((found->attributes & want) == want)
				*pages += from - found->gfn_start;
		}
	} while (total > count && count);
	return 0;
}

/* What holds now; -EBUSY if it is not all. */
static int guard_kernellock_check(struct guard_kernellock *lock)
{
	unsigned int i;
	int err, all = 0;
	u64 held;
	u32 n;

	for (i = 0; i < GUARD_PARTS; i++) {
		struct guard_part *part = &lock->parts[i];

		part->missing = part->pages;
		for (n = 0; n < part->count; n++) {
			err = guard_kernellock_held(lock,
					&lock->ranges[part->first + n], &held);
			if (err)
				return err;
			part->missing -= held;
		}
		if (part->missing)
			all = -EBUSY;
	}
	return all;
}

static void guard_kernellock_blame(const struct guard_range *range)
{
	phys_addr_t start = PFN_PHYS(range->gfn_start);
	phys_addr_t end = PFN_PHYS(range->gfn_end) + PAGE_SIZE - 1;

	pr_err("kernel: the host refuses [mem %pa-%pa]\n", &start, &end);
}

/* Rodata and the IDT, as they were found, and whatever is mapped. */
static int guard_kernellock_force(struct guard_kernellock *lock,
				  u64 *generation)
{
	static const unsigned int forced[] = { GUARD_PART_RODATA, GUARD_PART_IDT };
	unsigned int i;
	u32 index;
	int err;

	for (i = 0; i < ARRAY_SIZE(forced); i++) {
		struct guard_part *part = &lock->parts[forced[i]];

		if (!part->count)
			continue;
		err = virtio_guard_lock(&lock->ranges[part->first], part->count,
					&index, generation);
		if (err)
			return err;
	}
	return 0;
}

/*
 * The host sets what the tables allow, page by page, and says how many pages got
 * something; whether each got all that was asked for, a query tells.
 */
static int guard_kernellock_ask(struct guard_kernellock *lock, u64 offered,
				u64 *generation)
{
	struct virtio_guard_kernel kernel = {
		.flags = VIRTIO_GUARD_KERNEL_LOCK,
		.write_exec = VIRTIO_GUARD_POLICY_REPORT,
	};
	unsigned int tries, i;
	int err;

	for (tries = 0; tries < GUARD_KERNELLOCK_TRIES; tries++) {
		err = guard_kernellock_find(lock, offered);
		if (err)
			return err;
		kernel.ranges = lock->ranges;
		kernel.count = lock->count;
		err = virtio_guard_protect_kernel(&kernel);
		if (err && kernel.index < lock->count)
			guard_kernellock_blame(&lock->ranges[kernel.index]);
		if (err)
			return err;
		*generation = kernel.generation;
		err = guard_kernellock_check(lock);
		if (err != -EBUSY)
			return err;
	}
	for (i = 0; i < GUARD_PARTS; i++)
		lock->parts[i].used = lock->parts[i].missing;
	return -EBUSY;
}

/* What the tables allow, and what must be: both are tried whatever comes. */
static int guard_kernellock_do(struct guard_kernellock *lock, u64 offered,
			       bool can_walk, u64 *generation)
{
	int err, forced;

	if (can_walk)
		err = guard_kernellock_ask(lock, offered, generation);
	else
		err = guard_kernellock_find(lock, offered) ?: -EOPNOTSUPP;
	if (!err)
		return 0;
	forced = guard_kernellock_force(lock, generation);
	if (forced)
		return forced;
	return err == -EBUSY ? guard_kernellock_check(lock) : err;
}

/* What the tables say of all memory: nothing depends on it. */
static void guard_kernellock_survey(void)
{
	struct guard_range told[GUARD_KERNELLOCK_SHOWN];
	struct virtio_guard_kernel kernel = {
		.write_exec = VIRTIO_GUARD_POLICY_REPORT,
		.told = told,
		.room = ARRAY_SIZE(told),
	};
	const struct guard_kernel_counts *counts = &kernel.counts;
	u64 written, executed;
	u32 i;
	int err;

	err = guard_walk_ram(&kernel);
	if (err) {
		pr_warn("page tables: cannot be looked over: error %d\n", err);
		return;
	}
	written = counts->pages - counts->unmapped - counts->not_written;
	executed = counts->pages - counts->unmapped - counts->not_executed;
	pr_info("page tables: %llu mappings in %llu tables; pages: %llu r--, %llu rw-, %llu r-x, %llu rwx, %llu not mapped\n",
		counts->mappings, counts->tables,
		counts->not_written - (executed - counts->write_exec),
		written - counts->write_exec, executed - counts->write_exec,
		counts->write_exec, counts->unmapped);
	if (counts->reserved || counts->outside)
		pr_warn("page tables: %llu entries have reserved bits, %llu name tables outside of memory\n",
			counts->reserved, counts->outside);
	for (i = 0; i < kernel.told_count; i++) {
		phys_addr_t start = PFN_PHYS(told[i].gfn_start);
		phys_addr_t end = PFN_PHYS(told[i].gfn_end) + PAGE_SIZE - 1;

		pr_warn("page tables: [mem %pa-%pa] is written and executed by the kernel\n",
			&start, &end);
	}
	if (counts->told > kernel.told_count)
		pr_warn("page tables: and %llu more ranges\n",
			counts->told - kernel.told_count);
}

/* " rodata 2725 idt 1": the pages of the parts that get @bit. */
static void guard_kernellock_pages(const struct guard_kernellock *lock, u64 bit,
				   char *buf, size_t size)
{
	size_t len = 0;
	unsigned int i;

	buf[0] = '\0';
	for (i = 0; i < GUARD_PARTS; i++)
		if (lock->parts[i].attributes & bit)
			len += scnprintf(buf + len, size - len, " %s %llu",
					 guard_part_names[i],
					 lock->parts[i].pages);
}

static void guard_kernellock_say(const struct guard_kernellock *lock, int err,
				 u64 generation)
{
	char nowrite[128], noexec[128];
	unsigned int i;

	for (i = 0; i < GUARD_PARTS; i++) {
		const struct guard_part *part = &lock->parts[i];

		if (part->used)
			pr_warn("kernel: mappings write or execute %llu of %llu pages of %s: %s\n",
				part->used, part->pages, guard_part_names[i],
				part->missing ? "NOT locked" :
				"locked all the same");
	}
	if (err) {
		pr_err("kernel is NOT locked as a whole: error %d\n", err);
		return;
	}
	guard_kernellock_pages(lock, VIRTIO_GUARD_NOWRITE, nowrite,
			       sizeof(nowrite));
	guard_kernellock_pages(lock, VIRTIO_GUARD_NOEXEC_KERNEL, noexec,
			       sizeof(noexec));
	pr_info("locked kernel: pages not to be written:%s; not to be executed by the kernel:%s; generation %llu\n",
		nowrite[0] ? nowrite : " none", noexec[0] ? noexec : " none",
		generation);
}

/**
 * guard_kernellock - lock what a stock kernel never writes or executes again
 *
 * Return: 0, or a negative errno; after lines in the log in either case.
 */
int guard_kernellock(void)
{
	struct guard_kernellock *lock;
	u64 generation = 0;
	struct guard_info info;
	int err;

	err = guard_read_info(&info);
	lock = err ? NULL : kzalloc(sizeof(*lock), GFP_KERNEL);
	if (!lock) {
		err = err ?: -ENOMEM;
		pr_err("kernel is NOT locked: error %d\n", err);
		return err;
	}
	if (guard_can_walk())
		guard_kernellock_survey();
	else
		pr_err("this host does not read page tables: lock=kernel is rodata and idt alone\n");
	err = guard_kernellock_do(lock, info.deny_bits & GUARD_KERNEL_BITS,
				  guard_can_walk(), &generation);
	guard_kernellock_say(lock, err, generation);
	kfree(lock);
	return err;
}

/**
 * guard_kernellock_dry_run - find what would be asked for, and say so
 */
void guard_kernellock_dry_run(void)
{
	struct guard_kernellock *lock;
	unsigned int i;
	u32 n;

	lock = kzalloc(sizeof(*lock), GFP_KERNEL);
	if (!lock || guard_kernellock_find(lock, GUARD_KERNEL_BITS))
		goto out;
	for (i = 0; i < GUARD_PARTS; i++) {
		const struct guard_part *part = &lock->parts[i];

		for (n = part->first; n < part->first + part->count; n++) {
			phys_addr_t start = PFN_PHYS(lock->ranges[n].gfn_start);
			phys_addr_t end = PFN_PHYS(lock->ranges[n].gfn_end) +
					  PAGE_SIZE - 1;

			pr_info("would lock kernel %s [mem %pa-%pa], %llu pages,%s not executed by the kernel\n",
				guard_part_names[i], &start, &end,
				lock->ranges[n].gfn_end -
				lock->ranges[n].gfn_start + 1,
				part->attributes & VIRTIO_GUARD_NOWRITE ?
				" not written," : "");
		}
	}
out:
	kfree(lock);
}
