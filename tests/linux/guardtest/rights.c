// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * PROTECT, SEAL and QUERY, each right that this host can deny, and accesses
 * that are watched.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "guardtest.h"

#define MOST	4096

/* What came of the last request, for the line that says what went wrong. */
static struct guard_lock last;

static int expect(const char *name, int got, int err, uint32_t index)
{
	int ok = got == err && last.index == index;

	if (!ok)
		printf("# %s: errno %d index %#x, expected errno %d index %#x\n",
		       name, got, last.index, err, index);
	report(name, ok);
	return ok;
}

static struct guard_range range_of(const void *page, uint64_t attributes)
{
	uint64_t gfn = frame_of(page);

	return (struct guard_range){ gfn, gfn, attributes };
}

/* One page; returns the errno. */
static int protect(int fd, const void *page, uint64_t attributes)
{
	struct guard_range range = range_of(page, attributes);

	return ask(fd, GUARD_IOC_PROTECT, &range, 1, &last);
}

static int lock_page(int fd, const void *page, uint64_t attributes)
{
	struct guard_range range = range_of(page, attributes);

	return ask(fd, GUARD_IOC_LOCK, &range, 1, &last);
}

/* The attributes of one page as QUERY tells them; all ones: it does not. */
static uint64_t attributes_of(int fd, const void *page)
{
	struct guard_range range = range_of(page, 0), found[2];
	struct guard_query req;

	if (query(fd, range.gfn_start, range.gfn_end, found, 2, &req) ||
	    req.count != req.total || req.count > 1)
		return ~0ULL;
	if (!req.count)
		return 0;
	if (found[0].gfn_start != range.gfn_start ||
	    found[0].gfn_end != range.gfn_end)
		return ~0ULL;
	return found[0].attributes;
}

static void load(volatile unsigned char *at)
{
	(void)*at;
}

static void run(volatile unsigned char *at)
{
	((void (*)(void))(uintptr_t)at)();
}

static void test_protect(int fd, unsigned char *page)
{
	struct guard_range two[2] = { range_of(page, VIRTIO_GUARD_NOWRITE),
				      range_of(page, 0) };

	expect("PROTECT", protect(fd, page, VIRTIO_GUARD_NOWRITE), 0, NO);
	report("QUERY tells of it",
	       attributes_of(fd, page) == VIRTIO_GUARD_NOWRITE);
	report("a store is refused", refused(store, page) && *page == 0x5a);
	expect("PROTECT again", protect(fd, page, VIRTIO_GUARD_NOWRITE), 0, NO);
	expect("PROTECT with 0", protect(fd, page, 0), 0, NO);
	report("frees the page", !attributes_of(fd, page));
	report("a store goes through",
	       !refused(store, page) && *page == 0x42);
	*page = 0x5a;
	expect("what is free can be freed", protect(fd, page, 0), 0, NO);
	expect("of entries that overlap",
	       ask(fd, GUARD_IOC_PROTECT, two, 2, &last), 0, NO);
	report("the last one counts", !attributes_of(fd, page));
	two[1].gfn_start = two[1].gfn_end = NO_RAM;
	expect("not RAM: EINVAL, entry 1",
	       ask(fd, GUARD_IOC_PROTECT, two, 2, &last), EINVAL, 1);
	two[1].attributes = VIRTIO_GUARD_IMMUTABLE;
	expect("IMMUTABLE cannot be asked for: EINVAL, entry 1",
	       ask(fd, GUARD_IOC_PROTECT, two, 2, &last), EINVAL, 1);
	report("neither changed anything", !attributes_of(fd, page));
}

static void test_immutable(int fd, unsigned char *locked, unsigned char *other)
{
	struct guard_range two[2] = { range_of(other, VIRTIO_GUARD_NOWRITE),
				      range_of(locked, 0) };
	const uint64_t held = VIRTIO_GUARD_NOWRITE | VIRTIO_GUARD_IMMUTABLE;

	expect("LOCK", lock_page(fd, locked, VIRTIO_GUARD_NOWRITE), 0, NO);
	report("QUERY says that it is immutable",
	       attributes_of(fd, locked) == held);
	expect("PROTECT of what would loosen it: EPERM, entry 1",
	       ask(fd, GUARD_IOC_PROTECT, two, 2, &last), EPERM, 1);
	report("nothing was changed", attributes_of(fd, locked) == held &&
	       !attributes_of(fd, other));
	expect("PROTECT with the same",
	       protect(fd, locked, VIRTIO_GUARD_NOWRITE), 0, NO);
	report("it is immutable still", attributes_of(fd, locked) == held);
	report("a store is refused", refused(store, locked) && *locked == 0x5a);
}

