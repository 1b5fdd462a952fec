// SPDX-License-Identifier: GPL-2.0-only
/*
 * The virtio device: its coming and going, its configuration.
 *
 * The queues are only touched in process context under guard->lock; their
 * interrupts do no more than queue work.
 */
#include "guard.h"

#include <linux/bits.h>
#include <linux/build_bug.h>
#include <linux/err.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/version.h>
#include <linux/virtio_config.h>

static_assert(sizeof(struct virtio_guard_config) == 80);

/* /dev/guard and in-kernel callers speak to one device. */
static DEFINE_MUTEX(guard_only_mutex);
static struct guard *guard_only;

static void guard_free(struct kref *ref)
{
	kfree(container_of(ref, struct guard, ref));
}

/**
 * guard_put - let go of the device
 * @guard: of guard_get()
 */
void guard_put(struct guard *guard)
{
	kref_put(&guard->ref, guard_free);
}

/**
 * guard_get - the device
 *
 * Return: the device, which the caller has to put; or NULL.
 */
struct guard *guard_get(void)
{
	struct guard *guard;

	mutex_lock(&guard_only_mutex);
	guard = guard_only;
	if (guard)
		kref_get(&guard->ref);
	mutex_unlock(&guard_only_mutex);
	return guard;
}

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
	/* Without the feature nothing can be watched. */
	if (virtio_has_feature(vdev, VIRTIO_GUARD_F_AUDIT))
		virtio_cread_le(vdev, struct virtio_guard_config, audit_bits,
				&info->audit_bits);
	/* Without the feature there may be no such fields. */
	if (!virtio_has_feature(vdev, VIRTIO_GUARD_F_MSR))
		return;
	virtio_cread_le(vdev, struct virtio_guard_config, max_msr_ranges,
			&info->max_msr_ranges);
	virtio_cread_le(vdev, struct virtio_guard_config, msr_ranges_in_force,
			&info->msr_ranges_in_force);
}

/* The counters move as they like: read until two readings agree. */
static void guard_read_config_whole(struct virtio_device *vdev,
				    struct guard_info *info)
{
	struct guard_info again;
	u64 usable = 0;
	int tries;
	u32 bit;

