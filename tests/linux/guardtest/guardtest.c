// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What /dev/guard answers to good and bad calls, from inside the guest; and
 * small helpers of tests/linux/init.
 *
 *   guardtest ioctl          all cases, one line each; exit status 1 if one fails
 *   guardtest events         the same for read() and poll()
 *   guardtest hang-up DEV    the same for what they say when the device DEV goes
 *   guardtest rights         the same for PROTECT, SEAL and QUERY
 *   guardtest info           the device's configuration, "name value" lines
 *   guardtest lock S E [A]   lock frames S to E (attributes A, default 1); prints
 *                            the errno, index and generation
 *   guardtest page           prints the frame of a page that nobody else uses
 *   guardtest cmos [N]       read, or set to N, a byte that a reset leaves alone
 *   guardtest syscalls       thousands of system calls; exit status 1 if one is wrong
 *   guardtest on CPU PROGRAM [ARG...]   run it on that CPU alone
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guardtest.h"

int failed;

void report(const char *name, int ok)
{
	printf("guard-test: %s - %s\n", ok ? "ok" : "not ok", name);
	fflush(stdout);
	failed |= !ok;
}

/* GUARD_IOC_LOCK or GUARD_IOC_PROTECT; returns the errno. */
int ask(int fd, unsigned long call, const struct guard_range *ranges,
	uint32_t count, struct guard_lock *req)
{
	req->ranges = (uintptr_t)ranges;
	req->count = count;
	req->index = 12345;
	req->generation = 12345;
	return ioctl(fd, call, req) ? errno : 0;
}

static int lock_ranges(int fd, const struct guard_range *ranges, uint32_t count,
		       struct guard_lock *req)
{
	return ask(fd, GUARD_IOC_LOCK, ranges, count, req);
}

