// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is locked when a device is found: the module parameter "lock", the
 * lines about it in the kernel log, and the sysfs attribute "locked".
 */
#include "guard.h"

#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#define GUARD_BOOTLOCK_MAX	16

static char *lock = "rodata,idt";
module_param(lock, charp, 0444);
MODULE_PARM_DESC(lock, "what to lock until reset, comma separated: rodata, idt, kernel (what its page tables show it never writes or executes), range:0xSTART-0xEND (physical bytes, whole pages), text (PANICS A STOCK KERNEL), none (default: rodata,idt)");

static bool dry_run;
module_param(dry_run, bool, 0444);
MODULE_PARM_DESC(dry_run, "find the pages and log them, and do nothing else");

/**
 * struct guard_bootlock_item - one word of the parameter
 * @name: the word, up to a colon
 * @find: where its pages are; NULL: @range was given, or @lock
 * @lock: of a word that has many ranges: find, lock and log them
 * @dry: likewise: find and log them
 * @range: its pages, once @found
 * @found: @range is valid
 * @tried: the host was asked
 * @err: what came of it
 */
struct guard_bootlock_item {
	const char *name;
	int (*find)(struct guard_range *range);
	int (*lock)(void);
	void (*dry)(void);
	struct guard_range range;
	bool found;
	bool tried;
	int err;
};

static const struct guard_bootlock_item guard_bootlock_known[] = {
	{ .name = "rodata", .find = guard_find_rodata },
	{ .name = "idt", .find = guard_find_idt },
	{
		.name = "kernel",
		.lock = guard_kernellock,
		.dry = guard_kernellock_dry_run,
	},
	{ .name = "text", .find = guard_find_text },
};

/* Protects the items; held for short, never across a request. */
static DEFINE_MUTEX(guard_bootlock_mutex);
static struct guard_bootlock_item guard_bootlock_items[GUARD_BOOTLOCK_MAX];
static unsigned int guard_bootlock_count;

/* "0xSTART-0xEND", bytes, inclusive, as in /proc/iomem. */
static int guard_bootlock_parse_range(char *text, struct guard_range *range)
{
	char *dash = strchr(text, '-');
	u64 start, end;

	if (!dash)
		return -EINVAL;
	*dash = '\0';
	if (kstrtou64(text, 0, &start) || kstrtou64(dash + 1, 0, &end))
		return -EINVAL;
	if (start > end || !PAGE_ALIGNED(start) || !PAGE_ALIGNED(end + 1))
		return -EINVAL;
	range->gfn_start = start >> PAGE_SHIFT;
	range->gfn_end = end >> PAGE_SHIFT;
	return 0;
}

static int guard_bootlock_parse_word(char *word,
				     struct guard_bootlock_item *item)
{
	unsigned int i;

	if (!strncmp(word, "range:", 6)) {
		item->name = "range";
		item->found = true;
		return guard_bootlock_parse_range(word + 6, &item->range);
	}
	for (i = 0; i < ARRAY_SIZE(guard_bootlock_known); i++) {
		if (!strcmp(word, guard_bootlock_known[i].name)) {
			*item = guard_bootlock_known[i];
			return 0;
		}
	}
	return -EINVAL;
}

/**
 * guard_bootlock_parse - understand the module parameter
 *
 * Return: 0, or a negative errno after a line in the log.
 */
int guard_bootlock_parse(void)
{
	char *copy, *rest, *word;
	int err = 0;

	copy = kstrdup(lock, GFP_KERNEL);
	if (!copy)
		return -ENOMEM;

	rest = strim(copy);
	while (!err && (word = strsep(&rest, ",")) != NULL) {
		if (!*word || !strcmp(word, "none"))
			continue;
		if (guard_bootlock_count == GUARD_BOOTLOCK_MAX) {
			pr_err("lock=: more than %d words\n",
			       GUARD_BOOTLOCK_MAX);
			err = -E2BIG;
			break;
		}
		err = guard_bootlock_parse_word(word,
				&guard_bootlock_items[guard_bootlock_count]);
		if (err)
			pr_err("lock=: cannot understand \"%s\"\n", word);
		else
			guard_bootlock_count++;
	}
	kfree(copy);
	return err;
}