	guard_read_config(vdev, info);
	for (tries = 0; tries < 8; tries++) {
		again = *info;
		guard_read_config(vdev, info);
		if (!memcmp(info, &again, sizeof(again)))
			break;
	}
	/* Feature bit n is about deny bit n. */
	for (bit = VIRTIO_GUARD_F_NOWRITE; bit <= VIRTIO_GUARD_F_NOEXEC_KERNEL;
	     bit++)
		if (virtio_has_feature(vdev, bit))
			usable |= BIT_ULL(bit);
	info->deny_bits &= usable;
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

/**
 * guard_can_walk - does the host read page tables?
 *
 * Return: true if so; false without a device, too.
 */
bool guard_can_walk(void)
{
	struct guard *guard = guard_get();
	bool can;

	if (!guard)
		return false;
	mutex_lock(&guard->lock);
	can = guard->live && guard->queues[GUARD_QUEUE_WALK].vq;
	mutex_unlock(&guard->lock);
	guard_put(guard);
	return can;
}

/* The device comes and goes */

static void guard_answer_cb(struct virtqueue *vq)
{
	struct guard *guard = vq->vdev->priv;

	schedule_work(&guard->answer_work);
}

static void guard_event_cb(struct virtqueue *vq)
{
	struct guard *guard = vq->vdev->priv;

	schedule_work(&guard->event_work);
}

static int guard_find_vqs(struct guard *guard)
{
	/* The last one is there with the feature only. */
	bool walk = virtio_has_feature(guard->vdev, VIRTIO_GUARD_F_KERNEL);
	struct virtqueue *vqs[3] = {};
	int err;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[] = {
		{ "control", guard_answer_cb },
		{ "events", guard_event_cb },
		{ "walk", guard_answer_cb },
	};

	err = virtio_find_vqs(guard->vdev, walk ? 3 : 2, vqs, info, NULL);
#else
	vq_callback_t *callbacks[] = {
		guard_answer_cb, guard_event_cb, guard_answer_cb
	};
	static const char * const names[] = { "control", "events", "walk" };

	err = virtio_find_vqs(guard->vdev, walk ? 3 : 2, vqs, callbacks, names,
			      NULL);
#endif
	if (err)
		return err;
	guard->queues[GUARD_QUEUE_CONTROL].vq = vqs[0];
	guard->events = vqs[1];
	guard->queues[GUARD_QUEUE_WALK].vq = vqs[2];
	return 0;
}

static void guard_del_vqs(struct guard *guard)
{
	unsigned int i;

	guard->vdev->config->del_vqs(guard->vdev);
	for (i = 0; i < GUARD_QUEUES; i++)
		guard->queues[i].vq = NULL;
	guard->events = NULL;
}

static void guard_bootlock_work(struct work_struct *work)
{
	struct guard *guard = container_of(work, struct guard, bootlock_work);

	guard_bootlock_run();
	guard_msrlock_run();
	complete_all(&guard->bootlocked);
}

/* The queues exist: use them. */
static void guard_start(struct guard *guard)
{
	virtio_device_ready(guard->vdev);
	mutex_lock(&guard->lock);
	guard->live = true;
	guard_events_post(guard);
	mutex_unlock(&guard->lock);

	/*
	 * Not from here: this may wait for the host, and whoever wants the
	 * device gone must not wait for us.
	 */
	queue_work(system_long_wq, &guard->bootlock_work);
}

static void guard_detach(struct virtqueue *vq)
{
	if (vq)
		while (virtqueue_detach_unused_buf(vq))
			;
}

/* After this the device touches none of our memory; locks are not its memory. */
static void guard_stop(struct guard *guard)
{
	unsigned int i;

	mutex_lock(&guard->lock);
	guard->live = false;
	mutex_unlock(&guard->lock);

	virtio_reset_device(guard->vdev);
	cancel_work_sync(&guard->answer_work);
	cancel_work_sync(&guard->event_work);

	mutex_lock(&guard->lock);
	for (i = 0; i < GUARD_QUEUES; i++)
		guard_detach(guard->queues[i].vq);
	guard_detach(guard->events);
	guard_requests_abort(guard);
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
	unsigned int i;
	int err;

	guard = kzalloc(sizeof(*guard), GFP_KERNEL);
	if (!guard)
		return -ENOMEM;
	kref_init(&guard->ref);
	guard->vdev = vdev;
	mutex_init(&guard->lock);
	for (i = 0; i < GUARD_QUEUES; i++)
		INIT_LIST_HEAD(&guard->queues[i].requests);
	init_waitqueue_head(&guard->room);
	INIT_WORK(&guard->answer_work, guard_answer_work);
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

	pr_info("%s: host denies 0x%llx, watches 0x%llx, %u ranges at most, generation %llu\n",
		dev_name(&vdev->dev), info.deny_bits, info.audit_bits,
		info.max_ranges, info.generation);
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
	guard_listeners_hang_up();
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

static ssize_t locked_msrs_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	return guard_msrlock_show(buf);
}
static DEVICE_ATTR_ADMIN_RO(locked_msrs);

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
GUARD_INFO_ATTR(msr_ranges_in_force, "%u");

static struct attribute *guard_attrs[] = {
	&dev_attr_locked.attr,
	&dev_attr_locked_msrs.attr,
	&dev_attr_generation.attr,
	&dev_attr_ranges_in_force.attr,
	&dev_attr_violations.attr,
	&dev_attr_events_lost.attr,
	&dev_attr_malformed.attr,
	&dev_attr_msr_ranges_in_force.attr,
	NULL
};
ATTRIBUTE_GROUPS(guard);

static const struct virtio_device_id guard_id_table[] = {
	{ VIRTIO_ID_GUARD, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, guard_id_table);

static const unsigned int guard_features[] = {
	VIRTIO_GUARD_F_NOWRITE,
	VIRTIO_GUARD_F_NOEXEC,
	VIRTIO_GUARD_F_NOREAD,
	VIRTIO_GUARD_F_NOEXEC_KERNEL,
	VIRTIO_GUARD_F_AUDIT,
	VIRTIO_GUARD_F_MSR,
	VIRTIO_GUARD_F_KERNEL,
};

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
	if (!err)
		err = guard_msrlock_parse();
	if (err)
		return err;
	if (guard_bootlock_is_dry()) {
		guard_bootlock_dry_run();
		guard_msrlock_dry_run();
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

MODULE_DESCRIPTION("Protect kernel memory and MSRs from outside the kernel");
MODULE_LICENSE("GPL");
