/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * Guard: protection of guest memory, and of MSRs, that the guest itself cannot
 * take back.
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

/* This host enforces VIRTIO_GUARD_NOWRITE, ... */
#define VIRTIO_GUARD_F_NOWRITE		0
#define VIRTIO_GUARD_F_NOEXEC		1
#define VIRTIO_GUARD_F_NOREAD		2
#define VIRTIO_GUARD_F_NOEXEC_KERNEL	3
/* This host can watch accesses. */
#define VIRTIO_GUARD_F_AUDIT		4
/* This host enforces rules for MSRs. */
#define VIRTIO_GUARD_F_MSR		5
/* This host reads page tables. */
#define VIRTIO_GUARD_F_KERNEL		6

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
	/* The deny bits that the host can watch instead of denying. */
	__le64 audit_bits;
	/*
	 * Disjoint ranges of MSRs that rules may speak of, reads and writes
	 * counted each for itself: at most (0 without VIRTIO_GUARD_F_MSR), now.
	 */
	__le32 max_msr_ranges;
	__le32 msr_ranges_in_force;
};

/* Types of request, queue 0. */
#define VIRTIO_GUARD_T_LOCK		1
#define VIRTIO_GUARD_T_PROTECT		2
#define VIRTIO_GUARD_T_SEAL		3
#define VIRTIO_GUARD_T_QUERY		4
#define VIRTIO_GUARD_T_MSR_LOCK		5
#define VIRTIO_GUARD_T_MSR_PROTECT	6
#define VIRTIO_GUARD_T_MSR_BITMAP	7
#define VIRTIO_GUARD_T_MSR_QUERY	8
/* The one type of request on queue 2. */
#define VIRTIO_GUARD_T_PROTECT_KERNEL	9

/* Deny bits. */
#define VIRTIO_GUARD_NOWRITE		(1ULL << 0)
#define VIRTIO_GUARD_NOEXEC		(1ULL << 1)
#define VIRTIO_GUARD_NOREAD		(1ULL << 2)
#define VIRTIO_GUARD_NOEXEC_KERNEL	(1ULL << 3)
/* What one of these would deny goes through, and makes an event. */
#define VIRTIO_GUARD_AUDIT(bits)	((bits) << 8)
/* Only grows until system reset: told by QUERY, not asked for. */
#define VIRTIO_GUARD_IMMUTABLE		(1ULL << 63)

struct virtio_guard_range {
	__le64 gfn_start;
	/* Inclusive. */
	__le64 gfn_end;
	__le64 attributes;
};

/* What a rule for MSRs speaks of. */
#define VIRTIO_GUARD_MSR_READ		1
#define VIRTIO_GUARD_MSR_WRITE		2

/* virtio_guard_msr.action; none of them allows. LOG may stand beside PIN. */
#define VIRTIO_GUARD_MSR_LOG		1
#define VIRTIO_GUARD_MSR_PIN		2
#define VIRTIO_GUARD_MSR_DENY		4

/* virtio_guard_msr.flags: told by MSR_QUERY, not asked for. */
#define VIRTIO_GUARD_MSR_IMMUTABLE	0x80000000U

/* The entry of MSR_LOCK, MSR_PROTECT and MSR_QUERY. */
struct virtio_guard_msr {
	__le32 first;
	/* Inclusive. */
	__le32 last;
	__le16 access;
	__le16 action;
	__le32 flags;
	/* Of PIN: the bits that are pinned; else 0. */
	__le64 mask;
};

/* Head of a bitmap of MSR_BITMAP, which is followed by up to 0x600 bytes. */
struct virtio_guard_msr_bitmap {
	/* VIRTIO_GUARD_MSR_READ, VIRTIO_GUARD_MSR_WRITE. */
	__le32 flags;
	/* Bits, at most 12288; the bytes are whole times 8. */
	__le32 nmsrs;
	/* MSR of bit 0. A set bit allows. */
	__le32 base;
	__le32 pad;
};

#define VIRTIO_GUARD_MSR_BITMAPS_MAX	16
#define VIRTIO_GUARD_MSR_BITMAP_BYTES	0x600

