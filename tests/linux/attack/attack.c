// SPDX-License-Identifier: GPL-2.0-only
/*
 * Attacks on the kernel's own pages, as code that already runs in the kernel
 * would make them. For test guests only. On read-only ones:
 *
 *   direct  set the write bit in the page tables of the direct map, and store
 *   alias   map the page a second time, writable, and store there
 *   wp      clear CR0.WP and store through the read-only mapping
 *
 * On others, each for itself:
 *
 *   exec    map a page of the kernel's .bss a second time, executable, and call it
 *   wx      map a page of its own writable and executable, until it is unloaded
 *   hold    map the page of the byte that others write writable, as long
 *
 * On a stock kernel each of them works; that is the control experiment. What
 * was changed is changed back at once (unless keep=1). A store that faults is
 * caught and reported, and the byte is read back through another mapping.
 */
#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ioport.h>
#include <linux/kdebug.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/preempt.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

#include <asm/asm.h>
#include <asm/desc.h>
#include <asm/nospec-branch.h>
#include <asm/pgtable.h>
#include <asm/processor.h>
#include <asm/special_insns.h>
#include <asm/trapnr.h>

static char *method = "direct,alias,wp";
module_param(method, charp, 0444);
MODULE_PARM_DESC(method, "comma list of direct, alias, wp; or exec, wx, hold, selftest");

static char *target = "rodata";
module_param(target, charp, 0444);
MODULE_PARM_DESC(target, "rodata, text, idt, or gpa");

static ulong offset = ULONG_MAX;
module_param(offset, ulong, 0444);
MODULE_PARM_DESC(offset, "byte offset into the target (rodata: default is a letter of /proc/version)");

static ulong gpa;
module_param(gpa, ulong, 0444);
MODULE_PARM_DESC(gpa, "target=gpa: the guest-physical address");

static uint times = 1;
module_param(times, uint, 0444);
MODULE_PARM_DESC(times, "how often to try each method");

static bool keep;
module_param(keep, bool, 0444);
MODULE_PARM_DESC(keep, "leave a byte that could be changed as it is then");

/* The store went through; otherwise the vector of its exception. */
#define ATTACK_NO_FAULT		(-1)

/*
 * One byte. The handler of EX_TYPE_FAULT leaves the vector in eax. A fault that
 * the host injects on KVM comes after the store, not at it: it is caught at the
 * nop behind.
 */
static noinline int attack_store(u8 *at, u8 value)
{
	int vector = ATTACK_NO_FAULT;

	asm volatile("1:	movb %[value], (%[at])\n"
		     "2:	nop\n"
		     "3:\n"
		     _ASM_EXTABLE_TYPE(1b, 3b, EX_TYPE_FAULT)
		     _ASM_EXTABLE_TYPE(2b, 3b, EX_TYPE_FAULT)
		     : "+a" (vector)
		     : [value] "q" (value), [at] "r" (at)
		     : "memory");
	return vector;
}

/* Not native_write_cr0(), which would put WP back. */
static int attack_write_cr0(unsigned long cr0)
{
	int vector = ATTACK_NO_FAULT;

	asm volatile("1:	mov %[cr0], %%cr0\n"
		     "2:\n"
		     _ASM_EXTABLE_TYPE(1b, 2b, EX_TYPE_FAULT)
		     : "+a" (vector)
		     : [cr0] "r" (cr0)
		     : "memory");
	return vector;
}

static void attack_invlpg(unsigned long va)
{
	asm volatile("invlpg (%0)" : : "r" (va) : "memory");
}

/* The entries that map @va, top first, to the leaf; how many they are. */
static int attack_walk(unsigned long va, u64 **entries)
{
	int level = (__read_cr4() & X86_CR4_LA57) ? 5 : 4;
	u64 *table = __va(read_cr3_pa());
	int count = 0;

	for (; level; level--) {
		unsigned int shift = PAGE_SHIFT + 9 * (level - 1);
		u64 *entry = &table[(va >> shift) & 511];

		if (!(READ_ONCE(*entry) & _PAGE_PRESENT))
			return 0;
		entries[count++] = entry;
		if (level == 1 || (level <= 3 && (*entry & _PAGE_PSE)))
			break;
		table = __va(READ_ONCE(*entry) & PTE_PFN_MASK);
	}
	return count;
}

