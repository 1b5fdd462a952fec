/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * Guard: protection of guest memory that the guest itself cannot take back.
 *
 * The first half is the virtio device, whose specification is docs/device.md;
 * the second half is what /dev/guard offers to user space.
 */
#ifndef _UAPI_LINUX_VIRTIO_GUARD_H
#define _UAPI_LINUX_VIRTIO_GUARD_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* The device. All fields are little-endian. */

#define VIRTIO_ID_GUARD			63

/* This host enforces VIRTIO_GUARD_NOWRITE. */
#define VIRTIO_GUARD_F_NOWRITE		0

#define VIRTIO_GUARD_VERSION		1

struct virtio_guard_config {
	__le32 version;
	__le32 page_size;
	/* The deny bits that the host enforces now. */
	__le64 deny_bits;
	/* Most entries in one request. */
	__le32 max_request_ranges;
	/* Most disjoint ranges in force at once. */
	__le32 max_ranges;
	/* Grows with every system reset; a lock holds within one generation. */
	__le64 generation;
	__le32 ranges_in_force;
	__le32 reserved;
	__le64 violations;
	__le64 events_lost;
	__le64 malformed;
};

/* Types of request, queue 0. */
#define VIRTIO_GUARD_T_LOCK		1

/* Deny bits. */
#define VIRTIO_GUARD_NOWRITE		(1ULL << 0)
#define VIRTIO_GUARD_NOEXEC		(1ULL << 1)
#define VIRTIO_GUARD_NOREAD		(1ULL << 2)
#define VIRTIO_GUARD_NOEXEC_KERNEL	(1ULL << 3)

struct virtio_guard_range {
	__le64 gfn_start;
	/* Inclusive. */
	__le64 gfn_end;
	__le64 attributes;
};

struct virtio_guard_req {
	__le16 type;
	__le16 flags;
	/* Entries that follow. */
	__le32 count;
};

/* virtio_guard_resp.index and struct guard_lock.index: no entry is to blame. */
#define VIRTIO_GUARD_NO_INDEX		0xffffffffU

struct virtio_guard_resp {
	/* 0 or a positive errno. */
	__le32 status;
	__le32 index;
	/* LOCK: the generation. */
	__le64 value;
};

/* Events, queue 1. */
#define VIRTIO_GUARD_EV_VIOLATION	1

#define VIRTIO_GUARD_ACCESS_WRITE	1

/* virtio_guard_event.source: an emulated device. */
#define VIRTIO_GUARD_SOURCE_DMA		0xffffffffU
/* virtio_guard_event.gva and .rip: not known. */
#define VIRTIO_GUARD_UNKNOWN		(~0ULL)

#define VIRTIO_GUARD_ACTION_INJECT	1
#define VIRTIO_GUARD_ACTION_DROP	2
#define VIRTIO_GUARD_ACTION_PAUSE	3
#define VIRTIO_GUARD_ACTION_SHUTDOWN	4

struct virtio_guard_event {
	__le16 type;
	__le16 access;
	/* vCPU number. */
	__le32 source;
	__le64 gpa;
	__le64 gva;
	__le64 rip;
	__le64 value;
	__le32 size;
	/* How often this was seen since it was last told. */
	__le32 times;
	/* Events lost before this one. */
	__le64 lost;
	__le32 action;
	__le32 reserved;
};

/* /dev/guard. All fields are in the byte order of the machine. */

/**
 * struct guard_range - pages to protect
 * @gfn_start: first guest frame number (physical address >> 12)
 * @gfn_end: last guest frame number, inclusive
 * @attributes: deny bits, VIRTIO_GUARD_*
 */
struct guard_range {
	__u64 gfn_start;
	__u64 gfn_end;
	__u64 attributes;
};

/**
 * struct guard_lock - argument of GUARD_IOC_LOCK
 * @ranges: in: address of an array of struct guard_range
 * @count: in: entries in that array
 * @index: out: the entry that an error is about, or VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation that the lock belongs to; 0 on error
 */
struct guard_lock {
	__u64 ranges;
	__u32 count;
	__u32 index;
	__u64 generation;
};

/**
 * struct guard_info - argument of GUARD_IOC_INFO; see struct virtio_guard_config
 * @version: of the device
 * @page_size: 4096
 * @deny_bits: deny bits that can be asked for
 * @max_request_ranges: most entries in one request
 * @max_ranges: most disjoint ranges in force at once
 * @generation: grows with every system reset
 * @ranges_in_force: disjoint ranges denied now
 * @reserved: 0
 * @violations: accesses refused so far
 * @events_lost: events that were dropped because nobody took them
 * @malformed: chains that the device returned unanswered
 */
struct guard_info {
	__u32 version;
	__u32 page_size;
	__u64 deny_bits;
	__u32 max_request_ranges;
	__u32 max_ranges;
	__u64 generation;
	__u32 ranges_in_force;
	__u32 reserved;
	__u64 violations;
	__u64 events_lost;
	__u64 malformed;
};

/*
 * GUARD_IOC_LOCK: lock all of the ranges until the next system reset, or, on
 * error, none. 0 means that every vCPU and every emulated device is bound by
 * it. EINTR (only after a fatal signal) means that the request is with the
 * host and may still be carried out. ENODEV: the device is gone.
 */
#define GUARD_IOC_LOCK	_IOWR('G', 0xe0, struct guard_lock)
#define GUARD_IOC_INFO	_IOR('G', 0xe1, struct guard_info)

#endif /* _UAPI_LINUX_VIRTIO_GUARD_H */