struct virtio_guard_req {
	__le16 type;
	__le16 flags;
	/* Entries that follow. */
	__le32 count;
};

/* virtio_guard_resp.index, struct guard_lock.index: no entry is to blame. */
#define VIRTIO_GUARD_NO_INDEX		0xffffffffU

struct virtio_guard_resp {
	/* 0 or a positive errno. */
	__le32 status;
	__le32 index;
	/* The generation; of a query, how many entries there are. */
	__le64 value;
};

/* virtio_guard_kernel_req.flags */
#define VIRTIO_GUARD_KERNEL_LOCK	1
/* Nothing is set. */
#define VIRTIO_GUARD_KERNEL_DRY_RUN	2

/* virtio_guard_kernel_req.unmapped and .write_exec: what becomes of such pages. */
#define VIRTIO_GUARD_POLICY_LEAVE	0
/* They are told. */
#define VIRTIO_GUARD_POLICY_REPORT	1
/* They are told, and the request is refused. */
#define VIRTIO_GUARD_POLICY_REFUSE	2
/* Of unmapped ones only: they get all attributes of their entries. */
#define VIRTIO_GUARD_POLICY_DENY	3

/* virtio_guard_kernel_req.control */
#define VIRTIO_GUARD_CONTROL_NXE	1
#define VIRTIO_GUARD_CONTROL_WP		2
#define VIRTIO_GUARD_CONTROL_SMEP	4
#define VIRTIO_GUARD_CONTROL_SHSTK	8
#define VIRTIO_GUARD_CONTROL_GBPAGES	16

/* What PROTECT_KERNEL asks; entries follow. */
struct virtio_guard_kernel_req {
	__le16 type;
	__le16 flags;
	__le32 count;
	/* Physical address of the top table. */
	__le64 root;
	/* Linear addresses, whole pages. */
	__le64 va_start;
	/* Inclusive. */
	__le64 va_end;
	/* 4 or 5. */
	__u8 levels;
	__u8 physical_bits;
	__u8 unmapped;
	__u8 write_exec;
	__le32 control;
};

/* Attributes of the ranges that are told. */
#define VIRTIO_GUARD_TOLD_WRITE_EXEC	1
#define VIRTIO_GUARD_TOLD_UNMAPPED	2
/* Ranges that are told of either kind, at most. */
#define VIRTIO_GUARD_TOLD_MAX		4096

/* Its answer, and virtio_guard_range as far as there is room. */
struct virtio_guard_kernel_resp {
	__le32 status;
	__le32 index;
	/* The generation. */
	__le64 value;
	/* As in struct guard_kernel_counts. */
	__le64 pages;
	__le64 unmapped;
	__le64 not_written;
	__le64 not_executed;
	__le64 write_exec;
	__le64 given;
	__le64 elsewhere;
	__le64 ranges;
	__le64 mappings;
	__le64 reserved;
	__le64 outside;
	__le64 tables;
	__le64 told;
};

/* Events, queue 1. */
#define VIRTIO_GUARD_EV_VIOLATION	1
/* The same for an MSR, whose number is in virtio_guard_event.gpa. */
#define VIRTIO_GUARD_EV_MSR		2

#define VIRTIO_GUARD_ACCESS_WRITE	1
#define VIRTIO_GUARD_ACCESS_EXEC	2
#define VIRTIO_GUARD_ACCESS_READ	3

/* virtio_guard_event.source: an emulated device. */
#define VIRTIO_GUARD_SOURCE_DMA		0xffffffffU
/* virtio_guard_event.gva and .rip: not known. */
#define VIRTIO_GUARD_UNKNOWN		(~0ULL)

#define VIRTIO_GUARD_ACTION_INJECT	1
#define VIRTIO_GUARD_ACTION_DROP	2
#define VIRTIO_GUARD_ACTION_PAUSE	3
#define VIRTIO_GUARD_ACTION_SHUTDOWN	4
/* It was watched, and went through. */
#define VIRTIO_GUARD_ACTION_AUDIT	5

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