static void test_seal(int fd, unsigned char *before, unsigned char *after)
{
	struct guard_seal seal = { 0 };
	struct guard_info info;

	protect(fd, before, VIRTIO_GUARD_NOWRITE);
	ioctl(fd, GUARD_IOC_INFO, &info);
	report("SEAL, in this generation", !ioctl(fd, GUARD_IOC_SEAL, &seal) &&
	       seal.generation == info.generation);
	expect("what was protected cannot be freed: EPERM",
	       protect(fd, before, 0), EPERM, 0);
	report("and is immutable", attributes_of(fd, before) ==
	       (VIRTIO_GUARD_NOWRITE | VIRTIO_GUARD_IMMUTABLE));
	expect("what is protected later",
	       protect(fd, after, VIRTIO_GUARD_NOWRITE), 0, NO);
	expect("can be freed", protect(fd, after, 0), 0, NO);
}

/* An access to a page without a right to it: it must make this event. */
static void test_right(int fd, unsigned char *page, const char *name,
		       uint64_t attributes, void (*access)(volatile unsigned char *),
		       uint32_t kind)
{
	struct guard_event event = { 0 };
	int events = open("/dev/guard", O_RDONLY | O_CLOEXEC);
	char text[96];

	snprintf(text, sizeof(text), "%s can be denied", name);
	expect(text, protect(fd, page, attributes), 0, NO);
	snprintf(text, sizeof(text), "%s is refused", name);
	report(text, refused(access, page));
	snprintf(text, sizeof(text), "%s makes an event", name);
	report(text, !next_event(events, &event) && event.access == kind &&
	       event.gpa / PAGE == frame_of(page) &&
	       event.action != VIRTIO_GUARD_ACTION_AUDIT);
	protect(fd, page, 0);
	snprintf(text, sizeof(text), "%s goes through once it is free", name);
	report(text, !refused(access, page));
	close(events);
}

static void test_rights_of(int fd, unsigned char *page, uint64_t deny_bits)
{
	/* RET, for who fetches it. */
	*page = 0xc3;
	if (deny_bits & VIRTIO_GUARD_NOEXEC)
		test_right(fd, page, "a fetch", VIRTIO_GUARD_NOEXEC, run,
			   VIRTIO_GUARD_ACCESS_EXEC);
	if (deny_bits & VIRTIO_GUARD_NOREAD)
		test_right(fd, page, "a load", VIRTIO_GUARD_NOREAD, load,
			   VIRTIO_GUARD_ACCESS_READ);
	if (deny_bits & VIRTIO_GUARD_NOREAD) {
		protect(fd, page, VIRTIO_GUARD_NOREAD | VIRTIO_GUARD_NOWRITE);
		report("a page that is execute-only is executed",
		       !refused(run, page));
		report("and not read", refused(load, page));
		protect(fd, page, 0);
	}
	if (deny_bits & VIRTIO_GUARD_NOEXEC_KERNEL) {
		protect(fd, page, VIRTIO_GUARD_NOEXEC_KERNEL);
		report("NOEXEC_KERNEL lets user space execute",
		       !refused(run, page));
		protect(fd, page, 0);
	}
}

static uint64_t violations(int fd)
{
	struct guard_info info = { 0 };

	ioctl(fd, GUARD_IOC_INFO, &info);
	return info.violations;
}

static void test_audit(int fd, unsigned char *page, unsigned char *fixed)
{
	const uint64_t watch = VIRTIO_GUARD_AUDIT(VIRTIO_GUARD_NOWRITE);
	int events = open("/dev/guard", O_RDONLY | O_CLOEXEC);
	struct guard_event event = { 0 };
	uint64_t seen = violations(fd);

	expect("stores can be watched", protect(fd, page, watch), 0, NO);
	report("QUERY tells of it", attributes_of(fd, page) == watch);
	report("a store goes through", !refused(store, page) && *page == 0x42);
	report("and makes an event", !next_event(events, &event) &&
	       event.access == VIRTIO_GUARD_ACCESS_WRITE &&
	       event.action == VIRTIO_GUARD_ACTION_AUDIT &&
	       event.gpa == frame_of(page) * PAGE);
	report("and is counted", violations(fd) > seen);
	*page = 0x5a;
	expect("denied and watched", protect(fd, page,
					     watch | VIRTIO_GUARD_NOWRITE), 0, NO);
	report("is denied", attributes_of(fd, page) == VIRTIO_GUARD_NOWRITE &&
	       refused(store, page) && *page == 0x5a);
	protect(fd, page, 0);
	close(events);

	expect("a watch can be locked", lock_page(fd, fixed, watch), 0, NO);
	report("and QUERY tells of that", attributes_of(fd, fixed) ==
	       (watch | VIRTIO_GUARD_IMMUTABLE));
	expect("it cannot be freed: EPERM", protect(fd, fixed, 0), EPERM, 0);
	expect("it can grow to a denial",
	       protect(fd, fixed, VIRTIO_GUARD_NOWRITE), 0, NO);
	expect("and not back: EPERM", protect(fd, fixed, watch), EPERM, 0);
	report("a store is refused", refused(store, fixed) && *fixed == 0x5a);
}

