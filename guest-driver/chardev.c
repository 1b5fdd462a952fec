// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/guard: the same requests for a privileged process, and events.
 *
 * Everything that comes from user space is copied once and bounded here; what
 * it means is for the device to judge.
 */
#include "guard.h"

#include <linux/build_bug.h>
#include <linux/capability.h>
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

/* Without padding, on 32 bits as on 64. */
static_assert(sizeof(struct guard_range) == 24);
static_assert(sizeof(struct guard_lock) == 24);
static_assert(sizeof(struct guard_query) == 40);
static_assert(sizeof(struct guard_info) == 80);
static_assert(sizeof(struct guard_msr) == sizeof(struct guard_range));
static_assert(sizeof(struct guard_msr_bitmap) == 32);
static_assert(sizeof(struct guard_msr_query) == 32);
static_assert(sizeof(struct guard_kernel) == 152);

/*
 * The four calls that take a struct guard_lock differ in what is asked for: one
 * of @ranges and @rules.
 */
static long guard_ioctl_entries(struct guard_lock __user *arg,
				int (*ranges)(const struct guard_range *ranges,
					      u32 count, u32 *index,
					      u64 *generation),
				int (*rules)(const struct guard_msr *rules,
					     u32 count, u32 *index,
					     u64 *generation))
{
	struct guard_info info;
	struct guard_lock req;
	u64 generation = 0;
	u32 index = VIRTIO_GUARD_NO_INDEX;
	void *entries;
	long err;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;

	err = guard_read_info(&info);
	if (err)
		return err;
	if (!req.count)
		err = -EINVAL;
	else if (req.count > info.max_request_ranges)
		err = -E2BIG;
	if (!err) {
		entries = vmemdup_user(u64_to_user_ptr(req.ranges),
				       req.count * sizeof(struct guard_range));
		if (IS_ERR(entries))
			return PTR_ERR(entries);
		if (ranges)
			err = ranges(entries, req.count, &index, &generation);
		else
			err = rules(entries, req.count, &index, &generation);
		kvfree(entries);
	}

	if (put_user(index, &arg->index) ||
	    put_user(generation, &arg->generation))
		return -EFAULT;
	return err;
}

static long guard_ioctl_msr_bitmap(struct guard_msr_bitmap __user *arg)
{
	struct guard_msr_bitmap req;
	u64 generation = 0;
	u32 index = VIRTIO_GUARD_NO_INDEX;
	void *bitmaps;
	long err = 0;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (req.reserved || !req.bytes || !req.count)
		err = -EINVAL;
	else if (req.bytes > GUARD_BITMAPS_LEN ||
		 req.count > VIRTIO_GUARD_MSR_BITMAPS_MAX)
		err = -E2BIG;
	if (!err) {
		bitmaps = vmemdup_user(u64_to_user_ptr(req.bitmaps), req.bytes);
		if (IS_ERR(bitmaps))
			return PTR_ERR(bitmaps);
		err = guard_msr_bitmap(bitmaps, req.bytes, req.count, &index,
				       &generation);
		kvfree(bitmaps);
	}

	if (put_user(index, &arg->index) ||
	    put_user(generation, &arg->generation))
		return -EFAULT;
	return err;
}

static long guard_ioctl_msr_query(struct guard_msr_query __user *arg)
{
	struct guard_msr_query query;
	struct guard_msr *rules;
	long err;

	if (copy_from_user(&query, arg, sizeof(query)))
		return -EFAULT;
	if (query.access > U16_MAX)
		return -EINVAL;

	query.count = min_t(u32, query.count, GUARD_MAX_RANGES);
	rules = kvmalloc_array(query.count, sizeof(*rules), GFP_KERNEL);
	if (!rules)
		return -ENOMEM;
	err = virtio_guard_msr_query(query.first, query.last, query.access,
				     rules, &query.count, &query.total);
	if (!err && (copy_to_user(u64_to_user_ptr(query.msrs), rules,
				  query.count * sizeof(*rules)) ||
		     copy_to_user(arg, &query, sizeof(query))))
		err = -EFAULT;
	kvfree(rules);
	return err;
}

static long guard_ioctl_seal(struct guard_seal __user *arg)
{
	struct guard_seal seal;
	int err = virtio_guard_seal(&seal.generation);

	if (!err && copy_to_user(arg, &seal, sizeof(seal)))
		err = -EFAULT;
	return err;
}

static long guard_ioctl_query(struct guard_query __user *arg)
{
	struct guard_range *ranges;
	struct guard_query query;
	long err;

	if (copy_from_user(&query, arg, sizeof(query)))
		return -EFAULT;
	if (query.reserved)
		return -EINVAL;

	query.count = min_t(u32, query.count, GUARD_MAX_RANGES);
	ranges = kvmalloc_array(query.count, sizeof(*ranges), GFP_KERNEL);
	if (!ranges)
		return -ENOMEM;
	err = virtio_guard_query(query.gfn_start, query.gfn_end, ranges,
				 &query.count, &query.total);
	if (!err && (copy_to_user(u64_to_user_ptr(query.ranges), ranges,
				  query.count * sizeof(*ranges)) ||
		     copy_to_user(arg, &query, sizeof(query))))
		err = -EFAULT;
	kvfree(ranges);
	return err;
}

