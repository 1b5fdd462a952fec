// SPDX-License-Identifier: GPL-2.0-only
/*
 * The virtio device: requests on the control queue, violations from the event
 * queue, and its coming and going.
 *
 * Both queues are only touched in process context under guard->lock; their
 * interrupts do no more than queue work. A request belongs to two parties, who
 * waits for it and the device; the buffers live until both have let go, so a
 * waiter that is killed leaves nothing behind that the device could write to.
 */
#include "guard.h"

#include <linux/build_bug.h>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/ratelimit.h>
#include <linux/refcount.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

/* What the specification allows in one request. */
#define GUARD_MAX_RANGES	4096
#define GUARD_MAX_REQ_LEN	(sizeof(struct virtio_guard_req) + \
				 GUARD_MAX_RANGES * \
				 sizeof(struct virtio_guard_range))
#define GUARD_MAX_REQ_SG	DIV_ROUND_UP(GUARD_MAX_REQ_LEN, PAGE_SIZE)

#define GUARD_EVENT_BUFS	32

static_assert(sizeof(struct virtio_guard_config) == 64);
static_assert(sizeof(struct virtio_guard_req) == 8);
static_assert(sizeof(struct virtio_guard_range) == 24);
static_assert(sizeof(struct virtio_guard_resp) == 16);
static_assert(sizeof(struct virtio_guard_event) == 64);

/* EBUSY: an emulated device is writing there; 10 + 20 + ... + 320 ms. */
#define GUARD_BUSY_RETRIES	6
#define GUARD_BUSY_DELAY_MS	10

/* Say so when the host has not answered for this long; then wait on. */
#define GUARD_PATIENCE		(30 * HZ)

/**
 * struct guard - the device
 * @ref: held by the driver and by each call that uses the device
 * @vdev: the virtio device; valid while @live
 * @lock: protects the queues, @live, @requests and @completed
 * @live: the queues may be used
 * @control: requests; NULL between freeze and restore
 * @events: violations; likewise
 * @requests: &struct guard_request with the device
 * @completed: grows when a request ends, for those who wait for @room
 * @room: woken when the control queue may have room again
 * @control_work: takes answers
 * @event_work: takes violations
 * @bootlock_work: locks what the module parameter names
 * @bootlocked: @bootlock_work has ended once
 * @max_request_ranges: most entries in one request
 * @event_bufs: the buffers on @events
 */
struct guard {
	struct kref ref;
	struct virtio_device *vdev;
	struct mutex lock;
	bool live;
	struct virtqueue *control;
	struct virtqueue *events;
	struct list_head requests;
	unsigned long completed;
	wait_queue_head_t room;
	struct work_struct control_work;
	struct work_struct event_work;
	struct work_struct bootlock_work;
	struct completion bootlocked;
	u32 max_request_ranges;
	struct virtio_guard_event event_bufs[GUARD_EVENT_BUFS];
};

/**
 * struct guard_request - one request
 * @node: in guard.requests while the device has it
 * @ref: held by who waits and by the device
 * @done: the device, or its end, has answered
 * @err: the answer; valid once @done
 * @index: the entry that @err is about
 * @value: type-specific
 * @req: what the device reads, kvmalloc()ed
 * @len: its length
 * @resp: what the device writes
 */
struct guard_request {
	struct list_head node;
	refcount_t ref;
	struct completion done;
	int err;
	u32 index;
	u64 value;
	struct virtio_guard_req *req;
	size_t len;
	struct virtio_guard_resp resp;
};

/* /dev/guard and in-kernel callers speak to one device. */
static DEFINE_MUTEX(guard_only_mutex);
static struct guard *guard_only;

static void guard_free(struct kref *ref)
{
	kfree(container_of(ref, struct guard, ref));
}

static void guard_put(struct guard *guard)
{
	kref_put(&guard->ref, guard_free);
}

static struct guard *guard_get(void)
{
	struct guard *guard;

	mutex_lock(&guard_only_mutex);
	guard = guard_only;
	if (guard)
		kref_get(&guard->ref);
	mutex_unlock(&guard_only_mutex);
	return guard;
}