/*
 * /dev/guard. All fields are in the byte order of the machine, and no structure
 * has padding. Each call needs CAP_SYS_ADMIN.
 */

/**
 * struct guard_range - pages, and what holds on them
 * @gfn_start: first guest frame number (physical address >> 12)
 * @gfn_end: last guest frame number, inclusive
 * @attributes: deny bits and VIRTIO_GUARD_AUDIT() of them
 */
struct guard_range {
	__u64 gfn_start;
	__u64 gfn_end;
	__u64 attributes;
};

/**
 * struct guard_lock - argument of GUARD_IOC_LOCK and GUARD_IOC_PROTECT
 * @ranges: in: address of an array of struct guard_range
 * @count: in: entries in that array
 * @index: out: the entry that an error is about, or VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation in which it holds; 0 on error
 */
struct guard_lock {
	__u64 ranges;
	__u32 count;
	__u32 index;
	__u64 generation;
};

/**
 * struct guard_seal - argument of GUARD_IOC_SEAL
 * @generation: out: the generation in which it holds
 */
struct guard_seal {
	__u64 generation;
};

/**
 * struct guard_query - argument of GUARD_IOC_QUERY
 * @gfn_start: in: first guest frame number
 * @gfn_end: in: last guest frame number, inclusive
 * @ranges: in: address of an array of struct guard_range, to be filled
 * @count: in: entries that the array has room for; out: entries filled
 * @reserved: in: 0
 * @total: out: how many entries there are
 *
 * The entries are sorted and disjoint. One call fills 4096 at most; where
 * @total is more than was filled, go on behind the last one.
 */
struct guard_query {
	__u64 gfn_start;
	__u64 gfn_end;
	__u64 ranges;
	__u32 count;
	__u32 reserved;
	__u64 total;
};

/**
 * struct guard_msr - MSRs, and the guest's rule for them
 * @first: first MSR
 * @last: last MSR, inclusive
 * @access: VIRTIO_GUARD_MSR_READ, VIRTIO_GUARD_MSR_WRITE, or both
 * @action: VIRTIO_GUARD_MSR_LOG, _PIN, _DENY; 0: allow
 * @flags: 0; of what GUARD_IOC_MSR_QUERY fills, VIRTIO_GUARD_MSR_IMMUTABLE
 * @mask: of VIRTIO_GUARD_MSR_PIN, the bits that are pinned; else 0
 */
struct guard_msr {
	__u32 first;
	__u32 last;
	__u16 access;
	__u16 action;
	__u32 flags;
	__u64 mask;
};

/**
 * struct guard_msr_bitmap - argument of GUARD_IOC_MSR_BITMAP
 * @bitmaps: in: address of the bitmaps, one after the other: a struct
 *           virtio_guard_msr_bitmap and its bytes, little-endian
 * @bytes: in: how many bytes they are
 * @count: in: how many bitmaps they are
 * @index: out: the bitmap that an error is about, or VIRTIO_GUARD_NO_INDEX
 * @reserved: in: 0
 * @generation: out: the generation in which it holds; 0 on error
 */
struct guard_msr_bitmap {
	__u64 bitmaps;
	__u32 bytes;
	__u32 count;
	__u32 index;
	__u32 reserved;
	__u64 generation;
};

/**
 * struct guard_msr_query - argument of GUARD_IOC_MSR_QUERY
 * @first: in: first MSR
 * @last: in: last MSR, inclusive
 * @msrs: in: address of an array of struct guard_msr, to be filled
 * @count: in: entries that the array has room for; out: entries filled
 * @access: in: VIRTIO_GUARD_MSR_READ, VIRTIO_GUARD_MSR_WRITE, or both
 * @total: out: how many entries there are
 *
 * Sorted by @first, of the same the reads first. One call fills 4096 at most.
 */
struct guard_msr_query {
	__u32 first;
	__u32 last;
	__u64 msrs;
	__u32 count;
	__u32 access;
	__u64 total;
};

