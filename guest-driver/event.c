// SPDX-License-Identifier: GPL-2.0-only
/*
 * Events, from the event queue: a line in the log, and a record for each file
 * that listens on /dev/guard.
 */
#include "guard.h"

#include <linux/build_bug.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/kfifo.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/ratelimit.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>

/* Events that wait for one reader; a power of two. */
#define GUARD_LISTENER_EVENTS	256

static_assert(sizeof(struct virtio_guard_event) == 64);
static_assert(sizeof(struct guard_event) == 80);

/**
 * struct guard_listener - one open file
 * @node: in guard_listeners
 * @wait: woken when there is something to read, or never will be again
 * @fifo: what was not read yet
 * @dropped: events that found @fifo full since the last that did not
 * @gone: the device is
 */
struct guard_listener {
	struct list_head node;
	wait_queue_head_t wait;
	DECLARE_KFIFO(fifo, struct guard_event, GUARD_LISTENER_EVENTS);
	u64 dropped;
	bool gone;
};

/* Protects the list and what is in it; held for short. Inside guard->lock. */
static DEFINE_MUTEX(guard_listeners_mutex);
static LIST_HEAD(guard_listeners);

/* The log */

static const char *guard_access_name(u32 access)
{
	switch (access) {
	case VIRTIO_GUARD_ACCESS_WRITE:
		return "write";
	case VIRTIO_GUARD_ACCESS_EXEC:
		return "exec";
	case VIRTIO_GUARD_ACCESS_READ:
		return "read";
	default:
		return "access";
	}
}

static const char *guard_action_name(u32 action)
{
	switch (action) {
	case VIRTIO_GUARD_ACTION_INJECT:
		return "inject";
	case VIRTIO_GUARD_ACTION_DROP:
		return "drop";
	case VIRTIO_GUARD_ACTION_PAUSE:
		return "pause";
	case VIRTIO_GUARD_ACTION_SHUTDOWN:
		return "shutdown";
	case VIRTIO_GUARD_ACTION_AUDIT:
		return "audit";
	default:
		return "unknown";
	}
}

static void guard_log(const struct guard_event *ev)
{
	static DEFINE_RATELIMIT_STATE(rs, 5 * HZ, 20);
	char source[24], rip[128];
	const char *what = "gpa";

	if (!__ratelimit(&rs))
		return;

	if (ev->source == VIRTIO_GUARD_SOURCE_DMA)
		strscpy(source, "a device", sizeof(source));
	else
		snprintf(source, sizeof(source), "vcpu %u", ev->source);

	/* A kernel address only by name: the log need not tell KASLR's secret. */
	if (ev->rip == VIRTIO_GUARD_UNKNOWN)
		strscpy(rip, "unknown", sizeof(rip));
	else if (ev->rip >= TASK_SIZE_MAX)
		snprintf(rip, sizeof(rip), "%pS",
			 (void *)(unsigned long)ev->rip);
	else
		snprintf(rip, sizeof(rip), "0x%llx", ev->rip);

	if (ev->type == VIRTIO_GUARD_EV_MSR)
		what = "msr";

	pr_warn("%s %s %s=0x%llx by %s rip=%s times=%u action=%s lost=%llu\n",
		ev->action == VIRTIO_GUARD_ACTION_AUDIT ? "watched" : "refused",
		guard_access_name(ev->access), what, ev->gpa, source, rip,
		ev->times, guard_action_name(ev->action), ev->lost);
}

/* Those who listen */

static void guard_tell(struct guard_event *ev)
{
	struct guard_listener *listener;

	mutex_lock(&guard_listeners_mutex);
	list_for_each_entry(listener, &guard_listeners, node) {
		ev->dropped = listener->dropped;
		if (kfifo_put(&listener->fifo, *ev))
			listener->dropped = 0;
		else
			listener->dropped++;
		wake_up_interruptible(&listener->wait);
	}
	mutex_unlock(&guard_listeners_mutex);
}

/**
 * guard_listen - have events kept from now on
 *
 * Return: the listener, or an ERR_PTR().
 */
struct guard_listener *guard_listen(void)
{
	struct guard_listener *listener;
	struct guard *guard;

	listener = kvzalloc(sizeof(*listener), GFP_KERNEL_ACCOUNT);
	if (!listener)
		return ERR_PTR(-ENOMEM);
	init_waitqueue_head(&listener->wait);
	INIT_KFIFO(listener->fifo);

	mutex_lock(&guard_listeners_mutex);
	list_add_tail(&listener->node, &guard_listeners);
	mutex_unlock(&guard_listeners_mutex);

	/* A device that goes after this look will say so to the listener. */
	guard = guard_get();
	if (guard)
		guard_put(guard);
	else
		WRITE_ONCE(listener->gone, true);
	return listener;
}

/**
 * guard_unlisten - the file was closed
 * @listener: of guard_listen()
 */
void guard_unlisten(struct guard_listener *listener)
{
	mutex_lock(&guard_listeners_mutex);
	list_del(&listener->node);
	mutex_unlock(&guard_listeners_mutex);
	kvfree(listener);
}

/**
 * guard_listeners_hang_up - no event will come any more
 *
 * After the device was taken off guard_get()'s place and has been stopped.
 */
