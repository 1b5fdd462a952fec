// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What /dev/guard answers to good and bad calls, from inside the guest; and two
 * small helpers of tests/linux/init.
 *
 *   guardtest ioctl          all cases, one line each; exit status 1 if one fails
 *   guardtest info           the device's configuration, "name value" lines
 *   guardtest lock S E [A]   lock frames S to E (attributes A, default 1); prints
 *                            the errno, index and generation
 *   guardtest cmos [N]       read, or set to N, a byte that a reset leaves alone
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/virtio_guard.h>

#define PAGE	4096UL
#define NO	VIRTIO_GUARD_NO_INDEX
/* Far above any RAM, within what a page table entry can hold. */
#define NO_RAM	(1ULL << 39)

static int failed;

static void report(const char *name, int ok)
{
	printf("guard-test: %s - %s\n", ok ? "ok" : "not ok", name);
	fflush(stdout);
	failed |= !ok;
}

static int lock_ranges(int fd, const struct guard_range *ranges, uint32_t count,
		       struct guard_lock *req)
{
	req->ranges = (uintptr_t)ranges;
	req->count = count;
	req->index = 12345;
	req->generation = 12345;
	return ioctl(fd, GUARD_IOC_LOCK, req) ? errno : 0;
}

/* One call, which must end with this errno and name this entry. */
static void expect(int fd, const char *name, const struct guard_range *ranges,
		   uint32_t count, int err, uint32_t index)
{
	struct guard_lock req;
	int got = lock_ranges(fd, ranges, count, &req);
	int ok = got == err && req.index == index &&
		 (err ? !req.generation : 1);

	if (!ok)
		printf("# %s: errno %d index %#x generation %llu, expected errno %d index %#x\n",
		       name, got, req.index,
		       (unsigned long long)req.generation, err, index);
	report(name, ok);
}

/* The frame of a page of ours, which stays where it is. */
static uint64_t frame_of(void *page)
{
	uint64_t entry = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY);

	if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)page / PAGE * 8) != 8) {
		perror("/proc/self/pagemap");
		exit(2);
	}
	close(fd);
	return entry & ((1ULL << 55) - 1);
}

/*
 * Pages to lock for good. A locked page that is freed is a trap for whoever
 * gets it next, the kernel too: so they are shared with a process that keeps
 * them until the guest ends. Being shared, they are not copied for a child of
 * ours that stores to them either.
 */
static unsigned char *pages(size_t count)
{
	unsigned char *at = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE,
				 MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE,
				 -1, 0);
	pid_t keeper;

	if (at == MAP_FAILED || mlock(at, count * PAGE)) {
		perror("mmap");
		exit(2);
	}
	fflush(stdout);
	keeper = fork();
	if (keeper < 0) {
		perror("fork");
		exit(2);
	}
	if (!keeper) {
		/* Nobody is to wait for the end of what it inherited. */
		for (int fd = 0; fd < 16; fd++)
			close(fd);
		setsid();
		for (;;)
			pause();
	}
	memset(at, 0x5a, count * PAGE);
	return at;
}

/*
 * A store from user space. Whatever the host makes of it, the byte must stay;
 * a signal is the usual end.
 */
static int store_refused(volatile unsigned char *at)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		/* A fault that the kernel takes for a stale TLB has no end. */
		alarm(10);
		*at = 0x42;
		_exit(*at == 0x42 ? 1 : 0);
	}
	waitpid(pid, &status, 0);
	return *at == 0x5a && (WIFSIGNALED(status) || !WEXITSTATUS(status));
}

static void many_ranges(int fd, uint32_t most)
{
	struct guard_range *ranges = calloc(most, sizeof(*ranges));
	unsigned char *memory = pages(2);
	uint64_t gfn = frame_of(memory);
	uint32_t i;

	/* The same page again and again: it is the number that is tested. */
	for (i = 0; i < most; i++)
		ranges[i] = (struct guard_range){ gfn, gfn,
						  VIRTIO_GUARD_NOWRITE };
	expect(fd, "17 ranges are one request", ranges, 17, 0, NO);
	expect(fd, "as many ranges as the device takes", ranges, most, 0, NO);
	ranges[most - 1].attributes = 0;
	expect(fd, "the last of them wrong: its index", ranges, most, EINVAL,
	       most - 1);
	free(ranges);
}