/* Requests */

static void guard_request_put(struct guard_request *r)
{
	if (refcount_dec_and_test(&r->ref)) {
		kvfree(r->req);
		kfree(r);
	}
}

static struct guard_request *
guard_request_lock(const struct guard_range *ranges, u32 count)
{
	struct virtio_guard_range *entry;
	struct guard_request *r;
	u32 i;

	r = kzalloc(sizeof(*r), GFP_KERNEL);
	if (!r)
		return NULL;
	r->len = sizeof(*r->req) + count * sizeof(*entry);
	r->req = kvmalloc(r->len, GFP_KERNEL);
	if (!r->req) {
		kfree(r);
		return NULL;
	}
	refcount_set(&r->ref, 1);
	init_completion(&r->done);

	r->req->type = cpu_to_le16(VIRTIO_GUARD_T_LOCK);
	r->req->flags = 0;
	r->req->count = cpu_to_le32(count);
	entry = (struct virtio_guard_range *)(r->req + 1);
	for (i = 0; i < count; i++) {
		entry[i].gfn_start = cpu_to_le64(ranges[i].gfn_start);
		entry[i].gfn_end = cpu_to_le64(ranges[i].gfn_end);
		entry[i].attributes = cpu_to_le64(ranges[i].attributes);
	}
	return r;
}

/* @sg has GUARD_MAX_REQ_SG entries, which is enough for any request. */
static void guard_request_sg(const struct guard_request *r,
			     struct scatterlist *sg)
{
	void *at = r->req;
	size_t left = r->len;
	unsigned int i;

	if (!is_vmalloc_addr(at)) {
		sg_init_one(sg, at, left);
		return;
	}
	sg_init_table(sg, DIV_ROUND_UP(left, PAGE_SIZE));
	for (i = 0; left; i++) {
		size_t part = min_t(size_t, left, PAGE_SIZE);

		sg_set_page(&sg[i], vmalloc_to_page(at), part, 0);
		at += part;
		left -= part;
	}
}

/* The request is over; the device's share of it ends here. */
static void guard_request_end(struct guard *guard, struct guard_request *r,
			      int err)
{
	lockdep_assert_held(&guard->lock);

	list_del(&r->node);
	r->err = err;
	guard->completed++;
	complete(&r->done);
	guard_request_put(r);
}

/* What the device wrote, read once. */
static int guard_request_answer(struct guard_request *r, unsigned int len)
{
	u32 status;

	if (len < sizeof(r->resp))
		return -EIO;
	status = le32_to_cpu(READ_ONCE(r->resp.status));
	r->index = le32_to_cpu(r->resp.index);
	r->value = le64_to_cpu(r->resp.value);
	return status <= MAX_ERRNO ? -(int)status : -EIO;
}

static void guard_control_work(struct work_struct *work)
{
	struct guard *guard = container_of(work, struct guard, control_work);
	struct guard_request *r;
	unsigned int len;

	mutex_lock(&guard->lock);
	while (guard->live) {
		virtqueue_disable_cb(guard->control);
		while ((r = virtqueue_get_buf(guard->control, &len)))
			guard_request_end(guard, r,
					  guard_request_answer(r, len));
		if (virtqueue_is_broken(guard->control) ||
		    virtqueue_enable_cb(guard->control))
			break;
	}
	mutex_unlock(&guard->lock);
	wake_up_all(&guard->room);
}

static int guard_submit(struct guard *guard, struct guard_request *r)
{
	struct scatterlist *sgs[2], *out, in;
	unsigned long seen;
	int err;

	out = kmalloc_array(GUARD_MAX_REQ_SG, sizeof(*out), GFP_KERNEL);
	if (!out)
		return -ENOMEM;
	guard_request_sg(r, out);
	sg_init_one(&in, &r->resp, sizeof(r->resp));
	sgs[0] = out;
	sgs[1] = &in;

	for (;;) {
		mutex_lock(&guard->lock);
		seen = guard->completed;
		if (!guard->live)
			err = -ENODEV;
		else
			err = virtqueue_add_sgs(guard->control, sgs, 1, 1, r,
						GFP_KERNEL);
		if (!err) {
			refcount_inc(&r->ref);
			list_add_tail(&r->node, &guard->requests);
			virtqueue_kick(guard->control);
		} else if (err == -ENOSPC && list_empty(&guard->requests)) {
			/* The queue is empty and still too small. */
			err = -EIO;
		}
		mutex_unlock(&guard->lock);

		if (err != -ENOSPC)
			break;
		if (wait_event_killable(guard->room,
				READ_ONCE(guard->completed) != seen)) {
			err = -EINTR;
			break;
		}
	}
	kfree(out);
	return err;
}