/* GUARD_IOC_QUERY; returns the errno. */
int query(int fd, uint64_t first, uint64_t last, struct guard_range *ranges,
	  uint32_t room, struct guard_query *req)
{
	*req = (struct guard_query){
		.gfn_start = first,
		.gfn_end = last,
		.ranges = (uintptr_t)ranges,
		.count = room,
	};
	return ioctl(fd, GUARD_IOC_QUERY, req) ? errno : 0;
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
uint64_t frame_of(const void *page)
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
unsigned char *pages(size_t count)
{
	unsigned char *at = mmap(NULL, count * PAGE,
				 PROT_READ | PROT_WRITE | PROT_EXEC,
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

/* Something else than what is there. */
void store(volatile unsigned char *at)
{
	*at = 0x42;
}

/*
 * An access from user space. Whatever the host makes of it: a signal is the
 * usual end, and a store must not be seen.
 */
int refused(void (*access)(volatile unsigned char *at),
	    volatile unsigned char *at)
{
	pid_t pid;
	int status;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		/* A fault that the kernel takes for a stale TLB has no end. */
		alarm(10);
		access(at);
		_exit(access == store && *at != 0x42 ? 0 : 1);
	}
	waitpid(pid, &status, 0);
	return WIFSIGNALED(status) || !WEXITSTATUS(status);
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

/* What is the driver's to say, of calls that the device may not know yet. */
static void test_newer_calls(int fd, const struct guard_range *good,
			     uint64_t audit_bits)
{
	struct guard_range free_it = *good, found[2];
	struct guard_query req;
	struct guard_lock lock;
	int err;

	report("what can be watched is among what there is",
	       !(audit_bits & ~0xfULL));
	report("PROTECT without an argument, or a range: EFAULT, EINVAL",
	       ioctl(fd, GUARD_IOC_PROTECT, NULL) && errno == EFAULT &&
	       ask(fd, GUARD_IOC_PROTECT, good, 0, &lock) == EINVAL);
	report("QUERY without an argument: EFAULT",
	       ioctl(fd, GUARD_IOC_QUERY, NULL) && errno == EFAULT);
	req = (struct guard_query){ .reserved = 1 };
	report("QUERY with a reserved field: EINVAL",
	       ioctl(fd, GUARD_IOC_QUERY, &req) && errno == EINVAL);

	free_it.attributes = 0;
	err = query(fd, good->gfn_start, good->gfn_end, found, 2, &req);
	if (err == EOPNOTSUPP) {
		struct guard_seal seal;

		report("a device that knows only LOCK: EOPNOTSUPP",
		       ask(fd, GUARD_IOC_PROTECT, &free_it, 1, &lock) == err &&
		       lock.index == NO && !lock.generation &&
		       ioctl(fd, GUARD_IOC_SEAL, &seal) && errno == err);
		return;
	}
	report("QUERY finds the page", !err && req.count == 1 &&
	       req.total == 1 && found[0].gfn_start == good->gfn_start &&
	       found[0].gfn_end == good->gfn_end &&
	       found[0].attributes ==
	       (VIRTIO_GUARD_NOWRITE | VIRTIO_GUARD_IMMUTABLE));
	report("PROTECT cannot free it: EPERM, entry 0",
	       ask(fd, GUARD_IOC_PROTECT, &free_it, 1, &lock) == EPERM &&
	       lock.index == 0);
}

/* GUARD_IOC_MSR_BITMAP; returns the errno. */
static int ask_bitmap(int fd, const void *bitmaps, uint32_t bytes,
		      uint32_t count, struct guard_msr_bitmap *req)
{
	req->bitmaps = (uintptr_t)bitmaps;
	req->bytes = bytes;
	req->count = count;
	req->index = 12345;
	req->generation = 12345;
	return ioctl(fd, GUARD_IOC_MSR_BITMAP, req) ? errno : 0;
}

/* The same for MSRs, whether or not this host has rules for them. */
static void test_msr_calls(int fd)
{
	const uint32_t most = 16 * (16 + 0x600);
	struct guard_msr_bitmap bitmap = { 0 };
	struct guard_msr_query req = { 0 };
	struct guard_msr rule = { .first = 2, .last = 1, .access = 1 };
	struct guard_lock lock;
	struct guard_info info;
	unsigned char *bytes = calloc(1, most);
	int err;

	report("MSR calls without an argument: EFAULT",
	       ioctl(fd, GUARD_IOC_MSR_LOCK, NULL) && errno == EFAULT &&
	       ioctl(fd, GUARD_IOC_MSR_PROTECT, NULL) && errno == EFAULT &&
	       ioctl(fd, GUARD_IOC_MSR_BITMAP, NULL) && errno == EFAULT &&
	       ioctl(fd, GUARD_IOC_MSR_QUERY, NULL) && errno == EFAULT);
	report("MSR_LOCK without a rule, with too many, with none there",
	       ask(fd, GUARD_IOC_MSR_LOCK, NULL, 0, &lock) == EINVAL &&
	       lock.index == NO && !lock.generation &&
	       ask(fd, GUARD_IOC_MSR_LOCK, NULL, UINT32_MAX, &lock) == E2BIG &&
	       ask(fd, GUARD_IOC_MSR_LOCK, (void *)16, 1, &lock) == EFAULT);
	report("MSR_BITMAP without one, with too many, with none there",
	       ask_bitmap(fd, bytes, 0, 1, &bitmap) == EINVAL &&
	       ask_bitmap(fd, bytes, 16, 0, &bitmap) == EINVAL &&
	       bitmap.index == NO && !bitmap.generation &&
	       ask_bitmap(fd, bytes, 16, 17, &bitmap) == E2BIG &&
	       ask_bitmap(fd, bytes, most + 1, 16, &bitmap) == E2BIG &&
	       ask_bitmap(fd, (void *)16, 16, 1, &bitmap) == EFAULT);
	bitmap.reserved = 1;
	report("MSR_BITMAP with a reserved field: EINVAL",
	       ask_bitmap(fd, bytes, 16, 1, &bitmap) == EINVAL);
	bitmap.reserved = 0;
	req.access = 0x10001;
	report("MSR_QUERY of an access that is none: EINVAL",
	       ioctl(fd, GUARD_IOC_MSR_QUERY, &req) && errno == EINVAL);

	err = ask(fd, GUARD_IOC_MSR_LOCK, (void *)&rule, 1, &lock);
	if (ioctl(fd, GUARD_IOC_INFO, &info) || !info.max_msr_ranges) {
		report("a device that has no rules for MSRs: EOPNOTSUPP",
		       err == EOPNOTSUPP && lock.index == NO);
	} else {
		report("MSR_LOCK of what ends before it starts: EINVAL, entry 0",
		       err == EINVAL && !lock.index && !lock.generation);
		/* 16 bitmaps of 12288 MSRs, which all speak of the first. */
		report("as many bytes of bitmaps as there can be: EINVAL, bitmap 0",
		       ask_bitmap(fd, bytes, most, 16, &bitmap) == EINVAL &&
		       !bitmap.index);
	}
	free(bytes);
}

/* GUARD_IOC_KERNEL; returns the errno. */
static int ask_kernel(int fd, struct guard_kernel *req)
{
	req->index = 12345;
	req->generation = 12345;
	return ioctl(fd, GUARD_IOC_KERNEL, req) ? errno : 0;
}

/* What follows from page tables, whether or not this host reads them. */
static void test_kernel_calls(int fd, const struct guard_range *good)
{
	struct guard_range told[2], wrong = *good;
	struct guard_kernel req = { .reserved = 1, .count = 1 };
	int err;

	report("KERNEL without an argument: EFAULT",
	       ioctl(fd, GUARD_IOC_KERNEL, NULL) && errno == EFAULT);
	report("KERNEL with a reserved field: EINVAL",
	       ask_kernel(fd, &req) == EINVAL && req.index == NO &&
	       !req.generation);
	req = (struct guard_kernel){ .flags = VIRTIO_GUARD_KERNEL_LOCK };
	report("KERNEL without a range, with too many, with none there",
	       ask_kernel(fd, &req) == EINVAL &&
	       (req.count = UINT32_MAX, ask_kernel(fd, &req) == E2BIG) &&
	       (req.count = 1, ask_kernel(fd, &req) == EFAULT) &&
	       req.index == NO && !req.generation && !req.counts.pages);

	req = (struct guard_kernel){
		.flags = VIRTIO_GUARD_KERNEL_DRY_RUN | VIRTIO_GUARD_KERNEL_LOCK,
		.unmapped = VIRTIO_GUARD_POLICY_REPORT,
		.ranges = (uintptr_t)good,
		.count = 1,
		.told = (uintptr_t)told,
		.told_count = 2,
	};
	err = ask_kernel(fd, &req);
	if (err == EOPNOTSUPP) {
		report("a host that does not read page tables: EOPNOTSUPP",
		       req.index == NO && !req.generation && !req.told_count);
		return;
	}
	/* The kernel maps this memory of ours to be written, nowhere else. */
	report("KERNEL of a page that is written: nothing is given",
	       !err && req.counts.pages == 1 && !req.counts.given &&
	       !req.counts.unmapped && !req.counts.not_written &&
	       req.counts.not_executed == 1 && !req.told_count);
	req.flags = VIRTIO_GUARD_KERNEL_DRY_RUN;
	report("without LOCK it would be freed, which is locked: EPERM, entry 0",
	       ask_kernel(fd, &req) == EPERM && !req.index &&
	       req.counts.pages == 1);
	req.count = 0;
	err = ask_kernel(fd, &req);
	report("KERNEL of all memory, which is mapped and not W+X",
	       !err && req.counts.pages > 1000 && !req.counts.write_exec &&
	       !req.counts.outside && !req.counts.reserved &&
	       req.counts.not_written > 100);
	req.count = 1;
	req.ranges = (uintptr_t)&wrong;
	wrong.attributes = VIRTIO_GUARD_NOREAD;
	report("KERNEL of what does not follow from tables: EINVAL, entry 0",
	       ask_kernel(fd, &req) == EINVAL && !req.index &&
	       !req.counts.pages);
	wrong.attributes = VIRTIO_GUARD_NOWRITE;
	req.flags = 4;
	report("KERNEL with an unknown flag: EINVAL, no entry",
	       ask_kernel(fd, &req) == EINVAL && req.index == NO);
	req.flags = 0;
	report("KERNEL cannot free what is locked: EPERM, entry 0",
	       ask_kernel(fd, &req) == EPERM && !req.index);
	req.flags = VIRTIO_GUARD_KERNEL_LOCK;
	report("KERNEL with LOCK leaves it as it is",
	       !ask_kernel(fd, &req) && req.generation && !req.counts.given);
}

static void test_ioctl(int fd)
{
	struct guard_range good = { 0, 0, VIRTIO_GUARD_NOWRITE };
	struct guard_range r[3];
	struct guard_info info, after;
	struct guard_event event;
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
	report("a store by user space is refused",
	       refused(store, memory) && memory[0] == 0x5a);
	test_newer_calls(fd, &good, info.audit_bits);
	test_msr_calls(fd);
	test_kernel_calls(fd, &good);
	many_ranges(fd, info.max_request_ranges);

	if (!setuid(65534))
		report("without CAP_SYS_ADMIN: EPERM, on an open descriptor too",
		       lock_ranges(fd, &good, 1, &req) == EPERM &&
		       ask(fd, GUARD_IOC_PROTECT, &good, 1, &req) == EPERM &&
		       query(fd, 0, 1, NULL, 0, &(struct guard_query){ 0 }) ==
		       EPERM &&
		       ioctl(fd, GUARD_IOC_SEAL, &info) && errno == EPERM &&
		       ioctl(fd, GUARD_IOC_MSR_LOCK, &req) && errno == EPERM &&
		       ask_kernel(fd, &(struct guard_kernel){ 0 }) == EPERM &&
		       read(fd, &event, sizeof(event)) < 0 && errno == EPERM &&
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
	printf("version %u\npage_size %u\ndeny_bits %#llx\naudit_bits %#llx\n"
	       "max_request_ranges %u\nmax_ranges %u\ngeneration %llu\n"
	       "ranges_in_force %u\nviolations %llu\nevents_lost %llu\n"
	       "malformed %llu\nmax_msr_ranges %u\nmsr_ranges_in_force %u\n",
	       i.version, i.page_size, (unsigned long long)i.deny_bits,
	       (unsigned long long)i.audit_bits, i.max_request_ranges,
	       i.max_ranges, (unsigned long long)i.generation,
	       i.ranges_in_force, (unsigned long long)i.violations,
	       (unsigned long long)i.events_lost,
	       (unsigned long long)i.malformed, i.max_msr_ranges,
	       i.msr_ranges_in_force);
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

/* Not by way of the vDSO, nor of a library that remembers. */
static int syscalls(void)
{
	pid_t child = getpid();
	unsigned int cpu;
	int i;

	for (i = 0; i < 10000; i++)
		if (syscall(SYS_getpid) != child ||
		    syscall(SYS_getcpu, &cpu, NULL, NULL))
			return 1;
	return 0;
}

static int run_on(const char *cpu, char **argv)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(atoi(cpu), &set);
	if (sched_setaffinity(0, sizeof(set), &set)) {
		perror("sched_setaffinity");
		return 125;
	}
	execv(argv[0], argv);
	perror(argv[0]);
	return 126;
}

int main(int argc, char **argv)
{
	struct guard_range range = { 0, 0, VIRTIO_GUARD_NOWRITE };
	struct guard_lock req;
	int fd, err;

	if (argc >= 2 && !strcmp(argv[1], "cmos"))
		return cmos(argc > 2 ? argv[2] : NULL);
	if (argc == 2 && !strcmp(argv[1], "syscalls"))
		return syscalls();
	if (argc >= 4 && !strcmp(argv[1], "on"))
		return run_on(argv[2], argv + 3);
	if (argc == 2 && !strcmp(argv[1], "page")) {
		printf("%llu\n", (unsigned long long)frame_of(pages(1)));
		return 0;
	}
	if (argc == 3 && !strcmp(argv[1], "hang-up"))
		return test_hang_up(argv[2]);

	fd = open("/dev/guard", O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		perror("/dev/guard");
		return 2;
	}
	if (argc == 2 && !strcmp(argv[1], "ioctl")) {
		test_ioctl(fd);
		return failed;
	}
	if (argc == 2 && !strcmp(argv[1], "events")) {
		test_events(fd);
		return failed;
	}
	if (argc == 2 && !strcmp(argv[1], "rights")) {
		test_rights(fd);
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
	fprintf(stderr, "usage: guardtest ioctl | events | hang-up DEV | rights | info | lock START END [ATTRS] | page | cmos [N] | syscalls | on CPU PROGRAM [ARG...]\n");
	return 2;
}