static void guard_bootlock_dry(const struct guard_bootlock_item *item)
{
	struct guard_range range = item->range;
	phys_addr_t start, end;

	if (item->dry) {
		item->dry();
		return;
	}
	if (item->find && item->find(&range))
		return;
	start = PFN_PHYS(range.gfn_start);
	end = PFN_PHYS(range.gfn_end) + PAGE_SIZE - 1;
	pr_info("would lock %s [mem %pa-%pa], %llu pages\n", item->name,
		&start, &end, range.gfn_end - range.gfn_start + 1);
}

/**
 * guard_bootlock_is_dry - was the module loaded only to look?
 *
 * Return: true if so.
 */
bool guard_bootlock_is_dry(void)
{
	return dry_run;
}

/**
 * guard_bootlock_dry_run - find what the parameter names, and say so
 */
void guard_bootlock_dry_run(void)
{
	unsigned int i;

	for (i = 0; i < guard_bootlock_count; i++)
		guard_bootlock_dry(&guard_bootlock_items[i]);
}

static void guard_bootlock_one(struct guard_bootlock_item *item)
{
	struct guard_range range = item->range;
	phys_addr_t start, end;
	u64 generation;
	u32 index;
	int err = 0;

	if (item->lock)
		err = item->lock();
	else if (item->find)
		err = item->find(&range);
	if (!err && !item->lock) {
		range.attributes = VIRTIO_GUARD_NOWRITE;
		err = virtio_guard_lock(&range, 1, &index, &generation);
	}

	mutex_lock(&guard_bootlock_mutex);
	item->range = range;
	item->found = item->found || range.attributes;
	item->tried = true;
	item->err = err;
	mutex_unlock(&guard_bootlock_mutex);

	if (item->lock)
		return;
	if (!range.attributes) {
		pr_err("%s is NOT locked\n", item->name);
		return;
	}
	start = PFN_PHYS(range.gfn_start);
	end = PFN_PHYS(range.gfn_end) + PAGE_SIZE - 1;
	if (err)
		pr_err("%s [mem %pa-%pa] is NOT locked: error %d\n",
		       item->name, &start, &end, err);
	else
		pr_info("locked %s [mem %pa-%pa], %llu pages, generation %llu\n",
			item->name, &start, &end,
			range.gfn_end - range.gfn_start + 1, generation);
}

/**
 * guard_bootlock_run - lock what the parameter names
 *
 * Each word is a request of its own: one that fails, which is logged, is no
 * reason to leave the others open. Locking twice is no error.
 */
void guard_bootlock_run(void)
{
	unsigned int i;

	for (i = 0; i < guard_bootlock_count; i++)
		guard_bootlock_one(&guard_bootlock_items[i]);
}

/**
 * guard_bootlock_show - the sysfs attribute "locked"
 * @buf: one page
 *
 * One line for each word of the parameter: its name, its bytes or "-", and
 * "locked", "waiting" or "failed" with the errno.
 *
 * Return: the length of the text.
 */
ssize_t guard_bootlock_show(char *buf)
{
	ssize_t len = 0;
	unsigned int i;

	mutex_lock(&guard_bootlock_mutex);
	for (i = 0; i < guard_bootlock_count; i++) {
		const struct guard_bootlock_item *item =
			&guard_bootlock_items[i];

		len += sysfs_emit_at(buf, len, "%s ", item->name);
		if (item->found)
			len += sysfs_emit_at(buf, len, "0x%llx-0x%llx ",
				item->range.gfn_start << PAGE_SHIFT,
				((item->range.gfn_end + 1) << PAGE_SHIFT) - 1);
		else
			len += sysfs_emit_at(buf, len, "- ");
		if (!item->tried)
			len += sysfs_emit_at(buf, len, "waiting\n");
		else if (item->err)
			len += sysfs_emit_at(buf, len, "failed %d\n",
					     item->err);
		else
			len += sysfs_emit_at(buf, len, "locked\n");
	}
	mutex_unlock(&guard_bootlock_mutex);
	return len;
}