/**
 * struct guard_kernel_counts - what page tables say of the pages of a request
 * @pages: pages of entries with attributes
 * @unmapped: of these: without mapping; not in the counts below
 * @not_written: of these: no mapping writes them
 * @not_executed: of these: no mapping executes them in supervisor mode
 * @write_exec: of these: written, and executed in supervisor mode
 * @given: of these: get attributes
 * @elsewhere: mapped pages that are in no entry with attributes
 * @ranges: disjoint ranges that get attributes, cut at the ends of entries
 * @mappings: how often linear addresses lead to pages
 * @reserved: page table entries with reserved bits, which map nothing
 * @outside: page table entries that name a table outside of memory
 * @tables: table pages that were read
 * @told: ranges to be told, whether or not there was room
 */
struct guard_kernel_counts {
	__u64 pages;
	__u64 unmapped;
	__u64 not_written;
	__u64 not_executed;
	__u64 write_exec;
	__u64 given;
	__u64 elsewhere;
	__u64 ranges;
	__u64 mappings;
	__u64 reserved;
	__u64 outside;
	__u64 tables;
	__u64 told;
};

/**
 * struct guard_kernel - argument of GUARD_IOC_KERNEL
 * @ranges: in: address of an array of struct guard_range, of NOWRITE,
 *          NOEXEC_KERNEL and VIRTIO_GUARD_AUDIT() of them, or none of these
 * @told: in: address of an array of struct guard_range, to be filled with
 *        pages that policy asks for: VIRTIO_GUARD_TOLD_* as attributes
 * @count: in: entries in @ranges; 0, with DRY_RUN only: all of memory, as a LOCK
 * @told_count: in: entries that @told has room for; out: entries filled
 * @flags: in: VIRTIO_GUARD_KERNEL_*
 * @unmapped: in: VIRTIO_GUARD_POLICY_*, for pages without mapping
 * @write_exec: in: the same for pages that are written and executed
 * @index: out: the entry that an error is about, or VIRTIO_GUARD_NO_INDEX
 * @reserved: in: 0
 * @generation: out: the generation in which it holds; 0 on error
 * @counts: out: also with EACCES and other errors that follow from the tables
 */
struct guard_kernel {
	__u64 ranges;
	__u64 told;
	__u32 count;
	__u32 told_count;
	__u16 flags;
	__u8 unmapped;
	__u8 write_exec;
	__u32 index;
	__u64 reserved;
	__u64 generation;
	struct guard_kernel_counts counts;
};

/**
 * struct guard_info - argument of GUARD_IOC_INFO; see struct virtio_guard_config
 * @version: of the device
 * @page_size: 4096
 * @deny_bits: deny bits that can be asked for
 * @audit_bits: deny bits that can be watched, not yet shifted
 * @max_request_ranges: most entries in one request
 * @max_ranges: most disjoint ranges in force at once
 * @generation: grows with every system reset
 * @ranges_in_force: disjoint ranges with attributes now
 * @reserved: 0
 * @violations: accesses refused, or seen where they are watched, so far
 * @events_lost: events that were dropped because nobody took them
 * @malformed: chains that the device returned unanswered
 * @max_msr_ranges: most disjoint ranges of MSRs that rules may speak of; 0: this
 *                  host has no rules for MSRs
 * @msr_ranges_in_force: how many they speak of now
 */
struct guard_info {
	__u32 version;
	__u32 page_size;
	__u64 deny_bits;
	__u64 audit_bits;
	__u32 max_request_ranges;
	__u32 max_ranges;
	__u64 generation;
	__u32 ranges_in_force;
	__u32 reserved;
	__u64 violations;
	__u64 events_lost;
	__u64 malformed;
	__u32 max_msr_ranges;
	__u32 msr_ranges_in_force;
};

/**
 * struct guard_event - what read() gives: one access
 * @type: VIRTIO_GUARD_EV_VIOLATION, VIRTIO_GUARD_EV_MSR
 * @access: VIRTIO_GUARD_ACCESS_*
 * @source: vCPU number, or VIRTIO_GUARD_SOURCE_DMA
 * @action: VIRTIO_GUARD_ACTION_*
 * @gpa: guest-physical address of the access, or the MSR's number
 * @gva: linear address, or VIRTIO_GUARD_UNKNOWN
 * @rip: instruction pointer, or VIRTIO_GUARD_UNKNOWN
 * @value: what was to be written, up to 8 bytes; 0 when not known. Of a logged
 *         read of an MSR, what it gave
 * @size: bytes of the access; 0 when not known
 * @times: how often this was seen since it was last told
 * @dropped: events before this one that this file had no room for
 * @lost: events that the host had no room for, since it knows this VM
 * @time: CLOCK_BOOTTIME in nanoseconds, when the driver took the event
 */