static int guard_wait(struct guard_request *r)
{
	long left;

	for (;;) {
		left = wait_for_completion_killable_timeout(&r->done,
							    GUARD_PATIENCE);
		if (left)
			break;
		pr_warn_ratelimited("still waiting for the host; is vhost-guard running?\n");
	}
	return left < 0 ? -EINTR : r->err;
}

static int guard_lock_once(struct guard *guard,
			   const struct guard_range *ranges, u32 count,
			   u32 *index, u64 *generation)
{
	struct guard_request *r;
	int err;

	r = guard_request_lock(ranges, count);
	if (!r)
		return -ENOMEM;
	r->index = VIRTIO_GUARD_NO_INDEX;

	err = guard_submit(guard, r);
	if (!err) {
		err = guard_wait(r);
		if (err != -EINTR) {
			*index = r->index;
			*generation = err ? 0 : r->value;
		}
	}
	guard_request_put(r);
	return err;
}

/**
 * virtio_guard_lock - deny accesses to guest pages until the next system reset
 * @ranges: the pages, and what is denied
 * @count: entries in @ranges
 * @index: out: the entry that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation that the lock belongs to; 0 on error
 *
 * All of the ranges are locked or, on error, none. Once this returns 0, every
 * vCPU and every emulated device is bound by it; nothing in the guest can take
 * it back. May sleep, for as long as the host takes to answer.
 *
 * Return: 0; -ENODEV without a device; -E2BIG when @count is more than one
 * request may have; -EINTR when the task is being killed, in which case the
 * request may still be carried out; or the errno that the device answered, see
 * docs/device.md.
 */
int virtio_guard_lock(const struct guard_range *ranges, u32 count, u32 *index,
		      u64 *generation)
{
	struct guard *guard;
	unsigned int tries;
	int err;

	might_sleep();
	*index = VIRTIO_GUARD_NO_INDEX;
	*generation = 0;

	guard = guard_get();
	if (!guard)
		return -ENODEV;
	if (!count)
		err = -EINVAL;
	else if (count > guard->max_request_ranges)
		err = -E2BIG;
	else
		err = guard_lock_once(guard, ranges, count, index, generation);
	for (tries = 0; err == -EBUSY && tries < GUARD_BUSY_RETRIES; tries++) {
		msleep(GUARD_BUSY_DELAY_MS << tries);
		if (fatal_signal_pending(current))
			break;
		err = guard_lock_once(guard, ranges, count, index, generation);
	}
	guard_put(guard);
	return err;
}
EXPORT_SYMBOL_GPL(virtio_guard_lock);

/* Configuration */

static void guard_read_config(struct virtio_device *vdev,
			      struct guard_info *info)
{
	memset(info, 0, sizeof(*info));
	virtio_cread_le(vdev, struct virtio_guard_config, version,
			&info->version);
	virtio_cread_le(vdev, struct virtio_guard_config, page_size,
			&info->page_size);
	virtio_cread_le(vdev, struct virtio_guard_config, deny_bits,
			&info->deny_bits);
	virtio_cread_le(vdev, struct virtio_guard_config, max_request_ranges,
			&info->max_request_ranges);
	virtio_cread_le(vdev, struct virtio_guard_config, max_ranges,
			&info->max_ranges);
	virtio_cread_le(vdev, struct virtio_guard_config, generation,
			&info->generation);
	virtio_cread_le(vdev, struct virtio_guard_config, ranges_in_force,
			&info->ranges_in_force);
	virtio_cread_le(vdev, struct virtio_guard_config, violations,
			&info->violations);
	virtio_cread_le(vdev, struct virtio_guard_config, events_lost,
			&info->events_lost);
	virtio_cread_le(vdev, struct virtio_guard_config, malformed,
			&info->malformed);
}

