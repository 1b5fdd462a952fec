// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/guard: the same requests for a privileged process.
 *
 * Everything that comes from user space is copied once and bounded here; what
 * it means is for the device to judge.
 */
#include "guard.h"

#include <linux/capability.h>
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/string.h>
#include <linux/uaccess.h>

static long guard_ioctl_lock(struct guard_lock __user *arg)
{
	struct guard_range *ranges;
	struct guard_info info;
	struct guard_lock req;
	u64 generation = 0;
	u32 index = VIRTIO_GUARD_NO_INDEX;
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
		ranges = vmemdup_user(u64_to_user_ptr(req.ranges),
				      req.count * sizeof(*ranges));
		if (IS_ERR(ranges))
			return PTR_ERR(ranges);
		err = virtio_guard_lock(ranges, req.count, &index, &generation);
		kvfree(ranges);
	}

	if (put_user(index, &arg->index) ||
	    put_user(generation, &arg->generation))
		return -EFAULT;
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
	/* Not only at open: a descriptor can be passed on. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;

	switch (cmd) {
	case GUARD_IOC_LOCK:
		return guard_ioctl_lock((struct guard_lock __user *)arg);
	case GUARD_IOC_INFO:
		return guard_ioctl_info((struct guard_info __user *)arg);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations guard_fops = {
	.owner = THIS_MODULE,
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