static int attack_direct(phys_addr_t pa, u8 value)
{
	unsigned long va = (unsigned long)__va(pa);
	u64 *entries[5], saved[5];
	unsigned long flags;
	int vector, count, i;

	local_irq_save(flags);
	count = attack_walk(va, entries);
	for (i = 0; i < count; i++) {
		saved[i] = READ_ONCE(*entries[i]);
		WRITE_ONCE(*entries[i], saved[i] | _PAGE_RW);
	}
	attack_invlpg(va);
	vector = attack_store((u8 *)va, value);
	for (i = 0; i < count; i++)
		WRITE_ONCE(*entries[i], saved[i]);
	attack_invlpg(va);
	local_irq_restore(flags);
	return vector;
}

static int attack_alias(phys_addr_t pa, u8 value)
{
	struct page *page = pfn_to_page(PHYS_PFN(pa));
	void *alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	int vector;

	if (!alias)
		return -ENOMEM;
	vector = attack_store(alias + offset_in_page(pa), value);
	vunmap(alias);
	return vector;
}

static int attack_wp(phys_addr_t pa, u8 value)
{
	unsigned long flags, cr0;
	int vector;

	/* No interrupt may run without WP; a fault that is caught does. */
	local_irq_save(flags);
	cr0 = native_read_cr0();
	vector = attack_write_cr0(cr0 & ~X86_CR0_WP);
	if (vector == ATTACK_NO_FAULT) {
		vector = attack_store(__va(pa), value);
		attack_write_cr0(cr0);
	}
	local_irq_restore(flags);
	return vector;
}

static const struct {
	const char *name;
	int (*store)(phys_addr_t pa, u8 value);
} attack_methods[] = {
	{ "direct", attack_direct },
	{ "alias", attack_alias },
	{ "wp", attack_wp },
};

/* A fresh mapping, lest a stale translation tell us what we want to hear. */
static int attack_read(phys_addr_t pa)
{
	struct page *page = pfn_to_page(PHYS_PFN(pa));
	u8 *map = vmap(&page, 1, VM_MAP, PAGE_KERNEL_RO);
	int value;

	if (!map)
		return -ENOMEM;
	value = READ_ONCE(map[offset_in_page(pa)]);
	vunmap(map);
	return value;
}

/* "#GP", as the SDM has it. */
static const char *attack_vector_name(int vector)
{
	switch (vector) {
	case X86_TRAP_GP:
		return "#GP";
	case X86_TRAP_PF:
		return "#PF";
	case X86_TRAP_MC:
		return "#MC";
	default:
		return "fault";
	}
}

static void attack_once(unsigned int which, phys_addr_t pa)
{
	const char *name = attack_methods[which].name;
	int before, after, vector;
	u8 value;

	before = attack_read(pa);
	if (before < 0) {
		pr_err("%s: cannot read the target\n", name);
		return;
	}
	/* The other case, where it is a letter. */
	value = before ^ 0x20;
	vector = attack_methods[which].store(pa, value);
	after = attack_read(pa);

	if (vector < ATTACK_NO_FAULT)
		pr_err("%s: could not be tried: error %d\n", name, vector);
	else if (after != before)
		pr_info("%s: SUCCEEDED at %pa: byte changed 0x%02x->0x%02x\n",
			name, &pa, before, after);
	else if (vector == ATTACK_NO_FAULT)
		pr_info("%s: store ignored at %pa: byte unchanged 0x%02x\n",
			name, &pa, before);
	else
		pr_info("%s: store refused by %s (vector %d) at %pa: byte unchanged 0x%02x\n",
			name, attack_vector_name(vector), vector, &pa, before);

	if (after != before && !keep) {
		attack_methods[which].store(pa, before);
		if (attack_read(pa) != before)
			pr_err("%s: could not put the byte back\n", name);
	}
}

static const struct resource *attack_resource(const struct resource *parent,
					      const char *name)
{
	const struct resource *res, *found;

	for (res = parent->child; res; res = res->sibling) {
		if (res->name && !strcmp(res->name, name))
			return res;
		found = attack_resource(res, name);
		if (found)
			return found;
	}
	return NULL;
}

/*
 * A fault in a store must be caught, with and without WP, or the attacks could
 * not tell what came of them. On pages that no guard protects.
 */