void guard_listeners_hang_up(void)
{
	struct guard_listener *listener;

	mutex_lock(&guard_listeners_mutex);
	list_for_each_entry(listener, &guard_listeners, node) {
		WRITE_ONCE(listener->gone, true);
		wake_up_interruptible(&listener->wait);
	}
	mutex_unlock(&guard_listeners_mutex);
}

/* The next event; -EAGAIN without one, -ENODEV when none will come. */
static int guard_listener_take(struct guard_listener *listener,
			       struct guard_event *ev)
{
	int err = 0;

	mutex_lock(&guard_listeners_mutex);
	if (!kfifo_get(&listener->fifo, ev))
		err = listener->gone ? -ENODEV : -EAGAIN;
	mutex_unlock(&guard_listeners_mutex);
	return err;
}

static bool guard_listener_ready(struct guard_listener *listener)
{
	return !kfifo_is_empty(&listener->fifo) || READ_ONCE(listener->gone);
}

/**
 * guard_listener_read - read() of /dev/guard
 * @listener: of the file
 * @buf: where to
 * @len: its size
 * @nonblock: do not wait
 *
 * Return: bytes, which are whole records; -EINVAL when none fits; -EAGAIN when
 * none is there and @nonblock; -ENODEV when none will come; -EFAULT;
 * -ERESTARTSYS.
 */
ssize_t guard_listener_read(struct guard_listener *listener, char __user *buf,
			    size_t len, bool nonblock)
{
	struct guard_event ev;
	size_t done = 0;
	int err;

	if (len < sizeof(ev))
		return -EINVAL;
	while (len - done >= sizeof(ev)) {
		err = guard_listener_take(listener, &ev);
		if (!err && copy_to_user(buf + done, &ev, sizeof(ev)))
			err = -EFAULT;
		if (!err) {
			done += sizeof(ev);
			continue;
		}
		if (done || err != -EAGAIN || nonblock)
			return done ?: err;
		if (wait_event_interruptible(listener->wait,
					     guard_listener_ready(listener)))
			return -ERESTARTSYS;
	}
	return done;
}

/**
 * guard_listener_poll - poll() of /dev/guard
 * @listener: of the file
 * @file: the file
 * @wait: who waits
 *
 * Return: what can be done.
 */
__poll_t guard_listener_poll(struct guard_listener *listener,
			     struct file *file, poll_table *wait)
{
	__poll_t mask = 0;

	poll_wait(file, &listener->wait, wait);
	if (!kfifo_is_empty(&listener->fifo))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (READ_ONCE(listener->gone))
		mask |= EPOLLHUP | EPOLLERR;
	return mask;
}

/* The queue */

/* What the device wrote, read once; @buf goes back to it after this. */
static void guard_report(const struct virtio_guard_event *buf)
{
	struct guard_event ev = {
		.type = le16_to_cpu(buf->type),
		.access = le16_to_cpu(buf->access),
		.source = le32_to_cpu(buf->source),
		.action = le32_to_cpu(buf->action),
		.gpa = le64_to_cpu(buf->gpa),
		.gva = le64_to_cpu(buf->gva),
		.rip = le64_to_cpu(buf->rip),
		.value = le64_to_cpu(buf->value),
		.size = le32_to_cpu(buf->size),
		.times = le32_to_cpu(buf->times),
		.lost = le64_to_cpu(buf->lost),
		.time = ktime_get_boottime_ns(),
	};

	/* What another type would mean is not known here. */
	if (ev.type != VIRTIO_GUARD_EV_VIOLATION &&
	    ev.type != VIRTIO_GUARD_EV_MSR)
		return;
	guard_tell(&ev);
	guard_log(&ev);
}

static void guard_post_event(struct guard *guard, struct virtio_guard_event *ev)
{
	struct scatterlist sg;

	sg_init_one(&sg, ev, sizeof(*ev));
	/* There is room for each of them, and a lost buffer loses no event. */
	if (virtqueue_add_inbuf(guard->events, &sg, 1, ev, GFP_KERNEL))
		pr_warn_once("cannot post an event buffer\n");
}

/**
 * guard_events_post - give the device all buffers
 * @guard: the device, whose event queue is empty
 */
void guard_events_post(struct guard *guard)
{
	unsigned int i;

	lockdep_assert_held(&guard->lock);

	for (i = 0; i < GUARD_EVENT_BUFS; i++)
		guard_post_event(guard, &guard->event_bufs[i]);
	virtqueue_kick(guard->events);
}

/**
 * guard_event_work - take the events that are there
 * @work: guard.event_work
 */
void guard_event_work(struct work_struct *work)
{
	struct guard *guard = container_of(work, struct guard, event_work);
	struct virtio_guard_event *buf, ev;
	unsigned int len;

	mutex_lock(&guard->lock);
	while (guard->live) {
		virtqueue_disable_cb(guard->events);
		while ((buf = virtqueue_get_buf(guard->events, &len))) {
			ev = *buf;
			guard_post_event(guard, buf);
			if (len >= sizeof(ev))
				guard_report(&ev);
		}
		virtqueue_kick(guard->events);
		if (virtqueue_is_broken(guard->events) ||
		    virtqueue_enable_cb(guard->events))
			break;
	}
	mutex_unlock(&guard->lock);
}
