/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of virtio_guard.ko know of each other: the device's coming and
 * going (core.c), requests to it (request.c), what page tables the host reads
 * (walk.c), events from it (event.c), what is locked at boot (bootlock.c,
 * kernellock.c, msrlock.c), where the kernel's own pages are (image.c), and
 * /dev/guard (chardev.c).
 */
#ifndef _GUARD_H
#define _GUARD_H

#include <linux/completion.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/virtio_guard.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

struct file;
struct guard_listener;
struct mm_struct;
struct poll_table_struct;

/* What the specification allows in one request, and in one answer. */
#define GUARD_MAX_RANGES	4096

/* More bytes of bitmaps than this are none. */
#define GUARD_BITMAPS_LEN	(VIRTIO_GUARD_MSR_BITMAPS_MAX * \
				 (sizeof(struct virtio_guard_msr_bitmap) + \
				  VIRTIO_GUARD_MSR_BITMAP_BYTES))

#define GUARD_EVENT_BUFS	32

/* What follows from page tables. */
#define GUARD_KERNEL_BITS	(VIRTIO_GUARD_NOWRITE | \
				 VIRTIO_GUARD_NOEXEC_KERNEL)

/* Queues of requests. */
enum guard_queue_id {
	GUARD_QUEUE_CONTROL,
	/* For those that have page tables read, which takes its time. */
	GUARD_QUEUE_WALK,
	GUARD_QUEUES
};

/**
 * struct guard_queue - a queue of requests
 * @vq: NULL between freeze and restore, and where the host has no such queue
 * @requests: &struct guard_request with the device
 */
struct guard_queue {
	struct virtqueue *vq;
	struct list_head requests;
};

/**
 * struct guard - the device
 * @ref: held by the driver and by each call that uses the device
 * @vdev: the virtio device; valid while @live
 * @lock: protects the queues, @live and @completed
 * @live: the queues may be used
 * @queues: requests
 * @events: violations; NULL between freeze and restore
 * @completed: grows when a request ends, for those who wait for @room
 * @room: woken when a queue of requests may have room again
 * @answer_work: takes answers
 * @event_work: takes violations
 * @bootlock_work: locks what the module parameters name
 * @bootlocked: @bootlock_work has ended once
 * @max_request_ranges: most entries in one request
 * @event_bufs: the buffers on @events
 */
struct guard {
	struct kref ref;
	struct virtio_device *vdev;
	struct mutex lock;
	bool live;
	struct guard_queue queues[GUARD_QUEUES];
	struct virtqueue *events;
	unsigned long completed;
	wait_queue_head_t room;
	struct work_struct answer_work;
	struct work_struct event_work;
	struct work_struct bootlock_work;
	struct completion bootlocked;
	u32 max_request_ranges;
	struct virtio_guard_event event_bufs[GUARD_EVENT_BUFS];
};

/* core.c */
struct guard *guard_get(void);
void guard_put(struct guard *guard);
int guard_read_info(struct guard_info *info);
bool guard_can_walk(void);

/* request.c */
void guard_answer_work(struct work_struct *work);
void guard_requests_abort(struct guard *guard);
int guard_msr_bitmap(const void *bitmaps, size_t bytes, u32 count, u32 *index,
		     u64 *generation);

/* event.c */
void guard_event_work(struct work_struct *work);
void guard_events_post(struct guard *guard);
struct guard_listener *guard_listen(void);
void guard_unlisten(struct guard_listener *listener);
ssize_t guard_listener_read(struct guard_listener *listener, char __user *buf,
			    size_t len, bool nonblock);
void guard_listeners_hang_up(void);
__poll_t guard_listener_poll(struct guard_listener *listener,
			     struct file *file, struct poll_table_struct *wait);

/* walk.c */
struct mm_struct *guard_walk_begin(struct virtio_guard_kernel_req *req);
void guard_walk_end(struct mm_struct *mm);
int guard_walk_ram(struct virtio_guard_kernel *kernel);

/* kernellock.c */
int guard_kernellock(void);
void guard_kernellock_dry_run(void);

/* bootlock.c */
int guard_bootlock_parse(void);
bool guard_bootlock_is_dry(void);
void guard_bootlock_dry_run(void);
void guard_bootlock_run(void);
ssize_t guard_bootlock_show(char *buf);

/* msrlock.c */
int guard_msrlock_parse(void);
void guard_msrlock_dry_run(void);
void guard_msrlock_run(void);
ssize_t guard_msrlock_show(char *buf);

/* image.c */
int guard_find_text(struct guard_range *range);
int guard_find_rodata(struct guard_range *range);
int guard_find_idt(struct guard_range *range);
int guard_find_data(const char *name, u64 attributes,
		    struct guard_range *ranges, u32 room, u32 *count);
int guard_find_ram(u64 attributes, struct guard_range *ranges, u32 room,
		   u32 *count);
bool guard_crash_kernel_reserved(void);

/* chardev.c */
int guard_chardev_register(void);
void guard_chardev_unregister(void);

#endif /* _GUARD_H */
