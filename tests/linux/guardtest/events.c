// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What read() and poll() on /dev/guard give.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guardtest.h"

/* How many records a file keeps, as the header says. */
#define KEPT	256
/* An event comes long before this, on the slowest of machines. */
#define PATIENCE_MS	30000

static sigjmp_buf out_of_store;
/* Volatile, lest the compiler warn of what is meant. */
static void *volatile nowhere = (void *)16;

static void on_fault(int number)
{
	(void)number;
	siglongjmp(out_of_store, 1);
}

/* A store that is refused, and that this process outlives. */
static void try_store(volatile unsigned char *at)
{
	if (!sigsetjmp(out_of_store, 1))
		store(at);
}

static int open_guard(int flags)
{
	int fd = open("/dev/guard", flags | O_CLOEXEC);

	if (fd < 0) {
		perror("/dev/guard");
		exit(2);
	}
	return fd;
}

static short poll_guard(int fd, int timeout)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	return poll(&p, 1, timeout) > 0 ? p.revents : 0;
}

/* Waits for an event; returns the errno. */
int next_event(int fd, struct guard_event *event)
{
	ssize_t len;

	if (!poll_guard(fd, PATIENCE_MS))
		return ETIMEDOUT;
	len = read(fd, event, sizeof(*event));
	if (len < 0)
		return errno;
	return len == sizeof(*event) ? 0 : EIO;
}

static int is_empty(int fd)
{
	struct guard_event event;

	return read(fd, &event, sizeof(event)) < 0 && errno == EAGAIN;
}

static void test_one(unsigned char *memory, uint64_t gpa)
{
	int a = open_guard(O_RDWR | O_NONBLOCK);
	int b = open_guard(O_RDONLY | O_NONBLOCK), late;
	struct guard_event event, other;
	int err;

	report("no event: EAGAIN, and nothing to poll for",
	       is_empty(a) && !poll_guard(a, 0));
	report("less than a record: EINVAL",
	       read(a, &event, sizeof(event) - 1) < 0 && errno == EINVAL);

	try_store(memory + 8);
	err = next_event(a, &event);
	if (err)
		printf("# errno %d\n", err);
	report("a store makes an event, which poll() tells of", !err);
	report("its fields", event.type == VIRTIO_GUARD_EV_VIOLATION &&
	       event.access == VIRTIO_GUARD_ACCESS_WRITE &&
	       (event.action == VIRTIO_GUARD_ACTION_INJECT ||
		event.action == VIRTIO_GUARD_ACTION_DROP) &&
	       event.gpa == gpa + 8 && event.source < 64 && event.times &&
	       event.time && !event.dropped);
	late = open_guard(O_RDONLY | O_NONBLOCK);
	report("another file sees the same", !next_event(b, &other) &&
	       !memcmp(&event, &other, sizeof(event)));
	report("each once", is_empty(a) && is_empty(b));
	report("a file that was opened later does not", is_empty(late));

	try_store(memory + 16);
	poll_guard(a, PATIENCE_MS);
	report("a buffer that is not mapped: EFAULT",
	       read(a, nowhere, sizeof(event)) < 0 && errno == EFAULT);
	close(a);
	close(b);
	close(late);
}

static void test_many_in_one_read(unsigned char *memory, uint64_t gpa)
{
	int a = open_guard(O_RDONLY | O_NONBLOCK), b = open_guard(O_RDONLY);
	struct guard_event events[4], event;
	ssize_t len;
	int i;

	for (i = 0; i < 3; i++) {
		try_store(memory + 32 + i);
		next_event(b, &event);
	}
	/* One byte more than three, and less than four. */
	len = read(a, events, 3 * sizeof(event) + 1);
	report("a read gives as many whole records as fit",
	       len == 3 * sizeof(event) && events[0].gpa == gpa + 32 &&
	       events[1].gpa == gpa + 33 && events[2].gpa == gpa + 34);
	close(a);
	close(b);
}

static void test_blocking(unsigned char *memory)
{
	int fd = open_guard(O_RDONLY), status;
	struct guard_event event;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		alarm(PATIENCE_MS / 1000);
		_exit(read(fd, &event, sizeof(event)) != sizeof(event));
	}
	usleep(300000);
	report("a reader waits", !waitpid(pid, &status, WNOHANG));
	try_store(memory + 48);
	waitpid(pid, &status, 0);
	report("and an event wakes it", !status);
	close(fd);
}