static void attack_selftest(void)
{
	struct page *page = ZERO_PAGE(0);
	u8 *bad = (u8 *)(1UL << 63);
	unsigned long flags, cr0;
	int ro, gp, none, wp_gp, wp_none;
	u8 *gone;

	gone = vmap(&page, 1, VM_MAP, PAGE_KERNEL_RO);
	if (!gone)
		return;
	ro = attack_store(gone, 0);
	vunmap(gone);
	gp = attack_store(bad, 0);
	none = attack_store((u8 *)VMALLOC_END - PAGE_SIZE, 0);

	local_irq_save(flags);
	cr0 = native_read_cr0();
	attack_write_cr0(cr0 & ~X86_CR0_WP);
	wp_gp = attack_store(bad, 0);
	wp_none = attack_store((u8 *)VMALLOC_END - PAGE_SIZE, 0);
	attack_write_cr0(cr0);
	local_irq_restore(flags);

	pr_info("selftest: %s: vectors %d %d %d, without WP %d %d\n",
		ro == X86_TRAP_PF && gp == X86_TRAP_GP && none == X86_TRAP_PF &&
		wp_gp == X86_TRAP_GP && wp_none == X86_TRAP_PF ? "ok" : "BAD",
		ro, gp, none, wp_gp, wp_none);
}

/*
 * The 'v' in the format of /proc/version, "%s version %s (...": whoever changes
 * it shows that without doing harm.
 */
static phys_addr_t attack_letter(phys_addr_t start, phys_addr_t end)
{
	static const char format[] = "%s version %s (";
	const size_t len = sizeof(format) - 1;
	const char *at = __va(start), *last = __va(end - len);

	for (; at <= last; at++) {
		at = memchr(at, format[0], last - at + 1);
		if (!at)
			break;
		/* An earlier attack may have changed its case, and kept that. */
		if (!memcmp(at, format, 3) && (at[3] | 0x20) == format[3] &&
		    !memcmp(at + 4, format + 4, len - 4))
			return __pa(at) + 3;
	}
	return start + 0x40;
}

static phys_addr_t attack_target(void)
{
	const struct resource *res;
	struct desc_ptr idt;
	u64 *entries[5];
	int count;

	if (!strcmp(target, "gpa"))
		return gpa;
	if (!strcmp(target, "idt")) {
		store_idt(&idt);
		preempt_disable();
		count = attack_walk(idt.address, entries);
		preempt_enable();
		/* The last vector's reserved word, which no CPU reads. */
		return count < 4 ? 0 : (*entries[count - 1] & PTE_PFN_MASK) +
				       (offset == ULONG_MAX ? 0xffc : offset);
	}
	if (!strcmp(target, "text"))
		res = attack_resource(&iomem_resource, "Kernel code");
	else if (!strcmp(target, "rodata"))
		res = attack_resource(&iomem_resource, "Kernel rodata");
	else
		res = NULL;
	if (!res)
		return 0;
	if (offset != ULONG_MAX)
		return res->start + offset;
	/* One page in: startup code, which is run no more. */
	if (!strcmp(target, "text"))
		return res->start + PAGE_SIZE;
	return attack_letter(res->start, res->end + 1);
}

/* Make @va, of vmap(), executable, which vmap() does not. */
static bool attack_make_exec(unsigned long va)
{
	u64 *entries[5];
	unsigned long flags;
	int count, i;

	local_irq_save(flags);
	count = attack_walk(va, entries);
	for (i = 0; i < count; i++)
		WRITE_ONCE(*entries[i], *entries[i] & ~_PAGE_NX);
	attack_invlpg(va);
	local_irq_restore(flags);
	return count;
}

/* What attack_exec() calls, and the vector of what it got instead. */
static unsigned long attack_exec_at;
static int attack_exec_vector = ATTACK_NO_FAULT;

/* A fetch that is refused has no entry in a table of exceptions: return from it. */
static int attack_die(struct notifier_block *nb, unsigned long val, void *data)
{
	struct die_args *args = data;

	if (val != DIE_GPF || args->regs->ip != attack_exec_at)
		return NOTIFY_DONE;
	attack_exec_vector = args->trapnr;
	args->regs->ip = *(unsigned long *)args->regs->sp;
	args->regs->sp += sizeof(long);
	return NOTIFY_STOP;
}

/*
 * The last instruction of the page of zeros, which is in .bss: "add %al,(%rax)".
 * Behind it, in a page of ours, is a "ret".
 */