static void test_ioctl(int fd)
{
	struct guard_range good = { 0, 0, VIRTIO_GUARD_NOWRITE };
	struct guard_range r[3];
	struct guard_info info, after;
	struct guard_lock req;
	unsigned char *memory;
	uint64_t gfn;

	if (ioctl(fd, GUARD_IOC_INFO, &info)) {
		report("GUARD_IOC_INFO", 0);
		return;
	}
	report("GUARD_IOC_INFO: version, page size, deny bits",
	       info.version == 1 && info.page_size == PAGE &&
	       info.deny_bits & VIRTIO_GUARD_NOWRITE && !info.reserved);

	memory = pages(4);
	gfn = frame_of(memory);
	good.gfn_start = gfn;
	good.gfn_end = gfn;

	report("an unknown ioctl: ENOTTY",
	       ioctl(fd, _IO('G', 0xef), 0) && errno == ENOTTY);
	report("no argument: EFAULT",
	       ioctl(fd, GUARD_IOC_LOCK, NULL) && errno == EFAULT);
	expect(fd, "no range: EINVAL", &good, 0, EINVAL, NO);
	expect(fd, "more ranges than one request takes: E2BIG", &good,
	       info.max_request_ranges + 1, E2BIG, NO);
	expect(fd, "2^32 - 1 ranges: E2BIG", &good, UINT32_MAX, E2BIG, NO);
	report("ranges that are not mapped: EFAULT",
	       lock_ranges(fd, (void *)16, 1, &req) == EFAULT);

	r[0] = good;
	r[1] = (struct guard_range){ gfn + 1, gfn, VIRTIO_GUARD_NOWRITE };
	expect(fd, "start after end: EINVAL, entry 1", r, 2, EINVAL, 1);
	r[1] = (struct guard_range){ gfn, gfn, 0 };
	expect(fd, "no attribute: EINVAL, entry 1", r, 2, EINVAL, 1);
	r[1] = (struct guard_range){ gfn, gfn, 1ULL << 20 };
	expect(fd, "unknown attribute: EINVAL, entry 1", r, 2, EINVAL, 1);
	r[1] = (struct guard_range){ gfn, 1ULL << 52, VIRTIO_GUARD_NOWRITE };
	expect(fd, "frame number too large: EINVAL, entry 1", r, 2, EINVAL, 1);
	r[1] = (struct guard_range){ NO_RAM, NO_RAM, VIRTIO_GUARD_NOWRITE };
	expect(fd, "not RAM: EINVAL, entry 1", r, 2, EINVAL, 1);
	if (!(info.deny_bits & VIRTIO_GUARD_NOREAD)) {
		r[1] = (struct guard_range){ gfn, gfn, VIRTIO_GUARD_NOREAD };
		expect(fd, "attribute not offered: EOPNOTSUPP, entry 1", r, 2,
		       EOPNOTSUPP, 1);
	}
	ioctl(fd, GUARD_IOC_INFO, &after);
	report("refused requests lock nothing",
	       after.ranges_in_force == info.ranges_in_force);
	memory[0] = 0x5a;

	expect(fd, "one page", &good, 1, 0, NO);
	lock_ranges(fd, &good, 1, &req);
	report("again, and the generation is the device's",
	       req.generation == info.generation);
	report("a store by user space is refused", store_refused(memory));
	many_ranges(fd, info.max_request_ranges);

	if (!setuid(65534))
		report("without CAP_SYS_ADMIN: EPERM, on an open descriptor too",
		       lock_ranges(fd, &good, 1, &req) == EPERM &&
		       ioctl(fd, GUARD_IOC_INFO, &info) && errno == EPERM &&
		       open("/dev/guard", O_RDWR) < 0 && errno == EACCES);
}

static int show_info(int fd)
{
	struct guard_info i;

	if (ioctl(fd, GUARD_IOC_INFO, &i)) {
		perror("GUARD_IOC_INFO");
		return 1;
	}
	printf("version %u\npage_size %u\ndeny_bits %#llx\n"
	       "max_request_ranges %u\nmax_ranges %u\ngeneration %llu\n"
	       "ranges_in_force %u\nviolations %llu\nevents_lost %llu\n"
	       "malformed %llu\n", i.version, i.page_size,
	       (unsigned long long)i.deny_bits, i.max_request_ranges,
	       i.max_ranges, (unsigned long long)i.generation,
	       i.ranges_in_force, (unsigned long long)i.violations,
	       (unsigned long long)i.events_lost,
	       (unsigned long long)i.malformed);
	return 0;
}

/* A byte of the RTC's memory that neither firmware nor Linux uses. */
static int cmos(const char *value)
{
	const unsigned char cell = 0x7e;

	if (ioperm(0x70, 2, 1)) {
		perror("ioperm");
		return 2;
	}
	outb(cell, 0x70);
	if (value)
		outb(atoi(value), 0x71);
	else
		printf("%d\n", inb(0x71));
	return 0;
}

int main(int argc, char **argv)
{
	struct guard_range range = { 0, 0, VIRTIO_GUARD_NOWRITE };
	struct guard_lock req;
	int fd, err;

	if (argc >= 2 && !strcmp(argv[1], "cmos"))
		return cmos(argc > 2 ? argv[2] : NULL);

	fd = open("/dev/guard", O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		perror("/dev/guard");
		return 2;
	}
	if (argc == 2 && !strcmp(argv[1], "ioctl")) {
		test_ioctl(fd);
		return failed;
	}
	if (argc == 2 && !strcmp(argv[1], "info"))
		return show_info(fd);
	if (argc >= 4 && !strcmp(argv[1], "lock")) {
		range.gfn_start = strtoull(argv[2], NULL, 0);
		range.gfn_end = strtoull(argv[3], NULL, 0);
		if (argc > 4)
			range.attributes = strtoull(argv[4], NULL, 0);
		err = lock_ranges(fd, &range, 1, &req);
		printf("errno %d index %u generation %llu\n", err, req.index,
		       (unsigned long long)req.generation);
		return !!err;
	}
	fprintf(stderr, "usage: guardtest ioctl | info | lock START END [ATTRS] | cmos [N]\n");
	return 2;
}