static long guard_ioctl_kernel_ask(const struct guard_kernel *req,
				   struct virtio_guard_kernel *kernel)
{
	struct guard_range *ranges;
	struct guard_info info;
	long err;

	err = guard_read_info(&info);
	if (err)
		return err;
	if (req->reserved ||
	    (!req->count && !(req->flags & VIRTIO_GUARD_KERNEL_DRY_RUN)))
		return -EINVAL;
	if (req->count > info.max_request_ranges)
		return -E2BIG;
	if (!req->count)
		return guard_walk_ram(kernel);

	ranges = vmemdup_user(u64_to_user_ptr(req->ranges),
			      req->count * sizeof(*ranges));
	if (IS_ERR(ranges))
		return PTR_ERR(ranges);
	kernel->ranges = ranges;
	kernel->count = req->count;
	err = virtio_guard_protect_kernel(kernel);
	kvfree(ranges);
	return err;
}

static long guard_ioctl_kernel(struct guard_kernel __user *arg)
{
	struct virtio_guard_kernel kernel = {
		.index = VIRTIO_GUARD_NO_INDEX,
	};
	struct guard_kernel req;
	long err;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;

	kernel.flags = req.flags;
	kernel.unmapped = req.unmapped;
	kernel.write_exec = req.write_exec;
	kernel.room = min_t(u32, req.told_count, 2 * VIRTIO_GUARD_TOLD_MAX);
	kernel.told = kvmalloc_array(kernel.room, sizeof(*kernel.told),
				     GFP_KERNEL);
	if (!kernel.told)
		return -ENOMEM;
	err = guard_ioctl_kernel_ask(&req, &kernel);

	req.told_count = kernel.told_count;
	req.index = kernel.index;
	req.generation = kernel.generation;
	req.counts = kernel.counts;
	if (copy_to_user(u64_to_user_ptr(req.told), kernel.told,
			 kernel.told_count * sizeof(*kernel.told)) ||
	    copy_to_user(arg, &req, sizeof(req)))
		err = -EFAULT;
	kvfree(kernel.told);
	return err;
}

static long guard_ioctl_info(struct guard_info __user *arg)
{
	struct guard_info info;
	int err = guard_read_info(&info);

	if (!err && copy_to_user(arg, &info, sizeof(info)))
		err = -EFAULT;
	return err;
}

static long guard_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *at = (void __user *)arg;

	/* Not only at open: a descriptor can be passed on. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;

	switch (cmd) {
	case GUARD_IOC_LOCK:
		return guard_ioctl_entries(at, virtio_guard_lock, NULL);
	case GUARD_IOC_PROTECT:
		return guard_ioctl_entries(at, virtio_guard_protect, NULL);
	case GUARD_IOC_SEAL:
		return guard_ioctl_seal(at);
	case GUARD_IOC_QUERY:
		return guard_ioctl_query(at);
	case GUARD_IOC_MSR_LOCK:
		return guard_ioctl_entries(at, NULL, virtio_guard_msr_lock);
	case GUARD_IOC_MSR_PROTECT:
		return guard_ioctl_entries(at, NULL, virtio_guard_msr_protect);
	case GUARD_IOC_MSR_BITMAP:
		return guard_ioctl_msr_bitmap(at);
	case GUARD_IOC_MSR_QUERY:
		return guard_ioctl_msr_query(at);
	case GUARD_IOC_KERNEL:
		return guard_ioctl_kernel(at);
	case GUARD_IOC_INFO:
		return guard_ioctl_info(at);
	default:
		return -ENOTTY;
	}
}

static int guard_open(struct inode *inode, struct file *file)
{
	struct guard_listener *listener;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	listener = guard_listen();
	if (IS_ERR(listener))
		return PTR_ERR(listener);
	file->private_data = listener;
	return stream_open(inode, file);
}

static int guard_release(struct inode *inode, struct file *file)
{
	guard_unlisten(file->private_data);
	return 0;
}

static ssize_t guard_read(struct file *file, char __user *buf, size_t len,
			  loff_t *pos)
{
	/* As for ioctls. An event tells where the kernel is. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	return guard_listener_read(file->private_data, buf, len,
				   file->f_flags & O_NONBLOCK);
}

static __poll_t guard_poll(struct file *file, poll_table *wait)
{
	return guard_listener_poll(file->private_data, file, wait);
}

static const struct file_operations guard_fops = {
	.owner = THIS_MODULE,
	.open = guard_open,
	.release = guard_release,
	.read = guard_read,
	.poll = guard_poll,
	.unlocked_ioctl = guard_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice guard_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "guard",
	.fops = &guard_fops,
	.mode = 0600,
};

/**
 * guard_chardev_register - make /dev/guard
 *
 * It exists as long as the module; without a device its calls say ENODEV.
 *
 * Return: 0 or a negative errno.
 */
int guard_chardev_register(void)
{
	return misc_register(&guard_misc);
}

/**
 * guard_chardev_unregister - remove /dev/guard
 */
void guard_chardev_unregister(void)
{
	misc_deregister(&guard_misc);
}
