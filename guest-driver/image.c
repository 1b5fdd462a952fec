// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where the kernel's own pages are.
 *
 * The resource tree names them; the page tables of this CPU must agree, page
 * by page, or nothing is locked. A wrong range would take pages from their
 * rightful owner until the next reset: the pages right behind the kernel's
 * text and rodata are freed at boot and used as ordinary memory.
 *
 * Nothing here needs a symbol that the kernel does not export.
 */
#include "guard.h"

#include <linux/errno.h>
#include <linux/ioport.h>
#include <linux/mm.h>
#include <linux/page-flags.h>
#include <linux/preempt.h>
#include <linux/sched.h>

#include <asm/desc.h>
#include <asm/pgtable.h>
#include <asm/processor.h>
#include <asm/special_insns.h>

#define GUARD_RESOURCE_DEPTH	8

/* What the page tables say of one page. */
struct guard_mapping {
	phys_addr_t pa;
	bool writable;
	bool exec;
};

/*
 * Follow the tables from CR3 as the CPU does, 4 or 5 levels. Tables may change
 * meanwhile (a large page of the direct map is split, say); those of the
 * kernel image and the direct map are never freed.
 */
static bool guard_walk(unsigned long va, struct guard_mapping *map)
{
	int level = (__read_cr4() & X86_CR4_LA57) ? 5 : 4;
	phys_addr_t table;
	bool found = false;

	map->writable = true;
	map->exec = true;

	/* The top table belongs to the address space that is loaded now. */
	preempt_disable();
	for (table = read_cr3_pa(); pfn_valid(PHYS_PFN(table)); level--) {
		unsigned int shift = PAGE_SHIFT + 9 * (level - 1);
		u64 *entries = __va(table);
		u64 entry = READ_ONCE(entries[(va >> shift) & 511]);

		if (!(entry & _PAGE_PRESENT))
			break;
		if (!(entry & _PAGE_RW))
			map->writable = false;
		if (entry & _PAGE_NX)
			map->exec = false;
		if (level == 1 || (level <= 3 && (entry & _PAGE_PSE))) {
			u64 offset = (1ULL << shift) - 1;

			map->pa = ((entry & PTE_PFN_MASK) & ~offset) |
				  (va & offset & PAGE_MASK);
			found = true;
			break;
		}
		table = entry & PTE_PFN_MASK;
	}
	preempt_enable();
	return found;
}

static unsigned long guard_image_va(phys_addr_t pa)
{
	return __START_KERNEL_map + (pa - phys_base);
}

/* Could the page be written through @va? Whoever does would be hit. */
static bool guard_writable_at(unsigned long va, phys_addr_t pa)
{
	struct guard_mapping map;

	return guard_walk(va, &map) && map.pa == pa && map.writable;
}

/*
 * Only the resources of RAM are followed, and those change with memory
 * hot-plug alone; the lock of the tree is not exported.
 */
static int guard_find_resource(const struct resource *parent, const char *name,
			       const struct resource **found, int depth)
{
	const struct resource *res;
	int count = 0;

	for (res = parent->child; res; res = res->sibling) {
		if (resource_type(res) != IORESOURCE_MEM ||
		    !(res->flags & IORESOURCE_SYSRAM))
			continue;
		if (res->name && !strcmp(res->name, name)) {
			*found = res;
			count++;
		} else if (depth) {
			count += guard_find_resource(res, name, found,
						     depth - 1);
		}
	}
	return count;
}

/* The whole pages of resource @name, which must all be mapped read-only. */
static int guard_find_image(const char *name, bool exec,
			    struct guard_range *range)
{
	const struct resource *res = NULL;
	phys_addr_t start, end, pa;

	if (guard_find_resource(&iomem_resource, name, &res,
				GUARD_RESOURCE_DEPTH) != 1) {
		pr_err("no \"%s\" in the resource tree, or more than one\n",
		       name);
		return -ENOENT;
	}

	/* A page that is shared with something else is not ours to lock. */
	start = PAGE_ALIGN(res->start);
	end = (res->end + 1) & PAGE_MASK;
	if (start >= end) {
		pr_err("\"%s\" %pR has no whole page\n", name, res);
		return -ENOENT;
	}

	for (pa = start; pa < end; pa += PAGE_SIZE) {
		struct guard_mapping map;
		const char *why = NULL;

		if (!guard_walk(guard_image_va(pa), &map))
			why = "is not mapped in the kernel image";
		else if (map.pa != pa)
			why = "is not where the kernel image has it";
		else if (map.writable)
			why = "is mapped writable (rodata=off?)";
		else if (map.exec != exec)
			why = exec ? "is not executable" : "is executable";
		else if (guard_writable_at((unsigned long)__va(pa), pa))
			why = "is writable through the direct map";
		if (why) {
			pr_err("\"%s\" %pR: page %pa %s: not locked\n",
			       name, res, &pa, why);
			return -EINVAL;
		}
		if (!((pa >> PAGE_SHIFT) % 256))
			cond_resched();
	}

	range->gfn_start = PHYS_PFN(start);
	range->gfn_end = PHYS_PFN(end) - 1;
	return 0;
}

/**
 * guard_find_text - the kernel's text
 * @range: out: its whole pages
 *
 * Return: 0, or a negative errno after a line in the log.
 */
int guard_find_text(struct guard_range *range)
{
	return guard_find_image("Kernel code", true, range);
}

/**
 * guard_find_rodata - the kernel's read-only data
 * @range: out: its whole pages
 *
 * Return: 0, or a negative errno after a line in the log.
 */