struct guard_event {
	__u32 type;
	__u32 access;
	__u32 source;
	__u32 action;
	__u64 gpa;
	__u64 gva;
	__u64 rip;
	__u64 value;
	__u32 size;
	__u32 times;
	__u64 dropped;
	__u64 lost;
	__u64 time;
};

/*
 * GUARD_IOC_LOCK: add to the attributes of the pages, which can only grow from
 * then on until the next system reset.
 * GUARD_IOC_PROTECT: set the attributes of the pages; 0 frees them. EPERM where
 * that would take something back from pages that were locked or sealed.
 * GUARD_IOC_SEAL: what has attributes now can only grow from then on; rules for
 * MSRs that hold now can only get stricter.
 *
 * All of the ranges or, on error, none. 0 means that every vCPU and every
 * emulated device is bound by it. EINTR (only after a fatal signal) means that
 * the request is with the host and may still be carried out. ENODEV: the device
 * is gone. EOPNOTSUPP: this host cannot do that.
 *
 * GUARD_IOC_QUERY: what holds on pages.
 *
 * GUARD_IOC_MSR_LOCK, GUARD_IOC_MSR_PROTECT, GUARD_IOC_MSR_QUERY: the same for
 * MSRs; guard_lock.ranges is the address of an array of struct guard_msr.
 * GUARD_IOC_MSR_BITMAP: as GUARD_IOC_MSR_PROTECT, with bitmaps. docs/msr.md says
 * what rules mean. No CPU comes or goes while one of these is carried out (but
 * for queries). EOPNOTSUPP without an index: this host has no rules for MSRs.
 *
 * GUARD_IOC_KERNEL: PROTECT, or with LOCK set in the flags LOCK, of what the
 * kernel's own page tables do not use: each page of the ranges gets those of its
 * range's attributes that no mapping of the kernel's half of linear addresses is
 * in need of. The tables are those of the calling process. EACCES: there are
 * pages that a policy refuses. EOPNOTSUPP without an index: this host does not
 * read page tables, or cannot, because this guest's memory is encrypted.
 *
 * read() gives whole records of struct guard_event, as many as fit, from all
 * that happened since open(); the file keeps 256 of them, and counts those that
 * come when it is full in the next that it keeps. EINVAL: less than a record
 * fits. EAGAIN: none is there, with O_NONBLOCK. ENODEV, and POLLHUP of poll():
 * the device that was there at open() is gone, and all was read; only opening
 * the file again helps.
 */
#define GUARD_IOC_LOCK		_IOWR('G', 0xe0, struct guard_lock)
#define GUARD_IOC_INFO		_IOR('G', 0xe1, struct guard_info)
#define GUARD_IOC_PROTECT	_IOWR('G', 0xe2, struct guard_lock)
#define GUARD_IOC_SEAL		_IOR('G', 0xe3, struct guard_seal)
#define GUARD_IOC_QUERY		_IOWR('G', 0xe4, struct guard_query)
#define GUARD_IOC_MSR_LOCK	_IOWR('G', 0xe5, struct guard_lock)
#define GUARD_IOC_MSR_PROTECT	_IOWR('G', 0xe6, struct guard_lock)
#define GUARD_IOC_MSR_BITMAP	_IOWR('G', 0xe7, struct guard_msr_bitmap)
#define GUARD_IOC_MSR_QUERY	_IOWR('G', 0xe8, struct guard_msr_query)
#define GUARD_IOC_KERNEL	_IOWR('G', 0xe9, struct guard_kernel)

#endif /* _UAPI_LINUX_VIRTIO_GUARD_H */