static void attack_exec(void)
{
	static struct notifier_block notifier = { .notifier_call = attack_die };
	struct page *pages[2] = { ZERO_PAGE(0), alloc_page(GFP_KERNEL) };
	phys_addr_t pa = PFN_PHYS(page_to_pfn(pages[0])) + PAGE_SIZE - 2;
	unsigned long at, flags;
	u8 scratch = 0;
	void *alias;

	if (!pages[1])
		return;
	memset(page_address(pages[1]), 0xc3, PAGE_SIZE);
	alias = vmap(pages, 2, VM_MAP, PAGE_KERNEL_RO);
	at = (unsigned long)alias + PAGE_SIZE - 2;
	if (!alias || !attack_make_exec(at) || !attack_make_exec(at + 2) ||
	    register_die_notifier(&notifier)) {
		pr_err("exec: could not be tried\n");
		goto out;
	}
	local_irq_save(flags);
	attack_exec_at = at;
	asm volatile(ANNOTATE_RETPOLINE_SAFE
		     "call *%[at]\n"
		     : ASM_CALL_CONSTRAINT
		     : [at] "r" (at), "a" (&scratch)
		     : "memory", "cc");
	attack_exec_at = 0;
	local_irq_restore(flags);
	unregister_die_notifier(&notifier);

	if (attack_exec_vector != ATTACK_NO_FAULT)
		pr_info("exec: fetch refused by %s (vector %d) at %pa\n",
			attack_vector_name(attack_exec_vector),
			attack_exec_vector, &pa);
	else if (scratch == (u8)(unsigned long)&scratch)
		pr_info("exec: SUCCEEDED at %pa\n", &pa);
	else
		pr_err("exec: what was called at %pa is something else\n", &pa);
out:
	vunmap(alias);
	__free_page(pages[1]);
}

/* A mapping that stays until the module goes, and the page if it is ours. */
static void *attack_alias_kept;
static struct page *attack_page_kept;

static void attack_let_go(void)
{
	vunmap(attack_alias_kept);
	if (attack_page_kept)
		__free_page(attack_page_kept);
}

static int attack_keep(struct page *page, bool exec)
{
	phys_addr_t pa = PFN_PHYS(page_to_pfn(page));

	attack_alias_kept = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!attack_alias_kept ||
	    (exec && !attack_make_exec((unsigned long)attack_alias_kept))) {
		attack_let_go();
		return -ENOMEM;
	}
	pr_info("%pa is mapped writable%s\n", &pa, exec ? " and executable" : "");
	return 0;
}

static bool attack_wanted(const char *name)
{
	size_t len = strlen(name);
	const char *at = method;

	while ((at = strstr(at, name))) {
		if ((at == method || at[-1] == ',') &&
		    (!at[len] || at[len] == ','))
			return true;
		at += len;
	}
	return false;
}

static int __init attack_init(void)
{
	phys_addr_t pa = attack_target();
	unsigned int i, n, tried = 0;

	if (!pa || !pfn_valid(PHYS_PFN(pa))) {
		pr_err("no target \"%s\"\n", target);
		return -EINVAL;
	}
	if (attack_wanted("selftest")) {
		attack_selftest();
		return 0;
	}
	if (attack_wanted("exec")) {
		attack_exec();
		return 0;
	}
	if (attack_wanted("hold"))
		return attack_keep(pfn_to_page(PHYS_PFN(pa)), false);
	if (attack_wanted("wx")) {
		attack_page_kept = alloc_page(GFP_KERNEL);
		return attack_page_kept ? attack_keep(attack_page_kept, true) :
					  -ENOMEM;
	}
	pr_info("target %s at %pa\n", target, &pa);
	for (i = 0; i < ARRAY_SIZE(attack_methods); i++) {
		if (!attack_wanted(attack_methods[i].name))
			continue;
		for (n = 0; n < times; n++)
			attack_once(i, pa);
		tried++;
	}
	if (!tried) {
		pr_err("no method \"%s\"\n", method);
		return -EINVAL;
	}
	return 0;
}

static void __exit attack_exit(void)
{
	attack_let_go();
}

module_init(attack_init);
module_exit(attack_exit);

MODULE_DESCRIPTION("Attack the kernel's own pages (test guests only)");
MODULE_LICENSE("GPL");
