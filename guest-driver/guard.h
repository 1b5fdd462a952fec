/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of virtio_guard.ko know of each other: the device (core.c),
 * what is locked at boot (bootlock.c), where the kernel's own pages are
 * (image.c), and /dev/guard (chardev.c).
 */
#ifndef _GUARD_H
#define _GUARD_H

#include <linux/types.h>
#include <linux/virtio_guard.h>

#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

/* core.c */
int guard_read_info(struct guard_info *info);

/* bootlock.c */
int guard_bootlock_parse(void);
bool guard_bootlock_is_dry(void);
void guard_bootlock_dry_run(void);
void guard_bootlock_run(void);
ssize_t guard_bootlock_show(char *buf);

/* image.c */
int guard_find_text(struct guard_range *range);
int guard_find_rodata(struct guard_range *range);
int guard_find_idt(struct guard_range *range);

/* chardev.c */
int guard_chardev_register(void);
void guard_chardev_unregister(void);

#endif /* _GUARD_H */