static int sorted_and_disjoint(const struct guard_range *found, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		if (found[i].gfn_start > found[i].gfn_end ||
		    !found[i].attributes ||
		    (i && found[i].gfn_start <= found[i - 1].gfn_end)) {
			printf("# entry %u\n", i);
			return 0;
		}
	}
	return 1;
}

/* @memory: pages of which some have attributes. */
static void test_query(int fd, unsigned char *memory)
{
	static struct guard_range found[MOST];
	const uint64_t every = (1ULL << 52) - 1;
	struct guard_query req, few;
	struct guard_range one;

	protect(fd, memory, VIRTIO_GUARD_NOWRITE);
	protect(fd, memory + 2 * PAGE, VIRTIO_GUARD_NOWRITE);
	report("QUERY of everything", !query(fd, 0, every, found, MOST, &req) &&
	       req.count == req.total && req.count >= 2);
	report("is sorted, and disjoint", sorted_and_disjoint(found, req.count));
	report("with room for one: the first, and how many there are",
	       !query(fd, 0, every, &one, 1, &few) && few.count == 1 &&
	       few.total == req.total && !memcmp(&one, found, sizeof(one)));
	report("with room for none: how many there are",
	       !query(fd, 0, every, NULL, 0, &few) && !few.count &&
	       few.total == req.total);
	report("with room for 2^32 - 1: no more than there are",
	       !query(fd, 0, every, found, UINT32_MAX, &few) &&
	       few.count == req.count);
	report("into what is not mapped: EFAULT",
	       query(fd, 0, every, (void *)16, 1, &few) == EFAULT);
	report("backwards: EINVAL", query(fd, 1, 0, found, 1, &few) == EINVAL);
	report("beyond all frames: EINVAL",
	       query(fd, 0, every + 1, found, 1, &few) == EINVAL);
	report("where no RAM is: nothing",
	       !query(fd, NO_RAM, NO_RAM, found, 1, &few) && !few.total);
	protect(fd, memory, 0);
	protect(fd, memory + 2 * PAGE, 0);
}

/* As many entries as a request takes, and as an answer. */
static void test_most(int fd)
{
	static struct guard_range ranges[MOST], found[MOST];
	unsigned char *memory = pages(2 * MOST);
	struct guard_query req;
	struct guard_info info;
	uint64_t low = ~0ULL, high = 0;
	int i;

	ioctl(fd, GUARD_IOC_INFO, &info);
	for (i = 0; i < MOST; i++) {
		ranges[i] = range_of(memory + 2 * i * PAGE,
				     VIRTIO_GUARD_NOWRITE);
		if (ranges[i].gfn_start < low)
			low = ranges[i].gfn_start;
		if (ranges[i].gfn_end > high)
			high = ranges[i].gfn_end;
	}
	expect("as many entries as a request takes",
	       ask(fd, GUARD_IOC_PROTECT, ranges, info.max_request_ranges,
		   &last), 0, NO);
	report("QUERY gives them all", !query(fd, low, high, found, MOST, &req) &&
	       req.count > 1 && sorted_and_disjoint(found, req.count));
	printf("# %u entries of %llu\n", req.count,
	       (unsigned long long)req.total);
	for (i = 0; i < MOST; i++)
		ranges[i].attributes = 0;
	expect("and all are freed again",
	       ask(fd, GUARD_IOC_PROTECT, ranges, info.max_request_ranges,
		   &last), 0, NO);
	report("which QUERY says too",
	       !attributes_of(fd, memory) &&
	       !attributes_of(fd, memory + 2 * (MOST - 1) * PAGE));
}

void test_rights(int fd)
{
	unsigned char *memory = pages(8);
	struct guard_info info;

	if (ioctl(fd, GUARD_IOC_INFO, &info) ||
	    !(info.deny_bits & VIRTIO_GUARD_NOWRITE)) {
		report("GUARD_IOC_INFO", 0);
		return;
	}
	test_protect(fd, memory);
	test_query(fd, memory);
	test_most(fd);
	test_rights_of(fd, memory + PAGE, info.deny_bits);
	if (info.audit_bits & VIRTIO_GUARD_NOWRITE)
		test_audit(fd, memory + 2 * PAGE, memory + 3 * PAGE);
	else
		report("stores can be watched", 0);
	test_immutable(fd, memory + 4 * PAGE, memory);
	test_seal(fd, memory + 5 * PAGE, memory + 6 * PAGE);
}
