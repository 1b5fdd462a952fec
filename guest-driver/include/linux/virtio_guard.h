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

/**
 * struct virtio_guard_kernel - argument of virtio_guard_protect_kernel()
 * @flags: VIRTIO_GUARD_KERNEL_*
 * @unmapped: VIRTIO_GUARD_POLICY_*, for pages without mapping
 * @write_exec: the same for pages that are written and executed
 * @ranges: the pages, and what they may get; where they overlap the last counts
 * @count: entries in @ranges
 * @room: entries that @told has room for
 * @told: out: ranges that policy asks for; may be NULL without @room
 * @told_count: out: entries filled
 * @index: out: the entry that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation in which it holds; 0 on error
 * @counts: out: what the page tables say; 0 on errors that do not follow from it
 */
struct virtio_guard_kernel {
	u16 flags;
	u8 unmapped;
	u8 write_exec;
	const struct guard_range *ranges;
	u32 count;
	u32 room;
	struct guard_range *told;
	u32 told_count;
	u32 index;
	u64 generation;
	struct guard_kernel_counts counts;
};

int virtio_guard_protect_kernel(struct virtio_guard_kernel *kernel);

#endif /* _LINUX_VIRTIO_GUARD_H */