/* The counters move as they like: read until two readings agree. */
static void guard_read_config_whole(struct virtio_device *vdev,
				    struct guard_info *info)
{
	struct guard_info again;
	int tries;

	guard_read_config(vdev, info);
	for (tries = 0; tries < 8; tries++) {
		again = *info;
		guard_read_config(vdev, info);
		if (!memcmp(info, &again, sizeof(again)))
			break;
	}
	info->max_request_ranges = min_t(u32, info->max_request_ranges,
					 GUARD_MAX_RANGES);
}

/**
 * guard_read_info - the device's configuration
 * @info: out
 *
 * Return: 0, or -ENODEV without a device.
 */
int guard_read_info(struct guard_info *info)
{
	struct guard *guard = guard_get();
	int err = 0;

	if (!guard)
		return -ENODEV;
	mutex_lock(&guard->lock);
	if (guard->live)
		guard_read_config_whole(guard->vdev, info);
	else
		err = -ENODEV;
	mutex_unlock(&guard->lock);
	guard_put(guard);
	return err;
}

/* Events */

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
	default:
		return "unknown";
	}
}

static void guard_report(const struct virtio_guard_event *ev)
{
	static DEFINE_RATELIMIT_STATE(rs, 5 * HZ, 20);
	char source[24], rip[128];
	u64 ip = le64_to_cpu(ev->rip);
	u32 cpu = le32_to_cpu(ev->source);

	if (le16_to_cpu(ev->type) != VIRTIO_GUARD_EV_VIOLATION ||
	    !__ratelimit(&rs))
		return;

	if (cpu == VIRTIO_GUARD_SOURCE_DMA)
		strscpy(source, "a device", sizeof(source));
	else
		snprintf(source, sizeof(source), "vcpu %u", cpu);

	/* A kernel address only by name: the log need not tell KASLR's secret. */
	if (ip == VIRTIO_GUARD_UNKNOWN)
		strscpy(rip, "unknown", sizeof(rip));
	else if (ip >= TASK_SIZE_MAX)
		snprintf(rip, sizeof(rip), "%pS", (void *)(unsigned long)ip);
	else
		snprintf(rip, sizeof(rip), "0x%llx", ip);

	pr_warn("refused write gpa=0x%llx by %s rip=%s times=%u action=%s lost=%llu\n",
		le64_to_cpu(ev->gpa), source, rip, le32_to_cpu(ev->times),
		guard_action_name(le32_to_cpu(ev->action)),
		le64_to_cpu(ev->lost));
}

static void guard_post_event(struct guard *guard, struct virtio_guard_event *ev)
{
	struct scatterlist sg;

	sg_init_one(&sg, ev, sizeof(*ev));
	/* There is room for each of them, and a lost buffer loses no event. */
	if (virtqueue_add_inbuf(guard->events, &sg, 1, ev, GFP_KERNEL))
		pr_warn_once("cannot post an event buffer\n");
}

static void guard_event_work(struct work_struct *work)
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

/* The device comes and goes */

static void guard_control_cb(struct virtqueue *vq)
{
	struct guard *guard = vq->vdev->priv;

	schedule_work(&guard->control_work);
}

static void guard_event_cb(struct virtqueue *vq)
{
	struct guard *guard = vq->vdev->priv;

	schedule_work(&guard->event_work);
}

static int guard_find_vqs(struct guard *guard)
{
	struct virtqueue *vqs[2];
	int err;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[] = {
		{ "control", guard_control_cb },
		{ "events", guard_event_cb },
	};

	err = virtio_find_vqs(guard->vdev, 2, vqs, info, NULL);
#else
	vq_callback_t *callbacks[] = { guard_control_cb, guard_event_cb };
	static const char * const names[] = { "control", "events" };

	err = virtio_find_vqs(guard->vdev, 2, vqs, callbacks, names, NULL);
#endif
	if (err)
		return err;
	guard->control = vqs[0];
	guard->events = vqs[1];
	return 0;
}

