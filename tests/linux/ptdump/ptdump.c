// SPDX-License-Identifier: GPL-2.0-only
/*
 * The kernel's own account of its page tables, which Debian's kernels can give
 * but have no file for (CONFIG_PTDUMP_DEBUGFS): here as /proc/page_tables. For
 * test guests only.
 */
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/sched.h>
#include <linux/seq_file.h>

#include <asm/pgtable.h>

static int ptdump_show(struct seq_file *seq, void *unused)
{
	ptdump_walk_pgd_level_debugfs(seq, current->mm, false);
	return 0;
}

static int __init ptdump_init(void)
{
	if (!proc_create_single("page_tables", 0400, NULL, ptdump_show))
		return -ENOMEM;
	return 0;
}
module_init(ptdump_init);

static void __exit ptdump_exit(void)
{
	remove_proc_entry("page_tables", NULL);
}
module_exit(ptdump_exit);

MODULE_DESCRIPTION("page tables as the kernel sees them, for tests");
MODULE_LICENSE("GPL");