/* Each event is taken from one file before the next is made. */
static void test_slow_reader(unsigned char *memory, uint64_t gpa)
{
	const int extra = 50;
	int slow = open_guard(O_RDONLY | O_NONBLOCK), fast = open_guard(O_RDONLY);
	struct guard_event event;
	uint64_t dropped = 0;
	int i, good = 1;

	for (i = 0; i < KEPT + extra; i++) {
		try_store(memory + i * 8);
		if (next_event(fast, &event) || event.gpa != gpa + i * 8 ||
		    event.dropped) {
			printf("# event %d\n", i);
			good = 0;
			break;
		}
	}
	report("a reader that keeps up gets all", good);
	for (i = 0; i < KEPT; i++) {
		if (next_event(slow, &event) || event.gpa != gpa + i * 8)
			break;
		dropped += event.dropped;
	}
	report("one that does not gets the first of them",
	       i == KEPT && !dropped && is_empty(slow));
	try_store(memory);
	report("and how many it missed with the next",
	       !next_event(slow, &event) && event.gpa == gpa &&
	       event.dropped == (uint64_t)extra);
	try_store(memory + 8);
	report("once", !next_event(slow, &event) && !event.dropped);
	close(slow);
	close(fast);
}

void test_events(int fd)
{
	unsigned char *memory = pages(1);
	struct guard_range range = { .attributes = VIRTIO_GUARD_NOWRITE };
	struct guard_lock req;
	struct sigaction action = { .sa_handler = on_fault };

	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	range.gfn_start = range.gfn_end = frame_of(memory);
	if (ask(fd, GUARD_IOC_LOCK, &range, 1, &req)) {
		report("a page can be locked", 0);
		return;
	}
	test_one(memory, range.gfn_start * PAGE);
	test_many_in_one_read(memory, range.gfn_start * PAGE);
	test_blocking(memory);
	test_slow_reader(memory, range.gfn_start * PAGE);
}

static int write_name(const char *file, const char *name)
{
	char path[128];
	int fd, ok;

	snprintf(path, sizeof(path), "/sys/bus/virtio/drivers/virtio_guard/%s",
		 file);
	fd = open(path, O_WRONLY);
	ok = fd >= 0 && write(fd, name, strlen(name)) == (ssize_t)strlen(name);
	if (fd >= 0)
		close(fd);
	return ok;
}

/* The device goes while somebody reads, and comes back. */
int test_hang_up(const char *device)
{
	int waiting = open_guard(O_RDONLY);
	int idle = open_guard(O_RDONLY | O_NONBLOCK);
	struct guard_event event;
	struct guard_info info;
	int fresh, status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		alarm(PATIENCE_MS / 1000);
		_exit(read(waiting, &event, sizeof(event)) < 0 ? errno : 0);
	}
	usleep(300000);
	report("the device can be unbound", write_name("unbind", device));
	waitpid(pid, &status, 0);
	report("a reader that waits: ENODEV",
	       WIFEXITED(status) && WEXITSTATUS(status) == ENODEV);
	report("poll() tells of it",
	       (poll_guard(idle, 0) & (POLLHUP | POLLIN)) == POLLHUP);
	report("a read after it: ENODEV",
	       read(idle, &event, sizeof(event)) < 0 && errno == ENODEV);
	fresh = open_guard(O_RDONLY | O_NONBLOCK);
	report("a file that is opened without a device: ENODEV",
	       read(fresh, &event, sizeof(event)) < 0 && errno == ENODEV &&
	       ioctl(fresh, GUARD_IOC_INFO, &info) && errno == ENODEV);
	close(fresh);

	report("the device can be bound", write_name("bind", device));
	fresh = open_guard(O_RDONLY | O_NONBLOCK);
	report("a new file listens", is_empty(fresh) && !poll_guard(fresh, 0));
	report("an old one does not, but its ioctls work",
	       read(idle, &event, sizeof(event)) < 0 && errno == ENODEV &&
	       !ioctl(idle, GUARD_IOC_INFO, &info));
	return failed;
}