static void guard_del_vqs(struct guard *guard)
{
	guard->vdev->config->del_vqs(guard->vdev);
	guard->control = NULL;
	guard->events = NULL;
}

static void guard_bootlock_work(struct work_struct *work)
{
	struct guard *guard = container_of(work, struct guard, bootlock_work);

	guard_bootlock_run();
	complete_all(&guard->bootlocked);
}

/* The queues exist: use them. */
static void guard_start(struct guard *guard)
{
	unsigned int i;

	virtio_device_ready(guard->vdev);
	mutex_lock(&guard->lock);
	guard->live = true;
	for (i = 0; i < GUARD_EVENT_BUFS; i++)
		guard_post_event(guard, &guard->event_bufs[i]);
	virtqueue_kick(guard->events);
	mutex_unlock(&guard->lock);

	/*
	 * Not from here: this may wait for the host, and whoever wants the
	 * device gone must not wait for us.
	 */
	queue_work(system_long_wq, &guard->bootlock_work);
}

/* After this the device touches none of our memory; locks are not its memory. */
static void guard_stop(struct guard *guard)
{
	struct guard_request *r, *next;

	mutex_lock(&guard->lock);
	guard->live = false;
	mutex_unlock(&guard->lock);

	virtio_reset_device(guard->vdev);
	cancel_work_sync(&guard->control_work);
	cancel_work_sync(&guard->event_work);

	mutex_lock(&guard->lock);
	if (guard->control) {
		while (virtqueue_detach_unused_buf(guard->control))
			;
		while (virtqueue_detach_unused_buf(guard->events))
			;
	}
	list_for_each_entry_safe(r, next, &guard->requests, node)
		guard_request_end(guard, r, -ENODEV);
	guard->completed++;
	mutex_unlock(&guard->lock);
	wake_up_all(&guard->room);

	/* Its requests have been answered, and it gets no new one through. */
	cancel_work_sync(&guard->bootlock_work);
	complete_all(&guard->bootlocked);
}

static int guard_validate(struct virtio_device *vdev)
{
	struct guard_info info;

	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1)) {
		dev_err(&vdev->dev, "device is not virtio 1.x\n");
		return -EINVAL;
	}
	guard_read_config(vdev, &info);
	if (info.version != VIRTIO_GUARD_VERSION ||
	    info.page_size != PAGE_SIZE || !info.max_request_ranges) {
		dev_err(&vdev->dev, "device version %u, page size %u: not supported\n",
			info.version, info.page_size);
		return -EINVAL;
	}
	return 0;
}

static int guard_probe(struct virtio_device *vdev)
{
	struct guard_info info;
	struct guard *guard;
	int err;

	guard = kzalloc(sizeof(*guard), GFP_KERNEL);
	if (!guard)
		return -ENOMEM;
	kref_init(&guard->ref);
	guard->vdev = vdev;
	mutex_init(&guard->lock);
	INIT_LIST_HEAD(&guard->requests);
	init_waitqueue_head(&guard->room);
	INIT_WORK(&guard->control_work, guard_control_work);
	INIT_WORK(&guard->event_work, guard_event_work);
	INIT_WORK(&guard->bootlock_work, guard_bootlock_work);
	init_completion(&guard->bootlocked);
	guard_read_config_whole(vdev, &info);
	guard->max_request_ranges = info.max_request_ranges;
	vdev->priv = guard;

	err = guard_find_vqs(guard);
	if (err)
		goto err_put;

	mutex_lock(&guard_only_mutex);
	if (guard_only)
		err = -EBUSY;
	else
		guard_only = guard;
	mutex_unlock(&guard_only_mutex);
	if (err) {
		dev_err(&vdev->dev, "there is another guard device already\n");
		goto err_vqs;
	}

	pr_info("%s: host denies 0x%llx, %u ranges at most, generation %llu\n",
		dev_name(&vdev->dev), info.deny_bits, info.max_ranges,
		info.generation);
	if (!virtio_has_feature(vdev, VIRTIO_GUARD_F_NOWRITE))
		pr_err("this host cannot deny writes: nothing can be locked\n");
	guard_start(guard);
	return 0;

err_vqs:
	guard_del_vqs(guard);
err_put:
	vdev->priv = NULL;
	guard_put(guard);
	return err;
}