int guard_find_rodata(struct guard_range *range)
{
	return guard_find_image("Kernel rodata", false, range);
}

/**
 * guard_find_idt - the interrupt descriptor table, one page
 * @range: out: that page
 *
 * Return: 0, or a negative errno after a line in the log.
 */
int guard_find_idt(struct guard_range *range)
{
	struct guard_mapping map;
	struct desc_ptr idt;
	const char *why = NULL;

	store_idt(&idt);
	if (idt.size != PAGE_SIZE - 1 || !PAGE_ALIGNED(idt.address))
		why = "is not exactly one page";
	else if (!guard_walk(idt.address, &map))
		why = "is not mapped";
	else if (map.writable)
		why = "is mapped writable";
	else if (guard_writable_at((unsigned long)__va(map.pa), map.pa))
		why = "is writable through the direct map";
	else if (guard_writable_at(guard_image_va(map.pa), map.pa))
		why = "is writable through the kernel image";
	if (why) {
		pr_err("the IDT %s: not locked\n", why);
		return -EINVAL;
	}

	range->gfn_start = PHYS_PFN(map.pa);
	range->gfn_end = range->gfn_start;
	return 0;
}

/* One more page, to the last range if it goes on there. */
static int guard_add_page(u64 gfn, u64 attributes, struct guard_range *ranges,
			  u32 room, u32 *count)
{
	struct guard_range *last = &ranges[*count - 1];

	if (*count && last->gfn_end + 1 == gfn) {
		last->gfn_end = gfn;
		return 0;
	}
	if (*count == room)
		return -E2BIG;
	ranges[*count].gfn_start = gfn;
	ranges[*count].gfn_end = gfn;
	ranges[*count].attributes = attributes;
	++*count;
	return 0;
}

/**
 * guard_find_data - the kernel's data, as far as it belongs to the image
 * @name: "Kernel data" or "Kernel bss", as the resource tree has it
 * @attributes: for the ranges
 * @ranges: out: whole pages, sorted and disjoint
 * @room: of @ranges
 * @count: out: how many these are
 *
 * Some of it is given back at boot: what .bss has for decrypted data in a guest
 * that encrypts none. What was not has been reserved ever since. It must be asked
 * for after that: guard_find_rodata() fails before. (A driver that got one and
 * marked it as reserved would be taken in; no stock driver does.)
 *
 * Return: 0, or a negative errno after a line in the log.
 */
int guard_find_data(const char *name, u64 attributes,
		    struct guard_range *ranges, u32 room, u32 *count)
{
	const struct resource *res = NULL;
	unsigned long pfn, end;
	int err = 0;

	*count = 0;
	if (guard_find_resource(&iomem_resource, name, &res,
				GUARD_RESOURCE_DEPTH) != 1) {
		pr_err("no \"%s\" in the resource tree, or more than one\n",
		       name);
		return -ENOENT;
	}
	end = PHYS_PFN(res->end + 1);
	for (pfn = PHYS_PFN(PAGE_ALIGN(res->start)); pfn < end && !err; pfn++) {
		if (pfn_valid(pfn) && PageReserved(pfn_to_page(pfn)))
			err = guard_add_page(pfn, attributes, ranges, room,
					     count);
		if (!(pfn % 256))
			cond_resched();
	}
	if (!err && !*count)
		err = -ENOENT;
	if (err)
		pr_err("\"%s\" %pR has no page that could be locked, or is in too many pieces\n",
		       name, res);
	return err;
}

/* As guard_find_resource(), of memory as the firmware has it. */
static int guard_add_ram(const struct resource *parent, u64 attributes,
			 struct guard_range *ranges, u32 room, u32 *count,
			 int depth)
{
	const struct resource *res;
	int err = 0;

	for (res = parent->child; res && !err; res = res->sibling) {
		u64 start = PHYS_PFN(PAGE_ALIGN(res->start));
		u64 end = PHYS_PFN(res->end + 1);

		if ((res->flags & IORESOURCE_SYSTEM_RAM) !=
		    IORESOURCE_SYSTEM_RAM) {
			if (depth)
				err = guard_add_ram(res, attributes, ranges,
						    room, count, depth - 1);
			continue;
		}
		if (start >= end)
			continue;
		if (*count == room)
			return -E2BIG;
		ranges[*count].gfn_start = start;
		ranges[*count].gfn_end = end - 1;
		ranges[*count].attributes = attributes;
		++*count;
	}
	return err;
}

/**
 * guard_find_ram - all memory that is the kernel's
 * @attributes: for the ranges
 * @ranges: out: whole pages
 * @room: of @ranges
 * @count: out: how many these are
 *
 * Return: 0, or a negative errno.
 */
int guard_find_ram(u64 attributes, struct guard_range *ranges, u32 room,
		   u32 *count)
{
	int err;

	*count = 0;
	err = guard_add_ram(&iomem_resource, attributes, ranges, room, count,
			    GUARD_RESOURCE_DEPTH);
	return err ?: *count ? 0 : -ENOENT;
}

/**
 * guard_crash_kernel_reserved - has this kernel set memory aside for kdump?
 *
 * Whether a crash kernel is loaded there, no symbol for modules tells.
 *
 * Return: true if so.
 */
bool guard_crash_kernel_reserved(void)
{
	const struct resource *res;

	return guard_find_resource(&iomem_resource, "Crash kernel", &res,
				   GUARD_RESOURCE_DEPTH);
}
