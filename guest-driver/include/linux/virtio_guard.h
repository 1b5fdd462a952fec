/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What other kernel code can ask of the guard.
 */
#ifndef _LINUX_VIRTIO_GUARD_H
#define _LINUX_VIRTIO_GUARD_H

#include <uapi/linux/virtio_guard.h>

int virtio_guard_lock(const struct guard_range *ranges, u32 count, u32 *index,
		      u64 *generation);
int virtio_guard_protect(const struct guard_range *ranges, u32 count,
			 u32 *index, u64 *generation);
int virtio_guard_seal(u64 *generation);
int virtio_guard_query(u64 gfn_start, u64 gfn_end, struct guard_range *ranges,
		       u32 *count, u64 *total);

int virtio_guard_msr_lock(const struct guard_msr *rules, u32 count, u32 *index,
			  u64 *generation);
int virtio_guard_msr_protect(const struct guard_msr *rules, u32 count,
			     u32 *index, u64 *generation);
int virtio_guard_msr_query(u32 first, u32 last, u16 access,
			   struct guard_msr *rules, u32 *count, u64 *total);

#endif /* _LINUX_VIRTIO_GUARD_H */