static void guard_remove(struct virtio_device *vdev)
{
	struct guard *guard = vdev->priv;

	mutex_lock(&guard_only_mutex);
	guard_only = NULL;
	mutex_unlock(&guard_only_mutex);

	guard_stop(guard);
	guard_del_vqs(guard);
	guard_put(guard);
}

#ifdef CONFIG_PM_SLEEP
static int guard_freeze(struct virtio_device *vdev)
{
	guard_stop(vdev->priv);
	guard_del_vqs(vdev->priv);
	return 0;
}

/* The VM may have been reset meanwhile: lock again. */
static int guard_restore(struct virtio_device *vdev)
{
	struct guard *guard = vdev->priv;
	int err = guard_find_vqs(guard);

	if (!err)
		guard_start(guard);
	return err;
}
#endif

static ssize_t locked_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	return guard_bootlock_show(buf);
}
static DEVICE_ATTR_ADMIN_RO(locked);

#define GUARD_INFO_ATTR(field, format)					\
static ssize_t field##_show(struct device *dev,				\
			    struct device_attribute *attr, char *buf)	\
{									\
	struct guard_info info;						\
	int err = guard_read_info(&info);				\
									\
	return err ?: sysfs_emit(buf, format "\n", info.field);		\
}									\
static DEVICE_ATTR_RO(field)

GUARD_INFO_ATTR(generation, "%llu");
GUARD_INFO_ATTR(ranges_in_force, "%u");
GUARD_INFO_ATTR(violations, "%llu");
GUARD_INFO_ATTR(events_lost, "%llu");
GUARD_INFO_ATTR(malformed, "%llu");

static struct attribute *guard_attrs[] = {
	&dev_attr_locked.attr,
	&dev_attr_generation.attr,
	&dev_attr_ranges_in_force.attr,
	&dev_attr_violations.attr,
	&dev_attr_events_lost.attr,
	&dev_attr_malformed.attr,
	NULL
};
ATTRIBUTE_GROUPS(guard);

static const struct virtio_device_id guard_id_table[] = {
	{ VIRTIO_ID_GUARD, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, guard_id_table);

static const unsigned int guard_features[] = { VIRTIO_GUARD_F_NOWRITE };

static struct virtio_driver guard_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.driver.dev_groups = guard_groups,
	.id_table = guard_id_table,
	.feature_table = guard_features,
	.feature_table_size = ARRAY_SIZE(guard_features),
	.validate = guard_validate,
	.probe = guard_probe,
	.remove = guard_remove,
#ifdef CONFIG_PM_SLEEP
	.freeze = guard_freeze,
	.restore = guard_restore,
#endif
};

static int __init guard_init(void)
{
	struct guard *guard;
	int err;

	err = guard_bootlock_parse();
	if (err)
		return err;
	if (guard_bootlock_is_dry()) {
		guard_bootlock_dry_run();
		return 0;
	}
	err = guard_chardev_register();
	if (err)
		return err;
	err = register_virtio_driver(&guard_driver);
	if (err) {
		guard_chardev_unregister();
		return err;
	}

	/* What runs after modprobe may rely on the lock. */
	guard = guard_get();
	if (guard) {
		wait_for_completion_killable(&guard->bootlocked);
		guard_put(guard);
	} else {
		pr_notice("no guard device: nothing is locked\n");
	}
	return 0;
}

static void __exit guard_exit(void)
{
	if (guard_bootlock_is_dry())
		return;
	unregister_virtio_driver(&guard_driver);
	guard_chardev_unregister();
}

module_init(guard_init);
module_exit(guard_exit);

MODULE_DESCRIPTION("Lock kernel memory from outside the kernel");
MODULE_LICENSE("GPL");
